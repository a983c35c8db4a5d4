"""The model card: every figure and every format is there, in the place that a reader looks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from cli_cases import Cli
from conftest import tiny_family

from mpsearch.allocate import uniform
from mpsearch.assignment import Assignment
from mpsearch.export import export
from mpsearch.models import Model
from mpsearch.outcome import outcome
from mpsearch.promise import promise
from mpsearch.run import Run
from mpsearch.space import ResolvedSpace, SearchSpace


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
    table = lines[lines.index(header) :]
    rows = [line for line in table[1:] if line.startswith("| ")]
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


def test_the_card_names_vllm_only_where_its_target_holds_the_head(tmp_path: Path) -> None:
    model = replace(tiny_family("llama"), folder=tmp_path)
    for head, said in (("bf16", True), ("int4-g64", False)):
        text = f"version: 1\ntarget: compressed-tensors\nformats: [int4-g64]\nhead: [{head}]\n"
        space = SearchSpace.parse(text, "test").resolve(model)
        out = export(model, space.smallest, out=tmp_path / head, space=space)
        card = (out / "README.md").read_text(encoding="utf-8")
        assert ("vllm serve" in card) is said
        (resident,) = [line for line in card.splitlines() if line.startswith("- In memory: ")]
        assert ("vllm" in resident) is said
        assert "transformers" in resident


def test_the_card_of_a_run_says_what_is_still_known_and_how_it_was_found(
    whole: Path, tmp_path: Path, mpsearch: Cli
) -> None:
    run = Run.open(whole)
    smallest = min(run.front().points, key=lambda point: point.stored_bytes)
    cards = {}
    for wanted in ("best", smallest.id):
        out = tmp_path / wanted
        assert mpsearch("export", whole, wanted, "-o", out).code == 0
        cards[wanted] = (out / "README.md").read_text(encoding="utf-8")
    made = promise(run, smallest)
    recall, loss = made.recall, made.answer_loss
    of_smallest = cards[smallest.id]
    assert f"{len(made.relations)} validation facts" in of_smallest
    assert f"{recall.mean:.1%} [{recall.low:.1%}, {recall.high:.1%}]" in of_smallest
    assert f"{loss.mean:.3f} nats [{loss.low:.3f}, {loss.high:.3f}]" in of_smallest
    assert f"{made.forgotten} facts are forgotten and {made.gained} gained" in of_smallest
    assert "the figure may flatter it" in of_smallest
    of_best = cards["best"]
    assert "test facts, asked after 4 solved examples" in of_best
    assert "may flatter" not in of_best and "Gain on these facts over uniform" in of_best
    found = outcome(run)
    assert found is not None and all(str(gain) in of_best for gain in found.gains)
    for card in cards.values():
        for point in run.front().points:
            simple = point.kind in ("uniform", "greedy", "knapsack")
            row = f"| {point.kind} | {point.stored_bytes:,} |"
            this = f"| **{point.kind}, this one** | {point.stored_bytes:,} |"
            assert (row in card) + (this in card) >= simple
        assert "AutoModelForCausalLM" in card and "mpsearch search " in card
        assert "transformers, which unpacks it" in card
