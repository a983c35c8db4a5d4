"""The export benchmark: every target has a space, a draw that it holds, and honest agreement."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import export as benchmark

from mpsearch.models import Model
from mpsearch.scores import FactScores
from mpsearch.targets import TARGETS


@pytest.mark.parametrize("target", benchmark.TARGETS)
def test_the_draw_is_one_that_the_target_holds_and_the_same_each_time(
    target: str, tiny: Model
) -> None:
    space = benchmark.resolve(tiny, target)
    candidate = benchmark.drawn(space, "{}")
    assert candidate == benchmark.drawn(space, "{}")
    assert space.allows(candidate)
    if target in TARGETS:
        assert space.target.name == target
        embedding = tiny.embedding.name if tiny.embedding else ""
        assert not TARGETS[target].misfits(space.layer_formats(candidate), embedding)


def test_agreement_counts_answers_that_are_alike_right_or_wrong() -> None:
    zeros = np.zeros(4)
    scored = FactScores(
        np.array([-1.0, -2.0, -3.0, -4.0]), zeros, zeros > 0, np.array([1.0, 1.0, -1.0, -1.0])
    )
    answered = {"correct": [True, False, False, True], "log_prob_nats": [-1.0, -2.5, -3.0, -4.0]}
    assert benchmark.agreement(scored, answered) == {
        "facts": 4,
        "equal_facts": 2,
        "largest_difference_nats": 0.5,
    }


def test_a_table_has_a_line_a_target() -> None:
    row = {
        "target": "gguf", "export_seconds": 1.5, "predicted_bytes": 1000, "stored_bytes": 1000,
        "equal_facts": 319, "facts": 320, "largest_difference_nats": 0.25, "load_seconds": 10.9,
        "loader": "transformers 5",
    }  # fmt: skip
    line = benchmark.table([row]).splitlines()[2]
    assert line == ("| gguf | 1.5 | 1,000 | 1,000 | 319 of 320 | 0.25 | 10.9 | transformers 5 |")
