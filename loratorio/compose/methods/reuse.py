"""Reuse: a row that is not run at an evaluation of the model counts with what it predicted before.

Letters in shapes: Bc conditional and Bu unconditional rows of a branch, C channels, H×W latent pixels.
"""

from __future__ import annotations

import math
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

SHORT = 9
"""Schedules of up to this many steps run all named LoRAs at all steps: predictions change too much from step to step."""

FEW = 17
"""Schedules of up to this many steps run a LoRA at every other evaluation at least: else it would run five times or fewer."""

LATE = 0.95
"""From this part of the steps on, a LoRA is run at every other evaluation at least: predictions change fastest at the end."""

DAMPING = 0.75
"""How much of a change is taken to continue: found by measurement (docs/lab/METHODS.md)."""

TURN = 2.0
"""The σ above which a LoRA's difference from the base lasts in the denoised picture, and below which it lasts in the noise: found by
measurement (docs/lab/METHODS.md)."""

FIRST = 2
"""The unconditional prediction is run at this many evaluations before it is first carried on."""

UNCOND = 2
"""A LoRA's unconditional rows run once for every second of its runs: they count for less, and follow the conditional ones."""

UNCOND_APART = 3
"""The base's unconditional rows are run at every third evaluation at least."""

MANY = 3
"""So many LoRAs run once in n evaluations. With more of them each waits longer."""

GROWTH = 0.4
"""The LoRAs that are run at an evaluation grow with their number to this power above `MANY`: found by measurement."""

LEAST_SHARE = 0.02
"""A pool's candidate with less than this share of the picture, times the evaluations since it last ran, is not run."""


class Carried:
    """A difference between two predictions, carried on from the last two evaluations at which both were run.

    It is kept in the unit of its evaluation (`_unit`). `time`: the number of the last one.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[int, Tensor]] = []

    @property
    def is_kept(self) -> bool:
        return bool(self._kept)

    @property
    def time(self) -> int:
        return self._kept[-1][0]

    def keep(self, time: int, difference: Tensor) -> None:
        """The difference as it was measured, (B, C, H, W) float32."""
        self._kept = [*self._kept[-1:], (time, difference)]

    def at(self, time: int) -> Tensor:
        """What it is taken to be at an evaluation: as it was, and a part of its last change further."""
        (before, former), (last, difference) = self._kept[0], self._kept[-1]
        if last == before or time == last:
            return difference
        part = DAMPING * min(1.0, (time - last) / (last - before))
        return torch.lerp(former, difference, 1 + part)


@dataclass(frozen=True)
class UncondResidual:
    """How far a LoRA's unconditional rows were from the base's, with its conditional ones of that evaluation.

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
        return (
            self.uncond
            if self.follows is None
            else torch.addcmul(self.uncond, self.follows, cond - self.cond)
        )


