"""Reuse: a LoRA that is not run at an evaluation of the model counts with what it predicted before.

Letters in shapes: Bc conditional and Bu unconditional rows of a branch, C channels, H×W latent pixels.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..lazy_torch import torch
from ..mixes import Branch, ComposedLora, Mix
from .base import Composition, Method, Predictions, StepContext

if TYPE_CHECKING:
    from torch import Tensor

KNOBS = ("reuse", "pool_size", "pool_interval")
"""The knobs that a method must declare in addition to its own, to be composed by `Reuse`."""

SHORT = 10
"""Schedules of up to this many steps run all named LoRAs at all steps: predictions change too much from step to step."""

FEW = 17
"""Schedules of up to this many steps run a LoRA at every other evaluation at least: else it would run five times or fewer."""

LATE = 0.9
"""From this part of the steps on, a LoRA is run at every other evaluation at least: predictions change fastest at the end."""

DAMPING = 0.75
"""How much of a change is taken to continue: found by measurement (docs/lab/METHODS.md)."""

TURN = 2.0
"""The σ above which a LoRA's difference from the base lasts in the denoised picture, and below which it lasts in the noise: found by
measurement (docs/lab/METHODS.md)."""

UNCOND = 2
"""A LoRA's unconditional rows run at every second of its runs: they count for less, and follow the conditional ones."""

LEAST_SHARE = 0.02
"""A pool's candidate with less than this share of the picture, times the evaluations since it last ran, is not run."""


@dataclass(frozen=True)
class Residual:
    """How far a LoRA's predictions were from the base's at an evaluation, in the unit of that evaluation (`_unit`).

    Attributes:
        time: number of the evaluation.
        cond: the conditional rows' difference, (Bc, C, H, W) float32.
    """

    time: int
    cond: Tensor


@dataclass(frozen=True)
class UncondResidual:
    """The same for the unconditional rows, with the conditional ones of that evaluation.

    Attributes:
        uncond: (Bu, C, H, W) float32.
        cond: (Bc, C, H, W) float32 of the same evaluation.
        follows: (Bu, 1, 1, 1), how much of a change of `cond` is taken for one of `uncond`: `DAMPING` of the part of `uncond` that lies
            along `cond`, which is from 0 to 1; None where the one does not belong to the other (Bc is not Bu).
    """

    uncond: Tensor
    cond: Tensor
    follows: Tensor | None

    @classmethod
    def of(cls, uncond: Tensor, cond: Tensor) -> UncondResidual:
        if uncond.shape != cond.shape:
            return cls(uncond, cond, None)
        along = (uncond * cond).sum(dim=(1, 2, 3), keepdim=True)
        follows = along / cond.square().sum(dim=(1, 2, 3), keepdim=True).clamp_min(1e-20)
        return cls(uncond, cond, DAMPING * follows.clamp(0, 1))

    def now(self, cond: Tensor) -> Tensor:
        """What it is taken to be where the conditional one is `cond`."""
        return self.uncond if self.follows is None else self.uncond + self.follows * (cond - self.cond)


