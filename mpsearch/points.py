"""What a run's evaluations say of an assignment, and which assignment to take."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpsearch.assignment import Assignment
from mpsearch.errors import RunError
from mpsearch.estimates import Estimate, paired_difference
from mpsearch.fluency import TextScores
from mpsearch.front import best_under
from mpsearch.scores import objective

OBJECTIVE = "answer loss + 2 prompt KL"  # of the search; kept in a run, as older ones had another
SIMPLE_KINDS = ("uniform", "greedy", "knapsack")
NONE_SEARCHED = "No significant gain at this budget: the search found nothing worth validating."
NONE_FITS = "No validated point fits the budget."


@dataclass(frozen=True, eq=False)
class Score:
    """One assignment's values on one partition's facts, as stored.

    Attributes:
        kind: uniform, greedy, knapsack, search or refined; `reference` for the unquantized model.
        loss_per_fact: answer loss in nats.
        correct: contrastive, or None where distractors were not asked.
        text: beside validation facts held-out text, beside search facts search text where the run
            limits its KL; None where it was not read.
        prompt_kl_per_fact: see `FactScores`; empty where it was not read.
    """

    assignment: Assignment
    kind: str
    partition: str
    loss_per_fact: tuple[float, ...]
    kl_nats: float
    top1: float
    correct: tuple[bool, ...] | None
    seconds: float
    text: TextScores | None = None
    prompt_kl_per_fact: tuple[float, ...] = ()

    @property
    def objective_per_fact(self) -> NDArray[Any]:
        """`(facts,)` in nats: what a search lowers; of search facts only."""
        return objective(np.array(self.loss_per_fact), np.array(self.prompt_kl_per_fact))


@dataclass(frozen=True, eq=False)
class Point:
    """An assignment with its size and its validation (or test) figures.

    Attributes:
        against_uniform: answer loss minus that of the best uniform assignment of at most the same
            size, paired by fact; None if there is none.
        over_text_kl: whether it breaks the run's limit of KL on search text; such a point is shown
            and never recommended.
        against_parent: of a refined point: answer loss minus that of the point it came from,
            paired by fact; None if that one was not scored.
        against_parent_on_search: the same on search facts. A parent that was chosen on them has
            the advantage.
    """

    id: str
    kind: str
    assignment: Assignment
    stored_bytes: int
    bits_per_weight: float
    answer_loss: Estimate
    recall: Estimate
    kl_nats: float
    against_uniform: Estimate | None
    score: Score
    over_text_kl: bool = False
    against_parent: Estimate | None = None
    against_parent_on_search: Estimate | None = None

    @property
    def parent(self) -> str:
        """The id of the point that this one refines; empty if it refines none."""
        return self.assignment.parent.id if self.assignment.refined else ""

    @property
    def gain(self) -> str:
        """A sentence about what refining gained; empty if this point refines none."""
        change, searched = self.against_parent, self.against_parent_on_search
        if change is None:
            return ""
        quantizer = json.loads(self.assignment.bank)["quantizer"]
        said = f"{self.id} refines {self.parent} by {quantizer} in order: answer loss "
        said += f"{change.mean:+.3f} +- {change.stderr:.3f} nats, paired by validation fact"
        if searched is not None:
            said += f" ({searched.mean:+.3f} +- {searched.stderr:.3f} by search fact)"
        return f"{said}." if change.significant else f"{said}, no significant change."

    @property
    def worse_on_search(self) -> bool:
        """Whether it loses more than its parent on search facts, whatever validation facts say."""
        searched = self.against_parent_on_search
        return searched is not None and searched.mean > 0

    @property
    def text(self) -> TextScores | None:
        """Of held-out text; None on test facts, and in runs of before it was read."""
        return self.score.text

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "kind": self.kind,
            "stored_bytes": self.stored_bytes,
            "bits_per_weight": self.bits_per_weight,
            "recall": asdict(self.recall),
            "answer_loss_nats": asdict(self.answer_loss),
            "kl_nats": self.kl_nats,
            "against_uniform_nats": self.against_uniform and asdict(self.against_uniform),
            "text_kl_nats": self.text and asdict(self.text.kl),
            "perplexity": self.text and self.text.perplexity,
            "over_text_kl": self.over_text_kl,
            "parent": self.parent or None,
            "against_parent_nats": self.against_parent and asdict(self.against_parent),
            "against_parent_on_search_nats": self.against_parent_on_search
            and asdict(self.against_parent_on_search),
        }


@dataclass(frozen=True, eq=False)
class ParetoFront:
    """All points that were scored on validation facts, by rising size.

    Attributes:
        points: baselines, finalists and refined ones.
        pareto_ids: of those within the run's limit of text KL that no other such point dominates
            in (bytes, answer loss).
        pick: recommended under the run's budget and limit: the lowest answer loss, but a simple
            allocation unless a searched one beats the best simple one beyond noise, and none that
            was refined unless it beats that one beyond noise and is no worse than its parent on
            search facts, too. None if nothing fits.
        verdict: one plain sentence about search against simple allocations.
    """

    points: tuple[Point, ...]
    pareto_ids: frozenset[str]
    pick: Point | None
    verdict: str

    def best(self, max_bytes: str | int) -> Point:
        """The point of least answer loss within a size and the run's limit of text KL.

        Raises:
            RunError: none fits.
        """
        from mpsearch.sizes import parse_size

        limit = parse_size(max_bytes) if isinstance(max_bytes, str) else max_bytes
        allowed = [point for point in self.points if not point.over_text_kl]
        if not allowed:
            raise RunError(f"no point keeps the run's limit of text KL. {self.verdict}")
        found = best_under(allowed, coordinates, limit)
        if found is None:
            smallest = min(point.stored_bytes for point in allowed)
            raise RunError(f"no point within {limit:,} bytes; the smallest takes {smallest:,}")
        return found


def coordinates(point: Point) -> tuple[float, float]:
    """What the front is of: stored bytes and answer loss."""
    return point.stored_bytes, point.answer_loss.mean


def rivals(front: ParetoFront, budget_bytes: int, at_budget: Mapping[str, str]) -> list[Point]:
    """The best simple allocation of each kind within the budget, and the point that the pick
    refines; the pick itself is left out.

    Args:
        at_budget: kind to the id of what it allocates at the budget; where two kinds allocate
            alike, the point has the first one's name.
    """
    found: dict[str, Point] = {}
    for kind in SIMPLE_KINDS:
        mine = [
            point
            for point in front.points
            if (point.kind == kind or point.id == at_budget.get(kind)) and not point.over_text_kl
        ]
        best = best_under(mine, coordinates, budget_bytes)
        if best is not None:
            found[best.id] = best
    if front.pick is not None:
        found |= {point.id: point for point in front.points if point.id == front.pick.parent}
        found.pop(front.pick.id, None)
    return list(found.values())


def recommend(
    points: Sequence[Point], relations: Sequence[str], budget_bytes: int
) -> tuple[Point | None, str]:
    """The pick among validated points that break no limit, and the verdict; see `ParetoFront`.

    Args:
        relations: of the validation facts.
    """
    pick, verdict = _recommend_unrefined(points, relations, budget_bytes)
    refined = [point for point in points if point.parent]
    holding = [point for point in refined if not point.worse_on_search]
    best = best_under(refined, coordinates, budget_bytes)
    if best is None:
        return pick, verdict
    if pick is None:
        return best, "Only refined points fit."
    for point in filter(None, (best_under(holding, coordinates, budget_bytes), best)):
        gain = paired_difference(pick.score.loss_per_fact, point.score.loss_per_fact, relations)
        figures = f"({gain.mean:+.3f} +- {gain.stderr:.3f} nats on validation facts)"
        beats = gain.mean > 0 and gain.significant
        if beats and not point.worse_on_search:
            verdict += f" The refined {point.id} beats it {figures} and is recommended instead."
            return point, verdict
    verdict += f" The refined {best.id} "
    if beats:
        verdict += f"beats it {figures}, but not on search facts: there it loses more than what it "
        return pick, f"{verdict}refines, so it is not recommended."
    return pick, f"{verdict}does not beat it beyond noise {figures}."


def _recommend_unrefined(
    points: Sequence[Point], relations: Sequence[str], budget_bytes: int
) -> tuple[Point | None, str]:
    simple = [point for point in points if point.kind in SIMPLE_KINDS]
    best_simple = best_under(simple, coordinates, budget_bytes)
    searched = [point for point in points if point.kind == "search"]
    best_searched = best_under(searched, coordinates, budget_bytes)
    if best_simple is None:
        return best_searched, "Only searched points fit." if best_searched else NONE_FITS
    if best_searched is None:
        stands = f" The {best_simple.kind} allocation {best_simple.id} is recommended."
        return best_simple, NONE_SEARCHED + stands
    gain = paired_difference(
        best_simple.score.loss_per_fact, best_searched.score.loss_per_fact, relations
    )
    figures = f"{gain.mean:+.3f} +- {gain.stderr:.3f} nats on validation facts"
    if gain.mean > 0 and gain.significant:
        return best_searched, (
            f"The search beats the best simple allocation ({best_simple.kind} "
            f"{best_simple.id}): its answer loss is lower by {figures}."
        )
    return best_simple, (
        "No significant gain at this budget: the search did not beat the best simple allocation "
        f"beyond noise ({figures}); the {best_simple.kind} allocation {best_simple.id} is "
        "recommended."
    )


def unmet(scores: Sequence[Score], max_text_kl_nats: float) -> str:
    """The verdict where no point within the budget keeps the limit of text KL.

    Args:
        scores: on search facts, of assignments within the budget.
    """
    limit = f"{max_text_kl_nats:g} nats a token"
    read = [(score.text.kl.mean, score) for score in scores if score.text is not None]
    least, nearest = min(read, key=lambda found: found[0], default=(0.0, None))
    if nearest is None or least <= max_text_kl_nats:
        return f"No validated point within the budget keeps text KL to {limit} yet."
    return (
        f"No assignment within the budget keeps text KL to {limit}: the nearest of {len(read)}, "
        f"{nearest.kind} {nearest.assignment.id}, reaches {least:.3f}; raise --max-text-kl or "
        "--budget."
    )
