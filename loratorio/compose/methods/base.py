"""What every way to compose is made of: its entry, the step it stands at, and what the model predicted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from ..lazy_torch import torch
from ..mixes import Branch, Mix, Participants
from ..regions import Canvas, Masks

if TYPE_CHECKING:
    from torch import Tensor


class Entry(NamedTuple):
    """A method as a user sees it. `source`: the paper it comes from."""

    name: str
    label: str
    source: str


@dataclass(frozen=True)
class StepContext:
    """Where sampling stands: step `index` of `total`, and whether the step has unconditional rows.

    Attributes:
        knobs: by name, the values of the knobs that the method declares (`Method.knobs`), and no others.
        canvas, size: which part of the picture is sampled, and the height and width of its latents; while a host only plans, the
            size is not known.
    """

    participants: Participants
    knobs: Mapping[str, Any]
    index: int
    total: int
    has_uncond: bool
    canvas: Canvas = field(default_factory=Canvas)
    size: tuple[int, int] | None = None

    def masks(self, device: Any = "cpu") -> Masks | None:
        """Where each single may act; None where every one may act everywhere."""
        assert self.size is not None
        return self.canvas.masks(self.participants.places, self.size, device, self.knobs["yielding"])

    @property
    def has_gap(self) -> bool:
        """Whether there is, or may be, a part of the picture that belongs to no LoRA: there the base has the say."""
        if not any(self.participants.places):
            return False
        masks = None if self.size is None else self.masks()
        return self.size is None or (masks is not None and masks.has_gap)

    def with_shared_parts(self) -> StepContext:
        """The same of `Participants.with_shared_parts`, at the part that the knob `share` says."""
        return replace(self, participants=self.participants.with_shared_parts(self.knobs["share"]))


@dataclass(frozen=True)
class Predictions:
    """What the model predicted at one step.

    Attributes:
        by_branch: prediction of every branch asked for: (Bc, C, H, W) for conditional branches, (Bu, C, H, W) for
            unconditional ones; noise e or denoised latents D, as the host's model gives them.
        noise_by_mix: the conditional predictions as noise e, which is what similarity is measured on.
        owners: image of each conditional row, (Bc,) int64: with prompt AND an image has several.
    """

    by_branch: Mapping[Branch, Tensor]
    noise_by_mix: Mapping[Mix, Tensor]
    owners: Tensor

    def cond(self, mix: Mix) -> Tensor:
        return self.by_branch[Branch(mix, True)]

    def uncond(self, mix: Mix) -> Tensor:
        return self.by_branch[Branch(mix, False)]

    def per_image(self, weights: Tensor, images: int) -> Tensor:
        """Weights of conditional rows (N, Bc, …) as weights of images (N, images, …): the mean of its rows."""
        if self.owners.tolist() == list(range(images)):
            return weights
        owners = self.owners.to(weights.device)
        summed = weights.new_zeros((weights.shape[0], images, *weights.shape[2:])).index_add_(
            1, owners, weights
        )
        counts = torch.bincount(owners, minlength=images).to(weights.dtype)
        return summed / counts.view(1, -1, *[1] * (weights.ndim - 2))


@dataclass(frozen=True)
class Composition:
    """The composed predictions, float32: cond (Bc, C, H, W), uncond (Bu, C, H, W) or None, Ω↑ (N, Bc, H, W) or None.

    Noise e or denoised latents D, as the predictions are of which it was made.
    """

    cond: Tensor
    uncond: Tensor | None
    weights: Tensor | None = None


class Changes(Protocol):
    """Where a method finds what the LoRAs do to the weights (the engine's bank has it)."""

    def changes(self) -> Iterator[tuple[str, Mapping[int, tuple[Tensor, int]]]]:
        """Layer by layer, by each LoRA (by number) that touches its weight: ΔW at its strength, float32, and the rank that it is stored
        with. Nothing before the bank is attached."""
        ...


class Method(ABC):
    """One way to compose.

    Those in the registry are stateless. One that must remember something between steps hands out, from `begin`, an object
    of its own for each generation.

    Attributes:
        entry: how it is shown, and where it comes from.
        knobs: names of the knobs that it reads. It is given these alone, and the others are without effect on it.
        takes_places: whether it can keep a LoRA to a part of the picture.
        uses_importance: whether it wants to know how much each LoRA's trigger words matter in the prompt.
    """

    entry: ClassVar[Entry]
    knobs: ClassVar[tuple[str, ...]] = ()
    takes_places: ClassVar[bool] = False
    uses_importance: ClassVar[bool] = False

    def begin(self, participants: Participants, changes: Changes) -> Method:
        """The object that composes one generation on one model; this one where nothing is remembered between steps."""
        return self

    @abstractmethod
    def branches(self, now: StepContext) -> list[Branch]:
        """The model rows this step needs, each branch once. Asking changes nothing: a host asks in order to plan."""

    def layer_mixes(self, now: StepContext) -> Mapping[str, Mix]:
        """By layer, the mix that takes the place of every row's there; most methods treat all layers alike."""
        return {}

    def further(self, now: StepContext, predictions: Predictions) -> list[Branch]:
        """Rows that are only known to be needed once `branches` are predicted; most methods have none."""
        return []

    @abstractmethod
    def compose(self, now: StepContext, predictions: Predictions) -> Composition:
        """One conditional and one unconditional prediction out of those rows."""


def both(mixes: Sequence[Mix], now: StepContext) -> list[Branch]:
    """The conditional and, where there is one, the unconditional branch of each mix."""
    return [Branch(mix, cond) for mix in mixes for cond in ((True, False) if now.has_uncond else (True,))]


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σᵢ wᵢ·tensorᵢ in float32."""
    total = tensors[0].to(torch.float32) * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total.add_(tensor.to(torch.float32), alpha=weight)
    return total
