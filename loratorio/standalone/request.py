"""What is asked for, and what can be said to be wrong with it before a model is there. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import LoratorioError
from ..settings import Settings
from .model_files import LATENT_PIXEL
from .prompt import check_text
from .samplers import find_sampler

if TYPE_CHECKING:
    from PIL import Image

    from .checkpoint import Checkpoint

LARGEST = 8192


@dataclass(frozen=True)
class Request:
    """What is to be made. Steps, CFG scale and size are the model's own where they are left out.

    Attributes:
        prompt: with LoRA tags.
        settings: the knobs. `enabled` off means that the LoRAs are merged.
        width, height: in pixels, divisible by 8.
        seed: of the first image; image i of the batch has seed + i, so that it comes out the same alone.
        init_image, strength: for img2img: the picture, and how much to change it (0 to 1).
    """

    prompt: str
    negative: str = ""
    settings: Settings = field(default_factory=lambda: Settings(enabled=True))
    steps: int | None = None
    cfg: float | None = None
    sampler: str = "euler"
    seed: int = 0
    width: int | None = None
    height: int | None = None
    batch: int = 1
    init_image: Image.Image | None = None
    strength: float = 0.75

    @property
    def engine_settings(self) -> Settings:
        """The knobs as the engine takes them: it always composes, by merging if it must."""
        return self.settings if self.settings.enabled else self.settings.with_values({"method": "merge"})


@dataclass(frozen=True)
class WholeRequest(Request):
    """A request of which nothing is left out."""

    steps: int = 0
    cfg: float = 0
    width: int = 0
    height: int = 0


def whole(request: Request, checkpoint: Checkpoint) -> WholeRequest:
    """The request with the model's own values where it leaves them out. Raises LoratorioError as `check`."""
    own: dict[str, Any] = {"steps": checkpoint.steps, "cfg": checkpoint.cfg}
    own |= dict.fromkeys(("width", "height"), checkpoint.native_size)
    said = {name: value for name, value in vars(request).items() if value is not None}
    made = WholeRequest(**{**own, **said})
    check(made, checkpoint.latent_scale)
    return made


def check(request: Request, latent_scale: int = LATENT_PIXEL) -> None:
    """Raise LoratorioError for values that are wrong with any model. Values that are left out are valid."""
    called = request.settings.called
    size = called("size") if request.settings.naming == "option" else ""
    find_sampler(request.sampler, called("sampler"))
    check_text("negative prompt", request.negative)
    for what, number, lowest, highest in (
        (called("steps"), request.steps, 1, 1000),
        (called("batch"), request.batch, 1, 64),
        (called("cfg"), request.cfg, 1, 100),
        (called("strength"), request.strength, 0.01, 1),
        (called("seed"), request.seed, 0, 2**63 - 64),
        (size or "width", request.width, latent_scale, LARGEST),
        (size or "height", request.height, latent_scale, LARGEST),
    ):
        if number is not None and not lowest <= number <= highest:
            raise LoratorioError(f"{what} must be from {lowest} to {highest}, not {number}.")
    for what, pixels in ((size or "width", request.width), (size or "height", request.height)):
        if pixels is not None and pixels % latent_scale:
            raise LoratorioError(
                f"{what} must be divisible by {latent_scale}, not {pixels}: "
                f"the nearest is {max(1, round(pixels / latent_scale)) * latent_scale}."
            )
    if request.width is None or request.height is None:
        return
    largest = max(request.width, request.height) // latent_scale
    patch_size = request.settings.patch_size
    if patch_size > largest:
        raise LoratorioError(
            f"{called('patch_size')} is {patch_size}, but the latent of a {request.width}×{request.height} picture is only "
            f"{request.width // latent_scale}×{request.height // latent_scale}: choose {largest} or less."
        )
