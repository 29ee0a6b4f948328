"""Reuse: LoRAs that are not run at an evaluation of the model count by what they predicted before.

Letters in shapes: Bc conditional and Bu unconditional rows of a branch, C channels, H×W latent pixels.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
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

LATE = 0.85
"""From this part of the steps on, a LoRA is run at every other evaluation at least: predictions change fastest at the end."""

DAMPING = 0.5
"""How much of a LoRA's last change is taken to go on: found by measurement (docs/METHODS.md)."""

LEAST_SHARE = 0.02
"""Of the picture, times evaluations since; a candidate of a pool with less is not run."""


@dataclass(frozen=True)
class Residual:
    """How far a LoRA's predictions were from the base's at an evaluation, by the size of the base's noise there.

    Attributes:
        time: number of the evaluation.
        cond: of the conditional rows, (Bc, C, H, W) float32. uncond: of the unconditional ones, (Bu, C, H, W), where they were run.
    """

    time: int
    cond: Tensor
    uncond: Tensor | None


class Reuse(Method):
    """A weighted method of which an evaluation of the model runs only some of the LoRAs.

    The base is run at every evaluation. A LoRA that is not is taken to differ from it as it did when it last was, in proportion to
    the size of the base's noise, and `DAMPING` of its last change going on. Of the LoRAs that the prompt names every n-th is run, by turn,
    n being the knob `reuse`; all of them at the first evaluation. Of a pool's candidates the `pool_size` most urgent ones are run: those
    with the largest share of the picture times the evaluations since they last were; all of them at every `pool_interval`-th step. A
    LoRA is weighed at every evaluation, run or not. Evaluations count, not steps: some samplers make two a step.
    """

    def __init__(self, method: Weighted) -> None:
        self._method = method
        self._time = 0
        self._kept: dict[int, list[Residual]] = {}  # by place, the last two
        self._shape: Hashable = None
        self._shares: Tensor | None = None
        self._listed: list[float] = []

    def branches(self, now: StepContext) -> list[Branch]:
        asked = self._method.branches(now)
        shared = now.with_shared_parts()
        if not self._reuses(shared):
            return asked
        left_out = self._left_out(shared)
        branches = [branch for branch in asked if branch.mix not in left_out]
        if any(not branch.cond for branch in asked):
            # What unconditional predictions are compared with, also where the method itself does without.
            branches.append(Branch(shared.participants.base, False))
        return list(dict.fromkeys(branches))

    def compose(self, now: StepContext, predictions: Predictions) -> Composition:
        shared = now.with_shared_parts()
        if not self._reuses(shared):
            return self._method.compose(now, predictions)
        size = _size(shared, predictions)
        self._remember(shared, predictions, size)
        carried_on = self._carried_on(shared, predictions, size)
        composed = self._method.compose(now, predictions.with_branches(carried_on))
        if any(now.participants.pooled):
            assert composed.weights is not None
            self._shares, self._listed = composed.weights.mean(dim=(1, 2, 3)), []
        self._time += 1
        return composed

    # -- which LoRAs are run --------------------------------------------------------------------------------------------

    def _reuses(self, now: StepContext) -> bool:
        """Whether any LoRA may be left out at this step."""
        participants = now.participants
        by_turn = now.knobs["reuse"] > 1 and now.total > SHORT
        return len(participants.singles) > 1 and (by_turn or any(participants.pooled))

    def _left_out(self, now: StepContext) -> set[Mix]:
        """Mixes of the LoRAs that are not run at this evaluation."""
        participants = now.participants
        run = {participants.singles[place] for place in self._due(now)}
        # LoRAs that share all of themselves are one mix, and the reference's.
        needed = {participants.base, participants.compared, *(each.mix for each in participants.additions)}
        return set(participants.singles) - run - needed

    def _due(self, now: StepContext) -> list[int]:
        """Places of the LoRAs that are run at this evaluation."""
        every = list(range(len(now.participants.singles)))
        if self._is_stale(now):
            return every
        pooled = [place for place in every if now.participants.is_candidate(place)]
        named = [place for place in every if not now.participants.is_candidate(place)]
        return [*self._by_turn(named, now), *self._by_urgency(pooled, now)]

    def _is_stale(self, now: StepContext) -> bool:
        """Whether nothing is kept that fits this evaluation's rows, or something is lacking that is asked now."""
        of_uncond = now.has_uncond and now.knobs["recentre"] < 1
        lacking = of_uncond and any(each[-1].uncond is None for each in self._kept.values())
        return not self._kept or lacking or self._shape != _shape(now)

    def _by_turn(self, named: list[int], now: StepContext) -> list[int]:
        every_nth = now.knobs["reuse"] if now.total > SHORT else 1
        if now.index >= LATE * now.total:
            every_nth = min(every_nth, 2)
        # Neighbours take turns together: they stand together in the batch, and in what it is multiplied with.
        turns = [number * every_nth // max(len(named), every_nth) for number in range(len(named))]
        return [place for place, turn in zip(named, turns, strict=True) if turn == self._time % every_nth]

    def _by_urgency(self, pooled: list[int], now: StepContext) -> list[int]:
        if not pooled or now.index % now.knobs["pool_interval"] == 0:
            return pooled
        if self._shares is not None and not self._listed:
            # The one thing that a step's plan reads off the device.
            self._listed = self._shares.tolist()
        urgency = {place: self._listed[place] * (self._time - self._kept[place][-1].time) for place in pooled}
        ranked = sorted(urgency, key=lambda place: -urgency[place])[: now.knobs["pool_size"]]
        return sorted(place for place in ranked if urgency[place] >= LEAST_SHARE)

    # -- what the others would predict ------------------------------------------------------------------------------------

    def _remember(self, now: StepContext, predictions: Predictions, size: Tensor) -> None:
        """Keep how far those that were run are from the base."""
        if self._shape != _shape(now):
            self._kept.clear()
            self._shape, self._time = _shape(now), 0
        participants = now.participants
        for place, mix in enumerate(participants.singles):
            if Branch(mix, True) in predictions.by_branch:
                cond = _difference(predictions, mix, participants.compared, True)
                assert cond is not None
                uncond = _difference(predictions, mix, participants.base, False)
                residual = Residual(self._time, cond / size, None if uncond is None else uncond / size)
                self._kept[place] = [*self._kept.get(place, [])[-1:], residual]

    def _carried_on(self, now: StepContext, predictions: Predictions, size: Tensor) -> dict[Branch, Tensor]:
        """The predictions, float32, of the LoRAs that were not run."""
        participants = now.participants
        made: dict[Branch, Tensor] = {}
        for place, mix in enumerate(participants.singles):
            if Branch(mix, True) in predictions.by_branch:
                continue
            kept = self._kept[place]
            since = self._time - kept[-1].time
            before = kept[-1].time - kept[0].time
            onward = DAMPING * min(1.0, since / before) if before else 0.0
            reference = predictions.cond(participants.compared).to(torch.float32)
            made[Branch(mix, True)] = reference + size * _onward([each.cond for each in kept], onward)
            unconds = [each.uncond for each in kept if each.uncond is not None]
            if unconds and now.has_uncond:
                reference = predictions.uncond(participants.base).to(torch.float32)
                made[Branch(mix, False)] = reference + size * _onward(unconds, onward)
        return made


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


def _size(now: StepContext, predictions: Predictions) -> Tensor:
    """Root mean square of the base's noise: σ where predictions are denoised latents, hardly changing where they are e."""
    noise = predictions.noise(now.participants.compared).to(torch.float32)
    return noise.square().mean().sqrt().clamp_min(1e-20)
