"""The host's LoRA patches as deltas, and as text encoders with one LoRA each."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters.delta import Adapter, Delta, Dense, LowRank, check_tensors
from ...errors import LoratorioError
from ...prompt.admission import ActiveLora, UnreadableLora
from ...prompt.roles import partly_used_note
from ..shared.lora_layers import layers, unread_magnitudes_note
from ..shared.pass_loras import ReadLora
from .variants import LoraFile, Patch, Patcher, Variant

_XLABS = re.compile(r"blocks\.\d+\.processor\.\w+_lora\d*\.(down|up)\.")
"""As in double_blocks.0.processor.qkv_lora1.down.weight."""


def read(lora: ActiveLora, sd_model: Any, variant: Variant) -> ReadLora:
    """Let the host read a LoRA.

    Raises:
        LoratorioError: nothing in it matches this model, or it changes something other than a layer's weight or bias.
    """
    file: LoraFile = lora.source
    original = sd_model.forge_objects_original
    try:
        unet, clip = variant.load(original.unet, original.clip, file)
        names = set(variant.names_in(file))
    except Exception as problem:  # whatever the host's reader raises for a damaged file
        raise UnreadableLora(f"LoRA {file.name} cannot be read ({problem}): get the file again.") from problem
    if unet is original.unet and clip is original.clip:
        if any(map(_XLABS.search, names)):
            raise LoratorioError(
                f"LoRA {file.name} uses XLabs' layer names, which this WebUI does not read: convert it to kohya's or diffusers' "
                "names. Else remove it from the prompt, or untick LoRAtorio."
            )
        raise LoratorioError(
            f"LoRA {file.name} does not match this model. Either it was made for another kind of model, or this WebUI does not know "
            f"its layer names ({min(names, default='')[:80]}). Remove it from the prompt, or untick LoRAtorio."
        )
    adapter = Adapter(file.name, {} if unet is original.unet else _deltas(file, unet, variant))
    adapter.check_numbers()
    # The host would skip what does not fit, and report it in its log only.
    adapter.fitted(layers_of([adapter], unet))
    if clip is not original.clip:
        for key, patches in variant.patches(clip.patcher):
            check_tensors(file.name, key, _tensors_in([patch[1] for patch in patches]))
    if not adapter.deltas and file.unet and any(map(_is_of_unet, names)):
        remark = (
            f"LoRA {file.name}: only its text encoder part is used. The other part does not match this model."
        )
    else:
        used = _added(variant, unet, original.unet) + _added(variant, clip.patcher, original.clip.patcher)
        remark = partly_used_note(file.name, used, len(layers(names)))
    remark = f"{remark} {unread_magnitudes_note(file.name, names)}".strip()
    has_text = clip is not original.clip and file.text != 0
    applied = sd_model.forge_objects_after_applying_lora
    pairs = ((unet, applied.unet), (clip.patcher, applied.clip.patcher))
    was_replaced = not all(_is_applied(own, theirs, variant) for own, theirs in pairs)
    notes = (remark,) if remark else ()
    return ReadLora(lora, adapter, clip if has_text else None, notes, was_replaced)


def _is_applied(own: Patcher, applied: Patcher, variant: Variant) -> bool:
    """Whether the host's patches of the LoRA, from when it read the file, are the same as the present ones."""
    of_host: dict[str, list[Patch]] = {}
    for key, patches in variant.patches(applied):
        of_host.setdefault(key, []).extend(patches)
    return all(
        any(_is_same(patch[1], other[1]) for other in of_host.get(key, ()))
        for key, patches in variant.patches(own)
        for patch in patches
    )


def _is_same(one: Any, other: Any) -> bool:
    """Whether two patches hold the same numbers. The host may have moved its own, and rounded them."""
    ours, theirs = list(_tensors_in(one)), list(_tensors_in(other))
    return len(ours) == len(theirs) and all(
        a.shape == b.shape and torch.equal(a.to(b), b) for a, b in zip(ours, theirs, strict=True)
    )


def _is_of_unet(name: str) -> bool:
    """Whether a tensor of a LoRA file with this name is for the UNet, and not for a text encoder."""
    return not name.startswith(("lora_te", "lora_prior_te", "text", "clip_", "t5", "bundle_emb"))


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors of floating numbers in a patch's value, whatever the host's way to nest them."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors_in(each)
    elif hasattr(value, "weights"):
        yield from _tensors_in(value.weights)


def _added(variant: Variant, patcher: Patcher, original: Patcher) -> int:
    """How many patches the host made of a LoRA for a model: at least one for each of the file's layers that it knows."""
    counts = [sum(len(patches) for _, patches in variant.patches(each)) for each in (patcher, original)]
    return counts[0] - counts[1]


def layers_of(adapters: Sequence[Adapter], unet: Patcher) -> dict[str, nn.Module]:
    """The layers that these adapters change, by name."""
    return {name: unet.model.get_submodule(name) for adapter in adapters for name in adapter.deltas}


def _deltas(file: LoraFile, unet: Patcher, variant: Variant) -> dict[str, list[Delta]]:
    deltas: dict[str, list[Delta]] = {}
    for key, patches in variant.patches(unet):
        layer, _, parameter = key.rpartition(".")
        if parameter not in ("weight", "bias"):
            raise LoratorioError(
                f"LoRA {file.name} changes {key}, which is not a layer's weight: LoRAtorio cannot compose it. "
                "Remove it from the prompt, or untick LoRAtorio."
            )
        low_rank, others = [], []
        for patch in patches:
            plain = _low_rank(patch, unet, key, variant)
            low_rank.append(plain) if plain else others.append(patch)
        found = deltas.setdefault(layer, [])
        found += low_rank
        if others:
            change = _dense(others, unet, key, variant)
            found.append(Dense(weight=change) if parameter == "weight" else Dense(bias=change))
    return deltas


def _low_rank(patch: Patch, unet: Patcher, key: str, variant: Variant) -> LowRank | None:
    """A patch of plain low-rank matrices, its strength included; None where it takes more than that."""
    strength, value, model_strength, offset, function = patch[:5]
    plain = variant.low_rank(value)
    if plain is None or function is not None or model_strength != 1.0:
        return None
    plain = replace(plain, scale=plain.scale * float(strength))
    if offset is None:
        return plain
    if plain.mid is not None or plain.down.ndim != 2:
        return None
    # The host keeps this layer's weight fused with others': outside of the slice nothing changes.
    dimension, start, length = offset
    full = variant.base_weight(unet, key).shape[dimension]
    before, after = start, full - start - length
    if dimension == 0:
        return replace(plain, up=nn.functional.pad(plain.up, (0, 0, before, after)))
    return replace(plain, down=nn.functional.pad(plain.down, (before, after)))


def _dense(patches: list[Patch], unet: Patcher, key: str, variant: Variant) -> Tensor:
    """What the host's merging changes in a weight, in the dtype that the model computes in."""
    with torch.no_grad():
        base = variant.base_weight(unet, key)
        # Merging works in place, and an extension may hold patches that are larger than the weight.
        change = variant.merged(patches, base.clone(), key).to(torch.float32)
        if change.shape != base.shape:
            raise LoratorioError(
                f"A LoRA changes the shape of {key} from {tuple(base.shape)} to {tuple(change.shape)}, which LoRAtorio cannot compose. "
                "Remove it from the prompt, or untick LoRAtorio."
            )
        return (change - base).to("cpu", variant.computation_dtype(unet))
