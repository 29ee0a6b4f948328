"""One denoising step: which rows to run, through the host's model, composed and handed back.

The engine knows no host. A host calls `Engine.step` with the step and with a function that runs its model on rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..adapters.bank import Bank, with_assembled
from ..compose.candidates import branches_for_reactions, reactions
from ..compose.guidance import rescaled_cond
from ..compose.methods import METHODS, Composition, Method, Predictions, StepContext
from ..compose.methods.merge import NAMED
from ..compose.mixes import NO_WORDS, Branch, Mix, Participants
from ..compose.regions import WHOLE, Box, PlaceMasks
from ..errors import LoratorioError
from ..settings import Settings
from .calls import Row, RowCalls
from .history import WeightHistory
from .place_search import Found, PlaceSearch
from .pool_calls import PoolCalls
from .random_state import RandomState
from .step import Step
from .style_search import StyleSearch

Predict = Callable[[Sequence[Row]], Tensor]
"""Runs the host's model on rows and returns their predictions, (rows, C, H, W) (or (rows, C, T, H, W)), in that order:
denoised latents D or noise e, as the step says. Called with the bank routed (`Bank.routed_part` for some of the rows). May raise torch's
out-of-memory errors: the engine then asks for fewer rows at a time."""


POOL_RESIDENT = 32
"""How many of a pool's LoRAs stay on the device."""


