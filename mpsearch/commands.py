"""The commands of the command line: call, render. Heavy imports happen inside them."""

from __future__ import annotations

import argparse
import shlex
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpsearch.errors import InfeasibleError, RunError, UsageError

if TYPE_CHECKING:
    from mpsearch.space import SearchSpace


def search(args: argparse.Namespace) -> None:
    from mpsearch.console import Progress, emit_json, say
    from mpsearch.fit_commands import check_device_flags, device_budget_of
    from mpsearch.fluency import check_max_text_kl
    from mpsearch.run import Run
    from mpsearch.sizes import format_size, parse_size
    from mpsearch.tables import front_json, show_front

    # Whatever can be refused without the model is refused before it is loaded.
    check_device_flags(args)
    stated_bytes = None if args.budget is None else parse_size(args.budget)
    seconds = None if args.time is None else _parse_seconds(args.time)
    check_max_text_kl(args.max_text_kl)
    out = Path(args.out)
    if args.resume:
        Run.open(out)
    elif out.exists():
        raise RunError(f"'{out}' exists; continue it with --resume, or choose another -o")
    space_file, facts, text = _space(args), _facts(args), _text(args)
    calibration = _calibration(args)
    device_budget, budget_bytes = None, stated_bytes or 0
    if stated_bytes is None:
        device_budget, budget_bytes = device_budget_of(args, space_file)
    model = _model(args, "search", space_file)
    from mpsearch import awq
    from mpsearch.export import check_writable
    from mpsearch.search import search

    writable = True
    try:
        check_writable(model, space_file.target.name)
    except UsageError as error:
        writable = False
        say(f"what is found can be studied, not exported: {error}")
    say(f"budget {format_size(budget_bytes)} ({budget_bytes:,} bytes)")
    with Progress() as report:
        if args.awq:
            known = Run.open(out).preparation if args.resume else {}
            model = awq.fold(model, known) if known else awq.prepare(model, calibration, report)
        run = search(
            model,
            space_file,
            budget=budget_bytes,
            out=out,
            trials=args.trials,
            seconds=seconds,
            seed=args.seed,
            sampler=args.sampler,
            search_facts=args.search_facts,
            quantizer=args.quantizer,
            calibration=calibration,
            facts=facts,
            text=text,
            max_text_kl_nats=args.max_text_kl,
            at_once=args.at_once,
            device_budget=device_budget,
            resume=args.resume,
            report=report,
            needed=lambda needs: say(str(needs)),
            estimated=report.expect,
        )
    run.content["command"] = shlex.join(["mpsearch", *args.given])
    run.save()
    front = run.front()
    if args.json:
        emit_json(front_json(run, front))
    else:
        show_front(run, front)
    if front.pick is None:
        raise InfeasibleError(front.verdict)
    from mpsearch.export import EXPORT_TARGETS

    if writable and run.space.target.name in EXPORT_TARGETS:
        say(f"next: mpsearch export {_quoted(out)} best -o {_quoted(f'exports/{out.name}')}")
    else:
        say(f"next: mpsearch plot {_quoted(out)} -o tradeoff.png")


def layers(args: argparse.Namespace) -> None:
    from mpsearch.console import emit_json, say
    from mpsearch.tables import layers_json, show_kept, show_layers

    space_file = _space(args)
    model = _model(args, "look", space_file)
    space = space_file.resolve(model)
    kept = model.kept_by_reason({layer.name for group in space.groups for layer in group.layers})
    if args.json:
        emit_json({"model": args.model, **layers_json(space), "kept": kept})
    else:
        show_layers(space, args.model)
        show_kept(kept)
    say(f"next: mpsearch search {_quoted(args.model)} --budget SIZE -o runs/NAME")


def bank(args: argparse.Namespace) -> None:
    from mpsearch.console import Progress, emit_json, format_seconds, say
    from mpsearch.sizes import format_size
    from mpsearch.tables import show_bank

    space_file, calibration = _space(args), _calibration(args)
    model = _model(args, "bank", space_file)
    from mpsearch.bank import Bank
    from mpsearch.evaluate import all_layers
    from mpsearch.quantizers import get_quantizer
    from mpsearch.wanted import holdings

    space = space_file.resolve(model)
    bank = Bank(model, get_quantizer(args.quantizer, space.target.container), calibration)
    wanted = all_layers(space)
    missing = bank.missing(wanted)
    if not args.list:
        say(
            f"{bank.folder}: {len(missing)} of {sum(fmt.quantized for _, fmt in wanted)} files to "
            f"write, {format_size(sum(fmt.layer_bytes(layer) for layer, fmt in missing))}"
        )
        with Progress() as report:
            bank.build(
                missing,
                report,
                lambda seconds: say(
                    f"about {format_seconds(seconds)} for the rest, by a layer of each shape"
                ),
            )
        missing = []
    held = holdings(wanted, missing)
    if args.json:
        rows = [
            {"format": name, "files": have, "wanted": of, "stored_bytes": size}
            for name, (have, of, size) in held.items()
        ]
        emit_json({"folder": str(bank.folder), "settings": bank.settings, "formats": rows})
    else:
        show_bank(held)
    say(f"next: mpsearch search {_quoted(args.model)} --budget SIZE -o runs/NAME")


