"""What each layer reads once the layers before it are quantized, a step at a time.

GPTQ implementations quantize so: blocks in order, and in a block what reads one tensor together
(query, key and value; then the output; then gate and up; then down), each step by inputs that
passed through everything quantized before it (Frantar et al., arXiv:2210.17323, section 4).

One step's statistics are in memory at a time. Between steps only what entered the current block is
kept, `sequences x length x hidden` numbers, and only that block runs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.blocks import find_blocks, hand_on_all, recorded, returning
from mpsearch.calibration import WatchedInputs, batches
from mpsearch.layers import LayerGroup
from mpsearch.models import Model
from mpsearch.quantizers import InputStatistics

Step = tuple[str, ...]


@torch.no_grad()
def reading_order(model: Model, tokens: Tensor) -> list[Step]:
    """All layers in the order in which a pass reaches them, those that read one tensor together.

    The first step holds what no pass gives vectors to: the embedding, and layers that are never
    called; it may be empty. Gate and up of all experts of a block are one step, their downs the
    next. The head is the last.

    Args:
        tokens: `(sequences, length)` for one pass.
    """
    steps: list[Step] = []
    reached: set[str] = set()
    last: Any = None

    def reads(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            nonlocal last
            if name in reached:  # a module that is called again
                return
            reached.add(name)
            if inputs[0] is last:
                steps[-1] += (name,)
            else:
                steps.append((name,))
                last = inputs[0]

        return hook

    def stacks(parts: tuple[list[str], list[str]]) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            nonlocal last
            last = None
            reached.update(*parts)
            steps.extend(tuple(part) for part in parts)

        return hook

    experts: dict[str, tuple[list[str], list[str]]] = {}
    hooked: dict[str, Callable[..., None]] = {}
    for layer in model.layers:
        if model.places[layer.name].expert is None:
            hooked[layer.name] = reads(layer.name)
        else:
            path, _, part = layer.name.rsplit(".", 2)
            experts.setdefault(path, ([], []))[part == "down_proj"].append(layer.name)
    hooked |= {path: stacks(parts) for path, parts in experts.items()}
    handles = [
        model.module.get_submodule(path).register_forward_pre_hook(hook)
        for path, hook in hooked.items()
    ]
    try:
        model.module.get_decoder()(tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    head = (model.head.name,) if model.head else ()
    first = (layer.name for layer in model.every_layer if layer.name not in {*reached, *head})
    return [tuple(first), *steps, *([head] if head else [])]


@torch.no_grad()
def inputs_in_order(
    model: Model, tokens: Tensor, order: Sequence[Step], lacking: Collection[str]
) -> Iterator[tuple[Step, dict[str, InputStatistics]]]:
    """The steps one after another, each with statistics of its inputs at the time it is reached.

    The caller puts a step's quantized weights in place before it asks for the next one. The model
    must hold its reference weights at first and is left with whatever the caller put there.

    Args:
        tokens: `(sequences, length)`.
        order: of `reading_order`.
        lacking: layers whose statistics are needed; a step without any of them comes without
            statistics, and the walk ends after the last step that has one.
    """
    needed = [not set(lacking).isdisjoint(step) for step in order]
    end = max((place + 1 for place, need in enumerate(needed) if need), default=0)
    if not end:
        return
    yield order[0], WatchedInputs(model, order[0]).statistics
    walk = _Walk(model, tokens)
    depths = {layer.name: LayerGroup((layer,)).depth for layer in model.every_layer}
    outside = 0.0  # what stands in no block stands before all of them, or behind
    for step, need in zip(order[1:end], needed[1:end], strict=True):
        depth = depths[step[0]]
        outside = outside if depth is None else inf
        yield step, walk.statistics(step, outside if depth is None else depth) if need else {}


class _Walk:
    """The calibration text on its way through the blocks.

    Where a block reads more than what the one before it returned, all blocks run each time.
    """

    def __init__(self, model: Model, tokens: Tensor):
        self._model = model
        self._batches = batches(tokens)
        self._blocks: Sequence[nn.Module] = ()
        self._reached = 0  # the block that runs
        self._entering: list[Any] = [None] * len(self._batches)  # what it reads of each batch
        blocks, first = find_blocks(model.module, model.places), tokens[:1]
        with recorded(blocks) as states:
            self._run(first, None)
        if len(states) == len(blocks) > 0 and hand_on_all(
            blocks, states, lambda: self._run(first, None)
        ):
            self._blocks = blocks
            # Nothing enters the first block; the others, which do not run, return something.
            self._entering = [states[0]] * len(self._batches)

    def statistics(self, step: Step, block: float) -> dict[str, InputStatistics]:
        """Of the inputs of a step in that block; beyond the last one the text has left them all."""
        while self._reached < min(block, len(self._blocks)):
            self._leave_block()
        head = self._model.head
        with WatchedInputs(self._model, step) as seen:
            for batch, entering in zip(self._batches, self._entering, strict=True):
                output = self._run(batch, entering)
                if head and head.name in step:
                    seen.add(head.name, output.last_hidden_state)
        return seen.statistics

    def _leave_block(self) -> None:
        """Let the text through the current block, with the weights that it has now."""
        for place, batch in enumerate(self._batches):
            with recorded([self._blocks[self._reached]]) as outputs:
                self._run(batch, self._entering[place])
            self._entering[place] = outputs[0]
        self._reached += 1

    def _run(self, batch: Tensor, entering: Any) -> Any:
        others = [block for place, block in enumerate(self._blocks) if place != self._reached]
        with returning(others, entering):
            return self._model.module.get_decoder()(batch, use_cache=False)
