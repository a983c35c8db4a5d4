"""The study of one search: baselines, proposals, finalists, test, each told to Optuna."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from math import inf

import numpy as np
import optuna
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from mpsearch.allocate import feasible, greedy, knapsack, uniform
from mpsearch.assignment import Assignment
from mpsearch.bank import Report
from mpsearch.errors import CheckError
from mpsearch.front import pareto_front
from mpsearch.journal import assignment_of, open_study, proposed, tried, waiting
from mpsearch.points import Score
from mpsearch.run import Run
from mpsearch.samplers import LevelSwitchSampler, make_sampler
from mpsearch.scorer import Scored, Scorer
from mpsearch.space import ResolvedSpace
from mpsearch.trials import HOPELESS_LOSS, KILLED, OVER_TEXT_KL, distributions
from mpsearch.wish import Wish

log = logging.getLogger(__name__)

FINALISTS = 3  # of the best within the budget, and of the front below it
# Evaluations that a proposal takes, measured: slopes now and then, but many are stopped early.
TRIAL_COST = 0.9
_SPREAD = (0.2, 0.4, 0.6, 0.8)  # of the feasible range, for the knapsack's further points


def spread_bytes(space: ResolvedSpace) -> list[int]:
    """Budgets beside the user's for which the knapsack is solved, as a front to compare with."""
    floor, ceiling = (space.stored_bytes(a) for a in (space.smallest, space.largest))
    return [int(floor + (ceiling - floor) * part) for part in _SPREAD]


def most_bytes(wish: Wish) -> float:
    """Up to which size simple allocations are asked search facts.

    A search learns nothing from what it may not propose; but where text KL is limited, each says
    whether it keeps to that.
    """
    return wish.budget_bytes if wish.max_text_kl_nats is None else inf


