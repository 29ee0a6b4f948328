"""A Stable Diffusion checkpoint from disk: SD 1.x, 2.x or SDXL, as a diffusers folder or as one .safetensors file.

A single file holds weights alone. What shape the model has and how it cuts text into tokens comes, in this order, from
a folder with a diffusers model's configuration files, from a .yaml beside the file, or from the hub through diffusers.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ..errors import LoratorioError
from .lora_lookup import check_safetensors, damaged
from .model_files import LATENT_PIXEL, MODEL_INDEX, check_model

_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
}


@dataclass(frozen=True)
class Checkpoint:
    """A model ready to run, on one device and in one dtype.

    Attributes:
        name: for people: the file's or folder's name without extension.
        text_encoders, tokenizers: one pair for SD, two for SDXL.
        schedule: betas and prediction type, as diffusers' schedulers take them.
        native_size: side in pixels of the pictures that it was trained on.
        steps, cfg: what a request has that leaves them out.
        zero_empty_negative: SDXL's habit: an empty negative prompt is all zeros.
        lock: held while a picture is made, as LoRAs are attached to the model itself for that time.
    """

    name: str
    unet: nn.Module
    vae: nn.Module
    text_encoders: tuple[nn.Module, ...]
    tokenizers: tuple[Any, ...]
    schedule: Mapping[str, Any]
    native_size: int
    zero_empty_negative: bool = False
    steps: int = 20
    cfg: float = 7.0
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False, compare=False)

    @property
    def is_sdxl(self) -> bool:
        return len(self.text_encoders) == 2

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.unet.parameters()).dtype

    @property
    def latent_scale(self) -> int:
        """Picture pixels per latent pixel: 8."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))  # type: ignore[union-attr, arg-type]

    @property
    def prediction_type(self) -> str:
        return str(self.schedule["prediction_type"])


def load_checkpoint(
    path: str | Path,
    config: str | Path | None = None,
    device: str = "cpu",
    dtype: str | torch.dtype = "auto",
) -> Checkpoint:
    """The checkpoint at `path`, in evaluation mode.

    Args:
        path: a diffusers folder, or a .safetensors file.
        config: for a file: a folder in diffusers' layout that has the model's configuration and tokenizer files, or a .yaml.
        device: ``cpu``, ``cuda``, ``cuda:1``, ``mps``, or ``auto`` for the fastest there is.
        dtype: ``fp32``, ``fp16``, ``bf16``, torch's own, or ``auto``: half precision on CUDA, else single.

    Raises:
        LoratorioError: missing, a pickle, damaged, not a Stable Diffusion text-to-image model, or configuration out of reach; no such
            device on this machine.
    """
    path, config = Path(path), None if config is None else Path(config)
    check_model(path, config, device, dtype if isinstance(dtype, str) else "auto")
    device = _device(device)
    dtype = _dtype(dtype, device)
    loaded = _from_folder(path) if path.is_dir() else _from_file(path, config)
    if loaded.unet.config.in_channels != loaded.vae.config.latent_channels:  # type: ignore[union-attr]
        raise LoratorioError(
            f"{path.name} is not a plain text-to-image model: its UNet takes {loaded.unet.config.in_channels} channels. "  # type: ignore[union-attr]
            "Inpainting and editing models are not supported."
        )
    with _quiet():
        for module in (loaded.unet, loaded.vae, *loaded.text_encoders):
            module.to(device=device, dtype=dtype).eval().requires_grad_(False)
    return loaded


def read_safetensors(path: Path, what: str) -> dict[str, Tensor]:
    """All tensors of a .safetensors file.

    Args:
        what: for the sentence, e.g. ``LoRA rose`` or ``The checkpoint``.

    Raises:
        LoratorioError: a pickle (by its name; it is not opened), another kind of file, or one that is cut short.
    """
    check_safetensors(path, what)
    try:
        tensors: dict[str, Tensor] = load_file(path)
        return tensors
    except (
        SafetensorError,
        OSError,
        ValueError,
        KeyError,
        RuntimeError,
        TypeError,
        AttributeError,
    ) as problem:
        raise damaged(path, what, problem) from problem


def _from_folder(path: Path) -> Checkpoint:
    kind = _json(path / MODEL_INDEX)["_class_name"]
    extra = {} if kind == "StableDiffusionXLPipeline" else {"safety_checker": None, "feature_extractor": None}
    try:
        with _quiet():
            pipe = getattr(diffusers, kind).from_pretrained(
                path, use_safetensors=True, local_files_only=True, **extra
            )
    except (OSError, ValueError, SafetensorError, RuntimeError) as problem:
        raise LoratorioError(
            f"{path} cannot be loaded as a diffusers model: {_first_line(problem)}"
        ) from problem
    return _of_pipeline(pipe, path.name)