class Engine:
    """Composes the steps of one sampling. Make one per sampling, drop it afterwards.

    Args:
        settings: the knobs.
        bank: the generation's LoRAs, attached to the model by the host for as long as it samples.
        participants: which of them are composed; by default all.
        row_limit: how many rows a model call may have; 0 for no limit. Halved when memory runs out.
        region: which part of the picture is sampled, for the LoRAs' places.
        found: by picture, places that an earlier pass has found (`PlaceSearch.found`).
        styles: numbers of the LoRAs that an earlier pass has found to be styles.

    Attributes:
        calls: runs rows in as few model calls as limits and memory allow.
        words: by mix, what its conditional rows read other than the common prompt; mixes without such words are left out.
        pool: which of a pool's candidates the prompt calls.
        places: finds the places of LoRAs with at=auto. styles: finds the LoRAs that act as with role=style.
    """

    def __init__(
        self,
        settings: Settings,
        bank: Bank,
        participants: Participants | None = None,
        row_limit: int = 0,
        region: Box = WHOLE,
        found: Sequence[Found] | None = None,
        styles: frozenset[int] | None = None,
    ) -> None:
        self.settings = settings
        self.participants = participants or Participants.of(len(bank.adapters))
        check_places(settings, self.participants)
        if not bank.adapters:
            raise LoratorioError("There is no LoRA to compose: add at least one to the prompt.")
        self.words = self.participants.words_by_mix(settings.share)
        self.history = WeightHistory()
        self.pool = PoolCalls(settings.pool_size)
        self.calls = RowCalls(row_limit, scores_pool=self.participants.has_pool)
        self.places = PlaceSearch(self.participants, settings.find_after, region, found)
        self.styles = StyleSearch(self.participants, settings.find_styles, styles)
        self._masks_of_places = PlaceMasks(region)
        # At the present step: with, and without, candidates that were left out.
        self._present = self._acting = self.participants
        self._strengths: tuple[float, ...] = ()
        self._sessions: dict[str, Method] = {}
        self._last: _Evaluated
        self._assembled: frozenset[int] = frozenset()  # the LoRAs that the bank has one LoRA in place of
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
        self._assembled = frozenset()  # it was the former bank's
        # Candidates that are only scored leave the device again with the next ones.
        bank.keep_apart([lora.number for lora in self.participants.loras if lora.pooled], POOL_RESIDENT)

    def step(self, step: Step, predict: Predict) -> Composition:
        """Run the rows this step needs and compose them.

        Returns:
            The composed conditional and unconditional predictions of the same kind as the model's (noise e or denoised D), float32.

        Raises:
            LoratorioError: not even a single row fits into memory.
        """
        self._follow_strengths(step)
        if self.places.settles_at(step.index, step.total):
            self.places.settle()
        self._masks_of_places.found = self._found_by_frame(step)
        active = self.settings.active_at(step.index, step.total) and self._acting.are_composed
        method = METHODS[self.settings.method] if active else NAMED
        # Merging leaves a pool's candidates out by itself, and must know of them.
        participants = self._acting if active else self._present
        now = self._context(method, participants, step)
        session = self._session(method, participants)
        branches = session.branches(now)
        settles = self.pool.settles_at(now)
        if settles:
            branches = list(dict.fromkeys([*branches, *branches_for_reactions(now.participants)]))
        if self.places.is_on:
            branches = list(dict.fromkeys([*branches, *self.places.branches(now)]))
        finds_styles = self.styles.settles_at(now)
        if finds_styles:
            branches = list(dict.fromkeys([*branches, *self.styles.branches(now)]))
        rows = list(step.rows(branches))
        predictions = step.predictions(rows, self._predict(rows, session, now, predict))
        if self.places.is_on:
            self.places.look(now, predictions, step.frames, step.painted)
        if settles and self.pool.settle(reactions(predictions, now.participants)):
            self._use_settled_pool(step)
            now, session = self._context(method, self._acting, step), self._session(method, self._acting)
        if finds_styles:
            self.styles.settle(now, predictions)
        composed = session.compose(now, predictions)
        composition = self._rescaled(composed, predictions, step)
        self._last = _Evaluated(step, session, now, predictions, composed, composition)
        if composition.weights is not None and self._acting.loras:
            weights = self._with_styles(composition.weights, now)
            composition = replace(composition, weights=weights)
            self._remember(weights, step.index)
        return step.unfolded(composition)

    def again(self, predict: Predict, cond: bool, uncond: bool) -> Composition:
        """Compose the last step's rows, run once more: on other latents, or with a layer replaced, as guidance extensions do.

        The weights are that step's, and so is what guidance rescale added: such an extension uses the difference.

        Args:
            cond, uncond: which rows are run; the others count as they were.
        """
        step, session, now, own, composed, rescaled = self._last
        branches = [
            branch
            for branch in own.by_branch
            if (cond if branch.cond else uncond)
            and not any(branch.mix[number] for number in self.pool.left_out)
        ]
        rows = list(step.rows(branches))
        run = step.predictions(rows, self._predict(rows, session, now, predict))
        composition = session.again(now, replace(own.with_branches(run.by_branch), measured=own))
        if rescaled is not composed:
            composition = replace(composition, cond=composition.cond + (rescaled.cond - composed.cond))
        return step.unfolded(composition)

    def without_effect(self, steps: int) -> list[str]:
        """Sentences about settings that had no effect in this sampling of `steps` steps, when it is over."""
        settings = self.settings
        if not any(settings.active_at(index, steps) for index in range(steps)):
            start, end = settings.called("start"), settings.called("end")
            values = f"{start} = {settings.start:g} and {end} = {settings.end:g}"
            return [f"The LoRAs were merged: {values} leave none of the {steps} steps to compose."]
        if settings.weight_maps and not self.participants.loras:
            return ["There are no weight maps: LoRAs with role=always have no weight."]
        if settings.weight_maps and not self.history.weights:
            label = METHODS[settings.method].entry.label
            return [f"There are no weight maps: {label} does not weight LoRAs patch by patch."]
        return []

    def branches_ahead(self, steps: int, has_uncond: bool) -> list[Branch]:
        """The branches that a sampling will ask for, as far as methods can tell before it begins: also those of a style that is found."""
        branches: dict[Branch, None] = {}
        for index in range(steps):
            step = Step(index, steps, torch.zeros(1, 1, 1, 1), int(has_uncond))
            active = self.settings.active_at(index, steps) and self._acting.are_composed
            method = METHODS[self.settings.method] if active else NAMED
            now = self._context(method, self._acting if active else self._present, step)
            branches |= dict.fromkeys(method.branches(now))
            if has_uncond and "reuse" in now.knobs:
                branches[Branch(now.participants.base, False)] = None
            if self.places.is_on:
                branches |= dict.fromkeys(self.places.branches(now))
            if self.styles.settles_at(now):
                branches |= dict.fromkeys(self.styles.branches(now))
                for acting in self.styles.possible(self._acting):
                    branches |= dict.fromkeys(method.branches(self._context(method, acting, step)))
            if self.pool.settles_at(now):
                branches |= dict.fromkeys(branches_for_reactions(now.participants))
        return list(branches)

    def _context(self, method: Method, participants: Participants, step: Step) -> StepContext:
        if "share" in method.knobs:
            participants = participants.with_shared_parts(self.settings.share)
        knobs = {name: getattr(self.settings, name) for name in method.knobs}
        if self.places.is_on and "reuse" in knobs:
            knobs["reuse"] = 1  # what is carried on shows no new place
        return StepContext(
            participants,
            knobs,
            step.index,
            step.total,
            step.uncond_count > 0,
            (len(step.latents), step.uncond_count),
            self._masks_of_places,
            (step.latents.shape[-2], step.latents.shape[-1]),
            step.latents.device,
        )

    def _found_by_frame(self, step: Step) -> tuple[Found, ...]:
        return tuple(each for each in self.places.found or () for _ in range(step.frames))

    def _session(self, method: Method, participants: Participants) -> Method:
        """The method in its own object for this sampling on this model."""
        name = method.entry.name
        if name not in self._sessions:
            weights = _WeightsNow(self.bank, self._mix_now)
            self._sessions[name] = method.begin(participants, weights)
            products = method.assembled(weights, participants.numbers)
            if products:
                self._assembled = frozenset(participants.numbers)
                self.bank.assemble(products, self._mix_now(participants.merged))
        return self._sessions[name]

    def _follow_strengths(self, step: Step) -> None:
        """Compose the LoRAs that act at this step, at their present strengths."""
        self._present = self.participants.without(step.absent)
        acting = self._present.without(self.pool.left_out)
        if self.pool.is_settled:
            acting = acting.settled()
        acting = acting.with_styles(self.styles.numbers)
        if (acting, step.strengths) == (self._acting, self._strengths):
            return
        self._acting, self._strengths = acting, step.strengths
        self.words = acting.words_by_mix(self.settings.share)
        # Nothing that is remembered of a LoRA at another strength holds.
        self._sessions.clear()

    def _use_settled_pool(self, step: Step) -> None:
        self.calls.scores_pool = False
        self._follow_strengths(step)
        self.bank.release(self.pool.left_out)

    def _with_styles(self, weights: Tensor, now: StepContext) -> Tensor:
        """Ω of the step's LoRAs as Ω of all that act: a style without a weight of its own has 1 in all of its place."""
        own = dict(zip(now.participants.numbers, weights, strict=True))
        for lora in self._acting.loras:
            if lora.is_unweighed and "share" in now.knobs:
                everywhere = torch.ones_like(weights[0])
                own[lora.number] = everywhere if lora.place is None else everywhere * now.mask(lora.place)
        return torch.stack([own[number] for number in self._acting.numbers])

    def _remember(self, weights: Tensor, index: int) -> None:
        """Keep Ω of the LoRAs that act; 0 for the others."""
        self.history.count(self._acting.numbers, weights)
        if self.settings.weight_maps:
            own = dict(zip(self._acting.numbers, weights, strict=True))
            none = torch.zeros_like(weights[0])
            self.history.record(index, torch.stack([own.get(i, none) for i in self.participants.numbers]))
            unweighed = {lora.number for lora in self._acting.loras if lora.is_unweighed}
            self.history.styles = frozenset(
                place for place, i in enumerate(self.participants.numbers) if i in unweighed
            )

    def _mix_now(self, mix: Mix) -> Mix:
        """How much of each LoRA's changes acts under `mix` at this step."""
        if not self._strengths:
            return mix
        return tuple(part * strength for part, strength in zip(mix, self._strengths, strict=True))

    def _rescaled(self, composition: Composition, predictions: Predictions, step: Step) -> Composition:
        """Guidance rescale, on what the sampler guides: D where it has D, else e."""
        strength, scale, uncond = self.settings.rescale, step.guidance, composition.uncond
        if not strength or not scale or scale == 1 or uncond is None:
            return composition
        # The sampler adds up the parts of a prompt with AND itself; each is rescaled on its own.
        own_uncond = torch.stack([uncond[owner] for owner in predictions.owners])
        # A clip has one contrast, not one for each frame.
        shape = composition.cond.shape
        clips = (-1, step.frames, *shape[1:])
        cond = rescaled_cond(composition.cond.reshape(clips), own_uncond.reshape(clips), scale, strength)
        return Composition(cond.reshape(shape), uncond, composition.weights)

    def _predict(self, rows: Sequence[Row], session: Method, now: StepContext, predict: Predict) -> Tensor:
        """All rows, each with its own LoRAs, in order."""
        rows = [row._replace(words=self.words.get(row.mix, NO_WORDS)) if row.cond else row for row in rows]
        layers = {name: self._mix_now(mix) for name, mix in session.layer_mixes(now).items()}
        replaced = frozenset() if session is NAMED else self._assembled
        draws = RandomState(now.device)

        def run(part: Sequence[Row]) -> Tensor:
            draws.rewind()
            mixes = [with_assembled(self._mix_now(row.mix), replaced) for row in part]
            with self.bank.routed(mixes, layers):
                return predict(part)

        return self.calls.run(rows, run)


