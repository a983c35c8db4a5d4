"""The guard: equal to a plain pass of each paragraph, exact on itself, short of the KL by a bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import exp
from typing import Any

import pytest
import torch
from conftest import build_tokenizer, damage
from tokenizers import processors
from torch import Tensor

from mpsearch import divergence, guard
from mpsearch.errors import CheckError, UsageError
from mpsearch.guard import TextGuard, cut_paragraph
from mpsearch.models import Model

ROUNDING = 5e-5  # nats, float32 sums in another order; see test_forward.py
PARAGRAPHS = (
    "the color of s1 is red the place of s9 is north",
    "s4 s5 s6 is flat",
    "the shape of blue is the shape of the shape and square is brown",
    "red green blue white black brown",
)


@torch.no_grad()
def plain(model: Model, paragraph: str) -> tuple[Tensor, Tensor]:
    """`(tokens - 1, vocab)` log-probabilities of one paragraph alone, and what came."""
    tokens = model.tokenizer(paragraph, return_tensors="pt")["input_ids"]
    return model.module(tokens).logits[0, :-1].double().log_softmax(-1), tokens[0, 1:]


def test_kl_and_perplexity_equal_a_plain_pass_of_each_paragraph(damaged: Model) -> None:
    guarded = TextGuard(damaged, PARAGRAPHS)
    before = [plain(damaged, paragraph) for paragraph in PARAGRAPHS]
    damage(damaged)
    after = [plain(damaged, paragraph) for paragraph in PARAGRAPHS]
    scores = guarded.score()
    assert scores.tokens == tuple(len(came) for _, came in before)
    for found, passes in ((guarded.reference, before), (scores, after)):
        for log_prob, (log_probs, came) in zip(found.log_prob_nats, passes, strict=True):
            expected = log_probs.gather(-1, came[:, None]).sum().item()
            assert log_prob == pytest.approx(expected, abs=ROUNDING * len(came))
    for kl, (p, _), (q, _) in zip(scores.kl_nats, before, after, strict=True):
        expected = torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True).item()
        assert kl == pytest.approx(expected, abs=ROUNDING * len(p))
        assert kl > 0.01
    tokens, losses = 0, 0.0
    for paragraph in PARAGRAPHS:
        ids = damaged.tokenizer(paragraph, return_tensors="pt")["input_ids"]
        tokens += ids.shape[1] - 1
        losses += (ids.shape[1] - 1) * damaged.module(ids, labels=ids).loss.item()
    assert scores.perplexity == pytest.approx(exp(losses / tokens), rel=1e-5)
    assert scores.log_perplexity_change(guarded.reference).mean != 0


def test_the_reference_against_itself_is_exactly_zero(
    damaged: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    for top in (divergence.TOP, 5):
        monkeypatch.setattr(divergence, "TOP", top)
        damaged.restore()
        guarded = TextGuard(damaged, PARAGRAPHS)
        damage(damaged)
        assert guarded.score() != guarded.reference
        damaged.restore()
        assert guarded.score() == guarded.reference
        assert set(guarded.reference.kl_nats) == {0.0}


def test_first_blocks_that_are_as_before_are_not_run_again_and_say_the_same(
    damaged: Model,
) -> None:
    layer = "model.layers.1.mlp.down_proj"
    first = damaged.module.get_submodule("model.layers.0")
    guarded = TextGuard(damaged, PARAGRAPHS)
    calls: list[object] = []
    guarded.score({})
    handle = first.mlp.register_forward_hook(lambda *call: calls.append(call))
    damaged.places[layer].put(damaged.originals[layer] + 0.1)
    found = guarded.score({layer: "noisy"})
    handle.remove()
    assert not calls
    assert found == guarded.score() != guarded.reference


def test_fewer_tokens_kept_never_exceed_the_whole_kl_and_come_up_to_it(
    damaged: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for top in (1, 4, 16, 40, 10_000):
        monkeypatch.setattr(divergence, "TOP", top)
        damaged.restore()
        guarded = TextGuard(damaged, PARAGRAPHS)
        assert guarded.said is not None
        kept = min(top, len(damaged.tokenizer) - 1)
        assert {d.tops.shape[1] for d in guarded.said.distributions} == {kept}
        assert {d.log_probs.shape[1] for d in guarded.said.distributions} == {kept + 1}
        damage(damaged)
        found.append(guarded.score().kl.mean)
    assert found == sorted(found)
    assert 0 < found[0] < 0.8 * found[-1]
    assert found[-2] > 0.5 * found[-1]


def test_nan_weights_are_a_failed_check(damaged: Model) -> None:
    guarded = TextGuard(damaged, PARAGRAPHS)
    place = damaged.places["model.layers.0.mlp.up_proj"]
    place.put(torch.full_like(place.weight, float("nan")))
    with pytest.raises(CheckError, match="NaN"):
        guarded.score()


def test_another_model_is_measured_from_the_first_ones_predictions(damaged: Model) -> None:
    first = TextGuard(damaged, PARAGRAPHS)
    damage(damaged)
    second = TextGuard(damaged, PARAGRAPHS, against=first.said)
    assert second.reference == first.score()
    with pytest.raises(UsageError, match="reads the text as other tokens than 'tiny'"):
        TextGuard(damaged, PARAGRAPHS[::-1], against=first.said)


# ------------------------------------------------------------------------------- what is asked


@dataclass
class Words:
    """A tokenizer of one token a word, with special tokens around a text."""

    front: Sequence[int] = ()
    behind: Sequence[int] = ()

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        own = list(range(100, 100 + len(text.split())))
        special = [1] * len(self.front) + [0] * len(own) + [1] * len(self.behind)
        return {
            "input_ids": [*self.front, *own, *self.behind],
            "special_tokens_mask": special,
        }


def cut(tokenizer: Words, words: int) -> list[tuple[tuple[int, ...], int]]:
    pieces = cut_paragraph(tokenizer, " ".join("x" * words))
    return [(piece.tokens, piece.start) for piece in pieces]


def test_a_long_paragraph_is_cut_and_each_piece_begins_like_a_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(guard, "LENGTH", 4)
    assert cut(Words(), 6) == [((100, 101, 102, 103), 1), ((104, 105), 1)]
    assert cut(Words(), 5) == [((100, 101, 102, 103), 1)]  # nothing comes before the last
    assert cut(Words([7], [9]), 5) == [((7, 100, 101, 102), 1), ((7, 103, 104), 1)]
    assert cut(Words([7, 8]), 3) == [((7, 8, 100, 101), 2), ((7, 8, 102), 2)]
    assert cut(Words(), 1) == cut(Words(), 0) == cut(Words([7]), 0) == []


def test_a_tokenizers_own_beginning_predicts_the_first_token(untaught: Model) -> None:
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<pad> $A <unk>", special_tokens=[("<pad>", 0), ("<unk>", 1)]
    )
    (piece,) = cut_paragraph(tokenizer, PARAGRAPHS[1])
    assert piece.tokens == (0, *untaught.tokenizer(PARAGRAPHS[1])["input_ids"])
    assert piece.start == 1
    begun = TextGuard(replace(untaught, tokenizer=tokenizer), PARAGRAPHS)
    tokens = TextGuard(untaught, PARAGRAPHS).reference.tokens
    assert begun.reference.tokens == tuple(count + 1 for count in tokens)


def test_pieces_of_one_paragraph_count_as_one(
    untaught: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "LENGTH", 3)
    scores = TextGuard(untaught, PARAGRAPHS).reference
    assert len(scores.tokens) == len(PARAGRAPHS)
    words = [len(paragraph.split()) for paragraph in PARAGRAPHS]
    assert scores.tokens == tuple(n - -(-n // 3) for n in words)


def test_a_very_long_text_is_read_up_to_its_limit(
    untaught: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "MOST_TOKENS", 14)
    assert len(TextGuard(untaught, PARAGRAPHS * 100).reference.tokens) == 2


@pytest.mark.parametrize("paragraphs", [[], [PARAGRAPHS[0]], [PARAGRAPHS[0], "s1", "s2"]])
def test_too_little_text_is_refused(paragraphs: list[str], untaught: Model) -> None:
    with pytest.raises(UsageError, match="give a longer text"):
        TextGuard(untaught, paragraphs)
