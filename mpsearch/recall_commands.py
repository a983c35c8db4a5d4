"""`mpsearch recall` and `mpsearch compare`: load, ask, render. Heavy imports are inside."""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from mpsearch.errors import UsageError

if TYPE_CHECKING:
    from mpsearch.facts import Fact, FactSet
    from mpsearch.scores import HopsRecall
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
        "--depth", action="store_true", help="also read every block: where are answers lost?"
    )
    compare_command.add_argument(
        "--displaced",
        action="store_true",
        help="also ask in other ways: which forgotten facts come back?",
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
    model = _model(args, args.model)
    import numpy as np

    from mpsearch.console import Progress, emit_json, say
    from mpsearch.facts.two_hop import TwoHopFact
    from mpsearch.guard import TextGuard
    from mpsearch.recall import RecallProxy
    from mpsearch.recall_tables import show_hops, show_perplexity, show_recall
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
        further: dict[str, Any] = {
            "noise": asdict(noise),
            "text": {"source": text.source, **read.about()},
        }
        if hops:
            further["hops"] = [asdict(row) for row in hops]
        emit_json({"model": args.model, **about, **summary.to_json(), **further})
    else:
        show_recall(args, summary, noise)
        if hops:
            show_hops(hops)
        show_perplexity(text, read)
    say(f"next: mpsearch compare {shlex.quote(args.model)} EXPORT")


def compare(args: argparse.Namespace) -> None:
    """What B kept, forgot and gained; one of the two models is in memory at a time."""
    _, fact_set, facts = _facts(args)
    text = _text(args)
    import numpy as np

    from mpsearch.compare import compare as compare_scores
    from mpsearch.console import Progress, emit_json, say
    from mpsearch.depth import compare_depth
    from mpsearch.displaced import displacement
    from mpsearch.guard import TextGuard
    from mpsearch.lens import read_facts
    from mpsearch.prompts import ask_otherwise, ask_reordered
    from mpsearch.recall import RecallProxy
    from mpsearch.recall_tables import (
        show_comparison,
        show_depth,
        show_displacement,
        show_fluency,
    )

    started = time.perf_counter()
    model = _model(args, args.reference)
    with Progress() as report:
        stage = f"asking {len(facts)} facts of both"
        report(stage, 0, 3)
        if args.depth:  # first, as it may refuse the model
            blocks = read_facts(model, fact_set, facts, args.shots)
        proxy = RecallProxy(model, fact_set, facts, contrast=True, shots=args.shots)
        report(stage, 1, 3)
        noise, reference, first = proxy.noise_floor(), proxy.reference, proxy.first
        report(stage, 2, 3)
        reordered = ask_reordered(model, fact_set, facts, args.shots) if args.displaced else None
        guard = TextGuard(model, text.held_out)
        said, read_by_reference = guard.said, guard.reference
        del proxy, guard, model
        model = _model(args, args.candidate)
        proxy = RecallProxy(model, fact_set, facts, contrast=True, shots=args.shots, against=first)
        report(stage, 3, 3)
        candidate = proxy.reference
        del proxy
        read = TextGuard(model, text.held_out, against=said).reference
        found = compare_scores(reference, candidate, facts, noise, np.random.default_rng(_SEED))
        depth, displaced = None, None
        if args.depth:
            depth = compare_depth(
                blocks,
                read_facts(model, fact_set, facts, args.shots),
                facts,
                np.asarray(reference.correct) & ~np.asarray(candidate.correct),
                noise,
                np.random.default_rng(_SEED),
            )
        if args.displaced:
            otherwise = ask_otherwise(
                model, fact_set, facts, args.shots, partial(report, "asking in other ways")
            )
            displaced = displacement(
                reference, candidate, otherwise, reordered, facts, np.random.default_rng(_SEED)
            )
    if args.json:
        about = _about(args, seconds=time.perf_counter() - started)
        names = {"reference": args.reference, "candidate": args.candidate}
        further = {"text": {"source": text.source, **read.compared(read_by_reference)}}
        if depth:
            further["depth"] = depth.to_json()
        if displaced:
            further["displaced"] = displaced.to_json()
        emit_json({**names, **about, **found.to_json(), **further})
    else:
        show_comparison(args, found)
        show_fluency(text, read, read_by_reference)
        if depth:
            show_depth(depth)
        if displaced:
            show_displacement(displaced)
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


def _model(args: argparse.Namespace, name: str) -> Any:
    from mpsearch.console import say

    say(f"loading {name}")
    from mpsearch.export.reload import load_any

    return load_any(name, args.chat_template, args.memory_limit_bytes)


def _about(args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    return {
        "facts_source": args.facts or "built-in",
        "two_hop": args.two_hop,
        "partition": args.partition,
        "shots": args.shots,
        "seconds": round(seconds, 2),
    }
