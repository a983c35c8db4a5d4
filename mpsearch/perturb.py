"""Perturb-one KL: each group alone in each format, measured, what comes before it computed once.

Until the block of the perturbed group the model computes what the reference does, so the pass
starts at that block; see `mpsearch.reuse`. In a streamed model some candidates share a walk, and
the blocks before those that they differ in. Kept beside hidden states are the reference's
log-probabilities where they are read.

Source: the sensitivity of ZeroQ (arXiv:2001.00281), here of groups and on facts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpsearch.bank import Report, silent
from mpsearch.errors import CheckError
from mpsearch.evaluate import Bench
from mpsearch.formats import BF16
from mpsearch.forward import Pass, PreparedRow
from mpsearch.runner import runner
from mpsearch.walk import Walk

STAGE = "measuring each group alone, in blocks run"
_AT_ONCE = 16  # candidates of a streamed model


@torch.inference_mode()
def perturb_one(bench: Bench, work: Pass, report: Report = silent) -> dict[tuple[str, str], float]:
    """KL from the reference at the answers, in nats a fact, of every (group, format) alone.

    Summed over an answer's tokens, each after the true ones before it, and averaged over the
    sequences: the quantity that KL-Fisher predicts.

    Args:
        bench: whose space says what is perturbed; it must hold the reference, and does afterwards.
        work: the questions with their answers.
        report: counts blocks that have run, and the head as one.
    Raises:
        CheckError: a candidate gives NaN.
    """
    options, asked = bench.space.options, runner(work)
    reference = [logits.log_softmax(-1) for logits in asked.logits(bench.held)]
    costs = {group.name: asked.blocks_to_run(group.layers) + 1 for group in bench.space.groups}
    total = sum(costs[name] * len(formats) for name, formats in options.items())
    alone = dict.fromkeys(options, BF16.name)
    nats: dict[tuple[str, str], float] = {}
    done = 0
    # From the first block on, so that what enters a block is computed just before it is needed.
    order = sorted(options, key=costs.__getitem__, reverse=True)
    pairs = [(name, fmt.name) for name in order for fmt in options[name]]
    at_once = _AT_ONCE if isinstance(asked, Walk) else 1
    for start in range(0, len(pairs), at_once):
        together, held = pairs[start : start + at_once], []
        report(STAGE, done, total)
        for name, fmt in together:
            bench.put({**alone, name: fmt})
            held.append(bench.held)
        runs = asked.run(held) if isinstance(asked, Walk) else map(asked.logits, held)
        for (name, fmt), run in zip(together, runs, strict=True):
            rows = zip(work.rows, reference, run, strict=True)
            kl = sum(_kl(before, logits.log_softmax(-1), row) for row, before, logits in rows)
            if not kl < float("inf"):
                raise CheckError(f"'{name}' in {fmt} gives NaN; its weights are broken")
            nats[name, fmt] = kl / work.count
            done += costs[name]
    bench.restore()
    report(STAGE, total, total)
    return {(name, fmt.name): nats[name, fmt.name] for name in options for fmt in options[name]}


def _kl(reference: Tensor, candidate: Tensor, row: PreparedRow) -> float:
    """KL(reference || candidate) in nats, summed over the row's facts and their answers' tokens."""
    at_nodes = (reference.exp() * (reference - candidate)).sum(-1, dtype=torch.float64)
    return float(at_nodes.clamp(min=0.0)[row.places].sum())
