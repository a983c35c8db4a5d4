"""What `mpsearch recall` and `mpsearch compare` print: shares and nats with their intervals."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from math import exp
from typing import TYPE_CHECKING

from mpsearch.console import emit, table

if TYPE_CHECKING:
    from mpsearch.bootstrap import Interval
    from mpsearch.compare import Changes, Comparison
    from mpsearch.depth import Depth
    from mpsearch.displaced import Displacement
    from mpsearch.estimates import Estimate
    from mpsearch.fluency import TextScores
    from mpsearch.scores import HopsRecall, NoiseFloor, RecallSummary
    from mpsearch.text import Text


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


def show_recall(args: argparse.Namespace, summary: RecallSummary, noise: NoiseFloor) -> None:
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


def show_hops(hops: Sequence[HopsRecall]) -> None:
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


def show_perplexity(text: Text, read: TextScores) -> None:
    low, high = map(exp, read.log_perplexity.interval)
    emit(f"{_held_out(text, read)}: perplexity {read.perplexity:.2f} [{low:.2f}, {high:.2f}].")


def show_fluency(text: Text, read: TextScores, by_reference: TextScores) -> None:
    def nats(estimate: Estimate, sign: str = "") -> str:
        low, high = estimate.interval
        return f"{estimate.mean:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"

    emit(
        f"{_held_out(text, read)}: KL {nats(read.kl)} nats a token; perplexity "
        f"{by_reference.perplexity:.2f} -> {read.perplexity:.2f}, log-perplexity "
        f"{nats(read.log_perplexity_change(by_reference), '+')}."
    )


def show_comparison(args: argparse.Namespace, found: Comparison) -> None:
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


def show_displacement(found: Displacement) -> None:
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


def show_depth(found: Depth) -> None:
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
