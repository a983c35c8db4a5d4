"""Gradients of layers' weights, by recomputation where a model's blocks have no room.

A loaded model keeps what all its blocks computed for a row, and goes back through them, if memory
has room for that. Of another (`mpsearch.walk`) no more is kept than what entered each block. Then,
block by block from the last, each row is run through the block once more, and the gradient of what
leaves it gives those of the block's weights and of what entered it, which is what left the block
before.

The graph is cut between blocks, and the same kernels get the same numbers in the same order, so
both ways agree to the bit. Only of a tied embedding they do not: it gets two gradients, of the head
and of the lookup, whose sum the loaded model gives.

Held at a time: two blocks, the gradients of one or two, and what entered every block, with as much
again as enters one for each scalar; these lie on disk above a limit.

Source: recomputation from kept inputs, Chen et al. (arXiv:1604.06174).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace

import torch
from torch import Tensor

from mpsearch.device import available_memory_bytes, require_memory, return_freed_memory
from mpsearch.errors import ModelError
from mpsearch.forward import Pass, PreparedRow, differentiable
from mpsearch.states import States
from mpsearch.walk import Branch, Held, Supply, Walk

Scalars = Callable[[PreparedRow, Tensor], Sequence[Tensor]]
"""Of a row and its `(read nodes, vocab)` logits, the scalars whose gradients are wanted."""

Sample = tuple[int, int, Mapping[str, Tensor]]
"""A row's index, the number of one of its scalars, and layer to its gradient `(rows, columns)`."""

Samples = Generator[Sample, None, None]
"""Of one part of a model, row after row."""

Parts = Generator[Samples, None, None]
"""Of one part of a model after another."""

Progress = Callable[[int, int], None]
"""Gets how much is done, and of how much: rows of a loaded model, or parts of a streamed one."""

_Ends = tuple[Tensor | None, Sequence[tuple[Tensor, Tensor | None]]]
"""What a part computed for a row from what entered it, with the gradient of each of its results."""


SLICE = 2**20  # weights of which float32 copies are made at once: these stay near the processor


