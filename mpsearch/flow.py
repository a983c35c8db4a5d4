"""Weights of a streamed model's blocks in their places: for as long as they are needed, or while
the model runs.

`flowing` lets such a model run as a loaded one does: each block gets its weights when it is called
and loses them when it has returned. One run reads every block once, so it pays where a call carries
all there is, such as the newest tokens of many texts. Where there is more to do in a block,
`BlockWeights` holds them there until it is done.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mpsearch.blocks import block_parameters, find_blocks, within_blocks
from mpsearch.models import Model


def is_placeholder(tensor: Tensor) -> bool:
    """Whether it is what a streamed model has in the place of a weight: one value, seen
    everywhere."""
    return tensor.untyped_storage().nbytes() < tensor.nbytes


class BlockWeights:
    """The weights of one block of a streamed model at a time; of a loaded model they stay.

    Args:
        model: whose blocks hold placeholders, or its reference weights.
    Attributes:
        blocks: in order; empty if they stand in no list.
        depth_of: layer to the index of its block, for layers that are in one.
    """

    def __init__(self, model: Model):
        self._checkpoint = model.checkpoint
        self.blocks = find_blocks(model.module, model.places)
        self._names = block_parameters(model.module, self.blocks)
        parameters = dict(model.module.named_parameters(remove_duplicate=False))
        self._parameters = {name: parameters[name] for names in self._names for name in names}
        self._placeholders = {name: part.data for name, part in self._parameters.items()}
        self._held: tuple[str, ...] = ()
        within = within_blocks(model.module, self.blocks, model.places)
        self._parameter_of = {layer: name for layer, (_, name) in within.items()}
        self.depth_of = {layer: depth for layer, (depth, _) in within.items()}

    def read(self, depth: int) -> Mapping[str, Tensor]:
        """The parameters of a block by name; none of a loaded model, which has them."""
        return {} if self._checkpoint is None else self._checkpoint.read(self._names[depth])

    def hold(self, depth: int) -> None:
        """Let a block have its weights, and no other."""
        self.release()
        self.put(self.read(depth))

    def hold_layers(self, layers: Collection[str]) -> None:
        """Let the parameters of these layers have their weights, and no others.

        The layers of a stack of experts are in one parameter, which is read once.
        """
        self.release()
        if self._checkpoint is not None:
            names = dict.fromkeys(
                self._parameter_of[layer] for layer in layers if layer in self._parameter_of
            )
            self.put(self._checkpoint.read(names))

    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Let parameters have weights that were read before."""
        self._held = tuple(weights)
        for name, tensor in weights.items():
            self._parameters[name].data = tensor

    def release(self) -> None:
        """Take away what a block holds, whatever was put in its place meanwhile."""
        for name in self._held:
            self._parameters[name].data = self._placeholders[name]
        self._held = ()


@contextmanager
def flowing(model: Model) -> Iterator[None]:
    """The model runs as a loaded one meanwhile: of a streamed model each block holds its weights
    while it computes, and those of the next one are read at the same time.

    Blocks that are made to return something else (`mpsearch.blocks.returning`) read nothing.
    """
    if not model.streamed:
        yield
        return
    weights = BlockWeights(model)
    with ThreadPoolExecutor(1, "fetch") as ahead:
        hooks = _Hooks(weights, lambda depth: ahead.submit(weights.read, depth))
        try:
            yield
        finally:
            hooks.remove()


class _Hooks:
    """Before and after each block's own computation."""

    def __init__(self, weights: BlockWeights, fetch: Callable[[int], Future[Mapping[str, Tensor]]]):
        self._weights, self._fetch = weights, fetch
        self._next, self._fetching = 0, fetch(0)
        self._handles: list[RemovableHandle] = []
        for depth, block in enumerate(weights.blocks):
            self._handles += [
                block.register_forward_pre_hook(self._before(depth)),
                block.register_forward_hook(self._after, always_call=True),
            ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._weights.release()

    def _before(self, depth: int) -> Callable[[nn.Module, Any], None]:
        def hook(block: nn.Module, inputs: Any) -> None:
            if "forward" in vars(block):
                return
            if depth != self._next:
                self._fetching = self._fetch(depth)
            self._weights.put(self._fetching.result())
            self._next = (depth + 1) % len(self._weights.blocks)
            self._fetching = self._fetch(self._next)

        return hook

    def _after(self, *_: Any) -> None:
        self._weights.release()
