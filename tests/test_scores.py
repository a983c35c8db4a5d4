"""Scores by relation: shares by hand, intervals that cover, and the noise floor."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest

from mpsearch.bootstrap import Interval
from mpsearch.scores import (
    FactScores,
    NoiseFloor,
    RelationRecall,
    by_hops,
    by_relation,
    wilson,
)


def scores(log_prob: list[float], margin: list[float] | None) -> FactScores:
    count = len(log_prob)
    top1 = np.arange(count) % 2 == 0
    return FactScores(
        np.array(log_prob), np.zeros(count), top1, None if margin is None else np.array(margin)
    )


def test_a_fact_is_right_when_its_margin_is_above_zero() -> None:
    correct = scores([-1, -1, -1], [0.1, 0.0, -0.1]).correct
    assert correct is not None and correct.tolist() == [True, False, False]
    assert scores([-1], None).correct is None


def test_by_relation_by_hand() -> None:
    found = by_relation(
        scores([-1] * 5, [1, -1, 1, 2, -3]), ["b", "b", "a", "a", "a"],
        np.array([0.5, 0.25, 0.2, 0.2, 0.2]),
    )  # fmt: skip
    assert [(row.relation, row.facts) for row in found] == [("b", 2), ("a", 3)]
    assert [row.recall.mean for row in found] == pytest.approx([1 / 2, 2 / 3])
    assert [row.top1.mean for row in found] == pytest.approx([1 / 2, 2 / 3])
    assert [row.chance for row in found] == pytest.approx([0.375, 0.2])
    with pytest.raises(ValueError, match="distractors"):
        by_relation(scores([-1], None), ["a"], np.array([0.5]))


@pytest.mark.parametrize(("right", "known"), [(7, False), (8, False), (9, False), (10, True)])
def test_known_is_two_standard_errors_above_chance(right: int, known: bool) -> None:
    # 40 facts at 1/8: 5 expected, and an error of 2.09 facts.
    share = wilson(right, 40)
    assert RelationRecall("a", 40, share, share, 1 / 8).known is known


@pytest.mark.parametrize("facts", [8, 40])
def test_the_interval_of_a_share_covers_about_95_percent(facts: int) -> None:
    """Over shares of all sizes; for a single one, counts are too coarse to hit 95 % exactly."""
    generator = np.random.default_rng(0)
    shares = generator.random(20_000)
    right = generator.binomial(facts, shares)
    intervals = [wilson(k, facts) for k in range(facts + 1)]
    covered = [
        intervals[k].low <= share <= intervals[k].high
        for k, share in zip(right, shares, strict=True)
    ]
    assert 0.94 <= np.mean(covered) <= 0.965


def test_all_and_none_have_an_interval_of_some_width_within_0_and_1() -> None:
    assert wilson(9, 9) == Interval(1.0, pytest.approx(1 / (1 + 1.96**2 / 9)), 1.0)
    none = wilson(0, 9)
    assert (none.mean, none.low) == (0.0, 0.0)
    assert none.high == pytest.approx(1 - wilson(9, 9).low)


def test_the_noise_floor_is_what_differs_between_two_packings() -> None:
    first = scores([-1.0, -2.0, -3.0, -4.0], [0.5, 0.01, -0.3, 2.0])
    second = scores([-1.1, -1.9, -3.0, -4.0], [0.4, -0.01, -0.3, 2.2])
    found = NoiseFloor.between(first, second, ["a", "a", "b", "b"])
    assert found.log_prob_nats == pytest.approx(0.1)
    assert found.margin_nats == pytest.approx(0.185)  # 95th of 0, 0.02, 0.1, 0.2
    assert found.flips == 1
    assert found.mean_nats == pytest.approx(1.96 * sqrt(0.02 / 2) / 2)
    assert NoiseFloor.between(first, first, ["a"] * 4) == NoiseFloor(4, 0, 0, 0, 0)
    assert NoiseFloor.between(scores([0], None), scores([0], None), ["a"]).margin_nats is None


def test_two_hop_recall_by_what_is_known_of_the_hops() -> None:
    def marked(text: str) -> FactScores:
        return scores([-1.0] * 6, [1.0 if mark == "+" else -1.0 for mark in text])

    found = by_hops(marked("++-+--"), marked("+++--+"), marked("++++-+"))
    told = [(row.first, row.second, row.facts, row.recall and row.recall.mean) for row in found]
    assert told == [
        (True, True, 4, 0.5),
        (True, False, 0, None),
        (False, True, 1, 1.0),
        (False, False, 1, 0.0),
    ]
    with pytest.raises(ValueError, match="distractors"):
        by_hops(scores([-1], None), scores([-1], None), scores([-1], None))
