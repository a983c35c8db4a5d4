"""What a set of facts holds, and what in it a user should fix before trusting a score.

Lengths are in characters, as no tokenizer is at hand. The chance level of a relation is the
contrastive recall of blind guessing: one over the answers that a fact is asked with, averaged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from mpsearch.facts.fact import PARTITIONS, Fact
from mpsearch.facts.fact_set import DISTRACTORS, FactSet
from mpsearch.facts.two_hop import compose

FEWEST_DEMONSTRATIONS = 4  # what a prompt shows
FEWEST_SCORED = 2  # in each other partition; a standard error needs two


@dataclass(frozen=True)
class RelationSummary:
    """A relation in figures.

    Attributes:
        partitions: facts in each partition.
        templates: ways to ask every fact of it, the main one included.
        answers: different main answers.
        several_answers: facts with more than one right answer.
        answer_characters: mean and greatest length of the main answers.
        chance: contrastive recall of blind guessing.
    """

    relation: str
    kind: str
    source: str
    facts: int
    partitions: dict[str, int]
    templates: int
    answers: int
    several_answers: int
    answer_characters: tuple[float, int]
    chance: float


@dataclass(frozen=True)
class Description:
    """A fact set in figures.

    Attributes:
        repeated: questions, word by word, that more than one relation asks with the same answer.
        contradicting: the same with different answers.
        warnings: a line each.
    """

    source: str
    digest: str
    one_hop: int
    two_hop: int
    relations: tuple[RelationSummary, ...]
    repeated: tuple[str, ...]
    contradicting: tuple[str, ...]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def describe(one_hop: FactSet) -> Description:
    """Figures and warnings of a set and of the two-hop questions that it gives."""
    two_hop = compose(one_hop)
    summaries = [
        _summary(facts, relation, kind)
        for facts, kind in ((one_hop, "one-hop"), (two_hop, "two-hop"))
        for relation in facts.relations
    ]
    repeated, contradicting = _same_questions(one_hop.facts)
    return Description(
        source=one_hop.source,
        digest=one_hop.digest,
        one_hop=len(one_hop.facts),
        two_hop=len(two_hop.facts),
        relations=tuple(summaries),
        repeated=repeated,
        contradicting=contradicting,
        warnings=(
            *(line for summary in summaries for line in _too_few(summary)),
            *(line for relation in one_hop.relations for line in _overlaps(one_hop, relation)),
            *(f"'{prompt}' is asked twice with different answers" for prompt in contradicting),
        ),
    )


def _summary(fact_set: FactSet, relation: str, kind: str) -> RelationSummary:
    facts = fact_set.of(relation)
    partitions = Counter(fact.partition for fact in facts)
    answers = Counter(dict.fromkeys((fact.answer for fact in facts), 1))
    folded = Counter(answer.casefold() for answer in answers)

    def asked_with(fact: Fact) -> int:
        right = sum(folded[answer] for answer in {a.casefold() for a in fact.accepted})
        return 1 + min(DISTRACTORS, len(answers) - right)

    lengths = [len(fact.answer) for fact in facts]
    return RelationSummary(
        relation=relation,
        kind=kind,
        source=next((about.source for about in fact_set.about if about.name == relation), ""),
        facts=len(facts),
        partitions={name: partitions[name] for name in PARTITIONS},
        templates=min(len(fact.templates) for fact in facts),
        answers=len(answers),
        several_answers=sum(bool(fact.aliases) for fact in facts),
        answer_characters=(sum(lengths) / len(lengths), max(lengths)),
        chance=sum(1 / asked_with(fact) for fact in facts) / len(facts),
    )


def _same_questions(facts: tuple[Fact, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Prompts that stand in the set more than once: with one answer, with different ones."""
    answers: dict[str, str] = {}
    repeated: dict[str, None] = {}
    contradicting: dict[str, None] = {}
    for fact in facts:
        prompt = fact.prompt
        if prompt not in answers:
            answers[prompt] = fact.answer
        else:
            (repeated if answers[prompt] == fact.answer else contradicting)[prompt] = None
    return tuple(repeated), tuple(contradicting)


def _too_few(summary: RelationSummary) -> Iterator[str]:
    name = f"relation '{summary.relation}'"
    if summary.answers < 2:
        yield f"{name} has one answer only; facts need wrong answers to be told from"
    if (found := summary.partitions["demonstrations"]) < FEWEST_DEMONSTRATIONS:
        yield (
            f"{name} has {found} demonstrations, prompts show {FEWEST_DEMONSTRATIONS} where they "
            "can; add facts"
        )
    for partition in PARTITIONS[1:]:
        if (found := summary.partitions[partition]) < FEWEST_SCORED:
            yield (
                f"{name} has {found} facts in the {partition} partition, below {FEWEST_SCORED} it "
                "has no standard error; add facts"
            )


def _overlaps(fact_set: FactSet, relation: str) -> Iterator[str]:
    """Texts that are the answer of one fact and an alias of another answer elsewhere.

    Where the two mean the same, the first fact may meet the other answer as a distractor, though
    it is right; where they only overlap, as music and jazz do, that is fair.
    """
    facts = fact_set.of(relation)
    answers = {fact.answer.casefold() for fact in facts}
    found = sorted(
        {
            f"'{alias}' ('{fact.answer}')"
            for fact in facts
            for alias in fact.aliases
            if alias.casefold() in answers and alias.casefold() != fact.answer.casefold()
        }
    )
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        yield (
            f"relation '{relation}': some facts give as an alias what is another's answer: "
            f"{', '.join(found[:3])}{more}; where both mean the same, spell the answer one way"
        )
