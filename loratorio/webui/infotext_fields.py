"""The knobs in a picture's infotext, one readable field each, and from there back into the panel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import LoratorioError
from ..job import INTERRUPTED
from ..pictures.infotext import PLACES_KEY, VERSION_KEY, LoraUse, found_places, params
from ..prompt.places import written
from ..settings import FORMER_METHODS, KNOB_BY_NAME, KNOBS, Knob, Settings

if TYPE_CHECKING:
    from ..job import Job

NOTE_KEY = "LoRAtorio note"

Params = Mapping[str, Any]
"""An infotext as the WebUI parsed it: field names and values, all text."""


def write(fields: dict[str, Any], settings: Settings, job: Job | None) -> None:
    """Update the WebUI's `p.extra_generation_params` with the knobs, and with the LoRAs and notes of the current batch.

    The knobs are written when the job begins, with a note for the infotext that the WebUI makes if it is interrupted before the first
    batch. They are written again when a batch begins, because the WebUI writes the file for its paste button before the first picture is
    sampled. LoRAs and notes are written after each pass, because a picture may be saved between two passes. Earlier fields are removed,
    because the pictures of an X/Y/Z plot and the batches of a job share one mapping.
    """
    for key in [key for key in fields if key.split(" ")[0] == "LoRAtorio"]:
        del fields[key]
    if job is None:
        fields.update(params(settings, ()))
        if settings.enabled:
            fields[NOTE_KEY] = INTERRUPTED
        return
    uses: dict[bool, Sequence[LoraUse]] = {False: (), True: ()}
    for each in job.passes:
        if each.batch == job.batch:
            uses[each.hires] = each.uses
    fields.update(params(settings, uses[False], uses[True] if uses[True] != uses[False] else ()))
    found = _found(job)
    if any(found):
        fields[PLACES_KEY] = found
    notes = job.notes_of(job.batch)
    if notes:
        fields[NOTE_KEY] = " ".join(notes)


def _found(job: Job) -> list[str | None]:
    """The places that were found, for each picture of the current batch, by whose number in it the WebUI reads the list."""
    texts: list[str | None] = [None] * int(getattr(job.p, "batch_size", 1))
    for each in job.passes:
        if each.batch == job.batch and each.found:
            texts = [
                found_places((name, written(place)) for name, place in places) or None
                for places in each.found
            ]
    return texts * int(getattr(job.p, "n_iter", 1))  # some callers number the job's pictures


class Comments:
    """The job's notes below the pictures in the page, each with the batches that it is about."""

    def __init__(self, comments: dict[str, Any]) -> None:
        self._comments = comments  # the WebUI's, which jobs of one script share
        self._own: list[str] = []

    def update(self, job: Job) -> None:
        """Call this after each batch."""
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
    """The value of the panel's component after pasting `params`; None leaves it unchanged.

    A picture made without LoRAtorio unticks the box. Text without a line of parameters is only a prompt and changes
    nothing. Knobs that an infotext does not mention had the defaults of the version that made the picture.
    """
    if knob.name != "enabled" and KNOB_BY_NAME["enabled"].infotext_key not in params:
        return None
    if "Steps" not in params and knob.infotext_key not in params:
        return None
    method, recentring = KNOB_BY_NAME["method"], KNOB_BY_NAME["recentre"]
    former = FORMER_METHODS.get(str(params.get(method.infotext_key, "")).lower())
    if former is not None:
        params = {recentring.infotext_key: recentring.default, **params, method.infotext_key: former}
    try:
        of_method = str(method.check(params.get(method.infotext_key, method.default), "label"))
        unsaid = knob.default_in(str(params.get(VERSION_KEY, "")), of_method)
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
    """For `self.infotext_fields`: each component of the panel with the function that reads its value from an infotext."""
    return [(component, PASTERS[knob.name]) for component, knob in zip(components, KNOBS, strict=True)]


def paste_field_names() -> list[Callable[[Params], Any]]:
    """For `self.paste_field_names`: what "send to img2img" takes along from tab to tab.

    The WebUI compares these with the second half of the paste fields; they may be functions instead of names.
    """
    return list(PASTERS.values())
