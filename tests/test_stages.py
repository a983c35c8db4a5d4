"""Stopping early: stages of whole relations, and only what is behind beyond doubt."""

from __future__ import annotations

import numpy as np
import pytest

from mpsearch.stages import hopeless, stages


def facts_of(relations: int) -> list[str]:
    return [f"r{number}" for number in range(relations) for _ in range(3)]


@pytest.mark.parametrize(
    ("relations", "asked"),
    [(29, [8, 7, 14]), (16, [4, 4, 8]), (15, [8, 7]), (8, [4, 4]), (7, [7]), (1, [1])],
)
def test_stages_hold_whole_relations_and_every_fact_once(relations: int, asked: list[int]) -> None:
    names = facts_of(relations)
    found = stages(names)
    assert sorted(place for stage in found for place in stage) == list(range(3 * relations))
    of_stages = [{names[place] for place in stage} for stage in found]
    assert [len(some) for some in of_stages] == asked
    assert sum(asked) == relations


def test_what_is_behind_in_every_relation_is_hopeless_by_its_mean() -> None:
    relations = ["a", "a", "b", "c"]
    best = np.zeros(4)
    assert hopeless([0.5, 0.7, 0.5, 0.7], best, relations, 6) == np.mean([0.6, 0.5, 0.7])


def test_what_is_ahead_or_mixed_goes_on() -> None:
    relations = list("abcd")
    assert hopeless([-0.1] * 4, [0.0] * 4, relations, 8) is None
    assert hopeless([0.0] * 4, [0.0] * 4, relations, 8) is None
    assert hopeless([3.0, -1.0, 1.0, -2.0], [0.0] * 4, relations, 8) is None


def test_the_more_is_left_to_ask_the_longer_a_candidate_may_win() -> None:
    """Mean 1, deviation 1.15: it wins where 1.645 * 1.15 * sqrt(1 / 4 - 1 / total) reaches 1."""
    relations, losses = list("abcd"), [0.0, 0.0, 2.0, 2.0]
    of_totals = [hopeless(losses, [0.0] * 4, relations, total) for total in (4, 8, 100)]
    assert of_totals == [1.0, 1.0, 1.0]
    assert hopeless([-0.5, 0.0, 2.0, 2.5], [0.0] * 4, relations, 6) == 1.0
    assert hopeless([-0.5, 0.0, 2.0, 2.5], [0.0] * 4, relations, 16) is None


@pytest.mark.parametrize("spread", [0.1, 0.3, 1.0])
def test_at_most_one_in_fifteen_that_win_in_the_end_is_stopped(spread: float) -> None:
    rng = np.random.default_rng(0)
    relations = [f"r{i}" for i in range(40)]
    asked = np.cumsum([len(stage) for stage in stages(relations)])[:-1]
    stopped = at_half = wins = 0
    for _ in range(4000):
        differences = rng.normal(rng.normal(0.0, spread), 1.0, 40)
        if differences.mean() < 0:
            wins += 1
            stopped += any(
                hopeless(differences[:count], np.zeros(count), relations[:count], 40) is not None
                for count in asked
            )
            at_half += hopeless(differences[:20], np.zeros(20), relations[:20], 40) is not None
    assert wins > 1000
    assert at_half / wins < 0.05
    assert 0.001 < stopped / wins < 1 / 15


def test_one_relation_decides_nothing_with_doubt() -> None:
    relations = ["a"] * 4 + ["b"]
    assert hopeless([1.0, 1.0, 1.0, 1.0, -0.9], [0.0] * 5, relations, 4) is None
