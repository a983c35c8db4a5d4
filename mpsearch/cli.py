"""The command line: parse, run one command, turn what happens into an exit code."""

from __future__ import annotations

import argparse
import errno
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from mpsearch import (
    __version__,
    commands,
    export_commands,
    fit_commands,
    recall_commands,
    refine_commands,
)
from mpsearch.errors import (
    EXIT_INTERRUPTED,
    MpsearchError,
    ResourceError,
    UsageError,
    exhausted,
)
from mpsearch.sizes import parse_size

# What a path that a user gave, or its permissions, can cause.
_OF_PATHS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR),
    *(errno.ENAMETOOLONG, errno.ELOOP),
)
# Ctrl-C, and what job schedulers and containers send before they kill.
_ENDINGS = (signal.SIGINT, signal.SIGTERM)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; every expected failure is one line."""
    args = _parser().parse_args(arguments)
    args.given = sys.argv[1:] if arguments is None else list(arguments)
    # Threads that spin while they wait make each other several times slower on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    for ending in _ENDINGS:
        signal.signal(ending, _on_interrupt)
    from mpsearch.console import quiet_libraries, say

    quiet_libraries()
    try:
        if limit := getattr(args, "memory_limit", None):
            args.memory_limit_bytes = parse_size(limit)
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
        if reason := exhausted(error):
            say(f"mpsearch: {reason}; everything finished is kept" + _resume_hint(args))
            return ResourceError.exit_code
        if not isinstance(error, OSError) or error.errno not in _OF_PATHS or not error.filename:
            raise
        say(f"mpsearch: '{error.filename}': {error.strerror}")
        return UsageError.exit_code


def _interrupted(args: argparse.Namespace) -> int:
    from mpsearch.console import say

    say("mpsearch: interrupted; everything finished is kept" + _resume_hint(args))
    return EXIT_INTERRUPTED


def _on_interrupt(number: int, frame: FrameType | None) -> None:
    """The first Ctrl-C unwinds and saves; a second leaves at once, which loses nothing either."""
    for ending in _ENDINGS:
        signal.signal(ending, _leave)
    raise KeyboardInterrupt


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(EXIT_INTERRUPTED)


def _resume_hint(args: argparse.Namespace) -> str:
    if args.command is refine_commands.refine:
        return refine_commands.resume_hint(args)
    if args.command is not commands.search or not (Path(args.out) / "run.json").exists():
        return ""
    from mpsearch.run import Run

    given = [f"--budget {shlex.quote(args.budget or f'{Run.open(args.out).budget_bytes}B')}"]
    flags = ("space", "facts", "quantizer", "calibration", "sampler", "trials", "search_facts")
    for flag in (*flags, "seed", "time", "text", "max_text_kl", "memory_limit"):
        value = getattr(args, flag)
        if value is not None and value != args.defaults.get(flag):
            given.append(f"--{flag.replace('_', '-')} {shlex.quote(str(value))}")
    given += ["--awq"] * args.awq + ["--chat-template"] * args.chat_template
    model, out = shlex.quote(args.model), shlex.quote(args.out)
    ending = "; add --trials 0 to end with the best so far, or"
    return f"{ending} continue with: mpsearch search {model} {' '.join(given)} --resume -o {out}"


# ------------------------------------------------------------------------------------ parser


# The commands that load a reference model.
_LOADING = ("search", "layers", "sensitivity", "bank", "refine", "export", "recall", "compare")


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
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)

    def add(name: str, function: Callable[..., None], help_text: str) -> argparse.ArgumentParser:
        command = subparsers.add_parser(name, help=help_text, description=help_text)
        command.set_defaults(command=function, defaults={})
        command.add_argument("--json", action="store_true", help="data as JSON on standard output")
        return command

    search = add("search", commands.search, "search assignments under a budget and print the front")
    search.add_argument("model")
    budget = search.add_mutually_exclusive_group(required=True)
    budget.add_argument("--budget", metavar="SIZE", help="of stored weights, such as 104MiB")
    fit_commands.add_device_flags(search, budget)
    search.add_argument("-o", "--out", required=True, metavar="RUN", help="the run folder")
    search.add_argument("--trials", type=int, help="proposals (150, or as many as --time allows)")
    search.add_argument(
        "--search-facts", type=int, default=500, help="facts that score a candidate (500)"
    )
    search.add_argument(
        "--awq", action="store_true", help="fold activation-aware scales into the norms first"
    )
    search.add_argument(
        "--max-text-kl", type=float, metavar="NATS",
        help="never recommend what differs more from the reference on text, a token",
    )  # fmt: skip
    search.add_argument("--text", metavar="FILE", help="text to read beside facts (a built-in one)")
    search.add_argument("--time", metavar="10m", help="stop proposing after this time in all")
    search.add_argument("--sampler", default="level-switch", help="level-switch, nsga2 or tpe")
    search.add_argument(
        "--at-once", type=int, metavar="N",
        help="proposals scored together, which share a walk block by block (1, or 4 in a walk)",
    )  # fmt: skip
    search.add_argument("--resume", action="store_true", help="continue the run in RUN")
    search.set_defaults(defaults={"search_facts": 500, "sampler": "level-switch", "seed": 0})

    layers = add("layers", commands.layers, "list the layers, their groups, and bytes by format")
    layers.add_argument("model")
    sensitivity = add("sensitivity", commands.sensitivity, "print the damage by group and format")
    sensitivity.add_argument("model")
    sensitivity.add_argument("-o", "--out", metavar="FILE", help="also save the table as JSON")
    sensitivity.add_argument(
        "--check",
        action="store_true",
        help="also measure the KL of every group alone in every format, which takes long",
    )

    bank = add("bank", commands.bank, "quantize what a space allows, ahead of a search")
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
        command.add_argument(
            "--facts", metavar="FILE", help="JSONL, or a folder in the LRE format (built-in facts)"
        )
        command.add_argument(
            "--chat-template", action="store_true", help="ask facts through the model's template"
        )
        command.add_argument("--seed", type=int, default=0, help="of every random choice (0)")

    facts = add("facts", commands.list_facts, "list, check and describe a set of facts")
    facts.add_argument(
        "facts", nargs="?", metavar="FILE", help="JSONL, or a folder in the LRE format"
    )
    add("front", commands.front, "print the validated points of a run").add_argument("run")
    show = add("show", commands.show, "print one point, block by block")
    plot = add("plot", commands.plot, "draw recall against size, and the bits by layer")
    for command in (show, plot):
        command.add_argument("run", metavar="RUN")
    show.add_argument("point", metavar="POINT", help="an id, its beginning, or best")
    plot.add_argument("-o", "--out", required=True, metavar="FILE", help=".png, .svg or .pdf")
    plot.add_argument(
        "--beside",
        metavar="MEASURE",
        help="a sensitivity to show below the bits, such as output_error",
    )
    plot.add_argument(
        "--sensitivity", metavar="FILE", help="the table that holds it (the run's own)"
    )
    refine_commands.add_commands(add)
    export_commands.add_commands(add)
    recall_commands.add_commands(add)
    fit_commands.add_commands(add)
    for name in _LOADING:
        command = subparsers.choices[name]
        command.add_argument(
            "--memory-limit", metavar="SIZE", help="take so much at most; block by block if it must"
        )
        command.set_defaults(memory_limit_bytes=None)
    add("doctor", commands.doctor, "say what this machine has and what mpsearch can use of it")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
