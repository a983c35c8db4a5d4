"""The sampler on synthetic studies: feasible, new, thrifty, better than chance, stateless."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import TrialState

import mpsearch.moves
import mpsearch.samplers
from mpsearch.allocate import feasible, knapsack
from mpsearch.assignment import Assignment
from mpsearch.errors import CheckError, UsageError
from mpsearch.formats import FORMATS
from mpsearch.layers import Layer
from mpsearch.moves import Moves
from mpsearch.samplers import (
    OVER_TEXT_KL,
    SAMPLERS,
    LevelSwitchSampler,
    distributions,
    make_sampler,
)
from mpsearch.space import ResolvedSpace, SearchSpace
from mpsearch.targets import TARGETS

optuna.logging.set_verbosity(optuna.logging.WARNING)
Damage = dict[tuple[str, str], float]
Loss = Callable[[Assignment], float]
KEPT_BYTES = 5000
EVERY_FORMAT = ("int2-g64", "int3-g64", "int4-g64", "int8-g64")


@dataclass(frozen=True)
class Shapes:
    """Layers without a model."""

    layers: tuple[Layer, ...]
    kept_bytes: int = KEPT_BYTES


def make_space(groups: int = 10, formats: tuple[str, ...] = EVERY_FORMAT) -> ResolvedSpace:
    """Groups of three sizes, none of them tied."""
    layers = tuple(
        Layer(f"model.layers.{i}.mlp.down_proj", 64, 64 * (1 + i % 3)) for i in range(groups)
    )
    return SearchSpace(TARGETS["compressed-tensors"], formats).resolve(Shapes(layers))


def make_damage(space: ResolvedSpace, seed: int = 0) -> Damage:
    """Falls by a factor of about five a bit, from a different start in each group."""
    rng = np.random.default_rng(seed)
    start = {group.name: float(rng.lognormal(0.0, 1.5)) for group in space.groups}
    return {
        (name, fmt.name): start[name] * 5.0 ** -(fmt.bits - 2)
        for name, formats in space.options.items()
        for fmt in formats
    }


def true_loss(space: ResolvedSpace, damage: Damage, seed: int) -> Callable[[Assignment], float]:
    """What the predictor says, off by a factor a group, plus neighbours that hurt each other."""
    rng = np.random.default_rng(100 + seed)
    off = {group.name: float(rng.lognormal(0.0, 0.7)) for group in space.groups}
    names = [group.name for group in space.groups]

    def loss(assignment: Mapping[str, str]) -> float:
        alone = [damage[name, assignment[name]] * off[name] for name in names]
        together = sum(2.0 * np.sqrt(a * b) for a, b in pairwise(alone))
        return float(sum(alone) + together)

    return loss


def middle(space: ResolvedSpace, part: float = 0.4) -> int:
    floor, ceiling = space.stored_bytes(space.smallest), space.stored_bytes(space.largest)
    return int(floor + part * (ceiling - floor))


def new_study(sampler: BaseSampler) -> Study:
    return optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)


def ask(study: Study, space: ResolvedSpace) -> tuple[optuna.Trial, Assignment]:
    trial = study.ask(distributions(space))
    params = trial.params  # a copy at each access
    return trial, Assignment.of({name: params[name] for name in space.options})


def explore(
    study: Study, space: ResolvedSpace, loss: Callable[[Assignment], float], trials: int
) -> list[Assignment]:
    """Ask and tell; returns the proposals in order."""
    proposals = []
    for _ in range(trials):
        trial, assignment = ask(study, space)
        study.tell(trial, [loss(assignment), float(space.stored_bytes(assignment))])
        proposals.append(assignment)
    return proposals


def largest_step_bytes(space: ResolvedSpace) -> int:
    return max(
        high.stored_bytes(group) - low.stored_bytes(group)
        for group in space.groups
        for low, high in pairwise(space.options[group.name])
    )


@pytest.mark.parametrize("part", [0.0, 0.05, 0.4, 0.9])
def test_every_proposal_fits_the_budget_and_is_new(part: float) -> None:
    space = make_space()
    damage = make_damage(space)
    budget = middle(space, part)
    sampler = LevelSwitchSampler(space, damage, budget, seed=0)
    proposals = explore(new_study(sampler), space, true_loss(space, damage, 0), 20 if part else 1)
    assert all(space.allows(proposal) for proposal in proposals)
    assert max(space.stored_bytes(proposal) for proposal in proposals) <= budget
    assert len(set(proposals)) == len(proposals)


def test_a_budget_above_everything_is_served_too() -> None:
    space = make_space(groups=4)
    damage = make_damage(space)
    budget = 10 * space.stored_bytes(space.largest)
    sampler = LevelSwitchSampler(space, damage, budget, seed=0)
    proposals = explore(new_study(sampler), space, true_loss(space, damage, 0), 20)
    assert space.largest in proposals


def test_proposals_at_the_budget_spend_it_up_to_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpsearch.samplers, "_LOOSE", 0.0)
    space = make_space()
    damage = make_damage(space)
    for seed in range(2):
        for part in (0.2, 0.6):
            budget = middle(space, part)
            sampler = LevelSwitchSampler(space, damage, budget, seed)
            proposals = explore(new_study(sampler), space, true_loss(space, damage, seed), 12)
            unspent = [budget - space.stored_bytes(proposal) for proposal in proposals]
            assert max(unspent) < largest_step_bytes(space)


def test_most_proposals_are_at_the_budget_and_some_cover_the_front_below_it() -> None:
    space = make_space()
    damage = make_damage(space)
    budget = middle(space)
    sampler = LevelSwitchSampler(space, damage, budget, seed=0)
    proposals = explore(new_study(sampler), space, true_loss(space, damage, 0), 40)
    step = largest_step_bytes(space)
    at_budget = sum(budget - space.stored_bytes(proposal) < step for proposal in proposals)
    assert 0.6 * 40 <= at_budget <= 0.95 * 40


def random_feasible(space: ResolvedSpace, budget: int, seed: int, trials: int) -> list[Assignment]:
    rng = np.random.default_rng(1000 + seed)
    found: list[Assignment] = []
    while len(found) < trials:
        assignment = Assignment.of(
            {name: fmts[rng.integers(len(fmts))].name for name, fmts in space.options.items()}
        )
        if space.stored_bytes(assignment) <= budget and assignment not in found:
            found.append(assignment)
    return found


@cache
def best_found(informed: bool, seed: int, sign: int = 1, trials: int = 30) -> float:
    """The least true loss among the sampler's proposals; it is told `sign` times the loss."""
    space = make_space()
    damage = make_damage(space)
    loss = true_loss(space, damage, seed)
    told = damage if informed else dict.fromkeys(damage, 1.0)
    study = new_study(LevelSwitchSampler(space, told, middle(space), seed))
    proposals = explore(study, space, lambda assignment: sign * loss(assignment), trials)
    return min(map(loss, proposals))


