"""One denoising step: which rows to run, through the host's model, composed and handed back.

The engine knows no host. A host calls `Engine.step` with the step and with a function that runs its model on rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import NamedTuple

import torch
from torch import Tensor

from .adapters.bank import Bank, Change, Merged, Regrouped
from .compose.candidates import branches_for_reactions, called, reactions
from .compose.guidance import rescaled_cond
from .compose.methods import METHODS, Composition, Method, Predictions, Product, StepContext
from .compose.methods.merge import MergeNamed
from .compose.mixes import Branch, Mix, Participants
from .compose.regions import WHOLE, Box, Canvas
from .errors import LoratorioError
from .random_state import RandomState
from .row_memory import RowMemory
from .settings import Settings


class Row(NamedTuple):
    """One row of a model call.

    Attributes:
        mix: which LoRAs act on it; the host gives it the text conditioning of the same mix.
        cond: whether it is a conditional row.
        slot: its number among the step's conditional rows, or among its unconditional rows.
        words: what its prompt has beside everybody's: the own words of the LoRA that it is of.
    """

    mix: Mix
    cond: bool
    slot: int
    words: str = ""


Predict = Callable[[Sequence[Row]], Tensor]
"""Runs the host's model on rows and returns their predictions, (rows, C, H, W) (or (rows, C, T, H, W)), in that order:
denoised latents D or noise e, as the step says. Called with the bank routed (`Bank.routed_part` for some of the rows). May raise torch's
out-of-memory errors: the engine then asks for fewer rows at a time."""


@dataclass(frozen=True)
class Step:
    """Where a host's sampler stands.

    Attributes:
        index, total: this step, from 0, and how many there are.
        latents: the noisy latent z of every conditional row, (Bc, C, H, W) or (Bc, C, T, H, W).
        uncond_count: number of unconditional rows Bu; 0 where the step has none.
        owners: image of every conditional row; a prompt with AND has several for an image. Empty: row i is image i.
        denoised: predictions are denoised latents D, and e = (z − D)/σ; else they are the noise e itself.
        sigma: where predictions are noise, the σ of z ∝ x₀ + σ·e, a number or a tensor of one; None where the host cannot tell.
        guidance: the CFG scale s that the sampler guides with, for guidance rescale; None where the host cannot tell.
        strengths: what multiplies each of the bank's LoRAs at this step, where that changes while sampling. Empty: 1 for all.
        absent: numbers of the LoRAs that change nothing at this step, not even text.
    """

    index: int
    total: int
    latents: Tensor
    uncond_count: int
    owners: tuple[int, ...] = ()
    denoised: bool = True
    sigma: float | Tensor | None = None
    guidance: float | None = None
    strengths: tuple[float, ...] = ()
    absent: frozenset[int] = frozenset()


@dataclass
class WeightHistory:
    """Ω over the sampling: for the weight maps, and how much of the picture each LoRA had.

    Attributes:
        steps: indices of the recorded steps.
        weights: per recorded step, (N, Bc, H, W) float16; on the model's device until `settle`.
    """

    steps: list[int] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    _sums: dict[tuple[int, ...], tuple[int, Tensor]] = field(default_factory=dict, repr=False)

    def count(self, numbers: tuple[int, ...], weights: Tensor) -> None:
        """Add Ω (N, Bc, H, W) of an evaluation to what the LoRAs with these numbers have had of the picture."""
        evaluations, total = self._sums.get(numbers, (0, None))
        mean = weights.mean(dim=(1, 2, 3))
        self._sums[numbers] = (evaluations + 1, mean if total is None else total + mean)

    @property
    def shares(self) -> dict[int, float]:
        """By LoRA number, how much of the picture it had, from 0 to 1, as a mean over all evaluations; only when sampling is over."""
        every = sum(evaluations for evaluations, _ in self._sums.values())
        shares: dict[int, float] = {}
        for numbers, (_, total) in self._sums.items():
            for number, part in zip(numbers, total.tolist(), strict=True):
                shares[number] = shares.get(number, 0.0) + part / every
        return shares

    def record(self, index: int, weights: Tensor) -> None:
        """Keep Ω of step `index`; of a step that the sampler evaluates twice the last one counts."""
        if self.steps and self.steps[-1] == index:
            self.steps.pop()
            self.weights.pop()
        self.steps.append(index)
        # Left on the device: to copy it would make the sampling wait for the device at every step.
        self.weights.append(weights.to(torch.float16))

    def settle(self) -> None:
        """Bring all weights to the CPU, when the sampling is over."""
        self.weights = [each.cpu() for each in self.weights]


POOL_ROWS = 8
"""How many rows a model call has, unless the host says otherwise, when a pool's candidates are scored."""

