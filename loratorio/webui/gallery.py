"""Weight maps after the pictures in the WebUI's gallery."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..pictures import maps

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from ..job import Job, PassRecord

MARK = ", LoRAtorio map: True"
"""What the infotext of a map has after that of its picture. The page knows by it which maps are whose (javascript/loratorio_maps.js)."""


def add_maps(job: Job, processed: Any) -> None:
    """Append every picture's maps to what the WebUI shows (and its API sends); save them where grids are saved.

    Args:
        processed: the WebUI's Processed: `images`, of which the first may be a grid, and their `infotexts`.
    """
    from modules.shared import opts

    drawn = [
        (each, infotext + MARK) for picture, infotext, done, row in _pictures(job, processed)
        for each in _draw(job.p, picture, done, row, job.settings.single_maps)
    ]  # fmt: skip
    for each, infotext in drawn:
        each.info["parameters"] = infotext
        processed.images.append(each)
        processed.infotexts.append(infotext)
        if opts.grid_save and not job.p.do_not_save_grid:
            _save(job.p, each, infotext)


def _pictures(job: Job, processed: Any) -> Iterator[tuple[Image.Image, str, PassRecord, int]]:
    """Each picture with its infotext, the last pass that was composed for it, and its number in its batch."""
    last: dict[int, PassRecord] = {}
    for done in job.passes:
        if done.history.steps:
            last[done.batch] = done
    first, count = processed.index_of_first_image, job.p.batch_size
    texts = processed.infotexts[first:]
    # A picture may be followed by its mask and the like, which have no infotext of their own.
    stride = (len(processed.images) - first) // max(1, len(texts))
    for batch, done in sorted(last.items()):
        for row in range(count):
            number = batch * count + row
            if number < len(texts):
                yield processed.images[first + number * stride], texts[number], done, row


def _draw(p: Any, picture: Image.Image, done: PassRecord, row: int, single: bool) -> list[Image.Image]:
    """The maps of one picture; of its inpainted part alone where only that was sampled."""
    region = getattr(p, "paste_to", None)
    if region is not None:
        x, y, width, height = region
        picture = picture.crop((x, y, x + width, y + height))
    weights = [_of_image(step, done.owners, row) for step in done.history.weights]
    names, history = done.loras[: len(weights[0])], done.history
    return maps.render(weights, names, picture, history.steps, single, history.styles)


def _of_image(weights: Tensor, owners: tuple[int, ...], row: int) -> Tensor:
    """Ω (N, Bc, H, W) of one image (N, H, W): the mean over its conditional rows, several with a prompt's AND."""
    own = [number for number, image in enumerate(owners) if image == row] or [row]
    return weights[:, own].float().mean(dim=1)


def _save(p: Any, picture: Image.Image, infotext: str) -> None:
    from modules import images
    from modules.shared import opts

    images.save_image(
        picture,
        p.outpath_grids,
        "loratorio",
        p.all_seeds[0],
        p.all_prompts[0],
        opts.grid_format,
        info=infotext,
        p=p,
        grid=True,
    )