@pytest.mark.parametrize("informed", [True, False])
def test_it_beats_random_feasible_proposals_with_the_same_number_of_trials(informed: bool) -> None:
    space = make_space()
    damage = make_damage(space)
    ours = [best_found(informed, seed) for seed in range(3)]
    chance = [
        min(map(true_loss(space, damage, seed), random_feasible(space, middle(space), seed, 30)))
        for seed in range(3)
    ]
    # A predictor that is right up to a factor helps; with none, what was measured still does.
    assert np.mean(ours) < (0.6 if informed else 0.8) * np.mean(chance)


def test_it_follows_measurements_so_that_inverted_ones_mislead_it() -> None:
    honest = [best_found(False, seed) for seed in range(3)]
    misled = [best_found(False, seed, sign=-1) for seed in range(3)]
    assert np.mean(honest) < 0.7 * np.mean(misled)


def test_it_improves_on_what_was_enqueued() -> None:
    space = make_space()
    damage = make_damage(space)
    budget = middle(space)
    loss = true_loss(space, damage, 3)
    study = new_study(LevelSwitchSampler(space, damage, budget, seed=0))
    first = random_feasible(space, budget, 0, 5)
    for assignment in first:
        study.enqueue_trial(dict(assignment))
    proposals = explore(study, space, loss, 30)
    assert proposals[:5] == first
    assert min(map(loss, proposals[5:])) < 0.7 * min(map(loss, first))


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


def test_every_feasible_assignment_is_proposed_before_any_is_repeated() -> None:
    space = make_space(4, ("int2-g64", "int4-g64", "int8-g64"))
    damage = make_damage(space)
    every = set(feasible(space, middle(space)))
    study = new_study(LevelSwitchSampler(space, damage, middle(space), seed=0))
    assert 20 < len(every) < 60
    assert set(explore(study, space, true_loss(space, damage, 0), len(every))) == every