def sensitivity(args: argparse.Namespace) -> None:
    from mpsearch.console import Progress, emit_json, say
    from mpsearch.tables import show_sensitivity

    space_file, facts, calibration = _space(args), _facts(args), _calibration(args)
    if args.out and not Path(args.out).absolute().parent.is_dir():
        raise UsageError(f"'{args.out}' lies in no folder that exists; make it, or choose another")
    model = _model(args, "sensitivity", space_file)
    from mpsearch.search import sensitivity_of

    with Progress() as report:
        table = sensitivity_of(
            model,
            space_file.resolve(model),
            facts,
            args.quantizer,
            args.seed,
            calibration,
            check=args.check,
            report=report,
        )
    if args.json:
        emit_json(table.to_json())
    else:
        show_sensitivity(table)
    if args.out:
        table.save(Path(args.out))
    say(f"next: mpsearch search {_quoted(args.model)} --budget SIZE -o runs/NAME")


def list_facts(args: argparse.Namespace) -> None:
    from mpsearch.console import emit_json, format_seconds, say
    from mpsearch.facts.describe import describe
    from mpsearch.tables import show_facts

    began = time.monotonic()
    description = describe(_facts(args))
    say(f"read {description.source} in {format_seconds(time.monotonic() - began)}")
    if args.json:
        emit_json(description.to_json())
    else:
        show_facts(description)
    given = f" --facts {shlex.quote(args.facts)}" if args.facts else ""
    say(f"next: mpsearch search builtin:smollm2-135m --budget SIZE{given} -o runs/NAME")


def front(args: argparse.Namespace) -> None:
    from mpsearch.console import emit_json, say
    from mpsearch.run import Run
    from mpsearch.tables import front_json, show_front

    run = Run.open(args.run)
    front = run.front()
    if args.json:
        emit_json(front_json(run, front))
    else:
        show_front(run, front)
    say(f"next: mpsearch plot {_quoted(args.run)} -o tradeoff.png")


def show(args: argparse.Namespace) -> None:
    from mpsearch.console import emit_json, say
    from mpsearch.run import Run
    from mpsearch.tables import show_point

    run = Run.open(args.run)
    point = run.find(args.point)
    if args.json:
        device = run.content.get("device_budget")
        emit_json(
            {**point.to_json(), "assignment": dict(point.assignment), "device_budget": device}
        )
    else:
        show_point(run, point)
    say(f"next: mpsearch export {_quoted(args.run)} {point.id} -o exports/{point.id}")


def plot(args: argparse.Namespace) -> None:
    from mpsearch.console import emit_json, say
    from mpsearch.plot import plot
    from mpsearch.run import Run

    out = plot(Run.open(args.run), args.out, args.beside, args.sensitivity)
    if args.json:
        emit_json({"figure": str(out)})
    say(f"wrote {out}")
    folder = f"exports/{Path(args.run).name}"
    say(f"next: mpsearch export {_quoted(args.run)} best -o {_quoted(folder)}")


def doctor(args: argparse.Namespace) -> None:
    from mpsearch.console import emit_json, say, table
    from mpsearch.doctor import examine

    findings = examine()
    if args.json:
        emit_json({name: {"found": found, "use": use} for name, found, use in findings})
    else:
        table(["what", "found", "what for"], [list(finding) for finding in findings], left=3)
    say("next: mpsearch layers builtin:smollm2-135m")


def _quoted(word: str | Path) -> str:
    """A word of a command line that can be pasted."""
    return shlex.quote(str(word))


def _space(args: argparse.Namespace) -> Any:
    from mpsearch.space import SearchSpace

    return SearchSpace.load(args.space) if args.space else SearchSpace.default()


def _facts(args: argparse.Namespace) -> Any:
    from mpsearch.facts import FactSet

    return FactSet.load(args.facts) if args.facts else FactSet.builtin()


def _text(args: argparse.Namespace) -> Any:
    from mpsearch.text import Text

    return Text.load(args.text) if args.text else None


def _calibration(args: argparse.Namespace) -> Any:
    if not args.calibration:
        return None
    from mpsearch.calibration import Calibration

    return Calibration.load(args.calibration)


def _model(args: argparse.Namespace, job: str, space: SearchSpace) -> Any:
    from mpsearch.console import say

    say(f"loading {args.model}")
    from mpsearch.footprint import JOBS
    from mpsearch.opening import load_model
    from mpsearch.quantizers import floats_a_weight, get_quantizer

    chat_template = getattr(args, "chat_template", False)
    planned = JOBS[job]
    if planned.stages:
        quantizer = get_quantizer(args.quantizer, space.target.container)
        tables = space.embedding is not None or space.head is not None
        planned = replace(
            planned,
            calibrated=quantizer.calibrated,
            tables=tables,
            floats=floats_a_weight(quantizer),
        )
    model = load_model(args.model, chat_template, args.memory_limit_bytes, planned)
    for name, reason in model.unrecognised.items():
        say(f"'{name}' stays as it is ({reason})")
    return model


def _parse_seconds(text: str) -> float:
    units = {"s": 1, "m": 60, "h": 3600}
    try:
        seconds = float(text[:-1]) * units[text[-1:]]
    except (KeyError, ValueError):
        seconds = -1.0
    if not 0 < seconds < 1e9:
        raise UsageError(f"time '{text}' is not a number and s, m or h, such as 90s, 10m or 2h")
    return seconds
