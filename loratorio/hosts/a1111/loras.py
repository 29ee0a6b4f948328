"""The LoRAs that the WebUI has activated: which they are, whether they change text, and what each adds to the UNet.

The WebUI's own Lora extension (`networks`) reads the files and supports every kind of LoRA. This module turns its modules
into deltas.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...adapters.delta import Adapter, Delta, Dense, LowRank, check_tensors, fit
from ...errors import LoratorioError
from ...prompt.admission import ActiveLora
from ...prompt.roles import TaggedLora, partly_used_note
from ..shared.lora_layers import layers, unread_magnitudes_note
from ..shared.tags import WrittenTag, WrittenTags

Network = Any  # networks.Network of the WebUI's Lora extension

UNET = "diffusion_model"
"""The names of the UNet's layers begin so in the WebUI; all others are the text encoder's."""


def lora_extension() -> Any:
    """The module `networks` of the built-in Lora extension. Raises LoratorioError when it is disabled."""
    try:
        import networks
    except ImportError:
        raise LoratorioError(
            "The WebUI's built-in extension Lora is disabled. LoRAtorio needs it to read LoRAs: enable it in the tab Extensions."
        ) from None
    return networks


def unet_layers(sd_model: Any) -> dict[str, nn.Module]:
    """The UNet's layers by the WebUI's names for them."""
    mapping: Mapping[str, nn.Module] = sd_model.network_layer_mapping
    return {name: layer for name, layer in mapping.items() if name.startswith(UNET)}


_STAMPS: dict[str, float | None] = {}
"""By name of each LoRA that was active in a pass, when its file was written, as the WebUI has read it."""

_CACHES = ("cached_c", "cached_uc", "cached_hr_c", "cached_hr_uc")
"""The WebUI's caches of conditioning: each holds what it was made for, and the conditioning."""


def forget_former_files(p: Any) -> None:
    """Let the WebUI merge those LoRAs anew that it has read since the last pass, and encode text anew after a file was replaced.

    It reads a file that was replaced, but merges it into a layer only if the LoRAs' names or strengths change, and its caches of
    conditioning go by the prompt. So a picture would have the new file's UNet part and the old one's text part.
    """
    from modules import shared

    stamps = {network.name: network.mtime for network in lora_extension().loaded_networks}
    new = {name for name, stamp in stamps.items() if name not in _STAMPS or _STAMPS[name] != stamp}
    for layer in shared.sd_model.network_layer_mapping.values() if new else ():
        if any(merged[0] in new for merged in getattr(layer, "network_current_names", ())):
            layer.network_current_names = ((None,),)
    for cache in (getattr(p, name, None) for name in _CACHES if new & _STAMPS.keys()):
        if cache:
            cache[0] = None
    _STAMPS.update(stamps)


@contextmanager
def activated(loras: Sequence[Network]) -> Iterator[None]:
    """Inside this block, exactly these LoRAs are active in the WebUI.

    It merges them into a layer's weights when the layer is next used, or takes them out again.
    """
    loaded: list[Network] = lora_extension().loaded_networks
    before = list(loaded)
    loaded[:] = loras
    try:
        yield
    finally:
        loaded[:] = before


@contextmanager
def bundled_embeddings(loras: Sequence[Network], every: Sequence[Network]) -> Iterator[None]:
    """Inside this block, of the textual inversions bundled with `every` LoRA, only those of `loras` are known."""
    from modules import sd_hijack, shared

    database = sd_hijack.model_hijack.embedding_db
    others = [lora for lora in every if lora not in loras]
    hidden = [
        embedding for lora in others for embedding in lora.bundle_embeddings.values() if embedding.loaded
    ]
    for embedding in hidden:
        database.register_embedding_by_name(None, shared.sd_model, embedding.name)
    try:
        yield
    finally:
        for embedding in hidden:
            database.register_embedding(embedding, shared.sd_model)


def changes_text(lora: ActiveLora, sd_model: Any) -> bool:
    """Whether text conditioning by this model depends on this LoRA."""
    network, layers = lora.source, sd_model.network_layer_mapping
    has_layers = any(not name.startswith(UNET) and name in layers for name in network.modules)
    return bool(has_layers and (text_strength(lora) or lora.may_change)) or any(
        embedding.loaded for embedding in network.bundle_embeddings.values()
    )


