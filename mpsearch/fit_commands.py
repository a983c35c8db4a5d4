"""`mpsearch fit`: how much of a device is left for weights, from a config alone."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpsearch.errors import UsageError

if TYPE_CHECKING:
    from mpsearch.architecture import Architecture
    from mpsearch.budget import DeviceBudget
    from mpsearch.run import Run
    from mpsearch.space import ResolvedSpace, SearchSpace

_CONTEXT = 4096
_SET_BY_HAND = ("utilization", "prefill", "overhead", "reserve")
_FLAGS = ("context", "batch", "kv", "runtime", *_SET_BY_HAND)


def add_device_flags(command: argparse.ArgumentParser, memory_from: Any) -> None:
    """The flags that describe a device and what runs on it.

    Args:
        memory_from: the parser or group of flags that says how much memory there is.
    """
    memory_from.add_argument("--device", metavar="NAME", help="such as rtx-3060-12gb")
    memory_from.add_argument("--memory", metavar="SIZE", help="of a device, such as 12GiB")
    command.add_argument("--context", type=int, metavar="N", help=f"tokens ({_CONTEXT})")
    command.add_argument("--batch", type=int, metavar="N", help="sequences at once (1)")
    command.add_argument("--kv", metavar="DTYPE", help="of the KV cache (the runtime's)")
    command.add_argument("--runtime", metavar="NAME", help="that serves it (the target's usual)")
    command.add_argument(
        "--utilization", type=float, metavar="SHARE", help="of the memory, as in vLLM (0.9)"
    )
    command.add_argument(
        "--prefill", type=int, metavar="N", help="tokens that run at once (the runtime's)"
    )
    command.add_argument("--overhead", metavar="SIZE", help="of the runtime itself (its usual)")
    command.add_argument("--reserve", metavar="SIZE", help="for the desktop (512MiB)")


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add `fit` to the parser."""
    command = add("fit", fit, "say what fits on a device, from the model's config alone")
    command.add_argument(
        "model", nargs="?", metavar="MODEL|RUN", help="a model, its config, or a finished search"
    )
    command.add_argument("--space", metavar="FILE", help="search space (compressed-tensors)")
    command.add_argument(
        "--calibrate",
        action="store_true",
        help="measure this machine's GPU and its overhead, and keep them for --device this",
    )
    add_device_flags(command, command.add_mutually_exclusive_group())


def fit(args: argparse.Namespace) -> None:
    """The terms, what is left for weights, and what would fit; without a device, the cards."""
    if args.calibrate:
        _calibrate(args)
        if args.model is None:
            return
    if args.model is None:
        raise UsageError("no model given; name one, a folder with its config, or a run")
    from mpsearch.architecture import load_config, read_architecture
    from mpsearch.console import emit_json, say
    from mpsearch.fit import check_fits, fit_json, unpacks
    from mpsearch.fit_tables import show_devices, show_fit
    from mpsearch.run import Run
    from mpsearch.space import SearchSpace

    pick_bytes, name = None, args.model
    run = Run.open(name) if (Path(name) / "run.json").exists() else None
    if run is not None:
        name, pick_bytes = run.question["model"], run.find("best").stored_bytes
    config = load_config(name if run is None else run.model_path)
    architecture = read_architecture(config, name)
    if run is not None:
        space = run.space
        _as_the_run(args, run)
    else:
        file = SearchSpace.load(args.space) if args.space else SearchSpace.default()
        space = file.resolve(architecture)
    budget = device_budget(args, architecture, space)
    has_device = budget.memory_bytes > 0
    if args.json:
        emit_json({"model": name, **fit_json(space, budget, pick_bytes)})
    elif has_device:
        show_fit(space, budget, pick_bytes)
    else:
        show_devices(space, budget, pick_bytes)
    if has_device:
        check_fits(space, budget)
    if run is not None:
        folder = shlex.quote(f"exports/{run.folder.name}")
        say(f"next: mpsearch export {shlex.quote(args.model)} best -o {folder}")
    elif not unpacks(space, budget.runtime):
        say(f"next: mpsearch search {_again(args, name)} -o runs/NAME")


def _as_the_run(args: argparse.Namespace, run: Run) -> None:
    """What is not asked is as the run was asked for."""
    from mpsearch.this_device import THIS

    if args.space:
        raise UsageError(f"'{args.model}' is a run, which has its own space; leave --space out")
    asked = run.content.get("device_budget")
    if asked is not None:
        by_hand = asked.get("asked", {}) if args.runtime in (None, asked["runtime"]) else {}
        if args.device is not None and args.device.casefold() == THIS:  # has measured these
            by_hand = {f: v for f, v in by_hand.items() if f not in ("overhead", "reserve")}
        usual = {flag: asked[flag] for flag in ("context", "batch", "kv", "runtime")}
        for flag, value in {**usual, **by_hand}.items():
            if getattr(args, flag) is None:
                setattr(args, flag, value)


