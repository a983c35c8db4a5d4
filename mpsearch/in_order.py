"""What each layer reads once the layers before it are quantized, a step at a time.

GPTQ implementations quantize so: blocks in order, and in a block what reads one tensor together
(query, key and value; then the output; then gate and up; then down), each step by inputs that
passed through everything quantized before it (Frantar et al., arXiv:2210.17323, section 4).

One step's statistics are in memory at a time. Between steps only what entered the current block is
kept, `sequences x length x hidden` numbers, and only that block runs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.calibration import WatchedInputs
from mpsearch.flow import flowing
from mpsearch.models import Model
from mpsearch.quantizers import InputStatistics
from mpsearch.text_walk import BEFORE, TextWalk

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
        with flowing(model):
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

    The caller puts a step's quantized weights in place before it asks for the next one. A loaded
    model must hold its reference weights at first and is left with whatever the caller put there;
    a block of a streamed one has its weights from its first step until the text has left it.

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
    with TextWalk(model, tokens) as walk:
        for step, need in zip(order[1:end], needed[1:end], strict=True):
            depth = walk.depth_of.get(step[0])
            if depth is not None:
                walk.reach(depth)
            elif walk.reached > BEFORE:  # what stands in no block stands before all, or behind
                walk.reach(walk.end)
            yield step, walk.statistics(step) if need else {}
