"""Moves keep the budget, spend it, and prefer what the predictor likes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from synthetic import make_space, middle

from mpsearch.moves import Moves


@pytest.fixture
def moves() -> Moves:
    return Moves(make_space())


def some_levels(moves: Moves, rng: np.random.Generator) -> np.ndarray:
    return np.array([rng.integers(top + 1) for top in moves.top])


def test_size_and_tables_are_those_of_the_space(moves: Moves) -> None:
    space = make_space()
    top = np.array(moves.top)
    assert moves.size(np.zeros_like(top)) == space.stored_bytes(space.smallest)
    assert moves.size(top) == space.stored_bytes(space.largest)
    numbers = {
        (name, fmt.name): float(10 * row + level)
        for row, name in enumerate(moves.names)
        for level, fmt in enumerate(space.options[name])
    }
    assert np.array_equal(moves.table(numbers)[:, 2], 10 * np.arange(len(top)) + 2)
    assert moves.of_pairs(moves.table(numbers)) == numbers


def test_switches_and_crossings_fit_and_leave_no_room_for_what_was_not_lowered(
    moves: Moves,
) -> None:
    rng = np.random.default_rng(0)
    limit = middle(make_space())
    rates = moves.rates(rng.normal(size=(len(moves.names), 4)))
    for _ in range(50):
        one, other = some_levels(moves, rng), some_levels(moves, rng)
        for child in (
            moves.switch(rng, one, limit, rates),
            moves.cross(rng, (one, other), limit, rates),
        ):
            assert moves.size(child) <= limit
            assert ((child >= 0) & (child <= moves.top)).all()


def test_a_crossing_of_what_fits_takes_each_level_from_a_parent_or_raises_it(moves: Moves) -> None:
    rng = np.random.default_rng(1)
    limit = moves.size(np.array(moves.top))
    one, other = np.zeros(len(moves.names), dtype=int), np.ones(len(moves.names), dtype=int)
    rates = moves.rates(np.zeros((len(one), 4)))
    assert np.array_equal(moves.cross(rng, (one, one), moves.size(one), rates), one)
    tight = moves.size(other) - 1
    child = moves.cross(rng, (one, other), tight, rates)
    assert moves.size(child) <= tight
    assert moves.size(moves.cross(rng, (one, other), limit, rates)) == limit


def test_groups_with_the_best_predicted_trade_are_raised_most(moves: Moves) -> None:
    rng = np.random.default_rng(2)
    low = np.zeros(len(moves.names), dtype=int)
    changes = np.zeros((len(low), 4))
    changes[4] = [0.0, -9.0, -9.0, -9.0]
    rates = moves.rates(changes)
    limit = moves.size(low) + int(np.diff(moves.stored_bytes[:, :2], axis=1).max())
    raised: Counter[int] = Counter()
    for _ in range(100):
        raised.update(np.flatnonzero(moves.switch(rng, low, limit, rates)).tolist())
    assert raised.most_common(1)[0][0] == 4
    assert raised[4] > 50


def test_formats_of_equal_size_are_no_wall() -> None:
    space = make_space(groups=3, formats=("int4-g64", "int4-g64-asym", "int8-g64"))
    moves = Moves(space)
    moves.stored_bytes[:, 1] = moves.stored_bytes[:, 0]
    moves._step_bytes = {step: moves._step(moves.stored_bytes, step) for step in (+1, -1)}
    rates = moves.rates(np.zeros((3, 3)))
    low = np.zeros(3, dtype=int)
    child = moves.switch(np.random.default_rng(0), low, moves.size(np.array(moves.top)), rates)
    assert np.array_equal(child, moves.top)


def test_where_even_the_smallest_does_not_fit_the_smallest_comes_back(moves: Moves) -> None:
    rng = np.random.default_rng(3)
    rates = moves.rates(np.zeros((len(moves.names), 4)))
    assert not moves.switch(rng, np.array(moves.top), 0, rates).any()
