"""Whether right and wrong answers changed by more than chance, when many relations are looked at.

NumPy and the standard library suffice: both tests are exact and short.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb


def mcnemar(forgotten: int, gained: int) -> float:
    """Two-sided exact p that flips go either way alike: binomial, one half.

    Args:
        forgotten: facts that only the first model answers.
        gained: facts that only the second one answers.
    Returns:
        1.0 where nothing flipped.
    Source: McNemar, Psychometrika 12 (1947), in its exact form.
    """
    flips = forgotten + gained
    tail = sum(comb(flips, k) for k in range(min(forgotten, gained) + 1))
    return min(1.0, 2 * tail / (1 << flips))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values: below 0.05 means significant with at most 5 % chance of any false one.

    Source: Holm, Scandinavian Journal of Statistics 6 (1979).
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
