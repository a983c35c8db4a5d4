"""A search that is broken off anywhere goes on to the front of an uninterrupted one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from numpy.typing import NDArray
from searches import (
    Search,
    evaluation_lines,
    interrupted_at,
    proposals,
    result,
)

import mpsearch.scorer
from mpsearch.assignment import Assignment
from mpsearch.evaluate import Bench
from mpsearch.facts import FactSet
from mpsearch.models import Model
from mpsearch.run import Run
from mpsearch.samplers import LevelSwitchSampler
from mpsearch.scorer import Scorer
from mpsearch.wish import Wish


@pytest.mark.parametrize("part", [0.0, 0.2, 0.45, 0.62, 0.8, 1.0])
def test_a_search_interrupted_in_an_evaluation_resumes_to_the_same_front(
    part: float, searched: Run, calls: Counter[Assignment], ask: Search, tiny: Model, tmp_path: Path
) -> None:
    expected = result(searched)
    with interrupted_at(Bench, "evaluate", 1 + round(part * (calls.total() - 1))):
        ask(tmp_path / "run")
    for layer, original in tiny.originals.items():
        assert tiny.places[layer].weight.data_ptr() == original.data_ptr()
    assert not Run.open(tmp_path / "run").finished
    assert result(ask(tmp_path / "run", resume=True)) == expected


@pytest.mark.parametrize(
    ("owner", "method", "number", "after"),
    [
        (Run, "add", 3, True),  # a baseline is stored, the study was not told
        (optuna.Study, "add_trial", 4, True),
        (optuna.Study, "ask", 3, True),  # a trial was begun, without its kind
        (optuna.Trial, "set_user_attr", 3, True),
        (Run, "add", 23, True),  # a proposal is stored, the study was not told
        (optuna.Study, "tell", 3, True),
        (Run, "save", 5, False),
    ],
)
def test_a_search_interrupted_between_its_two_files_resumes_to_the_same_front(
    owner: type, method: str, number: int, after: bool, searched: Run, ask: Search, tmp_path: Path
) -> None:
    expected = result(searched)
    with interrupted_at(owner, method, number, after):
        ask(tmp_path / "run")
    resumed = ask(tmp_path / "run", resume=True)
    assert result(resumed) == expected
    assert [p for p in proposals(searched) if p not in proposals(resumed)] == []


def test_a_search_interrupted_three_times_resumes_to_the_same_front(
    searched: Run, ask: Search, tmp_path: Path
) -> None:
    for attempt, number in enumerate((3, 4, 10)):
        with interrupted_at(Bench, "evaluate", number):
            ask(tmp_path / "run", resume=attempt > 0)
    assert result(ask(tmp_path / "run", resume=True)) == result(searched)


def test_slopes_after_a_kill_are_of_the_halves_that_they_would_have_been_of(
    ask: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slopes = Scorer.slopes
    measured: list[tuple[str, int]] = []

    def halves(relations: Sequence[str]) -> list[NDArray[Any]]:
        first = np.asarray(relations) == relations[0]
        return [np.flatnonzero(first), np.flatnonzero(~first)]

    def recorded(scorer: Scorer, assignment: Assignment, part: int) -> dict[tuple[str, str], float]:
        measured.append((assignment.id, part % 2))
        return slopes(scorer, assignment, part)

    def each_third(
        sampler: LevelSwitchSampler, study: optuna.Study, times: int
    ) -> optuna.trial.FrozenTrial | None:
        assert times == 2
        searched = [t for t in study.trials if t.user_attrs.get("kind") == "search" and t.values]
        return searched[-1] if len(searched) in (3, 6, 9) else None

    monkeypatch.setattr(mpsearch.scorer, "stages", halves)
    monkeypatch.setattr(LevelSwitchSampler, "due", each_third)
    monkeypatch.setattr(mpsearch.scorer, "hopeless", lambda *_: None)
    monkeypatch.setattr(Scorer, "slopes", recorded)
    whole = ask(tmp_path / "whole", trials=10)
    expected = measured.copy()
    measured.clear()
    with interrupted_at(optuna.Study, "ask", 2, after=True):
        ask(tmp_path / "run", trials=10)
    with interrupted_at(optuna.Study, "ask", 4, after=True):
        ask(tmp_path / "run", trials=10, resume=True)
    resumed = ask(tmp_path / "run", trials=10, resume=True)
    assert len(expected) == 3
    assert measured == expected
    assert proposals(resumed) == proposals(whole)


def test_an_interrupted_search_says_what_is_missing_and_ends_with_the_best_so_far_on_request(
    ask: Search, tmp_path: Path
) -> None:
    with interrupted_at(optuna.Study, "ask", 5):
        ask(tmp_path / "run")
    run = Run.open(tmp_path / "run")
    proposed = proposals(run)
    assert len(proposed) == 4
    front = run.front()
    assert not any(point.kind == "search" for point in front.points)
    assert front.verdict.startswith("No searched point is among these yet")
    ended = ask(tmp_path / "run", trials=0, resume=True)
    assert ended.finished
    assert proposals(ended) == proposed
    assert any(point.kind == "search" for point in ended.front().points)
    assert "No searched point" not in ended.front().verdict
    assert ended.points("test")


def test_a_limit_of_time_counts_what_was_proposed_before_a_resume(
    ask: Search, tmp_path: Path
) -> None:
    run = ask(tmp_path / "run", trials=10**6, seconds=0.05)
    proposed = proposals(run)
    assert run.proposing_seconds > 0
    again = ask(tmp_path / "run", trials=10**6, seconds=0.05, resume=True)
    assert proposals(again) == proposed


def _copy_cut(searched: Run, out: Path, journal_lines: int, torn: bytes) -> None:
    """The folder as a kill left it after so many journal lines: with the evaluations of all
    trials told by then and of the one in flight, and both files torn.
    """
    out.mkdir()
    content = {k: v for k, v in searched.content.items() if not k.startswith("reference")}
    (out / "run.json").write_text(json.dumps({**content, "finished": False}), encoding="utf-8")
    sensitivity = (searched.folder / "sensitivity.json").read_bytes()
    (out / "sensitivity.json").write_bytes(sensitivity)
    journal = searched.journal.read_bytes().splitlines(keepends=True)[:journal_lines]
    (out / "journal.log").write_bytes(b"".join(journal) + torn)
    told = sum(b'"values":[' in entry or b'"values": [' in entry for entry in journal)
    evaluations = (searched.folder / "evaluations.jsonl").read_bytes().splitlines(keepends=True)
    kept, asked = [], 0
    for entry in evaluations:
        if json.loads(entry)["partition"] == "search":
            asked += 1
            if asked <= told:
                kept.append(entry)
    (out / "evaluations.jsonl").write_bytes(b"".join(kept) + evaluations[len(kept)][:50])


@pytest.mark.parametrize("part", [0.02, 0.1, 0.31, 0.5, 0.77, 0.9, 0.97])
def test_a_journal_cut_anywhere_with_torn_last_lines_resumes_to_the_same_front(
    part: float, searched: Run, ask: Search, tmp_path: Path
) -> None:
    expected = result(searched)
    lines = len(searched.journal.read_bytes().splitlines())
    torn = b'{"op_code":6,"worker_id":"'
    _copy_cut(searched, tmp_path / "run", int(part * lines), torn)
    resumed = ask(tmp_path / "run", resume=True)
    assert result(resumed) == expected
    assert torn + b"{" not in resumed.journal.read_bytes()
    assert all(json.loads(line) for line in resumed.journal.read_text().splitlines())
    assert evaluation_lines(resumed)


def test_a_sensitivity_table_that_a_kill_cut_short_is_measured_again(
    searched: Run, ask: Search, tmp_path: Path
) -> None:
    with interrupted_at(Bench, "evaluate", 1):
        ask(tmp_path / "run")
    table = tmp_path / "run" / "sensitivity.json"
    table.write_bytes(table.read_bytes()[:100])
    assert result(ask(tmp_path / "run", resume=True)) == result(searched)


def test_a_killed_command_line_search_resumes_to_the_front_of_an_uninterrupted_one(
    tiny_folder: Path, tiny_facts: FactSet, facts_file: Path, budget: int, ask: Search,
    tmp_path: Path,
) -> None:  # fmt: skip
    killed, trials = tmp_path / "killed", 40
    process = subprocess.Popen(
        [
            sys.executable, "-m", "mpsearch.cli", "search", str(tiny_folder), "--facts",
            str(facts_file), "--budget", f"{budget}B", "--trials", str(trials), "-o", str(killed),
        ],
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )  # fmt: skip
    watchdog = threading.Timer(90, process.kill)
    watchdog.start()
    assert process.stderr is not None
    talk = []
    for line in process.stderr:
        talk.append(line)
        if line.startswith("search,"):
            threading.Timer(0.2, process.send_signal, [signal.SIGKILL]).start()
    watchdog.cancel()
    assert process.wait() == -signal.SIGKILL, "".join(talk)
    left = Run.open(killed)
    assert not left.finished
    before = len(left.scores())
    changes = {"trials": trials, "search_facts": Wish.search_facts}
    resumed = ask(killed, resume=True, **changes)
    assert len(resumed.scores()) > before > 0
    assert result(resumed) == result(ask(tmp_path / "whole", **changes))
