"""Where each layer's weight lives inside its model, and why other weights are no layers.

A linear's parameter is its weight. GPT-2's Conv1D holds it transposed. transformers stores the
experts of a block stacked in two parameters, `(experts, gate and up rows, columns)` and the same
for down; a checkpoint and its runtimes see three matrices an expert, and so do we.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

UNRECOGNISED = "not recognised"


@dataclass(frozen=True, eq=False)
class Place:
    """One layer's weight inside a parameter of the model.

    Attributes:
        parameter: of one layer, or of all experts of a block.
        loaded: the parameter's tensor as it was when the place was found; never written to.
        transposed: whether it is stored `(columns, rows)`.
        expert: index in a stacked parameter; None where the parameter is this layer's alone.
        rows: which of the expert's rows are the layer's.
        tied: of an embedding, the output head that shares the parameter, if one does.
    """

    parameter: nn.Parameter
    loaded: Tensor
    transposed: bool = False
    expert: int | None = None
    rows: slice = field(default_factory=lambda: slice(None))
    tied: str = ""

    def part(self, tensor: Tensor) -> Tensor:
        """The layer's `(rows, columns)` view of a tensor shaped like the parameter.

        That is its weight, or its gradient.
        """
        if self.expert is not None:
            tensor = tensor[self.expert]
        return (tensor.t() if self.transposed else tensor)[self.rows]

    @property
    def is_linear(self) -> bool:
        """Whether it is stored as a linear's weight, the only way that checkpoints quantize."""
        return not self.transposed and self.expert is None

    @property
    def weight(self) -> Tensor:
        """The `(rows, columns)` weight that the model computes with now."""
        return self.part(self.parameter.data)

    @property
    def original(self) -> Tensor:
        """The `(rows, columns)` weight as loaded."""
        return self.part(self.loaded)

    def put(self, weight: Tensor) -> None:
        """Let the model compute with another `(rows, columns)` weight of its dtype and device.

        A layer of its own points at the tensor given. An expert is copied into a working copy of
        its stack, which is made on the first such call and dropped by `restore`.
        """
        if self.expert is None:
            self.parameter.data = weight.t() if self.transposed else weight
            return
        if self.parameter.data_ptr() == self.loaded.data_ptr():
            self.parameter.data = self.loaded.clone()
        self.weight.copy_(weight)

    def restore(self) -> None:
        """Point the parameter, and with it all experts of a stack, at the tensor as loaded."""
        self.parameter.data = self.loaded


def find_places(module: Any) -> dict[str, Place]:
    """Layer name to place, in model order: what may be quantized.

    Those are the text model's linears, Conv1Ds and stacked experts, without the output head,
    whatever shares its weight with an embedding, and the routers of mixtures of experts. A weight
    that several modules share is one layer. An expert's layers are called `gate_proj`, `up_proj`
    and `down_proj`, below the experts' module and the expert's index.

    Args:
        module: a transformers model.
    """
    from transformers.pytorch_utils import Conv1D

    taken = {id(weight) for weight in (_head_weight(module), *_embedding_weights(module))}
    text = _text_path(module)
    found: dict[str, Place] = {}
    for name, child in module.named_modules():
        if _outside(text, name) or _is_router(module, name):
            continue
        if isinstance(child, nn.Linear | Conv1D):
            weight: Any = child.weight
            if id(weight) not in taken:
                taken.add(id(weight))
                found[name] = Place(weight, weight.data, isinstance(child, Conv1D))
        elif _stacks_experts(child):
            found.update(_expert_places(name, child))
    return found


def find_embedding(module: Any) -> dict[str, Place]:
    """The input embedding by its name, which a tied head shares; empty if it is no plain table.

    Args:
        module: a transformers model.
    """
    embedding = module.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding):
        return {}
    head = module.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    weight: Any = embedding.weight
    place = Place(weight, weight.data, tied=_path(module, head) if tied else "")
    return {_path(module, embedding): place}


def find_head(module: Any) -> dict[str, Place]:
    """The output head by its name; empty if it has no weight of its own, or is no linear.

    Args:
        module: a transformers model.
    """
    head = module.get_output_embeddings()
    shared = {id(weight) for weight in _embedding_weights(module)}
    if not isinstance(head, nn.Linear) or id(head.weight) in shared:
        return {}
    weight: Any = head.weight
    return {_path(module, head): Place(weight, weight.data)}


