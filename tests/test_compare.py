"""Comparisons: planted losses are found, and a model against itself or mere noise shows none."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mpsearch.compare import Comparison, compare
from mpsearch.facts import Fact
from mpsearch.scores import FactScores, NoiseFloor

FACTS = [
    Fact(relation, f"the {relation} of {{}} is", f"s{n}", f"answer {n}")
    for relation in ("color", "place", "shape", "taste")
    for n in range(30)
]
NOISE = NoiseFloor(facts=120, mean_nats=0.01, log_prob_nats=0.02, margin_nats=0.05, flips=0)


def random_scores(seed: int = 0) -> FactScores:
    generator = np.random.default_rng(seed)
    margin = generator.normal(0.5, 1.0, len(FACTS))
    return FactScores(margin - 2, np.zeros(len(FACTS)), margin > 1, margin)


def changed(scores: FactScores, by: np.ndarray, kl: float = 0.0) -> FactScores:
    assert scores.margin is not None
    return FactScores(
        scores.log_prob + by, np.full(len(by), kl), scores.top1, scores.margin + by
    )  # fmt: skip


def compared(reference: FactScores, candidate: FactScores) -> Comparison:
    return compare(reference, candidate, FACTS, NOISE, np.random.default_rng(0))


def test_exactly_the_planted_losses_are_reported() -> None:
    reference = random_scores()
    assert reference.margin is not None
    planted = [i for i, f in enumerate(FACTS) if f.relation == "place" and reference.margin[i] > 0][
        :12
    ]
    by = np.zeros(len(FACTS))
    by[planted] = -9.0
    found = compared(reference, changed(reference, by, kl=0.25))
    lost = {(flip.relation, flip.subject) for flip in found.flips}
    assert lost == {("place", FACTS[i].subject) for i in planted}
    assert all(flip.forgotten and flip.answer_loss_nats == 9.0 for flip in found.flips)
    margins = [flip.reference_margin for flip in found.flips]
    assert margins == sorted(margins, reverse=True)
    place = found.relations["place"]
    assert (place.forgotten, place.gained) == (12, 0)
    assert place.p == pytest.approx(4 * 2 / 2**12)  # Holm: the smallest of four
    assert found.overall.p == pytest.approx(2 / 2**12)
    assert place.answer_loss.mean == pytest.approx(9.0 * 12 / 30)
    assert place.answer_loss.excludes_zero
    assert found.overall.answer_loss.mean == pytest.approx(9.0 * 12 / 30 / 4)
    assert found.overall.kl_nats == pytest.approx(0.25)
    for name in ("color", "shape", "taste"):
        other = found.relations[name]
        assert (other.forgotten, other.gained, other.p) == (0, 0, 1.0)
    for row in (found.overall, *found.relations.values()):
        assert row.kept + row.forgotten + row.gained + row.never == row.facts
    assert not found.below_noise


def test_gains_are_told_from_losses() -> None:
    reference = random_scores()
    back = compared(changed(reference, np.full(len(FACTS), -0.4)), reference)
    there = compared(reference, changed(reference, np.full(len(FACTS), -0.4)))
    assert back.overall.gained == there.overall.forgotten > 0
    assert back.overall.forgotten == there.overall.gained == 0
    assert back.overall.answer_loss.mean == pytest.approx(-0.4)
    assert not any(flip.forgotten for flip in back.flips)


def test_a_model_against_itself_flips_nothing() -> None:
    reference = random_scores()
    found = compared(reference, reference)
    assert found.flips == ()
    assert found.overall.p == 1.0
    assert found.overall.answer_loss.mean == 0.0
    assert not found.overall.answer_loss.excludes_zero
    assert found.below_noise


def test_against_a_null_perturbation_flips_are_not_significant() -> None:
    """Noise without direction: as many gained as forgotten, and no relation stands out."""
    findings, losses = 0, 0
    for seed in range(100):
        reference = random_scores(seed)
        by = np.random.default_rng(1000 + seed).normal(0, 0.5, len(FACTS))
        found = compared(reference, changed(reference, by))
        assert found.flips
        findings += min(row.p for row in found.relations.values()) < 0.05
        losses += found.overall.answer_loss.excludes_zero
    assert findings <= 8
    assert losses <= 12


def test_facts_won_or_missed_by_luck_are_marked() -> None:
    reference = random_scores()
    assert reference.margin is not None
    margin = reference.margin.copy()
    margin[:4] = [0.04, 0.06, -0.04, -0.06]
    reference = FactScores(reference.log_prob, reference.kl, reference.top1, margin)
    by = np.zeros(len(FACTS))
    by[:4] = -margin[:4] * 2
    found = compared(reference, changed(reference, by))
    marked = {flip.reference_margin: flip.within_noise for flip in found.flips}
    assert marked == {0.04: True, 0.06: False, -0.04: True, -0.06: False}


def test_a_comparison_is_json() -> None:
    reference = random_scores()
    found = compared(reference, changed(reference, np.full(len(FACTS), -0.4)))
    told = json.loads(json.dumps(found.to_json()))
    assert told["overall"]["forgotten"] == len(told["flips"])
    assert set(told["relations"]) == {"color", "place", "shape", "taste"}
    assert told["below_noise"] is False


def test_scores_without_distractors_are_refused() -> None:
    plain = FactScores(np.zeros(len(FACTS)), np.zeros(len(FACTS)), np.zeros(len(FACTS)), None)
    with pytest.raises(ValueError, match="distractors"):
        compared(plain, plain)