class Reuse(Method):
    """LoRAtorio with only some of the rows run at an evaluation of the model.

    What every other prediction is compared with, the reference's conditional one, is run at every evaluation. A LoRA that is not is taken
    to differ from it as when it last ran, in a unit that makes differences last (`_unit`), with `DAMPING` of its last change going on.
    So is the base's unconditional prediction. A LoRA's unconditional one is compared with the base's, and is taken to change as its
    conditional one does.

    Each LoRA that the prompt names, or that is left of a settled pool, runs at every n-th evaluation, in turn, n being the knob `reuse`,
    and less often where there are more than `MANY`; all of them run at the first. Unconditional rows run at every n-th as well
    (`UNCOND_APART` at most): the base's, and those of LoRAs that have run `UNCOND` times since theirs did. Of another pool's candidates
    the `pool_size` most urgent ones run: those with the largest share of the picture times the evaluations since they last ran; all of
    them run at every `pool_interval`-th step. A LoRA is weighted at every evaluation, run or not. Evaluations count, not steps: some
    samplers make two per step.
    """

    def __init__(self, method: Method) -> None:
        self._method = method
        self._time = 0
        self._turn = 0.0  # the LoRAs' runs by turn so far
        self._conds: dict[Mix, Carried] = {}  # the LoRAs' conditional rows, less the reference's
        self._guidance = Carried()  # the base's unconditional rows, less the reference's conditional ones
        self._unconds: dict[Mix, UncondResidual] = {}
        self._runs: dict[Mix, int] = {}  # a LoRA's runs since its unconditional rows ran
        self._carried: dict[Branch, Tensor] = {}  # what the last evaluation's missing rows were taken to be
        self._shape: Hashable = None
        self._is_asked_again = False
        self._shares: Tensor | None = None
        self._listed: list[float] = []

    def branches(self, now: StepContext) -> list[Branch]:
        requested = self._requested(now)
        waiting = self._waiting(now, requested) if self._reuses(now) else set()
        return [branch for branch in requested if branch not in waiting]

    def compose(self, now: StepContext, predictions: Predictions) -> Composition:
        self._carried = {}
        if not self._reuses(now):
            return self._method.compose(now, predictions)
        self._begin(now)
        unit = _unit(now, predictions)
        self._carried = self._measured_or_carried(now, predictions, unit)
        composed = self._method.compose(now, predictions.with_branches(self._carried))
        if now.participants.has_pool:
            assert composed.weights is not None
            self._shares, self._listed = composed.weights.mean(dim=(1, 2, 3)), []
        if self._time:
            self._turn += _rate(sum(not lora.scored for lora in now.participants.loras), now)
        self._time += 1
        return composed

    def again(self, now: StepContext, predictions: Predictions) -> Composition:
        own = predictions.measured
        assert own is not None
        if now.has_uncond:
            # Whoever runs rows again may want the unconditional ones: from now on they are there.
            self._is_asked_again = True
        by_branch, participants = predictions.by_branch, now.participants
        anchor, base = Branch(_anchor(now), True), Branch(participants.base, False)
        changes = {True: by_branch[anchor] - own.by_branch[anchor]}
        if base in own.by_branch:
            changes[False] = by_branch[base] - own.by_branch[base]
        # A row that was not run then is not run now: it is taken to change as the row that it was compared with, if that one was run.
        changed = {
            branch: carried + changes[branch.cond] if branch.cond in changes else carried
            for branch, carried in self._carried.items()
        }
        measured = own.with_branches(self._carried)
        return self._method.compose(now, replace(predictions.with_branches(changed), measured=measured))

    # -- which rows are run ---------------------------------------------------------------------------------------------

    def _reuses(self, now: StepContext) -> bool:
        """Whether any row may be left out at this step."""
        loras = now.participants.loras
        if any(self._may_wait(lora, now) for lora in loras) and len(loras) > 1:
            return True
        return _uncond_apart(now) > 1 and now.has_uncond and now.recentring > 0

    def _may_wait(self, lora: ComposedLora, now: StepContext) -> bool:
        """Whether a LoRA is one that need not be run at every evaluation."""
        return _every_nth(now) > 1 or lora.scored

    def _requested(self, now: StepContext) -> list[Branch]:
        """The rows that the method asks for, and what they are compared with."""
        requested = self._method.branches(now)
        if self._reuses(now) and any(not branch.cond for branch in requested):
            # Unconditional predictions are compared with the base's, also where the method itself does without.
            requested.append(Branch(now.participants.base, False))
        return list(dict.fromkeys(requested))

    def _waiting(self, now: StepContext, requested: Sequence[Branch]) -> set[Branch]:
        """The requested rows that are not run at this evaluation."""
        if self._is_stale(now, requested):
            return set()
        participants = now.participants
        # LoRAs that share all of themselves are one mix, and the reference's.
        always = {
            participants.base,
            _anchor(now),
            participants.reference,
            *(each.mix for each in participants.additions),
        }
        run = always | {lora.mix for lora in self._due(now)}
        run_uncond: set[Mix] = set()
        if self._is_uncond_due(now):
            run_uncond = always | {
                lora.mix for lora in participants.loras if self._is_own_uncond_due(lora, lora.mix in run, now)
            }
        return {branch for branch in requested if branch.mix not in (run if branch.cond else run_uncond)}

    def _is_stale(self, now: StepContext, requested: Sequence[Branch]) -> bool:
        """Whether nothing is kept that fits this evaluation's rows, or something that it needs is missing."""
        anchor, base = Branch(_anchor(now), True), Branch(now.participants.base, False)
        compared = [branch for branch in requested if branch not in (anchor, base)]
        kept = {*(Branch(mix, True) for mix in self._conds), *(Branch(mix, False) for mix in self._unconds)}
        lacking = not kept.issuperset(compared) or (base in requested and not self._guidance.is_kept)
        return lacking or self._shape != _shape(now)

    def _due(self, now: StepContext) -> list[ComposedLora]:
        """The LoRAs that are run at this evaluation."""
        by_turn = self._by_turn([lora for lora in now.participants.loras if not lora.scored], now)
        return [*by_turn, *self._by_urgency(now)]

    def _is_uncond_due(self, now: StepContext) -> bool:
        """Whether any unconditional rows are run at this evaluation."""
        apart = _uncond_apart(now)
        return self._time < FIRST or _is_late(now) or self._is_asked_again or self._time % apart == 0

    def _is_own_uncond_due(self, lora: ComposedLora, is_run: bool, now: StepContext) -> bool:
        """Whether a LoRA's own unconditional rows are run with the base's. is_run: whether its conditional ones are."""
        all_are_run = _is_whole_pool_run(now) if lora.scored else _uncond_apart(now) == 1
        return all_are_run or self._runs[lora.mix] + is_run >= UNCOND

    def _by_turn(self, loras: Sequence[ComposedLora], now: StepContext) -> list[ComposedLora]:
        # Neighbours take turns together: they stand together in the batch, and in what it is multiplied with.
        first, behind = (math.ceil(turn - 1e-6) for turn in (self._turn, self._turn + _rate(len(loras), now)))
        due = {turn % len(loras) for turn in range(first, behind)}
        return [lora for position, lora in enumerate(loras) if position in due]

    def _by_urgency(self, now: StepContext) -> list[ComposedLora]:
        # What the others are compared with is run in any case: a single candidate is.
        loras = enumerate(now.participants.loras)
        scored = [(i, lora) for i, lora in loras if lora.scored and lora.mix != _anchor(now)]
        if not scored or _is_whole_pool_run(now):
            return [lora for _, lora in scored]
        if self._shares is not None and not self._listed:
            # The one thing that a step's plan reads off the device.
            self._listed = self._shares.tolist()
        urgency = {i: self._listed[i] * (self._time - self._conds[lora.mix].time) for i, lora in scored}
        ranked = sorted(urgency, key=lambda i: -urgency[i])[: now.knobs["pool_size"]]
        return [lora for i, lora in scored if i in ranked and urgency[i] >= LEAST_SHARE]

    # -- what the others would predict ------------------------------------------------------------------------------------

    def _begin(self, now: StepContext) -> None:
        """Forget what does not fit this evaluation's rows."""
        if self._shape == _shape(now):
            return
        self._conds, self._unconds, self._guidance = {}, {}, Carried()
        self._runs = {lora.mix: 0 for lora in now.participants.loras}
        self._shape, self._time, self._turn = _shape(now), 0, 0.0

    def _measured_or_carried(
        self, now: StepContext, predictions: Predictions, unit: Tensor
    ) -> dict[Branch, Tensor]:
        """Keep the differences of those rows that were run. Returns the predictions, float32, of those that were not."""
        participants, by_branch, time = now.participants, predictions.by_branch, self._time
        requested = self._requested(now)
        made: dict[Branch, Tensor] = {}

        def difference(branch: Branch, compared_with: Tensor) -> Tensor | None:
            own = by_branch.get(branch)
            return None if own is None else (own.to(torch.float32) - compared_with) / unit

        anchor = predictions.cond(_anchor(now)).to(torch.float32)
        conds = {_anchor(now): torch.zeros_like(anchor)}
        for branch in requested:
            if not branch.cond:
                continue
            if branch in by_branch:
                self._runs[branch.mix] = self._runs.get(branch.mix, 0) + 1
            if branch.mix in conds:
                continue
            found = difference(branch, anchor)
            carried = self._conds.setdefault(branch.mix, Carried())
            if found is not None:
                carried.keep(time, found)
            conds[branch.mix] = carried.at(time)
            if found is None:
                made[branch] = torch.addcmul(anchor, unit, conds[branch.mix])
        base = Branch(participants.base, False)
        if base not in requested:
            return made
        of_images = predictions.per_image(anchor.unsqueeze(0), 1 + max(predictions.owners))[0]
        found = difference(base, of_images)
        if found is not None:
            self._guidance.keep(time, found)
            uncond = by_branch[base].to(torch.float32)
        else:
            uncond = made[base] = torch.addcmul(of_images, unit, self._guidance.at(time))
        for branch in requested:
            if branch.cond or branch == base:
                continue
            found = difference(branch, uncond)
            if found is not None:
                # After the first evaluation every second LoRA's rows run sooner, so that each evaluation has about as many.
                sooner = branch.mix not in self._unconds and len(self._unconds) % UNCOND == 0
                self._runs[branch.mix] = UNCOND - 1 if sooner else 0
                self._unconds[branch.mix] = UncondResidual.of(found, conds[branch.mix])
            else:
                residual = self._unconds[branch.mix].now(conds[branch.mix])
                made[branch] = torch.addcmul(uncond, unit, residual)
        return made