POOL_RESIDENT = 32
"""How many of a pool's LoRAs stay on the device."""


class Engine:
    """Composes the steps of one sampling. Make one per sampling, drop it afterwards.

    Args:
        settings: the knobs.
        bank: the generation's LoRAs, attached to the model by the host for as long as it samples.
        participants: which of them are composed; by default all.
        row_limit: how many rows a model call may have; 0 for no limit. Halved when memory runs out. With a pool, whose
            scoring runs many LoRAs, 0 means `POOL_ROWS` until it is settled.
        region: which part of the picture is sampled, for the LoRAs' places.

    Attributes:
        memory: says how many rows fit into a call; None where that shows only when memory runs out.
        one_mix_per_call: whether a call has rows of one mix only, and of all pictures. Then others may repeat, regroup, add or join rows
            within it. Set by the host, or where a layer is seen to get other entries than the call's rows.
        words: by mix, the own words that its conditional rows have; mixes without any are left out.
        reactions: by number of a pool's candidates, how much the prompt moves each (`compose.candidates.reactions`); None where that
            was not looked at. left_out: those that it does not call, where it calls others.
    """

    def __init__(
        self,
        settings: Settings,
        bank: Bank,
        participants: Participants | None = None,
        row_limit: int = 0,
        region: Box = WHOLE,
    ) -> None:
        self.settings = settings
        self.participants = participants or Participants.of(len(bank.adapters))
        check_places(settings, self.participants)
        self._canvas = Canvas(region)
        self.words = self.participants.words_by_mix(settings.share)
        self._acting = self.participants  # those of them that act at the present step
        self._present = self.participants  # the same, and a pool's candidates that were left out
        self._strengths: tuple[float, ...] = ()
        self.reactions: dict[int, float] | None = None
        self.left_out: frozenset[int] = frozenset()
        self._settled = False
        if not bank.adapters:
            raise LoratorioError("There is no LoRA to compose: put at least one into the prompt.")
        self.history = WeightHistory()
        self.memory: RowMemory | None = None
        self.one_mix_per_call = False
        self._row_limit = row_limit or (POOL_ROWS if any(self.participants.pooled) else 0)
        self._settled_limit = row_limit
        self._sessions: dict[str, Method] = {}
        self._merged: Merged | None = None  # what the method made of the LoRAs that act
        self.bank = bank
        self.rebind(bank)

    def rebind(self, bank: Bank) -> None:
        """Go on with the same LoRAs on another model, as when a refiner comes in.

        Limits stay. Methods begin anew: nothing that they remember of one model's predictions or weights holds for another.
        """
        if len(bank.adapters) != len(self.bank.adapters):
            raise ValueError(f"the bank must have {len(self.bank.adapters)} LoRAs, not {len(bank.adapters)}")
        self.bank = bank
        self._sessions.clear()
        pooled = [
            n
            for n, is_candidate in zip(self.participants.numbers, self.participants.pooled, strict=False)
            if is_candidate
        ]
        # Candidates that are only scored leave the device again with the next ones.
        bank.keep_apart(pooled, POOL_RESIDENT)

    @property
    def row_limit(self) -> int:
        """How many rows a model call may have; 0: all of a step's."""
        return self._row_limit

    def branches(self, index: int, total: int, has_uncond: bool) -> list[Branch]:
        """The branches that a step will run, e.g. for a host that prepares text conditioning or counts its memory."""
        method = self._method_at(index, total)
        return self._branches(method, self._context(method, index, total, has_uncond))

    def step(self, step: Step, predict: Predict) -> Composition:
        """Run the rows this step needs and compose them.

        Returns:
            The composed conditional and unconditional predictions of the same kind as the model's (noise e or denoised D), float32.

        Raises:
            LoratorioError: not even a single row fits into memory.
        """
        self._follow_strengths(step)
        method = self._method_at(step.index, step.total)
        height, width = step.latents.shape[-2:]
        counts = (len(step.latents), step.uncond_count)
        now = self._context(method, step.index, step.total, step.uncond_count > 0, (height, width), counts)
        session = self._session(method)
        by_layer = self._by_layer(session, now)
        predictions = self._predictions(step, self._branches(method, now), by_layer, predict)
        if self._looks_at_reactions(method, now):
            self._settle_pool(step, reactions(predictions, _shared(now)))
            now, session = replace(now, participants=self._acting), self._session(method)
        composition = self._rescaled(session.compose(now, predictions), predictions, step)
        # Where LoRAs are only added in their places, the weights are those of the reference, which is no LoRA's.
        if composition.weights is not None and self._acting.numbers:
            self.history.count(self._acting.numbers, composition.weights)
            if self.settings.weight_maps:
                self.history.record(step.index, self._of_all(composition.weights))
        return _unfolded(composition, step)

    def _by_layer(self, session: Method, now: StepContext) -> _ByLayer:
        """What acts in single layers in the place of the rows' mixes."""
        products = session.layer_products(now)
        if not products:
            return _ByLayer(session.layer_mixes(now))
        if self._merged is None or self._merged.products is not products:
            self._merged = Merged(frozenset(now.participants.numbers), products)
        return _ByLayer({}, self._merged)

    def _branches(self, method: Method, now: StepContext) -> list[Branch]:
        """What the method asks for, and what it takes to settle a pool."""
        asked = self._session(method).branches(now)
        if self._looks_at_reactions(method, now):
            asked = list(dict.fromkeys([*asked, *branches_for_reactions(_shared(now))]))
        return asked

    def _looks_at_reactions(self, method: Method, now: StepContext) -> bool:
        """Whether this is the step at which a pool is settled: the first that has what that takes."""
        may = "pool_size" in method.knobs and now.has_uncond and any(now.participants.pooled)
        return may and self.reactions is None

    def _settle_pool(self, step: Step, found: Mapping[int, Tensor]) -> None:
        """Leave out the candidates that the prompt does not call, where it calls others. `found`: their reactions."""
        # With what a pool's plan reads off the device, the only number that a step waits for.
        scores = torch.stack([*found.values()]).tolist()
        self.reactions = dict(zip(found, scores, strict=True))
        chosen = {list(found)[place] for place in called(scores, self.settings.pool_size)}
        if not chosen:
            return
        self._settled, self.left_out = True, frozenset(found.keys() - chosen)
        if self._row_limit == POOL_ROWS:  # else memory has set another
            self._row_limit = self._settled_limit
        self._follow_strengths(step)
        self.bank.let_go(self.left_out)

    def _follow_strengths(self, step: Step) -> None:
        """Compose those LoRAs that act at this step, as strongly as they do."""
        self._present = self.participants.without(step.absent)
        acting = self._present.without(self.left_out)
        if self._settled:
            acting = replace(acting, settled=True)
        if (acting, step.strengths) == (self._acting, self._strengths):
            return
        self._acting, self._strengths = acting, step.strengths
        self.words.update(acting.words_by_mix(self.settings.share))
        # Nothing that is remembered of a LoRA at another strength holds.
        self._sessions.clear()

    def _of_all(self, weights: Tensor) -> Tensor:
        """Ω of the LoRAs that act as Ω of all participants, (N, Bc, H, W): 0 for those that do not act."""
        if self._acting is self.participants:
            return weights
        place = {number: i for i, number in enumerate(self._acting.numbers)}
        none = torch.zeros_like(weights[:1])
        own = [weights[place[n] : place[n] + 1] if n in place else none for n in self.participants.numbers]
        return torch.cat(own)

    def _mix_now(self, mix: Mix) -> Mix:
        """How much of each LoRA's changes acts under `mix` at this step."""
        if not self._strengths:
            return mix
        return tuple(part * strength for part, strength in zip(mix, self._strengths, strict=True))

    def _method_at(self, index: int, total: int) -> Method:
        """The method of this step."""
        composed = self.settings.active_at(index, total) and self._acting.are_composed
        return METHODS[self.settings.method] if composed else _NOT_COMPOSED

    def _session(self, method: Method) -> Method:
        """The method in its own object for this sampling on this model."""
        name = method.entry.name
        if name not in self._sessions:
            acting = self._taking_part(method)
            self._sessions[name] = method.begin(acting, _ChangesNow(self.bank, self._mix_now))
        return self._sessions[name]

    def _taking_part(self, method: Method) -> Participants:
        """The participants as the method sees them. Merging leaves a pool's candidates out by itself, and must know of them."""
        return self._present if method is _NOT_COMPOSED else self._acting

    def _context(
        self,
        method: Method,
        index: int,
        total: int,
        has_uncond: bool,
        size: tuple[int, int] | None = None,
        rows: tuple[int, int] | None = None,
    ) -> StepContext:
        knobs = {name: getattr(self.settings, name) for name in method.knobs}
        return StepContext(
            self._taking_part(method), knobs, index, total, has_uncond, self._canvas, size, rows
        )

    def _predictions(
        self, step: Step, branches: Sequence[Branch], by_layer: _ByLayer, predict: Predict
    ) -> Predictions:
        rows = [
            row._replace(words=self.words.get(row.mix, "")) if row.cond else row
            for row in _rows(branches, len(step.latents), step.uncond_count)
        ]
        draws = RandomState(step.latents.device)
        return _predictions(step, branches, self._predict(rows, by_layer, predict, draws))

    def _rescaled(self, composition: Composition, predictions: Predictions, step: Step) -> Composition:
        """Guidance rescale, on what the sampler guides: D where it has D, else e."""
        strength, scale, uncond = self.settings.rescale, step.guidance, composition.uncond
        if not strength or not scale or scale == 1 or uncond is None:
            return composition
        # The sampler adds up the parts of a prompt with AND itself; each is rescaled on its own.
        own_uncond = torch.stack([uncond[owner] for owner in predictions.owners])
        # A clip has one contrast, not one for each frame.
        shape = composition.cond.shape
        clips = (-1, _frames(step.latents), *shape[1:])
        cond = rescaled_cond(composition.cond.reshape(clips), own_uncond.reshape(clips), scale, strength)
        return Composition(cond.reshape(shape), uncond, composition.weights)

    def _predict(
        self, rows: Sequence[Row], by_layer: _ByLayer, predict: Predict, draws: RandomState
    ) -> Tensor:
        """All rows in as few calls as the limit and the memory allow, in order."""
        done: list[Tensor] = []
        start = 0
        while start < len(rows):
            draws.rewind()
            left = self._own_call(rows[start:])
            part = left[: self._most(left)]
            try:
                predicted = self._predicted(part, by_layer, predict)
            except Regrouped:
                self.one_mix_per_call = True
                continue
            if predicted is None:
                # Only here, where nothing holds the failed call's tensors any more, can their memory be given back.
                _empty_cache()
                self._row_limit = len(part) // 2
                continue
            if len(predicted) != len(part):
                raise ValueError(f"the host predicted {len(predicted)} rows where {len(part)} were asked for")
            done.append(predicted)
            start += len(part)
        return done[0] if len(done) == 1 else torch.cat(done)

    def _own_call(self, rows: Sequence[Row]) -> Sequence[Row]:
        """As many of the first rows as may share a call."""
        if not self.one_mix_per_call:
            return rows
        return [*takewhile(lambda row: row.mix == rows[0].mix, rows)]

    def _most(self, rows: Sequence[Row]) -> int:
        """How many of these rows the next call has."""
        wanted = len(rows)
        most = min(wanted, self._row_limit or wanted)
        most = most if self.memory is None else max(1, min(most, self.memory.fitting(most)))
        if self.one_mix_per_call and most < wanted:
            return _first_block(rows)
        return most

    def _predicted(self, rows: Sequence[Row], by_layer: _ByLayer, predict: Predict) -> Tensor | None:
        """These rows in one call; None if there was not enough memory, and there are fewer rows to try."""
        try:
            observed = nullcontext() if self.memory is None else self.memory.observed(len(rows))
            mixes = [self._mix_now(row.mix) for row in rows]
            layers = {name: self._mix_now(mix) for name, mix in by_layer.mixes.items()}
            with self.bank.routed(mixes, layers, by_layer.merged), observed:
                return predict(rows)
        except (RuntimeError, MemoryError) as problem:
            if not is_out_of_memory(problem):
                raise
            if len(rows) == 1 or (self.one_mix_per_call and len(rows) == _first_block(rows)):
                raise LoratorioError(
                    "Out of memory even with as few rows at a time as possible. Make the picture or the batch smaller, or close what "
                    "else uses the GPU."
                ) from problem
            return None


