"""What the command line refuses: one line, the documented exit code, nothing lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from cli_cases import BUDGET, Cli, one_line

from mpsearch.space import ResolvedSpace

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
        (["--seed", "-1"], ["seed -1", "use 0 to"]),
        (["--seed", 2**32], [f"seed {2**32}", f"use 0 to {2**32 - 1}"]),
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


@pytest.mark.parametrize(
    "name", ["no/such-model", "./nowhere", "builtin:gpt", "a b c", "~nobody/model"]
)
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
        ('{"relation": "a", "template": "{} is", "subject": "\\uD800x"}\n', ["line 1", "half"]),
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
        ("[" * 9999, ["nested too deeply"]),
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


def test_plot_refuses_another_suffix_and_a_table_that_it_would_not_show(
    whole: Path, mpsearch: Cli, tmp_path: Path
) -> None:
    one_line(mpsearch("plot", whole, "-o", tmp_path / "a.gif"), 2, ".gif", ".png")
    unused = mpsearch("plot", whole, "-o", tmp_path / "a.png", "--sensitivity", "table.json")
    one_line(unused, 2, "--beside MEASURE")


def test_what_the_system_refuses_is_one_line(
    question: list[str], whole: Path, mpsearch: Cli, tmp_path: Path
) -> None:
    long = tmp_path / ("a" * 300)
    for command in (
        ["front", long],
        [*question, "-o", long],
        ["export", whole, "best", "-o", long],
    ):
        outcome = mpsearch(*command)
        assert (outcome.code, outcome.out) == (2, "")
        assert "File name too long" in outcome.said[-1]
        assert "Traceback" not in outcome.err
    nowhere = ["sensitivity", question[1], "-o", tmp_path / "no" / "table.json"]
    outcome = mpsearch(*nowhere)
    one_line(outcome, 2, "lies in no folder")
    assert len(outcome.talk) == 1  # before the model was loaded


def test_resume_with_another_question_is_refused_and_named(
    question: list[str], whole: Path, mpsearch: Cli
) -> None:
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    outcome = mpsearch(*question, "--seed", 4, "--resume", "-o", whole)
    one_line(outcome, 2, "seed was 0 and is now 4")
    outcome = mpsearch(*question, "--seed", 2**33, "--resume", "-o", whole)
    one_line(outcome, 2, f"seed {2**33} is out of range")
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before


@pytest.mark.parametrize(
    ("key", "said"), [("fingerprint", "weights have"), ("config", "config.json has")]
)
def test_export_refuses_a_model_that_has_changed(
    key: str, said: str, whole: Path, mpsearch: Cli, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    content = json.loads((run / "run.json").read_text(encoding="utf-8"))
    content["question"][key] = "0" * 64
    (run / "run.json").write_text(json.dumps(content), encoding="utf-8")
    outcome = mpsearch("export", run, "best", "-o", tmp_path / "export")
    one_line(outcome, 2, f"{said} changed")
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
