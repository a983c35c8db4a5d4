"""Which facts a run asks: chosen from what the reference knows, once, and frozen in the run."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from mpsearch.errors import CheckError, UsageError
from mpsearch.facts import Fact, FactSet
from mpsearch.forecast import Tokens
from mpsearch.forward import Pass
from mpsearch.guard import cut_text
from mpsearch.models import Model
from mpsearch.recall import SHOTS, RecallProxy, ask
from mpsearch.run import Run
from mpsearch.scores import RelationRecall
from mpsearch.sensitivity import forward_tokens
from mpsearch.text import Text

log = logging.getLogger(__name__)

_LEAST_A_RELATION = 6  # asked of the reference; of four with two answers even all right is luck
MOST_FACTS = {"sensitivity": 150, "search": 500, "validation": 160, "test": 320}


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
    began = time.perf_counter()
    proxy = _ask_gate(model, facts, search_facts)
    seconds = time.perf_counter() - began
    gate, known = _passing(proxy, search_facts)
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
    run.content["pace"] = {
        "facts": len(proxy.facts), "tokens": proxy.tokens, "seconds": seconds
    }  # fmt: skip
    run.save()


def asked_facts(run: Run, facts: FactSet, partition: str) -> tuple[Fact, ...]:
    """The facts that a run asks in a partition, in the order of its per-fact values."""
    by_key = {(fact.relation, fact.subject): fact for fact in facts.facts}
    keys = zip(run.relations(partition), run.content["subjects"][partition], strict=True)
    return tuple(by_key[key] for key in keys)


def tokens_asked(run: Run, model: Model, facts: FactSet, text: Text) -> Tokens:
    """What an evaluation pushes through the model, before any is made.

    Tokens of search facts are counted. Validation and test facts, asked with distractors, are taken
    to be as long as the gate's, which were asked so, too. Text is read beside validation facts, and
    beside search facts where the run limits its KL.
    """
    searched = asked_facts(run, facts, "search")
    tokens = Pass(model, [ask(model, facts, fact, fact.answer, SHOTS) for fact in searched]).tokens
    gate = run.content["pace"]
    each = gate["tokens"] / gate["facts"]

    def read(half: Sequence[str]) -> int:
        return sum(len(piece.tokens) for cut in cut_text(model.tokenizer, half) for piece in cut)

    return Tokens(
        search=tokens + (0 if run.max_text_kl_nats is None else read(text.search)),
        validation=each * len(run.relations("validation")) + read(text.held_out),
        test=each * len(run.relations("test")),
        sensitivity=forward_tokens(tokens * min(1.0, MOST_FACTS["sensitivity"] / len(searched))),
    )


def known_facts(
    model: Model, facts: FactSet, most: int
) -> tuple[tuple[RelationRecall, ...], list[Fact]]:
    """The gate, and at most `most` search facts that the reference gets right and that pass it.

    The gate is the reference's recall of search facts by relation: one on which it does not beat
    chance by two standard errors holds nothing that a search could preserve. Which ones are left
    out for that is logged.

    Raises:
        CheckError: it knows no relation.
        UsageError: no fact falls into the search partition, or too few do.
    """
    return _passing(_ask_gate(model, facts, most), most)


def _ask_gate(model: Model, facts: FactSet, most: int) -> RecallProxy:
    every = facts.part("search")
    if not every:
        raise UsageError(f"facts '{facts.source}': none is in the search partition; add facts")
    relations = {fact.relation for fact in every}
    candidates = balanced(every, max(most * 3 // 2, _LEAST_A_RELATION * len(relations)))
    return RecallProxy(model, facts, candidates, contrast=True)


def _passing(proxy: RecallProxy, most: int) -> tuple[tuple[RelationRecall, ...], list[Fact]]:
    gate = proxy.by_relation()
    known = {row.relation for row in gate if row.known}
    if not any(row.tells for row in gate):
        raise UsageError(
            f"{len(proxy.facts)} facts of {len(gate)} relations are in the search partition, too "
            "few of each to tell knowledge from luck; add facts"
        )
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
