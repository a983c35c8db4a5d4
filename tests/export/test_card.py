"""The model card: every figure and every format is there, in the place that a reader looks."""

from __future__ import annotations

import json
from pathlib import Path

from mpsearch.allocate import uniform
from mpsearch.assignment import Assignment
from mpsearch.export import export
from mpsearch.models import Model
from mpsearch.space import ResolvedSpace


def test_the_card_says_what_it_is_how_large_and_in_which_formats(
    tiny: Model, tiny_space: ResolvedSpace, tmp_path: Path
) -> None:
    first = tiny_space.groups[0].name
    assignment = Assignment.of({**uniform(tiny_space)["int4-g64"], first: "int8-g64"})
    out = export(tiny, assignment, out=tmp_path / "export", space=tiny_space)
    card = (out / "README.md").read_text(encoding="utf-8")
    about = json.loads((out / "mpsearch.json").read_text(encoding="utf-8"))
    assert f"{about['stored_bytes']:,} bytes" in card
    assert f"{about['bits_per_weight']:.2f} bits a searched weight" in card
    assert about["assignment_id"] in card
    assert "Made for" not in card
    lines = card.splitlines()
    (header,) = [line for line in lines if line.startswith("| block ")]
    kinds = [cell.strip() for cell in header.strip("|").split("|")][1:]
    rows = [line for line in lines if line.startswith("| ") and line != header]
    assert len(rows) == len({group.depth for group in tiny_space.groups})
    for row in rows:
        block, *cells = [cell.strip() for cell in row.strip("|").split("|")]
        for kind, cell in zip(kinds, cells, strict=True):
            (group,) = [
                g for g in tiny_space.groups if g.kind == kind and str(g.depth) == block
            ]  # fmt: skip
            assert cell == assignment[group.name]
    several = sum(len(group.layers) for group in tiny_space.groups[1:])
    assert f"{several} layers int4-g64" in card
    assert f"{len(tiny_space.groups[0].layers)} layers int8-g64" in card