def _of_pipeline(pipe: Any, name: str) -> Checkpoint:
    numbers = ("", "_2") if hasattr(pipe, "text_encoder_2") else ("",)
    return Checkpoint(
        name,
        pipe.unet,
        pipe.vae,
        tuple(getattr(pipe, f"text_encoder{number}") for number in numbers),
        tuple(getattr(pipe, f"tokenizer{number}") for number in numbers),
        _schedule(pipe.scheduler.config),
        int(pipe.unet.config.sample_size) * LATENT_PIXEL,
        bool(pipe.config.get("force_zeros_for_empty_prompt", False)),
    )


def _schedule(config: Mapping[str, Any]) -> dict[str, Any]:
    wanted = (*_SCHEDULE, "rescale_betas_zero_snr")
    return {**_SCHEDULE, **{key: config[key] for key in wanted if config.get(key) is not None}}


def _from_file(path: Path, config: Path | None) -> Checkpoint:
    tensors = read_safetensors(path, f"The checkpoint {path.name}")
    source = config or _config_beside(path)
    diffusers_layout = any(key.startswith("unet.") for key in tensors)
    if not diffusers_layout and not any(key.startswith("model.diffusion_model.") for key in tensors):
        raise LoratorioError(
            f"{path.name} does not contain a Stable Diffusion UNet: it is not a checkpoint of SD 1.x, SD 2.x or SDXL."
        )
    try:
        with _quiet():
            if source is not None and source.suffix.lower() in (".yaml", ".yml"):
                return _from_yaml(path, tensors, source)
            folder = source or _config_from_hub(path, tensors)
            build = _from_diffusers_layout if diffusers_layout else _from_ldm_layout
            return build(path, tensors, folder)
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError) as problem:
        raise LoratorioError(
            f"The checkpoint {path.name} does not fit its configuration ({source or 'from the hub'}): {_first_line(problem)}"
        ) from problem


def _config_beside(path: Path) -> Path | None:
    """``model/`` (with model_index.json) or ``model.yaml`` next to ``model.safetensors``."""
    folder = path.with_suffix("")
    if (folder / MODEL_INDEX).is_file():
        return folder
    return next(
        (each for each in (path.with_suffix(".yaml"), path.with_suffix(".yml")) if each.is_file()), None
    )