class _Evaluated(NamedTuple):
    """The step that was composed last, as `Engine.again` needs it; `composed` without guidance rescale, `rescaled` with it."""

    step: Step
    session: Method
    now: StepContext
    predictions: Predictions
    composed: Composition
    rescaled: Composition


class _WeightsNow:
    """What the bank's LoRAs do to the weights at the strengths of the present step (see `compose.methods.base.Weights`)."""

    def __init__(self, bank: Bank, mix_now: Callable[[Mix], Mix]) -> None:
        self._bank, self._mix_now = bank, mix_now

    def changes(self) -> Iterator[tuple[str, dict[int, tuple[Tensor, int]]]]:
        factors = self._mix_now((1.0,) * len(self._bank.adapters))
        for name, by_number in self._bank.changes():
            yield name, {i: (weight * factors[i], rank) for i, (weight, rank) in by_number.items()}

    def products(self) -> Iterator[tuple[str, dict[int, tuple[Tensor, Tensor]]]]:
        factors = self._mix_now((1.0,) * len(self._bank.adapters))
        for name, by_number in self._bank.products():
            yield name, {i: (down, up * factors[i]) for i, (down, up) in by_number.items()}


def check_places(settings: Settings, participants: Participants) -> None:
    """Raise LoratorioError if a LoRA has a place or own words that the settings would ignore."""
    if not participants.has_places and not any(lora.words for lora in participants.loras):
        return
    method = METHODS[settings.method]
    if not method.takes_places:
        able = [each.entry.label for each in METHODS.values() if each.takes_places]
        raise LoratorioError(
            f"Places (at=…) and own words (words=…) do not work with {method.entry.label}. Choose {', '.join(able[:-1])} or {able[-1]}, "
            "or remove them from the prompt."
        )
    if settings.start > 0 or settings.end < 1:
        start, end = settings.called("start"), settings.called("end")
        raise LoratorioError(
            f"Places and own words must be composed in every step, but {start} and {end} leave some steps to merging. "
            f"Set {start} to 0 and {end} to 1, or remove at=… and words=… from the prompt."
        )
