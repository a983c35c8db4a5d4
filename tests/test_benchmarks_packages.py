"""What rival packages choose, as our assignments: bytes, budgets, ties, and what is asked again."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import rival_environment
from rival_environment import calibration_texts, package_assignments, request, sizes
from rival_packages import average_bits, stored_bytes, widest, within

from mpsearch.errors import CheckError
from mpsearch.facts import FactSet
from mpsearch.models import Model
from mpsearch.space import ResolvedSpace

WIDTHS = (2, 3, 4, 8)


@pytest.fixture
def asked(tiny: Model, tiny_space: ResolvedSpace) -> dict[str, Any]:
    return {**request(tiny_space, tiny, sizes(tiny_space), ["a"]), "package": "planted"}


def by_size(asked: Mapping[str, Any], bits: float) -> dict[str, int]:
    """A package that widens the first groups while its count of bits allows it."""
    groups = asked["groups"]
    left = bits * sum(group["weights"] for group in groups)
    chosen = dict.fromkeys((group["name"] for group in groups), WIDTHS[0])
    left -= sum(WIDTHS[0] * group["weights"] for group in groups)
    for below, width in pairwise(WIDTHS):
        for group in groups:
            more = (width - below) * group["weights"]
            if chosen[group["name"]] == below and more <= left + 1e-6:
                chosen[group["name"]], left = width, left - more
    return {name: chosen[group["name"]] for group in groups for name in group["layers"]}


def test_bytes_and_bits_are_those_of_the_space(
    asked: dict[str, Any], tiny_space: ResolvedSpace
) -> None:
    for width in WIDTHS:
        uniform = {group.name: f"int{width}-g64" for group in tiny_space.groups}
        size_bytes = stored_bytes(asked, dict.fromkeys(uniform, width))
        assert size_bytes == tiny_space.stored_bytes(uniform)
        assert average_bits(asked, size_bytes) == pytest.approx(width, abs=1e-9)


def test_a_broken_tie_gets_the_most_bits_of_its_layers(asked: dict[str, Any]) -> None:
    layers = {name: 3 for group in asked["groups"] for name in group["layers"]}
    layers["model.layers.1.self_attn.k_proj"] = 8
    assert {n: b for n, b in widest(asked["groups"], layers).items() if b != 3} == {
        "model.layers.1.self_attn.q_proj+k_proj+v_proj": 8
    }


def test_what_the_package_counts_as_we_do_is_asked_once(asked: dict[str, Any]) -> None:
    for budget_bytes in asked["budgets_bytes"].values():
        found = within(budget_bytes, asked, lambda bits: by_size(asked, bits))
        assert found["solves"] == 1
        assert found["stored_bytes"] == stored_bytes(asked, found["bits"]) <= budget_bytes
    uniform = within(asked["budgets_bytes"]["uniform 3-bit"], asked, lambda b: by_size(asked, b))
    assert set(uniform["bits"].values()) == {3}


def test_a_solution_over_the_budget_is_asked_for_with_fewer_bits(asked: dict[str, Any]) -> None:
    budget_bytes = asked["budgets_bytes"]["midway"]
    exact = within(budget_bytes, asked, lambda bits: by_size(asked, bits))
    found = within(budget_bytes, asked, lambda bits: by_size(asked, bits + 0.4))
    assert found["solves"] > 1
    assert found["bits"] == exact["bits"]
    assert found["asked_bits"] == pytest.approx(exact["asked_bits"] - 0.4, abs=0.3)


def test_a_package_that_never_fits_is_an_error(asked: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no solution of planted fits"):
        within(asked["budgets_bytes"]["midway"], asked, lambda _: by_size(asked, 8))


def test_texts_are_whole_statements_and_follow_the_seed(
    tiny: Model, tiny_facts: FactSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rival_environment, "TEXTS", 4)
    monkeypatch.setattr(rival_environment, "TOKENS", 30)
    facts = tiny_facts.part("search")
    statements = {f"{fact.prompt} {fact.answer}" for fact in facts}
    texts = calibration_texts(tiny.tokenizer, facts, seed=0)
    assert len(texts) == 4
    for text in texts:
        assert set(text.split("\n")) <= statements
        assert 30 <= len(tiny.tokenizer(text)["input_ids"]) < 36
    assert texts == calibration_texts(tiny.tokenizer, facts, seed=0)
    assert set(texts) != set(calibration_texts(tiny.tokenizer, facts, seed=1))
    with pytest.raises(CheckError, match="4 are needed"):
        calibration_texts(tiny.tokenizer, facts[:8], seed=0)


def test_replies_become_assignments_that_are_not_asked_for_again(
    tiny: Model, tiny_space: ResolvedSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def ask(package: str, asked: Mapping[str, Any]) -> dict[str, Any]:
        calls.append(package)
        found = {
            size: within(budget_bytes, asked, lambda bits: by_size(asked, bits))
            for size, budget_bytes in asked["budgets_bytes"].items()
        }
        return {"sizes": found, "versions": {package: "1"}}

    monkeypatch.setattr(rival_environment, "_ask", ask)
    monkeypatch.setattr(rival_environment, "known_search_facts", lambda model: ())
    monkeypatch.setattr(rival_environment, "calibration_texts", lambda *_: ["a"])
    budgets, out = sizes(tiny_space), tmp_path / "packages.json"
    first = package_assignments(tiny_space, tiny, budgets, 0, out)
    assert first == package_assignments(tiny_space, tiny, budgets, 0, out)
    assert calls == ["auto-round", "modelopt"]
    for assignments in first.values():
        assert set(assignments["uniform 4-bit"].values()) == {"int4-g64"}
        for size, assignment in assignments.items():
            assert tiny_space.allows(assignment)
            assert tiny_space.stored_bytes(assignment) <= budgets[size]
    package_assignments(tiny_space, tiny, budgets, 1, out)
    assert len(calls) == 4


def test_a_reply_over_the_budget_is_an_error(
    tiny: Model, tiny_space: ResolvedSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(package: str, asked: Mapping[str, Any]) -> dict[str, Any]:
        bits = {group["name"]: 8 for group in asked["groups"]}
        found = {"bits": bits, "stored_bytes": stored_bytes(asked, bits)}
        return {"sizes": dict.fromkeys(asked["budgets_bytes"], found)}

    monkeypatch.setattr(rival_environment, "_ask", ask)
    monkeypatch.setattr(rival_environment, "known_search_facts", lambda model: ())
    monkeypatch.setattr(rival_environment, "calibration_texts", lambda *_: ["a"])
    with pytest.raises(CheckError, match="takes"):
        package_assignments(tiny_space, tiny, {"midway": 1}, 0, tmp_path / "packages.json")
