"""A bank's layers in portions: those that are quantized while their weights and inputs are at hand.

Of a streamed model a portion is what one block lacks, so that one block's weights are in memory,
read once for all its layers, and one block's Gram matrices. A loaded model's weights are there
anyway: a portion is as many blocks as have Gram matrices for a quarter of the memory that is
available, and all layers where nothing asks for inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from mpsearch.device import available_memory_bytes
from mpsearch.flow import BlockWeights
from mpsearch.models import Model
from mpsearch.quantizers import InputStatistics
from mpsearch.text_walk import TextWalk

_MOST_MEMORY = 1 / 4  # of what is available, for Gram matrices of a loaded model


@dataclass(frozen=True, eq=False)
class Portion:
    """Some layers, whose weights are in place until the next portion is asked for.

    Attributes:
        layers: their names.
        statistics: of the inputs of those that read vectors; empty where nothing asks for them.
        walked: share of the way through the blocks that lies behind it.
    """

    layers: Sequence[str]
    statistics: Mapping[str, InputStatistics] = field(default_factory=dict)
    walked: float = 1.0


def portions(
    model: Model,
    layers: Sequence[str],
    lacks: Callable[[str], bool],
    tokens: Tensor | None,
    report: Callable[[int, int], None],
) -> Generator[Portion, None, None]:
    """Portions of some layers in the order of blocks, then those that are in no block.

    Args:
        model: a loaded one must hold its reference weights.
        layers: names of those that are to be quantized.
        lacks: whether a layer still is, asked when its block is reached.
        tokens: `(sequences, length)`, the calibration text, if inputs are asked for; some layer
            has to read vectors then.
        report: called with blocks that the text has left, and in all that it has to.
    Raises:
        ModelError: a calibrated streamed model's blocks hand on more than hidden states.
    """
    if tokens is not None:
        yield from _watched(model, layers, lacks, tokens, report)
    elif model.streamed:
        yield from _read(model, layers, lacks)
    else:
        yield Portion(layers)


def _read(model: Model, layers: Sequence[str], lacks: Callable[[str], bool]) -> Iterator[Portion]:
    """Block by block, with the weights of what is lacking."""
    weights = BlockWeights(model)
    try:
        found = _by_block(layers, weights.depth_of)
        for done, (_, names) in enumerate(found, start=1):
            if lacking := list(filter(lacks, names)):
                weights.hold_layers(lacking)
                yield Portion(lacking, walked=done / len(found))
    finally:
        weights.release()


def _watched(
    model: Model,
    layers: Sequence[str],
    lacks: Callable[[str], bool],
    tokens: Tensor,
    report: Callable[[int, int], None],
) -> Iterator[Portion]:
    """As the text goes through the blocks. It stops behind the last one that lacks something."""
    with TextWalk(model, tokens) as walk:
        if not walk.separable:
            report(0, 1)
            yield Portion(layers, walk.statistics(layers))
            return
        embedding = model.embedding.name if model.embedding else ""  # reads no vectors
        found = _by_block([name for name in layers if name != embedding], walk.depth_of)
        last = max(walk.end if depth is None else depth + 1 for depth, _ in found)
        for together in _within(model, found):
            watched: list[str] = []
            statistics: dict[str, InputStatistics] = {}
            for depth, names in together:
                lacking = list(filter(lacks, names))
                watched += lacking
                while walk.reached < (walk.end if depth is None else depth):
                    report(max(walk.reached, 0), last)
                    walk.leave()
                if depth is None:
                    statistics |= walk.statistics(lacking)
                else:
                    report(depth, last)
                    statistics |= walk.leave(lacking)
            if watched:
                yield Portion(watched, statistics, walk.reached / last)
        if embedding in layers and lacks(embedding):
            yield Portion([embedding])


def _by_block(
    layers: Sequence[str], depth_of: Mapping[str, int]
) -> list[tuple[int | None, list[str]]]:
    """Blocks in order with their layers, at last those that are in none."""
    found: dict[int | None, list[str]] = {}
    for layer in layers:
        found.setdefault(depth_of.get(layer), []).append(layer)
    return sorted(found.items(), key=lambda item: (item[0] is None, item[0] or 0))


def _within(
    model: Model, found: Sequence[tuple[int | None, list[str]]]
) -> Iterator[list[tuple[int | None, list[str]]]]:
    """Blocks that share a portion."""
    most_bytes = 0 if model.streamed else _MOST_MEMORY * available_memory_bytes(model.device)
    columns = {layer.name: layer.columns for layer in model.every_layer}
    together: list[tuple[int | None, list[str]]] = []
    held_bytes = 0
    for block in found:
        own_bytes = sum(4 * columns[name] ** 2 for name in block[1])
        if together and held_bytes + own_bytes > most_bytes:
            yield together
            together, held_bytes = [], 0
        together.append(block)
        held_bytes += own_bytes
    if together:
        yield together
