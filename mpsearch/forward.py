"""The pass: many token sequences through the model at the cost of their distinct prefixes.

Sequences that begin alike (few-shot examples, a question asked with several answers) share the
tokens of their common beginning. They are packed into rows, each a token trie: a token attends to
its ancestors only, and its position is its depth, so every sequence gets the logits it would get
alone. Nothing is padded, and logits are computed only where they are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.device import row_tokens
from mpsearch.models import Model

_ROW_COST = 16  # of a row beside its tokens, in tokens


@contextmanager
def differentiable(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Gradients reach these parameters meanwhile."""
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


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


def pack(sequences: Sequence[TokenSequence], max_nodes: int) -> list[Row]:
    """Rows of at most `max_nodes` tokens, the cheapest to run; a longer sequence gets its own row.

    In sorted order a sequence adds to a trie just what it does not share with the one before. So a
    cut costs what the two share, and the best cuts are a shortest path.
    """
    inputs = [sequence.tokens[:-1] for sequence in sequences]  # a last token is never fed
    order = sorted(range(len(inputs)), key=inputs.__getitem__)
    added = [0] + [
        len(inputs[here]) - _shared(inputs[before], inputs[here])
        for before, here in pairwise(order)
    ]
    least = [0] + [0] * len(order)  # cost of the first so many sequences
    cuts = [0] * len(least)  # where the last of their rows begins
    for end in range(1, len(least)):
        follows = 0  # nodes that a row's sequences after its first add
        costs = {}
        for start in reversed(range(end)):
            nodes = len(inputs[order[start]]) + follows
            if nodes <= max_nodes or start == end - 1:
                costs[start] = least[start] + nodes + _ROW_COST
            follows += added[start]
            if follows >= max_nodes:
                break
        cuts[end] = min(costs, key=costs.__getitem__)
        least[end] = costs[cuts[end]]
    rows: list[Row] = []
    end = len(order)
    while end > 0:
        rows.append(Row())
        for place in range(cuts[end], end):
            rows[-1].add(order[place], sequences[order[place]])
        end = cuts[end]
    return rows[::-1]


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens of the common beginning."""
    length = min(len(a), len(b))
    return next((place for place in range(length) if a[place] != b[place]), length)


@dataclass(frozen=True, eq=False)
class PreparedRow:
    """A row as tensors on the model's device: what `Row` says, ready for the forward.

    Attributes:
        indices, lengths: of each sequence, and how many tokens its continuation has.
        places, tokens: of all continuations, one after another: where among the read nodes a token
            is predicted, and which it is.
    """

    inputs: dict[str, Tensor]
    read_nodes: Tensor
    indices: list[int]
    lengths: list[int]
    places: Tensor
    tokens: Tensor

    def continuations(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """For each sequence its index, and its places and tokens on the device."""
        parts = (torch.split(self.places, self.lengths), torch.split(self.tokens, self.lengths))
        yield from zip(self.indices, *parts, strict=True)


class Pass:
    """A fixed set of sequences, tokenized, packed and masked once, run for every candidate.

    Args:
        model: whose module runs; its weights may change between runs.
        sequences: results come in this order.
        max_nodes: tokens in a row; by default as many as suit the device.
    """

    def __init__(
        self, model: Model, sequences: Sequence[TokenSequence], max_nodes: int | None = None
    ):
        self.model = model
        self.count = len(sequences)
        rows = pack(sequences, max_nodes or row_tokens(model.device))
        self.rows = [self._prepare(row) for row in rows]

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
        return PreparedRow(
            inputs,
            torch.tensor(read_nodes, device=device),
            [index for index, _, _ in row.reads],
            [len(tokens) for _, _, tokens in row.reads],
            torch.tensor([place[n] for _, nodes, _ in row.reads for n in nodes], device=device),
            torch.tensor([t for _, _, tokens in row.reads for t in tokens], device=device),
        )

    def logits(self, row: PreparedRow) -> Tensor:
        """`(read nodes, vocab)` float32 logits of one row, only at the nodes that are read."""
        module: Any = self.model.module
        output = module(**row.inputs, use_cache=False, logits_to_keep=row.read_nodes)
        logits: Tensor = output.logits[0]
        return logits.float()

    def run(
        self,
        visit: Callable[[int, Tensor], None] | None = None,
        logits: Iterable[Tensor] | None = None,
    ) -> Tensor:
        """Log-probability of each sequence's continuation, summed over its tokens.

        Args:
            visit: called with a sequence's index and the `(length, vocab)` log-probabilities at its
                continuation's tokens.
            logits: as of `continuations`.
        Returns:
            `(sequences,)` float64 on the CPU, in nats. NaN where the model gave NaN.
        """
        sums: dict[int, Tensor] = {}  # left on the device, which else is waited for each time
        for index, log_probs, tokens in self.continuations(logits):
            sums[index] = log_probs.gather(-1, tokens[:, None]).double().sum()
            if visit is not None:
                visit(index, log_probs)
        return torch.stack([sums[index] for index in range(self.count)]).cpu()

    @torch.inference_mode()
    def continuations(
        self, logits: Iterable[Tensor] | None = None
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """For each sequence its index, `(length, vocab)` log-probabilities, `(length,)` tokens.

        Args:
            logits: of each row, in order, where something else runs the model.
        """
        if logits is None:
            logits = map(self.logits, self.rows)
        for row, found in zip(self.rows, logits, strict=True):
            log_probs = found.log_softmax(-1)
            for index, places, tokens in row.continuations():
                yield index, log_probs[places], tokens