def why_kept(module: Any, names: Iterable[str]) -> dict[str, str]:
    """For each name of the state dict the reason for which that tensor is no layer.

    A reason starts with `UNRECOGNISED` if nothing here knows that kind of weight.
    """
    text = _text_path(module)
    return {name: _reason(module, text, name) for name in names}


def _reason(module: Any, text: str, name: str) -> str:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    tensor = getattr(owner, leaf)
    if owner is module.get_output_embeddings() and leaf == "weight":
        return "output head"
    if outside := _outside(text, path):
        return f"{outside.replace('_', ' ')}, outside the text model"
    if isinstance(owner, nn.Embedding):
        shared = tensor is _head_weight(module)
        return "embedding, shared with the output head" if shared else "embedding"
    if leaf in owner._buffers:
        return "buffer"
    if leaf.endswith("bias"):
        return "bias"
    if _is_router(module, path):
        return "router"
    if "norm" in type(owner).__name__.lower():
        return "norm"
    if tensor.ndim < 2:
        return "vector"
    return f"{UNRECOGNISED}: {tensor.ndim}-D '{leaf}' of {type(owner).__name__}"


def expert_inputs(
    experts: Any, hidden: Tensor, chosen: Tensor
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """What each expert's matrices read: its index, gate's and up's input, down's input.

    Args:
        experts: a module that stacks experts, holding any weights.
        hidden: `(tokens, hidden)`, its first argument.
        chosen: `(tokens, experts a token)` indices, its second argument.
    Yields:
        For every expert that a token reached, `(its tokens, hidden)` and
        `(its tokens, intermediate)`.
    """
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    weights = getattr(experts, first)
    for expert in torch.unique(chosen).tolist():
        inputs = hidden[(chosen == expert).any(-1)]
        weight = weights[expert]
        inner = inputs @ (weight if experts.is_transposed else weight.t())
        if experts.has_bias:
            inner = inner + getattr(experts, f"{first}_bias")[expert]
        gated = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
        yield expert, inputs, gated


def _stacks_experts(module: nn.Module) -> bool:
    """Whether the module follows transformers' experts interface, which sets these attributes."""
    return all(
        hasattr(module, attribute)
        for attribute in ("is_transposed", "is_concatenated", "has_gate", "has_bias", "down_proj")
    )


def _expert_places(name: str, module: Any) -> Iterator[tuple[str, Place]]:
    """Expert by expert: gate and up (one after the other, or row by row in turns), then down."""
    parts: list[tuple[str, nn.Parameter, slice]] = []
    if module.has_gate:
        stack = module.gate_up_proj
        half = stack.shape[2 if module.is_transposed else 1] // 2
        concatenated = module.is_concatenated
        parts += [
            ("gate_proj", stack, slice(half) if concatenated else slice(0, None, 2)),
            ("up_proj", stack, slice(half, None) if concatenated else slice(1, None, 2)),
        ]
    else:
        parts.append(("up_proj", module.up_proj, slice(None)))
    parts.append(("down_proj", module.down_proj, slice(None)))
    for expert in range(len(module.down_proj)):
        for part, stack, rows in parts:
            place = Place(stack, stack.data, module.is_transposed, expert, rows)
            yield f"{name}.{expert}.{part}", place


def _head_weight(module: Any) -> Tensor | None:
    head = module.get_output_embeddings()
    return None if head is None else head.weight


def _path(module: Any, wanted: nn.Module) -> str:
    return next(str(name) for name, child in module.named_modules() if child is wanted)


def _embedding_weights(module: Any) -> list[Tensor]:
    return [child.weight for child in module.modules() if isinstance(child, nn.Embedding)]


def _text_path(module: Any) -> str:
    """Path of the text model inside a multimodal wrapper; empty where all of it is text."""
    config = module.config
    if config.get_text_config(decoder=True) is config:
        return ""
    return _path(module, module.get_decoder())


def _outside(text: str, path: str) -> str | None:
    """The name beside the text model that a path lies under; None inside it and above it."""
    if not text or not path or f"{path}.".startswith(f"{text}.") or text.startswith(f"{path}."):
        return None
    above = text.rpartition(".")[0]
    return path.removeprefix(f"{above}.").partition(".")[0]


def _is_router(module: Any, path: str) -> bool:
    """Whether a path is, or lies in, a gate or router beside the experts of a block."""
    parts = path.split(".")
    for depth, part in enumerate(parts):
        if re.fullmatch(r"\w*(gate|router)", part):
            block = module.get_submodule(".".join(parts[:depth]))
            children = block.named_children()
            return any(name == "experts" or _stacks_experts(child) for name, child in children)
    return False
