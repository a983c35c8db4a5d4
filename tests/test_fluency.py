"""Figures of running text: by hand, against resampling, and paired by paragraph."""

from __future__ import annotations

import json
from dataclasses import asdict
from math import exp, inf, nan, sqrt

import numpy as np
import pytest

from mpsearch.errors import UsageError
from mpsearch.estimates import ratio
from mpsearch.fluency import TextScores, check_max_text_kl

TOKENS = (10, 30, 20)
REFERENCE = TextScores(TOKENS, (-20.0, -90.0, -40.0), (0.0, 0.0, 0.0))
CANDIDATE = TextScores(TOKENS, (-25.0, -105.0, -50.0), (4.0, 18.0, 8.0))


def test_figures_are_per_token_and_not_per_paragraph() -> None:
    assert REFERENCE.perplexity == pytest.approx(exp(150 / 60))
    assert CANDIDATE.log_perplexity.mean == pytest.approx(3.0)
    assert CANDIDATE.kl.mean == pytest.approx(0.5)
    assert CANDIDATE.log_perplexity_change(REFERENCE).mean == pytest.approx(0.5)
    assert (REFERENCE.kl.mean, REFERENCE.kl.stderr) == (0.0, 0.0)


def test_the_standard_error_is_of_paragraphs_that_differ_from_the_mean() -> None:
    # Of 0.5 a token the paragraphs would have 5, 15 and 10.
    squared = ((4 - 5) ** 2 + (18 - 15) ** 2 + (8 - 10) ** 2) * 3 / 2
    assert CANDIDATE.kl.stderr == pytest.approx(sqrt(squared) / 60)


def test_a_change_that_all_paragraphs_share_has_no_error_whatever_they_are() -> None:
    worse = TextScores(TOKENS, (-22.0, -96.0, -44.0), (0.0,) * 3)
    change = worse.log_perplexity_change(REFERENCE)
    assert (change.mean, change.stderr) == (pytest.approx(0.2), pytest.approx(0.0, abs=1e-12))
    assert worse.log_perplexity.stderr > 0.1


def test_the_error_of_a_ratio_is_what_drawing_again_gives() -> None:
    generator = np.random.default_rng(0)

    def draw() -> tuple[np.ndarray, np.ndarray]:
        counts = generator.integers(20, 80, 40)
        return counts * generator.normal(1.0, 0.3, 40), counts

    drawn = [ratio(*draw()) for _ in range(500)]
    spread = np.std([estimate.mean for estimate in drawn])
    assert np.mean([estimate.stderr for estimate in drawn]) == pytest.approx(spread, rel=0.1)
    inside = np.mean([e.interval[0] < 1.0 < e.interval[1] for e in drawn])
    assert 0.91 < inside < 0.98


@pytest.mark.parametrize(("sums", "counts"), [([1.0], [2]), ([1.0, 2.0], [0, 0]), ([1.0], [1, 2])])
def test_a_ratio_without_an_error_is_refused(sums: list[float], counts: list[int]) -> None:
    with pytest.raises(ValueError, match="sums of"):
        ratio(sums, counts)


def test_scores_come_back_from_json() -> None:
    assert TextScores.of(json.loads(json.dumps(asdict(CANDIDATE)))) == CANDIDATE
    assert TextScores.of(None) is None
    about = CANDIDATE.about()
    assert (about["paragraphs"], about["tokens"]) == (3, 60)
    assert about["log_perplexity_nats"]["mean"] == pytest.approx(3.0)


@pytest.mark.parametrize("nats", [-0.1, nan, inf])
def test_a_limit_that_makes_no_sense_is_refused(nats: float) -> None:
    with pytest.raises(UsageError, match=f"max text KL {nats}"):
        check_max_text_kl(nats)


@pytest.mark.parametrize("nats", [None, 0.0, 0.5])
def test_other_limits_pass(nats: float | None) -> None:
    check_max_text_kl(nats)
