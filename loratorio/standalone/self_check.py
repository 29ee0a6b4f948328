"""The self-check on the command line: the bank's rows against LoRAs that are merged into the checkpoint's weights."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import diffusers
import torch
from torch import Tensor, nn

from .. import __version__
from ..adapters.delta import Adapter
from ..check import Asked, Calls, Made, Report, check
from ..prompt.admission import ActiveLora
from .checkpoint import Checkpoint
from .lora_files import LoadedLora, load_lora
from .lora_lookup import look_up
from .lora_set import loaded
from .model import LoadedModel
from .prompt import split_loras
from .request import Request, whole

HOST = "merging into the weights"


def run_check(model: LoadedModel, request: Request) -> Report:
    """Check with this model and the LoRAs of the request's prompt; of the request its texts, seed, size and guidance count.

    Raises:
        LoratorioError: the prompt or a LoRA cannot be used.
    """
    text, every = split_loras(request.prompt)
    active, _ = look_up([tag for tag in every if not tag.pool], model.lora_dir)
    loras = [(lora, loaded(model.checkpoint, load_lora, lora)) for lora in active]
    # What a word that a file brings along does to the text is not in any weight.
    skipped = [lora.name for _, lora in loras if lora.embeddings]
    usable = [(lora, own) for lora, own in loras if not own.embeddings]
    request = whole(replace(request, prompt=text), model.checkpoint)
    maker = _Maker(model, request, usable)

    def facts() -> dict[str, str]:
        found = _facts(model.checkpoint, request)
        return found | ({"LoRAs with words of their own, not checked": ", ".join(skipped)} if skipped else {})

    return check([lora.tagged.name for lora, _ in usable], HOST, maker.made, facts)


@dataclass(frozen=True)
class _Maker:
    """Makes the check's pictures.

    Attributes:
        request: with a prompt without tags. loras: of the prompt.
    """

    model: LoadedModel
    request: Request
    loras: Sequence[tuple[ActiveLora, LoadedLora]]

    def made(self, asked: Asked) -> Made:
        """See `loratorio.check.Make`."""
        own = [self.loras[number] for number in asked.loras]
        request, calls = replace(self.request, steps=asked.steps), Calls()
        unet = self.model.checkpoint.unet
        if asked.settings is None:
            with merged(self.model.checkpoint, [lora for _, lora in own]), calls.watched(unet):
                outcome = self.model.run(request)
        else:
            places = asked.places or ("",) * len(own)
            tags = "".join(_tag(lora, place) for (lora, _), place in zip(own, places, strict=True))
            with calls.watched(unet):
                outcome = self.model.run(
                    replace(request, prompt=request.prompt + tags, settings=asked.settings)
                )
        latents = outcome.latents.float().cpu()
        return Made(latents, outcome.images[0].tobytes(), calls, len(outcome.composed), outcome.notes)


def _tag(lora: ActiveLora, place: str) -> str:
    # A LoRA that is recognised as a speed LoRA is weighed for once, too.
    at = f":at={place}" if place else ""
    return f"<lora:{lora.tagged.name}:role=content{at}:te={lora.text}:unet={lora.strength}>"


@contextmanager
def merged(checkpoint: Checkpoint, loras: Sequence[LoadedLora]) -> Iterator[None]:
    """While this lasts the LoRAs are merged into the checkpoint's weights, the sum rounded to their dtype; afterwards every weight is
    what it was, bit for bit."""
    before: list[tuple[Tensor, Tensor]] = []
    try:
        for lora in loras:
            for module, adapter in zip(
                (checkpoint.unet, *checkpoint.text_encoders), (lora.unet, *lora.text), strict=True
            ):
                for parameter, change in _changes(module, adapter):
                    before.append((parameter, parameter.detach().to("cpu", copy=True)))
                    parameter.copy_(parameter.float() + change.to(parameter.device))
        yield
    finally:
        for parameter, value in reversed(before):
            parameter.copy_(value)


def _changes(module: nn.Module, adapter: Adapter) -> Iterator[tuple[Tensor, Tensor]]:
    """Every tensor of `module` that the LoRA changes, and by how much, float32."""
    layers = dict(module.named_modules())
    for name, fitted in adapter.fitted(layers).items():
        layer = layers[name]
        if fitted.low_rank is not None:
            yield layer.weight, fitted.low_rank.dense().reshape(layer.weight.shape) * adapter.strength
        if fitted.dense is not None and fitted.dense.weight is not None:
            yield layer.weight, fitted.dense.weight.float() * adapter.strength
        if fitted.dense is not None and fitted.dense.bias is not None:
            yield layer.bias, fitted.dense.bias.float() * adapter.strength


def _facts(checkpoint: Checkpoint, request: Request) -> dict[str, str]:
    device = str(checkpoint.device)
    if checkpoint.device.type == "cuda":
        device += f" ({torch.cuda.get_device_name(checkpoint.device)})"
    return {
        "LoRAtorio": f"{__version__}, command line",
        "Python, torch, diffusers": ", ".join(
            (sys.version.split()[0], torch.__version__, diffusers.__version__)
        ),
        "device": device,
        "checkpoint": checkpoint.name,
        "picture": f"{request.width}×{request.height}, Euler, CFG {request.cfg:g}, seed {request.seed}",
    }
