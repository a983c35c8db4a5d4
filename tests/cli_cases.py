"""What one command leaves behind, and how a failure has to look."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass

BUDGET = "57KiB"
TRIALS = "40"
TALK = re.compile(
    r"loading |budget [\d.]+ [KMGT]iB \([\d,]+ bytes\)$|[a-z][^:]*: \d+/\d+|"
    r"run (loaded whole|block by block) \(|about .* as it goes\)$"
)


@dataclass(frozen=True)
class Outcome:
    """What one command left behind."""

    code: int
    out: str
    err: str

    @property
    def talk(self) -> list[str]:
        return self.err.splitlines()

    @property
    def said(self) -> list[str]:
        """Lines of standard error beyond loading, the parsed budget and progress."""
        return [line for line in self.talk if not TALK.match(line)]


Cli = Callable[..., Outcome]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "mpsearch.cli", *map(str, arguments)]


def one_line(outcome: Outcome, code: int, *words: str) -> None:
    """A failure as the contract wants it: its code, no data, and one line that says why."""
    assert (outcome.code, outcome.out) == (code, ""), outcome.err
    assert len(outcome.said) == 1, outcome.err
    assert outcome.talk[-1] == outcome.said[0]
    assert outcome.said[0].startswith("mpsearch: ")
    for word in words:
        assert word in outcome.said[0]
