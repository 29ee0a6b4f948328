"""The differences between the members of the Forge family: where LoRA patches are, and how a weight is read and merged."""

from __future__ import annotations

import ast
import importlib.util
import math
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...adapters.delta import LowRank
from ...errors import LoratorioError
from ...prompt.tags import BLOCK_WEIGHT
from ..shared.tags import WrittenTags
from .files import FILES, Tensors

Patcher = Any  # the host's UnetPatcher, or the ModelPatcher of its text encoder
BeforeEvaluation = Callable[..., tuple[Any, ...]]
"""(model, cond, uncond, x, sigma, model options) before a step's conditions are batched, to the same, changed."""
Patch = Sequence[Any]  # [strength, value, strength of the model, offset, function, …]


@dataclass(frozen=True)
class LoraFile:
    """A LoRA of the prompt.

    Attributes:
        unet, text: its strengths.
        options: the named arguments of its tag; the host ignores unknown ones.
        metadata: of its file.
        written: its file's time of modification in nanoseconds, and its size in bytes.
    """

    name: str
    path: str
    unet: float
    text: float
    options: Mapping[str, str] = field(default_factory=dict, compare=False)
    metadata: Mapping[str, str] = field(default_factory=dict, compare=False)
    written: tuple[int, int] = (0, 0)


class Sampling(NamedTuple):
    """The host's own functions around a model call (see its sampling_function)."""

    compile_conditions: Callable[..., Any]
    compile_weighted_conditions: Callable[..., Any]
    get_area_and_mult: Callable[..., Any]
    can_concat_cond: Callable[..., bool]
    cond_cat: Callable[..., dict[str, Any]]
    add_control: Callable[..., None]
    Condition: type