def products(gradients: Sequence[Tensor], weight: Tensor) -> Tensor:
    """Derivatives along a weight: of each gradient the sum of its products with it.

    Args:
        gradients: `(rows, columns)` each, on one device.
        weight: the same shape.
    Returns:
        `(gradients,)` float32 on their device. Whether some are given together or alone changes
        nothing.
    """
    total = torch.zeros(len(gradients), device=weight.device)
    rows = max(1, SLICE // weight.shape[1])
    for start in range(0, len(weight), rows):
        part = weight[start : start + rows].float().flatten()
        total += torch.stack([g[start : start + rows].float().flatten() @ part for g in gradients])
    return total


def _unheard(done: int, total: int) -> None:
    pass


def gradients(
    work: Pass,
    held: Held,
    layers: Sequence[str],
    scalars: Scalars,
    *,
    most: int = 1,
    report: Progress = _unheard,
) -> Parts:
    """Gradients of some scalars of each row, a part of the model after another.

    A loaded model for which there is room is one part. The parts of another are what is behind its
    blocks, each block from the last to the first, and what is before them.

    Args:
        held: what a streamed model's layers hold; a loaded one holds what it holds.
        layers: whose gradients are wanted.
        most: scalars of a row at most.
    Yields:
        For each part its rows in order, each with its scalars in order. Take all of a part before
        the next. What a layer of the part holds is in place meanwhile; close what is broken off.
    Raises:
        ResourceError: hidden states fill the disk, or there is no room for a loaded model whose
            blocks cannot be gone through one at a time.
    """
    backward = _by_block(work, layers)
    if backward is None:
        with closing(_whole(work, layers, scalars, report)) as samples:
            yield samples
        return
    held = held if work.model.streamed else {}
    yield from backward.parts(held, layers, scalars, most=most, report=report)


def _whole_bytes(work: Pass, layers: Sequence[str]) -> int:
    """Of the graph of all blocks, of logits, and of each layer a gradient and its sum."""
    model = work.model
    wanted, tokens = set(layers), max(row.inputs["input_ids"].shape[1] for row in work.rows)
    weights = sum(layer.weights for layer in model.every_layer if layer.name in wanted)
    graph = tokens * 2 * sum(layer.rows + layer.columns for layer in model.layers)
    logits = tokens * len(model.tokenizer) * 4  # numbers, in float32
    return (weights + graph) * model.dtype.itemsize + (weights + logits) * 4


def _has_room(needed_bytes: int, device: torch.device) -> bool:
    if needed_bytes <= available_memory_bytes(device):
        return True
    return_freed_memory(device)  # an allocator may have kept what an earlier pass took
    return needed_bytes <= available_memory_bytes(device)


def _by_block(work: Pass, layers: Sequence[str]) -> Backward | None:
    """What goes back block by block; None where all goes at once.

    A layer beside the blocks that is neither embedding nor head may reach them by other ways than
    the hidden states, so a loaded model goes back through it at once or not at all.
    """
    model = work.model
    if model.streamed:
        return Backward(work)
    if _has_room(needed_bytes := _whole_bytes(work, layers), model.device):
        return None
    with suppress(ModelError):
        backward = Backward(work)
        beside = {layer.name for layer in (model.embedding, model.head) if layer is not None}
        if not set(layers).difference(beside, *backward.layers):
            return backward
    require_memory(needed_bytes, model.device, "going back through the model at once")
    return None


def _whole(work: Pass, layers: Sequence[str], scalars: Scalars, report: Progress) -> Samples:
    """Of a loaded model: one graph a row."""

    def ends(index: int, row: PreparedRow) -> _Ends:
        report(index, len(work.rows))
        return None, [(scalar, None) for scalar in scalars(row, work.logits(row))]

    yield from _samples(work, layers, ends)
    report(len(work.rows), len(work.rows))


class Backward:
    """Gradients of a model whose blocks are fetched one at a time.

    Args:
        work, supply, states_bytes: as of `Walk`.
    Raises:
        ModelError: as `Walk`.
    """

    def __init__(self, work: Pass, supply: Supply | None = None, states_bytes: int | None = None):
        self._work = work
        self._walk = Walk(work, supply, states_bytes)

    @property
    def layers(self) -> list[list[str]]:
        """Names of each block's layers."""
        return self._walk.layers

    def parts(
        self,
        held: Held,
        layers: Sequence[str],
        scalars: Scalars,
        *,
        most: int = 1,
        report: Progress = _unheard,
    ) -> Parts:
        """As `gradients` of a streamed model."""
        walk, own, wanted = self._walk, self._walk.own(held), set(layers)
        inside = [[layer for layer in names if layer in wanted] for names in walk.layers]
        outside = wanted.difference(*inside)
        head, embedding = self._work.model.head, self._work.model.embedding
        in_front = sorted(outside - ({head.name} if head else set()))
        untied = {embedding.name} if embedding and not embedding.tied else set()
        total = 2 * len(walk.blocks) + 1 + bool(in_front)
        reports = iter(range(total + 1))
        report(next(reports), total)

        room = walk.room()
        (branch,) = walk.entered([own], room)
        entered = [branch.states]
        for depth, packed in walk.fetched(range(len(walk.blocks)), [own]):
            entered.append(room.states(branch.states_bytes))
            with walk.inside(depth, own, packed):
                walk.forward(depth, replace(branch, states=entered[-2]), entered[-1])
            del packed
            report(next(reports), total)

        gradients = room.states(most * branch.states_bytes)
        last = sorted(outside - untied)
        with (
            walk.outside(own.get(None, ())),
            closing(self._behind(last, scalars, entered.pop(), gradients)) as samples,
        ):
            yield samples
        report(next(reports), total)
        for depth, packed in walk.fetched(range(len(walk.blocks))[::-1], [own]):
            states, layers = entered.pop(), inside[depth]
            with (
                walk.inside(depth, own, packed),
                closing(self._through(depth, layers, branch, states, gradients)) as samples,
            ):
                yield samples
            del packed
            report(next(reports), total)
        if in_front:
            with (
                walk.outside(own.get(None, ())),
                closing(self._in_front(in_front, gradients)) as samples,
            ):
                yield samples
            report(next(reports), total)

    def _behind(
        self, layers: Sequence[str], scalars: Scalars, states: States, gradients: States
    ) -> Samples:
        """Of norm and head."""

        def ends(index: int, row: PreparedRow) -> _Ends:
            state = states[index].detach().requires_grad_()
            found = scalars(row, self._walk.behind(row, state))
            return state, [(scalar, None) for scalar in found]

        return _samples(self._work, layers, ends, gradients)

    def _through(
        self,
        depth: int,
        layers: Sequence[str],
        branch: Branch,
        states: States,
        gradients: States,
    ) -> Samples:
        """Of one block."""
        block = self._walk.blocks[depth]

        def ends(index: int, row: PreparedRow) -> _Ends:
            state = states[index].detach().requires_grad_()
            if index not in gradients:  # nothing was asked of this row
                return state, []
            left = branch.calls[index][depth].of(block, state)
            return state, [(left, gradient) for gradient in gradients[index]]

        return _samples(self._work, layers, ends, gradients)

    def _in_front(self, layers: Sequence[str], gradients: States) -> Samples:
        """Of what makes tokens hidden states."""

        def ends(index: int, row: PreparedRow) -> _Ends:
            if index not in gradients:
                return None, []
            state, _ = self._walk.entering(row)
            return None, [(state, g) for g in gradients[index]] if state.requires_grad else []

        return _samples(self._work, layers, ends)


@torch.enable_grad()
def _samples(
    work: Pass,
    layers: Sequence[str],
    ends: Callable[[int, PreparedRow], _Ends],
    gradients: States | None = None,
) -> Samples:
    """Gradients in one part of a model, row by row.

    Args:
        layers: of that part.
        ends: runs the part on a row.
        gradients: where those of what entered go, one under another; read by `ends` before.
    """
    places = {layer: work.model.places[layer] for layer in layers}
    parameters = list(dict.fromkeys(place.parameter for place in places.values()))
    with differentiable(parameters):
        for index, row in enumerate(work.rows):
            state, results = ends(index, row)
            of_state = []
            for number, (result, gradient) in enumerate(results):
                found = torch.autograd.grad(
                    # An expert in a module of its own that no token enters is not used.
                    result, [*parameters, *([] if state is None else [state])], gradient,
                    retain_graph=number + 1 < len(results), allow_unused=True,
                    materialize_grads=True,
                )  # fmt: skip
                if state is not None:
                    of_state.append(found[-1])
                of = dict(zip(parameters, found, strict=False))
                yield (
                    index,
                    number,
                    {layer: place.part(of[place.parameter]) for layer, place in places.items()},
                )
                del found, of
            if gradients is not None and of_state:
                gradients[index] = torch.stack(of_state)
