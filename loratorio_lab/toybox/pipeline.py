"""The shipped files as a diffusers pipeline. Nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from loratorio import toybox

TEXT_PREFIX = "cond_stage_model.transformer."


def load_text_encoder(checkpoint: Path = toybox.CHECKPOINT, folder: Path = toybox.TEXT_DIR) -> CLIPTextModel:
    """The checkpoint's text encoder, float32. transformers 5 dropped the `text_model.` level of the names: both are served."""
    model = CLIPTextModel(CLIPTextConfig.from_pretrained(str(folder)))
    wanted = model.state_dict()
    weights = {}
    for key, value in load_file(checkpoint).items():
        if key.startswith(TEXT_PREFIX):
            name = key.removeprefix(TEXT_PREFIX)
            name = name if name in wanted else name.removeprefix("text_model.")
            if name in wanted:
                weights[name] = value.to(wanted[name].dtype)
    model.load_state_dict(weights, strict=False)
    missing = wanted.keys() - weights.keys()
    if any("position_ids" not in name for name in missing):
        raise ValueError(f"{checkpoint} lacks text encoder weights: {sorted(missing)[:3]}")
    return model.eval()


def load_pipeline(
    checkpoint: Path = toybox.CHECKPOINT, config: Path | None = None, folder: Path = toybox.TEXT_DIR
) -> StableDiffusionPipeline:
    """Read by diffusers as any SD 1 checkpoint, float32, with a DDIM scheduler."""
    pipeline = StableDiffusionPipeline.from_single_file(
        str(checkpoint),
        original_config=str(config or checkpoint.with_suffix(".yaml")),
        text_encoder=load_text_encoder(checkpoint, folder),
        tokenizer=CLIPTokenizer.from_pretrained(str(folder)),
        safety_checker=None,
        feature_extractor=None,
        local_files_only=True,
        torch_dtype=torch.float32,
    )
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
