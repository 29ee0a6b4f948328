"""10,000 LoRA files with something wrong: each ends in a picture or a sentence, never in a traceback."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from loratorio.adapters.bank import Bank
from loratorio.errors import LoratorioError
from loratorio.standalone.checkpoint import Checkpoint, load_checkpoint
from loratorio.standalone.generate import Request, generate
from loratorio.standalone.lora_files import LoadedLora, load_lora
from tests import tiny
from tests.lora_kinds import KINDS, weights_of
from tests.standalone.test_lora_strengths import CONV, LINEAR, NAMINGS, NORM, layer_of

TIMES, PARTS = 10_000, 10
DTYPES = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int8, torch.int64, torch.bool, torch.complex64),
)
BITS = (
    *(
        "",
        ".",
        "_",
        "lora_unet_",
        "lora_te_",
        "lora_te2_",
        "unet.",
        "text_encoder.",
        "diffusion_model.",
        "lycoris_",
        "oft_unet_",
        "base_model.model.",
        "text_encoders.clip_l.",
    ),
    *(
        "down_blocks",
        "_0",
        ".0",
        "input_blocks_1_0",
        "to_q",
        "norm1",
        "time_embed",
        ".default",
        "bundle_emb.x.",
    ),
    *(
        ".alpha",
        ".diff",
        ".diff_b",
        ".lora_up.weight",
        ".lora_A.weight",
        ".hada_w1_a",
        ".lokr_w2",
        ".dora_scale",
    ),
    *(
        ".bias_indices",
        ".bias_size",
        ".w_norm",
        ".oft_blocks",
        ".a1.weight",
        ".on_input",
        ".lora_mid.weight",
        ".scale",
        ".magnitude",
        ".lora_A.mine.weight",
        ".oft_diag",
        ".weight",
    ),
    *("\0", "é", "😀", "x" * 500, "../", " "),
)
VALUES = (
    None,
    True,
    0,
    -1,
    1e308,
    float("inf"),
    float("nan"),
    "",
    "8",
    "x",
    [],
    [1],
    {},
    {"to_q": 8},
    {"(": 1},
    {"(a*)*b": 2},
)
CONFIG = (
    *("lora_alpha", "r", "alpha", "alpha_pattern", "rank_pattern", "use_rslora", "rs_lora", "auto_mapping"),
    *("unet.lora_alpha", "unet.alpha_pattern", "unet.use_rslora", "unet.r"),
)

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return load_checkpoint(tiny.save_sd(tmp_path_factory.mktemp("model") / "sd"))


def sound(model: Checkpoint, chance: random.Random) -> Tensors:
    """A file of one or two layers that is as it should be."""
    tensors: Tensors = {}
    for _ in range(chance.randint(1, 2)):
        path = chance.choice((LINEAR, CONV, NORM))
        shape = tuple(layer_of(model, path).weight.shape)  # type: ignore[union-attr, arg-type]
        fitting = [kind for kind in KINDS if len(shape) == 4 or (len(shape) == 2 and "tucker" not in kind)]
        kind = chance.choice(fitting or ["diff"])
        naming = chance.choice([each for each in NAMINGS if kind == "lora" or "PEFT" not in each])
        alpha = chance.choice((None, 1.0, 4.0))
        tensors |= NAMINGS[naming](path, weights_of(kind, shape, chance.choice((1, 4)), alpha, torch.float32))
    return tensors


def broken_key(tensors: Tensors, chance: random.Random) -> None:
    key = chance.choice(list(tensors))
    start, end = sorted((chance.randint(0, len(key)), chance.randint(0, len(key))))
    new = {
        "cut": key[:start],
        "without": key[:start] + key[end:],
        "with": key[:start] + chance.choice(BITS) + key[start:],
        "instead": key[:start] + chance.choice(BITS) + key[end:],
        "other end": key.rpartition(".")[0] + chance.choice(BITS),
    }[chance.choice(("cut", "without", "with", "instead", "other end"))]
    tensors[new or "x"] = tensors.pop(key).clone()


def broken_tensor(tensors: Tensors, chance: random.Random) -> None:
    key = chance.choice(list(tensors))
    tensor = tensors[key]
    shape = list(tensor.shape)
    for _ in range(chance.randint(0, 2)):
        place = chance.randint(0, len(shape))
        if shape and chance.random() < 0.7:
            place = min(place, len(shape) - 1)
            shape[place] = chance.choice((0, 1, 2, 3, 32, shape[place] + 1))
        elif chance.random() < 0.5:
            shape.insert(place, chance.choice((0, 1, 2)))
    filled = torch.full(shape, chance.choice((0.0, 1.0, -1.0, 1e30, float("nan"), float("inf"))))
    tensors[key] = (filled if chance.random() < 0.5 else torch.randn(shape)).to(chance.choice(DTYPES))


def missing_or_further(tensors: Tensors, chance: random.Random) -> None:
    key = chance.choice(list(tensors))
    if len(tensors) > 1 and chance.random() < 0.5:
        del tensors[key]
    else:
        tensors[key.rpartition(".")[0] + chance.choice(BITS) or "x"] = tensors[key].clone()


def metadata(chance: random.Random) -> dict[str, str] | None:
    if chance.random() < 0.6:
        return None
    values = {chance.choice(CONFIG): chance.choice(VALUES) for _ in range(3)}
    text = json.dumps(values)
    if chance.random() < 0.3:
        return {key: chance.choice((str(value), json.dumps(value))) for key, value in values.items()}
    return {
        chance.choice(
            ("lora_adapter_metadata", "ss_network_args", "modelspec.trigger_phrase")
        ): chance.choice((text, text[:-1], "[" * chance.choice((10, 100_000)), "null", ""))
    }


def broken_bytes(content: bytes, chance: random.Random) -> bytes:
    """The header's length, its JSON, or the end of the file."""
    changed = bytearray(content)
    header = int.from_bytes(content[:8], "little")
    for _ in range(chance.randint(1, 3)):
        place = chance.choice(
            (chance.randint(0, 7), chance.randint(8, 8 + header), chance.randint(0, len(changed) - 1))
        )
        changed[min(place, len(changed) - 1)] = chance.choice(
            (0, 34, 44, 48, 57, 93, 125, 255, chance.randint(0, 255))
        )
    return bytes(changed[: chance.randint(0, len(changed))] if chance.random() < 0.3 else changed)


