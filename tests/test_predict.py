"""The predictor: exact where it must be, better with slopes, honest about its error."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mpsearch.predict import Centre, Foresight, Predictor, foresight

GROUPS, LEVELS = 12, 4


class World:
    """Losses that are a sum over groups plus a quadratic form that slopes see and damage does not.

    Attributes:
        errors: `(groups, levels, 6)`: what each level does to six outputs.
    """

    def __init__(self, seed: int):
        rng = np.random.default_rng(seed)
        size = rng.lognormal(0.0, 0.5, GROUPS)[:, None] * 3.0 ** -np.arange(LEVELS)
        self.errors = size[:, :, None] * rng.normal(size=(GROUPS, LEVELS, 6)) / np.sqrt(6)
        self.damage = (self.errors**2).sum(-1)  # each alone, none with another
        self.rng = rng

    def loss(self, levels: Any) -> float:
        return float((self.errors[np.arange(GROUPS), levels].sum(0) ** 2).sum())

    def slopes(self, levels: Any) -> Any:
        here = self.errors[np.arange(GROUPS), levels]
        return ((self.errors - here[:, None]) * 2 * here.sum(0)).sum(-1)

    def neighbours(self, levels: Any, count: int, moves: int = 3) -> Any:
        found = np.tile(levels, (count, 1))
        for row in found:
            for group in self.rng.choice(GROUPS, moves, replace=False):
                row[group] = self.rng.integers(LEVELS)
        return found


def none(world: World) -> tuple[Any, Any]:
    return np.zeros((0, GROUPS), dtype=int), np.zeros(0)


def error(predictor: Predictor, world: World, levels: Any) -> float:
    predicted = np.array([predictor.loss_nats(row) for row in levels])
    return float(np.sqrt(np.mean((predicted - [world.loss(row) for row in levels]) ** 2)))


@pytest.mark.parametrize("with_slopes", [False, True])
def test_it_is_exact_at_its_centre(with_slopes: bool) -> None:
    world = World(0)
    levels = np.ones(GROUPS, dtype=int)
    slopes = world.slopes(levels) if with_slopes else None
    centre = Centre(levels, world.loss(levels), slopes)
    trials = world.neighbours(levels, 5)
    losses = np.array([world.loss(row) for row in trials])
    predictor = Predictor(centre, world.damage, trials, losses)
    assert predictor.loss_nats(levels) == pytest.approx(world.loss(levels), abs=1e-12)
    drawn = predictor.table(np.random.default_rng(0))
    assert np.all(drawn[np.arange(GROUPS), levels] == 0)


def test_slopes_predict_better_than_damage_after_a_few_trials() -> None:
    errors: dict[bool, list[float]] = {False: [], True: []}
    for seed in range(5):
        world = World(seed)
        levels = world.rng.integers(0, 2, GROUPS)
        for with_slopes, found in errors.items():
            slopes = world.slopes(levels) if with_slopes else None
            centre = Centre(levels, world.loss(levels), slopes)
            trials = np.random.default_rng(seed).permuted(np.tile(levels, (10, 1)), axis=1)
            losses = np.array([world.loss(row) for row in trials])
            predictor = Predictor(centre, world.damage, trials, losses)
            found.append(error(predictor, world, world.neighbours(levels, 40)))
    assert np.mean(errors[True]) < 0.85 * np.mean(errors[False])


@pytest.mark.parametrize("with_slopes", [False, True])
def test_trials_correct_it_where_it_has_not_been(with_slopes: bool) -> None:
    before, after = [], []
    for seed in range(5):
        world = World(seed)
        levels = world.rng.integers(0, 2, GROUPS)
        slopes = world.slopes(levels) if with_slopes else None
        centre = Centre(levels, world.loss(levels), slopes)
        trials, unseen = world.neighbours(levels, 60), world.neighbours(levels, 40)
        losses = np.array([world.loss(row) for row in trials])
        before.append(error(Predictor(centre, world.damage, *none(world)), world, unseen))
        after.append(error(Predictor(centre, world.damage, trials, losses), world, unseen))
    assert np.mean(after) < 0.8 * np.mean(before)


def test_a_trial_pulls_its_own_prediction_more_than_that_of_others() -> None:
    world = World(1)
    levels = np.ones(GROUPS, dtype=int)
    centre = Centre(levels, 5.0, np.zeros((GROUPS, LEVELS)))
    damage = np.full((GROUPS, LEVELS), 0.5)
    moved, other = levels.copy(), levels.copy()
    moved[3], other[7] = 0, 0
    plain = Predictor(centre, damage, *none(world))
    taught = Predictor(centre, damage, np.array([moved]), np.array([5.0]))
    assert plain.loss_nats(moved) == plain.loss_nats(other) > 5.5
    assert 5.0 < taught.loss_nats(moved) < taught.loss_nats(other) < plain.loss_nats(other)


def test_draws_spread_around_the_mean_and_less_where_a_trial_has_been() -> None:
    world = World(2)
    levels = np.ones(GROUPS, dtype=int)
    moved = levels.copy()
    group = int(np.abs(world.slopes(levels)[:, 0]).argmax())
    moved[group] = 0
    centre = Centre(levels, 10.0, world.slopes(levels))
    plain = Predictor(centre, world.damage, *none(world))
    expected = np.array([plain.loss_nats(moved)])
    taught = Predictor(centre, world.damage, np.array([moved]), expected)
    rng = np.random.default_rng(0)

    def spread(predictor: Predictor) -> float:
        return float(np.std([predictor.table(rng)[group, 0] for _ in range(3000)]))

    drawn = np.mean([plain.table(rng) for _ in range(300)], axis=0)
    assert np.allclose(drawn, plain.table(), atol=0.1 * np.abs(plain.table()).max())
    assert spread(taught) < 0.9 * spread(plain)


def test_without_slopes_losses_far_above_the_centre_do_not_teach() -> None:
    world = World(3)
    levels = np.ones(GROUPS, dtype=int)
    far = np.array([np.zeros(GROUPS, dtype=int)])
    plain = Predictor(Centre(levels, 1.0), world.damage, *none(world)).table()
    taught = Predictor(Centre(levels, 1.0), world.damage, far, np.array([100.0])).table()
    assert np.array_equal(plain, taught)


def test_with_slopes_a_bad_surprise_teaches_however_low_the_centre_is() -> None:
    levels = np.ones(GROUPS, dtype=int)
    slopes = np.zeros((GROUPS, LEVELS))
    slopes[:, 0] = -1.0
    damage = np.full((GROUPS, LEVELS), 0.2)
    moved = levels.copy()
    moved[:3] = 0
    plain = Predictor(Centre(levels, 0.1, slopes), damage, *none(World(0)))
    taught = Predictor(Centre(levels, 0.1, slopes), damage, np.array([moved]), np.array([2.0]))
    assert plain.loss_nats(moved) < 0.2
    assert taught.loss_nats(moved) > 1.0


def test_equal_damage_everywhere_leaves_numbers_finite() -> None:
    levels = np.ones(GROUPS, dtype=int)
    trials = np.array([np.zeros(GROUPS, dtype=int)])
    for value in (0.0, 1.0):
        damage = np.full((GROUPS, LEVELS), value)
        found = Predictor(Centre(levels, 0.0), damage, trials, np.array([0.05])).table()
        assert np.isfinite(found).all()


def test_foresight_of_perfect_predictions_and_of_a_table_that_ranks_backwards() -> None:
    measured = [1.0, 2.0, 4.0]
    rows = [(loss, -loss, loss) for loss in measured]
    found = foresight(rows)
    assert found == Foresight(3, 0.0, pytest.approx(1.0), pytest.approx(84**0.5 / 3**0.5), -1.0)
    assert foresight(rows[:2]) is None
