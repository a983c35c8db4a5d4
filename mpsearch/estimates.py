"""Means over facts, and over text, with their uncertainty.

Every figure of recall or answer loss is a mean within each relation, then over relations, so that
a relation counts the same however many facts it has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error, in the unit of the values."""

    mean: float
    stderr: float

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval under the normal approximation."""
        return self.mean - 1.96 * self.stderr, self.mean + 1.96 * self.stderr

    @property
    def significant(self) -> bool:
        """Whether zero lies outside the interval."""
        low, high = self.interval
        return low > 0 or high < 0


def relation_mean(values: Sequence[float] | NDArray[Any], relations: Sequence[str]) -> Estimate:
    """Mean over relations of the means within them.

    The standard error takes facts as independent draws within fixed relations:
    `sqrt(sum over relations of variance / facts) / relations`. Relations of one fact are taken as
    draws of one relation (see `strata`); one such alone gets the average variance of the others.

    Args:
        values: `(facts,)`.
        relations: `(facts,)` names.
    """
    array, names = np.asarray(values, dtype=float), np.asarray(relations)
    if array.shape != names.shape or array.size == 0:
        raise ValueError(f"{array.size} values for {names.size} relation names")
    stratum_of, shares = strata(relations)
    groups = [array[stratum_of == stratum] for stratum in range(len(shares))]
    variances = [group.var(ddof=1) for group in groups if group.size > 1]
    typical = float(np.mean(variances)) if variances else 0.0
    squared = sum(
        share**2 * (group.var(ddof=1) if group.size > 1 else typical) / group.size
        for group, share in zip(groups, shares, strict=True)
    )
    mean = sum(share * group.mean() for group, share in zip(groups, shares, strict=True))
    return Estimate(float(mean), sqrt(squared))


def strata(relations: Sequence[str]) -> tuple[NDArray[Any], NDArray[Any]]:
    """`(facts,)` stratum of each fact, and `(strata,)` its share of the mean over relations.

    A relation is a stratum. Those of one fact tell no spread, and many of them would look certain:
    they are one stratum together.
    """
    facts = Counter(relations)
    names = [name if facts[name] > 1 else None for name in relations]
    number = {name: place for place, name in enumerate(dict.fromkeys(names))}
    of = Counter(name if count > 1 else None for name, count in facts.items())
    shares = np.array([of[name] for name in number]) / len(facts)
    return np.array([number[name] for name in names]), shares


def paired_difference(a: Sequence[float], b: Sequence[float], relations: Sequence[str]) -> Estimate:
    """Mean of `a - b` over the same facts; far tighter than the difference of two means."""
    return relation_mean(np.asarray(a, dtype=float) - np.asarray(b, dtype=float), relations)


def ratio(sums: Sequence[float] | NDArray[Any], counts: Sequence[int] | NDArray[Any]) -> Estimate:
    """`sum(sums) / sum(counts)` of units of unequal size, such as nats a token over paragraphs.

    The standard error takes units as independent draws, linearised:
    `sqrt(n / (n - 1) * sum((sums - mean * counts) ** 2)) / sum(counts)` for `n` units.

    Args:
        sums, counts: `(units,)`; at least two units, and one counted in all.
    Source: the ratio estimator, Cochran, Sampling Techniques (1977), section 6.4.
    """
    array, sizes = np.asarray(sums, dtype=float), np.asarray(counts, dtype=float)
    if array.shape != sizes.shape or array.size < 2 or sizes.sum() <= 0:
        raise ValueError(f"{array.size} sums of {sizes.size} counts, {sizes.sum()} in all")
    mean = array.sum() / sizes.sum()
    squared = ((array - mean * sizes) ** 2).sum() * array.size / (array.size - 1)
    return Estimate(float(mean), sqrt(squared) / float(sizes.sum()))
