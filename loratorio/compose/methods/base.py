"""What every way to compose is made of: its entry, the step it stands at, and what the model predicted.

A method's file takes torch from `..lazy_torch`, which imports it at first use: a WebUI's page and ``loratorio --help`` list the
methods and compute nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from ..lazy_torch import torch
from ..mixes import Branch, Mix, Participants
from ..regions import Masks, Place, PlaceMasks

if TYPE_CHECKING:
    from torch import Tensor


class Entry(NamedTuple):
    """A method as a user sees it. `source`: the paper it comes from. `summary`: what it does, in one sentence."""

    name: str
    label: str
    source: str
    summary: str


@dataclass(frozen=True)
class StepContext:
    """Where sampling stands: step `index` of `total`, and whether the step has unconditional rows.

    Attributes:
        participants: the LoRAs as this step's rows have them: with shared parts, where the method has the knob `share`.
        knobs: by name, the values of the knobs that the method declares (`Method.knobs`), and no others.
        rows: how many conditional and unconditional rows a branch has.
        place_masks: masks of places in the part of the picture that is sampled. size: height and width of its latents. device: theirs.
    """

    participants: Participants
    knobs: Mapping[str, Any]
    index: int
    total: int
    has_uncond: bool
    rows: tuple[int, int] = (1, 1)
    place_masks: PlaceMasks = field(default_factory=PlaceMasks)
    size: tuple[int, int] = (1, 1)
    device: Any = "cpu"

    @property
    def masks(self) -> Masks | None:
        """Where each composed LoRA may act, by picture; None where every one may act everywhere. `Masks.of` has them by row."""
        places = {lora.number: lora.place for lora in self.participants.loras}
        return self.place_masks.masks(places, self.size, self.device, self.knobs.get("yielding", 0.0))

    def mask(self, place: Place) -> Tensor:
        """How much of each latent pixel belongs to a place, (H, W) float32."""
        return self.place_masks.mask(place, self.size, self.device)

    @property
    def recentring(self) -> float:
        """λ: how much of the unconditional prediction is the base's; 0 for a method without that knob."""
        return float(self.knobs.get("recentre", 0.0))

    @property
    def has_gap(self) -> bool:
        """Whether a part of the picture belongs to no LoRA: there the reference's prediction counts."""
        return self.masks is not None and self.masks.has_gap


