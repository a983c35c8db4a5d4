"""The model's blocks: find them, record what they return, let them return something else."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


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
