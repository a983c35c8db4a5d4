"""`mpsearch recall` and `mpsearch compare`: load, ask, render. Heavy imports are inside."""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from math import exp
from typing import TYPE_CHECKING, Any

from mpsearch.errors import UsageError

if TYPE_CHECKING:
    from mpsearch.bootstrap import Interval
    from mpsearch.compare import Changes, Comparison
    from mpsearch.displaced import Displacement
    from mpsearch.estimates import Estimate
    from mpsearch.facts import Fact, FactSet
    from mpsearch.fluency import TextScores
    from mpsearch.scores import HopsRecall, NoiseFloor, RecallSummary
    from mpsearch.text import Text

_SEED = 0  # of the bootstrap


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add both to the parser."""
    recall_command = add("recall", recall, "ask a model or an export its facts, by relation")
    recall_command.add_argument("model", metavar="MODEL|EXPORT")
    compare_command = add("compare", compare, "say what B forgot and gained against A")
    compare_command.add_argument("reference", metavar="A", help="a model or an export")
    compare_command.add_argument("candidate", metavar="B", help="likewise, of the same model")
    compare_command.add_argument(
        "--displaced",
        action="store_true",
        help="ask in other ways, too: which forgotten facts come back?",
    )
    for command in (recall_command, compare_command):
        command.add_argument(
            "--facts", metavar="FILE", help="JSONL, or a folder in the LRE format (built-in facts)"
        )
        command.add_argument(
            "--two-hop", action="store_true", help="ask the two-hop questions that the facts give"
        )
        command.add_argument("--text", metavar="FILE", help="text to read, too (a built-in one)")
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
    """Recall by relation, with intervals and the noise floor, and the perplexity of text."""
    one_hop, fact_set, facts = _facts(args)
    text = _text(args)
    model = _model(args.model, args.chat_template)
    import numpy as np

    from mpsearch.console import Progress, emit_json, say
    from mpsearch.facts.two_hop import TwoHopFact
    from mpsearch.guard import TextGuard
    from mpsearch.recall import RecallProxy
    from mpsearch.scores import by_hops

    started = time.perf_counter()
    with Progress() as report:
        stage = f"asking {len(facts)} facts"
        report(stage, 0, 2)
        proxy = RecallProxy(model, fact_set, facts, contrast=True, shots=args.shots)
        report(stage, 1, 2)
        noise = proxy.noise_floor()
        report(stage, 2, 2)
        hops: tuple[HopsRecall, ...] = ()
        if args.two_hop:
            report("asking their hops", 0, 1)
            asked = zip(*(f.hops for f in facts if isinstance(f, TwoHopFact)), strict=True)
            first, second = (
                RecallProxy(model, one_hop, hop, contrast=True, shots=args.shots).reference
                for hop in asked
            )
            hops = by_hops(proxy.reference, first, second)
            report("asking their hops", 1, 1)
        read = TextGuard(model, text.held_out).reference
    summary = proxy.summary(np.random.default_rng(_SEED))
    if args.json:
        about = _about(args, seconds=time.perf_counter() - started)
        further = {"noise": asdict(noise), "text": {"source": text.source, **read.about()}}
        if hops:
            further["hops"] = [asdict(row) for row in hops]
        emit_json({"model": args.model, **about, **summary.to_json(), **further})
    else:
        _show_recall(args, summary, noise)
        if hops:
            _show_hops(hops)
        _show_perplexity(text, read)
    say(f"next: mpsearch compare {shlex.quote(args.model)} EXPORT")


def compare(args: argparse.Namespace) -> None:
    """What B kept, forgot and gained; one of the two models is in memory at a time."""
    _, fact_set, facts = _facts(args)
    text = _text(args)
    import numpy as np

    from mpsearch.compare import compare as compare_scores
    from mpsearch.console import Progress, emit_json, say
    from mpsearch.displaced import displacement
    from mpsearch.guard import TextGuard
    from mpsearch.prompts import ask_otherwise, ask_reordered
    from mpsearch.recall import RecallProxy

    started = time.perf_counter()
    model = _model(args.reference, args.chat_template)
    with Progress() as report:
        stage = f"asking {len(facts)} facts of both"
        report(stage, 0, 3)
        proxy = RecallProxy(model, fact_set, facts, contrast=True, shots=args.shots)
        report(stage, 1, 3)
        noise, reference, first = proxy.noise_floor(), proxy.reference, proxy.first
        report(stage, 2, 3)
        if args.displaced:
            reordered = ask_reordered(model, fact_set, facts, args.shots)
        guard = TextGuard(model, text.held_out)
        said, read_by_reference = guard.said, guard.reference
        del proxy, guard, model
        model = _model(args.candidate, args.chat_template)
        proxy = RecallProxy(model, fact_set, facts, contrast=True, shots=args.shots, against=first)
        report(stage, 3, 3)
        candidate = proxy.reference
        read = TextGuard(model, text.held_out, against=said).reference
        del proxy
        if args.displaced:
            otherwise = ask_otherwise(
                model, fact_set, facts, args.shots, partial(report, "asking in other ways")
            )
    found = compare_scores(reference, candidate, facts, noise, np.random.default_rng(_SEED))
    displaced = None
    if args.displaced:
        displaced = displacement(
            reference, candidate, otherwise, reordered, facts, np.random.default_rng(_SEED)
        )
    if args.json:
        about = _about(args, seconds=time.perf_counter() - started)
        names = {"reference": args.reference, "candidate": args.candidate}
        further = {"displaced": displaced.to_json()} if displaced else {}
        further["text"] = {"source": text.source, **read.compared(read_by_reference)}
        emit_json({**names, **about, **found.to_json(), **further})
    else:
        _show_comparison(args, found)
        _show_fluency(text, read, read_by_reference)
        if displaced:
            _show_displacement(displaced)
    say(f"next: mpsearch recall {shlex.quote(args.candidate)}")


def _facts(args: argparse.Namespace) -> tuple[FactSet, FactSet, tuple[Fact, ...]]:
    """The one-hop facts, the set that is asked, and those of it to ask."""
    from mpsearch.facts import FactSet

    if args.shots < 0:
        raise UsageError(f"shots {args.shots} is negative; use 0 or more")
    fact_set = one_hop = FactSet.load(args.facts) if args.facts else FactSet.builtin()
    if args.two_hop:
        from mpsearch.facts.two_hop import FEWEST, compose

        fact_set = compose(one_hop)
        if not fact_set.facts:
            raise UsageError(
                f"facts '{one_hop.source}' give no two-hop questions: no two relations connect in "
                f"at least {FEWEST} chains; say first_hop, range, domain and second_hop in their "
                "first lines, or use the built-in facts"
            )
    if not (facts := fact_set.part(args.partition)):
        raise UsageError(
            f"facts '{fact_set.source}': none is in the {args.partition} partition; add facts"
        )
    return one_hop, fact_set, facts


def _text(args: argparse.Namespace) -> Text:
    from mpsearch.text import Text

    return Text.load(args.text) if args.text else Text.builtin()


def _model(name: str, chat_template: bool) -> Any:
    from mpsearch.console import say

    say(f"loading {name}")
    from mpsearch.export.reload import load_any

    return load_any(name, chat_template)


def _about(args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    return {
        "facts_source": args.facts or "built-in",
        "two_hop": args.two_hop,
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


def _show_hops(hops: Sequence[HopsRecall]) -> None:
    from mpsearch.console import table

    table(
        ["first hop", "second hop", "questions", "recall %"],
        [
            [
                "known" if row.first else "not known",
                "known" if row.second else "not known",
                str(row.facts),
                _percent(row.recall) if row.recall else "",
            ]
            for row in hops
        ],
        title="Two-hop questions by what the model says to their hops alone: right without a hop "
        "is a shortcut, wrong with both is a failure to compose",
    )


def _held_out(text: Text, read: TextScores) -> str:
    paragraphs, tokens = len(read.tokens), sum(read.tokens)
    return f"Held-out text ({text.source}, {paragraphs} paragraphs, {tokens:,} tokens)"


def _show_perplexity(text: Text, read: TextScores) -> None:
    from mpsearch.console import emit

    low, high = map(exp, read.log_perplexity.interval)
    emit(f"{_held_out(text, read)}: perplexity {read.perplexity:.2f} [{low:.2f}, {high:.2f}].")


def _show_fluency(text: Text, read: TextScores, by_reference: TextScores) -> None:
    from mpsearch.console import emit

    def nats(estimate: Estimate, sign: str = "") -> str:
        low, high = estimate.interval
        return f"{estimate.mean:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"

    emit(
        f"{_held_out(text, read)}: KL {nats(read.kl)} nats a token; perplexity "
        f"{by_reference.perplexity:.2f} -> {read.perplexity:.2f}, log-perplexity "
        f"{nats(read.log_perplexity_change(by_reference), '+')}."
    )


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


def _show_displacement(found: Displacement) -> None:
    from mpsearch.console import emit, table

    def cell(share: Interval | None) -> str:
        return "" if share is None else _percent(share)

    if found.ways:
        table(
            ["right by", "forgotten %", "neither knows %", "kept %", "displaced %"],
            [
                [way.way, cell(way.forgotten), cell(way.missed), cell(way.kept),
                 cell(way.displaced)]
                for way in found.ways
            ],
            title=f"Asked in other ways: {len(found.facts)} forgotten facts, {found.missed} that "
            f"neither knows (luck) and {found.kept} kept; 95 % intervals; displaced is the share "
            "of the forgotten that luck does not explain",
            left=1,
        )  # fmt: skip
    if found.facts:
        table(
            ["relation", "subject", "answer", "comes back by"],
            [
                [fact.relation, fact.subject, fact.answer, ", ".join(fact.back_by) or "nothing"]
                for fact in found.facts
            ],
            title="Forgotten facts",
            left=4,
        )
    emit(found.verdict)