def _anchor(now: StepContext) -> Mix:
    """The mix whose conditional prediction is run at every evaluation, and compared with: the reference's, or that of the only LoRA."""
    participants = now.participants
    alone = len(participants.loras) == 1 and not participants.additions and not now.has_gap
    return participants.loras[0].mix if alone else participants.reference


def _every_nth(now: StepContext) -> int:
    """n: a LoRA that the prompt names runs at every n-th evaluation, if there are no more than `MANY`."""
    if now.total <= SHORT:
        return 1
    every_nth: int = now.knobs["reuse"]
    return min(every_nth, 2) if _is_hurried(now) else every_nth


def _rate(count: int, now: StepContext) -> float:
    """How many of `count` LoRAs that the prompt names are run at an evaluation, on average."""
    if count <= MANY or _is_hurried(now) or _every_nth(now) == 1:
        return count / _every_nth(now)
    growth: float = (count / MANY) ** GROWTH
    return MANY / _every_nth(now) * growth


def _uncond_apart(now: StepContext) -> int:
    """The base's unconditional rows run at every so many evaluations."""
    reuse: int = now.knobs["reuse"]
    return min(reuse, 2 if now.total <= FEW else UNCOND_APART)


def _is_hurried(now: StepContext) -> bool:
    """Whether predictions change fast from one evaluation to the next."""
    return _is_late(now) or now.total <= FEW


def _is_late(now: StepContext) -> bool:
    return now.index >= LATE * now.total


def _is_whole_pool_run(now: StepContext) -> bool:
    return bool(now.index % now.knobs["pool_interval"] == 0)


def _shape(now: StepContext) -> Hashable:
    return (now.rows, now.size)


def _unit(now: StepContext, predictions: Predictions) -> Tensor:
    """The unit of differences from the base in which they last: the root mean square of the base's noise, over √(1 + σ²/TURN²).

    For denoised latents D that root mean square is σ itself: while σ is large, differences of D last.
    """
    noise = predictions.noise(_anchor(now)).to(torch.float32)
    size = noise.square().mean().sqrt().clamp_min(1e-20)
    sigma = predictions.sigma if predictions.latents is None else size
    return size if sigma is None else size / (1 + (sigma / TURN) ** 2) ** 0.5
