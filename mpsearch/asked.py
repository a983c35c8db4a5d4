"""Which facts a run asks: chosen from what the reference knows, once, and frozen in the run."""

from __future__ import annotations

from collections.abc import Sequence

from mpsearch.errors import UsageError
from mpsearch.facts import Fact, FactSet
from mpsearch.models import Model
from mpsearch.recall import RecallProxy, known_relations
from mpsearch.run import Run

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
    relations, known = known_facts(model, facts, search_facts)
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
    run.content["unknown_relations"] = [name for name in facts.relations if name not in relations]
    run.save()


def asked_facts(run: Run, facts: FactSet, partition: str) -> tuple[Fact, ...]:
    """The facts that a run asks in a partition, in the order of its per-fact values."""
    by_key = {(fact.relation, fact.subject): fact for fact in facts.facts}
    keys = zip(run.relations(partition), run.content["subjects"][partition], strict=True)
    return tuple(by_key[key] for key in keys)


def known_facts(model: Model, facts: FactSet, most: int) -> tuple[tuple[str, ...], list[Fact]]:
    """Relations that the reference knows, and at most `most` search facts that it gets right.

    Raises:
        CheckError: it knows no relation.
        UsageError: no fact falls into the search partition.
    """
    candidates = balanced(facts.part("search"), most * 3 // 2)
    if not candidates:
        raise UsageError(f"facts '{facts.source}': none is in the search partition; add facts")
    gate = RecallProxy(model, facts, candidates, contrast=True)
    relations = known_relations(gate)
    correct = gate.reference.correct
    right = [] if correct is None else [f for f, ok in zip(gate.facts, correct, strict=True) if ok]
    return relations, balanced([f for f in right if f.relation in relations], most)


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
