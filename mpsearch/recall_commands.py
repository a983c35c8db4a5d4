"""`mpsearch recall` and `mpsearch compare`: load, ask, render. Heavy imports are inside."""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mpsearch.errors import UsageError

if TYPE_CHECKING:
    from mpsearch.bootstrap import Interval
    from mpsearch.compare import Changes, Comparison
    from mpsearch.depth import Depth
    from mpsearch.facts import Fact, FactSet
    from mpsearch.scores import NoiseFloor, RecallSummary

_SEED = 0  # of the bootstrap


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add both to the parser."""
    recall_command = add("recall", recall, "ask a model or an export its facts, by relation")
    recall_command.add_argument("model", metavar="MODEL|EXPORT")
    compare_command = add("compare", compare, "say what B forgot and gained against A")
    compare_command.add_argument("reference", metavar="A", help="a model or an export")
    compare_command.add_argument("candidate", metavar="B", help="likewise, of the same model")
    compare_command.add_argument(
        "--depth", action="store_true", help="also read every block: where are answers lost?"
    )
    for command in (recall_command, compare_command):
        command.add_argument("--facts", metavar="FILE", help="JSONL of facts (the built-in ones)")
        command.add_argument("--shots", type=int, default=4, help="solved examples first (4)")
        command.add_argument(
            "--partition",
            default="test",
            choices=("search", "validation", "test"),
            help="which facts to ask (test)",
        )
        command.add_argument(
            "--chat-template", action="store_true", help="ask facts through the model's template"
        )


def recall(args: argparse.Namespace) -> None:
    """Recall by relation, with intervals and the noise floor."""
    fact_set, facts = _facts(args)
    model = _model(args.model, args.chat_template)
    import numpy as np

    from mpsearch.console import Progress, emit_json, say
    from mpsearch.recall import RecallProxy

    started = time.perf_counter()
    with Progress() as report:
        stage = f"asking {len(facts)} facts"
        report(stage, 0, 2)
        proxy = RecallProxy(model, fact_set, facts, contrast=True, shots=args.shots)
        report(stage, 1, 2)
        noise = proxy.noise_floor()
        report(stage, 2, 2)
    summary = proxy.summary(np.random.default_rng(_SEED))
    if args.json:
        about = _about(args, seconds=time.perf_counter() - started)
        emit_json({"model": args.model, **about, **summary.to_json(), "noise": asdict(noise)})
    else:
        _show_recall(args, summary, noise)
    say(f"next: mpsearch compare {shlex.quote(args.model)} EXPORT")


def compare(args: argparse.Namespace) -> None:
    """What B kept, forgot and gained; one of the two models is in memory at a time."""
    fact_set, facts = _facts(args)
    import numpy as np

    from mpsearch.compare import compare as compare_scores
    from mpsearch.console import Progress, emit_json, say
    from mpsearch.depth import compare_depth
    from mpsearch.lens import read_facts
    from mpsearch.recall import RecallProxy

    started = time.perf_counter()
    model = _model(args.reference, args.chat_template)
    with Progress() as report:
        stage = f"asking {len(facts)} facts of both"
        report(stage, 0, 3)
        if args.depth:  # first, as it may refuse the model
            blocks = read_facts(model, fact_set, facts, args.shots)
        proxy = RecallProxy(model, fact_set, facts, contrast=True, shots=args.shots)
        report(stage, 1, 3)
        noise, reference, first = proxy.noise_floor(), proxy.reference, proxy.first
        report(stage, 2, 3)
        del proxy, model
        model = _model(args.candidate, args.chat_template)
        if args.depth:
            candidate_blocks = read_facts(model, fact_set, facts, args.shots)
        proxy = RecallProxy(model, fact_set, facts, contrast=True, shots=args.shots, against=first)
        report(stage, 3, 3)
    found = compare_scores(reference, proxy.reference, facts, noise, np.random.default_rng(_SEED))
    depth = None
    if args.depth:
        forgotten = np.asarray(reference.correct) & ~np.asarray(proxy.reference.correct)
        depth = compare_depth(
            blocks, candidate_blocks, facts, forgotten, noise, np.random.default_rng(_SEED)
        )
    if args.json:
        about = _about(args, seconds=time.perf_counter() - started)
        names = {"reference": args.reference, "candidate": args.candidate}
        further = {"depth": depth.to_json()} if depth else {}
        emit_json({**names, **about, **found.to_json(), **further})
    else:
        _show_comparison(args, found)
        if depth:
            _show_depth(depth)
    say(f"next: mpsearch recall {shlex.quote(args.candidate)}")


def _facts(args: argparse.Namespace) -> tuple[FactSet, tuple[Fact, ...]]:
    from mpsearch.facts import FactSet

    if args.shots < 0:
        raise UsageError(f"shots {args.shots} is negative; use 0 or more")
    fact_set = FactSet.load(args.facts) if args.facts else FactSet.builtin()
    if not (facts := fact_set.part(args.partition)):
        raise UsageError(
            f"facts '{fact_set.source}': none is in the {args.partition} partition; add facts"
        )
    return fact_set, facts


def _model(name: str, chat_template: bool) -> Any:
    from mpsearch.console import say

    say(f"loading {name}")
    from mpsearch.export.reload import load_any

    return load_any(name, chat_template)


def _about(args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    return {
        "facts_source": args.facts or "built-in",
        "partition": args.partition,
        "shots": args.shots,
        "seconds": round(seconds, 2),
    }


# ------------------------------------------------------------------------------------ tables


def _percent(share: Interval) -> str:
    return f"{share.mean * 100:.1f} [{share.low * 100:.1f}, {share.high * 100:.1f}]"


def _nats(value: Interval, floor_nats: float = 0.0) -> str:
    """With a tilde where it is below the noise floor."""
    mark = "~" if abs(value.mean) <= floor_nats else ""
    return f"{mark}{value.mean:.3f} [{value.low:.3f}, {value.high:.3f}]"


def _noise_line(noise: NoiseFloor) -> str:
    return (
        f"Noise floor (the reference against itself, packed otherwise): {noise.mean_nats:.2g} nats "
        f"of mean answer loss, {noise.log_prob_nats:.2g} an answer, {noise.margin_nats or 0:.2g} "
        f"of a margin; {noise.flips} of {noise.facts} facts flip."
    )


def _show_recall(args: argparse.Namespace, summary: RecallSummary, noise: NoiseFloor) -> None:
    from mpsearch.console import emit, table

    rows = [
        [
            row.relation,
            "" if row.known else "no",
            str(row.facts),
            _percent(row.recall),
            f"{row.chance * 100:.1f}",
            _percent(row.top1),
        ]
        for row in summary.relations
    ]
    rows.append(
        [
            "mean over relations",
            "",
            str(summary.facts),
            _percent(summary.recall),
            f"{summary.chance * 100:.1f}",
            _percent(summary.top1),
        ]
    )
    table(
        ["relation", "beats chance", "facts", "recall %", "chance %", "top-1 %"],
        rows,
        title=f"{args.model}, {args.partition} facts, {args.shots}-shot; 95 % intervals",
    )
    known = sum(row.known for row in summary.relations)
    emit(
        f"{known} of {len(summary.relations)} relations beat chance by two standard errors; a "
        "search leaves the others out."
    )
    emit(_noise_line(noise))


def _show_comparison(args: argparse.Namespace, found: Comparison) -> None:
    from mpsearch.console import emit, table

    def row(name: str, changes: Changes, floor_nats: float) -> list[str]:
        return [
            name,
            *(str(n) for n in (changes.facts, changes.kept, changes.forgotten, changes.gained)),
            f"{changes.p:.3g}",
            _nats(changes.answer_loss, floor_nats),
            f"{changes.kl_nats:.3f}",
        ]

    noise = found.noise
    rows = [
        row(name, changes, noise.log_prob_nats / changes.facts**0.5)
        for name, changes in found.relations.items()
    ]
    rows.append(row("all", found.overall, noise.mean_nats))
    table(
        ["relation", "facts", "kept", "forgotten", "gained", "p", "answer loss (nats)", "KL"],
        rows,
        title=f"{args.candidate} against {args.reference}, {args.partition} facts, {args.shots}-"
        "shot; 95 % intervals; p is McNemar's, of relations Holm-corrected; ~ is below the noise",
        left=1,
    )
    if found.flips:
        table(
            ["", "relation", "subject", "answer", "reference margin", "margin", "answer loss"],
            [
                [
                    "forgotten" if flip.forgotten else "gained",
                    flip.relation,
                    flip.subject,
                    flip.answer,
                    ("~" if flip.within_noise else "") + f"{flip.reference_margin:.3f}",
                    f"{flip.candidate_margin:.3f}",
                    f"{flip.answer_loss_nats:.3f}",
                ]
                for flip in found.flips
            ],
            title="Flipped facts, margins in nats a token; ~ the reference's was within the noise",
            left=4,
        )
    emit(_noise_line(noise))
    emit(found.verdict)


def _show_depth(found: Depth) -> None:
    from mpsearch.console import emit, table

    table(
        ["block", "reference log-prob", "candidate log-prob", "shortfall (nats)", "forgotten here"],
        [
            [
                str(number),
                f"{block.reference_log_prob:.3f}",
                f"{block.candidate_log_prob:.3f}",
                _nats(block.shortfall),
                str(block.forgotten or ""),
            ]
            for number, block in enumerate(found.blocks)
        ],
        title="The answer read after every block by the logit lens, which early blocks are not "
        "calibrated for; means over relations, 95 % intervals; a fact is lost at the first block "
        "from which on its shortfall is at least half of the last block's",
        left=0,
    )
    emit(found.verdict)