def test_several_group_sizes_are_searched_though_a_larger_one_may_hurt_more() -> None:
    space = make_space(formats=("int3-g64", "int3-g32", "int4-g64", "int4-g32"))
    damage = {
        key: hurt * (3.0 if key[1] == "int3-g32" else 1.0)  # a larger format that hurts more
        for key, hurt in make_damage(space).items()
    }
    for seed in range(2):
        loss = true_loss(space, damage, seed)
        study = new_study(LevelSwitchSampler(space, damage, middle(space), seed))
        proposals = explore(study, space, loss, 30)
        assert len(set(proposals)) == 30
        best = min(proposals, key=loss)
        (exact,) = knapsack(space, damage, [middle(space)])
        chance = min(map(loss, random_feasible(space, middle(space), seed, 30)))
        assert loss(best) < 0.8 * chance
        assert loss(best) <= 1.2 * loss(exact)


def explore_limited(
    study: Study, space: ResolvedSpace, loss: Loss, text: Loss, limit: float, trials: int
) -> list[Assignment]:
    """Like `explore`, with text KL above a limit as a constraint of each trial."""
    proposals = []
    for _ in range(trials):
        trial, assignment = ask(study, space)
        trial.set_constraint(OVER_TEXT_KL, text(assignment) - limit)
        study.tell(trial, [loss(assignment), float(space.stored_bytes(assignment))])
        proposals.append(assignment)
    return proposals


def conflict() -> tuple[ResolvedSpace, Damage, Loss, Loss]:
    """Facts are lost in the first half of the groups, text in the second."""
    space = make_space()
    damage = make_damage(space)
    names = list(space.options)

    def lost(of: list[str]) -> Loss:
        return lambda assignment: sum(damage[name, assignment[name]] for name in of)

    return space, damage, lost(names[:5]), lost(names[5:])