def _config_from_hub(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    """The configuration and tokenizer (no weights) of the model that the file is a version of, by diffusers' own table."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if "text_encoder_2.text_model.embeddings.token_embedding.weight" in tensors:
        repository = "stabilityai/stable-diffusion-xl-base-1.0"
    else:
        repository = single_file_utils.fetch_diffusers_config(dict(tensors))["pretrained_model_name_or_path"]
    try:
        return Path(snapshot_download(repository, allow_patterns=["*.json", "*.txt", "*/*.json", "*/*.txt"]))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as problem:
        raise LoratorioError(
            f"{path.name} contains only weights. Its configuration and tokenizer ({repository}) are not on this machine and could not "
            f"be downloaded from the hub. Go online once, or put them into a folder named {path.stem} next to the file, or give "
            "--config: a folder in diffusers' layout with the .json and tokenizer files."
        ) from problem


def _from_ldm_layout(path: Path, tensors: dict[str, Tensor], folder: Path) -> Checkpoint:
    local = {"config": str(folder), "local_files_only": True}

    def encoder(part: str) -> nn.Module:
        return _complete(_ldm_text_encoder(tensors, folder, part, part.endswith("_2")), path)

    unet = UNet2DConditionModel.from_single_file(dict(tensors), subfolder="unet", **local)
    vae = AutoencoderKL.from_single_file(dict(tensors), subfolder="vae", **local)
    return _with_folder(path, folder, _complete(unet, path), _complete(vae, path), encoder)


def _ldm_text_encoder(
    tensors: dict[str, Tensor], folder: Path, subfolder: str, with_projection: bool
) -> nn.Module:
    kind = CLIPTextModelWithProjection if with_projection else CLIPTextModel
    model: nn.Module = single_file_utils.create_diffusers_clip_model_from_ldm(
        kind, tensors, subfolder=subfolder, config=str(folder), local_files_only=True
    )
    return model


def _from_diffusers_layout(path: Path, tensors: dict[str, Tensor], folder: Path) -> Checkpoint:
    """Weights under ``unet.``, ``vae.``, ``text_encoder.`` and ``text_encoder_2.``."""

    def filled(model: nn.Module, part: str) -> nn.Module:
        prefix = f"{part}."
        own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        names = set(model.state_dict())
        # Transformers 5 took the level ``text_model`` out of CLIPTextModel.
        own = {key if key in names else key.removeprefix("text_model."): value for key, value in own.items()}
        missing = names - own.keys() - {key for key in names if key.endswith("position_ids")}
        if missing:
            raise ValueError(f"{len(missing)} weights are missing, first {prefix}{min(missing)}")
        model.load_state_dict({key: value for key, value in own.items() if key in names}, strict=False)
        return model

    def encoder(part: str) -> nn.Module:
        kind = CLIPTextModelWithProjection if part.endswith("_2") else CLIPTextModel
        return filled(kind(kind.config_class.from_pretrained(folder / part)), part)

    unet, vae = (
        filled(kind.from_config(_json(folder / part / "config.json")), part)
        for part, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL))
    )
    return _with_folder(path, folder, unet, vae, encoder)


def _with_folder(
    path: Path, folder: Path, unet: nn.Module, vae: nn.Module, encoder: Callable[[str], nn.Module]
) -> Checkpoint:
    """These parts with the configuration in a folder. encoder: the text encoder of a subfolder."""
    index = _json(folder / MODEL_INDEX)
    numbers = ("", "_2") if "text_encoder_2" in index else ("",)
    return Checkpoint(
        path.stem,
        unet,
        vae,
        tuple(encoder(f"text_encoder{number}") for number in numbers),
        tuple(CLIPTokenizer.from_pretrained(folder / f"tokenizer{number}") for number in numbers),
        _schedule(_json(folder / "scheduler" / "scheduler_config.json")),
        int(_json(folder / "unet" / "config.json").get("sample_size") or 64) * LATENT_PIXEL,
        bool(index.get("force_zeros_for_empty_prompt", False)),
    )


def _from_yaml(path: Path, tensors: dict[str, Tensor], yaml: Path) -> Checkpoint:
    """A file in the original layout with its original configuration; the tokenizer and the text encoder's
    configuration lie in a folder that the .yaml names (``cond_stage_config.params.version``) or in ``text`` beside it."""
    original: Any = single_file_utils.fetch_original_config(str(yaml))
    if not isinstance(original, dict) or "model" not in original:
        raise ValueError(f"{yaml.name} has no section called model")
    params, sampling = original["model"]["params"], original.get("sampling") or {}
    folder = _text_folder(yaml, params.get("cond_stage_config") or {})
    schedule = {
        **_SCHEDULE,
        "num_train_timesteps": int(params.get("timesteps", 1000)),
        "beta_start": float(params.get("linear_start", _SCHEDULE["beta_start"])),
        "beta_end": float(params.get("linear_end", _SCHEDULE["beta_end"])),
        "prediction_type": "v_prediction" if params.get("parameterization") == "v" else "epsilon",
    }
    return Checkpoint(
        path.stem,
        _complete(UNet2DConditionModel.from_single_file(dict(tensors), original_config=original), path),
        _complete(AutoencoderKL.from_single_file(dict(tensors), original_config=original), path),
        (_complete(_ldm_text_encoder(tensors, folder, "", False), path),),
        (CLIPTokenizer.from_pretrained(folder),),
        schedule,
        int(params.get("image_size") or 64) * LATENT_PIXEL,
        steps=int(sampling.get("steps", Checkpoint.steps)),
        cfg=float(sampling.get("cfg", Checkpoint.cfg)),
    )


def _text_folder(yaml: Path, section: Mapping[str, Any]) -> Path:
    named = (section.get("params") or {}).get("version")
    candidates = [yaml.parent / str(named)] if named else []
    candidates += [yaml.parent / "text", yaml.parent / yaml.stem / "text"]
    for folder in candidates:
        if (folder / "config.json").is_file():
            return folder
    raise LoratorioError(
        f"{yaml.name} does not name a tokenizer. Put the text encoder's config.json and the tokenizer's files into "
        f"{yaml.parent / 'text'}."
    )


def _complete(model: nn.Module, path: Path) -> nn.Module:
    """`model`, if every weight was in the file. Weights that were not are left without storage by diffusers."""
    missing = [name for name, value in model.named_parameters() if value.is_meta]
    if missing:
        raise LoratorioError(
            f"The checkpoint {path.name} lacks {len(missing)} weights that its configuration asks for, "
            f"the first is {missing[0]}: the file is incomplete, or it is another kind of model."
        )
    return model


def _device(name: str) -> str:
    kind = name.split(":")[0]
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return next(each for each in ("cuda", "mps", "cpu") if there[each])
    number = name.partition(":")[2]
    if not there[kind]:
        raise LoratorioError(f"This machine, or its torch, has no {kind}: choose the device cpu.")
    if kind == "cuda" and number and int(number) >= torch.cuda.device_count():
        raise LoratorioError(
            f"There is no device {name} on this machine: the last is cuda:{torch.cuda.device_count() - 1}."
        )
    return name


def _dtype(name: str | torch.dtype, device: str) -> torch.dtype:
    if isinstance(name, torch.dtype):
        return name
    by_name = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    by_name["auto"] = torch.float16 if device.startswith("cuda") else torch.float32
    return by_name[name]


def _json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _first_line(problem: BaseException) -> str:
    lines = str(problem).strip().splitlines()
    return lines[0] if lines else type(problem).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Loading without the libraries' own progress bars and advice, which tell the user nothing."""
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    levels = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.disable_progress_bar()
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.set_verbosity(level)
            library.enable_progress_bar()
