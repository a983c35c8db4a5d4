"""Cheap first: a candidate is asked half of the relations, the rest only if it may yet be the best.

All candidates see the same facts, so a candidate and the best one so far are compared fact by fact,
which tells them apart with few facts. Halves are of relations, not of each relation's facts:
a relation's solved examples are most of its tokens, and would be read twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LEAST_RELATIONS = 8  # fewer tell too little to stop on
_Z = 1.645  # one-sided 95 %


def halves(relations: Sequence[str]) -> list[NDArray[Any]]:
    """The places of the facts of every other relation, then of the rest.

    One part where there are fewer than eight relations.
    """
    names = list(dict.fromkeys(relations))
    number = np.array([names.index(name) for name in relations])
    if len(names) < _LEAST_RELATIONS:
        return [np.arange(len(relations))]
    return [np.flatnonzero(number % 2 == part) for part in (0, 1)]


def hopeless(
    losses: Sequence[float] | NDArray[Any],
    best: Sequence[float] | NDArray[Any],
    relations: Sequence[str],
) -> float | None:
    """By how much a candidate is expected to lose to the best, in nats; None if it may yet win.

    Relations are taken as draws, so the mean over all of them is uncertain both by those that were
    asked and by as many that were not. It is hopeless where the chance to win is below 5 %.

    Args:
        losses, best: `(facts,)` what is lost on the same facts, those of the first half, in nats.
        relations: `(facts,)` names.
    """
    names = np.asarray(relations)
    differences = np.asarray(losses, dtype=float) - np.asarray(best, dtype=float)
    means = np.array([differences[names == name].mean() for name in dict.fromkeys(relations)])
    # Half of all are these, half have the same mean and as many terms: the variances add up.
    stderr = float(means.std(ddof=1)) / np.sqrt(2 * len(means))
    mean = float(means.mean())
    return mean if mean > _Z * stderr else None
