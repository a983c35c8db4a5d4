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

from collections import Counter
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any
from zlib import crc32

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.storages import InMemoryStorage
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from mpsearch.allocate import check_damage, feasible, knapsack
from mpsearch.errors import InfeasibleError, UsageError
from mpsearch.formats import nearest
from mpsearch.moves import Moves
from mpsearch.predict import Centre, Foresight, Predictor, curvature, foresight
from mpsearch.space import ResolvedSpace
from mpsearch.trials import (
    KILLED,
    SLOPES,
    Measured,
    Slopes,
    distributions,
    is_ours,
    levels_of,
    measured,
    parents_within,
    slopes_of,
)

SAMPLERS = ("level-switch", "nsga2", "tpe")
_LOOSE = 0.05  # share of proposals at another size than the budget, to cover the front
_LEAPS = 0.5  # share of proposals that are leaps, where slopes are known
_CAUTION = 0.1, 4.0  # range of the weight of what a leap's distance may cost
_DRAWS = 20  # until a leap leads where no trial has been,
_ALIKE = 3  # or so many to the same old place: they take a second each among a thousand groups
_RENEWED = 6  # trials after which slopes are measured again, at a better place
_PROPOSAL = "level-switch:levels"  # of a trial whose parameters are not written yet
_ALONE = Lock()  # of threads that share a study, one proposes at a time


