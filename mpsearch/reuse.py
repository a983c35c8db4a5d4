"""Hidden states kept from earlier runs of a pass, so that their first blocks are not run again.

What a block returns depends on the weights up to that block alone. A candidate that differs from
an earlier one in later blocks only so starts from what that one's last equal block returned, and
says the same to the bit. Whether a model's blocks hand on nothing but what they return is tried
once; where they do not, as where a block reads another's keys and values, all of them run.

What is kept is bounded, and the states that were needed longest ago go first. One state of all
tokens is `tokens x hidden` numbers.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.blocks import find_blocks, hand_on_all, parts, recorded, returning
from mpsearch.device import available_memory_bytes
from mpsearch.forward import Pass
from mpsearch.layers import Layer, LayerGroup

_MOST_RUNS = 4  # whose states are kept, if they had nothing in common
_MOST_MEMORY = 1 / 8  # of what is available, likewise


class Reuse:
    """The runs of one pass, each from where an earlier one leads.

    Args:
        work: whose rows are run.
    """

    def __init__(self, work: Pass):
        model = work.model
        self._work = work
        self._listed = find_blocks(model.module, model.places)
        self._blocks: list[nn.Module] | None = None  # those that can be skipped; None: not tried
        self._first_block = {layer.name: self._first(layer) for layer in model.every_layer}
        # What decides the input of a block (see `_before`) to that input, one a row.
        self._kept: OrderedDict[Hashable, list[Any]] = OrderedDict()
        self._state_bytes = 0  # of one such list

    def _first(self, layer: Layer) -> int:
        """The first block that has to run again if this layer's weight is another."""
        depth = LayerGroup((layer,)).depth
        if depth is not None:
            return depth
        return len(self._listed) if layer == self._work.model.head else 0

    def blocks_to_run(self, layers: Iterable[Layer]) -> int:
        """How many blocks have to run again if the weights of these layers are others."""
        skipped = min(self._first_block[layer.name] for layer in layers)
        return len(self._listed) - (skipped if self._blocks else 0)

    @torch.inference_mode()
    def logits(self, held: Mapping[str, Hashable]) -> Iterator[Tensor]:
        """What `Pass.logits` gives for each row, in order.

        Args:
            held: layer to what names the weight that it holds now; those that hold their reference
                weights are left out.
        """
        if self._blocks is None:
            self._blocks = self._tried()
        blocks, before = self._blocks or [], self._before(held)
        start = max((block for block in before if before[block] in self._kept), default=0)
        inputs = self._kept[before[start]] if start else [None] * len(self._work.rows)
        record = blocks[start : start + self._most_states()]
        found = []
        for row, state in zip(self._work.rows, inputs, strict=True):
            with returning(blocks[:start], state), recorded(record) as outputs:
                logits = self._work.logits(row)
            found.append(outputs)
            yield logits
        # Not before, as a run that is broken off knows some of the rows only.
        for block, states in enumerate(zip(*found, strict=True), start=start + 1):
            self._kept[before[block]] = list(states)
        # What enters early blocks is needed again most often, so it is the last to go.
        for weights in reversed(before.values()):
            if weights in self._kept:
                self._kept.move_to_end(weights)
        while len(self._kept) > self._most_states():
            self._kept.popitem(last=False)

    def _before(self, held: Mapping[str, Hashable]) -> dict[int, Hashable]:
        """Each block but the first to what decides its input, and one more to what leaves all."""
        order = sorted((self._first_block[layer], layer, weight) for layer, weight in held.items())
        firsts = [first for first, *_ in order]
        ends = range(1, len(self._blocks or ()) + 1)
        return {end: (end, *order[: bisect_left(firsts, end)]) for end in ends}

    def _most_states(self) -> int:
        if not self._blocks:
            return 0
        available_bytes = available_memory_bytes(self._work.model.device)
        available_bytes += len(self._kept) * self._state_bytes
        fitting = int(available_bytes * _MOST_MEMORY) // self._state_bytes
        return min(fitting, _MOST_RUNS * len(self._blocks))

    def _tried(self) -> list[nn.Module] | None:
        """The blocks if any number of the first can be skipped, none if not; None after NaN.

        On one row: each block alone must return the same to the bit, given what the one before it
        returned, and what the last one returned must lead to the same logits.
        """
        work, blocks = self._work, self._listed
        row = min(work.rows, key=lambda row: row.inputs["input_ids"].shape[1])
        with recorded(blocks) as states:
            logits = work.logits(row)
        if logits.isnan().any():
            return None
        if not blocks or len(states) != len(blocks):
            return []
        self._state_bytes = work.tokens * _bytes(states[0]) // row.inputs["input_ids"].shape[1]
        decoder = work.model.module.get_decoder()
        if not hand_on_all(blocks, states, lambda: decoder(**row.inputs, use_cache=False)):
            return []
        try:
            with returning(blocks, states[-1]):
                return blocks if torch.equal(work.logits(row), logits) else []
        except LookupError:  # what an earlier block should have left is not there
            return []


def _bytes(output: Any) -> int:
    return sum(part.nbytes for part in parts(output) if isinstance(part, Tensor))
