"""The knobs in a picture's infotext, one readable field each, and back from there into the panel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import LoratorioError
from ..pictures.infotext import VERSION_KEY, LoraUse, params
from ..settings import KNOB_BY_NAME, KNOBS, Knob, Settings

if TYPE_CHECKING:
    from ..job import Job

NOTE_KEY = "LoRAtorio note"

Params = Mapping[str, Any]
"""An infotext as the WebUI parsed it: field names and values, all text."""


def write(fields: dict[str, Any], settings: Settings, job: Job | None) -> None:
    """Bring the WebUI's `p.extra_generation_params` up to date: the knobs, and what is true of the batch that is being made.

    The knobs are written as the job begins, because the WebUI writes the file that its paste button reads before the first picture
    is sampled; LoRAs and notes after each pass, because a picture may be saved between two of them. What was there is taken out: the
    pictures of an X/Y/Z plot, and the batches of a job, share one mapping.
    """
    for key in [key for key in fields if key.split(" ")[0] == "LoRAtorio"]:
        del fields[key]
    if job is None:
        fields.update(params(settings, ()))
        return
    uses: dict[bool, Sequence[LoraUse]] = {False: (), True: ()}
    for each in job.passes:
        if each.batch == job.batch:
            uses[each.hires] = each.uses
    fields.update(params(settings, uses[False], uses[True] if uses[True] != uses[False] else ()))
    notes = job.notes_of(job.batch)
    if notes:
        fields[NOTE_KEY] = " ".join(notes)


class Comments:
    """The job's notes below the pictures in the page, each with the batches that it is true of."""

    def __init__(self, comments: dict[str, Any]) -> None:
        self._comments = comments  # the WebUI's, which jobs of one script share
        self._own: list[str] = []

    def update(self, job: Job) -> None:
        """To be called after each batch."""
        for line in self._own:
            self._comments.pop(line, None)
        batches = range(job.batch + 1)
        of_batches = {batch: job.notes_of(batch) for batch in batches}
        self._own = []
        for sentence in dict.fromkeys(each for notes in of_batches.values() for each in notes):
            numbers = [batch + 1 for batch in batches if sentence in of_batches[batch]]
            some = f"Batch {', '.join(map(str, numbers))}: " if len(numbers) < len(batches) else ""
            self._own.append(f"{some}{sentence}")
        self._comments.update(dict.fromkeys(self._own, 1))


def value_from(knob: Knob, params: Params) -> Any:
    """What the panel's component shows after pasting `params`; None leaves it as it is.

    A picture made without LoRAtorio unticks the box. Text without a line of parameters is only a prompt and changes
    nothing. Knobs that an infotext does not mention had the defaults of the version that made the picture.
    """
    if knob.name != "enabled" and KNOB_BY_NAME["enabled"].infotext_key not in params:
        return None
    if "Steps" not in params and knob.infotext_key not in params:
        return None
    try:
        unsaid = knob.default_in(str(params.get(VERSION_KEY, "")))
        value = knob.check(params.get(knob.infotext_key, unsaid), "label")
    except LoratorioError as problem:
        print(f"LoRAtorio: pasting: {problem}")
        return None
    return dict(knob.choices)[str(value)] if knob.kind == "choice" else value


def _paster(knob: Knob) -> Callable[[Params], Any]:
    def paste(params: Params) -> Any:
        return value_from(knob, params)

    return paste


PASTERS: dict[str, Callable[[Params], Any]] = {knob.name: _paster(knob) for knob in KNOBS}


def paste_fields(components: Sequence[Any]) -> list[tuple[Any, Callable[[Params], Any]]]:
    """For `self.infotext_fields`: each component of the panel with what an infotext makes of it."""
    return [(component, PASTERS[knob.name]) for component, knob in zip(components, KNOBS, strict=True)]


def paste_field_names() -> list[Callable[[Params], Any]]:
    """For `self.paste_field_names`: what "send to img2img" takes along from tab to tab.

    The WebUI compares these with the second half of the paste fields; that they are functions, not names, is no matter to it.
    """
    return list(PASTERS.values())
