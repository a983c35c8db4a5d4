"""Scores assignments on a run's partitions: proxies when first needed, repeats from the cache.

Beside validation facts a candidate reads held-out text, beside search facts search text where the
run limits its KL, beside test facts none.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpsearch.asked import asked_facts
from mpsearch.assignment import Assignment
from mpsearch.bank import Report
from mpsearch.estimates import relation_mean
from mpsearch.evaluate import Bench, Evaluation
from mpsearch.facts import FactSet
from mpsearch.guard import TextGuard
from mpsearch.models import Model
from mpsearch.points import Score, rivals
from mpsearch.recall import RecallProxy
from mpsearch.run import Run
from mpsearch.slopes import EVALUATIONS, measure_slopes
from mpsearch.stages import halves, hopeless
from mpsearch.text import Text


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
        score = self._score(assignment, kind, partition)
        assert isinstance(score, Score)  # nothing to lose to
        return score

    def compete(self, assignment: Assignment, kind: str, best: Score | None) -> Score | float:
        """An evaluation on search facts that stops when it cannot beat another one.

        Returns:
            The score, or where it was stopped an estimate of the answer loss, in nats.
        Raises:
            CheckError: the candidate gives NaN.
        """
        return self._score(assignment, kind, "search", best)

    def slopes(self, assignment: Assignment) -> dict[tuple[str, str], float]:
        """How answer loss on search facts changes from there, to first order; see `slopes.py`."""
        proxies = [proxy for _, proxy in self._asked("search")]
        self.fact_tokens += EVALUATIONS * sum(proxy.tokens for proxy in proxies)
        return measure_slopes(self._bench, assignment, proxies)

    def loss(self, score: Score) -> float:
        """Answer loss of a score, in nats."""
        return relation_mean(score.loss_per_fact, self._run.relations(score.partition)).mean

    def _score(
        self, assignment: Assignment, kind: str, partition: str, best: Score | None = None
    ) -> Score | float:
        """As `compete`; without a best one to beat it is not stopped."""
        if (found := self._cache.get((partition, assignment))) is not None:
            return found
        asked, guard = self._asked(partition), self._guard(partition)
        began = time.perf_counter()
        evaluations: list[Evaluation] = []
        for places, proxy in asked:
            evaluations.append(self._bench.evaluate(assignment, proxy))
            self.fact_tokens += proxy.tokens
            if best is not None and len(evaluations) < len(asked):
                there = np.array(best.loss_per_fact)[places]
                behind = hopeless(evaluations[-1].loss_per_fact, there, proxy.relations)
                if behind is not None:
                    return self.loss(best) + behind
        text = None if guard is None else guard.score(self._bench.held)
        order = np.argsort(np.concatenate([places for places, _ in asked]))
        relations = self._run.relations(partition)

        def joined(parts: list[NDArray[Any]]) -> NDArray[Any]:
            return np.asarray(np.concatenate(parts)[order])

        correct = [e.scores.correct for e in evaluations if e.scores.correct is not None]
        score = Score(
            assignment,
            kind,
            partition,
            tuple(map(float, joined([e.loss_per_fact for e in evaluations]))),
            relation_mean(joined([e.scores.kl for e in evaluations]), relations).mean,
            relation_mean(joined([e.scores.top1 for e in evaluations]), relations).mean,
            tuple(map(bool, joined(correct))) if correct else None,
            time.perf_counter() - began,
            text,
        )
        self._run.add(score)
        self._cache[partition, assignment] = score
        return score

    def read_test(self, report: Report) -> None:
        """Read the test facts: for the pick, its rivals that fit, and the reference."""
        front = self._run.front()
        if front.pick is None:
            return
        asked = [front.pick, *rivals(front, self._run.budget_bytes)]
        for index, point in enumerate(asked):
            report("test facts", index, len(asked))
            self.score(point.assignment, point.kind, "test")
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
        }
        self._run.save()

    def _asked(self, partition: str) -> list[tuple[NDArray[Any], RecallProxy]]:
        """Search facts in two parts, those of other partitions in one."""
        if partition not in self._parts:
            self._bench.restore()
            facts = asked_facts(self._run, self._facts, partition)
            searched = partition == "search"
            parts = halves(self._run.relations(partition)) if searched else [np.arange(len(facts))]
            self._parts[partition] = [
                (places, RecallProxy(self._model, self._facts, [facts[place] for place in places],
                                     contrast=not searched))
                for places in parts
            ]  # fmt: skip
        return self._parts[partition]

    def _guard(self, partition: str) -> TextGuard | None:
        """What reads text beside a partition's facts, if anything does."""
        if partition in self._paragraphs and partition not in self._guards:
            self._bench.restore()
            self._guards[partition] = TextGuard(self._model, self._paragraphs[partition])
        return self._guards.get(partition)
