"""The Optuna sampler: level switches that keep the budget.

A proposal takes a parent near the front, raises a few groups by one level, and lowers others until
it fits the budget again: every trial is feasible, and every trial spends the same bytes in another
way. Of many such children one is chosen by a model of the loss that starts from the damage table
and is corrected by every trial; where text KL is limited, a second such model says which children
keep to it. All state is read from the study, so a resumed search goes on as if
it had never stopped, and several workers can share one study.

Sources: level switch mutation, EvoPress (arXiv:2410.14649); choice by posterior sampling, Thompson
(1933); a draw from a Gaussian process by Matheron's rule (Wilson et al., arXiv:2002.09309).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from mpsearch.allocate import check_damage, feasible
from mpsearch.errors import UsageError
from mpsearch.formats import nearest
from mpsearch.space import ResolvedSpace

SAMPLERS = ("level-switch", "nsga2", "tpe")
OVER_TEXT_KL = "over_text_kl_nats"  # a trial's constraint: its text KL minus the limit
_LOOSE = 0.1  # share of proposals at another size than the budget, to cover the front
_CHILDREN = 64  # of which one is proposed
_ATTEMPTS = 200
_NEAR = 1.5  # trials up to this much above the best loss, as a share of it, teach the model
_LEAST_NATS = 0.1  # the scale of losses where they are near zero or below it
_LEAST_FACTOR = 0.1  # from predicted damage to loss; never negative, more damage is no gain
_DOUBT = 0.7  # prior standard deviation of a predicted damage, as a share of it
_MISFIT = 0.03  # of the additive model, as a share of the best loss
_RAISED = (0.4, 0.3, 0.2, 0.1)  # chances of raising one to four groups
_ELITE = 0.5  # chance that the best parent is taken, then the next, and so on


def distributions(space: ResolvedSpace) -> dict[str, BaseDistribution]:
    """One categorical choice a group, over its format names, smallest first."""
    return {
        name: CategoricalDistribution([fmt.name for fmt in formats])
        for name, formats in space.options.items()
    }


@dataclass(frozen=True, eq=False)
class _Trial:
    """A finished one: answer loss, size, a level a group, text KL minus its limit or 0."""

    loss: float
    stored_bytes: int
    levels: NDArray[Any]
    over_text_kl: float


class LevelSwitchSampler(BaseSampler):
    """Proposes assignments for studies whose values are (answer loss, stored bytes).

    Args:
        space: groups, formats and sizes.
        damage: `(group, format)` to predicted loss; weighs which groups to raise and lower.
        budget_bytes: stored bytes that most proposals stay within.
        seed: with the number of finished trials it decides a proposal.
        max_text_kl_nats: text KL that proposals should stay within, by what the trials' constraint
            says; None for no limit.
    Raises:
        CheckError: a damage is missing, NaN or infinite.
    """

    def __init__(
        self,
        space: ResolvedSpace,
        damage: Mapping[tuple[str, str], float],
        budget_bytes: int,
        seed: int,
        max_text_kl_nats: float | None = None,
    ):
        check_damage(space, damage)
        self._space = space
        self._seed = seed
        self._max_text_kl = max_text_kl_nats
        self._budget_bytes = budget_bytes
        self._kept_bytes = space.kept_bytes
        self._names = [group.name for group in space.groups]
        self._formats = [[fmt.name for fmt in space.options[name]] for name in self._names]
        # (groups, levels), padded to the right with the last level
        depth = max(len(formats) for formats in self._formats)
        self._top = np.array([len(formats) - 1 for formats in self._formats])
        self._bytes = np.array(
            [
                [space.options[group.name][min(level, top)].stored_bytes(group)
                 for level in range(depth)]
                for group, top in zip(space.groups, self._top, strict=True)
            ]
        )  # fmt: skip
        self._damage = np.array(
            [
                [damage[name, formats[min(level, len(formats) - 1)]] for level in range(depth)]
                for name, formats in zip(self._names, self._formats, strict=True)
            ]
        )
        self._groups = np.arange(len(self._names))
        # What going a level up (+1) or down (-1) changes, `(groups, levels)` of damage and bytes.
        self._changes = {}
        for direction in (+1, -1):
            other = np.clip(np.arange(depth) + direction, 0, self._top[:, None])
            self._changes[direction] = tuple(
                np.take_along_axis(table, other, axis=1) - table
                for table in (self._damage, self._bytes)
            )

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return {
            name: CategoricalDistribution(formats)
            for name, formats in zip(self._names, self._formats, strict=True)
        }

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if len(study.directions) != 2:
            raise UsageError(
                f"the study has {len(study.directions)} objective, and the level-switch sampler "
                "needs two: answer loss and stored bytes, both minimized"
            )
        others = [t for t in study.get_trials(deepcopy=False) if t.number != trial.number]
        done = [t for t in others if t.state == TrialState.COMPLETE and self._ours(t)]
        running = [t for t in others if t.state == TrialState.RUNNING and self._ours(t)]
        refused = [t for t in others if "refused" in t.user_attrs and self._ours(t)]
        rng = np.random.default_rng([self._seed, len(done) + len(refused), len(running)])
        seen = {self._levels(t).tobytes() for t in (*done, *running, *refused)}
        levels = self._propose(rng, done, seen)
        return {
            name: formats[level]
            for name, formats, level in zip(self._names, self._formats, levels, strict=True)
        }

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Parameters that are not ours are left at random."""
        rng = np.random.default_rng([self._seed, trial.number, len(param_name)])
        independent = optuna.samplers.RandomSampler(seed=int(rng.integers(2**31)))
        return independent.sample_independent(study, trial, param_name, param_distribution)

    def _ours(self, trial: FrozenTrial) -> bool:
        return all(
            trial.params.get(name) in formats
            for name, formats in zip(self._names, self._formats, strict=True)
        )

    def _levels(self, trial: FrozenTrial) -> NDArray[Any]:
        return self._levels_of(trial.params)

    def _levels_of(self, assignment: Mapping[str, str]) -> NDArray[Any]:
        return np.array(
            [
                formats.index(assignment[name])
                for name, formats in zip(self._names, self._formats, strict=True)
            ]
        )

    def _size(self, levels: NDArray[Any]) -> int:
        return self._kept_bytes + int(self._bytes[self._groups, levels].sum())

    def _propose(
        self, rng: np.random.Generator, done: list[FrozenTrial], seen: set[bytes]
    ) -> NDArray[Any]:
        """A feasible assignment that no trial has had; an old one only where none is left."""
        known = [
            _Trial(t.values[0], self._size(levels), levels, t.constraints.get(OVER_TEXT_KL, 0.0))
            for t in done
            for levels in [self._levels(t)]
            if isfinite(t.values[0])
        ]
        smallest: NDArray[Any] = np.zeros(len(self._names), dtype=int)
        limit = self._budget_bytes
        if rng.random() < _LOOSE:
            floor = self._size(smallest)
            limit = int(floor + (self._budget_bytes - floor) * rng.uniform(0.3, 1.0))
        fitting = sorted(
            (t for t in known if t.stored_bytes <= limit),
            key=lambda t: (t.loss, t.stored_bytes, t.levels.tobytes()),
        )
        # Parents keep the limit of text KL; while no trial does, the nearest come first.
        parents = [t for t in fitting if t.over_text_kl <= 0]
        parents = parents or sorted(fitting, key=lambda t: t.over_text_kl)
        children: dict[bytes, NDArray[Any]] = {}
        child = smallest
        for _ in range(_ATTEMPTS):
            parent = smallest
            if parents:
                parent = parents[min(int(rng.geometric(_ELITE)) - 1, len(parents) - 1)].levels
            child = self._switch(rng, parent, limit)
            if child.tobytes() not in seen:
                children[child.tobytes()] = child
            if len(children) == _CHILDREN:
                break
        if not children:  # few are left, or none
            for assignment in feasible(self._space, self._budget_bytes):
                levels = self._levels_of(assignment)
                if levels.tobytes() not in seen:
                    return levels
        if not parents or not children:
            return next(iter(children.values()), child)
        groups = np.arange(len(self._names))
        tried = np.array([t.levels for t in fitting])
        losses = np.array([t.loss for t in fitting])
        drawn = self._draw_losses(rng, losses, tried, parents[0].loss)
        if self._max_text_kl is None:
            return min(children.values(), key=lambda levels: float(drawn[groups, levels].sum()))
        limit_nats = self._max_text_kl
        text = np.array([t.over_text_kl for t in fitting]) + limit_nats
        text_drawn = self._draw_losses(rng, text, tried, max(limit_nats, float(text.min())))

        def beyond_then_loss(levels: NDArray[Any]) -> tuple[float, float]:
            beyond = float(text_drawn[groups, levels].sum()) - limit_nats
            return max(beyond, 0.0), float(drawn[groups, levels].sum())

        return min(children.values(), key=beyond_then_loss)

    def _draw_losses(
        self,
        rng: np.random.Generator,
        losses: NDArray[Any],
        levels: NDArray[Any],
        best: float,
    ) -> NDArray[Any]:
        """One draw of every (group, level)'s loss from its posterior, `(groups, levels)` in nats.

        The loss of an assignment is modelled as a sum over groups. A group's prior mean is its
        predicted damage times one factor for all, which the trials fix; its standard deviation is
        a share of that mean. The draw is a prior draw corrected by the residuals that it leaves on
        the trials (Matheron's rule).

        Args:
            losses: `(trials,)` in nats, of facts or of text.
            levels: `(trials, groups)`.
            best: trials not far above this teach the model.
        """
        groups = np.arange(len(self._names))
        near = losses <= best + _NEAR * max(abs(best), _LEAST_NATS)
        losses, levels = losses[near], levels[near]
        predicted = self._damage[groups, levels].sum(1)
        ratio = float(np.median(losses / np.maximum(predicted, 1e-12)))
        factor = max(ratio, _LEAST_FACTOR)
        spread = _DOUBT * factor * self._damage
        noise = _MISFIT * max(abs(float(losses.min())), _LEAST_NATS)

        draw = factor * self._damage + spread * rng.standard_normal(spread.shape)
        observed = draw[groups, levels].sum(1) + noise * rng.standard_normal(len(losses))
        variance = spread**2
        # Two trials share the doubt of the groups in which they agree.
        agree = levels[:, None, :] == levels[None, :, :]
        gram = (agree * variance[groups, levels][:, None, :]).sum(-1) + noise**2 * np.eye(
            len(losses)
        )
        pull = np.linalg.solve(gram, losses - observed)
        for trial, weight in zip(levels, pull, strict=True):
            draw[groups, trial] += variance[groups, trial] * weight
        return draw

    def _switch(self, rng: np.random.Generator, parent: NDArray[Any], limit: int) -> NDArray[Any]:
        """Raise a few groups, lower others until it fits, then spend what is left."""
        levels = parent.copy()
        raised = rng.choice(len(_RAISED), p=_RAISED) + 1
        moved = np.zeros(len(levels), dtype=bool)
        for _ in range(raised):
            if (group := self._draw(rng, levels, +1, ~moved)) is not None:
                levels[group] += 1
                moved[group] = True
        size = self._size(levels)
        while size > limit:
            group = self._draw(rng, levels, -1, ~moved)
            if group is None:  # nothing else can go lower: give back a raise
                group = self._draw(rng, levels, -1, np.ones_like(moved))
            if group is None:
                break
            size += int(self._changes[-1][1][group, levels[group]])
            levels[group] -= 1
        while True:
            steps = self._steps(levels, +1)[1]
            room = (levels < self._top) & (size + steps <= limit) & (levels >= parent)
            if (group := self._draw(rng, levels, +1, room)) is None:
                return levels
            size += int(self._changes[+1][1][group, levels[group]])
            levels[group] += 1

    def _steps(self, levels: NDArray[Any], direction: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Change of damage and of bytes if each group went one level in a direction."""
        damage, stored_bytes = self._changes[direction]
        return damage[self._groups, levels], stored_bytes[self._groups, levels]

    def _draw(
        self, rng: np.random.Generator, levels: NDArray[Any], direction: int, allowed: NDArray[Any]
    ) -> int | None:
        """A group that can move, half the time any, else likelier the better the predictor's trade.

        The weight is the square root of predicted damage per byte, saved when raising and its
        inverse when lowering: the predictor ranks well, and exaggerates at 2 bits.
        """
        damage, step_bytes = self._steps(levels, direction)
        movable = np.flatnonzero(allowed & (step_bytes != 0))
        if not movable.size:
            return None
        if rng.random() < 0.5:
            return int(rng.choice(movable))
        rate = np.abs(damage[movable]) / np.abs(step_bytes[movable])
        weight = np.sqrt(np.maximum(rate, rate.max() * 1e-6 + 1e-30)) ** direction
        below = weight.cumsum()  # the inverse of the distribution function, as choice() does it
        return int(movable[np.searchsorted(below[:-1], rng.random() * below[-1], side="right")])


def make_sampler(
    name: str,
    space: ResolvedSpace,
    damage: Mapping[tuple[str, str], float],
    budget_bytes: int,
    seed: int,
    max_text_kl_nats: float | None = None,
) -> BaseSampler:
    """A sampler by name. Raises `UsageError` for an unknown one.

    Optuna's own read the budget and the limit of text KL from each trial's constraints.
    """
    if name == "level-switch":
        return LevelSwitchSampler(space, damage, budget_bytes, seed, max_text_kl_nats)
    if name == "nsga2":
        return optuna.samplers.NSGAIISampler(population_size=20, seed=seed)
    if name == "tpe":
        return optuna.samplers.TPESampler(seed=seed)
    raise UsageError(f"no sampler '{name}'{nearest(name, SAMPLERS)}")
