"""The words in which a model family is described: matrices, other tensors, experts.

A size is a name that `mpsearch.architecture` gives a number: `hidden`, `queries` (all heads'
queries together), and so on. A part one of whose sizes is 0 is not there. Blocks are alike but for
how they attend and whether experts take the feed-forward part's place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from mpsearch import family_rules as rules
from mpsearch.config_fields import Fields
from mpsearch.layers import Layer


@dataclass(frozen=True)
class Matrix:
    """A weight `(rows, columns)` that may be quantized.

    Attributes:
        name: its module.
        rows, columns: sizes.
        bias: whether a bias stands beside it, or the field that says so.
    """

    name: str
    rows: str
    columns: str
    bias: bool | str = False


@dataclass(frozen=True)
class Kept:
    """A tensor that is no matrix to quantize: a norm, a router, a bias, a table.

    Attributes:
        name: as in the state dict.
        shape: sizes.
    """

    name: str
    shape: tuple[str, ...]


@dataclass(frozen=True)
class Experts:
    """Gate, up and down of `experts` experts, each `expert_inner` wide.

    Attributes:
        name: their module.
        bias: whether every matrix has a bias; they are stored stacked.
        opaque: whether transformers runs them as one tensor that mpsearch keeps.
    """

    name: str
    bias: bool = False
    opaque: bool = False


Part = Matrix | Kept | Experts


@dataclass(frozen=True)
class Family:
    """One `model_type`.

    Attributes:
        attention, feed_forward, norms: parts of a block.
        experts: parts in the feed-forward part's place, in the blocks that `sparse` says.
        state: parts in the attention's place, in blocks of linear attention.
        trunk, blocks, embedding: modules: the text model without its head, its list of blocks, its
            input embedding.
        beside: parts of the trunk outside its blocks.
        head_bias: whether the output head has one.
        latent: whether tokens are kept as latents.
        names, defaults: see `mpsearch.config_fields.Fields`.
        heads, kinds, sparse, more: see `mpsearch.family_rules`.
    """

    attention: tuple[Part, ...]
    feed_forward: tuple[Part, ...]
    norms: tuple[Part, ...]
    experts: tuple[Part, ...] = ()
    state: tuple[Part, ...] = ()
    trunk: str = "model"
    blocks: str = "layers"
    embedding: str = "embed_tokens"
    beside: tuple[Part, ...] = (Kept("norm.weight", ("hidden",)),)
    head_bias: bool = False
    latent: bool = False
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    heads: Callable[[Fields, int, int], tuple[int, int, int]] = rules.grouped
    kinds: Callable[[Fields, int], list[str]] = rules.all_full
    sparse: Callable[[Fields, int], list[bool]] = rules.no_block
    more: Callable[[Fields, rules.Sizes], dict[str, int]] = rules.no_more


def norms(*names: str, bias: bool = False, size: str = "hidden") -> tuple[Kept, ...]:
    leaves = ("weight", "bias") if bias else ("weight",)
    return tuple(Kept(f"{name}.{leaf}", (size,)) for name in names for leaf in leaves)


def separate(
    bias: bool | str = False,
    out_bias: bool | str | None = None,
    out: str = "o_proj",
    queries: str = "queries",
) -> tuple[Part, ...]:
    """Query, key, value and output each by itself."""
    return (
        Matrix("self_attn.q_proj", queries, "hidden", bias),
        Matrix("self_attn.k_proj", "keys", "hidden", bias),
        Matrix("self_attn.v_proj", "values", "hidden", bias),
        Matrix(f"self_attn.{out}", "hidden", "attended", bias if out_bias is None else out_bias),
    )


def gated(path: str = "mlp", inner: str = "inner", bias: bool | str = False) -> tuple[Part, ...]:
    return (
        Matrix(f"{path}.gate_proj", inner, "hidden", bias),
        Matrix(f"{path}.up_proj", inner, "hidden", bias),
        Matrix(f"{path}.down_proj", "hidden", inner, bias),
    )


def plain(up: str, down: str, bias: bool | str = True) -> tuple[Part, ...]:
    return Matrix(up, "inner", "hidden", bias), Matrix(down, "hidden", "inner", bias)


def fused(path: str, qkv: str, out: str, bias: bool | str = True) -> tuple[Part, ...]:
    return (
        Matrix(f"{path}.{qkv}", "qkv", "hidden", bias),
        Matrix(f"{path}.{out}", "hidden", "attended", bias),
    )


def router(name: str) -> Kept:
    return Kept(f"{name}.weight", ("experts", "hidden"))


@dataclass(frozen=True)
class Expanded:
    """Parts with the numbers of one config.

    Attributes:
        layers: name, rows and columns.
        kept: name and shape.
        idle: parameters among them that one token does not pass.
    """

    layers: Sequence[tuple[str, int, int]]
    kept: Sequence[tuple[str, tuple[int, ...]]]
    idle: int

    @classmethod
    def of(cls, parts: Sequence[Part], fields: Fields, sizes: Mapping[str, int]) -> Expanded:
        layers: list[tuple[str, int, int]] = []
        kept: list[tuple[str, tuple[int, ...]]] = []
        idle = 0
        for part in parts:
            if isinstance(part, Matrix):
                rows, columns = sizes[part.rows], sizes[part.columns]
                if rows and columns:
                    layers.append((part.name, rows, columns))
                    bias = fields.flag(part.bias) if isinstance(part.bias, str) else part.bias
                    kept += [(f"{part.name}.bias", (rows,))] if bias else []
            elif isinstance(part, Kept):
                shape = tuple(sizes[size] for size in part.shape)
                kept += [(part.name, shape)] if all(shape) else []
            else:
                of_experts, beside = _expand_experts(part, sizes)
                layers += of_experts
                kept += beside
                stored = sum(rows * columns for _, rows, columns in of_experts)
                stored += sum(prod(shape) for _, shape in beside)
                idle += stored // sizes["experts"] * (sizes["experts"] - sizes["chosen"])
        return cls(layers, kept, idle)

    def layers_under(self, prefix: str) -> Iterator[Layer]:
        return (Layer(prefix + name, rows, columns) for name, rows, columns in self.layers)

    def kept_under(self, prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        return ((prefix + name, shape) for name, shape in self.kept)


def _expand_experts(
    part: Experts, sizes: Mapping[str, int]
) -> tuple[list[tuple[str, int, int]], list[tuple[str, tuple[int, ...]]]]:
    """The layers of experts, and what is kept of them; all of one block's."""
    experts, hidden, inner = sizes["experts"], sizes["hidden"], sizes["expert_inner"]
    if part.opaque:
        stacks = [("gate_up_proj", hidden, 2 * inner), ("down_proj", inner, hidden)]
        return [], [(f"{part.name}.{name}", (experts, *shape)) for name, *shape in stacks]
    matrices = (("gate_proj", inner, hidden), ("up_proj", inner, hidden))
    layers = [
        (f"{part.name}.{expert}.{name}", rows, columns)
        for expert in range(experts)
        for name, rows, columns in (*matrices, ("down_proj", hidden, inner))
    ]
    biases: list[tuple[str, tuple[int, ...]]] = [
        (f"{part.name}.gate_up_proj_bias", (experts, 2 * inner)),
        (f"{part.name}.down_proj_bias", (experts, hidden)),
    ]
    return layers, biases if part.bias else []
