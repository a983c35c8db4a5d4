"""The front by brute force, the pick by looking at every point."""

from __future__ import annotations

from math import inf, isfinite, nan

from hypothesis import given, settings
from hypothesis import strategies as st

from mpsearch.front import best_under, pareto_front

Pair = tuple[float, float]
whole = st.integers(0, 8).map(float)
odd = st.sampled_from([nan, inf, -inf])
clouds = st.lists(st.tuples(whole, whole | odd) | st.tuples(whole | odd, whole), max_size=25)
finite_clouds = st.lists(st.tuples(whole, whole), max_size=25)


def indexed(points: list[Pair]) -> list[tuple[int, Pair]]:
    """Points with a number, so that equal coordinates can be told apart."""
    return list(enumerate(points))


def coordinates(point: tuple[int, Pair]) -> Pair:
    return point[1]


@given(clouds)
@settings(deadline=None, max_examples=300)
def test_the_front_is_what_no_other_point_dominates(points: list[Pair]) -> None:
    finite = [p for p in indexed(points) if all(isfinite(x) for x in coordinates(p))]
    expected = [
        (number, p)
        for number, p in finite
        if not any(q[0] <= p[0] and q[1] <= p[1] and q != p for _, q in finite)
        and not any(q == p and other < number for other, q in finite)
    ]
    expected.sort(key=coordinates)
    assert pareto_front(indexed(points), coordinates) == expected


@given(finite_clouds, st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=100)
def test_the_front_depends_on_no_order_and_is_its_own_front(points: list[Pair], random) -> None:  # type: ignore[no-untyped-def]
    front = pareto_front(points, lambda p: p)
    shuffled = list(points)
    random.shuffle(shuffled)
    assert pareto_front(shuffled, lambda p: p) == front
    assert pareto_front(front, lambda p: p) == front
    sizes, losses = [p[0] for p in front], [p[1] for p in front]
    assert sizes == sorted(set(sizes))
    assert losses == sorted(set(losses), reverse=True)


def test_of_equal_points_the_first_is_kept() -> None:
    assert pareto_front(["late", "ab", "cd"], lambda word: (len(word), 1.0)) == ["ab"]


def test_a_front_of_nothing_is_empty() -> None:
    assert pareto_front([], lambda p: p) == []
    assert pareto_front([(nan, 1.0), (1.0, nan), (inf, 0.0)], lambda p: p) == []


def test_points_may_come_from_a_generator() -> None:
    assert pareto_front(((x, 9 - x) for x in (3.0, 1.0)), lambda p: p) == [(1, 8), (3, 6)]


@given(clouds, whole)
@settings(deadline=None, max_examples=200)
def test_the_pick_is_the_lowest_loss_that_fits_and_of_equals_the_smallest(
    points: list[Pair], limit: float
) -> None:
    pick = best_under(points, lambda p: p, limit)
    fitting = [p for p in points if p[0] <= limit and isfinite(p[1])]
    if not fitting:
        assert pick is None
        return
    assert pick is not None
    lowest = min(p[1] for p in fitting)
    assert pick == (min(p[0] for p in fitting if p[1] == lowest), lowest)


@given(finite_clouds, whole)
@settings(deadline=None, max_examples=100)
def test_the_pick_is_on_the_front(points: list[Pair], limit: float) -> None:
    pick = best_under(points, lambda p: p, limit)
    assert pick is None or pick in pareto_front(points, lambda p: p)


def test_a_point_of_just_the_limit_fits() -> None:
    assert best_under([(10, 1.0), (11, 0.5)], lambda p: p, 10) == (10, 1.0)
    assert best_under([(10, 1.0)], lambda p: p, 9) is None