class _ByLayer(NamedTuple):
    """What acts in single layers: a mix in the place of every row's, or a LoRA that was made of the others."""

    mixes: Mapping[str, Mix]
    merged: Merged | None = None


class _ChangesNow:
    """What the bank's LoRAs do to the weights at the strengths of the present step (see `compose.methods.base.Changes`)."""

    def __init__(self, bank: Bank, mix_now: Callable[[Mix], Mix]) -> None:
        self._bank, self._mix_now = bank, mix_now

    def changes(self) -> Iterator[tuple[str, dict[int, Change]]]:
        factors = self._mix_now((1.0,) * len(self._bank.adapters))
        for name, by_number in self._bank.changes():
            yield (
                name,
                {
                    number: Change(weight * factors[number], rank)
                    for number, (weight, rank) in by_number.items()
                },
            )

    def products(self) -> Iterator[tuple[str, dict[int, Product]]]:
        factors = self._mix_now((1.0,) * len(self._bank.adapters))
        for name, by_number in self._bank.products():
            yield (
                name,
                {number: Product(down, up * factors[number]) for number, (down, up) in by_number.items()},
            )


_NOT_COMPOSED = MergeNamed()


def _shared(now: StepContext) -> Participants:
    """The participants as the method's rows have them."""
    return now.with_shared_parts().participants if "share" in now.knobs else now.participants


