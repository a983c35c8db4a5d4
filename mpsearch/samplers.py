"""The Optuna sampler: level switches that keep the budget, chosen by a predictor that learns.

A proposal is a step or a leap. A step is the child of one or two parents near the front: it moves a
few groups up and others down, so every trial is feasible, and every trial spends the same bytes in
another way. Of many such children the one is proposed that a draw from the predictor's posterior
likes best. A leap, taken where slopes are known, is the assignment that such a draw likes best of
all, less what moving away from the best parent may cost. Leaps gain most at first, steps later.

The predictor is centred on the best assignment whose slopes have been measured (`slopes.py`), on
the best one until there are any. Where text KL is limited, a second predictor says which proposals
keep to it.

All state is read from the study, so a resumed search goes on as if it had never stopped, and
several workers can share one study.

Sources: choice by posterior sampling, Thompson (1933); a step that is held back where the model may
not hold, as in the methods of Levenberg (1944) and Marquardt (1963).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from mpsearch.allocate import check_damage, feasible, knapsack
from mpsearch.errors import UsageError
from mpsearch.formats import nearest
from mpsearch.moves import Moves
from mpsearch.predict import Centre, Foresight, Predictor, curvature, foresight
from mpsearch.space import ResolvedSpace

SAMPLERS = ("level-switch", "nsga2", "tpe")
OVER_TEXT_KL = "over_text_kl_nats"  # a trial's constraint: its text KL minus the limit
HOPELESS_LOSS = "hopeless_loss_nats"  # attribute of a trial that was stopped early: its estimate
SLOPES = "slopes "  # and a trial's number, ".", which time: the study's attribute that holds them
_LOOSE = 0.05  # share of proposals at another size than the budget, to cover the front
_LEAPS = 0.5  # share of proposals that are leaps, where slopes are known
_CAUTION = 0.1, 4.0  # range of the weight of what a leap's distance may cost
_DRAWS = 20  # until a leap leads where no trial has been
_RENEWED = 6  # trials after which slopes are measured again, at a better place


# By trial number, of each time: how many trials had finished, and the table of `Moves`' shape.
_Slopes = dict[int, list[tuple[int, NDArray[Any] | None]]]


def distributions(space: ResolvedSpace) -> dict[str, BaseDistribution]:
    """One categorical choice a group, over its format names, smallest first."""
    return {
        name: CategoricalDistribution([fmt.name for fmt in formats])
        for name, formats in space.options.items()
    }


@dataclass(frozen=True, eq=False)
class _Trial:
    """A finished one.

    Attributes:
        loss: in nats; an estimate where it was stopped early.
        levels: `(groups,)`.
        over_text_kl: text KL minus its limit, or 0.
        whole: whether it was measured on all facts.
    """

    number: int
    loss: float
    stored_bytes: float
    levels: NDArray[Any]
    over_text_kl: float
    whole: bool

    @cached_property
    def key(self) -> bytes:
        return self.levels.tobytes()


class LevelSwitchSampler(BaseSampler):
    """Proposes assignments for studies whose values are (a loss in nats, stored bytes).

    It works with the damage table alone, and several times better with slopes, which whoever runs
    the trials measures where `due` says so, and hands over with `record`.

    Args:
        space: groups, formats and sizes.
        damage: `(group, format)` to predicted loss; what is predicted before any trial.
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
        self._seed = seed
        self._max_text_kl = max_text_kl_nats
        self._budget_bytes = budget_bytes
        self._space = space
        self._moves = Moves(space)
        self._damage = self._moves.table(damage)

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return distributions(self._space)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if len(study.directions) != 2:
            raise UsageError(
                f"the study has {len(study.directions)} objective, and the level-switch sampler "
                "needs two: answer loss and stored bytes, both minimized"
            )
        trials = study.get_trials(deepcopy=False)
        others = [t for t in trials if t.number != trial.number and self._ours(t)]
        running = [t for t in others if t.state == TrialState.RUNNING]
        refused = [t for t in others if "refused" in t.user_attrs]
        known = self._finished(study)
        # Those of other workers too whose parameters are not written yet.
        begun = sum(t.state == TrialState.RUNNING and t.number < trial.number for t in trials)
        rng = np.random.default_rng([self._seed, len(known) + len(refused), begun])
        seen = {t.key for t in known} | {
            self._levels(t.params).tobytes() for t in (*running, *refused)
        }
        levels = self._propose(rng, known, self._slopes(study), seen)
        return {
            name: formats[level]
            for name, formats, level in zip(
                self._moves.names, self._moves.formats, levels, strict=True
            )
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

    # -------------------------------------------------------------------- slopes

    def due(self, study: Study, times: int = 1) -> FrozenTrial | None:
        """The trial at which slopes should be measured next, or None for now.

        That is the best one within the budget, first at once, later when six trials have passed.

        Args:
            times: how often one trial's slopes may be measured, each time on other facts.
        """
        known, slopes = self._finished(study), self._slopes(study)
        best = next(iter(self._parents(known, self._budget_bytes)), None)
        if best is None or len(slopes.get(best.number, ())) >= times:
            return None
        every = (after for of_trial in slopes.values() for after, _ in of_trial)
        measured_after = max(every, default=-_RENEWED)
        if len(known) - measured_after < _RENEWED:
            return None
        return next(t for t in study.get_trials(deepcopy=False) if t.number == best.number)

    def record(
        self,
        study: Study,
        trial: FrozenTrial,
        slopes: Mapping[tuple[str, str], float],
        fact_tokens: int = 0,
    ) -> None:
        """Keep what was measured at a trial, in the study; the mean is used of several times.

        Args:
            slopes: `(group, format)` to the first-order change of the loss in nats; empty if
                they could not be measured.
            fact_tokens: what it cost, kept beside it.
        Raises:
            CheckError: a slope is missing, NaN or infinite.
        """
        if slopes:
            check_damage(self._space, slopes, "slope")
        table = self._moves.table(slopes).tolist() if slopes else None
        finished = len(self._finished(study))
        content = {"after": finished, "nats": table, "fact_tokens": fact_tokens}
        time = self.times_measured(study, trial.number)
        study.set_user_attr(f"{SLOPES}{trial.number}.{time}", content)

    def times_measured(self, study: Study, number: int) -> int:
        """How often slopes have been measured at a trial."""
        return len(self._slopes(study).get(number, ()))

    def _slopes(self, study: Study) -> _Slopes:
        found: _Slopes = {}
        for name, content in study.user_attrs.items():
            if name.startswith(SLOPES):
                table = None if content["nats"] is None else np.array(content["nats"])
                if table is None or table.shape == self._damage.shape:
                    number = int(name[len(SLOPES) :].partition(".")[0])
                    found.setdefault(number, []).append((int(content["after"]), table))
        return found

    def foresight(self, study: Study) -> Foresight | None:
        """How well trials within the budget were predicted by what was known before each.

        Of those after the first slopes, if there are any; None below three of them.
        """
        known, slopes = self._finished(study), self._slopes(study)
        first = min((after for of_trial in slopes.values() for after, _ in of_trial), default=0)
        rows = []
        for place, trial in enumerate(known[first:], first):
            before = known[:place]
            parents = self._parents(before, self._budget_bytes)
            if not trial.whole or not parents or trial.stored_bytes > self._budget_bytes:
                continue
            held = {
                number: [(after, table) for after, table in of_trial if after <= place]
                for number, of_trial in slopes.items()
            }
            predictor = self._predictor(before, self._centre(parents, held))
            alone = self._damage[self._moves.groups, trial.levels].sum()
            rows.append((predictor.loss_nats(trial.levels), float(alone), trial.loss))
        return foresight(rows)

    # -------------------------------------------------------------------- the study

    def _ours(self, trial: FrozenTrial) -> bool:
        return all(
            trial.params.get(name) in formats
            for name, formats in zip(self._moves.names, self._moves.formats, strict=True)
        )

    def _levels(self, assignment: Mapping[str, str]) -> NDArray[Any]:
        return np.array(
            [
                formats.index(assignment[name])
                for name, formats in zip(self._moves.names, self._moves.formats, strict=True)
            ]
        )

    def _finished(self, study: Study) -> list[_Trial]:
        """Measured trials, those that were stopped early included, in order."""
        found = []
        for trial in study.get_trials(deepcopy=False):
            whole = trial.state == TrialState.COMPLETE
            stopped = trial.state == TrialState.PRUNED and HOPELESS_LOSS in trial.user_attrs
            if not self._ours(trial) or not (whole or stopped):
                continue
            levels = self._levels(trial.params)
            loss = trial.values[0] if whole else trial.user_attrs[HOPELESS_LOSS]
            if not isfinite(loss):
                continue
            over = trial.constraints.get(OVER_TEXT_KL, 0.0)
            size = self._moves.size(levels)
            found.append(_Trial(trial.number, loss, size, levels, over, whole))
        return found

    def _parents(self, known: Sequence[_Trial], limit: int) -> list[_Trial]:
        """Within the limit, best first.

        Parents keep the limit of text KL; while no trial does, the nearest come first.
        """
        fitting = sorted(
            (t for t in known if t.whole and t.stored_bytes <= limit),
            key=lambda t: (t.loss, t.stored_bytes, t.key),
        )
        allowed = [t for t in fitting if t.over_text_kl <= 0]
        return allowed or sorted(fitting, key=lambda t: t.over_text_kl)

    def _centre(
        self, parents: Sequence[_Trial], slopes: _Slopes
    ) -> tuple[_Trial, NDArray[Any] | None]:
        """Where the predictor stands: the best parent that has slopes, or else the best."""
        for trial in parents:
            tables = [table for _, table in slopes.get(trial.number, ()) if table is not None]
            if tables:
                return trial, np.mean(tables, axis=0)
        return parents[0], None

    def _predictor(
        self, known: Sequence[_Trial], centre: tuple[_Trial, NDArray[Any] | None]
    ) -> Predictor:
        trial, slopes = centre
        return Predictor(
            Centre(trial.levels, trial.loss, slopes),
            self._damage,
            np.array([t.levels for t in known]),
            np.array([t.loss for t in known]),
        )

    # -------------------------------------------------------------------- proposals

    def _propose(
        self,
        rng: np.random.Generator,
        known: Sequence[_Trial],
        slopes: _Slopes,
        seen: set[bytes],
    ) -> NDArray[Any]:
        """A feasible assignment that no trial has had; an old one only where none is left."""
        smallest: NDArray[Any] = np.zeros(len(self._moves.names), dtype=int)
        limit = self._budget_bytes
        if rng.random() < _LOOSE:
            floor = self._moves.size(smallest)
            limit = int(floor + (self._budget_bytes - floor) * rng.uniform(0.3, 1.0))
        parents = self._parents(known, limit)
        above = self._parents(known, self._budget_bytes)
        if not above:
            children = self._moves.children(rng, [smallest], limit, self._damage, seen)
            first = next(children, None)
            return self._last(seen) if first is None else first
        centre = self._centre(above, slopes)
        predictor = self._predictor(known, centre)
        groups = self._moves.groups
        text = self._text_table(known, centre[0])

        def beyond(child: NDArray[Any]) -> float:
            over = 0.0 if text is None else centre[0].over_text_kl + text[groups, child].sum()
            return max(float(over), 0.0)

        if limit < self._budget_bytes:  # what fits may be poor, and the best can be lowered to it
            parents = above[:1] + parents
        if centre[1] is not None and rng.random() < _LEAPS:
            leap = self._leap(rng, parents[0].levels, limit, predictor, seen)
            if leap is not None and not beyond(leap):
                return leap
        changes = predictor.table(rng)
        levels = [t.levels for t in parents]
        found = list(self._moves.children(rng, levels, limit, changes, seen))
        if not found:
            return self._last(seen)
        return min(found, key=lambda child: (beyond(child), float(changes[groups, child].sum())))

    def _leap(
        self,
        rng: np.random.Generator,
        parent: NDArray[Any],
        limit: int,
        predictor: Predictor,
        seen: set[bytes],
    ) -> NDArray[Any] | None:
        """What a draw likes best, held back by more or less caution; None if all has been tried."""
        doubt = curvature(self._damage, parent)
        for _ in range(_DRAWS):
            caution = float(np.exp(rng.uniform(*np.log(_CAUTION))))
            changes = predictor.table(rng) + caution * doubt
            of_pairs = self._moves.of_pairs(changes)
            levels = self._levels(knapsack(self._space, of_pairs, [limit])[0])
            if levels.tobytes() not in seen:
                return levels
        return None

    def _last(self, seen: set[bytes]) -> NDArray[Any]:
        """One of the few that are left; the smallest where none is."""
        for assignment in feasible(self._space, self._budget_bytes):
            if (levels := self._levels(assignment)).tobytes() not in seen:
                return levels
        return np.zeros(len(self._moves.names), dtype=int)

    def _text_table(self, known: Sequence[_Trial], centre: _Trial) -> NDArray[Any] | None:
        """What changes from the centre should do to text KL; None where that has no limit.

        No draw: among many children the one of the luckiest draw would be taken, and break it.
        """
        if (limit_nats := self._max_text_kl) is None:
            return None
        read = [t for t in known if t.whole]
        return Predictor(
            Centre(centre.levels, centre.over_text_kl + limit_nats),
            self._damage,
            np.array([t.levels for t in read]),
            np.array([t.over_text_kl + limit_nats for t in read]),
        ).table()


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
