"""The pass: many token sequences through the model at the cost of their distinct prefixes.

Sequences that begin alike (few-shot examples, a question asked with several answers) share the
tokens of their common beginning. They are packed into rows, each a token trie: a token attends to
its ancestors only, and its position is its depth, so every sequence gets the logits it would get
alone. Nothing is padded, and logits are computed only where they are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mpsearch.models import Model


@dataclass(frozen=True)
class TokenSequence:
    """Context and continuation: the log-probability of `tokens[start:]` after `tokens[:start]`."""

    tokens: tuple[int, ...]
    start: int

    def __post_init__(self) -> None:
        if not 0 < self.start < len(self.tokens):
            raise ValueError(f"start {self.start} outside 1..{len(self.tokens) - 1}")


@dataclass(eq=False)
class Row:
    """A token trie in one row of a batch of one.

    Attributes:
        tokens, positions, parents: one entry a node, parents before children; a root has -1.
        reads: for each sequence in it: its index, the node before its continuation, and the nodes
            and tokens of the continuation (a node predicts the token beside it).
    """

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    reads: list[tuple[int, list[int], list[int]]] = field(default_factory=list)
    _children: dict[tuple[int, int], int] = field(default_factory=dict, repr=False)

    def missing(self, sequence: TokenSequence) -> int:
        """Nodes that adding the sequence would add; its last token is predicted, never fed."""
        node = -1
        inputs = sequence.tokens[:-1]
        for depth, token in enumerate(inputs):
            if (child := self._children.get((node, token))) is None:
                return len(inputs) - depth
            node = child
        return 0

    def add(self, index: int, sequence: TokenSequence) -> None:
        node, path = -1, []
        for depth, token in enumerate(sequence.tokens[:-1]):
            child = self._children.setdefault((node, token), len(self.tokens))
            if child == len(self.tokens):
                self.tokens.append(token)
                self.positions.append(depth)
                self.parents.append(node)
            node = child
            path.append(node)
        nodes = path[sequence.start - 1 :]
        self.reads.append((index, nodes, list(sequence.tokens[sequence.start :])))

    def mask(self) -> Tensor:
        """`(nodes, nodes)` bool: which nodes each node attends to, itself and its ancestors."""
        mask = torch.eye(len(self.tokens), dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                mask[node] |= mask[parent]
        return mask


def pack(sequences: Sequence[TokenSequence], max_nodes: int = 512) -> list[Row]:
    """Rows of at most `max_nodes` tokens, filled in order; a longer sequence gets its own row.

    Neighbours share most when sequences that begin alike stand together.
    """
    rows: list[Row] = []
    for index, sequence in enumerate(sequences):
        if not rows or len(rows[-1].tokens) + rows[-1].missing(sequence) > max_nodes:
            rows.append(Row())
        rows[-1].add(index, sequence)
    return rows


@dataclass(frozen=True, eq=False)
class PreparedRow:
    """A row as tensors on the model's device: what `Row` says, ready for the forward."""

    inputs: dict[str, Tensor]
    read_nodes: Tensor
    indices: list[int]
    spans: list[tuple[list[int], list[int]]]


class Pass:
    """A fixed set of sequences, tokenized, packed and masked once, run for every candidate.

    Args:
        model: whose module runs; its weights may change between runs.
        sequences: results come in this order.
        max_nodes: tokens in a row.
    """

    def __init__(self, model: Model, sequences: Sequence[TokenSequence], max_nodes: int = 512):
        self.model = model
        self.count = len(sequences)
        self.rows = [self._prepare(row) for row in pack(sequences, max_nodes)]

    @property
    def tokens(self) -> int:
        """Distinct tokens that a run pushes through the model."""
        return sum(row.inputs["input_ids"].shape[1] for row in self.rows)

    def _prepare(self, row: Row) -> PreparedRow:
        device = self.model.device
        read_nodes = sorted({node for _, nodes, _ in row.reads for node in nodes})
        place = {node: position for position, node in enumerate(read_nodes)}
        inputs = {
            "input_ids": torch.tensor([row.tokens], device=device),
            "position_ids": torch.tensor([row.positions], device=device),
            "attention_mask": row.mask()[None, None].to(device),
        }
        spans = [([place[node] for node in nodes], tokens) for _, nodes, tokens in row.reads]
        indices = [index for index, _, _ in row.reads]
        return PreparedRow(inputs, torch.tensor(read_nodes, device=device), indices, spans)

    def logits(self, row: PreparedRow) -> Tensor:
        """`(read nodes, vocab)` float32 logits of one row, only at the nodes that are read."""
        module: Any = self.model.module
        output = module(**row.inputs, use_cache=False, logits_to_keep=row.read_nodes)
        logits: Tensor = output.logits[0]
        return logits.float()

    def run(self, visit: Callable[[int, Tensor], None] | None = None) -> Tensor:
        """Log-probability of each sequence's continuation, summed over its tokens.

        Args:
            visit: called with a sequence's index and the `(vocab,)` log-probabilities at its first
                continuation token.
        Returns:
            `(sequences,)` float64 on the CPU, in nats. NaN where the model gave NaN.
        """
        sums = torch.empty(self.count, dtype=torch.float64)
        for index, log_probs, tokens in self.continuations():
            steps = torch.arange(len(tokens), device=log_probs.device)
            sums[index] = log_probs[steps, tokens].double().sum().cpu()
            if visit is not None:
                visit(index, log_probs[0])
        return sums

    @torch.inference_mode()
    def continuations(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """For each sequence its index, `(length, vocab)` log-probabilities, `(length,)` tokens."""
        for row in self.rows:
            log_probs = self.logits(row).log_softmax(-1)
            for index, (places, tokens) in zip(row.indices, row.spans, strict=True):
                yield index, log_probs[places], torch.tensor(tokens, device=log_probs.device)
