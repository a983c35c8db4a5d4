"""Processes that help this one: forked, each with one thread, as many as memory holds."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch

from mpsearch.device import available_memory_bytes


def processes(device: torch.device, pieces: int, working_bytes: int) -> int:
    """How many share some work: one a thread where processes can be forked, else this one alone.

    Args:
        pieces: of work, each done by one.
        working_bytes: of memory that one needs beside what all share.
    """
    if device.type != "cpu" or sys.platform != "linux":
        return 1
    fitting = available_memory_bytes(device) // max(working_bytes, 1)
    return max(1, min(torch.get_num_threads(), pieces, fitting))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads of torch's, and afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def helping(count: int, work: Callable[[], None]) -> Iterator[None]:
    """So many processes do this work meanwhile, and the caller the same with one thread.

    They are forked, as torch's data loaders are, since a started one would run the caller's script
    again. What one leaves undone the caller has to do.
    """
    if not count:
        yield
        return

    def help_out() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller is told, and ends us
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by this, without unwinding
        torch.set_num_threads(1)
        with suppress(Exception):  # the caller meets the same error
            work()

    context = multiprocessing.get_context("fork")
    helpers = [context.Process(target=help_out, daemon=True) for _ in range(count)]
    for helper in helpers:
        helper.start()
    try:
        with threads(1):
            yield
    finally:
        for helper in helpers:
            helper.terminate()
            helper.join()
