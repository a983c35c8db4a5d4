"""Which facts a run asks: chosen from what the reference knows, once, and frozen in the run."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from mpsearch.errors import CheckError, UsageError
from mpsearch.facts import Fact, FactSet
from mpsearch.models import Model
from mpsearch.recall import RecallProxy
from mpsearch.run import Run
from mpsearch.scores import RelationRecall

log = logging.getLogger(__name__)

MOST_FACTS = {"search": 500, "validation": 160, "test": 320}


def freeze_facts(run: Run, model: Model, facts: FactSet, search_facts: int) -> None:
    """Decide which facts each partition asks, and write it to the run if it is not there yet.

    Search facts are some that the reference gets right. Validation and test facts are of the same
    relations, whether the reference knows them or not, so that recall on them is unbiased.

    Raises:
        CheckError: the reference knows no relation.
        UsageError: too few facts in a partition.
    """
    if "asked" in run.content:
        return
    gate, known = known_facts(model, facts, search_facts)
    relations = [row.relation for row in gate if row.known]
    asked = {"search": known}
    for partition in ("validation", "test"):
        asked[partition] = balanced(facts.part(partition, relations), MOST_FACTS[partition])
        if len(asked[partition]) < 2:
            raise UsageError(
                f"facts '{facts.source}': {len(asked[partition])} of the known relations' facts "
                f"fall into the {partition} partition, at least 2 are needed; add facts"
            )
    run.content["asked"] = {name: [f.relation for f in found] for name, found in asked.items()}
    run.content["subjects"] = {name: [f.subject for f in found] for name, found in asked.items()}
    run.content["gate"] = [
        {
            "relation": row.relation,
            "facts": row.facts,
            "recall": row.recall.mean,
            "chance": row.chance,
            "known": row.known,
        }
        for row in gate
    ]
    run.save()


def asked_facts(run: Run, facts: FactSet, partition: str) -> tuple[Fact, ...]:
    """The facts that a run asks in a partition, in the order of its per-fact values."""
    by_key = {(fact.relation, fact.subject): fact for fact in facts.facts}
    keys = zip(run.relations(partition), run.content["subjects"][partition], strict=True)
    return tuple(by_key[key] for key in keys)


def known_facts(
    model: Model, facts: FactSet, most: int
) -> tuple[tuple[RelationRecall, ...], list[Fact]]:
    """The gate, and at most `most` search facts that the reference gets right and that pass it.

    The gate is the reference's recall of search facts by relation: one on which it does not beat
    chance by two standard errors holds nothing that a search could preserve. Which ones are left
    out for that is logged.

    Raises:
        CheckError: it knows no relation.
        UsageError: no fact falls into the search partition.
    """
    candidates = balanced(facts.part("search"), most * 3 // 2)
    if not candidates:
        raise UsageError(f"facts '{facts.source}': none is in the search partition; add facts")
    proxy = RecallProxy(model, facts, candidates, contrast=True)
    gate = proxy.by_relation()
    known = {row.relation for row in gate if row.known}
    if not known:
        raise CheckError(
            "the reference answers no relation better than chance, so there is no knowledge to "
            "preserve; use other facts or another model"
        )
    if left_out := [row for row in gate if not row.known]:
        log.warning(
            "%d of %d relations are left out, as the reference does not beat chance on them: %s",
            len(left_out),
            len(gate),
            ", ".join(
                f"{row.relation} ({row.recall.mean:.0%} of {row.facts}, chance {row.chance:.0%})"
                for row in left_out
            ),
        )
    correct = proxy.reference.correct
    right = [] if correct is None else [f for f, ok in zip(proxy.facts, correct, strict=True) if ok]
    return gate, balanced([fact for fact in right if fact.relation in known], most)


def balanced(facts: Sequence[Fact], most: int) -> list[Fact]:
    """At most `most` facts, taken in turn from the relations, grouped by relation."""
    queues: dict[str, list[Fact]] = {}
    for fact in facts:
        queues.setdefault(fact.relation, []).append(fact)
    taken = dict.fromkeys(queues, 0)
    left = min(most, len(facts))
    while left > 0:
        for relation, queue in queues.items():
            if left > 0 and taken[relation] < len(queue):
                taken[relation] += 1
                left -= 1
    return [fact for relation, queue in queues.items() for fact in queue[: taken[relation]]]
