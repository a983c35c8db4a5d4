"""What the test facts say of the pick: they are read once, when everything is chosen.

A point that was refined later and became the pick is another look at them, and is called so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mpsearch.bootstrap import Interval, relation_interval
from mpsearch.estimates import paired_difference
from mpsearch.points import Point, Score, rivals
from mpsearch.run import Run


@dataclass(frozen=True)
class Gain:
    """By how much the pick beats a simple allocation within the budget, or what it refines.

    Attributes:
        kind, id, stored_bytes: of the rival.
        test: the rival's answer loss minus the pick's, nats, paired by test fact.
        search_nats: the same on the search facts. What it promises beyond `test` is the optimism of
            a search that was ranked on them. None where the rival was not scored there.
    """

    kind: str
    id: str
    stored_bytes: int
    test: Interval
    search_nats: float | None

    def __str__(self) -> str:
        low, high = self.test.low, self.test.high
        said = f"{self.kind} {self.id} {self.test.mean:+.3f} nats [{low:+.3f}, {high:+.3f}]"
        if self.search_nats is not None:
            said += f" (on search facts {self.search_nats:+.3f})"
        if high < 0:
            return f"{said}, a loss"
        return said if low > 0 else f"{said}, no significant gain"


@dataclass(frozen=True)
class Outcome:
    """The pick on test facts; 95 % bootstrap intervals over subjects.

    Attributes:
        recall: contrastive.
        answer_loss: nats.
        gains: over the best uniform, greedy and knapsack allocation within the budget, and over
            the point that the pick refines.
        reference_recall: of the unquantized model.
        looks: how many picks have been read on these facts by now.
    """

    id: str
    facts: int
    recall: Interval
    answer_loss: Interval
    reference_recall: float
    gains: tuple[Gain, ...]
    looks: int = 1

    @property
    def verdict(self) -> str:
        recall, loss = self.recall, self.answer_loss
        said = (
            f"On {self.facts} test facts the pick {self.id} recalls {recall.mean:.1%} "
            f"[{recall.low:.1%}, {recall.high:.1%}] (reference {self.reference_recall:.1%}) and "
            f"loses {loss.mean:.3f} nats [{loss.low:.3f}, {loss.high:.3f}] an answer."
        )
        if self.gains:
            said += " Gain over " + "; ".join(map(str, self.gains)) + "."
        if self.looks > 1:
            said += (
                f" {self.looks} picks have been read on these test facts. Each was chosen on "
                "validation facts, so this holds unless what an earlier one showed led to refining."
            )
        return said

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}


def outcome(run: Run) -> Outcome | None:
    """Of a run's pick; None where the test facts have not been read for it."""
    front = run.front()
    pick = front.pick
    every = run.scores()
    scores = {(score.partition, score.assignment): score for score in every}
    if pick is None or "reference_test" not in run.content:
        return None
    test = scores.get(("test", pick.assignment))
    if test is None or test.correct is None:
        return None
    relations, subjects = run.relations("test"), run.content["subjects"]["test"]

    def interval(values: Any) -> Interval:
        return relation_interval(values, relations, subjects)

    def gain(rival: Point, beside: Score) -> Gain:
        searched = [scores.get(("search", point.assignment)) for point in (rival, pick)]
        on_search = None
        if searched[0] is not None and searched[1] is not None:
            losses = [score.loss_per_fact for score in searched if score is not None]
            on_search = paired_difference(losses[0], losses[1], run.relations("search")).mean
        lost = np.subtract(beside.loss_per_fact, test.loss_per_fact)
        return Gain(rival.kind, rival.id, rival.stored_bytes, interval(lost), on_search)

    return Outcome(
        pick.id,
        len(relations),
        interval(test.correct),
        interval(test.loss_per_fact),
        run.content["reference_test"]["recall"],
        tuple(
            gain(rival, scores["test", rival.assignment])
            for rival in rivals(front, run.budget_bytes, run.at_budget)
            if ("test", rival.assignment) in scores
        ),
        _looks([score for score in every if score.partition == "test"]),
    )


def _looks(read: Sequence[Score]) -> int:
    """How many picks are among the scores on test facts, in the order of their reading.

    A pick is read before its rivals, and refined ones are read as picks only; so are searched ones,
    but for what a refined pick comes from.
    """
    picks, parents = set(), set()
    for place, score in enumerate(read):
        assignment = score.assignment
        searched = score.kind == "search" and assignment not in parents
        if place == 0 or assignment.refined or searched:
            picks.add(assignment)
        if assignment.refined:
            parents.add(assignment.parent)
    return len(picks)
