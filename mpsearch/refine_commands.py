"""`mpsearch refine`: load the model of a run, refine one point, say what it gained."""

from __future__ import annotations

import argparse
import json
import shlex
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpsearch.points import Point
    from mpsearch.run import Run

_FLAGS = ("calibration", "facts", "text", "memory_limit")


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add `refine` to the parser."""
    command = add(
        "refine", refine, "quantize a point's layers again in order, behind the quantized ones"
    )
    command.add_argument("run", metavar="RUN")
    command.add_argument("point", metavar="POINT", help="an id, its beginning, or best")
    command.add_argument("--calibration", metavar="FILE", help="text for gptq (the run's own)")
    command.add_argument(
        "--facts", metavar="FILE", help="those of the run, if it had its own (built-in facts)"
    )
    command.add_argument(
        "--text", metavar="FILE", help="that of the run, if it had its own (a built-in one)"
    )


def resume_hint(args: argparse.Namespace) -> str:
    """How to go on after an interrupt."""
    given = [args.run, args.point]
    for flag in _FLAGS:
        if value := getattr(args, flag):
            given += [f"--{flag.replace('_', '-')}", value]
    return f"; continue with: mpsearch refine {shlex.join(given)}"


def refine(args: argparse.Namespace) -> None:
    """Refine a point, show it beside what it refines, and name the next command."""
    from mpsearch.calibration import Calibration
    from mpsearch.console import Progress, emit_json, format_seconds, say
    from mpsearch.facts import FactSet
    from mpsearch.outcome import outcome
    from mpsearch.run import Run
    from mpsearch.text import Text

    run = Run.open(args.run)
    point = run.find(args.point)
    args.point = point.id  # for `resume_hint`: the best may be another by then
    facts = FactSet.load(args.facts) if args.facts else None
    text = Text.load(args.text) if args.text else None
    calibration = Calibration.load(args.calibration) if args.calibration else None
    from mpsearch.refine import check_refinable, refine
    from mpsearch.searched import searched_model

    check_refinable(run, point, facts, text)
    say(f"loading {run.question['model']}")
    model = searched_model(run, args.memory_limit_bytes)
    began = time.monotonic()
    with Progress() as report:
        refined = refine(
            model, run, point, facts=facts, text=text, calibration=calibration, report=report
        )
    seconds = time.monotonic() - began
    run = Run.open(args.run)
    front, test = run.front(), outcome(run)
    say(f"refined {point.kind} {point.id} in {format_seconds(seconds)}")
    if args.json:
        found = {
            "parent": point.to_json(),
            "refined": refined.to_json(),
            "bank": json.loads(refined.assignment.bank),
            "pick": front.pick and front.pick.id,
            "verdict": front.verdict,
            "test": test and test.to_json(),
            "seconds": seconds,
        }
        emit_json(found)
    else:
        _show(run, point, refined)
    say(_next(run, refined))


def _show(run: Run, point: Point, refined: Point) -> None:
    """The two points, the gain, what it is a gain of, and which look at test facts this was."""
    from mpsearch.console import emit, plus_minus, table
    from mpsearch.outcome import outcome

    table(
        ["id", "kind", "stored bytes", "recall %", "answer loss (nats)", "KL", "text KL"],
        [
            [
                shown.id,
                shown.kind,
                f"{shown.stored_bytes:,}",
                plus_minus(shown.recall, 100, 1),
                plus_minus(shown.answer_loss),
                f"{shown.kl_nats:.3f}",
                plus_minus(None if shown.text is None else shown.text.kl),
            ]
            for shown in (point, refined)
        ],
        title=f"{run.question['model']} on validation facts; ± is one standard error",
    )
    emit(refined.gain)
    settings = json.loads(refined.assignment.bank)
    settings.pop("in_order")
    if settings != run.question["bank"]:
        emit(
            "It is no gain of the order alone: the run's points were quantized by "
            f"{_recipe(run.question['bank'])}, this one by {_recipe(settings)}."
        )
    front = run.front()
    emit(front.verdict)
    if front.pick is None or front.pick.id != refined.id:
        emit("The refined point is not the pick, so test facts were not read for it.")
    elif found := outcome(run):
        emit(found.verdict)
    else:
        emit("The search is not finished, so test facts were not read yet.")


def _recipe(settings: dict[str, object]) -> str:
    """Quantizer and calibration of a bank, in words."""
    calibration = settings.get("calibration")
    return str(settings["quantizer"]) + (f" {json.dumps(calibration)}" if calibration else "")


def _next(run: Run, refined: Point) -> str:
    from mpsearch.export import EXPORT_TARGETS

    folder = shlex.quote(str(run.folder))
    if run.space.target.name in EXPORT_TARGETS:
        return f"next: mpsearch export {folder} {refined.id} -o exports/{refined.id}"
    return f"next: mpsearch plot {folder} -o tradeoff.png"
