"""Searches whose sensitivities are damaged, all equal, of one format or of two groups."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mpsearch.evaluate import all_layers
from mpsearch.facts import FactSet
from mpsearch.measures import Sensitivity
from mpsearch.models import Model
from mpsearch.run import Run
from mpsearch.search import search
from mpsearch.space import ResolvedSpace, SearchSpace

Search = Callable[..., Run]


@pytest.fixture
def ask(tiny: Model, tiny_facts: FactSet, tmp_path: Path) -> Search:
    """A short search in `tmp_path / "run"` at the middle of the space's sizes."""

    def asked(space: ResolvedSpace, resume: bool = False) -> Run:
        smallest, largest = space.stored_bytes(space.smallest), space.stored_bytes(space.largest)
        return search(
            tiny, space, budget=(smallest + largest) // 2, trials=3, search_facts=20,
            facts=tiny_facts, out=tmp_path / "run", resume=resume,
        )  # fmt: skip

    return asked


@pytest.mark.parametrize("spoilt", ["is nan", "is missing", "cut short"])
def test_a_damaged_table_is_named_and_measured_again(
    spoilt: str, ask: Search, tiny_space: ResolvedSpace, caplog: pytest.LogCaptureFixture
) -> None:
    run = ask(tiny_space)
    path, before = run.folder / "sensitivity.json", run.front()
    whole = path.read_text(encoding="utf-8")
    content = json.loads(whole)
    row = content["rows"].pop(5) if spoilt == "is missing" else content["rows"][5]
    row["fisher_nats"] = float("nan")
    path.write_text(whole[:999] if spoilt == "cut short" else json.dumps(content), encoding="utf-8")
    again = ask(tiny_space, resume=True)
    said = [text for text in caplog.messages if text.endswith("; measuring again")]
    assert len(said) == 1
    assert spoilt in said[0]
    if spoilt != "cut short":
        assert row["group"] in said[0]
        assert row["format"] in said[0]
    assert path.read_text(encoding="utf-8") == whole
    assert [point.id for point in again.front().points] == [point.id for point in before.points]


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_sensitivities_everywhere_still_give_a_search(
    value: float, ask: Search, tiny_space: ResolvedSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def equal(space: ResolvedSpace, *_: Any, **__: Any) -> Sensitivity:
        pairs = [(name, fmt.name) for name, formats in space.options.items() for fmt in formats]
        return Sensitivity(dict.fromkeys(pairs, value), dict.fromkeys(pairs, value), {})

    monkeypatch.setattr(sys.modules["mpsearch.search"], "measure_sensitivity", equal)
    run = ask(tiny_space)
    searched = [score.assignment for score in run.scores() if score.kind == "search"]
    assert len(set(searched)) == 3
    assert all(tiny_space.stored_bytes(assignment) <= run.budget_bytes for assignment in searched)
    assert run.front().pick is not None


@pytest.mark.parametrize("formats", ["[int4-g64]", "[int2-g64, int4-g64]"])
def test_one_format_and_two_groups_can_be_searched(formats: str, ask: Search, tiny: Model) -> None:
    text = f"version: 1\ntarget: compressed-tensors\nformats: {formats}\n"
    whole = SearchSpace.parse(text, "test").resolve(tiny)
    two = whole.groups[:2]
    space = replace(whole, groups=two, options={g.name: whole.options[g.name] for g in two})
    assert len(all_layers(space)) == 4 * len(space.space.formats)
    run = ask(space)
    assert run.finished
    assert run.front().pick is not None
    table = Sensitivity.load(run.folder / "sensitivity.json")
    assert len(table.fisher_nats) == 2 * len(space.space.formats)
    for row in table.correlations():
        if row.pairs == 2:  # one or minus one, as two ranks always are, or none of equal values
            assert abs(row.spearman or 1) == pytest.approx(1)
