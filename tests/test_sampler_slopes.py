"""The sampler with slopes, and what it makes of trials that were stopped early."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from optuna.study import Study
from optuna.trial import TrialState
from synthetic import (
    Damage,
    ask,
    conflict,
    explore,
    explore_limited,
    make_space,
    middle,
    new_study,
)

from mpsearch import samplers
from mpsearch.allocate import knapsack
from mpsearch.assignment import Assignment
from mpsearch.errors import CheckError
from mpsearch.samplers import LevelSwitchSampler
from mpsearch.space import ResolvedSpace
from mpsearch.trials import HOPELESS_LOSS, KILLED, distributions, levels_of, measured


class Quadratic:
    """A loss with slopes: `|sum of the groups' errors|^2`, whose damage table sees no sums."""

    def __init__(self, space: ResolvedSpace, seed: int):
        rng = np.random.default_rng(seed)
        self.errors = {
            (name, fmt.name): rng.normal(size=5) * 2.5 ** -(fmt.bits - 2) * scale
            for name, formats in space.options.items()
            for scale in [rng.lognormal(0.0, 0.5)]
            for fmt in formats
        }
        self.damage = {pair: float(error @ error) for pair, error in self.errors.items()}

    def loss(self, assignment: Mapping[str, str]) -> float:
        total = np.sum([self.errors[pair] for pair in assignment.items()], axis=0)
        return float(total @ total)

    def slopes(self, assignment: Mapping[str, str]) -> Damage:
        total = np.sum([self.errors[pair] for pair in assignment.items()], axis=0)
        return {
            (name, fmt): float(2 * total @ (error - self.errors[name, assignment[name]]))
            for (name, fmt), error in self.errors.items()
        }


def begun(seed: int) -> tuple[ResolvedSpace, Quadratic, LevelSwitchSampler, Study]:
    """A study without trials, and the world that it is of."""
    space = make_space()
    world = Quadratic(space, seed)
    sampler = LevelSwitchSampler(space, world.damage, middle(space), 0)
    return space, world, sampler, new_study(sampler)


def sloping(space: ResolvedSpace, world: Quadratic | Additive, seed: int, trials: int) -> Study:
    """A study whose slopes are measured whenever they are due."""
    sampler = LevelSwitchSampler(space, world.damage, middle(space), seed)
    study = new_study(sampler)
    for _ in range(trials):
        if (due := sampler.due(study)) is not None:
            sampler.record(study, due, world.slopes(due.params), fact_tokens=7)
        explore(study, space, world.loss, 1)
    return study


def best_within(study: Study, budget: int) -> float:
    return min(t.values[0] for t in study.trials if t.values[1] <= budget)


def test_slopes_find_lower_losses_with_the_same_number_of_trials() -> None:
    space = make_space(groups=24)
    plain, sloped = [], []
    for seed in range(3):
        world = Quadratic(space, seed)
        sampler = LevelSwitchSampler(space, world.damage, middle(space), seed)
        study = new_study(sampler)
        explore(study, space, world.loss, 30)
        plain.append(best_within(study, middle(space)))
        sloped.append(best_within(sloping(space, world, seed, 30), middle(space)))
    assert np.mean(sloped) < 0.7 * np.mean(plain)


def test_slopes_are_due_at_the_best_trial_and_again_after_six_at_a_better_one() -> None:
    space, world, sampler, study = begun(0)
    assert sampler.due(study) is None
    explore(study, space, world.loss, 3)
    first = sampler.due(study)
    assert first is not None
    assert first.values[0] == best_within(study, middle(space))
    sampler.record(study, first, world.slopes(first.params))
    assert sampler.due(study) is None
    for told in range(1, 40):
        explore(study, space, world.loss, 1)
        again = sampler.due(study)
        best = best_within(study, middle(space))
        if told < 6 or best == first.values[0]:
            assert again is None
        else:
            assert again is not None
            assert again.values[0] == best < first.values[0]
            return
    pytest.fail("no better trial in forty")


def test_slopes_are_not_measured_twice_at_one_trial() -> None:
    space, world, sampler, study = begun(0)
    explore(study, space, world.loss, 3)
    due = sampler.due(study)
    assert due is not None
    sampler.record(study, due, world.slopes(due.params))
    explore(study, space, lambda assignment: 100 + world.loss(assignment), 12)
    assert sampler.due(study) is None


def test_slopes_of_other_facts_are_due_where_the_first_brought_nothing() -> None:
    space, world, sampler, study = begun(0)
    explore(study, space, world.loss, 3)
    first = sampler.due(study, times=2)
    assert first is not None
    sampler.record(study, first, world.slopes(first.params))
    assert sampler.times_measured(study, first.number) == 1
    for told in range(1, 8):
        explore(study, space, lambda assignment: 100 + world.loss(assignment), 1)
        again = sampler.due(study, times=2)
        assert again is None if told < 6 else again is not None and again.number == first.number
    sampler.record(study, first, world.slopes(first.params))
    assert sampler.times_measured(study, first.number) == 2
    explore(study, space, lambda assignment: 100 + world.loss(assignment), 8)
    assert sampler.due(study, times=2) is None


def test_slopes_of_two_halves_propose_what_their_mean_proposes() -> None:
    space, world, sampler, study = begun(0)
    explore(study, space, world.loss, 3)
    due = sampler.due(study)
    assert due is not None
    mean = world.slopes(due.params)
    noise = np.random.default_rng(0).normal(0.0, 0.5, len(mean))
    apart = {key: float(value) for key, value in zip(mean, noise, strict=True)}

    def after(*measured: Damage) -> list[Mapping[str, str]]:
        copy = new_study(sampler)
        copy.add_trials(study.trials)
        for slopes in measured:
            sampler.record(copy, due, slopes)
        return [*explore(copy, space, world.loss, 4)]

    one, other = ({key: mean[key] + sign * apart[key] for key in mean} for sign in (1, -1))
    assert after(one, other) == after(mean)
    assert after(one) != after(mean)


def test_workers_that_leap_at_the_same_moment_get_different_assignments() -> None:
    for seed in range(5):
        space, world, sampler, study = begun(seed)
        explore(study, space, world.loss, 8)
        due = sampler.due(study)
        assert due is not None
        sampler.record(study, due, world.slopes(due.params))
        trials = [study.ask() for _ in range(4)]  # by each worker, before any has its parameters
        proposals = {
            tuple(sampler.sample_relative(study, study.trials[t.number], every).values())
            for t in trials
            for every in [distributions(space)]
        }
        assert len(proposals) == 4


def test_a_leap_that_leads_to_one_old_place_is_given_up_after_three_draws(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    space, world, sampler, study = begun(0)
    explore(study, space, world.loss, 8)
    due = sampler.due(study)
    assert due is not None
    sampler.record(study, due, world.slopes(due.params))
    asked = 0

    def always_the_same(*_: object) -> list[Mapping[str, str]]:
        nonlocal asked
        asked += 1
        return [due.params]

    monkeypatch.setattr(samplers, "knapsack", always_the_same)
    monkeypatch.setattr(samplers, "_LEAPS", 1.0)
    assert ask(study, space)[1] not in {Assignment.of(t.params) for t in study.trials[:-1]}
    assert asked == 3


def test_slopes_that_could_not_be_measured_are_not_asked_for_again() -> None:
    space, world, sampler, study = begun(0)
    explore(study, space, world.loss, 2)
    due = sampler.due(study)
    assert due is not None
    with pytest.raises(CheckError, match=r"the slope of 'model\.layers\.0\..* is nan"):
        sampler.record(study, due, dict.fromkeys(world.slopes(due.params), float("nan")))
    sampler.record(study, due, {})
    assert sampler.due(study) is None
    assert explore(study, space, world.loss, 3)


def test_a_fresh_sampler_reads_slopes_from_the_study() -> None:
    space = make_space()
    world = Quadratic(space, 1)
    study = sloping(space, world, 0, 12)
    trial, proposal = ask(study, space)
    trial.set_user_attr(KILLED, True)
    study.tell(trial, state=TrialState.FAIL)
    study.sampler = LevelSwitchSampler(space, world.damage, middle(space), 0)
    assert ask(study, space)[1] == proposal


def test_foresight_is_of_trials_after_the_first_slopes_and_beats_the_table() -> None:
    space = make_space(groups=24)
    world = Quadratic(space, 0)
    study = sloping(space, world, 0, 30)
    sampler = LevelSwitchSampler(space, world.damage, middle(space), 0)
    found = sampler.foresight(study)
    assert found is not None
    within = [t for t in study.trials[1:] if t.values[1] <= middle(space)]
    assert found.trials == len(within)
    assert found.error_nats < found.table_error_nats
    assert f"{found.error_nats:.3f} nats" in str(found)
    assert sampler.foresight(new_study(sampler)) is None


def test_a_stopped_trial_teaches_is_no_parent_and_is_not_proposed_again() -> None:
    space = make_space()
    world = Quadratic(space, 2)
    study = new_study(LevelSwitchSampler(space, world.damage, middle(space), 0))
    explore(study, space, world.loss, 4)
    trial, stopped = ask(study, space)
    trial.set_user_attr(HOPELESS_LOSS, -5.0)  # as if it were the best by far
    study.tell(trial, state=TrialState.PRUNED)
    sampler = LevelSwitchSampler(space, world.damage, middle(space), 0)
    due = sampler.due(study)
    assert due is not None
    assert due.params != dict(stopped)
    assert len(measured(sampler._moves, study)) == 5
    assert stopped not in explore(study, space, world.loss, 20)


def test_an_attribute_of_a_trial_that_a_kill_failed_does_not_count() -> None:
    space, _, sampler, study = begun(2)
    trial, _ = ask(study, space)
    trial.set_user_attr(HOPELESS_LOSS, 1.0)
    study.tell(trial, state=TrialState.FAIL)
    assert not measured(sampler._moves, study)


class Additive:
    """A loss that is a sum over groups, which slopes tell and the damage table does not."""

    def __init__(self, space: ResolvedSpace, seed: int):
        rng = np.random.default_rng(seed)
        self.true = {
            (name, fmt.name): scale * 2.5 ** -(fmt.bits - 2)
            for name, formats in space.options.items()
            for scale in [rng.lognormal(0.0, 1.0)]
            for fmt in formats
        }
        self.damage = dict.fromkeys(self.true, 0.01)

    def loss(self, assignment: Mapping[str, str]) -> float:
        return sum(self.true[pair] for pair in assignment.items())

    def slopes(self, assignment: Mapping[str, str]) -> Damage:
        return {
            (name, fmt): value - self.true[name, assignment[name]]
            for (name, fmt), value in self.true.items()
        }


def above_the_optimum(trials: int) -> float:
    """Of studies' best, in the mean, as a share of the least loss there is."""
    space = make_space(groups=120)
    shares = []
    for seed in range(3):
        world = Additive(space, seed)
        (least,) = knapsack(space, world.true, [middle(space)])
        best = best_within(sloping(space, world, seed, trials), middle(space))
        shares.append(best / world.loss(least) - 1)
    return float(np.mean(shares))


def test_leaps_find_at_once_what_steps_reach_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    leaping = above_the_optimum(8)
    monkeypatch.setattr(samplers, "_LEAPS", 0.0)
    assert leaping < 0.1
    assert above_the_optimum(8) > 3 * leaping


@pytest.mark.parametrize("limited", [True, False])
def test_a_leap_that_would_break_the_limit_of_text_kl_is_not_taken(
    limited: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    space, damage, loss, text = conflict()
    limit = text(space.smallest) / 10
    sampler = LevelSwitchSampler(
        space, damage, middle(space), 0, max_text_kl_nats=limit if limited else None
    )
    study = new_study(sampler)
    explore_limited(study, space, loss, text, limit, 12)
    due = sampler.due(study)
    assert due is not None
    sampler.record(study, due, dict.fromkeys(damage, 0.0))
    leap = levels_of(sampler._moves, space.smallest)
    monkeypatch.setattr(samplers, "_LEAPS", 1.0)
    monkeypatch.setattr(LevelSwitchSampler, "_leap", lambda *_: leap)
    _, proposed = ask(study, space)
    assert (proposed == space.smallest) == (not limited)
