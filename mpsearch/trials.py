"""What a study's trials say: their parameters as levels, what was measured, and where slopes were.

A trial is of our space if it has one of a group's formats for every group; others are passed over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from mpsearch.moves import Moves
from mpsearch.space import ResolvedSpace

OVER_TEXT_KL = "over_text_kl_nats"  # a trial's constraint: its text KL minus the limit
HOPELESS_LOSS = "hopeless_loss_nats"  # attribute of a trial that was stopped early: its estimate
KILLED = "killed"  # attribute of a trial that failed as its process ended: it may be asked again
SLOPES = "slopes "  # and a trial's number, ".", which time: the study's attribute that holds them

# By trial number, of each time: how many trials had finished, and the table of `Moves`' shape.
Slopes = dict[int, list[tuple[int, NDArray[Any] | None]]]


def distributions(space: ResolvedSpace) -> dict[str, BaseDistribution]:
    """One categorical choice a group, over its format names, smallest first."""
    return {
        name: CategoricalDistribution([fmt.name for fmt in formats])
        for name, formats in space.options.items()
    }


@dataclass(frozen=True, eq=False)
class Measured:
    """A trial that was measured.

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


def is_ours(moves: Moves, trial: FrozenTrial) -> bool:
    """Whether it is of our space; see above."""
    named = zip(moves.names, moves.formats, strict=True)
    return all(trial.params.get(name) in formats for name, formats in named)


def levels_of(moves: Moves, assignment: Mapping[str, str]) -> NDArray[Any]:
    """`(groups,)` places of an assignment's formats among those of each group."""
    named = zip(moves.names, moves.formats, strict=True)
    return np.array([formats.index(assignment[name]) for name, formats in named])


def measured(moves: Moves, study: Study) -> list[Measured]:
    """Trials with a finite loss, those that were stopped early included, in order."""
    found = []
    for trial in study.get_trials(deepcopy=False):
        whole = trial.state == TrialState.COMPLETE
        stopped = trial.state == TrialState.PRUNED and HOPELESS_LOSS in trial.user_attrs
        if not is_ours(moves, trial) or not (whole or stopped):
            continue
        loss = trial.values[0] if whole else trial.user_attrs[HOPELESS_LOSS]
        if not (isinstance(loss, int | float) and isfinite(loss)):
            continue
        levels = levels_of(moves, trial.params)
        over = trial.constraints.get(OVER_TEXT_KL, 0.0)
        found.append(Measured(trial.number, loss, moves.size(levels), levels, over, whole))
    return found


def parents_within(known: Sequence[Measured], limit: int) -> list[Measured]:
    """Those of at most so many stored bytes that were measured on all facts, best first.

    Parents keep the limit of text KL; while no trial does, the nearest come first.
    """
    fitting = sorted(
        (t for t in known if t.whole and t.stored_bytes <= limit),
        key=lambda t: (t.loss, t.stored_bytes, t.key),
    )
    allowed = [t for t in fitting if t.over_text_kl <= 0]
    return allowed or sorted(fitting, key=lambda t: t.over_text_kl)


def slopes_of(moves: Moves, study: Study) -> Slopes:
    """What was kept of slopes; what another space or another version wrote is passed over."""
    found: Slopes = {}
    for name, content in study.user_attrs.items():
        if not name.startswith(SLOPES):
            continue
        try:
            number, after = int(name[len(SLOPES) :].partition(".")[0]), int(content["after"])
            table = None if content["nats"] is None else np.array(content["nats"], dtype=float)
        except (LookupError, TypeError, ValueError):
            continue
        shape = len(moves.names), int(moves.top.max()) + 1
        if table is None or (table.shape == shape and np.isfinite(table).all()):
            found.setdefault(number, []).append((after, table))
    return found
