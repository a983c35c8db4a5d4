"""The gate: which relations the reference knows, and that chance looks like chance."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from conftest import build_tokenizer, tiny_llama
from test_recall import float32_model

from mpsearch.asked import known_facts
from mpsearch.errors import CheckError, UsageError
from mpsearch.facts import FactSet
from mpsearch.models import Model
from mpsearch.recall import RecallProxy


def shuffled(fact_set: FactSet, relations: tuple[str, ...], seed: int) -> FactSet:
    """The same subjects and answers, dealt anew within each of some relations."""
    dealer = random.Random(seed)
    pools = {r: [f.answer for f in fact_set.facts if f.relation == r] for r in relations}
    for pool in pools.values():
        dealer.shuffle(pool)
    facts = [
        replace(fact, answer=pools[fact.relation].pop()) if fact.relation in pools else fact
        for fact in fact_set.facts
    ]
    return FactSet(tuple(facts), "shuffled")


def known(model: Model, facts: FactSet) -> tuple[str, ...]:
    return tuple(row.relation for row in known_facts(model, facts, 500)[0] if row.known)


def test_taught_facts_are_known(tiny: Model, tiny_facts: FactSet) -> None:
    proxy = RecallProxy(tiny, tiny_facts, tiny_facts.part("search"), contrast=True)
    assert proxy.reference.correct is not None
    assert proxy.reference.correct.mean() > 0.95
    assert known(tiny, tiny_facts) == ("color", "place", "shape")


def test_chance_is_one_over_the_answers_asked(tiny: Model, tiny_facts: FactSet) -> None:
    proxy = RecallProxy(tiny, tiny_facts, tiny_facts.part("search"), contrast=True)
    chances = {"color": 1 / 6, "shape": 1 / 5, "place": 1 / 4}
    assert proxy.chances == pytest.approx([chances[name] for name in proxy.relations])
    assert {row.relation: row.chance for row in proxy.by_relation()} == pytest.approx(chances)


def test_shuffled_answers_give_chance(tiny: Model, tiny_facts: FactSet) -> None:
    recalls, errors = [], []
    for seed in range(8):
        dealt = shuffled(tiny_facts, tiny_facts.relations, seed)
        proxy = RecallProxy(tiny, dealt, dealt.part("search"), contrast=True)
        assert proxy.reference.correct is not None
        recalls.append(proxy.reference.correct.mean())
        chance = proxy.chances.mean()
        errors.append(chance * (1 - chance) / len(proxy.facts))
    assert abs(np.mean(recalls) - chance) < 3 * np.sqrt(np.mean(errors) / len(errors))


def test_a_relation_with_shuffled_answers_is_left_out_and_reported(
    tiny: Model, tiny_facts: FactSet, caplog: pytest.LogCaptureFixture
) -> None:
    dealt = shuffled(tiny_facts, ("shape",), seed=0)
    gate, facts = known_facts(tiny, dealt, 500)
    assert [row.relation for row in gate if row.known] == ["color", "place"]
    assert {fact.relation for fact in facts} == {"color", "place"}
    (shape,) = [row for row in gate if row.relation == "shape"]
    assert "1 of 3 relations are left out" in caplog.text
    assert f"shape ({shape.recall.mean:.0%} of {shape.facts}, chance 20%)" in caplog.text


def test_a_model_of_random_weights_is_at_chance_and_refused(tiny_facts: FactSet) -> None:
    tokenizer = build_tokenizer()
    recalls = []
    for seed in range(6):
        model = float32_model(tiny_llama(len(tokenizer), seed=seed), tokenizer)
        facts = [f for part in ("search", "validation", "test") for f in tiny_facts.part(part)]
        proxy = RecallProxy(model, tiny_facts, facts, contrast=True)
        assert proxy.reference.correct is not None
        recalls.append(proxy.reference.correct.mean())
        with pytest.raises(CheckError, match="no relation better than chance") as caught:
            known_facts(model, tiny_facts, 500)
        assert "\n" not in str(caught.value)
    assert np.mean(recalls) == pytest.approx(proxy.chances.mean(), abs=0.06)


def test_recall_by_relation_needs_distractors(tiny: Model, tiny_facts: FactSet) -> None:
    proxy = RecallProxy(tiny, tiny_facts, tiny_facts.part("validation"), contrast=False)
    with pytest.raises(ValueError, match="distractors"):
        proxy.by_relation()


def test_few_search_facts_are_taken_from_relations_of_which_enough_were_asked(
    tiny: Model, tiny_facts: FactSet
) -> None:
    gate, facts = known_facts(tiny, tiny_facts, 2)
    assert len(facts) == 2
    assert [(row.relation, row.facts, row.known) for row in gate] == [
        (name, 6, True) for name in ("color", "place", "shape")
    ]


def test_too_few_facts_to_tell_knowledge_from_luck_are_no_ignorance(
    tiny: Model, tiny_facts: FactSet
) -> None:
    first, *more = tiny_facts.part("search", ["place"])
    few = FactSet(tuple(f for f in tiny_facts.facts if f not in more and f.relation == "place"), "")
    assert few.part("search") == (first,)
    with pytest.raises(UsageError, match=r"1 facts of 1 relations .*too few of each.*add facts"):
        known_facts(tiny, few, 500)
