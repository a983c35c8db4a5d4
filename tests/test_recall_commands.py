"""`mpsearch recall` and `mpsearch compare`: data, talk, and one line where something is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import mpsearch as mps
from mpsearch import cli, recall
from mpsearch.assignment import Assignment
from mpsearch.facts import Fact, FactSet
from mpsearch.models import Model
from mpsearch.space import ResolvedSpace

Capture = pytest.CaptureFixture[str]


def call(capsys: Capture, *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def call_json(capsys: Capture, *arguments: object) -> dict[str, Any]:
    code, out, err = call(capsys, *arguments, "--json")
    assert code == 0, err
    content: dict[str, Any] = json.loads(out)
    return content


@pytest.fixture(scope="module")
def int2(tiny: Model, tiny_space: ResolvedSpace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export at two bits, which forgets."""
    assignment = Assignment.of({group.name: "int2-g64" for group in tiny_space.groups})
    return mps.export(tiny, assignment, out=tmp_path_factory.mktemp("exports") / "int2")


def test_recall_of_a_model(tiny_folder: Path, facts_file: Path, capsys: Capture) -> None:
    code, out, err = call(capsys, "recall", tiny_folder, "--facts", facts_file)
    assert code == 0
    rows = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert {"color", "place", "shape", "mean"} <= set(rows)
    assert "3 of 3 relations beat chance" in out
    assert "Noise floor" in out
    assert err.splitlines()[0] == f"loading {tiny_folder}"
    assert err.splitlines()[-1] == f"next: mpsearch compare {tiny_folder} EXPORT"

    told = call_json(capsys, "recall", tiny_folder, "--facts", facts_file)
    assert (told["partition"], told["shots"], told["facts"]) == ("test", 4, 51)
    assert [row["relation"] for row in told["relations"]] == ["color", "place", "shape"]
    assert told["recall"]["mean"] > 0.95
    assert told["chance"] == pytest.approx((1 / 6 + 1 / 5 + 1 / 4) / 3)
    for row in told["relations"]:
        assert row["recall"]["low"] < row["recall"]["mean"] <= row["recall"]["high"]
        assert row["beats_chance"] is True
    assert told["noise"]["facts"] == 51
    assert told["seconds"] > 0


def test_recall_in_other_partitions_and_without_examples(
    tiny_folder: Path,
    facts_file: Path,
    tiny_facts: FactSet,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[str, int]] = []

    def prompt(fact_set: FactSet, fact: Fact, shots: int) -> str:
        asked.append((fact.subject, shots))
        return fact.prompt

    monkeypatch.setattr(recall, "prompt", prompt)
    question = ("recall", tiny_folder, "--facts", facts_file)
    told = call_json(capsys, *question, "--partition", "validation", "--shots", 0)
    assert (told["partition"], told["shots"]) == ("validation", 0)
    facts = tiny_facts.part("validation")
    assert told["facts"] == len(facts)
    assert set(asked) == {(fact.subject, 0) for fact in facts}


def test_compare_names_what_an_export_forgot(
    tiny_folder: Path, facts_file: Path, int2: Path, capsys: Capture
) -> None:
    question = ("compare", tiny_folder, int2, "--facts", facts_file)
    told = call_json(capsys, *question)
    overall = told["overall"]
    assert overall["forgotten"] > 3
    assert overall["p"] < 0.05
    assert overall["answer_loss"]["low"] > 0
    assert not told["below_noise"]
    assert sum(row["forgotten"] for row in told["relations"].values()) == overall["forgotten"]
    assert len(told["flips"]) == overall["forgotten"] + overall["gained"]
    before = call_json(capsys, "recall", tiny_folder, "--facts", facts_file)
    after = call_json(capsys, "recall", int2, "--facts", facts_file)
    right = [round(sum(r["recall"]["mean"] * r["facts"] for r in t["relations"]))
             for t in (before, after)]  # fmt: skip
    assert right[0] - right[1] == overall["forgotten"] - overall["gained"]

    code, out, err = call(capsys, *question)
    assert code == 0
    for flip in told["flips"]:
        assert any(
            {flip["relation"], flip["subject"], flip["answer"]} <= set(line.split())
            for line in out.splitlines()
        )
    assert told["verdict"] in out
    assert err.splitlines()[-1] == f"next: mpsearch recall {int2}"
    assert "Decompressing" not in err and "Applying" not in err  # the loader's own bars


def test_compare_a_model_with_itself_finds_nothing(
    tiny_folder: Path, facts_file: Path, capsys: Capture
) -> None:
    question = ("compare", tiny_folder, tiny_folder, "--facts", facts_file)
    told = call_json(capsys, *question)
    assert told["flips"] == []
    assert told["below_noise"] is True
    assert told["overall"]["p"] == 1.0
    assert "is not beyond noise" in told["verdict"]
    _, out, _ = call(capsys, *question)
    assert "~0.000 [0.000, 0.000]" in out
    assert "Flipped" not in out


def test_depth_says_after_which_block_answers_are_lost(
    tiny_folder: Path, facts_file: Path, int2: Path, capsys: Capture
) -> None:
    question = ("compare", tiny_folder, int2, "--facts", facts_file, "--depth")
    told = call_json(capsys, *question)
    depth = told["depth"]
    assert len(depth["blocks"]) == 2
    last = depth["blocks"][-1]["shortfall"]
    assert last == pytest.approx(told["overall"]["answer_loss"], abs=1e-4)
    assert depth["half_from"] in (0, 1)
    forgotten = [(flip["relation"], flip["subject"]) for flip in told["flips"] if flip["forgotten"]]
    assert sorted((fact["relation"], fact["subject"]) for fact in depth["forgotten"]) == sorted(
        forgotten
    )
    assert sum(block["forgotten"] for block in depth["blocks"]) == sum(
        fact["block"] is not None for fact in depth["forgotten"]
    )

    code, out, err = call(capsys, *question)
    assert code == 0
    rows = [line.split() for line in out[out.index("reference log-prob") :].splitlines()]
    for number, block in enumerate(depth["blocks"]):
        row = next(row for row in rows if row[:1] == [str(number)])
        assert row[1] == f"{block['reference_log_prob']:.3f}"
        assert row[2] == f"{block['candidate_log_prob']:.3f}"
        assert row[3] == f"{block['shortfall']['mean']:.3f}"
    assert out.splitlines()[-1] == depth["verdict"]
    assert err.splitlines()[-1] == f"next: mpsearch recall {int2}"


def test_depth_is_told_only_where_it_is_asked_for(
    tiny_folder: Path, facts_file: Path, capsys: Capture
) -> None:
    question = ("compare", tiny_folder, tiny_folder, "--facts", facts_file)
    assert "depth" not in call_json(capsys, *question)
    depth = call_json(capsys, *question, "--depth")["depth"]
    assert depth["half_from"] is None
    assert all(block["shortfall"]["mean"] == 0 for block in depth["blocks"])


def test_wrong_usage_is_one_line(
    tiny_folder: Path, facts_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text(
        '{"relation": "color", "template": "the color of {} is", "subject": "s3", "answer": "red"}'
    )
    for arguments, words in (
        ((tiny_folder, "--facts", few), "is in the test partition"),
        ((tiny_folder, "--facts", facts_file, "--shots", "-1"), "shots -1"),
        ((tmp_path / "nothing", "--facts", facts_file), "neither a folder here nor a hub id"),
    ):
        code, out, err = call(capsys, "recall", *arguments)
        assert (code, out) == (2, "")
        assert err.splitlines()[-1].startswith("mpsearch: ")
        assert words in err.splitlines()[-1]
