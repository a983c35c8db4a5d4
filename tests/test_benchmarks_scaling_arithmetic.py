"""docs/scaling.md holds the tables that the arithmetic gives, and the arithmetic known figures."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import scaling_arithmetic as arithmetic

PUBLISHED = Path(__file__).parent / "published_models.json"


def test_the_page_holds_what_the_script_prints() -> None:
    page = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text(encoding="utf-8")
    found = arithmetic.costs()
    for name, make in arithmetic.TABLES.items():
        assert f"<!-- {name} -->\n{make(found)}\n" in page, name


@pytest.mark.parametrize("size", ["8B", "70B"])
def test_the_models_are_the_published_ones(size: str) -> None:
    published = json.loads(PUBLISHED.read_text())[f"meta-llama/Llama-3.1-{size}"]
    (of,) = (of for of in arithmetic.costs() if of.case.name == size)
    assert of.shape.parameters == published["parameters"]
    assert of.reference_bytes == 2 * published["parameters"]


def test_a_walk_takes_the_longer_of_fetching_and_computing() -> None:
    of = arithmetic.costs()[0]
    assert of.walk_seconds(1, 1e18) == of.compute_seconds()
    assert of.walk_seconds(1, 1e6) == pytest.approx(of.candidate_bytes / 1e6)
    assert of.moved_bytes(1) == pytest.approx(of.candidate_bytes)
    assert of.moved_bytes(1000) == pytest.approx(4 * of.candidate_bytes)  # four formats at most
    slower = replace(of, case=replace(of.case, bits=2 * of.case.bits))
    assert slower.candidate_bytes == 2 * of.candidate_bytes
