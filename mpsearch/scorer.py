"""Scores assignments on a run's partitions: proxies when first needed, repeats from the cache.

Beside validation facts a candidate reads held-out text, beside search facts search text where the
run limits its KL, beside test facts none.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpsearch.asked import asked_facts
from mpsearch.assignment import Assignment
from mpsearch.bank import Report
from mpsearch.errors import CheckError
from mpsearch.estimates import relation_mean
from mpsearch.evaluate import Bench, Evaluation
from mpsearch.facts import FactSet
from mpsearch.fluency import TextScores
from mpsearch.guard import TextGuard
from mpsearch.models import Model
from mpsearch.points import Score, rivals
from mpsearch.recall import RecallProxy
from mpsearch.run import Run
from mpsearch.slopes import EVALUATIONS, measure_slopes
from mpsearch.stages import hopeless, stages
from mpsearch.text import Text


@dataclass(frozen=True)
class Scored:
    """What came of asking one assignment.

    Attributes:
        score: the evaluation; an estimate of the objective, in nats, where it was stopped early; or
            what is wrong with a candidate that gives NaN.
        fact_tokens: tokens of facts that were pushed through the model for it.
    """

    score: Score | float | CheckError
    fact_tokens: int


class Scorer:
    """Every evaluation of a run goes through here and into its folder.

    Args:
        bench: puts candidates in place; a proxy is built on the reference, which it restores.
    Attributes:
        fact_tokens: tokens of facts that have been pushed through the model for candidates.
    """

    def __init__(self, model: Model, facts: FactSet, text: Text, run: Run, bench: Bench):
        self._model, self._facts, self._run, self._bench = model, facts, run, bench
        self._source = text.source
        self._paragraphs = {"validation": text.held_out}
        if run.max_text_kl_nats is not None:
            self._paragraphs["search"] = text.search
        # The places of each part's facts, and who asks them.
        self._parts: dict[str, list[tuple[NDArray[Any], RecallProxy]]] = {}
        self._guards: dict[str, TextGuard] = {}
        self._cache = {(s.partition, s.assignment): s for s in run.scores()}
        self.fact_tokens = 0

    def score(self, assignment: Assignment, kind: str, partition: str) -> Score:
        """An evaluation, from the cache where it has been made before.

        Raises:
            CheckError: the candidate gives NaN.
        """
        (scored,) = self.score_all([(assignment, kind)], partition)
        if isinstance(scored.score, CheckError):
            raise scored.score
        assert isinstance(scored.score, Score)  # nothing to lose to
        return scored.score

    def score_all(
        self,
        asked: Sequence[tuple[Assignment, str]],
        partition: str,
        bests: Mapping[Assignment, Score | None] | None = None,
    ) -> list[Scored]:
        """Evaluations of several assignments, which share the walks of a streamed model.

        Args:
            asked: assignments and their kinds.
            bests: the score that one has to beat on search facts: it is stopped when it hardly can.
        """
        found = {
            assignment: Scored(score, 0)
            for assignment, _ in asked
            if (score := self._cache.get((partition, assignment))) is not None
        }
        new = {assignment: kind for assignment, kind in asked if assignment not in found}
        found |= self._measure(new, partition, bests or {})
        return [found[assignment] for assignment, _ in asked]

    @property
    def slope_parts(self) -> int:
        """How many parts of the search facts slopes can be asked of.

        Two: half of the relations tell nearly as much as all, the other half is for where that was
        not enough. One where there are too few relations.
        """
        return min(2, len(self._asked("search")))

    def slopes(self, assignment: Assignment, part: int) -> dict[tuple[str, str], float]:
        """How the objective changes from there, to first order, by a part of the search facts.

        Args:
            part: any number; counted round.
        """
        *before, last = [proxy for _, proxy in self._asked("search")]
        proxies = before if part % self.slope_parts else [last]
        self.fact_tokens += EVALUATIONS * sum(proxy.tokens for proxy in proxies)
        return measure_slopes(self._bench, assignment, proxies)

    def objective(self, score: Score) -> float:
        """Of a score on search facts, in nats: what a search lowers."""
        return relation_mean(score.objective_per_fact, self._run.relations(score.partition)).mean

    def _measure(
        self,
        kinds: Mapping[Assignment, str],
        partition: str,
        bests: Mapping[Assignment, Score | None],
    ) -> dict[Assignment, Scored]:
        """As `score_all`, of assignments that are not in the cache."""
        if not kinds:
            return {}
        asked, guard = self._asked(partition), self._guard(partition)
        relations = self._run.relations(partition)
        total = len(set(relations))
        began = time.perf_counter()
        found: dict[Assignment, Scored] = {}
        evaluations: dict[Assignment, list[Evaluation]] = {a: [] for a in kinds}
        for number, (_, proxy) in enumerate(asked, start=1):
            left = [a for a in kinds if a not in found]
            so_far = sum(proxy.tokens for _, proxy in asked[:number])
            places = np.concatenate([of_stage for of_stage, _ in asked[:number]])
            of_places = [relations[place] for place in places]
            self.fact_tokens += proxy.tokens * len(left)
            for assignment, evaluation in zip(
                left, self._bench.evaluate_all(left, proxy), strict=True
            ):
                if isinstance(evaluation, CheckError):
                    found[assignment] = Scored(evaluation, so_far)
                    continue
                evaluations[assignment].append(evaluation)
                best = bests.get(assignment)
                if best is not None and number < len(asked):
                    behind = hopeless(
                        np.concatenate([e.objective_per_fact for e in evaluations[assignment]]),
                        best.objective_per_fact[places],
                        of_places,
                        total,
                    )
                    if behind is not None:
                        found[assignment] = Scored(self.objective(best) + behind, so_far)
        whole = [a for a in kinds if a not in found]
        texts = [None] * len(whole) if guard is None else self._bench.read_all(whole, guard)
        seconds = (time.perf_counter() - began) / len(kinds)
        tokens = sum(proxy.tokens for _, proxy in asked)
        for assignment, text in zip(whole, texts, strict=True):
            if isinstance(text, CheckError):
                found[assignment] = Scored(text, tokens)
                continue
            kind, parts = kinds[assignment], evaluations[assignment]
            score = self._joined(assignment, kind, partition, parts, seconds, text)
            self._run.add(score)
            self._cache[partition, assignment] = score
            found[assignment] = Scored(score, tokens)
        return found

    def _joined(
        self,
        assignment: Assignment,
        kind: str,
        partition: str,
        evaluations: Sequence[Evaluation],
        seconds: float,
        text: TextScores | None,
    ) -> Score:
        """One score of the evaluations on a partition's parts."""
        order = np.argsort(np.concatenate([places for places, _ in self._asked(partition)]))
        relations = self._run.relations(partition)

        def joined(parts: list[NDArray[Any]]) -> NDArray[Any]:
            return np.asarray(np.concatenate(parts)[order])

        correct = [e.scores.correct for e in evaluations if e.scores.correct is not None]
        prompt_kl = [e.scores.prompt_kl for e in evaluations if e.scores.prompt_kl is not None]
        return Score(
            assignment,
            kind,
            partition,
            tuple(map(float, joined([e.loss_per_fact for e in evaluations]))),
            relation_mean(joined([e.scores.kl for e in evaluations]), relations).mean,
            relation_mean(joined([e.scores.top1 for e in evaluations]), relations).mean,
            tuple(map(bool, joined(correct))) if correct else None,
            seconds,
            text,
            tuple(map(float, joined(prompt_kl))) if prompt_kl else (),
        )

    def read_test(self, report: Report, at_once: int = 1) -> None:
        """Read the test facts: for the pick, its rivals that fit, and the reference."""
        front = self._run.front()
        if front.pick is None:
            return
        asked = [front.pick, *rivals(front, self._run.budget_bytes, self._run.at_budget)]
        for start in range(0, len(asked), at_once):
            report("test facts", start, len(asked))
            some = [(point.assignment, point.kind) for point in asked[start : start + at_once]]
            for scored in self.score_all(some, "test"):
                if isinstance(scored.score, CheckError):
                    raise scored.score
        self.record_reference("test")
        report("test facts", len(asked), len(asked))

    def record_reference(self, partition: str) -> None:
        """Write the reference's own answers, noise floor and perplexity beside the candidates'."""
        if (guard := self._guard(partition)) and "reference_text" not in self._run.content:
            about = {"source": self._source, **guard.reference.about()}
            self._run.content["reference_text"] = about
            self._run.save()
        key = f"reference_{partition}"
        if key in self._run.content:
            return
        ((_, proxy),) = self._asked(partition)
        correct = proxy.reference.correct
        self._bench.restore()
        self._run.content[key] = {
            "recall": None if correct is None else relation_mean(correct, proxy.relations).mean,
            "top1": relation_mean(proxy.reference.top1, proxy.relations).mean,
            "chance": relation_mean(proxy.chances, proxy.relations).mean,
            "noise_floor_nats": proxy.noise_floor().mean_nats,
            # What an export is checked against, a value a fact.
            "correct": None if correct is None else correct.tolist(),
            "log_prob_nats": proxy.reference.log_prob.tolist(),
            "tokens": proxy.digest,
            "device": self._model.device.type,
        }
        self._run.save()

    def _asked(self, partition: str) -> list[tuple[NDArray[Any], RecallProxy]]:
        """Search facts in stages, those of other partitions at once."""
        if partition not in self._parts:
            self._bench.restore()
            facts = asked_facts(self._run, self._facts, partition)
            searched = partition == "search"
            parts = stages(self._run.relations(partition)) if searched else [np.arange(len(facts))]
            self._parts[partition] = [
                (places, RecallProxy(self._model, self._facts, [facts[place] for place in places],
                                     contrast=not searched, prompts=searched))
                for places in parts
            ]  # fmt: skip
        return self._parts[partition]

    def _guard(self, partition: str) -> TextGuard | None:
        """What reads text beside a partition's facts, if anything does."""
        if partition in self._paragraphs and partition not in self._guards:
            self._bench.restore()
            self._guards[partition] = TextGuard(self._model, self._paragraphs[partition])
        return self._guards.get(partition)
