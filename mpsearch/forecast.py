"""How long a search will take, said before it starts: tokens that are counted, at a measured pace;
and what else it needs, which `mpsearch.footprint` counts.

The pace is that of the reference on search facts, which a search asks anyway. Everything but the
weight bank is a multiple of it: an evaluation pushes its facts' distinct tokens through the model,
and its text's. It is the pace of a machine as busy as it is now.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mpsearch.sizes import format_size

_RIVALS = 3  # at most so many simple allocations are read on test facts beside the pick
_FLOOR = 0.8  # of a pass, for the noise floor of the reference


@dataclass(frozen=True)
class Needs:
    """What a search takes beside time, known before it starts.

    Attributes:
        streamed: whether the model is run block by block, or is loaded whole.
        why: in words and numbers.
        memory_bytes: at the peak, caches left out.
        disk_bytes: of the weights that the bank lacks.
        states_bytes: of hidden states, on disk where memory is short.
    """

    streamed: bool
    why: str
    memory_bytes: int
    disk_bytes: int
    states_bytes: int

    def __str__(self) -> str:
        way = "block by block" if self.streamed else "loaded whole"
        parts = [f"about {format_size(self.memory_bytes)} of memory at the peak"]
        if self.disk_bytes:
            parts.append(f"{format_size(self.disk_bytes)} of disk for the bank")
        if self.states_bytes:
            parts.append(f"{format_size(self.states_bytes)} of memory or disk for hidden states")
        return f"run {way} ({self.why}): {', '.join(parts)}"


@dataclass(frozen=True)
class Tokens:
    """Distinct tokens that one evaluation takes on each partition, text included.

    Attributes:
        sensitivity: what KL-Fisher costs, in tokens of a forward pass.
    """

    search: float
    validation: float
    test: float
    sensitivity: float


@dataclass(frozen=True)
class Plan:
    """How many assignments a search scores: simple allocations, proposals, finalists.

    Attributes:
        searched: of the simple allocations, those that are asked search facts.
        trial_cost: evaluations on all search facts that a proposal takes.
    """

    baselines: int
    searched: int
    trials: int
    finalists: int
    trial_cost: float = 1.0


@dataclass(frozen=True)
class Forecast:
    """Seconds of each part of a search that are still to come.

    Attributes:
        bank: None where it is not timed yet.
        baselines: on search and on validation facts.
        trials: how many, at most so many as the limit of time allows.
        trial: seconds of one.
        test: of test facts, and the reference's own figures.
        limit: seconds after which no more is proposed; None for no limit.
    """

    bank: float | None
    sensitivity: float
    baselines: float
    trials: int
    trial: float
    finalists: float
    test: float
    limit: float | None = None

    @property
    def by_stage(self) -> dict[str, float]:
        """What is known, by the names that a run stores."""
        seconds = {} if self.bank is None else {"bank": self.bank}
        return seconds | {
            "sensitivity": self.sensitivity,
            "baselines": self.baselines,
            "trials": self.trials * self.trial,
            "finalists": self.finalists,
            "test": self.test,
        }

    @property
    def total(self) -> float:
        return sum(self.by_stage.values())

    def after_trials(self, trial_seconds: float) -> float:
        """What follows the trials, at the pace of those that were timed."""
        return (self.finalists + self.test) * (trial_seconds / self.trial if self.trial else 1.0)


Estimated = Callable[[Forecast], None]
Needed = Callable[[Needs], None]


def unsaid(forecast: Forecast | Needs) -> None:
    """A forecast that goes nowhere."""


def forecast(
    seconds_per_token: float,
    tokens: Tokens,
    plan: Plan,
    scored: Mapping[tuple[str, bool], int],
    bank: float | None,
    limit: float | None,
    sensitivity_known: bool = False,
) -> Forecast:
    """What is left of a search.

    Args:
        scored: how many assignments a partition has scored already, by whether they were proposed
            by the search; they are not scored again.
        bank: seconds of it, or None where it is not timed yet.
        limit: of the seconds of proposing; below zero where they are used up.
    """
    of = Counter(scored)
    # There are fewer simple allocations where some are alike, so what comes after them tells.
    simple = plan.searched - of["search", False]
    on_validation = plan.baselines - of["validation", False]
    if of["search", True]:
        simple, on_validation = 0, 0
    if of["validation", False]:
        simple = 0
    trials = plan.trials - of["search", True]
    finalists = plan.finalists - of["validation", True]
    tested = 1 + _RIVALS
    if trials <= 0 and of["test", True] + of["test", False]:
        finalists, tested = 0, 0
    simple, on_validation, trials, finalists = (
        max(0, count) for count in (simple, on_validation, trials, finalists)
    )

    def seconds(of_tokens: float) -> float:
        return of_tokens * seconds_per_token

    trial = plan.trial_cost * seconds(tokens.search)
    limit = None if limit is None else max(limit, 0.0)
    if limit is not None and trials * trial > limit:
        trials = int(limit / trial)
    reference = 1 + _FLOOR
    return Forecast(
        bank,
        0.0 if sensitivity_known else seconds(tokens.sensitivity),
        # A partition's first evaluation is preceded by the reference's.
        seconds((simple + bool(simple)) * tokens.search)
        + seconds((on_validation + bool(on_validation)) * tokens.validation),
        trials,
        trial,
        seconds(finalists * tokens.validation),
        seconds(_FLOOR * tokens.validation + (tested + reference) * tokens.test) if tested else 0.0,
        limit,
    )