class LevelSwitchSampler(BaseSampler):
    """Proposes assignments for studies whose values are (a loss in nats, stored bytes).

    It works with the damage table alone, and several times better with slopes, which whoever runs
    the trials measures where `due` says so, and hands over with `record`. What a trial had, however
    it ended, is not proposed again, unless its attribute `trials.KILLED` says that it was cut off.
    Enqueue whole assignments: the rest of a partly enqueued trial is chosen as if nothing were
    fixed, so it may exceed the budget. An objective suggests every group from its formats, smallest
    first, as `trials.distributions` lists them.

    Args:
        space: groups, formats and sizes.
        damage: `(group, format)` to predicted loss; what is predicted before any trial.
        budget_bytes: stored bytes that most proposals stay within.
        seed: with the number of finished trials it decides a proposal.
        max_text_kl_nats: text KL that proposals should stay within, by what the trials' constraint
            says; None for no limit.
    Raises:
        CheckError: a damage is missing, NaN or infinite.
        InfeasibleError: the budget is below the smallest assignment.
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
        if budget_bytes < (floor := space.stored_bytes(space.smallest)):
            raise InfeasibleError(
                f"budget {budget_bytes:,} bytes: the smallest assignment takes {floor:,}; raise it "
                "or allow smaller formats"
            )
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
        if study.directions != [StudyDirection.MINIMIZE] * 2:
            named = ", ".join(direction.name.lower() for direction in study.directions)
            raise UsageError(
                f"the study's directions are {named}, and the level-switch sampler needs two: "
                "answer loss and stored bytes, both minimized"
            )
        if fixed := [name for name in self._moves.names if name not in search_space]:
            raise UsageError(
                f"'{fixed[0]}' is held fixed by another sampler, and the level-switch sampler "
                "keeps the budget only over all groups; give that group one format in the space"
            )
        with _ALONE:
            levels = self._next(study, trial)
            # Other processes see it before its parameters are written.
            study._storage.set_trial_system_attr(trial._trial_id, _PROPOSAL, levels.tolist())
        return {
            name: formats[level]
            for name, formats, level in zip(
                self._moves.names, self._moves.formats, levels, strict=True
            )
        }

    def _check(self, study: Study, others: Sequence[FrozenTrial]) -> None:
        """Refuse studies in which no proposal could be kept, or none is measured as proposed."""
        names = self._moves.names
        for trial in others:
            if trial.state not in (TrialState.COMPLETE, TrialState.PRUNED):
                continue
            missing = [name for name in names if name not in trial.params]
            proposed = len(trial.system_attrs.get(_PROPOSAL, ())) == len(names)
            if proposed and 0 < len(missing) < len(names):
                raise UsageError(
                    f"trial {trial.number} was measured without '{missing[0]}', so no budget was "
                    "kept; suggest every group, and give that one a single format in the space"
                )
        if isinstance(study._storage, InMemoryStorage):
            return
        # Other storages compare with the first trial that has the name.
        for name, ours in distributions(self._space).items():
            first = next((t for t in others if name in t.distributions), None)
            if first is not None and (theirs := first.distributions[name]) != ours:
                raise UsageError(
                    f"trial {first.number} chose '{name}' by {theirs}, and this space has {ours}; "
                    "a stored study keeps one choice a name, so add only trials of this space, or "
                    "use a new study"
                )

    def _next(self, study: Study, trial: FrozenTrial) -> NDArray[Any]:
        """The levels that a trial gets."""
        others = [t for t in study.get_trials(deepcopy=False) if t.number != trial.number]
        self._check(study, others)
        running = [t for t in others if t.state == TrialState.RUNNING]
        ended = [
            t
            for t in others
            if t.state.is_finished() and KILLED not in t.user_attrs and is_ours(self._moves, t)
        ]
        begun = sum(t.number < trial.number for t in running)
        rng = np.random.default_rng([self._seed, len(ended), begun])
        seen = {
            levels_of(self._moves, t.params).tobytes()
            for t in (*running, *ended)
            if is_ours(self._moves, t)
        }
        seen |= {np.array(t.system_attrs.get(_PROPOSAL, ()), dtype=int).tobytes() for t in running}
        return self._propose(rng, measured(self._moves, study), slopes_of(self._moves, study), seen)

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Parameters that are not ours are left at random."""
        rng = np.random.default_rng([self._seed, trial.number, crc32(param_name.encode())])
        independent = optuna.samplers.RandomSampler(seed=int(rng.integers(2**31)))
        return independent.sample_independent(study, trial, param_name, param_distribution)

    # -------------------------------------------------------------------- slopes

    def due(self, study: Study, times: int = 1) -> FrozenTrial | None:
        """The trial at which slopes should be measured next, or None for now.

        That is the best one within the budget, first at once, later when six trials have passed.

        Args:
            times: how often one trial's slopes may be measured, each time on other facts.
        """
        known, slopes = measured(self._moves, study), slopes_of(self._moves, study)
        best = next(iter(parents_within(known, self._budget_bytes)), None)
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
        finished = len(measured(self._moves, study))
        content = {"after": finished, "nats": table, "fact_tokens": fact_tokens}
        time = self.times_measured(study, trial.number)
        study.set_user_attr(f"{SLOPES}{trial.number}.{time}", content)

    def times_measured(self, study: Study, number: int) -> int:
        """How often slopes have been measured at a trial."""
        return len(slopes_of(self._moves, study).get(number, ()))

    def foresight(self, study: Study) -> Foresight | None:
        """How well trials within the budget were predicted by what was known before each.

        Of those after the first slopes, if there are any; None below three of them.
        """
        known, slopes = measured(self._moves, study), slopes_of(self._moves, study)
        first = min((after for of_trial in slopes.values() for after, _ in of_trial), default=0)
        rows = []
        for place, trial in enumerate(known[first:], first):
            before = known[:place]
            parents = parents_within(before, self._budget_bytes)
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

    def _centre(
        self, parents: Sequence[Measured], slopes: Slopes
    ) -> tuple[Measured, NDArray[Any] | None]:
        """Where the predictor stands: the best parent that has slopes, or else the best."""
        for trial in parents:
            tables = [table for _, table in slopes.get(trial.number, ()) if table is not None]
            if tables:
                return trial, np.mean(tables, axis=0)
        return parents[0], None

    def _predictor(
        self, known: Sequence[Measured], centre: tuple[Measured, NDArray[Any] | None]
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
        known: Sequence[Measured],
        slopes: Slopes,
        seen: set[bytes],
    ) -> NDArray[Any]:
        """A feasible assignment that no trial has had; an old one only where none is left."""
        smallest: NDArray[Any] = np.zeros(len(self._moves.names), dtype=int)
        limit = self._budget_bytes
        if rng.random() < _LOOSE:
            floor = self._moves.size(smallest)
            limit = int(floor + (self._budget_bytes - floor) * rng.uniform(0.3, 1.0))
        parents = parents_within(known, limit)
        above = parents_within(known, self._budget_bytes)
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
        """What a draw likes best, held back by more or less caution; None if it is never new."""
        doubt = curvature(self._damage, parent)
        old: Counter[bytes] = Counter()
        for _ in range(_DRAWS):
            caution = float(np.exp(rng.uniform(*np.log(_CAUTION))))
            changes = predictor.table(rng) + caution * doubt
            of_pairs = self._moves.of_pairs(changes)
            levels = levels_of(self._moves, knapsack(self._space, of_pairs, [limit])[0])
            if (key := levels.tobytes()) not in seen:
                return levels
            old[key] += 1
            if old[key] == _ALIKE:
                break
        return None

    def _last(self, seen: set[bytes]) -> NDArray[Any]:
        """One of the few that are left; the smallest where none is."""
        for assignment in feasible(self._space, self._budget_bytes):
            if (levels := levels_of(self._moves, assignment)).tobytes() not in seen:
                return levels
        return np.zeros(len(self._moves.names), dtype=int)

    def _text_table(self, known: Sequence[Measured], centre: Measured) -> NDArray[Any] | None:
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
