"""Exact tests against enumeration, and corrections against hand-made tables."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from mpsearch.significance import holm, mcnemar


@pytest.mark.parametrize(("forgotten", "gained"), [(0, 0), (1, 0), (3, 3), (6, 1), (0, 9), (10, 2)])
def test_mcnemar_counts_the_equally_likely_ways_of_flipping(forgotten: int, gained: int) -> None:
    flips = forgotten + gained
    apart = abs(forgotten - gained)
    ways = [abs(2 * sum(way) - flips) >= apart for way in product((0, 1), repeat=flips)]
    assert mcnemar(forgotten, gained) == pytest.approx(np.mean(ways))
    assert mcnemar(forgotten, gained) == mcnemar(gained, forgotten)


def test_mcnemar_of_many_flips_neither_overflows_nor_rounds_to_one() -> None:
    assert mcnemar(1600, 1600) == 1.0
    assert 0 < mcnemar(1700, 1300) < 1e-12


def test_mcnemar_is_significant_at_most_5_times_in_100_without_a_difference() -> None:
    generator = np.random.default_rng(0)
    forgotten = generator.binomial(40, 0.5, size=4000)
    found = np.mean([mcnemar(int(k), int(40 - k)) < 0.05 for k in forgotten])
    assert 0.01 < found < 0.05


def test_holm_by_hand() -> None:
    # 0.01 x 4 = 0.04; 0.02 x 3 = 0.06; 0.03 x 2 = 0.06; 0.5 x 1.
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.04, 0.03]) == pytest.approx([0.06, 0.06])  # never below a smaller one's
    assert holm([0.7, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_keeps_any_false_finding_to_5_in_100() -> None:
    p_values = np.random.default_rng(1).random((4000, 20))
    assert 0.03 < np.mean([min(holm(list(row))) < 0.05 for row in p_values]) < 0.065
    assert np.mean([min(row) < 0.05 for row in p_values]) > 0.5
