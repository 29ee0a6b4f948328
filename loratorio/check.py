"""The self-check: do LoRAtorio's pictures agree with the host's own, with your checkpoint and LoRAs?

It is independent of the host. A host makes the requested pictures (`Asked`), and `check` compares them and fills the table.
It compares latents, before the VAE, so that rounding to 8 bits cannot hide a wrong row.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from .compose.lazy_torch import torch
from .errors import LoratorioError
from .settings import PRESETS, Settings

if TYPE_CHECKING:
    from torch import Tensor, nn

STEPS = 4
"""Steps per picture, except for those of a single step."""

MOST = 4
"""The most LoRAs of a prompt that are checked."""

EXACT = Settings(enabled=True, method="loratorio", top_k=0, recentre=0.0, share=0.0, reuse=1, own_words=False)
"""Settings with which a LoRA that is alone in a place gives the same result there as merging it."""

MERGED = Settings(enabled=True, method="merge")
PAPER = Settings(enabled=True).with_values(PRESETS["paper"].values)

PASS, FAIL, NOT_CHECKED, MEASURED = "pass", "FAIL", "not checked", "measured"

LIMITS = {"float32": 60.0, "float16": 35.0, "bfloat16": 30.0}
LIMIT_QUANTISED = 25.0
"""In dB, how close two results must be if they may differ only by rounding. A host that merges into weights of 8 bits or fewer
rounds the result to them; LoRAtorio does not."""

STOPPED = "The check was stopped."

CLEARLY = 10.0
"""Two results must be closer to each other than to the picture without the LoRA by this many dB, or the comparison proves nothing."""

ABOUT_DB = (
    "dB measure how close two results are: higher is closer. The latents are compared, before the VAE. "
    "Above 35 dB no difference is visible."
)


class Stopped(Exception):
    """The user has stopped the check."""


@dataclass(frozen=True)
class Asked:
    """A picture that the host must make. Text, seed and size are always the same.

    Attributes:
        loras: numbers of the LoRAs in the prompt.
        settings: LoRAtorio's; None: unticked, so that the host merges the LoRAs.
        places: each LoRA's place, as in a tag. Empty: no places.
    """

    loras: tuple[int, ...] = ()
    settings: Settings | None = None
    steps: int = STEPS
    places: tuple[str, ...] = ()


@dataclass
class Calls:
    """What the model's calls of one sampling looked like; filled while `watched`.

    Attributes:
        rows: of each call. times: when each call began and ended, in seconds.
        computed, stored: the dtype of the model's answers, and the one that most of its numbers are stored in.
        finite: whether all answers were finite numbers.
        memory: the most that was in use on the device, in bytes; None where that is not known.
    """

    rows: list[int] = field(default_factory=list)
    times: list[tuple[float, float]] = field(default_factory=list)
    computed: str = ""
    stored: str = ""
    device: str = ""
    finite: bool = True
    memory: int | None = None

    @contextmanager
    def watched(self, model: nn.Module) -> Iterator[None]:
        """While this lasts, note the calls of `model`; they are not changed."""
        began: list[float] = []

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rows: Tensor = args[0] if args else next(iter(kwargs.values()))
            self.rows.append(len(rows))
            self.device = str(rows.device)
            began.append(_now(rows.device))

        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            answer: Tensor = output if isinstance(output, torch.Tensor) else output[0]
            self.times.append((began.pop(), _now(answer.device)))
            self.computed = _name(answer.dtype)
            self.finite = self.finite and bool(torch.isfinite(answer).all())

        sizes: Counter[str] = Counter()
        for parameter in model.parameters():
            sizes[_name(parameter.dtype)] += parameter.numel()
        self.stored = sizes.most_common(1)[0][0] if sizes else ""
        hooks = [
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after),
        ]
        on_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call, unused-ignore]
        if on_cuda:
            torch.cuda.reset_peak_memory_stats()
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            if on_cuda and self.device.startswith("cuda"):
                self.memory = torch.cuda.max_memory_allocated()

    def seconds(self, steps: int) -> float:
        """Seconds per step, without the first step, in which hosts merge LoRAs."""
        per_step, rest = divmod(len(self.times), steps)
        if rest or steps < 2:
            return (self.times[-1][1] - self.times[0][0]) / steps
        return (self.times[-1][1] - self.times[per_step - 1][1]) / (steps - 1)

    @property
    def limit(self) -> float:
        """In dB, how close results of this precision must be."""
        limit = min(LIMITS.get(each, LIMIT_QUANTISED) for each in (self.computed, self.stored))
        return limit if self.device == "cpu" else min(limit, LIMITS["float16"])  # TF32, which is as coarse


@dataclass(frozen=True)
class Made:
    """A picture as the host made it.

    Attributes:
        latents: when the sampling ended, (1, C, H, W) or (1, C, T, H, W), float32 on the CPU.
        picture: the pixels' bytes.
        composed: how many LoRAs LoRAtorio composed; 0 where it left the picture to the host.
        notes: what it said of the picture.
    """

    latents: Tensor
    picture: bytes
    calls: Calls
    composed: int = 0
    notes: Sequence[str] = ()


Make = Callable[[Asked], Made]
"""Makes a picture. Raises Stopped where the user has stopped it, and whatever a host raises."""


@dataclass(frozen=True)
class Finding:
    """A row of the table: what was checked; PASS, FAIL, NOT_CHECKED or MEASURED; and the result."""

    what: str
    verdict: str
    found: str


@dataclass(frozen=True)
class Report:
    """The table, and what the reader of a report asks for first: versions, device, checkpoint."""

    findings: tuple[Finding, ...]
    facts: Mapping[str, str]

    @property
    def summary(self) -> str:
        failed = sum(finding.verdict == FAIL for finding in self.findings)
        passed = sum(finding.verdict == PASS for finding in self.findings)
        if failed:
            return f"{failed} of {failed + passed} checks failed. Please copy this table into a bug report."
        if not passed:
            return "Nothing was checked: see the table for the reasons."
        skipped = any(finding.verdict == NOT_CHECKED for finding in self.findings)
        return f"All {passed} checks passed.{' Some were skipped: see the table for the reasons.' if skipped else ''}"

    @property
    def text(self) -> str:
        """All of it, as Markdown."""
        rows = [("check", "result", "found"), ("---",) * 3]
        rows += [(each.what, each.verdict, each.found) for each in self.findings]
        table = [f"| {' | '.join(_cell(part) for part in row)} |" for row in rows]
        facts = [f"- {name}: {_cell(value)}" for name, value in self.facts.items()]
        return "\n".join((f"LoRAtorio self-check: {self.summary}", "", *table, "", ABOUT_DB, "", *facts))


def check(names: Sequence[str], host: str, make: Make, facts: Callable[[], Mapping[str, str]]) -> Report:
    """Check LoRAtorio with these LoRAs (no more than `MOST` of them).

    Args:
        host: how the table calls what the pictures are compared with, as in "the WebUI's own merging".
        facts: what to say below the table, asked for when all pictures are made.
    """
    run = _Check(names[:MOST], host, make)
    findings = tuple(run.findings())
    about = {
        "LoRAs": names[:MOST],
        "LoRAs without effect": run.idle,
        f"LoRAs beyond the first {MOST}, not checked": names[MOST:],
    }
    return Report(findings, {**facts(), **{what: ", ".join(those) for what, those in about.items() if those}})


class _NotChecked(Exception):
    """Something cannot be checked, with the reason."""


class _Check:
    """One run of the check.

    Attributes:
        idle: the LoRAs that change nothing.
        _first, _before: two pictures without LoRAtorio, before it has run.
        _active: numbers of the other LoRAs.
    """

    def __init__(self, names: Sequence[str], host: str, make: Make) -> None:
        self.idle: list[str] = []
        self._names, self._host, self._make = names, host, make
        self._made: dict[Asked, Made] = {}
        self._every: list[Calls] = []
        self._plain = Asked(tuple(range(len(names))))
        self._first: Made
        self._before: Made
        self._active: tuple[int, ...]

    def findings(self) -> Iterator[Finding]:
        """The table's rows, as they are found."""
        begun = _outcome(self._begin)
        if begun is not None and begun[0] == FAIL:  # before LoRAtorio has done anything
            begun = NOT_CHECKED, f"No picture without LoRAtorio could be made. {begun[1]}"
        for what, run in (
            (f"One LoRA gives the same picture as {self._host}", self._single),
            (f"All LoRAs merged by LoRAtorio give the same picture as {self._host}", self._merged),
            ("Each LoRA acts on its own rows only (first step)", self._rows),
            ("The model gives finite numbers", self._numbers),
            ("Model rows per step", self._counted),
            ("Seconds per step", self._seconds),
            ("Memory", self._memory),
            ("Pictures without LoRAtorio are the same before and after", self._after),
        ):
            outcome = _outcome(run) if begun is None else begun
            assert outcome is not None
            verdict, found = outcome
            if found == STOPPED:
                begun = outcome
            yield Finding(what, verdict, found)

    def _begin(self) -> None:
        """What all of the rows need."""
        if not self._names:
            raise _NotChecked("There is no LoRA in the prompt.")
        # Hosts do not always make the same picture first after another job: warm up, and see whether the host repeats itself.
        self._first = self._new(self._plain)
        self._before = self._new(self._plain)
        base = self._single_step(()).latents
        alone = {number: self._single_step((number,)).latents for number in self._plain.loras}
        self._active = tuple(number for number, latents in alone.items() if not torch.equal(latents, base))
        self.idle = [name for number, name in enumerate(self._names) if number not in self._active]
        if not self._active:
            raise _NotChecked(
                "No LoRA of the prompt changes the picture. Check the files, the strengths and the checkpoint."
            )

    # -- the comparisons ----------------------------------------------------------------------------------------------

    def _single(self) -> tuple[str, str]:
        first = self._active[:1]
        ours = self._composed(Asked(first, EXACT))
        host, without = self._picture(Asked(first)), self._picture(Asked())
        return _compared(self._names[first[0]], ours.latents, host.latents, without.latents, host.calls.limit)

    def _merged(self) -> tuple[str, str]:
        if len(self._active) < 2:
            raise _NotChecked("This needs two LoRAs in the prompt that change the picture.")
        ours = self._composed(Asked(self._active, MERGED))
        host, without = self._picture(Asked(self._active)), self._picture(Asked())
        return _compared("All LoRAs", ours.latents, host.latents, without.latents, host.calls.limit)

    def _rows(self) -> tuple[str, str]:
        """One step with each LoRA alone in a strip of the picture, and none in the last. Every strip must equal the host's result with
        that LoRA alone, so a row with a wrong LoRA or a wrong text shows in its strip."""
        hosts = [self._single_step((number,)) for number in self._active] + [self._single_step(())]
        width = hosts[0].latents.shape[-1]
        edges = [width * place // len(hosts) for place in range(len(hosts) + 1)]
        if width < len(hosts):
            raise _NotChecked("The picture is too small.")
        strips = list(pairwise(edges))
        places = tuple(f"{x0 / width},0,{x1 / width},1~0" for x0, x1 in strips[:-1])
        ours = self._composed(Asked(self._active, EXACT, 1, places)).latents
        names = [self._names[number] for number in self._active] + ["no LoRA"]
        found = []
        for name, own, (x0, x1) in zip(names, hosts, strips, strict=True):
            others = (each.latents[..., x0:x1] for each in hosts if each is not own)
            here = own.latents[..., x0:x1]
            nearest = max(others, key=lambda other, here=here: _db(other, here))  # type: ignore[misc]
            found.append(_compared(name, ours[..., x0:x1], here, nearest, own.calls.limit))
        verdict = min((each for each, _ in found), key=_ORDER.index)
        return verdict, " ".join(sentence for each, sentence in found if each == verdict)

    # -- what the model's calls showed --------------------------------------------------------------------------------

    def _numbers(self) -> tuple[str, str]:
        seen = dict.fromkeys(
            f"computed in {calls.computed}, stored in {calls.stored}" for calls in self._every
        )
        bad = sum(not calls.finite for calls in self._every)
        if bad:
            return (
                FAIL,
                f"The model gave NaN or infinite numbers in {bad} of {len(self._every)} pictures ({'; '.join(seen)}).",
            )
        return PASS, f"The model: {'; '.join(seen)}."

    def _counted(self) -> tuple[str, str]:
        plain, ours = self._plain_and_paper
        return (
            MEASURED,
            f"{_rows_in_words(ours)} with the preset Paper; {_rows_in_words(plain)} without LoRAtorio.",
        )

    def _seconds(self) -> tuple[str, str]:
        plain, ours = (calls.seconds(STEPS) for calls in self._plain_and_paper)
        return (
            MEASURED,
            f"{ours:.3g} with the preset Paper; {plain:.3g} without LoRAtorio: {ours / plain:.1f} times as long.",
        )

    def _memory(self) -> tuple[str, str]:
        plain, ours = (calls.memory for calls in self._plain_and_paper)
        if plain is None or ours is None:
            return MEASURED, "Measured on CUDA only."
        return (
            MEASURED,
            f"at most {ours / 2**20:.0f} MiB with the preset Paper; {plain / 2**20:.0f} MiB without LoRAtorio.",
        )

    @property
    def _plain_and_paper(self) -> tuple[Calls, Calls]:
        ours = self._composed(Asked(self._active, PAPER)).calls
        return self._picture(Asked()).calls, ours

    # -- before and after ---------------------------------------------------------------------------------------------

    def _after(self) -> tuple[str, str]:
        first, before, after = self._first, self._before, self._new(self._plain)
        if torch.equal(before.latents, after.latents) and before.picture == after.picture:
            return PASS, "Equal bit for bit."
        near = _db(after.latents, before.latents)
        if torch.equal(first.latents, before.latents):
            return FAIL, f"They differ: {_in_words(near)}."
        # If a host's own pictures differ each time, bits cannot be compared.
        own = min(_db(first.latents, before.latents), before.calls.limit)
        found = (
            f"{_in_words(near)}. Two pictures from before LoRAtorio ran differ as well ({_in_words(own)})."
        )
        return (PASS if near >= own else FAIL), found

    # -- pictures -----------------------------------------------------------------------------------------------------

    def _single_step(self, loras: tuple[int, ...]) -> Made:
        return self._picture(Asked(loras, steps=1))

    def _composed(self, asked: Asked) -> Made:
        """A picture that LoRAtorio composed, and all of the LoRAs in it."""
        made = self._picture(asked)
        if made.composed != len(asked.loras):
            said = " ".join(made.notes) or "LoRAtorio gave no reason."
            raise _NotChecked(f"{made.composed} of {len(asked.loras)} LoRAs were composed. {said}")
        return made

    def _picture(self, asked: Asked) -> Made:
        if asked not in self._made:
            self._made[asked] = self._new(asked)
        return self._made[asked]

    def _new(self, asked: Asked) -> Made:
        made = self._make(asked)
        if not made.calls.rows:
            raise _NotChecked(
                "The model could not be observed: something else, such as a compiled engine, replaces it."
            )
        self._every.append(made.calls)
        return made


def _outcome(run: Callable[[], tuple[str, str] | None]) -> tuple[str, str] | None:
    """What `run` gives, or the verdict and the sentence for what it raises."""
    try:
        return run()
    except Stopped:
        return NOT_CHECKED, STOPPED
    except _NotChecked as why:
        return NOT_CHECKED, str(why)
    except LoratorioError as problem:
        return FAIL, f"LoRAtorio refused: {problem}"
    except Exception as problem:  # whatever a host raises belongs into the table
        return FAIL, f"The picture failed with an error: {type(problem).__name__}: {problem}"


def _compared(name: str, ours: Tensor, host: Tensor, other: Tensor, limit: float) -> tuple[str, str]:
    """Verdict and sentence for our result against the host's. other: the closest result that it must not be."""
    near, far = _db(ours, host), _db(other, host)
    found = f"{name}: {_in_words(near)} (pass: {limit:g} dB or more; with another LoRA or none: {_in_words(far)})."
    if near < limit or math.isnan(near):
        return FAIL, found
    if far == math.inf or near < far + CLEARLY:
        return NOT_CHECKED, f"{found} The LoRA changes the picture too little for this check."
    return PASS, found


_ORDER = (FAIL, NOT_CHECKED, PASS)


def _db(ours: Tensor, other: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, of the other's whole range; infinite for equal ones."""
    error = float((ours.double() - other.double()).pow(2).mean())
    if error == 0:
        return math.inf
    spread = float(other.max() - other.min())
    return 10 * math.log10(spread**2 / error) if spread and math.isfinite(error) else math.nan


def _in_words(db: float) -> str:
    return "no difference at all" if db == math.inf else "no number" if math.isnan(db) else f"{db:.1f} dB"


def _rows_in_words(calls: Calls) -> str:
    return f"{sum(calls.rows) / STEPS:g}, at most {max(calls.rows)} per call,"


def _cell(text: str) -> str:
    """Text that cannot leave its cell of a table."""
    return " ".join(text.replace("|", "\\|").split())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _now(device: torch.device) -> float:
    """The time after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()