def check_places(settings: Settings, participants: Participants) -> None:
    """Raise LoratorioError where a LoRA has a place, or words of its own, that would not be kept."""
    if not participants.has_places and not any(participants.words):
        return
    method = METHODS[settings.method]
    if not method.takes_places:
        able = [each.entry.label for each in METHODS.values() if each.takes_places]
        raise LoratorioError(
            f"A place (at=…) or words of a LoRA's own (words=…) need a method with rows of its own for each LoRA: "
            f"{', '.join(able[:-1])} or {able[-1]}, not {method.entry.label}. Choose one of those, or take them out of the prompt."
        )
    if settings.start > 0 or settings.end < 1:
        raise LoratorioError(
            "Places and own words hold in every step, but start and end leave some to merging, which knows none. "
            "Set start to 0 and end to 1, or take at=… and words=… out of the prompt."
        )


_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "could not allocate", "alloc_failed")


def is_out_of_memory(problem: BaseException) -> bool:
    """Whether this is the device's, or the CPU allocator's, way to say that memory ran out."""
    if isinstance(problem, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    # Allocators other than CUDA's, and CUDA's libraries, raise plain RuntimeErrors.
    text = str(problem).lower()
    return isinstance(problem, RuntimeError) and any(words in text for words in _OUT_OF_MEMORY)


def _empty_cache() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


def _rows(branches: Sequence[Branch], cond_count: int, uncond_count: int) -> Iterator[Row]:
    """Every row of every branch, rows of one mix standing together so that the bank can batch them."""
    mixes = dict.fromkeys(branch.mix for branch in branches)
    for mix in mixes:
        for cond, count in ((True, cond_count), (False, uncond_count)):
            if Branch(mix, cond) in branches:
                yield from (Row(mix, cond, slot) for slot in range(count))


def _first_block(rows: Sequence[Row]) -> int:
    """How many rows all of the step's pictures have of the first row's branch, of rows under one mix."""
    return sum(row.cond == rows[0].cond for row in rows)


def _predictions(step: Step, branches: Sequence[Branch], predicted: Tensor) -> Predictions:
    """Sort the rows' predictions by branch, with frames folded into the batch: (B·T, C, H, W)."""
    cond_count, frames = len(step.latents), _frames(step.latents)
    order = list(_rows(branches, cond_count, step.uncond_count))
    by_branch: dict[Branch, Tensor] = {}
    start = 0
    for branch in dict.fromkeys(Branch(row.mix, row.cond) for row in order):
        stop = start + (cond_count if branch.cond else step.uncond_count)
        by_branch[branch] = _folded(predicted[start:stop])
        start = stop
    owners = step.owners or range(cond_count)
    return Predictions(
        by_branch,
        tuple(owner * frames + frame for owner in owners for frame in range(frames)),
        # Only direction matters for the similarity: z − D stands for (z − D)/σ.
        _folded(step.latents) if step.denoised else None,
        None if step.denoised else step.sigma,
    )


def _frames(latents: Tensor) -> int:
    return latents.shape[2] if latents.ndim == 5 else 1


def _folded(latents: Tensor) -> Tensor:
    """(B, C, T, H, W) to (B·T, C, H, W); four dimensions stay."""
    return latents.movedim(2, 1).flatten(0, 1) if latents.ndim == 5 else latents


def _unfolded(composition: Composition, step: Step) -> Composition:
    if step.latents.ndim != 5:
        return composition
    frames = _frames(step.latents)

    def unfold(prediction: Tensor) -> Tensor:
        return prediction.reshape(-1, frames, *prediction.shape[1:]).movedim(1, 2)

    uncond = None if composition.uncond is None else unfold(composition.uncond)
    return Composition(unfold(composition.cond), uncond, composition.weights)
