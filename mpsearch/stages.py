"""Cheap first: a candidate is asked a quarter of the relations, then another, then the other half,
each only if it may yet be the best.

All candidates see the same facts, so a candidate and the best one so far are compared fact by fact,
which tells them apart with few facts. Stages are of relations, not of each relation's facts:
a relation's solved examples are most of its tokens, and would be read again at each stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LEAST_RELATIONS = 4  # in a stage; fewer tell too little to stop on
_Z = 1.645  # one-sided 95 %


def stages(relations: Sequence[str]) -> list[NDArray[Any]]:
    """The places of the facts of every fourth relation, of as many others, and of the rest.

    Two halves where there are fewer than 16 relations, one stage where there are fewer than eight.
    """
    names = list(dict.fromkeys(relations))
    number = np.array([names.index(name) for name in relations])
    if len(names) < 2 * _LEAST_RELATIONS:
        return [np.arange(len(relations))]
    odd = np.flatnonzero(number % 2 == 1)
    if len(names) < 4 * _LEAST_RELATIONS:
        return [np.flatnonzero(number % 2 == 0), odd]
    return [np.flatnonzero(number % 4 == 0), np.flatnonzero(number % 4 == 2), odd]


def hopeless(
    losses: Sequence[float] | NDArray[Any],
    best: Sequence[float] | NDArray[Any],
    relations: Sequence[str],
    total: int,
) -> float | None:
    """By how much a candidate is expected to lose to the best, in nats; None if it may yet win.

    Relations are taken as draws, so the mean over all of them is uncertain both by those that were
    asked and by those that were not. It is hopeless where the chance to win is below 5 %, by the
    normal approximation: some 7 % of a handful of relations.

    Args:
        losses, best: `(facts,)` what is lost on the same facts, those asked so far, in nats.
        relations: `(facts,)` names.
        total: relations in all.
    """
    names = np.asarray(relations)
    differences = np.asarray(losses, dtype=float) - np.asarray(best, dtype=float)
    means = np.array([differences[names == name].mean() for name in dict.fromkeys(relations)])
    mean = float(means.mean())
    # Of the mean over all, given that over those asked: none is left where all were.
    stderr = float(means.std(ddof=1)) * np.sqrt(1 / len(means) - 1 / total)
    return mean if mean > _Z * stderr else None
