"""Reuse: LoRAs that are not run at an evaluation of the model count by what they predicted before.

Letters in shapes: Bc conditional and Bu unconditional rows of a branch, C channels, H×W latent pixels.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..lazy_torch import torch
from ..mixes import Branch, Mix
from .base import Composition, Method, Predictions, StepContext

if TYPE_CHECKING:
    from torch import Tensor

    from .weighted import Weighted

KNOBS = ("reuse", "pool_size", "pool_interval")
"""What a method must declare beside its own knobs, to be composed by `Reuse`."""

SHORT = 10
"""Schedules of so many steps and fewer run all named LoRAs at all steps: what a LoRA predicts changes too much between two of theirs."""

FEW = 17
"""Schedules of so many steps and fewer run a LoRA at every other evaluation at least: else it would be run but five times and less."""

LATE = 0.9
"""From this part of the steps on, a LoRA is run at every other evaluation at least: predictions change fastest at the end."""

DAMPING = 0.75
"""How much of a change is taken to go on, or to be followed: found by measurement (docs/METHODS.md)."""

TURN = 2.0
"""The σ above which a LoRA's difference from the base lasts in the denoised picture, and below which it lasts in the noise: found by
measurement (docs/METHODS.md)."""

UNCOND = 2
"""A LoRA's unconditional rows are run at every second of its runs: they count for less, and follow the conditional ones."""

LEAST_SHARE = 0.02
"""Of the picture, times evaluations since; a candidate of a pool with less is not run."""


@dataclass(frozen=True)
class Residual:
    """How far a LoRA's predictions were from the base's at an evaluation, by the unit of differences there (`_unit`).

    Attributes:
        time: number of the evaluation.
        cond: of the conditional rows, (Bc, C, H, W) float32.
    """

    time: int
    cond: Tensor


