"""`mpsearch refine`: what it prints, how it goes on after Ctrl-C, one line for what is wrong."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cli_cases import Cli, command, one_line

from mpsearch.run import Run

CALIBRATION = "the color of s1 is red the shape of s2 is flat the place of s3 is north " * 600


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration text of its own: 64 pieces of 128 words."""
    path = tmp_path_factory.mktemp("calibration") / "text"
    path.write_text(CALIBRATION, encoding="utf-8")
    return path


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A search by rounding, to refine in."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


@pytest.fixture
def given(facts_file: Path, text_file: Path) -> list[str]:
    return ["--facts", str(facts_file), "--calibration", str(text_file)]


def uniform_id(run: Path, fmt: str = "int3-g64") -> str:
    points = Run.open(run).front().points
    return next(p.id for p in points if p.kind == "uniform" and fmt in p.assignment.values())


def test_both_points_the_gain_and_the_next_command_are_shown(
    run: Path, given: list[str], mpsearch: Cli, tmp_path: Path
) -> None:
    parent = uniform_id(run)
    shown = mpsearch("refine", run, parent, *given)
    assert shown.code == 0, shown.err
    assert shown.talk[0].startswith("loading ")
    assert any(re.match(r"re-quantizing in order \(gptq\): 14/14", line) for line in shown.talk)
    rows = [line.split()[:3] for line in shown.out.splitlines()]
    above, row = (row for row in rows if row[2:] == ["39,904"])
    refined = row[0]
    assert above == [parent, "uniform", "39,904"]
    assert row == [refined, "refined", "39,904"]
    assert f"{refined} refines {parent} by gptq in order: answer loss" in shown.out
    assert "no gain of the order alone: the run's points were quantized by rounding" in shown.out
    assert shown.talk[-1] == f"next: mpsearch export {run} {refined} -o exports/{refined}"

    listed = mpsearch("front", run)
    order = [line.split()[0] for line in listed.out.splitlines() if line.split()[1:2]]
    assert order.index(refined) == order.index(parent) + 1
    assert f"{refined} refines {parent}" in listed.out
    assert f"{refined} refines {parent}" in mpsearch("show", run, refined).out
    assert mpsearch("plot", run, "-o", tmp_path / "figure.png").code == 0
    exported = mpsearch("export", run, refined[:7], "-o", tmp_path / "export", "--json")
    assert exported.code == 0, exported.err
    assert json.loads(exported.out)["id"] == refined
    verified = mpsearch("verify", tmp_path / "export", "--facts", given[1])
    assert verified.code == 0, verified.err


def test_json_holds_both_points_and_a_second_call_says_the_same(
    run: Path, given: list[str], mpsearch: Cli
) -> None:
    parent = uniform_id(run)
    first = mpsearch("refine", run, parent, *given, "--json")
    assert first.code == 0, first.err
    found = json.loads(first.out)
    assert found["parent"]["id"] == found["refined"]["parent"] == parent
    assert found["refined"]["stored_bytes"] == found["parent"]["stored_bytes"]
    change = found["refined"]["against_parent_nats"]
    before, after = (found[which]["answer_loss_nats"]["mean"] for which in ("parent", "refined"))
    assert change["mean"] == pytest.approx(after - before)
    assert found["bank"]["quantizer"] == "gptq"
    assert found["seconds"] > 0
    again = mpsearch("refine", run, parent[:6], *given, "--json")
    assert {**json.loads(again.out), "seconds": 0} == {**found, "seconds": 0}
    assert not any(line.startswith("re-quantizing") for line in again.talk)


def test_ctrl_c_ends_with_130_and_the_printed_command_goes_on(
    run: Path, given: list[str], mpsearch: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPSEARCH_HOME", str(tmp_path / "home"))
    process = subprocess.Popen(
        command("refine", run, "best", *given),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    talk: list[str] = []
    for line in process.stderr:
        talk.append(line.rstrip("\n"))
        if line.startswith("re-quantizing") and len(talk) > 1:
            process.send_signal(signal.SIGINT)
    assert process.wait() == 130, talk
    said = [line for line in talk if line.startswith("mpsearch: ")]
    (hint,) = [re.search(r"continue with: mpsearch (.*)$", line) for line in said]
    assert hint is not None
    assert not any("Traceback" in line for line in talk)
    pick = Run.open(run).find("best").id
    arguments = shlex.split(hint.group(1))
    assert arguments == ["refine", str(run), pick, "--calibration", given[3], "--facts", given[1]]
    assert mpsearch(*arguments).code == 0


def test_a_run_of_a_text_file_needs_it_again(
    tiny_folder: Path, facts_file: Path, text_file: Path, given: list[str], mpsearch: Cli,
    tmp_path: Path,
) -> None:  # fmt: skip
    run = tmp_path / "run"
    searched = mpsearch(
        "search", tiny_folder, *given, "--budget", "57KiB", "--trials", 2, "--quantizer", "gptq",
        "-o", run,
    )  # fmt: skip
    assert searched.code == 0, searched.err
    point = uniform_id(run, "int2-g64")
    asked = mpsearch("refine", run, point, "--facts", facts_file)
    one_line(asked, 2, "calibrated on a text file", "same --calibration file")
    done = mpsearch("refine", run, point, *given)
    assert done.code == 0, done.err
    assert "no gain of the order alone" not in done.out


def test_what_is_wrong_is_one_line_before_the_model_is_loaded(
    run: Path, whole: Path, given: list[str], facts_file: Path, mpsearch: Cli, tmp_path: Path
) -> None:
    facts = ["--facts", facts_file]
    cases: list[tuple[list[Any], list[str]]] = [
        ([tmp_path / "nowhere", "best", *facts], ["is not a run folder"]),
        ([run, "zzz", *facts], ["'zzz' is not in this run"]),
        ([run, "best"], ["the facts are not those", "--facts FILE"]),
        ([run, "best", "--facts", tmp_path / "none"], ["none"]),
        ([run, "best", *facts, "--calibration", tmp_path / "none"], ["cannot be read"]),
    ]
    for arguments, words in cases:
        outcome = mpsearch("refine", *arguments)
        one_line(outcome, 2, *words)
        assert len(outcome.talk) == 1, outcome.err
    with Run.open(run).locked():
        one_line(mpsearch("refine", run, "best", *facts), 2, "another search is running")
    assert mpsearch("refine", run, uniform_id(run), *given).code == 0
    refined = next(p for p in Run.open(run).front().points if p.parent)
    one_line(mpsearch("refine", run, refined.id, *facts), 2, "is refined already, from")
    content = json.loads((run / "run.json").read_text())
    content["question"]["fingerprint"] = "0" * 64
    (run / "run.json").write_text(json.dumps(content))
    one_line(mpsearch("refine", run, uniform_id(run), *facts), 2, "its weights have changed")


def test_a_point_that_is_bf16_everywhere_is_refused(
    tiny_folder: Path, facts_file: Path, mpsearch: Cli, tmp_path: Path
) -> None:
    space, run = tmp_path / "space.yaml", tmp_path / "run"
    space.write_text("version: 1\ntarget: compressed-tensors\nformats: [int4-g64, bf16]\n")
    searched = mpsearch(
        "search", tiny_folder, "--facts", facts_file, "--space", space, "--budget", "1MiB",
        "--trials", 1, "-o", run,
    )  # fmt: skip
    assert searched.code == 0, searched.err
    outcome = mpsearch("refine", run, uniform_id(run, "bf16"), "--facts", facts_file)
    one_line(outcome, 3, "is bf16: there is nothing to quantize again")
