"""The calibration text on its way through the blocks, one after another, and what layers read.

What enters the current block is kept, `sequences x length x hidden` numbers, and only that block
runs; of a streamed model only that block has weights. Batches, calls and the order of sums are
those of a whole pass, and so, to the bit, are statistics.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from mpsearch.blocks import Call, called, returning
from mpsearch.calibration import WatchedInputs, batches
from mpsearch.errors import ModelError
from mpsearch.flow import BlockWeights
from mpsearch.forward import Pass, TokenSequence
from mpsearch.models import Model
from mpsearch.quantizers import InputStatistics
from mpsearch.walk import Walk

BEFORE = -1  # where a text is that has not entered the first block


class TextWalk:
    """A text that goes through the blocks once, with whatever weights they hold as it passes.

    A block of a streamed model holds its reference weights from when the text arrives until it
    arrives at another one, so use it as a context manager.

    Args:
        tokens: `(sequences, length)`.
    Attributes:
        separable: whether blocks hand on hidden states alone. If they do not, all blocks run
            whenever something is asked, and the text stays before the first.
        reached: the block that the text enters next; `BEFORE` all of them, or as many as there are.
        depth_of: layer to its block, for layers that are in one.
    Raises:
        ModelError: a streamed model's blocks hand on more than hidden states.
    """

    def __init__(self, model: Model, tokens: Tensor):
        self._model, self._batches = model, batches(tokens)
        self._weights = BlockWeights(model)
        self._blocks, self.depth_of = self._weights.blocks, self._weights.depth_of
        self._as_tuple = _as_tuple(model)
        self.separable = self._as_tuple is not None
        self.reached = BEFORE
        self._holding: int | None = None
        self._states: list[Tensor] = []  # what enters the block reached, a batch each
        self._calls: list[list[Call]] = []

    def __enter__(self) -> TextWalk:
        return self

    def __exit__(self, *_: object) -> None:
        self._weights.release()

    @property
    def end(self) -> int:
        """Where a text is that has left the last block."""
        return len(self._blocks)

    def reach(self, block: int) -> None:
        """Let the text through all blocks before this one, which has its weights then."""
        while self.separable and self.reached < block:
            self.leave()
        self._hold()

    def leave(self, names: Collection[str] = ()) -> dict[str, InputStatistics]:
        """Let the text into the first block, or through the one that it has reached.

        Returns:
            Of the inputs of these layers, which are in that block.
        """
        if self.reached == BEFORE:
            for batch in self._batches:
                calls = self._around(batch)
                self._states.append(calls[0][0])
                self._calls.append([call for _, call in calls])
            self.reached = 0
            return {}
        self._hold()
        found = self._inside(names, leave=True)
        self.reached += 1
        return found

    def statistics(self, names: Collection[str]) -> dict[str, InputStatistics]:
        """Of the inputs of these layers, where the text is and stays.

        They are in the block that it has reached, or in none where it is before or behind all.
        """
        if self.separable and BEFORE < self.reached < self.end:
            self._hold()
            return self._inside(names, leave=False)
        head, decoder = self._model.head, self._model.module.get_decoder()
        with torch.no_grad(), WatchedInputs(self._model, names) as seen:
            for index, batch in enumerate(self._batches):
                if not self.separable:
                    output = decoder(batch, use_cache=False)
                elif self.reached == BEFORE:
                    self._around(batch)
                    continue
                else:
                    state = self._states[index]
                    with returning(self._blocks, (state,) if self._as_tuple else state):
                        output = decoder(batch, use_cache=False)
                if head and head.name in names:
                    seen.add(head.name, output.last_hidden_state)
        return seen.statistics

    @torch.no_grad()
    def _inside(self, names: Collection[str], leave: bool) -> dict[str, InputStatistics]:
        block = self._blocks[self.reached]
        with WatchedInputs(self._model, names) as seen:
            for index, calls in enumerate(self._calls):
                left = calls[self.reached].of(block, self._states[index])
                if leave:
                    self._states[index] = left
        return seen.statistics

    @torch.no_grad()
    def _around(self, batch: Tensor) -> list[tuple[Tensor, Call]]:
        """How the model calls its blocks on a batch, were they to compute nothing."""
        with called(self._blocks, bool(self._as_tuple)) as calls:
            self._model.module.get_decoder()(batch, use_cache=False)
        return calls

    def _hold(self) -> None:
        inside = BEFORE < self.reached < self.end
        if self._model.streamed and self._holding != self.reached:
            self._holding = self.reached
            if inside:
                self._weights.hold(self.reached)
            else:
                self._weights.release()


def _as_tuple(model: Model) -> bool | None:
    """Whether blocks return their states in a tuple; None if they hand on more than states."""
    try:
        return Walk(Pass(model, [TokenSequence((0, 1), 1)])).as_tuple
    except ModelError:
        if model.streamed:
            raise
        return None
