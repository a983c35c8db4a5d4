"""What a checkpoint's headers say of where its weights stand, and how wide its blocks are."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch

from mpsearch.architecture import Architecture, read_architecture
from mpsearch.errors import ModelError

_OUTPUTS = re.compile(r"(^|_|\.)(o|out|down|dense|dense_4h_to_h|c|fc2|w2|wo)(_proj)?$")


class Stored(Protocol):
    """A tensor, or what a header says of one."""

    @property
    def shape(self) -> Sequence[int]: ...

    @property
    def dtype(self) -> torch.dtype: ...


@dataclass(frozen=True)
class Contents:
    """How many weights a checkpoint has where, and how wide its blocks are.

    Attributes:
        outside: weights that stand in no block.
        blocks: of each block.
        largest_outside, largest_layer: of the largest tensor outside, and in a block.
        columns: of the widest matrix in a block.
        largest_read: of the largest tensor that is put together in a block: all experts' in one.
        stacked: whether a block's experts are put together so.
        stored_bytes: of a weight in the files, the widest.
        vocabulary, hidden: of the embedding.
        squares: sums over a block's distinct inputs of `columns^2`, the largest block's.
        all_squares: the same of all blocks.
        rows: of all of a block's matrices: what a token's outputs there take.
        architecture: what the config says, where its family is known.
    """

    outside: int
    blocks: tuple[int, ...]
    largest_outside: int
    largest_layer: int
    columns: int
    largest_read: int
    stacked: bool
    stored_bytes: int
    vocabulary: int
    hidden: int
    squares: int
    all_squares: int
    rows: int
    architecture: Architecture | None

    @property
    def inside(self) -> int:
        return sum(self.blocks)

    @property
    def block(self) -> int:
        """Weights of the largest block."""
        return max(self.blocks, default=0)

    @classmethod
    def of(cls, tensors: Mapping[str, Stored], config: Mapping[str, Any]) -> Contents:
        """Of a checkpoint, by its headers, or of a loaded model, by its parameters.

        Args:
            tensors: by name, as `mpsearch.shards.Shards` has them; shared ones once.
            config: the parsed `config.json`.
        """
        outside, blocks = _by_block(tensors)
        tables = [stored.shape for stored in outside.values() if len(stored.shape) == 2]
        vocabulary, hidden = max(tables, key=prod, default=(0, 0))
        squares = [_squares(block) for block in blocks]
        read = [_largest_read(block) for block in blocks]
        try:
            architecture = read_architecture(config, "")
        except ModelError:  # its family is not known there, and is loaded all the same
            architecture = None
        return cls(
            outside=sum(_count(outside.values())),
            blocks=tuple(sum(_count(block.values())) for block in blocks),
            largest_outside=max(_count(outside.values()), default=0),
            largest_layer=max((max(_matrices(block.values())) for block in blocks), default=0),
            columns=max((max(_columns(block.values())) for block in blocks), default=0),
            largest_read=max((weights for weights, _ in read), default=0),
            stacked=any(stacked for _, stacked in read),
            stored_bytes=max((stored.dtype.itemsize for stored in tensors.values()), default=0),
            vocabulary=vocabulary if architecture is None else architecture.vocabulary,
            hidden=hidden,
            squares=max(squares, default=0),
            all_squares=sum(squares),
            rows=max((_rows(block.values()) for block in blocks), default=0),
            architecture=architecture,
        )


def _by_block(
    tensors: Mapping[str, Stored],
) -> tuple[dict[str, Stored], list[dict[str, Stored]]]:
    """What stands in no block, and each block's tensors by their names in it.

    Blocks are the modules of the numbered list that holds most.
    """
    numbered: dict[str, tuple[str, str, str]] = {}
    held: Counter[str] = Counter()
    for name, stored in tensors.items():
        if found := re.match(r"(?:(.*?)\.)?(\d+)\.(.*)", name):
            numbered[name] = (found[1] or "", found[2], found[3])
            held[found[1] or ""] += prod(stored.shape)
    trunk = held.most_common(1)[0][0] if held else None
    blocks: dict[str, dict[str, Stored]] = defaultdict(dict)
    outside: dict[str, Stored] = {}
    for name, stored in tensors.items():
        path, number, within = numbered.get(name, (None, "", ""))
        if name in numbered and path == trunk:
            blocks[number][within] = stored
        else:
            outside[name] = stored
    return outside, list(blocks.values())


def _count(tensors: Iterable[Stored]) -> list[int]:
    return [prod(stored.shape) for stored in tensors]


def _matrices(tensors: Iterable[Stored]) -> list[int]:
    """Weights of each matrix, of a stack of them each one's."""
    return [prod(stored.shape[-2:]) for stored in tensors] or [0]


def _columns(tensors: Iterable[Stored]) -> list[int]:
    return [stored.shape[-1] for stored in tensors if len(stored.shape) >= 2] or [0]


def _rows(tensors: Iterable[Stored]) -> int:
    return sum(max(stored.shape[-2:]) for stored in tensors if len(stored.shape) >= 2)


def _largest_read(block: Mapping[str, Stored]) -> tuple[int, bool]:
    """Weights of the largest tensor that is made of a block's, and whether it is put together.

    Experts that are stored one by one become two stacks: gate with up, and down.
    """
    alone = [prod(stored.shape) for name, stored in block.items() if ".experts." not in f".{name}"]
    experts: Counter[str] = Counter()
    for name, stored in block.items():
        if ".experts." in f".{name}":
            experts[re.sub(r"(?<=\.)\d+(?=\.)", "N", name)] += prod(stored.shape)
    if not any("N" in kind for kind in experts):
        return max([*alone, *experts.values()], default=0), False
    return max([*alone, 2 * max(experts.values())]), True


def _squares(block: Mapping[str, Stored]) -> int:
    """`columns^2` over the distinct inputs of a block's matrices.

    Matrices beside each other that have as many columns read one tensor, but for those that lead
    out of a part; told by their names, and where those say nothing taken apart.
    """
    inputs: dict[tuple[str, int, bool], int] = {}
    for name, stored in block.items():
        path, _, leaf = name.removesuffix(".weight").rpartition(".")
        if len(stored.shape) >= 2:
            columns = stored.shape[-1]
            inputs[path, columns, bool(_OUTPUTS.search(leaf))] = prod(stored.shape[:-2])
    return sum(columns**2 * count for (_, columns, _), count in inputs.items())
