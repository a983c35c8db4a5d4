"""The benchmark of what foretells: which candidates it takes, and its halves of relations."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from foretelling import candidates, correlations
from test_run import FIRST, ROWS, SECOND, line, size, write_run

RELATIONS = [name for name in "abcdefgh" for _ in range(6)]


def test_what_holds_in_all_relations_foretells_others_and_luck_does_not() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(40, 1)) * np.ones(len(RELATIONS))
    of_relation = np.repeat(rng.normal(size=(40, 8)), 6, axis=1)  # shared within one only
    found = correlations(
        {"true": truth, "of its relation": of_relation, "luck": rng.normal(size=truth.shape)},
        RELATIONS, truth + of_relation, RELATIONS, 100, np.random.default_rng(1),
    )  # fmt: skip
    assert found["true"]["other_relations"] > 0.8
    assert found["of its relation"]["same_relations"] > 0.3
    assert abs(found["of its relation"]["other_relations"]) < 0.2
    assert abs(found["luck"]["same_relations"]) < 0.2


def test_candidates_fill_the_budget_and_the_best_come_first(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ROWS, budget_bytes=size(ROWS[4]))
    with open(run.folder / "evaluations.jsonl", "a", encoding="utf-8") as stream:
        stream.writelines(line(row, "search") for row in ROWS)
    filling = [ROWS[4], ROWS[3]]  # the uniform ones are far smaller, or larger
    found = [(a[FIRST], a[SECOND]) for a in candidates(run, 10)]
    assert found == [row[1:3] for row in filling]
    assert len(candidates(run, 1)) == 1