def _again(args: argparse.Namespace, name: str) -> str:
    """The model and the flags of a search that asks the same."""
    words = ["MODEL" if name.endswith(".json") else shlex.quote(name)]
    given = {flag: getattr(args, flag) for flag in ("space", "device", "memory", *_FLAGS)}
    words += [f"--{flag} {shlex.quote(str(v))}" for flag, v in given.items() if v is not None]
    if args.device is None and args.memory is None:
        words.append("--memory SIZE")
    return " ".join(words)


def check_device_flags(args: argparse.Namespace) -> None:
    """Raise `UsageError` where a flag describes a device and none is given."""
    given = [flag for flag in _FLAGS if getattr(args, flag) is not None]
    if given and args.device is None and args.memory is None:
        raise UsageError(
            f"--{given[0]} says what runs on a device, and --budget is of stored weights alone; "
            "give --device or --memory instead"
        )


def device_budget_of(args: argparse.Namespace, space_file: SearchSpace) -> tuple[DeviceBudget, int]:
    """What a search's flags leave for weights on a device, and the stored bytes that makes.

    From the model's config: an infeasible wish is refused before the model is loaded.
    """
    from mpsearch.architecture import load_config, read_architecture
    from mpsearch.budget import terms_line
    from mpsearch.console import say
    from mpsearch.fit import search_budget_bytes, unserved

    architecture = read_architecture(load_config(args.model), args.model)
    space = space_file.resolve(architecture)
    budget = device_budget(args, architecture, space)
    size_bytes = search_budget_bytes(space, budget)
    say(terms_line(budget.to_json()))
    if strange := unserved(space, budget):
        say(
            f"{budget.runtime.name}'s usual kernels do not take {', '.join(strange)}, which this "
            "space allows; give a --space without them, or try before you rely on them"
        )
    return budget, size_bytes


def device_budget(
    args: argparse.Namespace, architecture: Architecture, space: ResolvedSpace
) -> DeviceBudget:
    """What the flags ask for; without a device, one of no memory.

    Raises:
        UsageError: an unknown device, runtime or dtype, or a number that makes no sense.
    """
    from mpsearch.budget import (
        FRAGMENTATION_BYTES,
        RESERVE_BYTES,
        DeviceBudget,
        Workload,
        find_runtime,
    )
    from mpsearch.console import say
    from mpsearch.devices import find_device
    from mpsearch.sizes import parse_size
    from mpsearch.this_device import THIS, ThisDevice

    device, memory_bytes = "no device", 0
    runtime = find_runtime(space.target.container, args.runtime)
    reserve_bytes = RESERVE_BYTES
    if args.device is not None and args.device.casefold() == THIS:
        this = ThisDevice.load()
        device, memory_bytes, reserve_bytes = this.name, this.memory_bytes, this.other_bytes
        runtime = replace(runtime, overhead_bytes=this.context_bytes + FRAGMENTATION_BYTES)
    elif args.device is not None:
        found = find_device(args.device)
        if found.unified and not runtime.unified:
            raise UsageError(
                f"{runtime.name} does not run on {found.name}; use another --runtime, or a space "
                "of another target"
            )
        device, memory_bytes = found.name, found.usable_bytes
    elif args.memory is not None:
        device, memory_bytes = args.memory, parse_size(args.memory)
    if args.utilization is not None:
        if not 0 < args.utilization <= 1:
            raise UsageError(
                f"--utilization {args.utilization:g} is no share; give more than 0 and up to 1, "
                "such as 0.9"
            )
        runtime = replace(runtime, share=args.utilization)
    if args.prefill is not None:
        if args.prefill < 1:
            raise UsageError(f"--prefill {args.prefill} makes no sense; give at least 1 token")
        runtime = replace(runtime, prefill_tokens=args.prefill)
    if args.overhead is not None:
        runtime = replace(runtime, overhead_bytes=_size(args.overhead))
    if args.reserve is not None:
        reserve_bytes = _size(args.reserve)
    context = _CONTEXT if args.context is None else args.context
    most = architecture.context
    if args.context is None and most is not None:
        context = min(context, most)
    elif most is not None and context > most:
        say(f"context {context:,} is beyond what the model was made for, {most:,} tokens")
    workload = Workload(context, 1 if args.batch is None else args.batch, args.kv or runtime.kv[0])
    given = {flag: getattr(args, flag) for flag in _SET_BY_HAND}
    asked = {flag: value for flag, value in given.items() if value is not None}
    return DeviceBudget(architecture, device, memory_bytes, runtime, workload, reserve_bytes, asked)


def _size(text: str) -> int:
    """As `parse_size`, and 0 for nothing."""
    from mpsearch.sizes import parse_size

    return 0 if text.strip() == "0" else parse_size(text)


def _calibrate(args: argparse.Namespace) -> None:
    from mpsearch.console import emit, emit_json
    from mpsearch.device import measure_this_device
    from mpsearch.sizes import format_size

    found = measure_this_device()
    path = found.save()
    if args.json:
        emit_json(asdict(found))
    else:
        emit(
            f"{found.name}: {format_size(found.memory_bytes)}, of which others have taken "
            f"{format_size(found.other_bytes)} and a process takes "
            f"{format_size(found.context_bytes)} to begin with; kept in '{path}'"
        )
