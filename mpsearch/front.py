"""The Pareto front, and picking a point under a budget.

Both coordinates are minimised: stored bytes, and loss (answer loss in nats).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import isfinite
from typing import TypeVar

Point = TypeVar("Point")


def pareto_front(
    points: Iterable[Point], coordinates: Callable[[Point], tuple[float, float]]
) -> list[Point]:
    """Points that no other point dominates, by rising first coordinate; NaN is never on it.

    Of points with equal coordinates the first is kept.
    """
    finite = [point for point in points if all(isfinite(x) for x in coordinates(point))]
    front: list[Point] = []
    lowest = float("inf")
    for point in sorted(finite, key=coordinates):
        if (loss := coordinates(point)[1]) < lowest:
            front.append(point)
            lowest = loss
    return front


def best_under(
    points: Iterable[Point],
    coordinates: Callable[[Point], tuple[float, float]],
    max_bytes: float,
) -> Point | None:
    """The lowest loss at no more than `max_bytes`; of equals the smallest. None if none fits."""
    fitting = [p for p in points if coordinates(p)[0] <= max_bytes and isfinite(coordinates(p)[1])]
    return min(fitting, key=lambda p: coordinates(p)[::-1], default=None)
