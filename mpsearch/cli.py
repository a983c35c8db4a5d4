"""The command line: parse, call, render. Heavy imports happen inside the commands."""

from __future__ import annotations

import argparse
import errno
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from mpsearch import __version__, recall_commands
from mpsearch.errors import EXIT_INTERRUPTED, MpsearchError, ResourceError, RunError, UsageError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; every expected failure is one line."""
    args = _parser().parse_args(arguments)
    # Threads that spin while they wait make each other several times slower on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    signal.signal(signal.SIGINT, _on_interrupt)
    from mpsearch.console import quiet_libraries, say

    quiet_libraries()
    try:
        args.command(args)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        return _interrupted(args)
    except MpsearchError as error:
        say(f"mpsearch: {error}")
        return error.exit_code
    except BrokenPipeError:  # the reader of our output, such as `head`, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        # A library that was interrupted may turn Ctrl-C into an error of its own.
        if signal.getsignal(signal.SIGINT) is _leave:
            return _interrupted(args)
        reason = _exhausted(error)
        if reason is None:
            raise
        say(f"mpsearch: {reason}; everything finished is kept" + _resume_hint(args))
        return ResourceError.exit_code


def _interrupted(args: argparse.Namespace) -> int:
    from mpsearch.console import say

    say("mpsearch: interrupted; everything finished is kept" + _resume_hint(args))
    return EXIT_INTERRUPTED


def _on_interrupt(number: int, frame: FrameType | None) -> None:
    """The first Ctrl-C unwinds and saves; a second leaves at once, which loses nothing either."""
    signal.signal(signal.SIGINT, _leave)
    raise KeyboardInterrupt


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(EXIT_INTERRUPTED)


def _exhausted(error: BaseException) -> str | None:
    """What ran out, if that is what an error from below says."""
    text = str(error).lower()
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; free some space"
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate" in text:
        return "memory ran out; close other programs or use a smaller model"
    return None


def _resume_hint(args: argparse.Namespace) -> str:
    if args.command is not _search or not (Path(args.out) / "run.json").exists():
        return ""
    given = [f"--budget {shlex.quote(args.budget)}"]
    flags = ("space", "facts", "quantizer", "calibration", "sampler", "trials", "search_facts")
    for flag in (*flags, "seed", "time"):
        value = getattr(args, flag)
        if value is not None and value != args.defaults.get(flag):
            given.append(f"--{flag.replace('_', '-')} {shlex.quote(str(value))}")
    given += ["--awq"] * args.awq + ["--chat-template"] * args.chat_template
    model, out = shlex.quote(args.model), shlex.quote(args.out)
    return f"; continue with: mpsearch search {model} {' '.join(given)} --resume -o {out}"


# ---------------------------------------------------------------------------------- commands


def _search(args: argparse.Namespace) -> None:
    from mpsearch.budget import format_size, parse_size
    from mpsearch.console import Progress, emit_json, front_json, say, show_front
    from mpsearch.run import Run

    # Whatever can be refused without the model is refused before it is loaded.
    budget_bytes = parse_size(args.budget)
    seconds = None if args.time is None else _parse_seconds(args.time)
    out = Path(args.out)
    if args.resume:
        Run.open(out)
    elif out.exists():
        raise RunError(f"'{out}' exists; continue it with --resume, or choose another -o")
    space_file, facts, calibration = _space(args), _facts(args), _calibration(args)
    model = _model(args)
    from mpsearch import awq
    from mpsearch.search import search

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
            resume=args.resume,
            report=report,
        )
    front = run.front()
    if args.json:
        emit_json(front_json(run, front))
    else:
        show_front(run, front)
    from mpsearch.export import WRITERS

    if front.pick is not None and run.space.target.name in WRITERS:
        say(f"next: mpsearch export {out} best -o exports/{out.name}")
    else:
        say(f"next: mpsearch plot {out} -o tradeoff.png")


def _layers(args: argparse.Namespace) -> None:
    from mpsearch.console import emit_json, layers_json, say, show_kept, show_layers

    space_file = _space(args)
    model = _model(args)
    space = space_file.resolve(model)
    kept = model.kept_by_reason({layer.name for group in space.groups for layer in group.layers})
    if args.json:
        emit_json({"model": args.model, **layers_json(space), "kept": kept})
    else:
        show_layers(space, args.model)
        show_kept(kept)
    say(f"next: mpsearch search {args.model} --budget SIZE -o runs/NAME")


def _bank(args: argparse.Namespace) -> None:
    from mpsearch.budget import format_size
    from mpsearch.console import Progress, emit_json, format_seconds, say, show_bank

    space_file, calibration = _space(args), _calibration(args)
    model = _model(args)
    from mpsearch.bank import Bank, holdings
    from mpsearch.evaluate import all_layers
    from mpsearch.quantizers import get_quantizer

    space = space_file.resolve(model)
    bank = Bank(model, get_quantizer(args.quantizer, space.target.name), calibration)
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
    say(f"next: mpsearch search {args.model} --budget SIZE -o runs/NAME")


def _sensitivity(args: argparse.Namespace) -> None:
    from mpsearch.console import Progress, emit_json, say, show_sensitivity

    space_file, facts, calibration = _space(args), _facts(args), _calibration(args)
    model = _model(args)
    from mpsearch.search import sensitivity_of

    with Progress() as report:
        table = sensitivity_of(
            model,
            space_file.resolve(model),
            facts,
            args.quantizer,
            args.seed,
            calibration,
            report=report,
        )
    if args.json:
        emit_json(table.to_json())
    else:
        show_sensitivity(
            {key: (nats, table.weight_error[key]) for key, nats in table.fisher_nats.items()}
        )
    if args.out:
        table.save(Path(args.out))
    say(f"next: mpsearch search {args.model} --budget SIZE -o runs/NAME")


def _list_facts(args: argparse.Namespace) -> None:
    from mpsearch.console import emit_json, format_seconds, say, show_facts
    from mpsearch.facts.describe import describe

    began = time.monotonic()
    description = describe(_facts(args))
    say(f"read {description.source} in {format_seconds(time.monotonic() - began)}")
    if args.json:
        emit_json(description.to_json())
    else:
        show_facts(description)
    given = f" --facts {shlex.quote(args.facts)}" if args.facts else ""
    say(f"next: mpsearch search builtin:smollm2-135m --budget SIZE{given} -o runs/NAME")


def _front(args: argparse.Namespace) -> None:
    from mpsearch.console import emit_json, front_json, say, show_front
    from mpsearch.run import Run

    run = Run.open(args.run)
    front = run.front()
    if args.json:
        emit_json(front_json(run, front))
    else:
        show_front(run, front)
    say(f"next: mpsearch plot {args.run} -o tradeoff.png")


def _show(args: argparse.Namespace) -> None:
    from mpsearch.console import emit_json, say, show_point
    from mpsearch.run import Run

    run = Run.open(args.run)
    point = run.find(args.point)
    if args.json:
        emit_json({**point.to_json(), "assignment": dict(point.assignment)})
    else:
        show_point(run, point)
    say(f"next: mpsearch export {args.run} {point.id} -o exports/{point.id}")


def _plot(args: argparse.Namespace) -> None:
    from mpsearch.console import say
    from mpsearch.plot import plot
    from mpsearch.run import Run

    out = plot(Run.open(args.run), args.out)
    say(f"wrote {out}")
    say(f"next: mpsearch export {args.run} best -o exports/{Path(args.run).name}")


def _export(args: argparse.Namespace) -> None:
    from mpsearch.console import emit, emit_json, say
    from mpsearch.run import Run

    run = Run.open(args.run)
    point = run.find(args.point)
    if Path(args.out).exists():
        raise RunError(f"'{args.out}' exists; choose another -o")
    from mpsearch.awq import fold
    from mpsearch.export import export
    from mpsearch.models import load_model

    model = load_model(run.question["model"])
    if run.preparation:
        model = fold(model, run.preparation)
    if model.fingerprint != run.question["fingerprint"]:
        raise RunError(
            f"'{run.question['model']}' is not the model that '{args.run}' searched: its weights "
            "have changed; search again"
        )
    target = args.to or run.space.target.name
    out = export(model, point.assignment, to=target, out=args.out, space=run.space)
    written = {"folder": str(out), "id": point.id, "stored_bytes": point.stored_bytes}
    if args.json:
        emit_json(written)
    else:
        emit(f"{out}: point {point.id}, {point.stored_bytes:,} bytes of tensors")
    say(f'next: AutoModelForCausalLM.from_pretrained("{out}", dtype="bfloat16")')


def _doctor(args: argparse.Namespace) -> None:
    from mpsearch.console import emit_json, say, table
    from mpsearch.doctor import examine

    findings = examine()
    if args.json:
        emit_json({name: {"found": found, "use": use} for name, found, use in findings})
    else:
        table(["what", "found", "what for"], [list(finding) for finding in findings], left=3)
    say("next: mpsearch layers builtin:smollm2-135m")


def _space(args: argparse.Namespace) -> Any:
    from mpsearch.space import SearchSpace

    return SearchSpace.load(args.space) if args.space else SearchSpace.default()


def _facts(args: argparse.Namespace) -> Any:
    from mpsearch.facts import FactSet

    return FactSet.load(args.facts) if args.facts else FactSet.builtin()


def _calibration(args: argparse.Namespace) -> Any:
    if not args.calibration:
        return None
    from mpsearch.calibration import Calibration

    return Calibration.load(args.calibration)


def _model(args: argparse.Namespace) -> Any:
    from mpsearch.console import say

    say(f"loading {args.model}")
    from mpsearch.models import load_model

    model = load_model(args.model, chat_template=getattr(args, "chat_template", False))
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


# ------------------------------------------------------------------------------------ parser


class _Parser(argparse.ArgumentParser):
    """Wrong usage is one line, like every other error."""

    def error(self, message: str) -> Any:
        sys.stderr.write(f"mpsearch: {message}; see '{self.prog} --help'\n")
        raise SystemExit(UsageError.exit_code)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="mpsearch",
        description="Find how many bits each layer of a language model should get.",
        epilog="Start with: mpsearch doctor. A model is a hub id, a local folder or "
        "builtin:smollm2-135m.",
    )
    parser.add_argument("--version", action="version", version=f"mpsearch {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)

    def add(name: str, function: Callable[..., None], help_text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help_text, description=help_text)
        command.set_defaults(command=function, defaults={})
        command.add_argument("--json", action="store_true", help="data as JSON on standard output")
        return command

    search = add("search", _search, "search assignments under a budget and print the front")
    search.add_argument("model")
    search.add_argument("--budget", required=True, metavar="SIZE", help="such as 104MiB")
    search.add_argument("-o", "--out", required=True, metavar="RUN", help="the run folder")
    search.add_argument("--trials", type=int, default=150, help="proposals (150)")
    search.add_argument(
        "--search-facts", type=int, default=500, help="facts that score a candidate (500)"
    )
    search.add_argument(
        "--awq", action="store_true", help="fold activation-aware scales into the norms first"
    )
    search.add_argument("--time", metavar="10m", help="stop proposing after this time")
    search.add_argument("--sampler", default="level-switch", help="level-switch, nsga2 or tpe")
    search.add_argument("--resume", action="store_true", help="continue the run in RUN")
    search.set_defaults(
        defaults={"trials": 150, "search_facts": 500, "sampler": "level-switch", "seed": 0}
    )

    layers = add("layers", _layers, "list the layers, their groups, and bytes by format")
    layers.add_argument("model")
    sensitivity = add("sensitivity", _sensitivity, "print the damage of each (group, format)")
    sensitivity.add_argument("model")
    sensitivity.add_argument("-o", "--out", metavar="FILE", help="also save the table as JSON")

    bank = add("bank", _bank, "quantize every layer in every format of a space, ahead of a search")
    bank.add_argument("model")
    bank.add_argument("--list", action="store_true", help="only say what is there")

    for command in (search, layers, sensitivity, bank):
        command.add_argument("--space", metavar="FILE", help="search space (compressed-tensors)")
    for command in (search, sensitivity, bank):
        command.add_argument("--quantizer", help="rounding, gptq, auto-gptq, hqq or bitsandbytes")
        command.add_argument(
            "--calibration", metavar="FILE", help="text for gptq (the model writes its own)"
        )
    for command in (search, sensitivity):
        command.add_argument("--facts", metavar="FILE", help="JSONL of facts (the built-in ones)")
        command.add_argument(
            "--chat-template", action="store_true", help="ask facts through the model's template"
        )
        command.add_argument("--seed", type=int, default=0, help="of every random choice (0)")

    facts = add("facts", _list_facts, "list, check and describe a set of facts")
    facts.add_argument(
        "facts", nargs="?", metavar="FILE", help="JSONL, or a folder in the LRE format"
    )
    add("front", _front, "print the validated points of a run").add_argument("run")
    show = add("show", _show, "print one point, block by block")
    plot = add("plot", _plot, "draw recall against size, and the bits by layer")
    export = add("export", _export, "write a point as a checkpoint")
    for command in (show, plot, export):
        command.add_argument("run", metavar="RUN")
    for command in (show, export):
        command.add_argument("point", metavar="POINT", help="an id, its beginning, or best")
    plot.add_argument("-o", "--out", required=True, metavar="FILE", help=".png, .svg or .pdf")
    export.add_argument("-o", "--out", required=True, metavar="DIR")
    export.add_argument("--to", metavar="TARGET", help="the run's own target")
    recall_commands.add_commands(add)
    add("doctor", _doctor, "say what this machine has and what mpsearch can use of it")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
