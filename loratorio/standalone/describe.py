"""The infotext of a standalone picture."""

from __future__ import annotations

from .. import __version__
from ..pictures.infotext import PLACES_KEY, found_places, infotext, params
from ..prompt.places import written
from .checkpoint import Checkpoint
from .generate import Outcome
from .samplers import find_sampler


def describe(checkpoint: Checkpoint, outcome: Outcome, image: int) -> str:
    """What image number `image` of the batch was made of, so that a WebUI's PNG Info tab reads it."""
    request = outcome.request
    is_img2img = request.init_image is not None
    fields: dict[str, object] = {
        "Steps": request.steps,
        "Sampler": find_sampler(request.sampler).label,
        "CFG scale": f"{request.cfg:g}",
        "Seed": outcome.seeds[image],
        "Size": f"{request.width}x{request.height}",
        "Model": checkpoint.name,
        "Denoising strength": f"{request.strength:g}" if is_img2img else None,
    }
    if outcome.loras:
        fields |= params(request.settings, outcome.loras)
    found = outcome.found[image] if outcome.found else ()
    if found:
        fields[PLACES_KEY] = found_places((name, written(place)) for name, place in found)
    fields["Version"] = f"loratorio {__version__}"
    return infotext(request.prompt, request.negative, fields)
