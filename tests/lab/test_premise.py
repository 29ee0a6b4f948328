"""How well divergence tells wanted LoRAs from others: the measure itself, and one combination of the toybox."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratorio import toybox
from loratorio.standalone.checkpoint import load_checkpoint
from loratorio_lab.benchmarks.premise import EARLY, auc, divergence_auc
from loratorio_lab.chosen_toybox import chosen_toybox


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=12))
def test_auc_is_the_share_of_pairs_in_order(pairs: list[tuple[int, bool]]) -> None:
    wanted = np.array([own for _, own in pairs])
    if wanted.all() or not wanted.any():
        return
    scores = np.array([score for score, _ in pairs], dtype=float)
    points = [
        1.0 if one > other else 0.5 if one == other else 0.0
        for one, own in pairs
        if own
        for other, its in pairs
        if not its
    ]
    assert np.isclose(auc(scores, wanted), np.mean(points))


def test_one_combination() -> None:
    found = divergence_auc(load_checkpoint(toybox.CHECKPOINT), chosen_toybox(), ("ghost", "night"))
    assert len(found) == EARLY
    assert all(0.8 < of_all <= 1 for of_all, _ in found)
    assert all(0.75 < of_kind <= 1 for _, of_kind in found)


def test_scores_that_are_no_numbers_have_no_auc() -> None:
    """Once an AUC of 0.00 was printed: a LoRA out of a patch has a weight of 0, and its logarithm is −∞."""
    with pytest.raises(ValueError, match="must be finite"):
        auc(np.array([0.0, -np.inf]), np.array([True, False]))
