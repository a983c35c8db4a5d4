"""Intervals by resampling subjects, so that all facts about one subject move together.

The Bayesian bootstrap: a draw gives every subject a random weight, each fact its subject's weight,
and takes weighted means. Plain resampling would now and then draw a relation with no fact left;
weights are never zero, so every relation stays in every draw.

Source: Rubin, The Bayesian Bootstrap, Annals of Statistics 9 (1981).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpsearch.estimates import strata

DRAWS = 2000
_SEED = 0


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval, in the unit of the values."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def subject_bootstrap(
    values: Sequence[float] | NDArray[Any],
    relations: Sequence[str],
    subjects: Sequence[str],
    generator: np.random.Generator,
    draws: int = DRAWS,
) -> tuple[Interval, dict[str, Interval]]:
    """95 % percentile intervals of the mean over relations, and of the mean within each.

    Deviations from a relation's mean are stretched by `sqrt((n + 1) / (n - 1))` for its `n` facts:
    Dirichlet weights spread a mean by `variance / (n + 1)`, and this makes it unbiased. A relation
    with one fact has no spread to tell: its own interval has no width, and to the mean over
    relations all such count as draws of one (`mpsearch.estimates.strata`).

    For a paired comparison pass the differences.

    Args:
        values: `(facts,)`.
        relations, subjects: `(facts,)` names.
    Returns:
        The interval over relations, and one a relation.
    Raises:
        ValueError: the lengths differ or there are no facts.
    """
    array = np.asarray(values, dtype=float)
    if not array.size == len(relations) == len(subjects) > 0:
        raise ValueError(
            f"{array.size} values for {len(relations)} relations and {len(subjects)} subjects"
        )
    stratum_of, shares = strata(relations)
    counts = np.bincount(stratum_of).astype(float)
    means = np.bincount(stratum_of, array) / counts
    _, subject_of = np.unique(np.asarray(subjects), return_inverse=True)
    # (subjects, strata): what a subject adds to a stratum, and in how many facts.
    shape = (int(subject_of.max()) + 1, len(shares))
    sums, facts = np.zeros(shape), np.zeros(shape)
    np.add.at(sums, (subject_of, stratum_of), array - means[stratum_of])
    np.add.at(facts, (subject_of, stratum_of), 1)
    weights = generator.exponential(size=(draws, shape[0]))
    stretch = np.sqrt((counts + 1) / np.maximum(counts - 1, 1))
    drawn = means + (weights @ sums) / (weights @ facts) * stretch
    facts_of, within = Counter(relations), {}
    for name, stratum, value in zip(relations, stratum_of, array, strict=True):
        if facts_of[name] == 1:
            within[name] = Interval(float(value), float(value), float(value))
        elif name not in within:
            within[name] = _interval(means[stratum], drawn[:, stratum])
    return _interval(means @ shares, drawn @ shares), within


def relation_interval(
    values: Sequence[float] | NDArray[Any], relations: Sequence[str], subjects: Sequence[str]
) -> Interval:
    """The first of `subject_bootstrap`, by the same draws each time."""
    return subject_bootstrap(values, relations, subjects, np.random.default_rng(_SEED))[0]


def subject_weights(
    subjects: Sequence[str], generator: np.random.Generator, draws: int = DRAWS
) -> NDArray[Any]:
    """`(draws, facts)` random weights of mean 1, one a subject, for statistics of another form."""
    names, subject_of = np.unique(np.asarray(subjects), return_inverse=True)
    return generator.exponential(size=(draws, len(names)))[:, subject_of]


def _interval(mean: float, drawn: NDArray[Any]) -> Interval:
    low, high = np.percentile(drawn, (2.5, 97.5))
    return Interval(float(mean), float(low), float(high))
