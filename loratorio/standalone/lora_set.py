"""The LoRAs of one generation: those that the prompt names, those out of its pools, and each one's role."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..adapters.bank import Bank
from ..compose.methods import METHODS
from ..prompt.admission import ActiveLora, Admitted, admit
from .checkpoint import Checkpoint
from .lora_files import LoadedLora, load_lora
from .lora_lookup import look_up
from .prompt import split_loras
from .request import WholeRequest
from .text import TextConditioner

Load = Callable[[Path, str, Checkpoint, float, float], LoadedLora]
"""`load_lora`, or what keeps files that are asked for again."""


def load_loras(
    request: WholeRequest, folder: Path | None, checkpoint: Checkpoint, load: Load = load_lora
) -> Admitted[LoadedLora]:
    """Load the LoRAs of the request's prompt, each file by `load`; from pools those that the prompt calls.

    Raises:
        LoratorioError: a LoRA that is named cannot be used (one out of a pool is skipped instead), or a pool is empty.
    """
    text, tags = split_loras(request.prompt)
    active, notes = look_up(tags, folder)

    def encode(texts: list[str]) -> list[Tensor]:
        with torch.inference_mode():
            found = conditioner(checkpoint, (), texts).of([(text, ()) for text in texts])
        return [each.tokens for each in found]

    size = request.height // checkpoint.latent_scale, request.width // checkpoint.latent_scale
    weighs_words = METHODS[request.engine_settings.method].uses_importance
    admitted = admit(
        active,
        text,
        partial(loaded, checkpoint, load),
        size,
        encode=encode if weighs_words else None,
        read_by_place=[text] if request.engine_settings.own_words else (),
    )
    return replace(admitted, notes=(*notes, *admitted.notes))


def loaded(checkpoint: Checkpoint, load: Load, lora: ActiveLora) -> LoadedLora:
    """The LoRA at its strengths. Raises LoratorioError as `load_lora`."""
    assert lora.tagged.file is not None
    return load(lora.tagged.file, lora.tagged.name, checkpoint, lora.text, lora.strength)


def conditioner(checkpoint: Checkpoint, loras: Sequence[LoadedLora], texts: Sequence[str]) -> TextConditioner:
    """For these texts, and any others, under any mix of the LoRAs."""
    banks = [Bank([lora.text[i] for lora in loras]) for i in range(len(checkpoint.text_encoders))]
    return TextConditioner(checkpoint, banks, texts, [lora.embeddings for lora in loras])
