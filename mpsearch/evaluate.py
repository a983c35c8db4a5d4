"""Put an assignment in place, score it, restore the reference."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from numpy.typing import NDArray

from mpsearch.assignment import Assignment
from mpsearch.bank import Bank
from mpsearch.errors import CheckError
from mpsearch.estimates import Estimate, relation_mean
from mpsearch.fluency import TextScores
from mpsearch.formats import Format
from mpsearch.guard import TextGuard
from mpsearch.layers import Layer
from mpsearch.recall import RecallProxy
from mpsearch.scores import FactScores, objective
from mpsearch.space import ResolvedSpace
from mpsearch.walk import Coded, Held


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What one assignment scored on one list of facts.

    Attributes:
        answer_loss: nats, against the reference.
        kl: nats, from the reference.
        recall: share of facts right among distractors; None where those were not asked.
        scores: the same per fact.
    """

    assignment: Assignment
    answer_loss: Estimate
    kl: Estimate
    top1: Estimate
    recall: Estimate | None
    scores: FactScores
    loss_per_fact: NDArray[Any]
    seconds: float

    @property
    def objective_per_fact(self) -> NDArray[Any]:
        """`(facts,)` in nats: what a search lowers; of a proxy that reads prompts."""
        assert self.scores.prompt_kl is not None
        return objective(self.loss_per_fact, self.scores.prompt_kl)


class Bench:
    """A model on which assignments are put in place one after another.

    Their weights come from one bank, those of a refined assignment from its own.

    Swapping points a layer at another tensor of the bank (an expert's is copied into its stack):
    only layers whose format changed are touched, and the reference's own tensors are never written
    to. Use it as a context manager; it leaves the reference in place, whatever happens. In a model
    whose blocks hold no weights it only notes what is to be in place: a walk puts it there.
    """

    def __init__(self, space: ResolvedSpace, bank: Bank):
        self.space = space
        self.bank = bank
        self._banks: dict[str, Bank] = {}
        # Layer to the codes that it holds; None for its reference weight.
        self._in_place: dict[str, Coded | None] = {}
        self.swapped_layers = 0

    def __enter__(self) -> Bench:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.restore()

    def put(self, assignment: Mapping[str, str]) -> None:
        """Give every layer the weight of its assigned format."""
        bank = self._bank_of(assignment)
        for layer, fmt in self.space.layer_formats(assignment).items():
            coded = (bank.stored, fmt) if fmt.quantized else None
            if self._in_place.get(layer) != coded:
                weight = None if bank.model.streamed else bank.weight(layer, fmt)
                # Recorded first: an interrupt in between then makes restore() undo it.
                self._in_place[layer] = coded
                if weight is not None:
                    bank.model.places[layer].put(weight)
                self.swapped_layers += 1

    @property
    def held(self) -> dict[str, Coded]:
        """The codes that layers hold, of those that do not hold their reference weights."""
        return {layer: coded for layer, coded in self._in_place.items() if coded is not None}

    def _bank_of(self, assignment: Mapping[str, str]) -> Bank:
        if not isinstance(assignment, Assignment) or not assignment.refined:
            return self.bank
        if assignment.bank not in self._banks:
            bank = Bank.of(self.bank.model, json.loads(assignment.bank))
            self.restore()  # under what is built, if it is not there any more
            bank.build(quantized_layers(self.space, assignment))
            self._banks[assignment.bank] = bank
        return self._banks[assignment.bank]

    def restore(self) -> None:
        """Give every layer its reference weight."""
        self.bank.model.restore()
        self._in_place.clear()

    def evaluate(self, assignment: Assignment, proxy: RecallProxy) -> Evaluation:
        """Score an assignment; it stays in place, so that the next one swaps little.

        First blocks that another one scored on this proxy had alike are not run again.

        Raises:
            CheckError: the candidate gives NaN.
        """
        start = time.perf_counter()
        self.put(assignment)
        scores = proxy.score(self.held)
        return self._evaluation(assignment, proxy, scores, time.perf_counter() - start)

    def evaluate_all(
        self, assignments: Sequence[Assignment], proxy: RecallProxy
    ) -> list[Evaluation | CheckError]:
        """Score several assignments, in one walk where the model is streamed.

        Returns:
            For each its evaluation, or what `evaluate` raises where it gives NaN. The seconds are
            an equal share of all.
        """
        if self.bank.model.streamed:
            start = time.perf_counter()
            scored = list(proxy.score_all(self._all_held(assignments)))
            seconds = (time.perf_counter() - start) / max(1, len(assignments))
            return [
                scores
                if isinstance(scores, CheckError)
                else self._evaluation(assignment, proxy, scores, seconds)
                for assignment, scores in zip(assignments, scored, strict=True)
            ]
        found: list[Evaluation | CheckError] = []
        for assignment in assignments:
            try:
                found.append(self.evaluate(assignment, proxy))
            except CheckError as error:
                found.append(error)
        return found

    def read_all(
        self, assignments: Sequence[Assignment], guard: TextGuard
    ) -> list[TextScores | CheckError]:
        """Let several assignments predict text, as `evaluate_all`."""
        if self.bank.model.streamed:
            return list(guard.score_all(self._all_held(assignments)))
        found: list[TextScores | CheckError] = []
        for assignment in assignments:
            self.put(assignment)
            try:
                found.append(guard.score(self.held))
            except CheckError as error:
                found.append(error)
        return found

    def _all_held(self, assignments: Iterable[Assignment]) -> list[Held]:
        held: list[Held] = []
        for assignment in assignments:
            self.put(assignment)
            held.append(self.held)
        return held

    @staticmethod
    def _evaluation(
        assignment: Assignment, proxy: RecallProxy, scores: FactScores, seconds: float
    ) -> Evaluation:
        loss = proxy.reference.log_prob - scores.log_prob
        relations = proxy.relations
        return Evaluation(
            assignment,
            answer_loss=relation_mean(loss, relations),
            kl=relation_mean(scores.kl, relations),
            top1=relation_mean(scores.top1, relations),
            recall=None if scores.correct is None else relation_mean(scores.correct, relations),
            scores=scores,
            loss_per_fact=loss,
            seconds=seconds,
        )


def all_layers(space: ResolvedSpace) -> list[tuple[Layer, Format]]:
    """Every (layer, format) that some assignment of the space can ask for."""
    return [
        (layer, fmt)
        for group in space.groups
        for layer in group.layers
        for fmt in space.options[group.name]
    ]


def quantized_layers(
    space: ResolvedSpace, assignment: Mapping[str, str]
) -> list[tuple[Layer, Format]]:
    """Every (layer, format) of one assignment that has to be in the bank."""
    formats = space.layer_formats(assignment)
    layers = (layer for group in space.groups for layer in group.layers)
    return [(layer, formats[layer.name]) for layer in layers if formats[layer.name].quantized]