@dataclass(frozen=True)
class Predictions:
    """What the model predicted at one step.

    Attributes:
        by_branch: prediction of every requested branch: (Bc, C, H, W) for conditional branches, (Bu, C, H, W) for
            unconditional ones; noise e or denoised latents D, as the host's model gives them.
        owners: image of each conditional row: with prompt AND an image has several.
        latents: the noisy latents z of the conditional rows, (Bc, C, H, W), where predictions are denoised; None where they are noise.
        sigma: where they are noise, the σ of z ∝ x₀ + σ·e, a number or a tensor that broadcasts; None where it is unknown.
        measured: the step's own predictions, where these are of rows run once more (`Method.again`): the noise is theirs.
    """

    by_branch: Mapping[Branch, Tensor]
    owners: tuple[int, ...]
    latents: Tensor | None = None
    sigma: float | Tensor | None = None
    measured: Predictions | None = None
    _noise: dict[Mix, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def cond(self, mix: Mix) -> Tensor:
        return self.by_branch[Branch(mix, True)]

    def uncond(self, mix: Mix) -> Tensor:
        return self.by_branch[Branch(mix, False)]

    def noise(self, mix: Mix) -> Tensor:
        """The conditional prediction as noise, (Bc, C, H, W), which similarity is measured on; made once, at first use.

        For denoised latents it is z − D, σ times the noise and float32: its size does not matter to a cosine.
        """
        if self.measured is not None:
            return self.measured.noise(mix)
        if self.latents is None:
            return self.cond(mix)
        if mix not in self._noise:
            self._noise[mix] = self.latents.to(torch.float32) - self.cond(mix).to(torch.float32)
        return self._noise[mix]

    def with_branches(self, by_branch: Mapping[Branch, Tensor]) -> Predictions:
        """The same step with these branches added, or in place of its own."""
        kept = {mix: noise for mix, noise in self._noise.items() if Branch(mix, True) not in by_branch}
        return replace(self, by_branch={**self.by_branch, **by_branch}, _noise=kept)

    def per_image(self, weights: Tensor, images: int) -> Tensor:
        """Weights of conditional rows (N, Bc, …) as weights of images (N, images, …): the mean of its rows."""
        if self.owners == tuple(range(images)):
            return weights
        rows = [[row for row, owner in enumerate(self.owners) if owner == image] for image in range(images)]
        # By slices and not by an index tensor, which would have to be copied to the device at every step.
        return torch.stack([_mean_of([weights[:, row] for row in own]) for own in rows], dim=1)


def _mean_of(tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total / len(tensors)


@dataclass(frozen=True)
class Composition:
    """The composed predictions, float32: cond (Bc, C, H, W), uncond (Bu, C, H, W) or None, Ω↑ (N, Bc, H, W) or None.

    Noise e or denoised latents D, whichever the predictions were. N are the LoRAs of the step's context.
    """

    cond: Tensor
    uncond: Tensor | None
    weights: Tensor | None = None


class Weights(Protocol):
    """What the LoRAs do to the model's weights (the engine's bank has it)."""

    def changes(self) -> Iterator[tuple[str, Mapping[int, tuple[Tensor, int]]]]:
        """Layer by layer, for each LoRA (by number) that touches its weight: ΔW at its strength, float32, and the rank that it is
        stored with. Nothing before the bank is attached."""
        ...

    def products(self) -> Iterator[tuple[str, Mapping[int, tuple[Tensor, Tensor]]]]:
        """Layer by layer, the part of each LoRA's ΔW that is a low-rank product, at its strength, float32: down (r, in, …) and up
        (r, out)."""
        ...


class Method(ABC):
    """One way to compose.

    Those in the registry are stateless. One that must remember something between steps returns, from `begin`, an object
    of its own for each generation.

    Attributes:
        entry: how it is shown, and where it comes from.
        knobs: names of the knobs that it reads. It gets these alone; the others have no effect on it.
        takes_places: whether it can keep a LoRA to a part of the picture.
        uses_importance: whether it needs to know how much each LoRA's trigger words matter in the prompt.
    """

    entry: Entry
    knobs: tuple[str, ...] = ()
    takes_places: ClassVar[bool] = False
    uses_importance: bool = False

    def begin(self, participants: Participants, weights: Weights) -> Method:
        """The object that composes one generation on one model; this one where nothing is remembered between steps."""
        return self

    @abstractmethod
    def branches(self, now: StepContext) -> list[Branch]:
        """The model rows this step needs, each branch once. A call has no side effects."""

    def layer_mixes(self, now: StepContext) -> Mapping[str, Mix]:
        """By layer, the mix that replaces every row's mix there; most methods treat all layers alike."""
        return {}

    def assembled(self, weights: Weights, numbers: Collection[int]) -> Mapping[str, tuple[Tensor, Tensor]]:
        """By layer, the low-rank product, down (r, in, …) and up (r, out), of one LoRA made of those of these numbers, which takes
        their place under `Participants.merged`. Empty for most methods. Computed once, before the first step."""
        return {}

    @abstractmethod
    def compose(self, now: StepContext, predictions: Predictions) -> Composition:
        """One conditional and one unconditional prediction out of those rows."""

    def again(self, now: StepContext, predictions: Predictions) -> Composition:
        """The same out of rows that were run once more for the step that was composed last, with other attention or on other latents.

        Weighed as then (`Predictions.measured`). What is remembered between steps stays as it is."""
        return self.compose(now, predictions)


def both(mixes: Sequence[Mix], now: StepContext) -> list[Branch]:
    """The conditional and, where there is one, the unconditional branch of each mix."""
    return [Branch(mix, cond) for mix in mixes for cond in ((True, False) if now.has_uncond else (True,))]