BREAK: tuple[Callable[[Tensors, random.Random], None], ...] = (broken_key, broken_tensor, missing_or_further)


def fuzzed(model: Checkpoint, chance: random.Random, folder: Path) -> Path:
    tensors = sound(model, chance)
    for _ in range(chance.randint(0, 3)):
        chance.choice(BREAK)(tensors, chance)
    content = save({key: each.contiguous() for key, each in tensors.items()}, metadata(chance))
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({chance.choice(CONFIG): chance.choice(VALUES) for _ in range(3)}))
    file = folder / "adapter_model.safetensors"
    file.write_bytes(broken_bytes(content, chance) if chance.random() < 0.3 else content)
    return file


@pytest.mark.parametrize("part", range(PARTS))
def test_a_picture_or_a_sentence(model: Checkpoint, tmp_path: Path, part: int) -> None:
    chance = random.Random(part)
    torch.manual_seed(part)
    layers = dict(model.unet.named_modules())
    used = 0
    for turn in range(TIMES // PARTS):
        file = fuzzed(model, chance, tmp_path)
        said = ""
        try:
            loaded = load_lora(file, "adapter_model", model)
            bank = Bank([loaded.unet])
            with bank.attached(layers):
                bank.prepare(torch.device("cpu"), torch.float32)
            if turn % 20 == 0:
                picture(model, tmp_path, loaded)
        except LoratorioError as problem:
            said = str(problem)
        used += not said
        # A sentence: what, which LoRA, and no more than can be read.
        assert not said or "LoRA" in said or "NaN" in said, said
        assert not said or (said.endswith(".") and len(said) < 1000), said
    assert TIMES // PARTS * 0.1 < used < TIMES // PARTS * 0.9


def picture(model: Checkpoint, folder: Path, loaded: LoadedLora) -> None:
    def load(*_: Any) -> LoadedLora:
        return loaded

    request = Request("a b <lora:adapter_model:1>", steps=1, width=64, height=64)
    assert len(generate(model, folder, request, load=load).images) == 1
