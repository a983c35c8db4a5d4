"""Estimates: means over relations by hand, and intervals that cover as often as they say."""

from __future__ import annotations

from math import nan, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpsearch.estimates import Estimate, paired_difference, relation_mean

TRIALS = 3000
RELATIONS = {"capital": 60, "color": 30, "language": 45, "shape": 90}
NAMES = [name for name, facts in RELATIONS.items() for _ in range(facts)]
rows = st.lists(
    st.tuples(st.integers(-50, 50), st.sampled_from(["a", "b", "c"])), min_size=1, max_size=30
)


def test_mean_and_error_by_hand() -> None:
    # capital: mean 2, variance 1 over 3 facts; color: mean 10, variance 8 over 2 facts.
    found = relation_mean([1, 2, 3, 8, 12], ["capital"] * 3 + ["color"] * 2)
    assert found.mean == pytest.approx((2 + 10) / 2)
    assert found.stderr == pytest.approx(sqrt(1 / 3 + 8 / 2) / 2)


def test_a_relation_counts_the_same_however_many_facts_it_has() -> None:
    assert relation_mean([0] * 99 + [1], ["a"] * 99 + ["b"]).mean == 0.5


def test_one_relation_is_the_plain_mean_and_its_standard_error() -> None:
    values = [0.5, 1.5, 4.0, 2.0]
    found = relation_mean(values, ["a"] * 4)
    assert found.mean == pytest.approx(np.mean(values))
    assert found.stderr == pytest.approx(np.std(values, ddof=1) / 2)


def test_a_relation_with_one_fact_gets_the_average_variance_of_the_others() -> None:
    found = relation_mean([1, 3, 0, 4, 7], ["a", "a", "b", "b", "c"])  # variances 2 and 8
    assert found.mean == pytest.approx((2 + 2 + 7) / 3)
    assert found.stderr == pytest.approx(sqrt(2 / 2 + 8 / 2 + 5 / 1) / 3)


def test_relations_of_one_fact_are_draws_of_one_relation() -> None:
    assert relation_mean([3, 5], ["a", "b"]) == Estimate(4.0, 1.0)
    found = relation_mean([1, 3, 6, 8], ["a", "a", "b", "c"])  # variances 2 and 2
    assert found.mean == pytest.approx((2 + 6 + 8) / 3)
    assert found.stderr == pytest.approx(sqrt(2 / 2 + 2**2 * 2 / 2) / 3)


def test_one_fact_alone_has_no_spread_to_tell() -> None:
    assert relation_mean([3], ["a"]) == Estimate(3.0, 0.0)


def test_truth_values_count_as_zero_and_one() -> None:
    assert relation_mean([True, False, True, True], ["a", "a", "b", "b"]).mean == 0.75


@pytest.mark.parametrize(("values", "names"), [([], []), ([1.0], []), ([1.0], ["a", "b"])])
def test_values_without_their_relations_are_refused(values: list[float], names: list[str]) -> None:
    with pytest.raises(ValueError, match=f"^{len(values)} values for {len(names)} relation names"):
        relation_mean(values, names)


def test_nan_is_not_hidden_and_not_significant() -> None:
    found = relation_mean([1.0, nan, 2.0], ["a", "a", "b"])
    assert np.isnan(found.mean)
    assert not found.significant


@given(rows, st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=100)
def test_the_order_of_facts_does_not_matter(rows: list[tuple[int, str]], random) -> None:  # type: ignore[no-untyped-def]
    shuffled = list(rows)
    random.shuffle(shuffled)
    a, b = (relation_mean([v for v, _ in part], [n for _, n in part]) for part in (rows, shuffled))
    assert (a.mean, a.stderr) == (pytest.approx(b.mean), pytest.approx(b.stderr))


@given(rows, st.integers(-9, 9), st.integers(-5, 5))
@settings(deadline=None, max_examples=100)
def test_shift_and_scale_carry_over(rows: list[tuple[int, str]], shift: int, scale: int) -> None:
    values, names = [v for v, _ in rows], [n for _, n in rows]
    plain = relation_mean(values, names)
    moved = relation_mean([scale * value + shift for value in values], names)
    assert moved.mean == pytest.approx(scale * plain.mean + shift)
    assert moved.stderr == pytest.approx(abs(scale) * plain.stderr)


def test_the_interval_covers_the_truth_95_times_in_100() -> None:
    generator = np.random.default_rng(0)
    centers = dict(zip(RELATIONS, (0.0, 3.0, -2.0, 1.0), strict=True))
    spreads = dict(zip(RELATIONS, (1.0, 4.0, 0.5, 2.0), strict=True))
    center = np.array([centers[name] for name in NAMES])
    spread = np.array([spreads[name] for name in NAMES])
    truth = np.mean(list(centers.values()))
    covered = 0
    for _ in range(TRIALS):
        low, high = relation_mean(generator.normal(center, spread), NAMES).interval
        covered += low <= truth <= high
    assert 0.92 <= covered / TRIALS <= 0.98


def test_the_interval_of_recall_covers_too() -> None:
    generator = np.random.default_rng(1)
    chances = dict(zip(RELATIONS, (0.9, 0.6, 0.75, 0.5), strict=True))
    chance = np.array([chances[name] for name in NAMES])
    truth = np.mean(list(chances.values()))
    covered = 0
    for _ in range(TRIALS):
        low, high = relation_mean(generator.random(len(NAMES)) < chance, NAMES).interval
        covered += low <= truth <= high
    assert 0.92 <= covered / TRIALS <= 0.98


def test_no_difference_is_found_significant_5_times_in_100() -> None:
    generator = np.random.default_rng(2)
    found = 0
    for _ in range(TRIALS):
        a, b = generator.normal(0, 1, (2, len(NAMES)))
        found += paired_difference(a, b, NAMES).significant
    assert 0.02 <= found / TRIALS <= 0.08


def test_a_paired_difference_by_hand() -> None:
    found = paired_difference([3, 5, 9], [1, 1, 4], ["a", "a", "b"])  # differences 2, 4 and 5
    assert found.mean == pytest.approx((3 + 5) / 2)
    assert found.stderr == pytest.approx(sqrt(2 / 2 + 2 / 1) / 2)


def test_pairing_removes_what_both_share() -> None:
    generator = np.random.default_rng(3)
    shared = generator.normal(0, 10, len(NAMES))
    a = shared + generator.normal(0.1, 0.2, len(NAMES))
    b = shared + generator.normal(0.0, 0.2, len(NAMES))
    paired = paired_difference(a, b, NAMES)
    unpaired = sqrt(relation_mean(a, NAMES).stderr ** 2 + relation_mean(b, NAMES).stderr ** 2)
    assert paired.mean == pytest.approx(relation_mean(a, NAMES).mean - relation_mean(b, NAMES).mean)
    assert paired.stderr < unpaired / 20
    assert paired.significant
    reverse = paired_difference(b, a, NAMES)
    assert (reverse.mean, reverse.stderr) == (-paired.mean, paired.stderr)


@pytest.mark.parametrize(
    ("mean", "stderr", "significant"),
    [(1.97, 1, True), (1.95, 1, False), (-1.97, 1, True), (-1.95, 1, False), (0, 0, False)],
)
def test_significant_is_zero_outside_the_interval(
    mean: float, stderr: float, significant: bool
) -> None:
    estimate = Estimate(mean, stderr)
    assert estimate.interval == (mean - 1.96 * stderr, mean + 1.96 * stderr)
    assert estimate.significant is significant
