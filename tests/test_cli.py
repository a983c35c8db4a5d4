"""The command line's contract: streams, exit codes, one line an error, and the way on after it."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
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


# --------------------------------------------------------------------------- 2: wrong usage


def test_wrong_arguments_are_one_line_that_names_the_fault(
    tiny_folder: Path, mpsearch: Cli, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    search = ["search", tiny_folder, "-o", run]
    sized = [*search, "--budget", BUDGET]
    for arguments, words in (
        ([], ["COMMAND"]),
        (["serch"], ["serch"]),
        (search, ["--budget"]),
        (["search", tiny_folder, "--budget", BUDGET], ["-o"]),
        ([*sized, "--trials", "many"], ["--trials", "many"]),
        ([*sized, "--no-such-flag"], ["--no-such-flag"]),
        ([*search, "--budget", "57"], ["'57'", "no unit", "96MiB"]),
        ([*search, "--budget", "57 KiBs"], ["KiBs", "96MiB"]),
        ([*search, "--budget=-57KiB"], ["-57KiB", "positive"]),
        ([*search, "--budget", "0MiB"], ["0MiB", "positive"]),
        ([*search, "--budget", "much"], ["much", "96MiB"]),
        ([*search, "--budget", "nan MiB"], ["nan MiB", "96MiB"]),
        ([*sized, "--time", "soon"], ["soon", "10m"]),
        ([*sized, "--time=-5m"], ["-5m", "10m"]),
    ):
        one_line(mpsearch(*arguments), 2, *words)
    assert not run.exists()


def test_wishes_that_need_the_model_to_be_judged_are_refused_before_the_run_folder_is_made(
    question: list[str], mpsearch: Cli, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for arguments, words in (
        (["--trials", "-1"], ["trials -1"]),
        (["--quantizer", "gptqq"], ["gptqq", "gptq"]),
    ):
        one_line(mpsearch(*question, *arguments, "-o", run), 2, *words)
        assert not run.exists()


@pytest.mark.parametrize("name", ["search", "sensitivity", "recall"])
def test_a_chat_template_that_the_model_has_not_is_refused(
    name: str, question: list[str], tiny_folder: Path, mpsearch: Cli, tmp_path: Path
) -> None:
    given = [*question[1:], "-o", str(tmp_path / "run")] if name == "search" else [tiny_folder]
    outcome = mpsearch(name, *given, "--chat-template")
    assert outcome.code == 2
    assert "has no chat template" in outcome.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["no/such-model", "./nowhere", "builtin:gpt", "a b c"])
def test_a_model_that_cannot_be_had_is_refused(name: str, mpsearch: Cli, tmp_path: Path) -> None:
    outcome = mpsearch("search", name, "--budget", BUDGET, "-o", tmp_path / "run")
    one_line(outcome, 2, name)
    assert outcome.talk[0] == f"loading {name}"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"relation": "a", "template": "{} is"}\n{"relation": "a"\n', ["line 2", "not JSON"]),
        ('{"relation": "a", "template": "x is"}\n', ["line 1", "{}"]),
        ('\n{"relation": "a", "subject": "x", "answer": "y"}\n', ["line 2", "template"]),
        ('{"relation": "a", "template": "{} is", "subjct": "x"}\n', ["line 1", "subjct"]),
        ('{"relation": "a", "template": "{} is", "subject": "x"}\n', ["line 1", "answer"]),
        ("[]\n", ["line 1", "object"]),
        ("", ["no facts"]),
    ],
)
def test_a_malformed_facts_file_is_refused_with_its_line(
    text: str, words: list[str], tiny_folder: Path, mpsearch: Cli, tmp_path: Path
) -> None:
    facts = tmp_path / "mine.jsonl"
    facts.write_text(text, encoding="utf-8")
    outcome = mpsearch(
        "search", tiny_folder, "--budget", BUDGET, "--facts", facts, "-o", tmp_path / "run"
    )
    one_line(outcome, 2, str(facts), *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("version: 1\ntarget: compressed-tensors\nformat: [int4-g64]\n", ["line 3", "'formats'"]),
        ("version: 1\ntarget: compressed-tensors\nformats: [int4-g6]\n", ["line 3", "'int4-g64'"]),
        ("version: 1\ntarget: compressed-tensors\nformats: [nf4]\n", ["line 3", "nf4"]),
        ("version: 1\ntarget: vlm\nformats: [int4-g64]\n", ["line 2", "vlm"]),
        ("version: 2\ntarget: compressed-tensors\nformats: [int4-g64]\n", ["line 1", "use 1"]),
        (
            "version: 1\ntarget: compressed-tensors\nformats: [int4-g64]\nrules:\n"
            "  - match: '*.dwn_proj'\n    formats: [int4-g64]\n",
            ["line 5", "matches no layer"],
        ),
        ("version: [1\n", ["line 2", "not YAML"]),
    ],
)
def test_a_faulty_space_file_is_refused_with_its_line(
    text: str, words: list[str], tiny_folder: Path, mpsearch: Cli, tmp_path: Path
) -> None:
    space = tmp_path / "mine.yaml"
    space.write_text(text, encoding="utf-8")
    outcome = mpsearch(
        "search", tiny_folder, "--budget", BUDGET, "--space", space, "-o", tmp_path / "run"
    )
    one_line(outcome, 2, str(space), *words)
    assert not (tmp_path / "run").exists()


def test_files_that_are_not_there_are_refused(
    question: list[str], mpsearch: Cli, tmp_path: Path
) -> None:
    for flag in ("--space", "--facts"):
        outcome = mpsearch(*question, flag, tmp_path / "none", "-o", tmp_path / "run")
        one_line(outcome, 2, "none", "No such file")


def test_an_existing_out_is_refused_and_left_alone(
    question: list[str], mpsearch: Cli, tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("mine", encoding="utf-8")
    for flags, words in (([], [str(mine), "exists", "--resume"]), (["--resume"], ["not a run"])):
        outcome = mpsearch(*question, *flags, "-o", mine)
        one_line(outcome, 2, *words)
        assert len(outcome.talk) == 1  # before the model was loaded
    assert [path.name for path in mine.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["front", "RUN"], ["show", "RUN", "best"], ["plot", "RUN", "-o", "RUN/figure.png"],
        ["export", "RUN", "best", "-o", "RUN/export"],
    ],
)  # fmt: skip
def test_what_is_no_run_folder_is_refused(
    arguments: list[str], mpsearch: Cli, tmp_path: Path
) -> None:
    outcome = mpsearch(*(argument.replace("RUN", str(tmp_path)) for argument in arguments))
    one_line(outcome, 2, str(tmp_path), "not a run folder")
    assert not list(tmp_path.iterdir())


def test_plot_refuses_another_suffix(whole: Path, mpsearch: Cli, tmp_path: Path) -> None:
    one_line(mpsearch("plot", whole, "-o", tmp_path / "a.gif"), 2, ".gif", ".png")


def test_resume_with_another_question_is_refused_and_named(
    question: list[str], whole: Path, mpsearch: Cli
) -> None:
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    outcome = mpsearch(*question, "--seed", 4, "--resume", "-o", whole)
    one_line(outcome, 2, "seed was 0 and is now 4")
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before


def test_export_refuses_a_model_whose_weights_have_changed(
    whole: Path, tiny_folder: Path, mpsearch: Cli, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    content = json.loads((run / "run.json").read_text(encoding="utf-8"))
    content["question"]["fingerprint"] = "0" * 64
    (run / "run.json").write_text(json.dumps(content), encoding="utf-8")
    outcome = mpsearch("export", run, "best", "-o", tmp_path / "export")
    one_line(outcome, 2, "weights have changed")
    assert not (tmp_path / "export").exists()


# ---------------------------------------------------------------- 3, and a budget above everything


def test_a_budget_below_the_smallest_size_is_refused_with_the_range(
    question: list[str], tiny_space: ResolvedSpace, mpsearch: Cli, tmp_path: Path
) -> None:
    outcome = mpsearch(*question, "--budget", "20KiB", "-o", tmp_path / "run")
    smallest = tiny_space.stored_bytes(tiny_space.smallest)
    one_line(outcome, 3, "20.00 KiB", f"{smallest:,} bytes", "83.97 KiB", "at least 0.04MiB")
    assert not (tmp_path / "run").exists()


def test_a_budget_above_the_largest_size_says_so_and_goes_on(
    question: list[str], mpsearch: Cli, tmp_path: Path
) -> None:
    outcome = mpsearch(*question, "--trials", 2, "--budget", "1GiB", "-o", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    (said, following) = outcome.said
    assert said.startswith("budget 1.00 GiB holds even the largest")
    assert following.startswith("next: ")


# -------------------------------------------------------------------------- 4: a check failed


def test_nan_weights_in_the_checkpoint_are_a_failed_check(
    tiny_folder: Path, facts_file: Path, mpsearch: Cli, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(tiny_folder, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    outcome = mpsearch(
        "search", broken, "--facts", facts_file, "--budget", BUDGET, "-o", tmp_path / "run"
    )
    one_line(outcome, 4, "model.layers.1.mlp.up_proj.weight", "1 NaN")
    assert not (tmp_path / "run").exists()


def test_a_reference_that_knows_nothing_is_a_failed_check(
    tiny_folder: Path, question: list[str], mpsearch: Cli, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    ignorant = tmp_path / "ignorant"
    shutil.copytree(tiny_folder, ignorant)
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: tensor if tensor.ndim == 1
        else (0.1 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
        for name, tensor in load_file(ignorant / "model.safetensors").items()
    }  # fmt: skip
    save_file(tensors, ignorant / "model.safetensors", metadata={"format": "pt"})
    outcome = mpsearch("search", ignorant, *question[2:], "-o", tmp_path / "run")
    one_line(outcome, 4, "no relation better than chance")