def test_a_limit_of_text_kl_is_kept_by_most_proposals_and_facts_are_still_won() -> None:
    space, damage, loss, text = conflict()
    budget = middle(space)
    free = explore(new_study(LevelSwitchSampler(space, damage, budget, 0)), space, loss, 24)
    limit = float(np.median([text(a) for a in free])) / 3
    sampler = LevelSwitchSampler(space, damage, budget, 0, max_text_kl_nats=limit)
    proposals = explore_limited(new_study(sampler), space, loss, text, limit, 24)
    late = slice(8, None)
    keeping = [a for a in proposals[late] if text(a) <= limit]
    assert len(keeping) >= 10
    assert len(keeping) > 2 * sum(text(a) <= limit for a in free[late])
    feasible = [a for a in random_feasible(space, budget, 0, 200) if text(a) <= limit]
    assert min(map(loss, keeping)) < min(map(loss, feasible))
    assert max(map(space.stored_bytes, proposals)) <= budget


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_parents_keep_the_limit_or_are_the_nearest_to_it(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    space, damage, loss, text = conflict()
    budget = middle(space)
    first = random_feasible(space, budget, 0, 12)
    limit = float(np.quantile([text(a) for a in first], share)) - 1e-9
    sampler = LevelSwitchSampler(space, damage, budget, 0, max_text_kl_nats=limit)
    study = new_study(sampler)
    for assignment in first:
        study.enqueue_trial(dict(assignment))
    explore_limited(study, space, loss, text, limit, len(first))
    keeping = {a for a in first if text(a) <= limit}
    assert bool(keeping) == bool(share)
    parents: set[Assignment] = set()
    switch = Moves.switch

    def watched(self: Moves, rng: Any, parent: Any, limit: int, rates: Any) -> Any:
        formats = zip(self.names, self.formats, parent, strict=True)
        parents.add(Assignment.of({name: its[level] for name, its, level in formats}))
        return switch(self, rng, parent, limit, rates)

    monkeypatch.setattr(Moves, "switch", watched)
    monkeypatch.setattr(mpsearch.samplers, "_LOOSE", 0.0)
    ask(study, space)
    assert parents
    if keeping:
        assert parents <= keeping
    else:
        assert min(first, key=text) in parents
        monkeypatch.setattr(mpsearch.moves, "_ELITE", 1.0)
        parents.clear()
        ask(study, space)
        assert parents == {min(first, key=text)}


def test_a_limit_that_every_trial_keeps_by_far_rules_out_nothing() -> None:
    space, damage, loss, text = conflict()
    sampler = LevelSwitchSampler(space, damage, middle(space), 0, max_text_kl_nats=1e9)
    proposals = explore_limited(new_study(sampler), space, loss, text, 1e9, 20)
    chance = random_feasible(space, middle(space), 0, 20)
    assert min(map(loss, proposals)) < 0.6 * min(map(loss, chance))


@pytest.mark.parametrize(
    ("groups", "formats"),
    [(1, EVERY_FORMAT), (4, ("int4-g64",)), (1, ("int4-g64",)), (2, ("int2-g64", "bf16"))],
)
def test_small_spaces_end_in_repeats_and_never_in_a_hang(
    groups: int, formats: tuple[str, ...]
) -> None:
    space = make_space(groups, formats)
    damage = make_damage(space)
    budget = space.stored_bytes(space.largest)
    study = new_study(LevelSwitchSampler(space, damage, budget, seed=0))
    proposals = explore(study, space, true_loss(space, damage, 0), 6)
    assert all(space.allows(p) and space.stored_bytes(p) <= budget for p in proposals)
    assert space.largest in proposals


@pytest.mark.parametrize("value", [0.0, 1.0, 1e-30, 1e30])
def test_equal_damage_everywhere_still_gives_new_feasible_proposals(value: float) -> None:
    space = make_space()
    damage = make_damage(space)
    flat = dict.fromkeys(damage, value)
    sampler = LevelSwitchSampler(space, flat, middle(space), seed=0)
    proposals = explore(new_study(sampler), space, true_loss(space, damage, 0), 20)
    assert len(set(proposals)) == 20
    assert max(map(space.stored_bytes, proposals)) <= middle(space)


def test_distributions_list_the_formats_of_each_group_smallest_first() -> None:
    space = make_space(groups=2)
    for name, distribution in distributions(space).items():
        assert isinstance(distribution, optuna.distributions.CategoricalDistribution)
        assert distribution.choices == EVERY_FORMAT
        group = next(g for g in space.groups if g.name == name)
        sizes = [FORMATS[str(f)].stored_bytes(group) for f in distribution.choices]
        assert sizes == sorted(sizes)


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_by_name_drives_a_study_and_is_seeded(name: str) -> None:
    space = make_space(groups=5)
    damage = make_damage(space)
    loss = true_loss(space, damage, 0)

    def propose(seed: int) -> list[Assignment]:
        study = new_study(make_sampler(name, space, damage, middle(space), seed))
        return explore(study, space, loss, 10)

    first = propose(1)
    assert all(space.allows(proposal) for proposal in first)
    assert first == propose(1)
    assert first != propose(2)


@pytest.mark.parametrize(
    ("wrong", "right"), [("level-swich", "level-switch"), ("nsga-2", "nsga2"), ("TPE", "tpe")]
)
def test_an_unknown_sampler_is_refused_with_the_nearest_name(wrong: str, right: str) -> None:
    space = make_space(groups=1)
    with pytest.raises(UsageError, match=f"'{wrong}'.*{right}"):
        make_sampler(wrong, space, make_damage(space), middle(space), 0)


def test_a_thousand_groups_get_a_feasible_proposal() -> None:
    space = make_space(1000)
    damage = make_damage(space)
    budget_bytes = middle(space)
    sampler = LevelSwitchSampler(space, damage, budget_bytes, seed=0)
    study = new_study(sampler)
    for assignment in knapsack(space, damage, [budget_bytes, int(budget_bytes * 0.9)]):
        study.add_trial(
            optuna.create_trial(
                params=dict(assignment),
                distributions=distributions(space),
                values=[1.0, float(space.stored_bytes(assignment))],
            )
        )
    _, proposed = ask(study, space)
    assert space.allows(proposed)
    assert space.stored_bytes(proposed) <= budget_bytes


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
def test_a_damage_that_is_no_number_is_named(bad: float | None) -> None:
    space = make_space(3)
    damage = make_damage(space)
    key = ("model.layers.1.mlp.down_proj", "int3-g64")
    if bad is None:
        del damage[key]
    else:
        damage[key] = bad
    with pytest.raises(CheckError, match=r"layers\.1\.mlp\.down_proj' in int3-g64 is"):
        LevelSwitchSampler(space, damage, middle(space), 0)