def activated_loras(p: Any) -> list[ActiveLora]:
    """The LoRAs that the WebUI has activated, with what their tags and their files say of them."""
    loaded, tags = lora_extension().loaded_networks, WrittenTags(p)
    loras = [(network, tags.take(network.mentioned_name)) for network in loaded]
    activated = [_activated(network, tag) for network, tag in loras]
    # The WebUI has one network for all tags of a LoRA, with the last one's strengths.
    placed = [lora.source for lora in activated if lora.tagged.place or lora.tagged.words]
    return [
        replace(lora, text=tag.strengths[0], strength=tag.strengths[1], is_own=True)
        if tag.strengths and lora.source in placed and loaded.count(lora.source) > 1 and not lora.may_change
        else lora
        for lora, (_, tag) in zip(activated, loras, strict=True)
    ]


def _activated(network: Network, tag: WrittenTag) -> ActiveLora:
    return ActiveLora(
        TaggedLora(
            name_of(network), tag.options, network.network_on_disk.metadata or {}, file=_path_of(network)
        ),
        float(network.unet_multiplier),
        float(network.te_multiplier),
        network,
        changes_by_step(network),
    )


def text_strength(lora: ActiveLora) -> float:
    """A LoRA's strength in the text encoder, as it is now."""
    return lora.text if lora.is_own else float(lora.source.te_multiplier)


def unet_strength(lora: ActiveLora) -> float:
    """A LoRA's strength in the UNet, as it is now."""
    return lora.strength if lora.is_own else float(lora.source.unet_multiplier)


def _path_of(lora: Network) -> Path | None:
    name = getattr(lora.network_on_disk, "filename", None)
    return Path(name) if name else None


def name_of(lora: Network) -> str:
    """The LoRA's name as the prompt has it."""
    return str(lora.mentioned_name or lora.name)


def identity(lora: Network) -> tuple[Any, ...]:
    """Equal for two activations of one LoRA that give the same deltas. An extension may have changed the LoRA itself, not its file."""
    return lora, lora.dyn_dim


def changes_by_step(lora: Network) -> bool:
    """Whether an extension computes the LoRA's strength at every read, as loractl does."""
    return isinstance(getattr(type(lora), "unet_multiplier", None), property)


def at_text_strength(lora: Network, strength: float) -> Network:
    """A copy of `lora` for the list of active LoRAs, with this strength in the text encoder. `lora` itself is unchanged."""
    twin = SimpleNamespace(**vars(lora))
    twin.te_multiplier = twin.unet_multiplier = strength
    twin.modules = {}
    for name, module in lora.modules.items():
        if not name.startswith(UNET):
            twin.modules[name] = copy.copy(module)
            twin.modules[name].network = twin
    return twin


def restore_base(layers: Mapping[str, nn.Module]) -> None:
    """Remove the LoRAs that the WebUI has merged into these layers' weights, now rather than when the layers run."""
    extension = lora_extension()
    takes_lora = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)
    with activated(()), torch.no_grad():
        for layer in layers.values():
            if isinstance(layer, takes_lora):
                extension.network_apply_weights(layer)


def adapter_of(lora: Network, layers: Mapping[str, nn.Module], skip_misfits: bool = False) -> Adapter:
    """The changes of `lora` to the UNet at strength 1. Every kind that the WebUI reads is proportional to its strength.

    Args:
        layers: the UNet's layers, with the base weights in them (see `restore_base`).
        skip_misfits: skip parts for another model, as the WebUI does for a refiner.

    Raises:
        LoratorioError: a part of the LoRA is not for this model, or is of a kind that has no delta.
    """
    deltas: dict[str, list[Delta]] = {}
    for name, module in lora.modules.items():
        if not name.startswith(UNET):
            continue
        layer = layers.get(name)
        if layer is None:
            if not skip_misfits:
                raise _not_for_this_model(lora, name, "the model has no such layer")
            continue
        try:
            delta = _delta(module, layer)
            fit(delta, layer)
        except (RuntimeError, ValueError, NotImplementedError) as problem:
            if skip_misfits:
                continue
            raise _not_for_this_model(lora, name, str(problem)) from problem
        deltas[name] = [delta]
    return Adapter(name_of(lora), deltas)


