"""The logit lens: what a model would answer if it ended after each of its blocks.

A block's hidden state goes straight to what follows the last block: the final norm, the output
head, and any scale or softcap on the logits. All blocks are made to return that one state, so what
is said of it is the model's own code, whatever its family.

Two models that differ in their weights alone, such as a model and its quantization, can be told
apart so: the block from which on the answer is less likely. What a reading does not tell: an early
block does not write in the basis that the head reads, so its log-probabilities are biased and not
calibrated. A low one does not say that the answer is unknown there, and one that changes does not
say that later blocks miss what has changed. A map learnt for every block would take the bias away
(the tuned lens), which needs text and training. Each model is read through its own norm and head:
a quantized head shows at every block.

Source: nostalgebraist, interpreting GPT: the logit lens (2020); Belrose et al., Eliciting Latent
Predictions from Transformers with the Tuned Lens (arXiv:2303.08112).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpsearch.blocks import find_blocks, recorded, returning
from mpsearch.errors import CheckError
from mpsearch.facts import Fact, FactSet
from mpsearch.forward import Pass, PreparedRow, TokenSequence
from mpsearch.models import Model
from mpsearch.recall import SHOTS, ask
from mpsearch.walk import Walk

# The last reading repeats the arithmetic that it is checked against.
_TOLERANCE_NATS = 0.01


def read_facts(
    model: Model, fact_set: FactSet, facts: Sequence[Fact], shots: int = SHOTS
) -> NDArray[Any]:
    """Log-probability of each fact's answer after every block, asked as `RecallProxy` asks.

    Args:
        model: asked with the weights that it holds now.
        fact_set: source of solved examples.
        shots: solved examples before each question.
    Returns:
        `(facts, blocks)` in nats, summed over the answer's tokens.
    Raises:
        CheckError: as `read_blocks`.
    """
    return read_blocks(model, [ask(model, fact_set, fact, fact.answer, shots) for fact in facts])


@torch.inference_mode()
def read_blocks(model: Model, sequences: Sequence[TokenSequence]) -> NDArray[Any]:
    """Log-probability of each sequence's continuation after every block.

    Held at a time are the blocks' outputs on one row of tokens, and the logits of one block; of a
    streamed model what a walk holds.

    Returns:
        `(sequences, blocks)` in nats, summed over the continuation's tokens.
    Raises:
        CheckError: the blocks cannot be found or do not run once each, the model's logits are not
            those of its last block, or a reading is NaN or infinite.
        ModelError: a streamed model's blocks hand on more than hidden states.
    """
    if not (blocks := find_blocks(model.module, model.places)):
        raise CheckError(
            f"'{model.name}' ({type(model.module).__name__}) keeps its blocks in no list that is "
            "known here, so they cannot be read one by one; compare without --depth"
        )
    work = Pass(model, sequences)
    found = np.empty((work.count, len(blocks)))
    if model.streamed:  # a walk is refused where more than the last block decides the logits
        for depth, logits in enumerate(Walk(work).readings()):
            for row, said in zip(work.rows, logits, strict=True):
                found[row.indices, depth] = _answers(said, row)
        _check(model, found[:, -1], found)
        return found
    for row in work.rows:
        with recorded(blocks) as outputs:
            own = _answers(work.logits(row), row)
        if len(outputs) != len(blocks):
            raise CheckError(
                f"'{model.name}' ({type(model.module).__name__}) runs its {len(blocks)} blocks "
                f"{len(outputs)} times in a pass, so they cannot be read one by one; compare "
                "without --depth"
            )
        for depth, output in enumerate(outputs):
            with returning(blocks, output):
                found[row.indices, depth] = _answers(work.logits(row), row)
        _check(model, own, found[row.indices])
    return found


def _answers(logits: Tensor, row: PreparedRow) -> NDArray[Any]:
    """`(sequences of the row,)` log-probability of each continuation, in nats.

    Args:
        logits: `(read nodes, vocab)` float32.
    """
    steps = logits[row.places, row.tokens] - logits.logsumexp(-1)[row.places]
    sums = [answer.sum() for answer in torch.split(steps.double(), row.lengths)]
    return torch.stack(sums).cpu().numpy()


def _check(model: Model, own: NDArray[Any], read: NDArray[Any]) -> None:
    """Refuse readings `(sequences, blocks)` of which the last is not the model's own."""
    if not np.isfinite(read).all():
        raise CheckError(
            f"'{model.name}': {int((~np.isfinite(read)).sum())} of {read.size} log-probabilities "
            "read from its blocks are NaN or infinite; the weights in place are broken"
        )
    off_nats = float(np.abs(read[:, -1] - own).max())
    if not off_nats <= _TOLERANCE_NATS:
        raise CheckError(
            f"'{model.name}' ({type(model.module).__name__}) does more after its last block than "
            f"norm and head: read from that block's output an answer is {off_nats:.3g} nats off "
            f"(at most {_TOLERANCE_NATS}), so blocks cannot be read; compare without --depth"
        )
