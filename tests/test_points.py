"""Which point to take, and what is said where none keeps the limit of text KL."""

from __future__ import annotations

import pytest

from mpsearch.assignment import Assignment
from mpsearch.fluency import TextScores
from mpsearch.points import Score, unmet


def score(name: str, kind: str, kl_nats: float | None) -> Score:
    """On two paragraphs of ten tokens each."""
    text = None if kl_nats is None else TextScores((10, 10), (-1.0, -1.0), (10 * kl_nats,) * 2)
    return Score(
        Assignment.of({name: "int4-g64"}), kind, "search", (0.0,), 0.0, 0.0, None, 0.0, text
    )


def test_the_nearest_to_a_limit_is_named_with_what_it_reaches_and_the_way_out() -> None:
    scores = [score("a", "uniform", 0.9), score("b", "knapsack", 0.25), score("c", "search", 0.5)]
    assert unmet(scores, 0.125) == (
        "No assignment within the budget keeps text KL to 0.125 nats a token: the nearest of 3, "
        f"knapsack {scores[1].assignment.id}, reaches 0.250; raise --max-text-kl or --budget."
    )


@pytest.mark.parametrize("kl_nats", [[], [None], [0.1, 0.9]])
def test_a_limit_that_something_keeps_or_that_nothing_was_asked_is_not_called_unreachable(
    kl_nats: list[float | None],
) -> None:
    scores = [score(f"l{i}", "search", nats) for i, nats in enumerate(kl_nats)]
    assert unmet(scores, 0.5).endswith("keeps text KL to 0.5 nats a token yet.")
