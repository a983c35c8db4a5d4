"""The model's blocks: find them, note how they are called and what they return, or let them return
something else."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.places import Place


def find_blocks(module: Any, layers: Iterable[str]) -> list[nn.Module]:
    """The model's blocks in order; empty if its layers are not numbered in one list of modules.

    Args:
        module: a transformers model.
        layers: names of all layers, and whatever else is in no block.
    """
    numbered = (re.match(r"(.*?)\.\d+\.", name) for name in layers)
    paths = {found.group(1) for found in numbered if found}
    blocks = module.get_submodule(paths.pop()) if len(paths) == 1 else None
    return list(blocks) if isinstance(blocks, nn.ModuleList) else []


def block_parameters(module: nn.Module, blocks: Iterable[nn.Module]) -> list[list[str]]:
    """Of each block the names that its parameters have in the model, shared ones once."""
    paths = {id(child): path for path, child in module.named_modules()}
    return [
        [f"{paths[id(block)]}.{name}" for name, _ in block.named_parameters()] for block in blocks
    ]


def within_blocks(
    module: nn.Module, blocks: Iterable[nn.Module], places: Mapping[str, Place]
) -> dict[str, tuple[int, str]]:
    """Of each layer that is in a block: which one, and the name of the parameter it lies in."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    found = {
        id(parameters[name]): (depth, name)
        for depth, names in enumerate(block_parameters(module, blocks))
        for name in names
    }
    parts = ((layer, id(place.parameter)) for layer, place in places.items())
    return {layer: found[part] for layer, part in parts if part in found}


@contextmanager
def recorded(blocks: Sequence[nn.Module]) -> Iterator[list[Any]]:
    """A list into which everything goes that these blocks return meanwhile."""
    outputs: list[Any] = []
    hooks = [block.register_forward_hook(lambda *call: outputs.append(call[2])) for block in blocks]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def returning(blocks: Sequence[nn.Module], output: Any) -> Iterator[None]:
    """These blocks return `output` meanwhile and compute nothing.

    Masks, positions and everything around the blocks stay the model's own.
    """
    try:
        for block in blocks:
            vars(block)["forward"] = lambda *_, **__: output
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)  # the class's own shows again


@dataclass(frozen=True, eq=False)
class Call:
    """What a model calls one of its blocks with, beside hidden states, which come first."""

    others: tuple[Any, ...]
    named: Mapping[str, Any]

    def of(self, block: nn.Module, state: Tensor) -> Tensor:
        """What a block makes of hidden states `(1, tokens, hidden)`."""
        output = block(state, *self.others, **self.named)
        made: Tensor = output[0] if isinstance(output, tuple) else output
        return made


@contextmanager
def called(
    blocks: Sequence[nn.Module], as_tuple: bool = False
) -> Iterator[list[tuple[Tensor, Call]]]:
    """A list of how these blocks are called meanwhile; they return the states that they are given.

    Args:
        as_tuple: whether they return them in a tuple.
    """
    calls: list[tuple[Tensor, Call]] = []

    def note(state: Tensor, *others: Any, **named: Any) -> Any:
        calls.append((state, Call(others, named)))
        return (state,) if as_tuple else state

    try:
        for block in blocks:
            vars(block)["forward"] = note
        yield calls
    finally:
        for block in blocks:
            vars(block).pop("forward", None)


def hand_on_all(
    blocks: Sequence[nn.Module], states: Sequence[Any], run: Callable[[], object]
) -> bool:
    """Whether each block but the first needs nothing but what the one before it returned.

    Each is run alone and must return the same to the bit. Not so where a block reads what an
    earlier one left elsewhere, such as its keys and values.

    Args:
        states: what the blocks return in a whole pass.
        run: that pass.
    """
    try:
        for block, (before, after) in zip(blocks[1:], pairwise(states), strict=True):
            others = [other for other in blocks if other is not block]
            with returning(others, before), recorded([block]) as alone:
                run()
            if not _same(alone[0], after):
                return False
    except LookupError:  # what an earlier block should have left is not there
        return False
    return True


def parts(output: Any) -> tuple[Any, ...]:
    """What a block returned, one thing or several."""
    return output if isinstance(output, tuple) else (output,)


def _same(a: Any, b: Any) -> bool:
    """Whether two outputs of a block are equal to the bit."""
    return len(parts(a)) == len(parts(b)) and all(
        torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x is y
        for x, y in zip(parts(a), parts(b), strict=True)
    )
