"""Latent two-hop questions, composed from one-hop facts.

"The currency of the country of the landmark Eiffel Tower is the": the bridge, France, is never
named. A chain is made where a subject's answer, by spelling or alias, is a subject of a second
relation of the kind that the first one's answers are.

Partitions follow the bridge, and no entity is on both sides of one: a chain is asked only if its
subject and its bridge fall into the same partition. So no bridge that a search sees is tested.
Demonstrations are shown and never scored, so there the bridge alone must be a demonstration: all
chains over such a bridge are demonstrations, else there would be too few. Adding facts moves no
chain, unless one names a bridge by its main answer where only an alias led to one before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from mpsearch.facts.fact import Fact, Relation
from mpsearch.facts.fact_set import FactSet

FEWEST = 20  # chains to ask, below which a pair of relations says nothing


@dataclass(frozen=True)
class TwoHopFact(Fact):
    """A question over a bridge that it does not name, with both hops as facts of their own.

    A model that knows the chain's answer but not both hops has a shortcut; one that knows both
    hops but not the chain cannot compose them.

    Attributes:
        first: asks for the bridge; its right answers are the bridge's names.
        second: asks the bridge for the final answer; its subject is the bridge.
    """

    hops: tuple[Fact, ...] = ()

    @property
    def first(self) -> Fact:
        return self.hops[0]

    @property
    def second(self) -> Fact:
        return self.hops[1]

    @property
    def bridge(self) -> str:
        return self.second.subject

    @cached_property
    def partition(self) -> str:
        return self.second.partition


def compose(one_hop: FactSet) -> FactSet:
    """All two-hop questions that a set of one-hop facts gives; empty where its file connects none.

    Their relation is named `first/second`.
    """
    facts: list[Fact] = []
    for first in one_hop.about:
        for second in one_hop.about:
            if first.first_hop and second.second_hop and first.range == second.domain:
                chains = list(_chains(one_hop, first, second))
                scored = [chain for chain in chains if chain.partition != "demonstrations"]
                if len(scored) >= FEWEST and len({chain.answer for chain in scored}) > 1:
                    facts += chains
    return FactSet(tuple(sorted(facts, key=lambda f: f.relation)), f"{one_hop.source}, two hops")


def _chains(one_hop: FactSet, first: Relation, second: Relation) -> Iterator[TwoHopFact]:
    templates = [template.replace("{}", first.first_hop) for template in second.second_hop]
    by_subject = {f.subject.casefold(): f for f in one_hop.of(second.name)}
    for hop in one_hop.of(first.name):
        bridges = [by_subject[a.casefold()] for a in hop.accepted if a.casefold() in by_subject]
        if not bridges or bridges[0].partition not in (hop.partition, "demonstrations"):
            continue
        # Another name of the bridge may be a subject too; what it leads to is no wrong answer.
        answer, *aliases = dict.fromkeys(right for b in bridges for right in b.accepted)
        if any(_within(right, hop.subject) for right in (answer, *aliases)):
            continue  # the question would give its answer away, as Kuwait City does
        yield TwoHopFact(
            f"{first.name}/{second.name}",
            templates[0],
            hop.subject,
            answer,
            tuple(aliases),
            tuple(templates[1:]),
            (hop, bridges[0]),
        )


def _within(answer: str, subject: str) -> bool:
    """Whether an answer stands in a subject as whole words."""
    words = [" " + " ".join(text.casefold().split()) + " " for text in (answer, subject)]
    return words[0] in words[1]
