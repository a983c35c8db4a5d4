"""What the comparison with peers finds, on made-up losses."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from peers_choices import MIDWAY, SIZES, TIGHT
from peers_findings import FAILS, HOLDS, OPEN, OURS, Comparison, findings, tokens_to_reach
from peers_report import _at_the_tightest, table

RELATIONS = [f"r{number % 8}" for number in range(320)]
SUBJECTS = [f"s{number}" for number in range(320)]
RIVALS = ("uniform", "knapsack", "evopress-warm", OURS)


def made_up(means: dict[str, float], noise: float = 0.3) -> dict[tuple[str, str, int], Any]:
    """Losses at all sizes: what a fact shares among rivals, and what it does not."""
    generator = np.random.default_rng(0)
    shared = generator.normal(0, 1, 320)
    return {
        (size, rival, seed): mean + shared + noise * generator.normal(size=320)
        for size in SIZES
        for rival, mean in means.items()
        for seed in ([0] if rival == "uniform" else range(3))
    }


def curves(ours: list[tuple[int, float]]) -> list[dict[str, Any]]:
    theirs = [(100, 3.0), (5000, 1.0)]
    return [
        {"size": size, "rival": rival, "seed": seed, "points": points, "fact_tokens": 10_000}
        for size in SIZES
        for seed in range(3)
        for rival, points in ((OURS, ours), ("evopress-warm", theirs))
    ]


def found(means: dict[str, float], ours: list[tuple[int, float]], **changes: Any) -> dict[str, Any]:
    losses = {key: value for key, value in made_up(means).items()
              if key not in changes.get("without", ())}  # fmt: skip
    correct = {key: value < 1 for key, value in losses.items()}
    return findings(losses, correct, RELATIONS, SUBJECTS, curves(ours), SIZES, TIGHT, RIVALS)


def test_planted_truth_holds_and_its_opposite_fails() -> None:
    means = {"uniform": 3.0, "knapsack": 2.0, "evopress-warm": 1.2, OURS: 1.0}
    good = found(means, [(100, 3.0), (1000, 0.9)])
    assert [target["verdict"] for target in good["targets"]] == [HOLDS] * 4
    first = good["sizes"][0]
    assert (first["lowest"], first["best_predictor"]) == (OURS, "knapsack")
    against = {row["rival"]: row for row in first["against"]}
    assert against["uniform"]["percent_below"]["mean"] == pytest.approx(67, abs=3)
    assert against["knapsack"]["difference_nats"]["mean"] == pytest.approx(1, abs=0.1)
    assert (against["uniform"]["seeds"], against["knapsack"]["seeds"]) == (3, 3)
    more = against["uniform"]["recall_points"]  # a loss of 1 is the mean of ours
    assert more["low"] > 30 and against["uniform"]["recall_p_holm"] < 0.05

    bad = found({**means, "knapsack": 0.9, OURS: 1.1}, [(100, 3.0), (3000, 0.9)])
    assert [target["verdict"] for target in bad["targets"]] == [FAILS] * 4
    against = {row["rival"]: row for row in bad["sizes"][0]["against"]}
    assert against["knapsack"]["p_holm"] < 0.05
    assert against["knapsack"]["difference_nats"]["high"] < 0


def test_what_is_not_measured_leaves_a_target_open() -> None:
    means = {"uniform": 3.0, "knapsack": 2.0, "evopress-warm": 1.2, OURS: 1.0}
    without = [(SIZES[3], "evopress-warm", 2)]
    part = found(means, [(100, 3.0), (1000, 0.9)], without=without)
    assert {target["verdict"] for target in part["targets"]} == {OPEN}
    assert part["missing"] == [f"{SIZES[3]}: evopress-warm"]


def test_the_intervals_are_over_seeds_and_facts() -> None:
    """Of 200 made-up studies with spread between seeds, about 95 % cover the true difference."""
    generator = np.random.default_rng(1)
    covered, over_facts_alone = [], []
    comparison = Comparison({}, RELATIONS, SUBJECTS)
    for _ in range(200):
        spread = generator.normal(0, 0.1, (2, 3, 1))
        losses = spread + generator.normal(0, 1, (2, 3, 320)) + np.array([0.5, 0])[:, None, None]
        interval, _ = comparison.difference(*losses)
        covered.append(interval.low <= 0.5 <= interval.high)
        one, _ = comparison.difference(*losses.mean(1, keepdims=True))
        over_facts_alone.append(one.low <= 0.5 <= one.high)
    assert 0.92 < np.mean(covered) <= 1
    assert np.mean(over_facts_alone) < np.mean(covered)


def test_the_same_assignment_is_no_difference() -> None:
    losses = np.random.default_rng(0).normal(size=(1, 320))
    interval, p = Comparison({}, RELATIONS, SUBJECTS).difference(losses, losses)
    assert (interval.mean, interval.low, interval.high, p) == (0, 0, 0, 1)
    same = {(SIZES[0], name, 0): losses[0] for name in ("uniform", OURS)}
    right = {key: value < 0 for key, value in same.items()}
    (size,) = findings(same, right, RELATIONS, SUBJECTS, [], SIZES, TIGHT, RIVALS)["sizes"]
    assert size["lowest"] == OURS


def test_tokens_to_reach_by_hand() -> None:
    made = curves([(1000, 2.0), (1500, 1.0), (2000, 0.5)])
    assert tokens_to_reach(MIDWAY, made) == {
        "size": MIDWAY, "ratios": {"0": 0.15, "1": 0.15, "2": 0.15}, "median": 0.15
    }  # fmt: skip
    never = {"size": MIDWAY, "rival": OURS, "seed": 0, "points": [(9, 1.1)], "fact_tokens": 9}
    made = [c for c in made if (c["rival"], c["seed"]) != (OURS, 0)] + [never]
    assert tokens_to_reach(MIDWAY, made)["ratios"] == {"0": None, "1": 0.15, "2": 0.15}
    assert tokens_to_reach(MIDWAY, [never]) is None


def test_the_table_marks_the_lowest_and_what_differs() -> None:
    def row(rival: str, seed: int, loss: float) -> dict[str, Any]:
        cost = 200.0 if rival == OURS else 0.0
        return {"size": MIDWAY, "rival": rival, "seed": seed, "answer_loss": loss, "recall": 0.5,
                "evaluations": cost}  # fmt: skip

    rows = [row("uniform", 0, 3.0), row("knapsack", 0, 1.2), row(OURS, 0, 0.9), row(OURS, 1, 1.1)]
    against = [
        {"rival": "uniform", "p_holm": 0.01, "difference_nats": {"mean": 2.0}},
        {"rival": "knapsack", "p_holm": 0.2, "difference_nats": {"mean": 0.2}},
    ]
    lines = table(rows, [{"size": MIDWAY, "against": against}], {MIDWAY: 105_769_760})
    assert lines == [
        "| answer loss (nats) and recall (%) | midway, 105.8 MB | seeds | evaluations |",
        "|---|---|---|---|",
        "| mpsearch | **1.00** (50) | 2 | 200 |",
        "| knapsack | 1.20 (50) | 1 | 0 |",
        "| uniform | 3.00* (50) | 1 | 0 |",
    ]


def test_rivals_are_ordered_by_the_tightest_size_that_they_were_run_at() -> None:
    cells = {
        (SIZES[0], OURS): [{"answer_loss": 7.0}],
        (SIZES[0], "uniform"): [{"answer_loss": 15.0}],
        (SIZES[1], "late"): [{"answer_loss": 1.0}],
    }
    ordered = sorted(("late", "uniform", OURS), key=lambda n: _at_the_tightest(cells, SIZES, n))
    assert ordered == [OURS, "uniform", "late"]
