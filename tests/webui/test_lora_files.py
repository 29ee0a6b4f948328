"""At which strength the WebUI itself reads LoRA files, against the formulas, and that we compose them just so.

`pytest -rP` prints the figures of docs/LORA_FILES.md. Files are made in the WebUI's LoRA folder, which must be on this machine, and taken
away again.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.lora_kinds import BY_BLOCKS, KINDS, formula, weights_of

from .client import WebUI, psnr

CASES = [
    *(
        (kind, 4, alpha, torch.float32)
        for kind in KINDS
        for alpha in (None, 2.0, 4.0)
        if kind != "diff" or alpha is None
    ),
    *(
        ("lora", 4, 2.0, dtype)
        for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
    ),
    ("lora", 4, 0.0, torch.float32),
    # Infinite in half precision, as LyCORIS saves it where alpha does not count.
    ("lokr-full", 4, 1e5, torch.float32),
    *((BY_BLOCKS, 4, alpha, torch.float32) for alpha in (None, 0.001)),
]
THEIR_OWN = ("lokr-tucker", "lora-dora", "loha-dora", "lokr-dora", BY_BLOCKS)
"""Kinds that some WebUI reads otherwise than by the formula: rows of docs/LORA_FILES.md."""


@pytest.fixture(scope="module")
def folder(webui: WebUI) -> Path:
    listed = webui.call("loras")
    path = Path(listed[0]["path"]).parent if listed else Path("none")
    if not path.is_dir():
        pytest.skip("the WebUI's LoRA folder is not on this machine")
    return path


@pytest.fixture(scope="module")
def layers(webui: WebUI, has_reference: bool) -> dict[str, list[int]]:
    """A linear layer and a convolution of 3×3, and their shapes."""
    if not has_reference:
        pytest.skip("reference_extension is not installed in the WebUI")
    webui.txt2img(steps=1)  # Forges load the model when it is first needed.
    every: dict[str, list[int]] = webui.call("slow-reference-layers")
    linear = next(name for name, shape in every.items() if name.endswith("attn1_to_q") and len(shape) == 2)
    conv = next(name for name in every if name.startswith("input_blocks") and name.endswith("in_layers_2"))
    return {name: every[name] for name in (linear, conv)}


@pytest.fixture
def name(webui: WebUI, folder: Path) -> Iterator[str]:
    made = f"strength-{uuid.uuid4().hex[:8]}"
    yield made
    (folder / f"{made}.safetensors").unlink(missing_ok=True)
    webui.call("refresh-loras", {})


@pytest.mark.parametrize(("kind", "rank", "alpha", "dtype"), CASES)
def test_strengths(
    webui: WebUI,
    folder: Path,
    layers: dict[str, list[int]],
    name: str,
    kind: str,
    rank: int,
    alpha: float | None,
    dtype: torch.dtype,
) -> None:
    made = {
        layer: weights_of(kind, tuple(shape), rank, alpha, dtype)
        for layer, shape in layers.items()
        if usable(kind, shape)
    }
    # Small changes, so that there is a picture to compare.
    for own in made.values():
        for tail in own.keys() & {
            "lora_up.weight",
            "hada_w1_a",
            "lokr_w1",
            "lokr_w1_a",
            "diff",
            "oft_blocks",
        }:
            own[tail] = (own[tail].float() * 0.05).to(dtype)
        if alpha is not None and alpha > 65504:
            own["alpha"] = own["alpha"].half()
    tensors = {
        f"lora_unet_{layer}.{tail}": tensor.contiguous()
        for layer, own in made.items()
        for tail, tensor in own.items()
    }
    save_file(tensors, folder / f"{name}.safetensors")
    webui.call("refresh-loras", {})
    found, expected = zip(
        *(both(webui, name, layer, layers[layer], own) for layer, own in made.items()), strict=True
    )
    theirs, right = torch.cat(found), torch.cat(expected)
    strength = float(theirs @ right / (right @ right).clamp_min(1e-30))
    off = float((theirs - strength * right).norm() / theirs.norm().clamp_min(1e-12))
    print(f"| {kind} | {alpha} | {str(dtype).removeprefix('torch.')} | {strength:.3f} | {off:.1e} |")
    if kind not in THEIR_OWN:
        assert strength == pytest.approx(0.0 if alpha == 0 else 1.0, abs=1e-4)
        assert off < 1e-4
    prompt = f"a red circle <lora:{name}:1>"
    merged = webui.txt2img(prompt=prompt)
    composed = webui.txt2img({"recentre": 0, "share": 0, "reuse": 1}, prompt=prompt)
    close = psnr(merged.image, composed.image)
    print(f"  composed against merged: {close:.1f} dB")
    assert close > 40


SPELLINGS: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    # Other tails than kohya's, and the header.
    "ai-toolkit's magnitudes": ({"dora_scale": "magnitude"}, {}),
    "PEFT's magnitudes": ({"dora_scale": "lora_magnitude_vector.mine"}, {}),
    "alpha in the header": ({"alpha": "", "dora_scale": ""}, {"lora_alpha": "2", "r": "4"}),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_what_the_webui_passes_over_is_composed_just_so(
    webui: WebUI, folder: Path, layers: dict[str, list[int]], name: str, spelling: str
) -> None:
    """The same picture ticked and unticked, and a word on magnitudes that have no effect."""
    tails, header = SPELLINGS[spelling]
    tensors = {}
    for layer, shape in layers.items():
        for tail, tensor in weights_of("lora-dora", tuple(shape), 4, 2.0, torch.float32).items():
            if tails.get(tail, tail):
                small = tensor * 0.05 if tail == "lora_up.weight" else tensor
                tensors[f"lora_unet_{layer}.{tails.get(tail, tail)}"] = (
                    small.flatten() if "mag" in tails.get(tail, tail) else small.contiguous()
                )
    save_file(tensors, folder / f"{name}.safetensors", header)
    webui.call("refresh-loras", {})
    prompt = f"a red circle <lora:{name}:1>"
    merged = webui.txt2img(prompt=prompt)
    composed = webui.txt2img({"recentre": 0, "share": 0, "reuse": 1}, prompt=prompt)
    close = psnr(merged.image, composed.image)
    print(f"{spelling}: {close:.1f} dB")
    assert close > 40
    assert ("does not read its magnitudes" in composed.infotext) == ("magnitudes" in spelling)


def usable(kind: str, shape: list[int]) -> bool:
    return "tucker" not in kind or len(shape) == 4


def both(
    webui: WebUI, name: str, layer: str, shape: list[int], own: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """The WebUI's change of a layer, and the formula's, flat float64."""
    answer = webui.call("slow-reference-change", {"lora": name, "layer": layer})
    before = torch.tensor(answer["before"]).reshape(shape)
    found, expected = torch.tensor(answer["change"], dtype=torch.float64), formula(own, before)
    # Of a row of zeros, as a model that was made wider has, DoRA has no direction.
    rows = before.flatten(1).norm(dim=1) > 0
    return found.reshape(shape)[rows].flatten(), expected[rows].flatten()
