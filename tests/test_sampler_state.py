"""All state is in the study: resumed, killed, shared by workers, begun by another run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from threading import Barrier
from time import sleep
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
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
from mpsearch.errors import InfeasibleError, UsageError
from mpsearch.samplers import LevelSwitchSampler
from mpsearch.space import ResolvedSpace
from mpsearch.trials import HOPELESS_LOSS, KILLED, SLOPES, distributions


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
    trial.set_user_attr(KILLED, True)
    killed.tell(trial, state=TrialState.FAIL)
    assert dropped == whole[6]
    assert pieces + explore(killed, space, loss, 6) == whole


@pytest.mark.filterwarnings("ignore:.*failed with value")
@pytest.mark.parametrize(
    ("state", "values"),
    [(TrialState.FAIL, None), (TrialState.PRUNED, None), (None, [float("inf"), 1.0])],
)
def test_what_failed_was_pruned_or_lost_infinitely_much_is_not_proposed_again(
    state: TrialState | None, values: list[float] | None
) -> None:
    space, damage = make_space(), make_damage(make_space())
    study = new_study(LevelSwitchSampler(space, damage, middle(space), seed=0))
    every = explore(study, space, true_loss(space, damage, 0), 3)
    for _ in range(10):
        trial, assignment = ask(study, space)
        study.tell(trial, values, state=state)
        every.append(assignment)
    assert len(set(every)) == 13


def test_workers_that_ask_before_others_told_get_different_assignments() -> None:
    space = make_space()
    study = new_study(LevelSwitchSampler(space, make_damage(space), middle(space), seed=0))
    proposals = [ask(study, space)[1] for _ in range(8)]
    assert len(set(proposals)) == 8


def test_workers_that_ask_at_the_same_moment_get_different_assignments() -> None:
    space, damage = make_space(), make_damage(make_space())
    sampler, every = LevelSwitchSampler(space, damage, middle(space), 0), distributions(space)
    study = new_study(sampler)
    explore(study, space, true_loss(space, damage, 0), 10)
    begun = [study.ask() for _ in range(4)]  # by each worker, before any has its parameters
    proposals = [
        tuple(sampler.sample_relative(study, study.trials[trial.number], every).values())
        for trial in begun
    ]
    assert len(set(proposals)) == 4


def test_threads_that_share_a_study_propose_one_after_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    space, damage = make_space(), make_damage(make_space())
    study = new_study(LevelSwitchSampler(space, damage, middle(space), seed=0))
    propose, within, met = LevelSwitchSampler._next, [0, 0], Barrier(4, timeout=30)

    def counted(*arguments: Any) -> Any:
        within[0] += 1
        within[1] = max(within)
        sleep(0.01)
        levels = propose(*arguments)
        within[0] -= 1
        return levels

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        met.wait()
        chosen = {
            name: trial.suggest_categorical(name, [fmt.name for fmt in formats])
            for name, formats in space.options.items()
        }
        return true_loss(space, damage, 0)(Assignment.of(chosen)), 1.0

    monkeypatch.setattr(LevelSwitchSampler, "_next", counted)
    study.optimize(objective, n_trials=12, n_jobs=4)
    assert len({tuple(trial.params.items()) for trial in study.trials}) == 12
    assert within == [0, 1]


def test_trials_of_another_space_in_the_study_are_passed_over() -> None:
    space, other = make_space(groups=3), make_space(groups=2)
    study = new_study(LevelSwitchSampler(space, make_damage(space), middle(space), seed=0))
    study.add_trial(finished(other, other.largest, [0.0, 1.0]))
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


@pytest.mark.parametrize("directions", [["minimize"], ["minimize", "maximize"], ["minimize"] * 3])
def test_a_study_of_other_objectives_is_refused(directions: list[str]) -> None:
    space = make_space(2)
    sampler = LevelSwitchSampler(space, make_damage(space), middle(space), 0)
    study = optuna.create_study(directions=directions, sampler=sampler)
    said = rf"directions are {', '.join(directions)}, and .* needs two: answer loss and stored"
    with pytest.raises(UsageError, match=said):
        study.ask(distributions(space))


def test_a_budget_below_the_smallest_assignment_is_refused() -> None:
    space = make_space()
    floor = space.stored_bytes(space.smallest)
    LevelSwitchSampler(space, make_damage(space), floor, 0)
    with pytest.raises(InfeasibleError, match=f"smallest assignment takes {floor:,}"):
        LevelSwitchSampler(space, make_damage(space), floor - 1, 0)


def test_an_objective_that_leaves_a_group_out_is_refused_at_the_next_proposal() -> None:
    space = make_space(3)
    study = new_study(LevelSwitchSampler(space, make_damage(space), middle(space), 0))
    names = list(space.options)

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        for name in names[:-1]:
            trial.suggest_categorical(name, distributions(space)[name].choices)
        return 1.0, 1.0

    said = f"trial 0 was measured without '{names[-1]}'.*suggest every group.*single format"
    with pytest.raises(UsageError, match=said):
        study.optimize(objective, n_trials=2)
    assert len([t for t in study.trials if t.state == TrialState.COMPLETE]) == 1


def test_a_stored_study_with_other_formats_is_refused_with_the_way_out(tmp_path: Path) -> None:
    space, few = make_space(), make_space(formats=("int2-g64", "int5-g64"))
    storage = JournalStorage(JournalFileBackend(str(tmp_path / "journal.log")))
    sampler = LevelSwitchSampler(space, make_damage(space), middle(space), 0)
    study = optuna.create_study(storage=storage, directions=["minimize"] * 2, sampler=sampler)
    study.add_trial(finished(space, space.largest, [1.0, 1.0]))
    explore(study, space, true_loss(space, make_damage(space), 0), 2)
    other = optuna.create_study(storage=storage, directions=["minimize"] * 2, sampler=sampler)
    other.add_trial(finished(few, few.largest, [1.0, 1.0]))
    with pytest.raises(UsageError, match=r"trial 0 chose .* add only trials of this space"):
        other.ask(distributions(space))


@pytest.mark.parametrize(
    "content",
    [
        {"after": 6, "table": [[0.0]]},
        [1.0],
        {"after": 6, "nats": [[0.0], [0.0, 1.0]]},
        {"after": "six", "nats": None},
        None,
    ],
)
def test_slopes_and_losses_that_another_version_wrote_are_passed_over(content: object) -> None:
    space, damage = make_space(), make_damage(make_space())
    study = new_study(LevelSwitchSampler(space, damage, middle(space), seed=0))
    whole = new_study(LevelSwitchSampler(space, damage, middle(space), seed=0))
    loss = true_loss(space, damage, 0)
    for each in (study, whole):
        explore(each, space, loss, 3)
        for value in (None, "much"):
            trial, _ = ask(each, space)
            if each is study:
                trial.set_user_attr(HOPELESS_LOSS, value)
            each.tell(trial, state=TrialState.PRUNED)
    study.set_user_attr(f"{SLOPES}0.0", content)
    study.set_user_attr(f"{SLOPES}best", {"after": 1, "nats": None})
    nan = np.full((len(space.groups), 4), np.nan).tolist()
    study.set_user_attr(f"{SLOPES}1.0", {"after": 1, "nats": nan})
    assert explore(study, space, loss, 4) == explore(whole, space, loss, 4)


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_group_that_another_sampler_holds_fixed_is_refused_with_the_way_out() -> None:
    space = make_space(3)
    held = space.groups[1].name
    ours = LevelSwitchSampler(space, make_damage(space), middle(space), 0)
    study = new_study(optuna.samplers.PartialFixedSampler({held: "int2-g64"}, ours))
    with pytest.raises(UsageError, match=f"'{held}' is held fixed.*one format in the space"):
        study.ask(distributions(space))


def test_parameters_beside_ours_are_drawn_each_for_itself() -> None:
    space = make_space(2)
    study = new_study(LevelSwitchSampler(space, make_damage(space), middle(space), 0))
    drawn = []
    for _ in range(20):
        trial, _ = ask(study, space)
        drawn.append([trial.suggest_float(name, 0.0, 1.0) for name in ("ab", "cd")])
    of = np.array(drawn)
    assert len(np.unique(of)) == 40
    assert abs(np.corrcoef(of.T)[0, 1]) < 0.6
