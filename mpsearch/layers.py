"""What may be quantized, and what must share a format."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

_EXPERT = re.compile(r"(.*\bexperts)\.\d+\.")


@dataclass(frozen=True)
class Layer:
    """One weight matrix.

    Attributes:
        name: module path inside the model, without the trailing `.weight`.
        rows: output features.
        columns: input features; quantization groups run along this axis.
        tied: of an embedding, the output head that computes with the same weight, if one does.
    """

    name: str
    rows: int
    columns: int
    tied: str = ""

    @property
    def weights(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True)
class LayerGroup:
    """Layers that get one format together, because a runtime fuses them or the user ties them.

    Siblings, or the experts of one block.
    """

    layers: tuple[Layer, ...]

    @cached_property
    def name(self) -> str:
        """`model.layers.0.self_attn.q_proj+k_proj+v_proj`, or the layer's own name.

        Of experts it is their module's: `model.layers.0.mlp.experts`.
        """
        first, *rest = (layer.name for layer in self.layers)
        parents = {layer.name.rpartition(".")[0] for layer in self.layers}
        experts = {_experts(layer.name) for layer in self.layers}
        if len(parents) > 1 and len(experts) == 1 and (shared := experts.pop()):
            return shared
        return "+".join([first, *(name.rpartition(".")[2] for name in rest)])

    @property
    def weights(self) -> int:
        return sum(layer.weights for layer in self.layers)

    @cached_property
    def shapes(self) -> tuple[tuple[Layer, int], ...]:
        """A layer of each shape and how many have it, two pairs where experts are 768 layers."""
        alike: dict[tuple[int, int, str], list[Layer]] = {}
        for layer in self.layers:
            alike.setdefault((layer.rows, layer.columns, layer.tied), []).append(layer)
        return tuple((layers[0], len(layers)) for layers in alike.values())

    @property
    def depth(self) -> int | None:
        """Index of the block: the first whole number among the name's components."""
        found = re.search(r"\.(\d+)\.", self.name)
        return int(found.group(1)) if found else None

    @property
    def kind(self) -> str:
        """The name below its block: `self_attn.o_proj`; the same for every block."""
        return re.sub(r"^.*?\.\d+\.", "", self.name)


def group_layers(
    layers: Sequence[Layer], ties: Iterable[Sequence[str]], fuse_experts: bool = False
) -> tuple[LayerGroup, ...]:
    """Group siblings (same parent module) whose last names stand together in one tie.

    Args:
        layers: in model order; the groups keep the order of their first member.
        ties: each a list of last name components, such as `("q_proj", "k_proj", "v_proj")`.
        fuse_experts: whether all layers of all experts of a block form one group.
    """
    tie_of = {member: tuple(tie) for tie in ties for member in tie}
    members: dict[tuple[str, object], list[Layer]] = {}
    for layer in layers:
        parent, _, last = layer.name.rpartition(".")
        experts = _experts(layer.name) if fuse_experts else None
        key = (experts, None) if experts else (parent, tie_of.get(last, last))
        members.setdefault(key, []).append(layer)
    return tuple(LayerGroup(tuple(group)) for group in members.values())


def _experts(name: str) -> str | None:
    """The module of a block's experts, if a layer stands under an index in it."""
    found = _EXPERT.match(name)
    return found.group(1) if found else None
