"""How an error of ours leaves a WebUI."""

from __future__ import annotations

import pytest

from loratorio.errors import LoratorioError
from loratorio.refusal import Refusal, refusals


def test_an_error_becomes_a_refusal_with_the_same_sentence() -> None:
    with pytest.raises(Refusal) as refused, refusals():
        raise LoratorioError("Temperature is too warm.")
    problem = refused.value
    assert (problem.status_code, problem.detail, str(problem)) == (422, *["Temperature is too warm."] * 2)
    # What the WebUI's page shows, and its API's answer.
    assert f"{type(problem).__name__}: {problem}" == "LoRAtorio: Temperature is too warm."
    assert vars(problem)["status_code"] == 422
    # No chain of tracebacks.
    assert problem.__cause__ is None
    assert problem.__suppress_context__


def test_a_refusal_is_an_answer_that_the_api_prints_no_traceback_of() -> None:
    fastapi = pytest.importorskip("fastapi")
    assert issubclass(Refusal, fastapi.HTTPException)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(ZeroDivisionError), refusals():
        raise ZeroDivisionError
    first = Refusal("one")
    with pytest.raises(Refusal) as again, refusals():
        raise first
    assert again.value is first
