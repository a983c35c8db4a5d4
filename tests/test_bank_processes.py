"""Processes that build one bank share the work, and what one leaves another does."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from banks import Counting, Stored, unfinished_in, weights_in

from mpsearch.bank import Bank
from mpsearch.models import Model
from mpsearch.wanted import Wanted


def in_processes(count: int, work: Callable[[], None]) -> None:
    """Run the work in so many forked processes at once; each must end well."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * count


def test_processes_that_build_one_bank_share_the_work(
    tiny: Model, wanted: Wanted, tmp_path: Path
) -> None:
    def note(call: int, stored: Stored) -> Stored:
        with open(tmp_path / "calls", "a", encoding="utf-8") as calls:
            calls.write(f"{os.getpid()}\n")
        time.sleep(0.05)
        return stored

    def build() -> None:
        Bank(tiny, Counting(note), root=tmp_path / "bank").build(wanted)
        assert len(weights_in(tmp_path / "bank")) == 10

    in_processes(3, build)
    workers = (tmp_path / "calls").read_text().split()
    assert len(workers) == 5
    assert len(set(workers)) > 1


def test_helpers_make_the_bank_that_one_process_makes(
    tiny: Model, wanted: Wanted, tmp_path: Path
) -> None:
    Bank(tiny, Counting(), root=tmp_path / "one").build(wanted)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        Bank(tiny, Counting(), root=tmp_path / "three").build(wanted)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert weights_in(tmp_path / "three") == weights_in(tmp_path / "one")
    for path in (tmp_path / "one").rglob("*.safetensors"):
        other = tmp_path / "three" / path.relative_to(tmp_path / "one")
        assert other.read_bytes() == path.read_bytes()
    assert not multiprocessing.active_children()


def test_what_a_dying_helper_leaves_is_done_by_the_caller(
    tiny: Model, wanted: Wanted, tmp_path: Path
) -> None:
    caller = os.getpid()

    def die_elsewhere(call: int, stored: Stored) -> Stored:
        if os.getpid() != caller:
            os._exit(1)
        time.sleep(0.05)
        return stored

    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        Bank(tiny, Counting(die_elsewhere), root=tmp_path).build(wanted)
    finally:
        torch.set_num_threads(threads)
    assert len(weights_in(tmp_path)) == 10
    assert not unfinished_in(tmp_path)
