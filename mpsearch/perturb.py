"""Perturb-one KL: each group alone in each format, measured, what comes before it computed once.

Until the block of the perturbed group the model computes what the reference does. So the pass
starts at that block, from hidden states that are kept: those of one block at a time, which is
`tokens x hidden` numbers, and the reference's log-probabilities where they are read.

Source: the sensitivity of ZeroQ (arXiv:2001.00281), here of groups and on facts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.bank import Report, silent
from mpsearch.blocks import find_blocks, recorded, returning
from mpsearch.errors import CheckError
from mpsearch.evaluate import Bench
from mpsearch.formats import BF16
from mpsearch.forward import Pass, PreparedRow
from mpsearch.layers import LayerGroup
from mpsearch.models import Model

STAGE = "measuring each group alone, in blocks run"


@torch.inference_mode()
def perturb_one(bench: Bench, work: Pass, report: Report = silent) -> dict[tuple[str, str], float]:
    """KL from the reference at the answers, in nats a fact, of every (group, format) alone.

    Summed over an answer's tokens, each after the true ones before it, and averaged over the
    sequences: the quantity that KL-Fisher predicts.

    Args:
        bench: whose space says what is perturbed; it must hold the reference, and does afterwards.
        work: the questions with their answers.
        report: counts blocks that have run.
    Raises:
        CheckError: a candidate gives NaN.
    """
    space, model = bench.space, work.model
    blocks = find_blocks(model.module, model.places)
    with recorded(blocks[:1]) as states:  # the output of the block before `start`, a row each
        reference = [work.logits(row).log_softmax(-1) for row in work.rows]
    if not _can_start_late(work, blocks, reference):
        blocks = []
    starts = {group.name: _start(group, model, blocks) for group in space.groups}
    ordered = sorted(space.groups, key=lambda group: starts[group.name])
    costs = {name: len(blocks) - start + 1 for name, start in starts.items()}
    total = sum(costs[name] * len(formats) for name, formats in space.options.items())
    alone = dict.fromkeys(starts, BF16.name)
    nats: dict[tuple[str, str], float] = {}
    start, done = 0, 0
    for group in ordered:
        while start < starts[group.name]:
            if start:
                bench.restore()
                states = _after(work, blocks, start, states)
            start += 1
        for fmt in space.options[group.name]:
            report(STAGE, done, total)
            bench.put({**alone, group.name: fmt.name})
            kl = 0.0
            for index, row in enumerate(work.rows):
                with returning(blocks[:start], states[index] if start else None):
                    kl += _kl(reference[index], work.logits(row).log_softmax(-1), row)
            if not kl < float("inf"):
                raise CheckError(f"'{group.name}' in {fmt.name} gives NaN; its weights are broken")
            nats[group.name, fmt.name] = kl / work.count
            done += costs[group.name]
    bench.restore()
    report(STAGE, total, total)
    return {
        (name, fmt.name): nats[name, fmt.name] for name in starts for fmt in space.options[name]
    }


def _start(group: LayerGroup, model: Model, blocks: Sequence[nn.Module]) -> int:
    """The first block that has to run if this group is perturbed."""
    if group.depth is not None and blocks:
        return group.depth
    return len(blocks) if model.head and group.layers == (model.head,) else 0


def _can_start_late(work: Pass, blocks: Sequence[nn.Module], reference: Sequence[Tensor]) -> bool:
    """Whether hidden states are all that blocks hand on, tried on the first row.

    Not so where a block reads another's keys and values.
    """
    if not blocks:
        return False
    with recorded(blocks[-2:-1]) as states:
        work.logits(work.rows[0])
    try:
        with returning(blocks[:-1], states[0] if states else None):
            return torch.equal(work.logits(work.rows[0]).log_softmax(-1), reference[0])
    except LookupError:
        return False


def _after(work: Pass, blocks: Sequence[nn.Module], index: int, states: Sequence[Any]) -> list[Any]:
    """The output of one block for every row, from that of the block before it."""
    others = [block for block in blocks if block is not blocks[index]]
    with recorded([blocks[index]]) as outputs:
        for row, state in zip(work.rows, states, strict=True):
            with returning(others, state):
                work.model.module.get_decoder()(**row.inputs, use_cache=False)
    return outputs


def _kl(reference: Tensor, candidate: Tensor, row: PreparedRow) -> float:
    """KL(reference || candidate) in nats, summed over the row's facts and their answers' tokens."""
    at_nodes = (reference.exp() * (reference - candidate)).sum(-1, dtype=torch.float64)
    nodes = [node for span, _ in row.spans for node in span]
    return float(at_nodes.clamp(min=0.0)[nodes].sum())
