"""All state is in the study: resumed, killed, shared by workers, begun by another run."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import optuna
import pytest
from optuna.study import Study
from optuna.trial import TrialState
from synthetic import (
    ask,
    conflict,
    explore,
    make_damage,
    make_space,
    middle,
    new_study,
    random_feasible,
    true_loss,
)

from mpsearch.assignment import Assignment
from mpsearch.errors import UsageError
from mpsearch.samplers import (
    LevelSwitchSampler,
    distributions,
)
from mpsearch.space import ResolvedSpace


def test_the_same_study_gives_the_same_proposal_and_another_seed_another() -> None:
    space = make_space()
    damage = make_damage(space)
    loss = true_loss(space, damage, 0)

    def propose(seed: int) -> list[Assignment]:
        return explore(
            new_study(LevelSwitchSampler(space, damage, middle(space), seed)), space, loss, 10
        )

    assert propose(7) == propose(7)
    assert propose(7) != propose(8)


def test_a_fresh_sampler_object_goes_on_where_the_old_one_stopped() -> None:
    space = make_space()
    damage = make_damage(space)
    budget = middle(space)
    loss = true_loss(space, damage, 0)

    def sampler() -> LevelSwitchSampler:
        return LevelSwitchSampler(space, damage, budget, seed=5)

    whole = explore(new_study(sampler()), space, loss, 16)
    study = new_study(sampler())
    pieces = explore(study, space, loss, 5)
    for count in (1, 4, 6):
        study.sampler = sampler()
        pieces += explore(study, space, loss, count)
    assert pieces == whole


def test_a_trial_that_a_kill_failed_leaves_no_trace_in_the_proposals() -> None:
    space = make_space()
    damage = make_damage(space)
    loss = true_loss(space, damage, 0)

    def study() -> Study:
        return new_study(LevelSwitchSampler(space, damage, middle(space), seed=5))

    whole = explore(study(), space, loss, 12)
    killed = study()
    pieces = explore(killed, space, loss, 6)
    trial, dropped = ask(killed, space)
    killed.tell(trial, state=TrialState.FAIL)
    assert dropped == whole[6]
    assert pieces + explore(killed, space, loss, 6) == whole


def test_a_refused_assignment_is_not_proposed_again() -> None:
    space = make_space()
    study = new_study(LevelSwitchSampler(space, make_damage(space), middle(space), seed=0))
    refused = []
    for _ in range(10):
        trial, assignment = ask(study, space)
        trial.set_user_attr("refused", "NaN")
        study.tell(trial, state=TrialState.FAIL)
        refused.append(assignment)
    assert len(set(refused)) == 10


def test_workers_that_ask_before_others_told_get_different_assignments() -> None:
    space = make_space()
    study = new_study(LevelSwitchSampler(space, make_damage(space), middle(space), seed=0))
    proposals = [ask(study, space)[1] for _ in range(8)]
    assert len(set(proposals)) == 8


def test_workers_that_ask_at_the_same_moment_get_different_assignments() -> None:
    space, damage = make_space(), make_damage(make_space())
    sampler = LevelSwitchSampler(space, damage, middle(space), seed=0)
    study = new_study(sampler)
    explore(study, space, true_loss(space, damage, 0), 10)
    begun = [study.ask() for _ in range(4)]  # by each worker, before any has its parameters
    proposals = [
        tuple(sampler.sample_relative(study, study.trials[trial.number], {}).values())
        for trial in begun
    ]
    assert len(set(proposals)) == 4


def test_trials_of_another_space_in_the_study_are_passed_over() -> None:
    space, other = make_space(groups=3), make_space(groups=2)
    study = new_study(LevelSwitchSampler(space, make_damage(space), middle(space), seed=0))
    trial = study.ask(distributions(other))
    study.tell(trial, [0.0, 1.0])
    _, assignment = ask(study, space)
    assert space.allows(assignment)


def finished(
    space: ResolvedSpace, params: Mapping[str, str], values: list[float]
) -> optuna.trial.FrozenTrial:
    return optuna.create_trial(
        params=dict(params), distributions=distributions(space), values=values
    )


def test_finished_trials_of_another_run_are_used_where_they_are_of_this_space() -> None:
    space, budget = make_space(), middle(make_space())
    damage = make_damage(space)
    loss = true_loss(space, damage, 0)
    other = explore(  # at another budget, and its sizes are those of another model
        new_study(LevelSwitchSampler(space, damage, middle(space, 0.9), 1)), space, loss, 12
    )
    few = make_space(formats=("int2-g64", "int5-g64"))
    study = new_study(LevelSwitchSampler(space, damage, budget, 0))
    for assignment in other:
        study.add_trial(finished(space, assignment, [loss(assignment), 1.0]))
    study.add_trial(finished(space, space.smallest, [float("inf"), 1.0]))
    study.add_trial(finished(few, few.largest, [-1e9, 0.0]))
    assert all(trial.constraints == {} for trial in study.trials)
    proposals = explore(study, space, loss, 20)
    assert max(map(space.stored_bytes, proposals)) <= budget
    assert len({*proposals, *other, space.smallest}) == 20 + len({*other, space.smallest})
    chance = [min(map(loss, random_feasible(space, budget, seed, 20))) for seed in range(3)]
    assert min(map(loss, proposals)) < 0.8 * np.mean(chance)


def test_a_limit_of_text_kl_takes_trials_without_that_constraint_as_keeping_it() -> None:
    space, damage, loss, _ = conflict()
    sampler = LevelSwitchSampler(space, damage, middle(space), 0, max_text_kl_nats=0.1)
    study = new_study(sampler)
    for assignment in random_feasible(space, middle(space), 0, 5):
        study.add_trial(finished(space, assignment, [loss(assignment), 1.0]))
    assert space.allows(ask(study, space)[1])


def test_optuna_itself_takes_no_trial_whose_values_are_nan() -> None:
    space = make_space(2)
    with pytest.raises(ValueError, match="NaN"):
        finished(space, space.smallest, [float("nan"), 1.0])


def test_a_study_of_one_objective_is_refused() -> None:
    space = make_space(2)
    sampler = LevelSwitchSampler(space, make_damage(space), middle(space), 0)
    study = optuna.create_study(direction="minimize", sampler=sampler)
    with pytest.raises(UsageError, match=r"has 1 objective.*needs two: answer loss and stored"):
        study.ask(distributions(space))
