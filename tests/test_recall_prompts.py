"""Prompt KL: that of a plain pass over a relation's first prompt, at no token more."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import damage
from test_guard import ROUNDING
from torch import Tensor

from mpsearch.facts import Fact, FactSet
from mpsearch.models import Model
from mpsearch.recall import RecallProxy, prompt


@pytest.fixture(scope="module")
def facts() -> FactSet:
    """Two relations whose words are all in the vocabulary."""
    answers = ["red", "green", "flat long", "north"]
    of = {"color": "the color of {} is", "place": "the place of {} is"}
    made = [
        Fact(relation, template, f"s{n}", answers[n % len(answers)])
        for relation, template in of.items()
        for n in range(40)
    ]
    return FactSet(tuple(made), "two relations")


@torch.no_grad()
def plain(model: Model, text: str) -> Tensor:
    """`(tokens, vocab)` log-probabilities after each token of a text."""
    tokens = model.tokenizer(text, return_tensors="pt")["input_ids"]
    logits: Tensor = model.module(tokens).logits[0]
    return logits.double().log_softmax(-1)


@pytest.mark.parametrize("contrast", [False, True])
def test_prompt_kl_is_the_mean_over_the_prompt_of_a_relations_first_fact(
    damaged: Model, facts: FactSet, contrast: bool
) -> None:
    asked = facts.part("search")
    proxy = RecallProxy(damaged, facts, asked, contrast=contrast, prompts=True)
    texts = {}
    for fact in asked:
        texts.setdefault(fact.relation, prompt(facts, fact, 4))
    assert len(texts) == 2
    before = {relation: plain(damaged, text) for relation, text in texts.items()}
    damage(damaged)
    found = proxy.score()
    assert found.prompt_kl is not None
    for fact, kl in zip(asked, found.prompt_kl, strict=True):
        p, q = before[fact.relation][:-1], plain(damaged, texts[fact.relation])[:-1]
        expected = float((p.exp() * (p - q)).sum(-1).mean())
        assert kl == pytest.approx(expected, abs=ROUNDING) and kl > 0.01
    assert len(set(found.prompt_kl)) == 2


def test_reading_prompts_costs_no_token_and_changes_nothing_else(
    damaged: Model, facts: FactSet
) -> None:
    asked = facts.part("search")
    proxies = [
        RecallProxy(damaged, facts, asked, contrast=False, prompts=prompts)
        for prompts in (False, True)
    ]
    assert proxies[0].tokens == proxies[1].tokens
    damage(damaged)
    without, found = (proxy.score() for proxy in proxies)
    assert without.prompt_kl is None
    np.testing.assert_allclose(found.log_prob, without.log_prob, atol=ROUNDING, rtol=0)
    np.testing.assert_allclose(found.kl, without.kl, atol=ROUNDING, rtol=0)


def test_the_reference_has_no_prompt_kl_and_a_part_of_the_scores_keeps_its_own(
    untaught: Model, facts: FactSet
) -> None:
    proxy = RecallProxy(untaught, facts, facts.part("search"), contrast=False, prompts=True)
    scores = proxy.score()
    assert scores.prompt_kl is not None and (scores.prompt_kl == 0).all()
    part = scores.part(slice(0, 3)).prompt_kl
    assert part is not None and part.shape == (3,)


def test_a_prompt_of_one_token_has_nothing_to_predict(untaught: Model) -> None:
    one = FactSet(tuple(Fact("one", "{}", f"s{n}", f"s{n + 1}") for n in range(12)), "one token")
    proxy = RecallProxy(untaught, one, one.facts, contrast=False, prompts=True, shots=0)
    scores = proxy.score()
    assert scores.prompt_kl is not None and scores.prompt_kl.tolist() == [0.0] * 12
