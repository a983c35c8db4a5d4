"""`mpsearch export` and `mpsearch verify`: a point as a checkpoint, and whether it still is one."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mpsearch.errors import CheckError, UsageError

if TYPE_CHECKING:
    from mpsearch.verify import Verification


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add both to the parser."""
    export_command = add("export", export, "write a point as a checkpoint")
    export_command.add_argument("run", metavar="RUN")
    export_command.add_argument("point", metavar="POINT", help="an id, its beginning, or best")
    export_command.add_argument("-o", "--out", required=True, metavar="DIR")
    export_command.add_argument("--to", metavar="TARGET", help="the run's own target")
    export_command.add_argument(
        "--overwrite", action="store_true", help="replace an earlier export in DIR"
    )
    verify_command = add("verify", verify, "is a checkpoint what its run promised?")
    verify_command.add_argument("folder", metavar="DIR", help="an export; others need a reference")
    verify_command.add_argument(
        "--facts", metavar="FILE", help="the facts that were searched with (built-in facts)"
    )
    verify_command.add_argument(
        "--max-loss", type=float, metavar="NATS", help="fail above this answer loss"
    )
    verify_command.add_argument(
        "--reference", metavar="MODEL", help="ask the unquantized model, too"
    )


def export(args: argparse.Namespace) -> None:
    """Write a point of a run as a checkpoint, in the format of a target."""
    from mpsearch.console import emit, emit_json, say
    from mpsearch.run import Run

    run = Run.open(args.run)
    point = run.find(args.point)
    from mpsearch.export import check_out, export

    check_out(Path(args.out), args.overwrite)
    from mpsearch.manifest import read_manifest
    from mpsearch.searched import searched_model

    out = export(
        searched_model(run, args.memory_limit_bytes, job="export"),
        point.assignment,
        to=args.to or run.space.target.name,
        out=args.out,
        run=run,
        overwrite=args.overwrite,
    )
    stored_bytes = read_manifest(out)["stored_bytes"]
    written = {"folder": str(out), "id": point.id, "stored_bytes": stored_bytes}
    if args.json:
        emit_json(written)
    else:
        emit(f"{out}: point {point.id}, {stored_bytes:,} bytes of tensors")
    say(f"next: mpsearch verify {shlex.quote(str(out))}")


def verify(args: argparse.Namespace) -> None:
    """Check files and answers of a checkpoint; exit code 4 where something is not as promised."""
    from mpsearch.console import Progress, emit_json, say
    from mpsearch.verify import verify

    if args.max_loss is not None and not 0 <= args.max_loss < float("inf"):
        raise UsageError(f"max loss {args.max_loss:g} is no number of nats; use 0 or more")
    with Progress() as report:
        found = verify(
            args.folder,
            facts=args.facts,
            reference=args.reference,
            max_loss_nats=args.max_loss,
            report=report,
        )
    if args.json:
        emit_json(found.to_json())
    else:
        _show(found)
    if not found.passed:
        raise CheckError(f"'{args.folder}' is not what was promised: {'; '.join(found.reasons)}")
    say(f"next: mpsearch compare MODEL {shlex.quote(args.folder)}")


def _show(found: Verification) -> None:
    from mpsearch.console import emit, format_seconds, table

    rows = [[check.name, "ok" if check.passed else "FAILED", check.said] for check in found.checks]
    table(["check", "", "found"], rows, left=3)
    if found.answer_loss is not None:
        loss = found.answer_loss
        emit(
            f"against the unquantized model: answer loss {loss.mean:.3f} nats "
            f"[{loss.low:.3f}, {loss.high:.3f}], {found.forgotten} facts forgotten and "
            f"{found.gained} gained of {found.facts}"
        )
    if found.load_seconds is not None and found.ask_seconds is not None:
        emit(
            f"loaded in {format_seconds(found.load_seconds)}, asked in "
            f"{format_seconds(found.ask_seconds)}"
        )