class Reuse(Method):
    """LoRAtorio with only some of the LoRAs run at an evaluation of the model.

    The base runs at every evaluation. A LoRA that does not is taken to differ from it as it did when it last ran, in a unit that makes
    differences last (`_unit`), with `DAMPING` of its last change going on. Its unconditional rows run at every `UNCOND`-th of its
    runs, and at each of its late ones; in between they are taken to change as its conditional rows do.

    Each LoRA that the prompt names, or that is left of a settled pool, runs at every n-th evaluation, in turn, n being the knob `reuse`;
    all of them run at the first. Of another pool's candidates the `pool_size` most urgent ones run: those with the largest share of the
    picture times the evaluations since they last ran; all of them run at every `pool_interval`-th step. A LoRA is weighted at every
    evaluation, run or not. Evaluations count, not steps: some samplers make two per step.
    """

    def __init__(self, method: Method) -> None:
        self._method = method
        self._time = 0
        self._kept: dict[int, list[Residual]] = {}  # by a LoRA's number, the last two
        self._unconds: dict[int, UncondResidual] = {}
        self._until_uncond: dict[int, int] = {}  # by number, runs left without the unconditional rows
        self._carried: dict[Branch, Tensor] = {}  # what the last step's missing rows were taken to be
        self._shape: Hashable = None
        self._shares: Tensor | None = None
        self._listed: list[float] = []

    def branches(self, now: StepContext) -> list[Branch]:
        requested = self._method.branches(now)
        if not self._reuses(now):
            return requested
        left_out = self._left_out(now)
        branches = [branch for branch in requested if branch not in left_out]
        if any(not branch.cond for branch in requested):
            # Unconditional predictions are compared with it, also where the method itself does without.
            branches.append(Branch(now.participants.base, False))
        return list(dict.fromkeys(branches))

    def compose(self, now: StepContext, predictions: Predictions) -> Composition:
        self._carried = {}
        if not self._reuses(now):
            return self._method.compose(now, predictions)
        unit = _unit(now, predictions)
        self._remember(now, predictions, unit)
        self._carried = self._carried_on(now, predictions, unit)
        composed = self._method.compose(now, predictions.with_branches(self._carried))
        if now.participants.has_pool:
            assert composed.weights is not None
            self._shares, self._listed = composed.weights.mean(dim=(1, 2, 3)), []
        self._time += 1
        return composed

    def again(self, now: StepContext, predictions: Predictions) -> Composition:
        own, participants = predictions.measured, now.participants
        assert own is not None
        # A row that was not run then is not run now: it is taken to change as the row that it was compared with.
        changed = {}
        for branch, carried in self._carried.items():
            reference = Branch(participants.reference if branch.cond else participants.base, branch.cond)
            changed[branch] = carried + (predictions.by_branch[reference] - own.by_branch[reference])
        measured = own.with_branches(self._carried)
        return self._method.compose(now, replace(predictions.with_branches(changed), measured=measured))

    # -- which LoRAs are run --------------------------------------------------------------------------------------------

    def _reuses(self, now: StepContext) -> bool:
        """Whether any LoRA may be left out at this step."""
        loras = now.participants.loras
        return len(loras) > 1 and any(self._may_wait(lora, now) for lora in loras)

    def _left_out(self, now: StepContext) -> set[Branch]:
        """The LoRAs' rows that are not run at this evaluation."""
        participants = now.participants
        due = self._due(now)
        stale = self._is_stale(now)
        with_uncond = [lora for lora in due if stale or self._is_uncond_due(lora, now)]
        # LoRAs that share all of themselves are one mix, and the reference's.
        needed = {participants.base, participants.reference, *(each.mix for each in participants.additions)}
        left_out: set[Branch] = set()
        for cond, run in ((True, due), (False, with_uncond)):
            mixes = {*participants.mixes} - {lora.mix for lora in run} - needed
            left_out |= {Branch(mix, cond) for mix in mixes}
        return left_out

    def _due(self, now: StepContext) -> list[ComposedLora]:
        """The LoRAs that are run at this evaluation."""
        loras = now.participants.loras
        if self._is_stale(now):
            return list(loras)
        by_turn = self._by_turn([lora for lora in loras if not lora.scored], now)
        return [*by_turn, *self._by_urgency(now)]

    def _may_wait(self, lora: ComposedLora, now: StepContext) -> bool:
        """Whether a LoRA is one that need not be run at every evaluation."""
        return _every_nth(now) > 1 or lora.scored

    def _is_uncond_due(self, lora: ComposedLora, now: StepContext) -> bool:
        """Whether a LoRA that is run is run with its unconditional rows, too."""
        if not self._may_wait(lora, now) or _is_late(now) or self._until_uncond.get(lora.number, 0) == 0:
            return True
        return lora.scored and _is_whole_pool_run(now)

    def _is_stale(self, now: StepContext) -> bool:
        """Whether nothing is kept that fits this evaluation's rows, or something that it needs is missing."""
        of_uncond = now.has_uncond and now.recentring < 1
        lacking = of_uncond and self._unconds.keys() != self._kept.keys()
        return not self._kept or lacking or self._shape != _shape(now)

    def _by_turn(self, loras: Sequence[ComposedLora], now: StepContext) -> list[ComposedLora]:
        every_nth = _every_nth(now)
        # Neighbours take turns together: they stand together in the batch, and in what it is multiplied with.
        turns = [position * every_nth // max(len(loras), every_nth) for position in range(len(loras))]
        return [lora for lora, turn in zip(loras, turns, strict=True) if turn == self._time % every_nth]

    def _by_urgency(self, now: StepContext) -> list[ComposedLora]:
        scored = [(i, lora) for i, lora in enumerate(now.participants.loras) if lora.scored]
        if not scored or _is_whole_pool_run(now):
            return [lora for _, lora in scored]
        if self._shares is not None and not self._listed:
            # The one thing that a step's plan reads off the device.
            self._listed = self._shares.tolist()
        urgency = {i: self._listed[i] * (self._time - self._kept[lora.number][-1].time) for i, lora in scored}
        ranked = sorted(urgency, key=lambda i: -urgency[i])[: now.knobs["pool_size"]]
        return [lora for i, lora in scored if i in ranked and urgency[i] >= LEAST_SHARE]

    # -- what the others would predict ------------------------------------------------------------------------------------

    def _remember(self, now: StepContext, predictions: Predictions, unit: Tensor) -> None:
        """Keep how far those that were run are from the base."""
        if self._shape != _shape(now):
            self._kept.clear()
            self._unconds.clear()
            self._until_uncond.clear()
            self._shape, self._time = _shape(now), 0
        participants = now.participants
        for position, (number, mix) in enumerate(zip(participants.numbers, participants.mixes, strict=True)):
            cond = _difference(predictions, mix, participants.reference, True)
            if cond is None:
                continue
            residual = Residual(self._time, cond / unit)
            self._kept[number] = [*self._kept.get(number, [])[-1:], residual]
            uncond = _difference(predictions, mix, participants.base, False)
            if uncond is not None:
                # After the first evaluation every second LoRA's unconditional rows run sooner, so that each step has about as many.
                first = number not in self._unconds
                self._unconds[number] = UncondResidual.of(uncond / unit, residual.cond)
                self._until_uncond[number] = position % UNCOND if first else UNCOND - 1
            else:
                self._until_uncond[number] = max(0, self._until_uncond.get(number, 0) - 1)

    def _carried_on(self, now: StepContext, predictions: Predictions, unit: Tensor) -> dict[Branch, Tensor]:
        """The predictions, float32, of the LoRAs that were not run."""
        participants = now.participants
        made: dict[Branch, Tensor] = {}
        for number, mix in zip(participants.numbers, participants.mixes, strict=True):
            kept = self._kept[number]
            residual = kept[-1].cond
            if Branch(mix, True) not in predictions.by_branch:
                since = self._time - kept[-1].time
                before = kept[-1].time - kept[0].time
                onward = DAMPING * min(1.0, since / before) if before else 0.0
                residual = _onward([each.cond for each in kept], onward)
                reference = predictions.cond(participants.reference).to(torch.float32)
                made[Branch(mix, True)] = reference + unit * residual
            if now.has_uncond and number in self._unconds and Branch(mix, False) not in predictions.by_branch:
                reference = predictions.uncond(participants.base).to(torch.float32)
                made[Branch(mix, False)] = reference + unit * self._unconds[number].now(residual)
        return made


def _every_nth(now: StepContext) -> int:
    """n: a LoRA that the prompt names runs at every n-th evaluation."""
    if now.total <= SHORT:
        return 1
    every_nth: int = now.knobs["reuse"]
    return min(every_nth, 2) if _is_late(now) or now.total <= FEW else every_nth


def _is_late(now: StepContext) -> bool:
    return now.index >= LATE * now.total


def _is_whole_pool_run(now: StepContext) -> bool:
    return bool(now.index % now.knobs["pool_interval"] == 0)


def _onward(kept: Sequence[Tensor], part: float) -> Tensor:
    """The last of one or two, and a part of the change between them further."""
    return kept[-1] + part * (kept[-1] - kept[0]) if part and len(kept) > 1 else kept[-1]


def _difference(predictions: Predictions, mix: Mix, reference: Mix, cond: bool) -> Tensor | None:
    """The prediction of one mix less that of another, float32; None where they were not both run."""
    own = predictions.by_branch.get(Branch(mix, cond))
    other = predictions.by_branch.get(Branch(reference, cond))
    return None if own is None or other is None else own.to(torch.float32) - other.to(torch.float32)


def _shape(now: StepContext) -> Hashable:
    return (now.rows, now.size)


def _unit(now: StepContext, predictions: Predictions) -> Tensor:
    """The unit of differences from the base in which they last: the root mean square of the base's noise, over √(1 + σ²/TURN²).

    For denoised latents D that root mean square is σ itself: while σ is large, differences of D last.
    """
    noise = predictions.noise(now.participants.reference).to(torch.float32)
    size = noise.square().mean().sqrt().clamp_min(1e-20)
    sigma = predictions.sigma if predictions.latents is None else size
    return size if sigma is None else size / (1 + (sigma / TURN) ** 2) ** 0.5
