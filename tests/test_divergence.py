"""KL of next-token distributions: never negative, and short of the whole by what was not kept."""

from __future__ import annotations

import pytest
import torch

from mpsearch import divergence
from mpsearch.divergence import Shortened, kl_by_token, kl_divergence, shortened


def test_kl_is_never_negative_and_zero_only_for_equals() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 1000, generator=generator).log_softmax(-1)
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum")
    assert kl_divergence(p, q) == pytest.approx(float(expected), rel=1e-5)
    assert kl_divergence(p, p) == 0.0
    above = p + 1e-6  # not normalized: below zero unless clamped
    assert kl_divergence(p, above) == 0.0
    assert kl_by_token(p[None], above[None]).tolist() == [0.0]
    assert kl_divergence(p, torch.full_like(q, torch.nan)).isnan()


def test_the_shortfall_is_the_kl_within_the_others_times_their_probability() -> None:
    torch.manual_seed(0)
    p, q = torch.randn(2, 3, 50, dtype=torch.float64).log_softmax(-1)
    top = p.topk(8).indices
    whole, short = kl_by_token(p, q), kl_by_token(shortened(p, top), shortened(q, top))
    for row in range(3):
        others = torch.tensor([t for t in range(50) if t not in top[row]])
        mass = p[row, others].exp().sum()
        within = kl_by_token(
            p[row, others].log_softmax(-1)[None], q[row, others].log_softmax(-1)[None]
        )
        assert (whole - short)[row].item() == pytest.approx((mass * within[0]).item())


def test_what_was_kept_gives_the_whole_kl_of_a_small_vocabulary_and_its_gradient() -> None:
    torch.manual_seed(0)
    p = torch.randn(3, 50).log_softmax(-1)
    logits = torch.randn(3, 50, requires_grad=True)
    found = Shortened.of(p).kl(logits.log_softmax(-1))
    expected = torch.nn.functional.kl_div(
        logits.log_softmax(-1), p, log_target=True, reduction="none"
    ).sum(-1)
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    # The derivative of KL in the candidate's logits.
    assert torch.allclose(gradient, logits.softmax(-1) - p.exp(), atol=1e-5)


def test_the_gradient_of_what_was_cut_short_is_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "TOP", 5)
    torch.manual_seed(0)
    p = torch.randn(3, 50).log_softmax(-1)
    logits = torch.randn(3, 50, requires_grad=True)
    (gradient,) = torch.autograd.grad(Shortened.of(p).kl(logits.log_softmax(-1)).sum(), logits)
    assert torch.isfinite(gradient).all() and (gradient != 0).all()
