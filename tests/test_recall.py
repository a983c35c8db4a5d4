"""The proxy: scores equal a naive loop, and the reference is perfect."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build_tokenizer, tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from mpsearch import recall
from mpsearch.errors import CheckError, UsageError
from mpsearch.facts import Fact, FactSet
from mpsearch.models import Model, from_module
from mpsearch.recall import RecallProxy, ask
from mpsearch.scores import NoiseFloor

ROUNDING = 5e-5  # nats, float32 sums in another order; see test_forward.py


def float32_model(module: object, tokenizer: object) -> Model:
    return from_module("float32", Path(), module, tokenizer, torch.device("cpu"), torch.float32)


@pytest.fixture
def damaged(taught: Model) -> Iterator[Model]:
    """The same with noise on two layers, taken back afterwards."""
    generator = torch.Generator().manual_seed(5)
    layers = ["model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"]
    for layer in layers:
        noise = torch.randn(taught.originals[layer].shape, generator=generator)
        taught.places[layer].put(taught.originals[layer] + 0.2 * noise)
    yield taught
    for layer in layers:
        taught.places[layer].put(taught.originals[layer])


@pytest.fixture(scope="module")
def wordy() -> FactSet:
    """Facts whose answers have one to three words, all of them in the vocabulary."""
    answers = ["red", "red green", "blue", "white black brown", "flat long", "north"]
    facts = [
        Fact("color", "the color of {} is", f"s{n}", answers[n % len(answers)]) for n in range(48)
    ]
    return FactSet(tuple(facts), "wordy")


def naive_log_probs(
    model: Model, fact_set: FactSet, fact: Fact, answer: str, shots: int = 4
) -> list[Tensor]:
    """`(vocab,)` log-probabilities before each answer token, by one plain forward a token."""
    examples = fact_set.demonstrations(fact.relation, shots)
    text = "".join(f"{e.prompt} {e.answer}\n" for e in examples) + fact.prompt
    tokens = model.tokenizer(text)["input_ids"]
    found = []
    for token in model.tokenizer(answer)["input_ids"]:
        with torch.no_grad():
            logits = model.module(torch.tensor([tokens])).logits[0, -1]
        found.append(logits.double().log_softmax(-1))
        tokens = [*tokens, token]
    return found


def naive_sum(model: Model, fact_set: FactSet, fact: Fact, answer: str, shots: int = 4) -> float:
    tokens = model.tokenizer(answer)["input_ids"]
    steps = naive_log_probs(model, fact_set, fact, answer, shots)
    return sum(float(step[token]) for step, token in zip(steps, tokens, strict=True))


# --------------------------------------------------------------------------------- the scores


@pytest.mark.parametrize("contrast", [False, True])
def test_answer_log_prob_is_the_sum_over_its_tokens(
    damaged: Model, wordy: FactSet, contrast: bool
) -> None:
    facts = wordy.part("search")
    scores = RecallProxy(damaged, wordy, facts, contrast=contrast).score()
    expected = [naive_sum(damaged, wordy, fact, fact.answer) for fact in facts]
    assert {len(fact.answer.split()) for fact in facts} == {1, 2, 3}
    np.testing.assert_allclose(scores.log_prob, expected, atol=ROUNDING, rtol=0)


def test_kl_is_that_of_the_first_answer_token(taught: Model, wordy: FactSet) -> None:
    facts = wordy.part("validation")
    proxy = RecallProxy(taught, wordy, facts, contrast=False)
    before = [naive_log_probs(taught, wordy, fact, fact.answer)[0] for fact in facts]
    layer = "model.layers.1.mlp.gate_proj"
    taught.places[layer].put(taught.originals[layer] * -1)
    try:
        found = proxy.score().kl
        after = [naive_log_probs(taught, wordy, fact, fact.answer)[0] for fact in facts]
    finally:
        taught.places[layer].put(taught.originals[layer])
    expected = [
        float((p.exp() * (p - q)).sum()) for p, q in zip(before, after, strict=True)
    ]  # fmt: skip
    assert min(expected) > 1e-3
    np.testing.assert_allclose(found, expected, atol=ROUNDING, rtol=1e-4)


def test_what_the_reference_said_lies_on_disk_where_memory_is_short(
    taught: Model, wordy: FactSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = wordy.part("validation")
    proxies = []
    for share in (recall._MOST_MEMORY, 0.0):
        monkeypatch.setattr(recall, "_MOST_MEMORY", share)
        proxies.append(RecallProxy(taught, wordy, facts, contrast=False))
        assert proxies[-1].first is not None
        assert proxies[-1].first.log_probs.in_memory == (share > 0)
    layer = "model.layers.1.mlp.gate_proj"
    taught.places[layer].put(taught.originals[layer] * -1)
    try:
        in_memory, on_disk = (proxy.score().kl for proxy in proxies)
    finally:
        taught.places[layer].put(taught.originals[layer])
    assert in_memory.min() > 0
    assert np.array_equal(in_memory, on_disk)


@pytest.mark.parametrize("contrast", [False, True])
def test_the_reference_has_no_kl_and_no_loss_against_itself(
    tiny: Model, tiny_facts: FactSet, contrast: bool
) -> None:
    proxy = RecallProxy(tiny, tiny_facts, tiny_facts.part("search"), contrast=contrast)
    again = proxy.score()
    assert (again.kl == 0).all()
    assert (again.log_prob == proxy.reference.log_prob).all()
    assert (proxy.reference.kl == 0).all()
    assert (again.correct is None) == (again.margin is None) == (not contrast)


def test_contrastive_recall_compares_log_probability_per_token(
    damaged: Model, wordy: FactSet
) -> None:
    facts = wordy.part("search")
    scores = RecallProxy(damaged, wordy, facts, contrast=True).score()
    assert scores.correct is not None and scores.margin is not None
    assert scores.lead is not None
    per_token, per_answer, margins, leads = [], [], [], []
    for fact in facts:
        sums, means = [], []
        for answer in (fact.answer, *wordy.distractors(fact)):
            sums.append(naive_sum(damaged, wordy, fact, answer))
            means.append(sums[-1] / len(answer.split()))
        per_answer.append(max(sums) == sums[0])
        per_token.append(max(means) == means[0])
        margins.append(means[0] - max(means[1:]))
        first, second = sorted(means)[:-3:-1]
        leads.append(first - second)
    assert scores.correct.tolist() == per_token
    np.testing.assert_allclose(scores.margin, margins, atol=2 * ROUNDING, rtol=0)
    np.testing.assert_allclose(scores.lead, leads, atol=2 * ROUNDING, rtol=0)
    assert per_token != per_answer  # the rule matters here


def test_what_a_proxy_costs_does_not_grow_with_the_answers_asked(
    tiny: Model, tiny_facts: FactSet
) -> None:
    facts = tiny_facts.part("search")
    plain = RecallProxy(tiny, tiny_facts, facts, contrast=False)
    contrast = RecallProxy(tiny, tiny_facts, facts, contrast=True)
    assert plain.tokens == contrast.tokens  # one-word answers are predicted, never fed


def test_without_examples_and_without_a_beginning_token_facts_are_asked_alone(
    damaged: Model, wordy: FactSet
) -> None:
    assert damaged.tokenizer.bos_token is None
    facts = wordy.part("search")
    found = RecallProxy(damaged, wordy, facts, contrast=True, shots=0)
    expected = [naive_sum(damaged, wordy, fact, fact.answer, shots=0) for fact in facts]
    np.testing.assert_allclose(found.reference.log_prob, expected, atol=ROUNDING, rtol=0)
    shown = RecallProxy(damaged, wordy, facts, contrast=True)
    assert found.tokens < shown.tokens
    assert not np.allclose(found.reference.log_prob, shown.reference.log_prob, atol=0.01)


# --------------------------------------------------------------------------------- top-1


def stubborn_model(said: str) -> Model:
    """A model that says one token whatever it is asked, with a vocabulary of odd tokens."""
    words = ["<unk>", "q", "?", "re", "RED", "red", "redder", "d", "ro", " ", "blue"]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        tie_word_embeddings=False,
    )
    module = LlamaForCausalLM(config)
    with torch.no_grad():
        module.model.embed_tokens.weight.fill_(1)
        module.model.layers[0].self_attn.o_proj.weight.fill_(0)
        module.model.layers[0].mlp.down_proj.weight.fill_(0)
        module.lm_head.weight.fill_(0)
        module.lm_head.weight[words.index(said)] = 1
    return float32_model(module, fast)


@pytest.mark.parametrize(
    ("said", "counts"),
    [
        ("red", True),
        ("RED", True),
        ("re", True),
        ("redder", False),
        ("d", False),
        (" ", False),
        ("<unk>", False),
        ("ro", True),
        ("blue", False),
    ],
)
def test_top1_takes_a_nonempty_caseless_prefix_of_any_right_answer(said: str, counts: bool) -> None:
    fact = Fact("color", "q {} ?", "q", "Red", aliases=("rose",))
    fact_set = FactSet((fact, replace(fact, subject="b", answer="blue")), "two")
    scores = RecallProxy(stubborn_model(said), fact_set, [fact], contrast=False).reference
    assert scores.top1.tolist() == [counts]


def test_the_first_token_is_the_first_visible_one() -> None:
    """Where a tokenizer writes the space before an answer as a token of its own."""
    words = ["<unk>", "q", "?", " ", "7", "8", "b"]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    fact = Fact("digit", "q {} ?", "q", "7")
    fact_set = FactSet((fact, replace(fact, subject="b", answer="8")), "two")
    outcomes = set()
    for seed in range(20):
        model = float32_model(tiny_llama(len(words), seed), fast)
        asked = ask(model, fact_set, fact, "7", 0)
        assert asked.tokens[asked.start :] == (words.index(" "), words.index("7"))
        with torch.no_grad():
            said = model.module(torch.tensor([asked.tokens])).logits[0, -2].log_softmax(-1)
        proxy = RecallProxy(model, fact_set, [fact], contrast=False)
        assert proxy.first is not None
        torch.testing.assert_close(proxy.first.log_probs[0], said, atol=ROUNDING, rtol=0)
        assert proxy.reference.top1[0] == (words[int(said.argmax())] == "7")
        outcomes.add(bool(proxy.reference.top1[0]))
    assert outcomes == {True, False}


# ------------------------------------------------------------------- another model, other rows


def test_kl_against_another_model_is_what_one_model_swapped_would_show(
    damaged: Model, tiny: Model, tiny_folder: Path, wordy: FactSet
) -> None:
    facts = wordy.part("validation")
    module = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    whole = float32_model(module, damaged.tokenizer)
    before = RecallProxy(whole, wordy, facts, contrast=True)
    after = RecallProxy(damaged, wordy, facts, contrast=True, against=before.first)
    swapped = [damaged.places[layer.name].weight.clone() for layer in damaged.layers]
    for layer, weight in zip(damaged.layers, swapped, strict=True):
        whole.places[layer.name].put(weight)
    expected = before.score()
    assert expected.kl.max() > 0.01
    assert np.array_equal(after.reference.kl, expected.kl)
    assert np.array_equal(after.reference.log_prob, expected.log_prob)


def test_a_model_that_reads_other_tokens_is_not_compared(tiny: Model, tiny_facts: FactSet) -> None:
    facts = tiny_facts.part("validation")
    before = RecallProxy(tiny, tiny_facts, facts, contrast=True)
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<pad> $A", special_tokens=[("<pad>", 0)]
    )
    other = replace(tiny, tokenizer=tokenizer)
    with pytest.raises(UsageError, match="as other tokens"):
        RecallProxy(other, tiny_facts, facts, contrast=True, against=before.first)


def test_a_model_of_more_tokens_is_not_compared(tiny: Model, tiny_facts: FactSet) -> None:
    facts = tiny_facts.part("validation")
    first = RecallProxy(tiny, tiny_facts, facts, contrast=True).first
    assert first is not None
    fewer: Any = [first.log_probs[fact][:-3] for fact in range(len(facts))]
    with pytest.raises(UsageError, match=r"has \d+ tokens and the model that it is compared with"):
        RecallProxy(tiny, tiny_facts, facts, contrast=True, against=replace(first, log_probs=fewer))


def test_scores_do_not_depend_on_the_rows_beyond_rounding(
    taught: Model, tiny_facts: FactSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recall, "_NOISE_ROW_TOKENS", 40)
    facts = tiny_facts.part("search")
    proxy = RecallProxy(taught, tiny_facts, facts, contrast=True)
    noise = proxy.noise_floor()
    assert 0 < noise.log_prob_nats < ROUNDING  # float32: other rows, other order of sums
    assert noise.margin_nats is not None and 0 < noise.margin_nats < 2 * ROUNDING
    assert 0 < noise.mean_nats < ROUNDING
    assert (noise.flips, noise.facts) == (0, len(facts))
    monkeypatch.setattr(recall, "_NOISE_ROW_TOKENS", 512)
    assert proxy.noise_floor() == NoiseFloor(len(facts), 0.0, 0.0, 0.0, 0)  # the very same rows
    monkeypatch.setattr(recall, "_NOISE_FACTS", len(facts) // 2)
    assert proxy.noise_floor().facts <= len(facts) // 2


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_broken_weights_are_a_check_error(
    taught: Model, tiny_facts: FactSet, broken: float
) -> None:
    proxy = RecallProxy(taught, tiny_facts, tiny_facts.part("validation"), contrast=True)
    layer = "model.layers.1.self_attn.o_proj"
    taught.places[layer].put(torch.full_like(taught.originals[layer], broken))
    try:
        with pytest.raises(CheckError, match="answer log-probabilities are NaN") as caught:
            proxy.score()
    finally:
        taught.places[layer].put(taught.originals[layer])
    assert "\n" not in str(caught.value)
    assert (proxy.score().kl == 0).all()
