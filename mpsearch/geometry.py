"""The geometry around a layer: outliers and effective rank of what it reads, drift over its block.

- Outlier ratio: the largest input channel's root mean square over the median's. A few channels far
  above the others are what activation-aware quantizers protect (LLM.int8(), arXiv:2208.07339).
- Effective rank: exp of the entropy of the eigenvalues of the inputs' Gram matrix, as shares of
  their sum; how many directions the inputs use (Roy and Vetterli, EUSIPCO 2007).
- Drift: one minus the cosine between a block's input and its output, averaged over tokens; the
  block influence of ShortGPT (arXiv:2403.03853). Low where a block changes little.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.bank import Report
from mpsearch.blocks import find_blocks
from mpsearch.calibration import WatchedInputs
from mpsearch.errors import CheckError
from mpsearch.forward import Pass
from mpsearch.layers import LayerGroup
from mpsearch.quantizers import InputStatistics
from mpsearch.walk import Walk


@dataclass(frozen=True, eq=False)
class Readings:
    """What the reference's layers read over some facts, each distinct token once.

    Attributes:
        inputs: by layer; an embedding has none.
        drift: by block; empty where the model's blocks are not to be found.
    """

    inputs: dict[str, InputStatistics]
    drift: Mapping[int, float]


def gram_bytes(groups: Iterable[LayerGroup]) -> int:
    """At most so much do the Gram matrices of these groups' inputs take; siblings share one."""
    sides = {
        (group.name, layer.name.rpartition(".")[0]): layer.columns
        for group in groups
        for layer in group.layers
    }
    return sum(4 * side**2 for side in sides.values())


@torch.inference_mode()
def read_inputs(work: Pass, report: Report) -> Readings:
    """One forward of a loaded model's weights in place, usually the reference's.

    Raises:
        CheckError: a layer reads NaN or infinity.
    """
    blocks = find_blocks(work.model.module, work.model.places)
    with WatchedInputs(work.model) as seen, _watched_drift(blocks) as drift:
        for index, row in enumerate(work.rows):
            report("reading inputs", index, len(work.rows))
            work.logits(row)
    report("reading inputs", len(work.rows), len(work.rows))
    return _readings(seen, {depth: total / work.tokens for depth, total in enumerate(drift)})


def read_by_block(
    work: Pass, report: Report, inputs: bool = True
) -> Generator[tuple[Set[str], Readings], None, None]:
    """One forward of the reference, block by block, so that only one block's readings are held.

    Args:
        inputs: whether to read; otherwise the blocks' weights are put in place, and that is all.
    Yields:
        The names of a block's layers, which hold their reference weights meanwhile, and its
        readings; at last the same of the layers in no block.
    Raises:
        CheckError: as `read_inputs`.
    """
    walk, model = Walk(work), work.model
    parts, nothing = len(walk.blocks) + 1, walk.own({})
    if inputs:
        (branch,) = walk.entered([nothing], walk.room())
    left = {layer.name for layer in model.every_layer}
    for depth, _ in walk.fetched(range(len(walk.blocks)), [nothing]):
        report("reading inputs", depth, parts)
        names, readings = set(walk.layers[depth]), Readings({}, {})
        left -= names
        if inputs:
            with (
                WatchedInputs(model, names) as seen,
                _watched_drift([walk.blocks[depth]]) as drift,
            ):
                walk.forward(depth, branch, branch.states)
            readings = _readings(seen, {depth: drift[0] / work.tokens})
        yield names, readings
    report("reading inputs", parts - 1, parts)
    readings = Readings({}, {})
    if inputs and model.head:
        with WatchedInputs(model, [model.head.name]) as seen, torch.no_grad():
            for index, row in enumerate(work.rows):
                walk.behind(row, branch.states[index])
        readings = _readings(seen, {})
    yield left, readings
    report("reading inputs", parts, parts)


def _readings(seen: WatchedInputs, drift: Mapping[int, float]) -> Readings:
    inputs = seen.statistics
    for name, statistics in inputs.items():
        if not statistics.gram.diagonal().isfinite().all():
            raise CheckError(f"the inputs of '{name}' are NaN or infinite; the model is broken")
    return Readings(inputs, drift)


@contextmanager
def _watched_drift(blocks: Sequence[nn.Module]) -> Iterator[list[float]]:
    """One minus the cosine of each block's input and output, summed over tokens meanwhile."""
    sums = [0.0] * len(blocks)

    def watch(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output if isinstance(output, Tensor) else output[0]
            cosine = torch.cosine_similarity(before.float(), after.float(), dim=-1)
            sums[index] += float((1 - cosine).double().sum())

        return hook

    hooks = [
        block.register_forward_hook(watch(index), with_kwargs=True)
        for index, block in enumerate(blocks)
    ]
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()


def outlier_ratio(gram: Tensor) -> float:
    """Of inputs with that `(columns, columns)` Gram matrix; channels that are never used, which
    have no scale, count nowhere.
    """
    used = gram.diagonal()[gram.diagonal() > 0]
    return float((used.max() / used.median()).sqrt()) if len(used) else 1.0


def effective_rank(gram: Tensor) -> float:
    """Of inputs with that Gram matrix: between 1 and its columns; 0 if all are zero."""
    values = torch.linalg.eigvalsh(gram).clamp(min=0.0).double()
    if not values.sum():
        return 0.0
    return float(torch.special.entr(values / values.sum()).sum().exp())


def geometry(
    groups: Sequence[LayerGroup], readings: Readings, report: Report
) -> dict[str, dict[str, float]]:
    """Outlier ratio, effective rank and drift by group, where there is one.

    Of a group with several inputs, such as one of experts, the mean over those that tokens reached.
    """
    found: dict[str, dict[str, float]] = {"outlier_ratio": {}, "effective_rank": {}, "drift": {}}
    for index, group in enumerate(groups):
        report("geometry", index, len(groups))
        if group.depth is not None and group.depth in readings.drift:
            found["drift"][group.name] = readings.drift[group.depth]
        of_layers = [readings.inputs[name] for layer in group.layers
                     if (name := layer.name) in readings.inputs]  # fmt: skip
        reached = [statistics for statistics in of_layers if statistics.tokens > 1] or of_layers
        grams = list({id(statistics.gram): statistics.gram for statistics in reached}.values())
        if grams:
            found["outlier_ratio"][group.name] = sum(map(outlier_ratio, grams)) / len(grams)
            found["effective_rank"][group.name] = sum(map(effective_rank, grams)) / len(grams)
    report("geometry", len(groups), len(groups))
    return found
