"""Statistics of the recall study that the package itself does not need; NumPy alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from math import factorial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpsearch.bootstrap import DRAWS, Interval

PERMUTATIONS = 10_000


def ranks(values: Sequence[float] | NDArray[Any]) -> NDArray[Any]:
    """`(n,)` ranks from 0, equal values sharing their mean rank."""
    _, place, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    shared: NDArray[Any] = np.cumsum(counts) - (counts + 1) / 2
    return shared[place]


def spearman(x: Sequence[float] | NDArray[Any], y: Sequence[float] | NDArray[Any]) -> float:
    """Rank correlation; 0.0 where either side is constant.

    Source: Spearman, American Journal of Psychology 15 (1904).
    """
    return float(_standard_ranks(x) @ _standard_ranks(y))


def _standard_ranks(values: Sequence[float] | NDArray[Any]) -> NDArray[Any]:
    """Ranks around 0 and of length 1, or all 0."""
    centered = ranks(values) - (len(values) - 1) / 2
    length = np.sqrt(centered @ centered)
    return centered / length if length else centered


def rank_test(
    pairs: Sequence[tuple[NDArray[Any], NDArray[Any]]], generator: np.random.Generator
) -> tuple[float, float]:
    """Mean rank correlation of the pairs, and its two-sided permutation p.

    The second sides are permuted together, so pairs may be measured on the same things. All
    permutations are tried where they are few, else `PERMUTATIONS` random ones.

    Args:
        pairs: of `(n,)` and `(n,)`, the same `n` things each.
    """
    size = len(pairs[0][0])
    exact = factorial(size) <= PERMUTATIONS
    if exact:
        orders = np.array(list(permutations(range(size))))
    else:
        orders = generator.permuted(np.tile(np.arange(size), (PERMUTATIONS, 1)), axis=1)
    sides = [(_standard_ranks(x), _standard_ranks(y)) for x, y in pairs]
    found = float(np.mean([x @ y for x, y in sides]))
    drawn = np.mean([y[orders] @ x for x, y in sides], axis=0)
    as_far = int((np.abs(drawn) >= abs(found) - 1e-12).sum())
    return found, as_far / len(orders) if exact else (as_far + 1) / (len(orders) + 1)


def stratified_difference(
    values: Sequence[float] | NDArray[Any],
    first: Sequence[bool] | NDArray[Any],
    strata: Sequence[str],
    clusters: Sequence[str],
    generator: np.random.Generator,
    draws: int = DRAWS,
) -> Interval:
    """How much higher the mean is in the first group than in the other, within strata.

    A stratum counts by the pairs that it gives, `a * b / (a + b)` for `a` and `b` values in its two
    groups (Mantel and Haenszel 1959); one that has a single group counts nothing. The 95 % interval
    is a Bayesian bootstrap over clusters; see `mpsearch.bootstrap`.

    Args:
        values, first, strata, clusters: `(n,)`.
    Raises:
        ValueError: no stratum has both groups.
    """
    array, mine = np.asarray(values, dtype=float), np.asarray(first, dtype=bool)
    _, stratum = np.unique(np.asarray(strata), return_inverse=True)
    names, cluster = np.unique(np.asarray(clusters), return_inverse=True)

    def difference(weights: NDArray[Any]) -> float:
        def sums(group: NDArray[Any], of: NDArray[Any]) -> NDArray[Any]:
            return np.bincount(stratum[group], of[group], int(stratum.max()) + 1)

        a, b = sums(mine, weights), sums(~mine, weights)
        both = (a > 0) & (b > 0)
        if not both.any():
            raise ValueError("no stratum has values in both groups")
        a, b = a[both], b[both]
        apart = sums(mine, weights * array)[both] / a - sums(~mine, weights * array)[both] / b
        return float(np.average(apart, weights=a * b / (a + b)))

    drawn = [difference(generator.exponential(size=names.size)[cluster]) for _ in range(draws)]
    low, high = np.percentile(drawn, (2.5, 97.5))
    return Interval(difference(np.ones(array.size)), float(low), float(high))
