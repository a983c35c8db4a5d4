"""What a model said about a list of facts, and what is known of it by relation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpsearch.bootstrap import Interval, subject_bootstrap
from mpsearch.estimates import relation_mean

PROMPT_WEIGHT = 2.0


def objective(answer_loss: NDArray[Any], prompt_kl: NDArray[Any]) -> NDArray[Any]:
    """What a search lowers: answer loss plus twice the prompt KL, `(facts,)` in nats.

    The answer loss of a known fact has a sign, and a candidate that is chosen among many for it
    has lowered it by luck, too. KL has no sign to be lucky with, and a prompt has many tokens: it
    foretells the loss on facts of other relations where the loss on the search facts does not.
    """
    return answer_loss + PROMPT_WEIGHT * prompt_kl


@dataclass(frozen=True, eq=False)
class FactScores:
    """What one model said about a fixed list of facts.

    Attributes:
        log_prob: `(facts,)` of the answer, in nats.
        kl: `(facts,)` from the reference, in nats; zero for the reference itself.
        top1: `(facts,)` bool.
        margin: `(facts,)` the answer's log-probability per token minus the best distractor's, in
            nats; None where distractors were not asked.
        lead: `(facts,)` by how much the likeliest of the options, right or wrong, is ahead of the
            next; None likewise.
        prompt_kl: `(facts,)` from the reference a token of the prompt of each fact's relation, in
            nats; None where it was not read.
    """

    log_prob: NDArray[Any]
    kl: NDArray[Any]
    top1: NDArray[Any]
    margin: NDArray[Any] | None
    lead: NDArray[Any] | None = None
    prompt_kl: NDArray[Any] | None = None

    @property
    def correct(self) -> NDArray[Any] | None:
        """`(facts,)` bool, contrastive; None where distractors were not asked."""
        return None if self.margin is None else self.margin > 0

    def part(self, some: slice) -> FactScores:
        """The scores of some of the facts."""
        margin = None if self.margin is None else self.margin[some]
        lead = None if self.lead is None else self.lead[some]
        prompt_kl = None if self.prompt_kl is None else self.prompt_kl[some]
        return FactScores(
            self.log_prob[some], self.kl[some], self.top1[some], margin, lead, prompt_kl
        )


@dataclass(frozen=True)
class NoiseFloor:
    """What merely packing the same facts into other rows changes; a smaller difference is none.

    Attributes:
        facts: on which it was measured.
        mean_nats: bound on the mean answer loss that it gives, with 95 % confidence.
        log_prob_nats: 95 % of the answers' log-probabilities move by at most this.
        margin_nats: the same of the margins; None where distractors were not asked.
        flips: facts that turn from right to wrong or back.
    """

    facts: int
    mean_nats: float
    log_prob_nats: float
    margin_nats: float | None
    flips: int

    @classmethod
    def between(cls, a: FactScores, b: FactScores, relations: Sequence[str]) -> NoiseFloor:
        """Of one model's scores from two packings of the same facts."""
        change = a.log_prob - b.log_prob
        mean = relation_mean(change, relations)
        margin, flips = None, 0
        if a.margin is not None and b.margin is not None:
            margin = float(np.quantile(np.abs(a.margin - b.margin), 0.95))
            flips = int(((a.margin > 0) != (b.margin > 0)).sum())
        return cls(
            change.size,
            abs(mean.mean) + 1.96 * mean.stderr,
            float(np.quantile(np.abs(change), 0.95)),
            margin,
            flips,
        )


@dataclass(frozen=True)
class RelationRecall:
    """How well a model answers one relation.

    Attributes:
        facts: how many were asked.
        recall, top1: shares of right answers, contrastive and by the first token.
        chance: the recall of blind guessing.
    """

    relation: str
    facts: int
    recall: Interval
    top1: Interval
    chance: float

    @property
    def known(self) -> bool:
        """Whether recall beats chance by two standard errors of guessing."""
        return self.recall.mean > self._luck

    @property
    def tells(self) -> bool:
        """Whether its facts are enough that right answers to all would not be luck."""
        return self._luck < 1

    @property
    def _luck(self) -> float:
        return self.chance + 2 * sqrt(self.chance * (1 - self.chance) / self.facts)