@dataclass(frozen=True)
class UncondResidual:
    """The same of the unconditional rows, and of the conditional ones beside them.

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
    """A weighted method of which an evaluation of the model runs only some of the LoRAs.

    The base is run at every evaluation. A LoRA that is not is taken to differ from it as it did when it last was, in a unit that makes
    differences last (`_unit`), and `DAMPING` of its last change going on. Its unconditional rows are run at every `UNCOND`-th of its
    runs, and late at all; between, they are taken to change as its conditional ones do.

    Of the LoRAs that the prompt names, or that are left of a settled pool, every n-th is run, by turn, n being the knob `reuse`;
    all of them at the first evaluation. Of another pool's candidates the `pool_size` most urgent ones are run: those with the
    largest share of the picture times the evaluations since they last were; all of them at every `pool_interval`-th step. A LoRA is
    weighed at every evaluation, run or not. Evaluations count, not steps: some samplers make two a step.
    """

    def __init__(self, method: Weighted) -> None:
        self._method = method
        self._time = 0
        self._kept: dict[int, list[Residual]] = {}  # by place, the last two
        self._unconds: dict[int, UncondResidual] = {}
        self._until_uncond: dict[int, int] = {}  # by place, runs without the unconditional rows that are left
        self._carried: dict[Branch, Tensor] = {}  # what was not run for the last step, as it was taken to be
        self._shape: Hashable = None
        self._shares: Tensor | None = None
        self._listed: list[float] = []

    def branches(self, now: StepContext) -> list[Branch]:
        asked = self._method.branches(now)
        shared = now.with_shared_parts()
        if not self._reuses(shared):
            return asked
        left_out = self._left_out(shared)
        branches = [branch for branch in asked if branch not in left_out]
        if any(not branch.cond for branch in asked):
            # What unconditional predictions are compared with, also where the method itself does without.
            branches.append(Branch(shared.participants.base, False))
        return list(dict.fromkeys(branches))

    def compose(self, now: StepContext, predictions: Predictions) -> Composition:
        shared = now.with_shared_parts()
        self._carried = {}
        if not self._reuses(shared):
            return self._method.compose(now, predictions)
        unit = _unit(shared, predictions)
        self._remember(shared, predictions, unit)
        self._carried = self._carried_on(shared, predictions, unit)
        composed = self._method.compose(now, predictions.with_branches(self._carried))
        if any(now.participants.pooled):
            assert composed.weights is not None
            self._shares, self._listed = composed.weights.mean(dim=(1, 2, 3)), []
        self._time += 1
        return composed

    def again(self, now: StepContext, predictions: Predictions) -> Composition:
        own, participants = predictions.measured, now.with_shared_parts().participants
        assert own is not None
        # What was not run then is not run now: it is taken to change as what it was compared with.
        changed = {}
        for branch, carried in self._carried.items():
            reference = Branch(participants.compared if branch.cond else participants.base, branch.cond)
            changed[branch] = carried + (predictions.by_branch[reference] - own.by_branch[reference])
        measured = own.with_branches(self._carried)
        return self._method.compose(now, replace(predictions.with_branches(changed), measured=measured))

    # -- which LoRAs are run --------------------------------------------------------------------------------------------

    def _reuses(self, now: StepContext) -> bool:
        """Whether any LoRA may be left out at this step."""
        every = range(len(now.participants.singles))
        return len(every) > 1 and any(self._may_wait(place, now) for place in every)

    def _left_out(self, now: StepContext) -> set[Branch]:
        """What of the LoRAs is not run at this evaluation."""
        participants = now.participants
        due = self._due(now)
        stale = self._is_stale(now)
        with_uncond = [place for place in due if stale or self._is_uncond_due(place, now)]
        # LoRAs that share all of themselves are one mix, and the reference's.
        needed = {participants.base, participants.compared, *(each.mix for each in participants.additions)}
        left_out: set[Branch] = set()
        for cond, run in ((True, due), (False, with_uncond)):
            mixes = {*participants.singles} - {participants.singles[place] for place in run} - needed
            left_out |= {Branch(mix, cond) for mix in mixes}
        return left_out

    def _due(self, now: StepContext) -> list[int]:
        """Places of the LoRAs that are run at this evaluation."""
        every = list(range(len(now.participants.singles)))
        if self._is_stale(now):
            return every
        pooled = [place for place in every if now.participants.may_rest(place)]
        named = [place for place in every if not now.participants.may_rest(place)]
        return [*self._by_turn(named, now), *self._by_urgency(pooled, now)]

    def _may_wait(self, place: int, now: StepContext) -> bool:
        """Whether a LoRA is one that need not be run at every evaluation."""
        return _every_nth(now) > 1 or now.participants.may_rest(place)

    def _is_uncond_due(self, place: int, now: StepContext) -> bool:
        """Whether a LoRA that is run is run with its unconditional rows, too."""
        if not self._may_wait(place, now) or _is_late(now) or self._until_uncond.get(place, 0) == 0:
            return True
        return now.participants.may_rest(place) and _is_whole_pool_run(now)

    def _is_stale(self, now: StepContext) -> bool:
        """Whether nothing is kept that fits this evaluation's rows, or something is lacking that is asked now."""
        of_uncond = now.has_uncond and now.knobs["recentre"] < 1
        lacking = of_uncond and self._unconds.keys() != self._kept.keys()
        return not self._kept or lacking or self._shape != _shape(now)

    def _by_turn(self, named: list[int], now: StepContext) -> list[int]:
        every_nth = _every_nth(now)
        # Neighbours take turns together: they stand together in the batch, and in what it is multiplied with.
        turns = [number * every_nth // max(len(named), every_nth) for number in range(len(named))]
        return [place for place, turn in zip(named, turns, strict=True) if turn == self._time % every_nth]

    def _by_urgency(self, pooled: list[int], now: StepContext) -> list[int]:
        if not pooled or _is_whole_pool_run(now):
            return pooled
        if self._shares is not None and not self._listed:
            # The one thing that a step's plan reads off the device.
            self._listed = self._shares.tolist()
        urgency = {place: self._listed[place] * (self._time - self._kept[place][-1].time) for place in pooled}
        ranked = sorted(urgency, key=lambda place: -urgency[place])[: now.knobs["pool_size"]]
        return sorted(place for place in ranked if urgency[place] >= LEAST_SHARE)

    # -- what the others would predict ------------------------------------------------------------------------------------

    def _remember(self, now: StepContext, predictions: Predictions, unit: Tensor) -> None:
        """Keep how far those that were run are from the base."""
        if self._shape != _shape(now):
            self._kept.clear()
            self._unconds.clear()
            self._until_uncond.clear()
            self._shape, self._time = _shape(now), 0
        participants = now.participants
        for place, mix in enumerate(participants.singles):
            if Branch(mix, True) in predictions.by_branch:
                cond = _difference(predictions, mix, participants.compared, True)
                assert cond is not None
                residual = Residual(self._time, cond / unit)
                self._kept[place] = [*self._kept.get(place, [])[-1:], residual]
                uncond = _difference(predictions, mix, participants.base, False)
                if uncond is not None:
                    # Of several LoRAs' first unconditional rows some come again sooner, so that each step has about as many.
                    first = place not in self._unconds
                    self._unconds[place] = UncondResidual.of(uncond / unit, residual.cond)
                    self._until_uncond[place] = place % UNCOND if first else UNCOND - 1
                else:
                    self._until_uncond[place] = max(0, self._until_uncond.get(place, 0) - 1)

    def _carried_on(self, now: StepContext, predictions: Predictions, unit: Tensor) -> dict[Branch, Tensor]:
        """The predictions, float32, of the LoRAs that were not run."""
        participants = now.participants
        made: dict[Branch, Tensor] = {}
        for place, mix in enumerate(participants.singles):
            kept = self._kept[place]
            residual = kept[-1].cond
            if Branch(mix, True) not in predictions.by_branch:
                since = self._time - kept[-1].time
                before = kept[-1].time - kept[0].time
                onward = DAMPING * min(1.0, since / before) if before else 0.0
                residual = _onward([each.cond for each in kept], onward)
                reference = predictions.cond(participants.compared).to(torch.float32)
                made[Branch(mix, True)] = reference + unit * residual
            if now.has_uncond and place in self._unconds and Branch(mix, False) not in predictions.by_branch:
                reference = predictions.uncond(participants.base).to(torch.float32)
                made[Branch(mix, False)] = reference + unit * self._unconds[place].now(residual)
        return made


def _every_nth(now: StepContext) -> int:
    """Of a named LoRA's evaluations every so-manieth is run."""
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
    """In what differences from the base are measured, so that they last: the root mean square of the base's noise, by √(1 + σ²/TURN²).

    Of denoised latents D that mean square is σ itself, so that while σ is large it is differences of D that last.
    """
    noise = predictions.noise(now.participants.compared).to(torch.float32)
    size = noise.square().mean().sqrt().clamp_min(1e-20)
    sigma = predictions.sigma if predictions.latents is None else size
    return size if sigma is None else size / (1 + (sigma / TURN) ** 2) ** 0.5
