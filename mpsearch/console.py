"""The only module that prints: data on standard output, talk on standard error."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from mpsearch.estimates import Estimate
from mpsearch.forecast import Forecast

_PLAIN_EVERY_SECONDS = 10.0


def say(message: str) -> None:
    """A line of talk."""
    print(message, file=sys.stderr, flush=True)


def emit(text: str) -> None:
    """Data."""
    print(text, flush=True)


def emit_json(content: Any) -> None:
    emit(json.dumps(content, indent=1, ensure_ascii=False))


def quiet_libraries() -> None:
    """Keep other libraries' chatter off the terminal; their errors become ours."""
    import os

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TORCH_LOGS", "-all")  # errors only
    for name in ("torchao", "torch", "gptqmodel", "bitsandbytes", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    own = logging.getLogger("mpsearch")
    own.handlers[:] = [handler]
    own.propagate = False


class Progress:
    """Shows stages with time left: a live bar on a terminal, else a plain line now and then.

    Called as `progress(stage, done, total)`. A stage begins when its first word changes.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._stage = ""
        self._started = (0.0, 0)
        self._said = float("-inf")
        self._forecast: Forecast | None = None
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
                console=Console(stderr=True),
            )
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = self._clock()
        begins = stage.split(",")[0] != self._stage
        if begins:
            self._stage = stage.split(",")[0]
            self._started = (now, done)
        left = self._left(now, done, total)
        if self._bar is not None:
            if begins:
                self._task = self._bar.add_task(stage, total=total, left="")
            self._bar.update(self._task, description=stage, completed=done, total=total, left=left)
        elif begins or done == total or now - self._said >= _PLAIN_EVERY_SECONDS:
            self._said = now
            say(f"{stage}: {done}/{total}{', ' + left if left else ''}")

    def _left(self, now: float, done: int, total: int) -> str:
        since, first = self._started
        if done <= first or done >= total:
            return ""
        pace = (now - since) / (done - first)
        seconds = pace * (total - done)
        if self._forecast is None or self._stage != "search":
            return f"about {format_seconds(seconds)} left"
        if self._forecast.limit is not None:
            seconds = min(seconds, max(self._forecast.limit - (now - since), 0.0))
        after = self._forecast.after_trials(pace)
        return f"about {format_seconds(seconds)} left, then {format_seconds(after)}"

    def expect(self, forecast: Forecast) -> None:
        """Say how long a search takes; its trials then show what follows them, too."""
        self._forecast = forecast
        say(forecast_line(forecast))


def format_seconds(seconds: float) -> str:
    """`45 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def forecast_line(forecast: Forecast) -> str:
    """What a search takes, in all and by part."""
    trials = f"{forecast.trials} trials of {forecast.trial:.1f} s"
    if forecast.limit is not None:
        trials = f"about {trials} in {format_seconds(forecast.limit)} at most"
    names = {
        "bank": "bank",
        "sensitivity": "sensitivity",
        "baselines": "simple allocations",
        "trials": trials,
        "finalists": "finalists",
        "test": "test facts",
    }
    parts = [
        f"{names[stage]} {format_seconds(seconds)}"
        for stage, seconds in forecast.by_stage.items()
        if seconds
    ]
    bank = " beside the bank, which is timed next" if forecast.bank is None else ""
    return (
        f"about {format_seconds(forecast.total)}{bank}: {', '.join(parts)} (on this machine, as "
        "busy as it is now; updated as it goes)"
    )


def table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], title: str = "", left: int = 2
) -> None:
    """A table as wide as it needs: the first `left` columns left-aligned, the others right."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=title or None, box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for index, header in enumerate(headers):
        shown.add_column(header, justify="left" if index < left else "right", no_wrap=True)
    for row in rows:
        shown.add_row(*(Text(cell) for cell in row))
    console = Console(width=10_000, highlight=False, markup=False)  # cuts no cell
    with console.capture() as text:  # printed by us: rich ends the process on a closed pipe
        console.print(shown)
    emit(text.get().rstrip("\n"))


def plus_minus(estimate: Estimate | None, scale: float = 1.0, digits: int = 3) -> str:
    if estimate is None:
        return "-"
    return f"{estimate.mean * scale:.{digits}f} ± {estimate.stderr * scale:.{digits}f}"
