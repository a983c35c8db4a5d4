"""The front: dominance by brute force, area by counting, the pick by looking at every point."""

from __future__ import annotations

from math import inf, isfinite, nan

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpsearch.front import best_under, dominates, hypervolume, pareto_front

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


@pytest.mark.parametrize(
    ("a", "b", "answer"),
    [
        ((1, 1), (2, 2), True),
        ((1, 2), (2, 2), True),
        ((2, 1), (2, 2), True),
        ((2, 2), (2, 2), False),
        ((1, 3), (2, 2), False),
        ((3, 1), (2, 2), False),
        ((2, 2), (1, 1), False),
        ((1, nan), (2, 2), False),
        ((1, 1), (2, nan), False),
    ],
)
def test_dominance_is_nowhere_worse_and_somewhere_better(a: Pair, b: Pair, answer: bool) -> None:
    assert dominates(a, b) is answer


def test_points_of_unlike_length_are_not_compared() -> None:
    with pytest.raises(ValueError):
        dominates((1, 2), (1, 2, 3))


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


def test_hypervolume_by_hand() -> None:
    assert hypervolume([(1, 4), (3, 2)], (5, 5)) == (5 - 1) * (5 - 4) + (5 - 3) * (4 - 2)


@given(finite_clouds, st.tuples(whole, whole))
@settings(deadline=None, max_examples=200)
def test_hypervolume_counts_the_cells_between_points_and_reference(
    points: list[Pair], reference: Pair
) -> None:
    cells = sum(
        any(x <= column and y <= row for x, y in points)
        for column in range(int(reference[0]))
        for row in range(int(reference[1]))
    )
    assert hypervolume(points, reference) == cells


@given(finite_clouds, st.tuples(whole, whole))
@settings(deadline=None, max_examples=100)
def test_another_point_never_shrinks_the_hypervolume(points: list[Pair], point: Pair) -> None:
    before, after = hypervolume(points, (9, 9)), hypervolume([*points, point], (9, 9))
    assert after >= before
    assert (after > before) is not any(p[0] <= point[0] and p[1] <= point[1] for p in points)


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
