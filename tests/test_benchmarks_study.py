"""The recall study's statistics against hand-made tables and planted truth."""

from __future__ import annotations

import sys
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from study_statistics import rank_test, ranks, spearman, stratified_difference


def test_equal_values_share_their_mean_rank() -> None:
    assert ranks([5.0, 1.0, 5.0, 3.0]).tolist() == [2.5, 0.0, 2.5, 1.0]


def test_spearman_by_hand() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 40, 30]) == pytest.approx(0.8)  # 1 - 6 * 2 / 60
    assert spearman([1, 2, 3], [9, 4, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 3], [7, 7, 7]) == 0.0


def test_few_things_are_permuted_in_every_way() -> None:
    x, y = np.array([1.0, 2, 3, 4]), np.array([1.0, 2, 3, 4])
    rho, p = rank_test([(x, y)], np.random.default_rng(0))
    ways = [abs(spearman(x, y[list(order)])) >= 1 for order in permutations(range(4))]
    assert (rho, p) == (pytest.approx(1.0), pytest.approx(np.mean(ways)))


def test_correlated_pairs_are_found_and_unrelated_ones_seldom() -> None:
    generator = np.random.default_rng(1)
    x = generator.random(20)
    rho, p = rank_test([(x, -x), (x, -x + 0.01)], generator)
    assert rho == pytest.approx(-1)
    assert p < 0.001
    few = [rank_test([(generator.random(6), generator.random(6))], generator) for _ in range(300)]
    assert 0.01 < np.mean([p < 0.05 for _, p in few]) < 0.09


def test_noise_of_two_halves_is_no_correlation() -> None:
    """Saturation of one half against loss in the other: the noise of a half is in neither twice."""
    generator = np.random.default_rng(2)
    found = []
    for _ in range(40):
        noise = generator.random((2, 12))
        found.append(rank_test([(noise[0], -noise[1]), (noise[1], -noise[0])], generator)[0])
    assert abs(np.mean(found)) < 0.12
    assert spearman(noise[0], -noise[0]) == pytest.approx(-1)  # what one half alone would say


def test_strata_keep_an_easy_one_from_passing_for_a_difference() -> None:
    # In each stratum the groups are alike; the first group is mostly in the easy stratum.
    values = [1, 1, 1, 1, 0, 0, 0, 0]
    first = [True, True, True, False, True, False, False, False]
    strata = ["easy"] * 4 + ["hard"] * 4
    clusters = [str(i) for i in range(8)]
    alike = stratified_difference(values, first, strata, clusters, np.random.default_rng(0))
    assert (alike.mean, alike.low, alike.high) == (0, 0, 0)
    pooled = stratified_difference(values, first, ["one"] * 8, clusters, np.random.default_rng(0))
    assert pooled.mean == pytest.approx(3 / 4 - 1 / 4)


def test_strata_count_by_the_pairs_they_give() -> None:
    # 1 of 1 against 0 of 1: weight 1/2. 0 of 2 against 0 of 2: weight 1. One group alone: none.
    values = [1, 0, 0, 0, 0, 0, 1]
    first = [True, False, True, True, False, False, True]
    strata = ["a", "a", "b", "b", "b", "b", "c"]
    found = stratified_difference(values, first, strata, list("tuvwxyz"), np.random.default_rng(0))
    assert found.mean == pytest.approx(0.5 / 1.5)
    with pytest.raises(ValueError, match="both groups"):
        stratified_difference([1.0], [True], ["a"], ["t"], np.random.default_rng(0))


def test_the_interval_over_clusters_covers_and_is_wider_than_over_values() -> None:
    generator = np.random.default_rng(3)
    covered, wider = [], []
    for _ in range(60):
        effect = generator.normal(size=30)
        cluster = np.repeat(np.arange(30), 6)
        first = np.repeat(np.arange(30) < 15, 6)  # a cluster is in one group
        values = effect[cluster] + 0.2 * generator.normal(size=180) + 0.5 * first
        names = [str(c) for c in cluster]
        strata = ["one"] * 180
        over = stratified_difference(values, first, strata, names, generator, draws=300)
        apart = [str(i) for i in range(180)]
        naive = stratified_difference(values, first, strata, apart, generator, draws=300)
        covered.append(over.low <= 0.5 <= over.high)
        wider.append(over.high - over.low > naive.high - naive.low)
    assert np.mean(covered) > 0.82
    assert np.mean(wider) == 1