class SearchStudy:
    """An Optuna study in a run's folder; each step skips what an earlier process has done.

    Args:
        at_once: proposals that are scored together, and so know nothing of each other's scores.
    """

    def __init__(
        self, space: ResolvedSpace, wish: Wish, run: Run, scorer: Scorer, report: Report,
        at_once: int = 1,
    ):  # fmt: skip
        self.space, self.wish, self.run, self.scorer, self.report = (
            space, wish, run, scorer, report,
        )  # fmt: skip
        self.at_once = at_once
        self.study: Study = open_study(run, space)

    # ----------------------------------------------------------------- baselines

    def baselines(self, damage: dict[tuple[str, str], float]) -> None:
        """Every simple allocation: on validation facts for the table, and on search facts for the
        study, as far as these are worth it.
        """
        space, budget = self.space, self.wish.budget_bytes
        by_greedy = greedy(space, damage, budget)
        by_knapsack = knapsack(space, damage, [budget, *spread_bytes(space)])
        self.run.content["at_budget"] = {"greedy": by_greedy.id, "knapsack": by_knapsack[0].id}
        self.run.save()
        chosen = [("uniform", assignment) for assignment in uniform(space).values()]
        chosen.append(("greedy", by_greedy))
        chosen += [("knapsack", assignment) for assignment in by_knapsack]
        distinct = list({assignment: kind for kind, assignment in reversed(chosen)}.items())[::-1]
        told = tried(self.study, space)
        new = [
            (assignment, kind)
            for assignment, kind in distinct
            if assignment not in told and space.stored_bytes(assignment) <= most_bytes(self.wish)
        ]
        for assignment, kind, scored in self._scored("baselines", new, "search"):
            if isinstance(scored.score, Score):
                self._add(assignment, kind, scored.score, scored.fact_tokens)
        self._recover()
        for _ in self._scored("baselines on validation facts", distinct, "validation"):
            pass

    def _recover(self) -> None:
        """Tell the study of proposals that were scored and that it does not know, as its journal
        was moved away.
        """
        known = tried(self.study, self.space) | waiting(self.study, self.space)
        for score in self.run.scores():
            proposal = score.partition == "search" and score.kind == "search"
            if proposal and score.assignment not in known:
                self._add(score.assignment, score.kind, score, 0)

    def _scored(
        self, stage: str, chosen: Sequence[tuple[Assignment, str]], partition: str
    ) -> Iterator[tuple[Assignment, str, Scored]]:
        """Each (assignment, kind) with its score, so many at once; warns of those without."""
        for start in range(0, len(chosen), self.at_once):
            self.report(stage, start, len(chosen))
            some = chosen[start : start + self.at_once]
            found = self.scorer.score_all(some, partition)
            for (assignment, kind), scored in zip(some, found, strict=True):
                if isinstance(scored.score, CheckError):
                    log.warning(
                        "%s assignment %s is left out: %s", kind, assignment.id, scored.score
                    )
                yield assignment, kind, scored
        self.report(stage, len(chosen), len(chosen))

    def _add(self, assignment: Assignment, kind: str, score: Score, fact_tokens: int) -> None:
        """A trial for a given assignment, written when it is complete."""
        self.study.add_trial(
            optuna.create_trial(
                params=dict(assignment),
                distributions=distributions(self.space),
                values=self._values(score),
                user_attrs={"kind": kind, "fact_tokens": fact_tokens},
                constraints={
                    "over_budget_bytes": self._over_budget(assignment),
                    **self._over_text_kl(score),
                },
            )
        )

    # ----------------------------------------------------------------- proposals

    def loop(self, damage: dict[tuple[str, str], float], foretold: int = 0) -> None:
        """Propose until the trials or the time are used up.

        Args:
            foretold: how many trials are left by the forecast; said until they have a pace.
        """
        wish, most = self.wish, self.wish.most_trials
        done = proposed(self.study)
        by_time = wish.seconds if wish.trials is None else None
        expected = most if by_time is None else done + foretold
        # Optuna's own samplers are seeded anew, as they would repeat their first proposals; so
        # only ours goes on after a kill exactly as it would have without.
        ours = wish.sampler == "level-switch"
        seed = wish.seed if ours else (wish.seed + done) % 2**32
        sampler = self.study.sampler = make_sampler(
            wish.sampler, self.space, damage, wish.budget_bytes, seed, wish.max_text_kl_nats
        )
        start = time.monotonic() - self.run.proposing_seconds
        while done < most:
            if wish.seconds is not None and time.monotonic() - start >= wish.seconds:
                break
            # Of a batch that a kill broke off, its rest.
            begun = done % self.at_once
            count = self._untried(min(self.at_once - begun, most - done))
            if not count:
                log.warning("every assignment within the budget has been tried; the search ends")
                break
            self.report(f"search, best {self._best()}", done, expected)
            if isinstance(sampler, LevelSwitchSampler) and not begun:
                self._measure_slopes(sampler)
            self.propose(count)
            done += count
            spent = self.run.content["proposing_seconds"] = time.monotonic() - start
            if by_time is not None:
                expected = max(done, round(done * by_time / spent))
            self.run.save()
        self.report(f"search, best {self._best()}", done, done)
        if isinstance(sampler, LevelSwitchSampler):
            found = sampler.foresight(self.study)
            self.run.content["foresight"] = found and asdict(found)
            self.run.save()

    def _untried(self, most: int) -> int:
        """How many assignments within the budget no trial has had; counted up to `most`."""
        known = tried(self.study, self.space)
        new = (a for a in feasible(self.space, self.wish.budget_bytes) if a not in known)
        return sum(1 for _ in islice(new, most))

    def _measure_slopes(self, sampler: LevelSwitchSampler) -> None:
        if (trial := sampler.due(self.study, self.scorer.slope_parts)) is None:
            return
        assignment, before = assignment_of(trial.params, self.space), self.scorer.fact_tokens
        part = self._place(trial) + sampler.times_measured(self.study, trial.number)
        try:
            slopes = self.scorer.slopes(assignment, part)
        except CheckError as error:
            log.warning("%s; the search goes on without them", error)
            slopes = {}
        sampler.record(self.study, trial, slopes, self.scorer.fact_tokens - before)

    def _place(self, trial: FrozenTrial) -> int:
        """The number that it would have if no kill had cut trials off."""
        before = self.study.get_trials(deepcopy=False)[: trial.number]
        return sum(KILLED not in other.user_attrs for other in before)

    def propose(self, count: int = 1) -> None:
        """So many trials, each the sampler's proposal, scored together on search facts."""
        trials = [self.study.ask(distributions(self.space)) for _ in range(count)]
        assignments = [assignment_of(trial.params, self.space) for trial in trials]
        for trial, assignment in zip(trials, assignments, strict=True):
            trial.set_user_attr("kind", "search")
            trial.set_constraint("over_budget_bytes", self._over_budget(assignment))
        found = self.scorer.score_all(
            [(assignment, "search") for assignment in assignments],
            "search",
            {assignment: self._best_within(assignment) for assignment in assignments},
        )
        told = zip(trials, assignments, found, strict=True)
        # What was stopped first: a kill has it measured again, against the best of now.
        for trial, assignment, scored in sorted(told, key=lambda t: isinstance(t[2].score, Score)):
            self._tell(trial, assignment, scored)

    def _tell(self, trial: Trial, assignment: Assignment, scored: Scored) -> None:
        score = scored.score
        if isinstance(score, CheckError):
            trial.set_user_attr("refused", str(score))
            self.study.tell(trial, state=TrialState.FAIL)
            log.warning("assignment %s is refused: %s", assignment.id, score)
            return
        trial.set_user_attr("fact_tokens", scored.fact_tokens)
        if not isinstance(score, Score):
            trial.set_user_attr(HOPELESS_LOSS, score)
            self.study.tell(trial, state=TrialState.PRUNED)
            return
        for name, over in self._over_text_kl(score).items():
            trial.set_constraint(name, over)
        self.study.tell(trial, self._values(score))

    def _best_within(self, assignment: Assignment) -> Score | None:
        """The least loss at no more bytes, which a proposal has to beat to be on the front.

        None for Optuna's samplers, which learn from whole trials alone.
        """
        if self.wish.sampler != "level-switch":
            return None
        size = self.space.stored_bytes(assignment)
        best = next((a for _, stored_bytes, a, _ in self._ranked() if stored_bytes <= size), None)
        return None if best is None else self.scorer.score(best, "search", "search")

    def _over_budget(self, assignment: Assignment) -> float:
        """Above zero where Optuna's own samplers must not go."""
        return float(self.space.stored_bytes(assignment) - self.wish.budget_bytes)

    def _over_text_kl(self, score: Score) -> dict[str, float]:
        """The same of the limit of text KL, empty where there is none."""
        limit = self.wish.max_text_kl_nats
        if limit is None or score.text is None:
            return {}
        return {OVER_TEXT_KL: score.text.kl.mean - limit}

    def _values(self, score: Score) -> list[float]:
        stored_bytes = self.space.stored_bytes(score.assignment)
        return [self.scorer.objective(score), float(stored_bytes)]

    def _ranked(self) -> list[tuple[float, float, Assignment, str]]:
        """Search-fact (objective, bytes, assignment, kind) of complete trials that break no limit.

        Each assignment once, as the kind of its first trial.
        """
        budget = self.wish.budget_bytes
        found: dict[Assignment, tuple[float, float, Assignment, str]] = {}
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            if trial.values[1] <= budget and trial.constraints.get(OVER_TEXT_KL, 0.0) <= 0:
                assignment = assignment_of(trial.params, self.space)
                kind = trial.user_attrs.get("kind", "")
                found.setdefault(assignment, (*trial.values, assignment, kind))
        return sorted(found.values(), key=lambda entry: entry[:2])

    def _best(self) -> str:
        ranked = self._ranked()
        return f"{ranked[0][0]:.3f} nats of loss and KL" if ranked else "none yet"

    # ----------------------------------------------------------------- finalists

    def finalists(self) -> None:
        """Score the searched points worth it on validation facts: the best few within the budget,
        and the searched part of the front below it.
        """
        ranked = self._ranked()
        front = pareto_front(ranked, lambda entry: (entry[1], entry[0]))
        best = [a for _, _, a, kind in ranked if kind == "search"][:FINALISTS]
        others = [a for _, _, a, kind in front if kind == "search" and a not in best]
        chosen = best + _spread_out(others, FINALISTS)
        finalists = [(assignment, "search") for assignment in chosen]
        for _ in self._scored("finalists on validation facts", finalists, "validation"):
            pass

    def test(self) -> None:
        """Read the test facts, now that everything is chosen."""
        self.scorer.record_reference("validation")
        self.scorer.read_test(self.report, self.at_once)


def _spread_out(entries: Sequence[Assignment], most: int) -> list[Assignment]:
    """At most `most` entries at even distances."""
    if len(entries) <= most:
        return list(entries)
    places = np.linspace(0, len(entries) - 1, most).round().astype(int)
    return [entries[place] for place in dict.fromkeys(int(p) for p in places)]
