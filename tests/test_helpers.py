"""Helper processes: as many as threads, pieces of work and memory allow; what they do counts."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from mpsearch import helpers
from mpsearch.helpers import helping, processes, threads

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("threads_", "pieces", "working_bytes", "expected"),
    [
        (4, 9, 10, 4),
        (4, 3, 10, 3),
        (4, 9, 40, 2),
        (4, 9, 101, 1),  # this one works whatever there is
        (1, 9, 10, 1),
        (4, 0, 0, 1),
    ],
)
def test_the_least_of_threads_pieces_and_memory_decides(
    monkeypatch: pytest.MonkeyPatch, threads_: int, pieces: int, working_bytes: int, expected: int
) -> None:
    monkeypatch.setattr(helpers, "available_memory_bytes", lambda device: 100)
    with threads(threads_):
        assert processes(CPU, pieces, working_bytes) == expected
        assert processes(torch.device("cuda"), pieces, working_bytes) == 1
        monkeypatch.setattr(sys, "platform", "darwin")
        assert processes(CPU, pieces, working_bytes) == 1


def test_threads_are_as_before_afterwards() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ValueError), threads(before + 2):
        assert torch.get_num_threads() == before + 2
        raise ValueError
    assert torch.get_num_threads() == before


def test_helpers_work_meanwhile_with_a_thread_each_and_are_gone_afterwards(tmp_path: Path) -> None:
    def work() -> None:
        (tmp_path / str(os.getpid())).write_text(str(torch.get_num_threads()))
        raise ValueError  # the caller's to tell

    with threads(3):
        with helping(2, work):
            assert torch.get_num_threads() == 1
            deadline = time.monotonic() + 30
            while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
                time.sleep(0.01)
            while any(not path.read_text() for path in tmp_path.iterdir()):
                time.sleep(0.01)
        assert torch.get_num_threads() == 3
    assert [path.read_text() for path in tmp_path.iterdir()] == ["1", "1"]
    assert not multiprocessing.active_children()


def test_helpers_that_are_ended_do_not_unwind_as_their_caller_would(tmp_path: Path) -> None:
    def work() -> None:
        (tmp_path / "begun").touch()
        try:
            time.sleep(30)
        except KeyboardInterrupt:
            (tmp_path / "unwound").touch()

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with helping(1, work):
            deadline = time.monotonic() + 30
            while not (tmp_path / "begun").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [path.name for path in tmp_path.iterdir()] == ["begun"]


def test_without_helpers_nothing_is_forked_and_threads_stay() -> None:
    with threads(3), helping(0, lambda: None):
        assert torch.get_num_threads() == 3
        assert not multiprocessing.active_children()
