"""Stopping early: halves of whole relations, and only what is behind beyond doubt."""

from __future__ import annotations

import numpy as np

from mpsearch.stages import halves, hopeless


def test_halves_hold_whole_relations_and_every_fact_once() -> None:
    relations = [name for name in "abcdefghi" for _ in range(3)]
    first, second = halves(relations)
    assert sorted([*first, *second]) == list(range(27))
    assert {relations[place] for place in first} == set("acegi")
    assert {relations[place] for place in second} == set("bdfh")


def test_few_relations_are_asked_at_once() -> None:
    (whole,) = halves([name for name in "abcdefg" for _ in range(3)])
    assert whole.tolist() == list(range(21))


def test_what_is_behind_in_every_relation_is_hopeless_by_its_mean() -> None:
    relations = ["a", "a", "b", "c"]
    best = np.zeros(4)
    assert hopeless([0.5, 0.7, 0.5, 0.7], best, relations) == np.mean([0.6, 0.5, 0.7])


def test_what_is_ahead_or_mixed_goes_on() -> None:
    relations = list("abcd")
    assert hopeless([-0.1] * 4, [0.0] * 4, relations) is None
    assert hopeless([0.0] * 4, [0.0] * 4, relations) is None
    assert hopeless([3.0, -1.0, 1.0, -2.0], [0.0] * 4, relations) is None


def test_at_most_one_in_twenty_that_win_in_the_end_is_stopped() -> None:
    rng = np.random.default_rng(0)
    relations = [f"r{i}" for i in range(40)]
    first, _ = halves(relations)
    stopped = wins = 0
    for _ in range(4000):
        differences = rng.normal(rng.normal(0.0, 0.3), 1.0, 40)
        if differences.mean() < 0:
            wins += 1
            stopped += hopeless(differences[first], np.zeros(20), relations[:20]) is not None
    assert wins > 1000
    assert 0.001 < stopped / wins < 0.05


def test_one_relation_decides_nothing_with_doubt() -> None:
    relations = ["a"] * 4 + ["b"]
    assert hopeless([1.0, 1.0, 1.0, 1.0, -0.9], [0.0] * 5, relations) is None
