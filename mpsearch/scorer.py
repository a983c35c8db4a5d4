"""Scores assignments on a run's partitions: proxies when first needed, repeats from the cache.

Beside validation facts a candidate reads held-out text, beside search facts search text where the
run limits its KL, beside test facts none.
"""

from __future__ import annotations

import time

from mpsearch.asked import asked_facts
from mpsearch.assignment import Assignment
from mpsearch.estimates import relation_mean
from mpsearch.evaluate import Bench
from mpsearch.facts import FactSet
from mpsearch.guard import TextGuard
from mpsearch.models import Model
from mpsearch.points import Score
from mpsearch.recall import RecallProxy
from mpsearch.run import Run
from mpsearch.text import Text


class Scorer:
    """Every evaluation of a run goes through here and into its folder.

    Args:
        bench: puts candidates in place; a proxy is built on the reference, which it restores.
    """

    def __init__(self, model: Model, facts: FactSet, text: Text, run: Run, bench: Bench):
        self._model, self._facts, self._run, self._bench = model, facts, run, bench
        self._source = text.source
        self._paragraphs = {"validation": text.held_out}
        if run.max_text_kl_nats is not None:
            self._paragraphs["search"] = text.search
        self._proxies: dict[str, RecallProxy] = {}
        self._guards: dict[str, TextGuard] = {}
        self._cache = {(s.partition, s.assignment): s for s in run.scores()}

    def score(self, assignment: Assignment, kind: str, partition: str) -> Score:
        """An evaluation, from the cache where it has been made before.

        Raises:
            CheckError: the candidate gives NaN.
        """
        if (found := self._cache.get((partition, assignment))) is not None:
            return found
        proxy, guard = self._proxy(partition), self._guard(partition)
        evaluation = self._bench.evaluate(assignment, proxy)
        began = time.perf_counter()
        text = None if guard is None else guard.score()
        correct = evaluation.scores.correct
        score = Score(
            assignment,
            kind,
            partition,
            tuple(float(loss) for loss in evaluation.loss_per_fact),
            evaluation.kl.mean,
            evaluation.top1.mean,
            None if correct is None else tuple(bool(right) for right in correct),
            evaluation.seconds + time.perf_counter() - began,
            text,
        )
        self._run.add(score)
        self._cache[partition, assignment] = score
        return score

    def loss(self, score: Score) -> float:
        """Answer loss of a score, in nats."""
        return relation_mean(score.loss_per_fact, self._run.relations(score.partition)).mean

    def record_reference(self, partition: str) -> None:
        """Write the reference's own recall, noise floor and perplexity beside the candidates'."""
        if (guard := self._guard(partition)) and "reference_text" not in self._run.content:
            about = {"source": self._source, **guard.reference.about()}
            self._run.content["reference_text"] = about
            self._run.save()
        key = f"reference_{partition}"
        if key in self._run.content:
            return
        proxy = self._proxy(partition)
        correct = proxy.reference.correct
        self._bench.restore()
        self._run.content[key] = {
            "recall": None if correct is None else relation_mean(correct, proxy.relations).mean,
            "top1": relation_mean(proxy.reference.top1, proxy.relations).mean,
            "chance": relation_mean(proxy.chances, proxy.relations).mean,
            "noise_floor_nats": proxy.noise_floor().mean_nats,
        }
        self._run.save()

    def _proxy(self, partition: str) -> RecallProxy:
        if partition not in self._proxies:
            self._bench.restore()
            self._proxies[partition] = RecallProxy(
                self._model,
                self._facts,
                asked_facts(self._run, self._facts, partition),
                contrast=partition != "search",
            )
        return self._proxies[partition]

    def _guard(self, partition: str) -> TextGuard | None:
        """What reads text beside a partition's facts, if anything does."""
        if partition in self._paragraphs and partition not in self._guards:
            self._bench.restore()
            self._guards[partition] = TextGuard(self._model, self._paragraphs[partition])
        return self._guards.get(partition)