def check_text_numbers(lora: Network) -> None:
    """Raise LoratorioError if the text encoder's part contains numbers that no model could use."""
    for name, module in lora.modules.items():
        if not name.startswith(UNET):
            own = vars(module).values()
            tensors = [value for value in own if isinstance(value, Tensor) and value.is_floating_point()]
            layers = [value for key, value in vars(module).items() if key.endswith("_model")]
            tensors += [
                each for layer in layers if isinstance(layer, nn.Module) for each in layer.parameters()
            ]
            check_tensors(name_of(lora), name, tensors)


def partly_fitting(lora: Network, adapter: Adapter, sd_model: Any) -> str:
    """A sentence if only some of a LoRA's layers in the WebUI, which may be for another model, match this one; else nothing."""
    text = [
        name for name in lora.modules if not name.startswith(UNET) and name in sd_model.network_layer_mapping
    ]
    used = len(adapter.deltas) + len(text)
    return partly_used_note(name_of(lora), used, len(lora.modules)) if used else ""


def partly_used(lora: Network) -> str:
    """Sentences if the WebUI's model has no layer for some parts of the LoRA's file, or the WebUI does not read all of it; or nothing."""
    names = _names_in(lora.network_on_disk)
    used = layers(module.network_key for module in lora.modules.values())
    every = layers(names) | used
    partly = partly_used_note(name_of(lora), len(used), len(every))
    return f"{partly} {unread_magnitudes_note(name_of(lora), names)}".strip()


def _names_in(file: Any) -> list[str]:
    """Names of the tensors in a LoRA file; empty for other formats than .safetensors."""
    if not getattr(file, "is_safetensors", False):
        return []
    try:
        with safe_open(file.filename, framework="pt") as opened:
            return list(opened.keys())
    except (OSError, SafetensorError):
        return []


def _not_for_this_model(lora: Network, name: str, why: str) -> LoratorioError:
    return LoratorioError(
        f"LoRA {name_of(lora)} cannot be applied to the layer {name}: {why}. It may have been made for another kind of model. "
        "Remove it from the prompt, or untick LoRAtorio."
    )


def _delta(module: Any, layer: nn.Module) -> Delta:
    """One layer's part of a LoRA at strength 1."""
    if _is_plain_low_rank(module):
        return _low_rank(module, layer)
    return _dense(module, layer)


def _is_plain_low_rank(module: Any) -> bool:
    low_rank = (
        getattr(module, "up_model", None) is not None and getattr(module, "down_model", None) is not None
    )
    return low_rank and module.dora_scale is None and module.bias is None


def _low_rank(module: Any, layer: nn.Module) -> LowRank:
    down, up = module.down_model.weight, module.up_model.weight
    mid = None if module.mid_model is None else module.mid_model.weight
    rank = module.network.dyn_dim
    if rank is not None and mid is None:
        down, up = down[:rank], up[:, :rank]
    if isinstance(layer, nn.Conv2d):
        down = _for_inpainting(down, layer)
    return LowRank(down, up, float(module.calc_scale()), mid)


def _dense(module: Any, layer: Any) -> Dense:
    """ΔW as the WebUI computes it, but always in float32: a CPU has no half-precision product, and more is exact."""
    base = getattr(layer, "fp16_weight", None)  # fp8 storage keeps the exact weight here
    base = layer.weight if base is None else base
    weight, bias = _in_float32(module).calc_updown(base.detach().to(torch.float32))
    if isinstance(layer, nn.Conv2d):
        weight = _for_inpainting(weight, layer)
    stored = torch.float32 if base.dtype.itemsize < 2 else base.dtype
    return Dense(weight.to("cpu", stored), None if bias is None else bias.to("cpu", stored))


def _for_inpainting(weight: Tensor, layer: nn.Conv2d) -> Tensor:
    """An inpainting model's first convolution has 5 more input channels (mask, masked picture): no change for them."""
    if layer.in_channels == 9 and weight.ndim == 4 and weight.shape[1] == 4:
        return nn.functional.pad(weight, (0, 0, 0, 0, 0, 5))
    return weight


def _in_float32(module: Any) -> Any:
    """The WebUI's LoRA module at strength 1, with its tensors in float32; `module` stays as it is."""
    twin = copy.copy(module)
    twin.multiplier = lambda: 1.0
    for name, value in vars(module).items():
        if isinstance(value, Tensor) and value.is_floating_point():
            setattr(twin, name, value.to(torch.float32))
        elif isinstance(value, nn.Module) and name not in ("sd_module", "lin_module"):
            setattr(twin, name, copy.deepcopy(value).to(torch.float32))
    return twin
