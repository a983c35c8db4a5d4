"""A limit of memory on the command line: what it refuses, what it hands on, what a search says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cli_cases import Cli, one_line

from mpsearch import cli, device, opening

REST = {"search": ["--budget", "57KiB", "-o", "run"], "export": ["best", "-o", "out"],
        "refine": ["best"], "compare": ["other"]}  # fmt: skip


@pytest.mark.parametrize("command", cli._LOADING)
@pytest.mark.parametrize("size", ["lots", "0GiB", "-1GiB", "5"])
def test_what_is_no_size_is_refused_before_anything_is_read(
    command: str, size: str, mpsearch: Cli
) -> None:
    found = mpsearch(command, "nowhere", *REST.get(command, []), f"--memory-limit={size}")
    one_line(found, 2, f"size '{size}'", "96MiB")


@pytest.mark.parametrize("command", ["search", "layers", "sensitivity", "bank", "recall"])
def test_a_limit_below_what_works_names_what_does(
    command: str, tiny_folder: Path, mpsearch: Cli, tmp_path: Path
) -> None:
    rest = ["--budget", "57KiB", "-o", tmp_path / "run"] if command == "search" else []
    found = mpsearch(command, tiny_folder, *rest, "--memory-limit", "1MiB")
    one_line(found, 5, "even block by block", "1.00 MiB is allowed", "give --memory-limit")
    assert not (tmp_path / "run").exists()


def test_a_search_says_and_keeps_how_it_runs(
    question: list[str], mpsearch: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[Any] = []
    choose = opening.choose

    def streams(*asked: Any) -> opening.Choice:
        chosen.append(asked)
        return replace(choose(*asked), streamed=True)

    run = tmp_path / "run"
    asked = [*question, "--trials", 3, "-o", run]
    whole = mpsearch(*asked, "--memory-limit", "4GiB")
    assert whole.code == 0, whole.err
    assert device.memory_limit() == 4 * 2**30
    (line,) = [said for said in whole.talk if said.startswith("run ")]
    assert line.startswith("run loaded whole (") and "is allowed" in line
    needs = json.loads((run / "run.json").read_text(encoding="utf-8"))["needs"]
    assert not needs["streamed"] and needs["memory_bytes"] > 2**28

    monkeypatch.setattr(opening, "choose", streams)
    other = tmp_path / "other"
    streamed = mpsearch(*question, "--trials", 3, "-o", other)
    assert streamed.code == 0, streamed.err
    (line,) = [said for said in streamed.talk if said.startswith("run ")]
    assert line.startswith("run block by block (loaded whole it takes ")
    assert [job.stages for _, _, job in chosen] == [opening.JOBS["search"].stages]
    # A run goes on in either way.
    monkeypatch.setattr(opening, "choose", choose)
    again = mpsearch(*question, "--trials", 3, "--resume", "-o", other)
    assert again.code == 0, again.err
    assert not json.loads((other / "run.json").read_text(encoding="utf-8"))["needs"]["streamed"]
