"""What is printed: progress lines with time left, tables that lose nothing, streams kept apart."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace

import pytest

from mpsearch import console
from mpsearch.console import Progress, forecast_line, format_seconds, plus_minus, table
from mpsearch.estimates import Estimate
from mpsearch.forecast import Forecast


class Clock:
    """Time that passes when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_progress_off_a_terminal_prints_plain_lines_with_time_left(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress(clock) as report:
        for done in range(5):
            report("sensitivity", done, 4)
            clock.now += 15
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "sensitivity: 0/4",
        "sensitivity: 1/4, about 45 s left",
        "sensitivity: 2/4, about 30 s left",
        "sensitivity: 3/4, about 15 s left",
        "sensitivity: 4/4",
    ]


def test_a_forecast_is_one_line_by_part_and_trials_show_what_follows_them(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    forecast = Forecast(360, 120, 240, 150, 9.8, 60, 180)
    assert forecast_line(forecast) == (
        "about 40 min 30 s: bank 6 min 00 s, sensitivity 2 min 00 s, simple allocations 4 min 00 "
        "s, 150 trials of 9.8 s 24 min 30 s, finalists 1 min 00 s, test facts 3 min 00 s (on this "
        "machine, as busy as it is now; updated as it goes)"
    )
    untimed = forecast_line(replace(forecast, bank=None, sensitivity=0.0))
    assert untimed.startswith("about 32 min 30 s beside the bank, which is timed next: simple")
    with Progress(clock) as report:
        report.expect(forecast)
        for done in range(3):
            report("search, best 0.100 nats of loss and KL", done, 150)
            clock.now += 19.6
        report("finalists on validation facts", 0, 2)
        clock.now += 19.6
        report("finalists on validation facts", 1, 2)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == forecast_line(forecast)
    assert lines[2].endswith(": 1/150, about 48 min 40 s left, then 8 min 00 s")
    assert lines[-1].endswith(": 1/2, about 20 s left")


def test_a_limit_of_time_bounds_what_is_left(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    forecast = Forecast(0, 0, 240, 61, 9.8, 60, 180, limit=600)
    assert "about 61 trials of 9.8 s in 10 min 00 s at most" in forecast_line(forecast)
    with Progress(clock) as report:
        report.expect(forecast)
        for done in range(2):
            report("search", done, 10**6)
            clock.now += 98
    assert "about 8 min 22 s left, then" in capsys.readouterr().err


def test_progress_says_only_beginnings_ends_and_a_line_every_ten_seconds(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress(clock) as report:
        for done in range(101):
            report("search, best 0.100 nats of loss and KL", done, 100)
            clock.now += 0.5
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "search, best 0.100 nats of loss and KL: 0/100"
    assert lines[1] == "search, best 0.100 nats of loss and KL: 20/100, about 40 s left"
    assert lines[-1].endswith(": 100/100")
    assert len(lines) == 6


def test_a_stage_goes_on_while_its_figures_change_and_another_begins_anew(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress(clock) as report:
        report("search, best none yet", 10, 20)  # resumed: ten were done before
        clock.now += 30
        report("search, best 1.000 nats of loss and KL", 13, 20)
        report("test facts", 0, 1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[1] == "search, best 1.000 nats of loss and KL: 13/20, about 1 min 10 s left"
    assert lines[2] == "test facts: 0/1"


def test_progress_of_nothing_to_do_is_one_line(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress(clock) as report:
        report("search, best none yet", 0, 0)
    assert capsys.readouterr().err.splitlines() == ["search, best none yet: 0/0"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"), (0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"),
        (3599.4, "59 min 59 s"), (3599.6, "1 h 00 min"), (7800, "2 h 10 min"),
        (90000, "25 h 00 min"),
    ],
)  # fmt: skip
def test_seconds_read_as_people_say_them(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_a_table_keeps_square_brackets_in_title_header_and_cells(
    capsys: pytest.CaptureFixture[str],
) -> None:
    table(["id [x]", "[bold]kind"], [["[red]a[/red]", "[/]"], ["[1, 2]", "b"]], title="runs/[a]")
    out = capsys.readouterr().out
    for text in ("id [x]", "[bold]kind", "[red]a[/red]", "[/]", "[1, 2]", "runs/[a]"):
        assert text in out
    assert "\x1b" not in out


def test_a_table_off_a_terminal_cuts_no_cell_however_long(
    capsys: pytest.CaptureFixture[str],
) -> None:
    long = "model.layers.0." + "x" * 150
    table(["one", "two"], [[long, "y" * 120]])
    out = capsys.readouterr().out
    assert long in out
    assert "y" * 120 in out


def test_a_title_longer_than_its_table_is_broken_and_not_cut(
    capsys: pytest.CaptureFixture[str],
) -> None:
    title = "a model with a long name " * 3
    table(["a"], [["1"]], title=title)
    assert "".join(title.split()) in "".join(capsys.readouterr().out.split())


def test_columns_are_left_then_right_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    table(["name", "bytes"], [["a", "1"], ["bbbbbb", "1,000"]], left=1)
    lines = capsys.readouterr().out.splitlines()
    rows = [line.rstrip() for line in lines if line.strip().startswith(("a ", "bbb"))]
    assert [row.index(word) for row, word in zip(rows, ("a", "b"), strict=True)] == [1, 1]
    assert len({len(row) for row in rows}) == 1
    assert [row.split()[-1] for row in rows] == ["1", "1,000"]


def test_data_goes_to_stdout_and_talk_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    console.say("talk")
    console.emit_json({"name": "Zürich", "values": [1.5, None]})
    captured = capsys.readouterr()
    assert captured.err == "talk\n"
    assert json.loads(captured.out) == {"name": "Zürich", "values": [1.5, None]}
    assert "Zürich" in captured.out


def test_an_estimate_is_shown_with_its_standard_error() -> None:
    assert plus_minus(Estimate(0.12345, 0.005)) == "0.123 ± 0.005"
    assert plus_minus(Estimate(0.5, 0.0123), 100, 1) == "50.0 ± 1.2"
    assert plus_minus(None) == "-"


@pytest.fixture
def own_logger() -> Iterator[logging.Logger]:
    logger = logging.getLogger("mpsearch")
    before = logger.handlers[:], logger.propagate, logger.level
    yield logger
    logger.handlers[:], logger.propagate = before[0], before[1]
    logger.setLevel(before[2])


def test_warnings_of_the_package_are_one_plain_line_of_talk_each(
    own_logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    console.quiet_libraries()
    console.quiet_libraries()
    logging.getLogger("mpsearch.search").warning("assignment %s is refused", "abc")
    assert capsys.readouterr().err == "assignment abc is refused\n"
