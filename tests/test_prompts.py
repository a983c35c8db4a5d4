"""Other prompts: exactly the paraphrase, more examples, and the examples in the other order."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mpsearch import recall
from mpsearch.facts import Fact, FactSet
from mpsearch.models import Model
from mpsearch.prompts import ask_otherwise, ask_reordered
from mpsearch.recall import RecallProxy, prompt


def silent(done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def paraphrased(tiny_facts: FactSet) -> FactSet:
    """The synthetic facts; colors may be asked in other words, in two ways."""
    facts = [
        replace(fact, paraphrases=("is the color of {}", "color {} is"))
        if fact.relation == "color"
        else fact
        for fact in tiny_facts.facts
    ]
    return FactSet(tuple(facts), "paraphrased")


def test_every_paraphrase_and_more_examples_are_asked(tiny: Model, paraphrased: FactSet) -> None:
    facts = paraphrased.part("search")[:40]
    reports: list[tuple[int, int]] = []
    found = ask_otherwise(tiny, paraphrased, facts, 2, lambda *report: reports.append(report))
    assert list(found) == ["paraphrase 1", "paraphrase 2", "more examples"]
    assert reports == [(0, 3), (1, 3), (2, 3), (3, 3)]

    asked = [f.paraphrased(2) if f.relation == "color" else f for f in facts]
    expected = RecallProxy(tiny, paraphrased.paraphrased(2), asked, contrast=True, shots=2)
    np.testing.assert_array_equal(
        found["paraphrase 2"].log_prob, expected.reference.log_prob
    )  # the same packing, so the same sums
    more = RecallProxy(tiny, paraphrased, facts, contrast=True, shots=4).reference
    np.testing.assert_array_equal(found["more examples"].log_prob, more.log_prob)

    # Facts without the paraphrase are asked as before; the others are not.
    before = RecallProxy(tiny, paraphrased, facts, contrast=True, shots=2).reference
    color = np.array([fact.relation == "color" for fact in facts])
    change = np.abs(found["paraphrase 1"].log_prob - before.log_prob)
    assert change[~color].max() < 1e-3 < change[color].min()


def test_facts_without_any_paraphrase_get_more_examples_only(
    tiny: Model, tiny_facts: FactSet
) -> None:
    facts = tiny_facts.part("search")[:5]
    assert list(ask_otherwise(tiny, tiny_facts, facts, 0, silent)) == ["more examples"]
    twice = ask_otherwise(tiny, tiny_facts, facts, 1, silent)["more examples"]
    two = RecallProxy(tiny, tiny_facts, facts, contrast=True, shots=2).reference
    np.testing.assert_array_equal(twice.log_prob, two.log_prob)
    # No relation has so many examples that there would be more.
    assert ask_otherwise(tiny, tiny_facts, facts, 40, silent) == {}


def test_examples_are_shown_in_the_opposite_order(
    tiny: Model, tiny_facts: FactSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = tiny_facts.part("search")[:3]
    first, second = tiny_facts.demonstrations("color", 2)
    lines = [f"{example.prompt} {example.answer}\n" for example in (first, second)]
    shown = [prompt(tiny_facts, facts[0], 2, reverse) for reverse in (False, True)]
    assert facts[0].relation == "color"
    assert shown == ["".join(lines) + facts[0].prompt, "".join(lines[::-1]) + facts[0].prompt]

    asked: set[bool] = set()

    def watched(fact_set: FactSet, fact: Fact, shots: int, reverse_examples: bool) -> str:
        asked.add(reverse_examples)
        return prompt(fact_set, fact, shots, reverse_examples)

    monkeypatch.setattr(recall, "prompt", watched)
    assert ask_reordered(tiny, tiny_facts, facts, 2) is not None
    assert asked == {True}
    assert ask_reordered(tiny, tiny_facts, facts, 1) is None
    assert ask_reordered(tiny, tiny_facts, facts, 0) is None
