"""The pass: packed trie rows say what every sequence would say alone, at the cost of prefixes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, tiny_family, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from mpsearch.forward import _ROW_COST, Pass, Row, TokenSequence, pack
from mpsearch.models import Model, from_module

VOCABULARY = 64
# Float32 sums in another order: a few units of 1e-6 on log-probabilities of about -20. A wrong
# mask or position changes them by tenths or more.
ROUNDING = 2e-5


def float32_model(module: torch.nn.Module) -> Model:
    """Bf16 on some CPUs would hide a wrong mask in its rounding."""
    return from_module(
        "float32", Path(), module, None, torch.device("cpu"), dtype=torch.float32
    )  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Model:
    return float32_model(tiny_llama(VOCABULARY, seed=1))


def branching(count: int, seed: int) -> list[TokenSequence]:
    """Sequences that share beginnings of all lengths, some whole, with answers of 1 to 4 tokens."""
    draw = random.Random(seed)
    sequences: list[TokenSequence] = []
    for _ in range(count):
        shared: tuple[int, ...] = ()
        if sequences and draw.random() < 0.8:
            other = draw.choice(sequences).tokens
            shared = other[: draw.randint(1, len(other))]
        fresh = [draw.randrange(VOCABULARY) for _ in range(draw.randint(2, 9))]
        tokens = (*shared, *fresh)
        start = draw.randint(max(1, len(tokens) - 4), len(tokens) - 1)
        sequences.append(TokenSequence(tokens, start))
    return sequences


@torch.no_grad()
def alone(model: Model, sequence: TokenSequence) -> Tensor:
    """`(length, vocab)` log-probabilities of the continuation from a plain forward."""
    logits = model.module(torch.tensor([sequence.tokens])).logits[0].float()
    return logits.log_softmax(-1)[sequence.start - 1 : -1]


def sum_alone(model: Model, sequence: TokenSequence) -> float:
    answer = torch.tensor(sequence.tokens[sequence.start :])[:, None]
    return float(alone(model, sequence).double().gather(1, answer).sum())


# ------------------------------------------------------------------------- the same as alone


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_packed_log_probabilities_equal_those_of_each_sequence_alone(
    model: Model, seed: int
) -> None:
    sequences = branching(24, seed)
    expected = torch.tensor([sum_alone(model, sequence) for sequence in sequences])
    found = Pass(model, sequences).run()
    assert found.dtype == torch.float64
    assert len(Pass(model, sequences).rows) == 1  # so that they really shared a row
    torch.testing.assert_close(found.float(), expected, atol=ROUNDING, rtol=0)


def test_every_step_of_a_continuation_equals_that_of_the_sequence_alone(model: Model) -> None:
    sequences = branching(12, seed=3)
    steps = {
        index: (found, tokens) for index, found, tokens in Pass(model, sequences).continuations()
    }
    assert sorted(steps) == list(range(len(sequences)))
    for index, sequence in enumerate(sequences):
        found, tokens = steps[index]
        assert tuple(tokens.tolist()) == sequence.tokens[sequence.start :]
        torch.testing.assert_close(found, alone(model, sequence), atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("max_nodes", [1, 7, 40])
def test_results_do_not_depend_on_the_row_size(model: Model, max_nodes: int) -> None:
    sequences = branching(24, seed=4)
    whole, parts = Pass(model, sequences), Pass(model, sequences, max_nodes=max_nodes)
    assert len(parts.rows) > len(whole.rows) == 1
    torch.testing.assert_close(parts.run(), whole.run(), atol=ROUNDING, rtol=0)


def test_results_come_in_the_order_of_the_sequences(model: Model) -> None:
    sequences = branching(16, seed=5)
    forwards = Pass(model, sequences, max_nodes=30).run()
    backwards = Pass(model, sequences[::-1], max_nodes=30).run()
    torch.testing.assert_close(forwards, backwards.flip(0), atol=ROUNDING, rtol=0)


def test_equal_sequences_and_sequences_inside_others_are_answered_too(model: Model) -> None:
    long = TokenSequence((3, 1, 4, 1, 5, 9, 2), 5)
    sequences = [long, long, TokenSequence((3, 1, 4, 1), 2), TokenSequence((3, 1), 1)]
    expected = torch.tensor([sum_alone(model, sequence) for sequence in sequences])
    work = Pass(model, sequences)
    torch.testing.assert_close(work.run().float(), expected, atol=ROUNDING, rtol=0)
    assert work.tokens == 6


def test_visit_gets_the_distributions_at_the_continuation_tokens(model: Model) -> None:
    sequences = branching(10, seed=6)
    seen: dict[int, Tensor] = {}
    Pass(model, sequences, max_nodes=30).run(lambda index, found: seen.update({index: found}))
    for index, sequence in enumerate(sequences):
        torch.testing.assert_close(seen[index], alone(model, sequence), atol=ROUNDING, rtol=0)


def test_each_run_uses_the_weights_of_its_moment() -> None:
    model = float32_model(tiny_llama(VOCABULARY, seed=1))
    sequences = branching(6, seed=7)
    work = Pass(model, sequences)
    before = work.run()
    model.places["model.layers.0.mlp.down_proj"].put(torch.randn(64, 128))
    expected = torch.tensor([sum_alone(model, sequence) for sequence in sequences])
    after = work.run()
    torch.testing.assert_close(after.float(), expected, atol=ROUNDING, rtol=0)
    assert (before - after).abs().min() > 0.01


def test_nan_from_the_model_is_handed_on() -> None:
    model = float32_model(tiny_llama(VOCABULARY, seed=1))
    model.places["model.layers.1.mlp.down_proj"].put(torch.full((64, 128), torch.nan))
    assert Pass(model, branching(5, seed=8)).run().isnan().all()


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt_neox"])
def test_other_architectures_are_answered_as_alone(architecture: str) -> None:
    model = small(architecture)
    sequences = branching(8, seed=9)
    expected = torch.tensor([sum_alone(model, sequence) for sequence in sequences])
    torch.testing.assert_close(
        Pass(model, sequences).run().float(), expected, atol=ROUNDING, rtol=0
    )


@pytest.mark.parametrize(
    ("architecture", "options"),
    [("granite", {"logits_scaling": 8.0}), ("cohere", {"logit_scale": 0.25})],
)
def test_architectures_that_scale_logits_are_answered_as_alone(
    architecture: str, options: dict[str, float]
) -> None:
    model = small(architecture, **options)
    sequences = branching(8, seed=9)
    expected = torch.tensor([sum_alone(model, sequence) for sequence in sequences])
    torch.testing.assert_close(
        Pass(model, sequences).run().float(), expected, atol=ROUNDING, rtol=0
    )


def small(architecture: str, **options: float) -> Model:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        architecture,
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        pad_token_id=0,
        **options,
    )
    return float32_model(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa"))


# --------------------------------------------------------------------------------- what it costs

_tokens = st.lists(st.integers(0, 3), min_size=2, max_size=7)
_sequences = st.lists(
    _tokens.flatmap(
        lambda tokens: st.builds(
            TokenSequence, st.just(tuple(tokens)), st.integers(1, len(tokens) - 1)
        )
    ),
    min_size=1,
    max_size=12,
)


@given(sequences=_sequences, max_nodes=st.integers(1, 20))
@settings(max_examples=150, deadline=None)
def test_a_row_has_one_node_for_each_distinct_prefix(
    sequences: list[TokenSequence], max_nodes: int
) -> None:
    rows = pack(sequences, max_nodes)
    indices = [index for row in rows for index, _, _ in row.reads]
    assert sorted(indices) == list(range(len(sequences)))
    for row in rows:
        inputs = [sequences[index].tokens[:-1] for index, _, _ in row.reads]
        prefixes = {tokens[: end + 1] for tokens in inputs for end in range(len(tokens))}
        assert len(row.tokens) == len(prefixes)
        assert len(row.tokens) <= max_nodes or len(row.reads) == 1


@given(sequences=_sequences.filter(lambda found: len(found) <= 8), max_nodes=st.integers(1, 20))
@settings(max_examples=150, deadline=None)
def test_no_cuts_of_the_sorted_sequences_are_cheaper(
    sequences: list[TokenSequence], max_nodes: int
) -> None:
    inputs = sorted(sequence.tokens[:-1] for sequence in sequences)

    def cost(part: list[tuple[int, ...]]) -> float:
        nodes = len({tokens[: end + 1] for tokens in part for end in range(len(tokens))})
        return nodes + _ROW_COST if nodes <= max_nodes or len(part) == 1 else float("inf")

    def cheapest(rest: list[tuple[int, ...]]) -> float:
        ends = range(1, len(rest) + 1)
        return min((cost(rest[:end]) + cheapest(rest[end:]) for end in ends), default=0)

    rows = pack(sequences, max_nodes)
    assert sum(len(row.tokens) + _ROW_COST for row in rows) == cheapest(inputs)


def test_rows_are_cut_between_questions_of_different_beginnings() -> None:
    beginnings = [tuple(range(start, start + 10)) for start in (0, 20, 40)]
    sequences = [TokenSequence((*b, n, 9), 11) for b in beginnings for n in range(60, 64)]
    rows = pack(sequences, max_nodes=16)  # a beginning and its four questions are 14
    assert [len(row.tokens) for row in rows] == [14, 14, 14]


@given(sequences=_sequences)
@settings(max_examples=150, deadline=None)
def test_a_node_attends_to_its_own_prefix_and_nothing_else(sequences: list[TokenSequence]) -> None:
    (row,) = pack(sequences, max_nodes=10_000)
    mask = row.mask()
    for index, nodes, continuation in row.reads:
        sequence = sequences[index]
        assert tuple(continuation) == sequence.tokens[sequence.start :]
        for depth, node in enumerate(nodes, start=sequence.start - 1):
            seen = mask[node].nonzero().flatten().tolist()
            assert [row.tokens[n] for n in seen] == list(sequence.tokens[: depth + 1])
            assert [row.positions[n] for n in seen] == list(range(depth + 1))


def test_mask_of_a_fork_and_a_stranger() -> None:
    row = Row()
    for index, tokens in enumerate([(11, 12, 13, 9), (11, 12, 14, 9), (15, 9)]):
        row.add(index, TokenSequence(tokens, len(tokens) - 1))
    assert row.tokens == [11, 12, 13, 14, 15]
    assert row.positions == [0, 1, 2, 2, 0]
    assert row.parents == [-1, 0, 1, 1, -1]
    expected = [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [0, 0, 0, 0, 1],
    ]
    assert row.mask().dtype == torch.bool
    assert row.mask().int().tolist() == expected


def test_the_last_token_is_never_fed(model: Model) -> None:
    last = VOCABULARY - 1
    sequences = [TokenSequence((*s.tokens[:-1], last), s.start) for s in branching(20, seed=10)]
    sequences = [s for s in sequences if last not in s.tokens[:-1]]
    fed = torch.cat([row.inputs["input_ids"][0] for row in Pass(model, sequences).rows])
    assert len(sequences) > 10
    assert last not in fed.tolist()


def test_logits_are_computed_only_where_they_are_read(model: Model) -> None:
    context = tuple(range(20))
    sequences = [TokenSequence((*context, answer, 5), 20) for answer in (30, 31, 32)]
    work = Pass(model, sequences)
    (row,) = work.rows
    # The context's last node is shared; each answer's first token predicts its second.
    assert work.logits(row).shape == (4, VOCABULARY)
    assert work.tokens == 23


def test_a_question_asked_with_many_answers_costs_its_context_once(model: Model) -> None:
    context = tuple(range(30))
    sequences = [TokenSequence((*context, answer), 30) for answer in range(40, 48)]
    assert Pass(model, sequences).tokens == 30


@pytest.mark.parametrize("start", [-1, 0, 3, 4])
def test_a_continuation_must_be_preceded_by_something_and_not_be_empty(start: int) -> None:
    with pytest.raises(ValueError, match=rf"start {start} outside 1\.\.2"):
        TokenSequence((7, 8, 9), start)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_says_in_a_trie_what_it_says_alone(family: str) -> None:
    model = tiny_family(family)
    sequences = branching(12, seed=5)
    found = Pass(model, sequences).run()
    expected = torch.tensor([sum_alone(model, s) for s in sequences], dtype=torch.float64)
    assert torch.allclose(found, expected, atol=ROUNDING, rtol=0)