@dataclass(frozen=True)
class RecallSummary:
    """How well a model answers a list of facts.

    Attributes:
        recall, top1, chance: means over relations of the means within them; the intervals are
            over subjects.
    """

    facts: int
    recall: Interval
    top1: Interval
    chance: float
    relations: tuple[RelationRecall, ...]

    def to_json(self) -> dict[str, Any]:
        rows = [{**asdict(row), "beats_chance": row.known} for row in self.relations]
        return {**asdict(self), "relations": rows}


def summarize(
    scores: FactScores,
    relations: Sequence[str],
    subjects: Sequence[str],
    chances: NDArray[Any],
    generator: np.random.Generator,
) -> RecallSummary:
    """Recall over all facts and by relation; see `by_relation` for the arguments.

    Args:
        generator: of the bootstrap over subjects.
    """
    rows = by_relation(scores, relations, chances)
    assert scores.correct is not None  # by_relation has refused that
    recall, _ = subject_bootstrap(scores.correct, relations, subjects, generator)
    top1, _ = subject_bootstrap(scores.top1, relations, subjects, generator)
    chance = float(np.mean([row.chance for row in rows]))
    return RecallSummary(len(relations), recall, top1, chance, rows)


def by_relation(
    scores: FactScores, relations: Sequence[str], chances: NDArray[Any]
) -> tuple[RelationRecall, ...]:
    """Recall of each relation, in the order in which they first stand in `relations`.

    Args:
        relations: `(facts,)` names.
        chances: `(facts,)` probability that a guess is right.
    Raises:
        ValueError: distractors were not asked.
    """
    if scores.correct is None:
        raise ValueError("recall by relation needs scores with distractors")
    names, found = np.asarray(relations), []
    for name in dict.fromkeys(relations):
        mine = names == name
        facts = int(mine.sum())
        recall = wilson(int(scores.correct[mine].sum()), facts)
        top1 = wilson(int(scores.top1[mine].sum()), facts)
        found.append(RelationRecall(name, facts, recall, top1, float(chances[mine].mean())))
    return tuple(found)


@dataclass(frozen=True)
class HopsRecall:
    """Recall of two-hop questions whose hops the model knows, or not, when asked one by one.

    Right without a hop is a shortcut; wrong with both is a failure to compose.

    Attributes:
        first, second: whether the hop is known.
        recall: None where there is no such question.
    """

    first: bool
    second: bool
    facts: int
    recall: Interval | None


def by_hops(scores: FactScores, first: FactScores, second: FactScores) -> tuple[HopsRecall, ...]:
    """Recall of two-hop questions by what is known of their hops, both known first.

    Args:
        first, second: of each question's hops, in the order of the questions.
    Raises:
        ValueError: distractors were not asked.
    """
    if scores.correct is None or first.correct is None or second.correct is None:
        raise ValueError("recall by hops needs scores with distractors")
    found = []
    for one, two in ((True, True), (True, False), (False, True), (False, False)):
        mine = (first.correct == one) & (second.correct == two)
        facts = int(mine.sum())
        recall = wilson(int(scores.correct[mine].sum()), facts) if facts else None
        found.append(HopsRecall(one, two, facts, recall))
    return tuple(found)


def wilson(right: float, facts: float) -> Interval:
    """A share and its 95 % score interval, which stays honest for few facts and near 0 and 1.

    Resampling would give a relation whose facts are all right an interval of no width.
    Source: Wilson, Journal of the American Statistical Association 22 (1927).
    """
    z2, share = 1.96**2, right / facts
    center = (share + z2 / (2 * facts)) / (1 + z2 / facts)
    half = 1.96 * sqrt(share * (1 - share) / facts + z2 / (4 * facts**2)) / (1 + z2 / facts)
    # Exact at both ends, where rounding would put the share just outside.
    return Interval(share, min(center - half, share), max(center + half, share))
