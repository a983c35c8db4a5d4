"""Endings with 5 and 130: everything finished is kept, and the printed command goes on."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import signal
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cli_cases import BUDGET, TALK, TRIALS, Cli, Outcome, command, one_line

from mpsearch.evaluate import Bench

# How a search is ended by signals: at once where it is told twice.
ENDINGS = {
    "ctrl-c": [signal.SIGINT],
    "ctrl-c-twice": [signal.SIGINT, signal.SIGINT],
    "terminated": [signal.SIGTERM],
}


def figures(mpsearch: Cli, run: Path) -> dict[str, Any]:
    """The front as data, which a resumed search must reproduce exactly."""
    content: dict[str, Any] = json.loads(mpsearch("front", run, "--json").out)
    assert content["finished"] is True
    return content


def continued(outcome: Outcome) -> list[str]:
    """The arguments of the command that an error says to continue with."""
    found = re.search(r"continue with: mpsearch (.*)$", outcome.said[-1])
    assert found, outcome.err
    return shlex.split(found.group(1))


def test_a_full_disk_ends_with_5_and_the_search_is_resumed_to_the_same_front(
    question: list[str], whole: Path, mpsearch: Cli, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run, resumed = tmp_path / "run", [*question, "--resume", "-o", tmp_path / "run"]
    sync, left = os.fsync, 60

    def full(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for attempt, allowed in enumerate((60, 61, 62, 63)):  # each hits another of the files
            left = allowed
            outcome = mpsearch(*(resumed if attempt else [*question, "-o", run]))
            one_line(outcome, 5, "free some")
    assert mpsearch(*resumed).code == 0
    assert figures(mpsearch, run) == figures(mpsearch, whole)


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")],
)
def test_memory_that_runs_out_ends_with_5_and_says_how_to_go_on(
    error: Exception, question: list[str], whole: Path, mpsearch: Cli, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run = tmp_path / "run"
    evaluate, calls = Bench.evaluate, 0

    def exhausted(bench: Bench, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 30:
            raise error
        return evaluate(bench, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Bench, "evaluate", exhausted)
        outcome = mpsearch(*question, "-o", run)
    one_line(outcome, 5, "memory ran out", "everything finished is kept")
    assert mpsearch(*continued(outcome)).code == 0
    assert figures(mpsearch, run) == figures(mpsearch, whole)


def test_a_bug_of_ours_is_not_hidden(
    question: list[str], mpsearch: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(Bench, "evaluate", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        mpsearch(*question, "-o", tmp_path / "run")


@pytest.mark.parametrize("name", ["run", "a run's folder"])
def test_the_command_that_an_interrupted_search_prints_can_be_pasted(
    name: str, question: list[str], mpsearch: Cli, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run = tmp_path / name

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    chosen = ["--trials", 3, "--seed", 5, "--sampler", "tpe", "--time", "10m"]
    with monkeypatch.context() as patch:
        patch.setattr(Bench, "evaluate", interrupted)
        outcome = mpsearch(*question, *chosen, "-o", run)
    one_line(outcome, 130, "interrupted", "everything finished is kept")
    assert mpsearch(*continued(outcome)).code == 0
    assert figures(mpsearch, run)["points"]


def test_an_unscored_run_names_a_command_that_is_whole(
    question: list[str], mpsearch: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Bench, "evaluate", interrupted)
    mpsearch(*question, "-o", tmp_path / "run")
    outcome = mpsearch("front", tmp_path / "run")
    one_line(outcome, 2, "no scored point yet", "--resume", "--budget")


@dataclass
class Interrupted:
    """A search in its own process that got signals once it was proposing."""

    run: Path
    code: int
    talk: list[str]


@pytest.fixture(scope="module")
def interrupted(
    tiny_folder: Path, facts_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Interrupted]:
    """Searches that were ended in different ways, at the same time."""
    folder = tmp_path_factory.mktemp("interrupted")
    found: dict[str, Interrupted] = {}

    def search(how: str) -> None:
        run = folder / how
        process = subprocess.Popen(
            command("search", tiny_folder, "--facts", facts_file, "--budget", BUDGET,
                    "--trials", TRIALS, "-o", run),
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=folder,
        )  # fmt: skip
        watchdog = threading.Timer(100, process.kill)
        watchdog.start()
        assert process.stderr is not None
        talk = []
        for line in process.stderr:
            talk.append(line.rstrip("\n"))
            if line.startswith("search,") and "search" not in line[7:]:
                time.sleep(0.1)
                for sent in ENDINGS[how]:
                    process.send_signal(sent)
                    time.sleep(0.002)
        code = process.wait()
        watchdog.cancel()
        found[how] = Interrupted(run, code, talk)

    threads = [threading.Thread(target=search, args=(how,)) for how in ENDINGS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("how", ENDINGS)
def test_ctrl_c_ends_with_130_and_the_search_is_resumed_to_the_same_front(
    how: str, interrupted: dict[str, Interrupted], question: list[str], whole: Path,
    mpsearch: Cli,
) -> None:  # fmt: skip
    ended = interrupted[how]
    assert ended.code == 130, ended.talk
    assert not any("Traceback" in line for line in ended.talk)
    content = json.loads((ended.run / "run.json").read_text(encoding="utf-8"))
    assert content["finished"] is False
    resumed = mpsearch(*question, "--resume", "-o", ended.run)
    assert resumed.code == 0, resumed.err
    assert figures(mpsearch, ended.run) == figures(mpsearch, whole)


@pytest.mark.parametrize("how", ["ctrl-c", "terminated"])
def test_ctrl_c_says_what_is_kept_and_other_libraries_say_nothing(
    how: str, interrupted: dict[str, Interrupted]
) -> None:
    said = [line for line in interrupted[how].talk if not TALK.match(line)]
    assert len(said) == 1, said
    assert said[0].startswith(
        "mpsearch: interrupted; everything finished is kept; add --trials 0 to"
    )
    assert f"--resume -o {interrupted[how].run}" in said[0]
