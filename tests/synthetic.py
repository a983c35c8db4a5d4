"""Studies of made-up losses, for samplers: small spaces, damages, and what is measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import optuna
from optuna.samplers import BaseSampler
from optuna.study import Study

from mpsearch.assignment import Assignment
from mpsearch.layers import Layer
from mpsearch.space import ResolvedSpace, SearchSpace
from mpsearch.targets import TARGETS
from mpsearch.trials import OVER_TEXT_KL, distributions

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


def true_loss(space: ResolvedSpace, damage: Damage, seed: int) -> Loss:
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


def explore(study: Study, space: ResolvedSpace, loss: Loss, trials: int) -> list[Assignment]:
    """Ask and tell; returns the proposals in order."""
    proposals = []
    for _ in range(trials):
        trial, assignment = ask(study, space)
        study.tell(trial, [loss(assignment), float(space.stored_bytes(assignment))])
        proposals.append(assignment)
    return proposals


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


def conflict() -> tuple[ResolvedSpace, Damage, Loss, Loss]:
    """Facts are lost in the first half of the groups, text in the second."""
    space = make_space()
    damage = make_damage(space)
    names = list(space.options)

    def lost(of: list[str]) -> Loss:
        return lambda assignment: sum(damage[name, assignment[name]] for name in of)

    return space, damage, lost(names[:5]), lost(names[5:])


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
