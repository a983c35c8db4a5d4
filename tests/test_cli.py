"""The command line from search to export: streams, tables, JSON, the next step."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from cli_cases import BUDGET, Cli, command, one_line

from mpsearch import models
from mpsearch.space import ResolvedSpace

COMMANDS = (
    "search", "layers", "bank", "sensitivity", "facts", "recall", "compare", "front", "show",
    "plot", "refine", "export", "doctor",
)  # fmt: skip
# ------------------------------------------------------------------------------------- help


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    done = subprocess.run(command("--help"), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0
    assert all(name in done.stdout for name in COMMANDS)
    heavy = {"torch", "transformers", "optuna", "numpy", "rich", "matplotlib"}
    code = (
        "import sys\nfrom mpsearch.cli import main\ntry:\n    main(['search', '--help'])\n"
        f"finally:\n    assert not {heavy} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, mpsearch: Cli) -> None:
    outcome = mpsearch(name, "--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert "--json" in outcome.out


def test_the_version_is_data(mpsearch: Cli) -> None:
    outcome = mpsearch("--version")
    assert outcome.code == 0
    assert re.fullmatch(r"mpsearch \d+\.\d+\.\d+\S*\n", outcome.out)


# -------------------------------------------------------------------------------- the whole path


def test_the_whole_path_from_search_to_export(
    question: list[str], tiny_folder: Path, mpsearch: Cli, tmp_path: Path
) -> None:
    run, figure, exported = tmp_path / "run", tmp_path / "figure.png", tmp_path / "export"
    searched = mpsearch(*question, "--trials", 5, "-o", run)
    assert searched.code == 0, searched.err
    assert searched.talk[0] == f"loading {tiny_folder}"
    assert "budget 57.00 KiB (58,368 bytes)" in searched.talk
    assert searched.talk[-1] == f"next: mpsearch export {run} best -o exports/run"
    assert len(searched.said) == 1, searched.err

    front = mpsearch("front", run, "--json")
    assert (front.code, len(front.talk)) == (0, 1)
    assert front.talk[-1].startswith("next: mpsearch plot ")
    content = json.loads(front.out)
    assert content["finished"] is True
    assert content["pick"] in {point["id"] for point in content["points"]}
    assert all(point["id"] in searched.out for point in content["points"])
    assert content["verdict"] in searched.out
    assert content["test"]["id"] == content["pick"]

    shown = mpsearch("show", run, "best", "--json")
    pick = json.loads(shown.out)
    assert (shown.code, pick["id"]) == (0, content["pick"])
    assert pick["stored_bytes"] <= 57 * 1024
    assert len(pick["assignment"]) == 8
    assert shown.talk[-1].startswith(f"next: mpsearch export {run} {pick['id']} ")

    drawn = mpsearch("plot", run, "-o", figure)
    assert (drawn.code, drawn.out) == (0, "")
    assert drawn.talk[-1].startswith("next: mpsearch export ")
    assert figure.read_bytes().startswith(b"\x89PNG")

    written = mpsearch("export", run, "best", "-o", exported, "--json")
    assert written.code == 0, written.err
    assert json.loads(written.out)["stored_bytes"] == pick["stored_bytes"]
    assert written.talk[-1].startswith("next: ")
    about = json.loads((exported / "mpsearch.json").read_text(encoding="utf-8"))
    assert about["assignment"] == pick["assignment"]
    one_line(mpsearch("export", run, "best", "-o", exported), 2, "exists", str(exported))


def test_front_and_show_as_tables_hold_what_the_json_holds(whole: Path, mpsearch: Cli) -> None:
    content = json.loads(mpsearch("front", whole, "--json").out)
    table = mpsearch("front", whole)
    assert table.talk[-1].startswith("next: ")
    for point in content["points"]:
        (row,) = [line for line in table.out.splitlines() if line.split()[:1] == [point["id"]]]
        assert f"{point['stored_bytes']:,}" in row
        assert ("*" in row) == point["on_front"]
        assert row.rstrip().endswith("pick") == (point["id"] == content["pick"])
    assert content["verdict"] in table.out
    shown = mpsearch("show", whole, content["pick"][:5])
    assert content["pick"] in shown.out
    one_line(mpsearch("show", whole, "zzz"), 2, "'zzz' is not in this run", content["pick"])


def test_front_is_read_without_torch_and_a_reader_that_leaves_is_no_error(
    whole: Path, tmp_path: Path
) -> None:
    code = "import sys; from mpsearch.cli import main; c = main(sys.argv[1:]); " + (
        "assert not {'torch', 'optuna'} & set(sys.modules); sys.exit(c)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "front", str(whole), "--json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["points"]
    assert done.stderr.startswith("next: ")
    reader, writer = os.pipe()
    os.close(reader)
    closed = subprocess.run(
        command("front", whole), stdout=writer, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    os.close(writer)
    assert closed.returncode == 0
    assert "Traceback" not in closed.stderr and "Broken" not in closed.stderr


@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize("name", ["layers", "sensitivity", "doctor"])
def test_the_other_commands_put_data_on_stdout_and_the_next_step_on_stderr(
    name: str,
    as_json: bool,
    tiny_folder: Path,
    facts_file: Path,
    tiny_space: ResolvedSpace,
    mpsearch: Cli,
) -> None:
    arguments = {
        "layers": [tiny_folder],
        "sensitivity": [tiny_folder, "--facts", facts_file],
        "doctor": [],
    }[name]
    outcome = mpsearch(name, *arguments, *(["--json"] if as_json else []))
    assert outcome.code == 0, outcome.err
    assert outcome.talk[-1].startswith("next: mpsearch ")
    assert len(outcome.said) == 1, outcome.err
    if as_json:
        content = json.loads(outcome.out)
        if name == "layers":
            assert len(content["groups"]) == 8
            assert content["smallest_bytes"] == tiny_space.stored_bytes(tiny_space.smallest)
            assert content["largest_bytes"] == tiny_space.stored_bytes(tiny_space.largest)
            kept = {row["reason"]: row for row in content["kept"]}
            assert set(kept) == {"embedding, shared with the output head", "norm"}
            assert len(kept["norm"]["names"]) == 5
            assert sum(row["stored_bytes"] for row in content["kept"]) == content["kept_bytes"]
        if name == "sensitivity":
            assert len(content["rows"]) == 32
            assert set(content["rows"][0]) > {"fisher_nats", "weight_error", "output_error"}
            assert set(content["groups"][0]) > {"outlier_ratio", "effective_rank", "drift"}
            assert content["rank_correlations"]
    elif name != "doctor":
        for group in tiny_space.groups:
            assert group.name in outcome.out
        if name == "layers":
            assert "embedding, shared with the output head" in outcome.out
            assert "model.embed_tokens.weight" in outcome.out


def test_sensitivity_checks_itself_on_request_and_saves_everything(
    tiny_folder: Path, facts_file: Path, mpsearch: Cli, tmp_path: Path
) -> None:
    out = tmp_path / "table.json"
    outcome = mpsearch("sensitivity", tiny_folder, "--facts", facts_file, "--check", "-o", out)
    assert outcome.code == 0, outcome.err
    assert "measured int4-g64" in outcome.out
    assert "correlation with perturb_nats" in outcome.out
    assert any(line.startswith("measuring each group alone") for line in outcome.talk)
    content = json.loads(out.read_text(encoding="utf-8"))
    assert all(row["perturb_nats"] >= 0 for row in content["rows"])
    compared = {(row["a"], row["b"], row["over"]) for row in content["rank_correlations"]}
    assert ("fisher_nats", "perturb_nats", "3 bits and more") in compared


def test_plot_shows_a_measure_of_the_run_beside_the_bits(
    whole: Path, facts_file: Path, mpsearch: Cli, tmp_path: Path
) -> None:
    out, table = tmp_path / "a.svg", tmp_path / "table.json"
    outcome = mpsearch("plot", whole, "--beside", "weight_error", "-o", out)
    assert outcome.code == 0, outcome.err
    assert "relative weight error" in out.read_text(encoding="utf-8")
    refused = mpsearch("plot", whole, "--beside", "drift", "-o", out)
    one_line(refused, 2, "no drift, but fisher_nats, weight_error; measure it with")
    way = re.search("'mpsearch (sensitivity .*) -o FILE.json'", refused.err)
    assert way is not None
    facts = ["--facts", facts_file]
    assert mpsearch(*shlex.split(way.group(1)), *facts, "-o", table).code == 0
    outcome = mpsearch("plot", whole, "--beside", "drift", "--sensitivity", table, "-o", out)
    assert outcome.code == 0, outcome.err
    assert "1 - cosine over the block" in out.read_text(encoding="utf-8")


def test_an_embedding_with_formats_is_shown_among_the_groups_and_not_among_the_kept(
    tiny_folder: Path, tmp_path: Path, mpsearch: Cli
) -> None:
    space = tmp_path / "space.yaml"
    space.write_text(
        "version: 1\ntarget: compressed-tensors\nformats: [int4-g64]\nembedding: [fp8, bf16]\n"
    )
    content = json.loads(mpsearch("layers", tiny_folder, "--space", space, "--json").out)
    rows = {group["name"]: group["stored_bytes"] for group in content["groups"]}
    words = rows["model.embed_tokens"]["bf16"] // 2 // 64
    assert rows["model.embed_tokens"]["fp8"] == words * 64 + 2 * 2 * words
    assert [row["reason"] for row in content["kept"]] == ["norm"]
    assert sum(row["stored_bytes"] for row in content["kept"]) == content["kept_bytes"]


def test_a_large_weight_of_an_unknown_kind_is_said_on_stderr(
    tiny_folder: Path, mpsearch: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = "not recognised: 2-D 'weight' of Odd"
    monkeypatch.setattr(models, "why_kept", lambda module, names: dict.fromkeys(names, reason))
    outcome = mpsearch("layers", tiny_folder)
    said = [line for line in outcome.err.splitlines() if reason in line]
    assert said == [f"'model.embed_tokens.weight' stays as it is ({reason})"]
    assert reason in outcome.out


def test_search_as_json_prints_the_same_front(
    question: list[str], mpsearch: Cli, tmp_path: Path
) -> None:
    searched = mpsearch(*question, "--trials", 1, "-o", tmp_path / "run", "--json")
    assert json.loads(searched.out) == json.loads(mpsearch("front", tmp_path / "run", "--json").out)


def test_a_model_is_found_from_another_folder_than_it_was_searched_in(
    tiny_folder: Path, facts_file: Path, mpsearch: Cli, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tiny_folder.parent)
    run, name = tmp_path / "a run", f"./{tiny_folder.name}"
    searched = mpsearch(
        "search", name, "--facts", facts_file, "--budget", BUDGET, "--trials", 0, "-o", run
    )
    assert searched.talk[-1].startswith(f"next: mpsearch export '{run}' best -o 'exports/a run'")
    monkeypatch.chdir(tmp_path)
    assert mpsearch("export", run, "best", "-o", "export").code == 0
    about = json.loads((tmp_path / "export" / "mpsearch.json").read_text(encoding="utf-8"))
    assert about["base_model"] == name
    drawn = mpsearch("plot", run, "-o", "figure.png", "--json")
    assert json.loads(drawn.out) == {"figure": "figure.png"}