class Variant:
    """A member of the family that has the `backend` package: what Forge (2025) and Forge Neo share."""

    name = "Forge"
    idle_extensions: tuple[str, ...] = ()
    """See `PassLoras.idle_extensions`."""

    def applied(self, p: Any) -> list[LoraFile]:
        """The LoRAs that the host has applied to the model, in the prompt's order."""
        import networks

        known = {each.network_on_disk.filename: each for each in networks.loaded_networks}
        tags = WrittenTags(p)
        files = []
        for path, unet, text, *_ in _targets(p.sd_model.current_lora_hash):
            network = known.get(path)
            name = network.mentioned_name if network else Path(path).stem
            metadata = network.network_on_disk.metadata if network else {}
            tag = tags.take(name).options
            files.append(LoraFile(name, path, float(unet), float(text), tag, metadata or {}, _written(path)))
        return files

    def added(self, strengths: Sequence[float]) -> float:
        """The strength of several tags of one LoRA."""
        # This host's patches have the strength in their key: a second tag of the same strength changes nothing.
        return sum(set(strengths))

    def forget_files(self) -> None:
        """Make the host read LoRA files from disk again. Some hosts cache the last ones, even if they have changed."""
        import networks

        if hasattr(networks.load_lora_state_dict, "cache_clear"):
            networks.load_lora_state_dict.cache_clear()

    def forget_loras(self, sd_model: Any) -> None:
        """Make the host apply its LoRAs again with the next prompt, even if they are the same."""
        sd_model.current_lora_hash = ""

    def load(self, unet: Patcher, clip: Any, lora: LoraFile) -> tuple[Patcher, Any]:
        """Clones of `unet` and `clip` with this LoRA's patches. If it does not touch one of them, that one is returned itself."""
        import networks

        tensors = dict(self._tensors(lora))
        loaded: tuple[Patcher, Any] = networks.load_lora_for_models(
            unet, clip, self._renamed(tensors), lora.unet, lora.text, filename=lora.path, online_mode=False
        )
        return loaded

    def _renamed(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors

    def names_in(self, lora: LoraFile) -> Iterable[str]:
        """Names of the tensors in the LoRA's file."""
        return self._tensors(lora).keys()

    def _tensors(self, lora: LoraFile) -> Tensors:
        import networks

        read = networks.load_lora_state_dict
        # Some hosts cache the last files, even if they have changed.
        return FILES.of(lora.path, lora.written, getattr(read, "__wrapped__", read))

    def with_text(self, clip: Any, parts: Sequence[tuple[Any, float]]) -> Any:
        """A clone of `clip` with what clones of it have more, each at a part of its strength."""
        clone = clip.clone()
        for other, part in parts:
            for key, by_weight in other.patcher.lora_patches.items():
                if key not in clip.patcher.lora_patches:
                    path, strength, *more = key
                    scaled = (path, strength * part, *more)
                    clone.patcher.lora_patches[scaled] = {
                        name: _scaled(patches, part) for name, patches in by_weight.items()
                    }
        return clone

    def patches(self, patcher: Patcher) -> Iterator[tuple[str, Sequence[Patch]]]:
        """Names of weights, and the patches that the patcher would merge into them."""
        for patches in patcher.lora_patches.values():
            yield from patches.items()

    def without_loras(self, unet: Patcher, sd_model: Any) -> Patcher:
        """A clone of `unet` with the patches of the prompt's LoRAs left out; those of other extensions stay."""
        loras = sd_model.forge_objects_after_applying_lora.unet.lora_patches
        originals = sd_model.forge_objects_original.unet.lora_patches
        clone = unet.clone()
        clone.lora_patches = {
            key: value for key, value in unet.lora_patches.items() if key not in loras or key in originals
        }
        return clone

    def low_rank(self, value: Any) -> LowRank | None:
        """A patch value as its low-rank matrices, or None where it is of another kind."""
        if isinstance(value, tuple) and len(value) == 2 and value[0] == "lora":
            return _plain_low_rank(value[1])
        return None

    def base_weight(self, patcher: Patcher, key: str) -> Tensor:
        """The model's own weight in float32, on its device, whatever is merged or quantised at the moment."""
        weight = patcher.model.lora_loader.backup.get(key)
        return self._dequantised(attrgetter(key)(patcher.model) if weight is None else weight)

    def _dequantised(self, weight: Any) -> Tensor:
        if hasattr(weight, "bnb_quantized"):
            from backend.operations_bnb import functional_dequantize_4bit

            weight = functional_dequantize_4bit(weight)
        elif getattr(weight, "gguf_cls", None) is not None:
            from backend.operations_gguf import dequantize_tensor

            if not weight.baked:  # the host rearranges the file's blocks when it first loads the model
                weight = weight.copy_with_data(weight.data)
                weight.gguf_cls.bake(weight)
            weight = dequantize_tensor(weight)
        elif hasattr(weight, "dequantize") and type(weight) not in (Tensor, torch.nn.Parameter):
            weight = weight.dequantize()
        plain: Tensor = weight.detach().to(torch.float32)
        return plain

    def merged(self, patches: Sequence[Patch], weight: Tensor, key: str) -> Tensor:
        """`weight` with these patches merged. `weight` itself may be overwritten."""
        from backend.patcher.lora import merge_lora_to_weight

        result: Tensor = merge_lora_to_weight(list(patches), weight, key, computation_dtype=torch.float32)
        return result

    def obstacle(self, p: Any) -> str | None:
        """Why this pass's LoRAs cannot be composed, or None."""
        return None

    def text_sees_pictures(self) -> bool:
        """Whether the prompt's conditioning was also made from reference pictures, which the host no longer has."""
        return False

    def free_memory(self, device: torch.device) -> float:
        """Bytes that a model call may use."""
        from backend import memory_management

        return float(memory_management.get_free_memory(device))

    def sampling(self) -> Sampling:
        from backend.sampling import condition, sampling_function

        return Sampling(
            condition.compile_conditions,
            condition.compile_weighted_conditions,
            sampling_function.get_area_and_mult,
            sampling_function.can_concat_cond,
            sampling_function.cond_cat,
            add_control,
            condition.Condition,
        )

    def needed_memory(self, model: Any, shape: Sequence[int]) -> float:
        """Bytes that the host reserves for a model call on latents of this shape."""
        return float(model.memory_required(list(shape)))

    def computation_dtype(self, unet: Patcher) -> torch.dtype:
        dtype: torch.dtype = unet.model.computation_dtype
        return dtype

    hook_option = "sampler_pre_cfg_function"
    """The model option, a list of functions, that the host calls before it batches a step's conditions."""

    def hook(self, before: BeforeEvaluation) -> Callable[..., tuple[Any, ...]]:
        """`before` in the form that the host calls."""
        return before


class Comfy(Variant):
    """ComfyUI's patcher, and LoRAs as objects of its `weight_adapter` package: what Forge Neo and reForge share."""

    def added(self, strengths: Sequence[float]) -> float:
        return sum(strengths)

    def patches(self, patcher: Patcher) -> Iterator[tuple[str, Sequence[Patch]]]:
        yield from patcher.patches.items()

    def without_loras(self, unet: Patcher, sd_model: Any) -> Patcher:
        loras: Mapping[str, Sequence[Patch]] = sd_model.forge_objects_after_applying_lora.unet.patches
        original = sd_model.forge_objects_original.unet
        clone = unet.clone()
        # The prompt's LoRAs come first in each list; what other extensions added stands behind them.
        added = {key: patches[len(loras.get(key, ())) :] for key, patches in unet.patches.items()}
        clone.patches = {key: list(patches) for key, patches in original.patches.items()}
        for key, patches in added.items():
            if patches:
                clone.patches[key] = clone.patches.get(key, []) + patches
        # The host merges anew when, and only when, this id changes; that of the original stands for its own patches.
        clone.patches_uuid = uuid.uuid4() if any(added.values()) else original.patches_uuid
        return clone

    def with_text(self, clip: Any, parts: Sequence[tuple[Any, float]]) -> Any:
        clone, own = clip.clone(), clip.patcher.patches
        for other, part in parts:
            for name, patches in other.patcher.patches.items():
                added = _scaled(patches[len(own.get(name, ())) :], part)
                clone.patcher.patches[name] = [*clone.patcher.patches.get(name, ()), *added]
        clone.patcher.patches_uuid = uuid.uuid4()
        return clone

    def low_rank(self, value: Any) -> LowRank | None:
        if getattr(value, "name", None) == "lora":
            return _plain_low_rank(value.weights)
        return None

    def base_weight(self, patcher: Patcher, key: str) -> Tensor:
        backup = patcher.backup.get(key)
        if backup is not None:
            return self._dequantised(backup.weight)
        return self._dequantised(attrgetter(key)(patcher.model))


class Neo(Comfy):
    """Forge Neo, with the `backend` package."""

    name = "Forge Neo"
    idle_extensions = (BLOCK_WEIGHT,)  # knows Forge and reForge by their versions, and takes this for A1111

    def _renamed(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        from backend.state_dict import state_dict_prefix_replace

        if any(key.startswith("lora_unet__") for key in tensors):
            renamed: dict[str, Tensor] = state_dict_prefix_replace(tensors, {"lora_unet__": "lora_unet_"})
            return renamed
        return tensors

    def obstacle(self, p: Any) -> str | None:
        from backend.args import dynamic_args

        if dynamic_args.nunchaku:
            return "The LoRAs were merged: LoRAtorio cannot compose with a Nunchaku (SVDQ) model, whose own code applies LoRAs."
        return None

    def text_sees_pictures(self) -> bool:
        from backend.args import dynamic_args

        return bool(dynamic_args.ref_latents)


class ReForge(Comfy):
    """reForge, whose ComfyUI is the package `ldm_patched`."""

    name = "reForge"
    hook_option = "conditioning_modifiers"

    def load(self, unet: Patcher, clip: Any, lora: LoraFile) -> tuple[Patcher, Any]:
        import networks

        tensors = dict(self._tensors(lora))
        own_unet, own_clip = networks.load_lora_for_models(
            unet, clip, tensors, lora.unet, lora.text, filename=lora.path
        )
        # This host clones whether or not the LoRA has something for a model.
        unet = unet if _patch_count(own_unet) == _patch_count(unet) else own_unet
        clip = clip if _patch_count(own_clip.patcher) == _patch_count(clip.patcher) else own_clip
        return unet, clip

    def merged(self, patches: Sequence[Patch], weight: Tensor, key: str) -> Tensor:
        from ldm_patched.modules.lora import calculate_weight

        result: Tensor = calculate_weight(list(patches), weight, key)
        return result

    def obstacle(self, p: Any) -> str | None:
        if getattr(p, "dynamic_clip_skip_schedule", None):
            return "The LoRAs were merged: LoRAtorio cannot follow a clip skip that changes during sampling (Settings, dynamic clip skip)."
        return None

    def free_memory(self, device: torch.device) -> float:
        from ldm_patched.modules import model_management

        return float(model_management.get_free_memory(device))

    def needed_memory(self, model: Any, shape: Sequence[int]) -> float:
        return 1.5 * float(model.memory_required(list(shape)))

    def computation_dtype(self, unet: Patcher) -> torch.dtype:
        dtype: torch.dtype = unet.model.manual_cast_dtype or unet.model.get_dtype()
        return dtype

    def sampling(self) -> Sampling:
        from ldm_patched.modules import conds, samplers
        from modules_forge import forge_sampler

        def with_options(control: Any, c: dict[str, Any], x: Tensor, sigma: Tensor, blocks: int) -> None:
            c["control"] = control.get_control(x, sigma, c, blocks, c["transformer_options"])

        return Sampling(
            forge_sampler.cond_from_a1111_to_patched_ldm,
            forge_sampler.cond_from_a1111_to_patched_ldm_weighted,
            samplers.get_area_and_mult,
            samplers.can_concat_cond,
            samplers.cond_cat,
            with_options,
            conds.CONDRegular,
        )

    def hook(self, before: BeforeEvaluation) -> Callable[..., tuple[Any, ...]]:
        def modifier(
            model: Any,
            x: Tensor,
            sigma: Tensor,
            uncond: Any,
            cond: Any,
            cond_scale: float,
            options: Any,
            seed: Any,
        ) -> tuple[Any, ...]:
            # After this the host drops the unconditional rows of CFG 1.
            guided = not math.isclose(cond_scale, 1.0) or options.get("disable_cfg1_optimization", False)
            model, cond, seen, x, sigma, options = before(
                model, cond, uncond if guided else None, x, sigma, options
            )
            return model, x, sigma, seen if guided else uncond, cond, cond_scale, options, seed

        return modifier


def add_control(control: Any, c: dict[str, Any], x: Tensor, sigma: Tensor, blocks: int) -> None:
    """Ask a chain of ControlNets for these rows, as Forge's and Neo's own sampling functions do."""
    net = control
    while net is not None:
        net.transformer_options = c["transformer_options"]
        net = net.previous_controlnet
    c["control"] = control.get_control(x, sigma, c.copy(), blocks)
    c["control_model"] = control


def _targets(text: str) -> list[Any]:
    """The host's record of the LoRAs on its model: a list of paths and strengths."""
    try:
        targets: list[Any] = ast.literal_eval(text or "[]")
    except ValueError:
        raise LoratorioError(
            "A strength in a LoRA tag of the prompt is not a number. Write tags like <lora:name:0.8>."
        ) from None
    return targets


def _written(path: str) -> tuple[int, int]:
    try:
        status = Path(path).stat()
    except OSError:  # reading it says more
        return 0, 0
    return status.st_mtime_ns, status.st_size


def _scaled(patches: Sequence[Patch], part: float) -> list[Patch]:
    return [(patch[0] * part, *patch[1:]) for patch in patches]


def _patch_count(patcher: Patcher) -> int:
    return sum(len(patches) for patches in patcher.patches.values())


def _plain_low_rank(weights: Sequence[Any]) -> LowRank | None:
    """(up, down, alpha, mid, DoRA scale, new shape) as low-rank matrices, unless it is more than that."""
    up, down, alpha, mid, *more = weights
    if any(each is not None for each in more):
        return None
    scale = 1.0 if alpha is None else float(alpha) / down.shape[0]
    return LowRank(down, up, scale, mid)


def variant() -> Variant:
    """The member of the family that this code runs inside."""
    if importlib.util.find_spec("ldm_patched") is not None:
        return ReForge()
    if importlib.util.find_spec("modules_forge.packages") is not None:
        return Neo()
    return Variant()
