"""A model whose blocks hold no weights: built from its config, its weights read when they are asked
for.

Embedding, norms, head and all else outside the blocks are in memory as in a loaded model. A block's
parameters are placeholders, one NaN seen at every index, which take no memory and let nothing run
by mistake unnoticed. `Checkpoint` gives the tensors to put in their place, made by transformers'
own renaming and conversion, as a loaded model has them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.blocks import find_blocks
from mpsearch.device import compute_dtype, pick_device
from mpsearch.errors import ModelError
from mpsearch.models import (
    ATTENTION,
    Model,
    check_folder,
    config_of,
    fingerprint_of,
    layers_at,
    loader,
    locate,
    one_line,
    read_tokenizer,
    require_finite,
)
from mpsearch.places import find_embedding, find_head, find_places, why_kept
from mpsearch.shards import Shards


@dataclass(frozen=True, eq=False)
class _Recipe:
    """Stored tensors that together make some of a model's.

    Attributes:
        target: name of the first that they make.
        sources: a stored name each, and the converter's pattern that it matched.
        converter: of transformers; None where one tensor is the other under its name.
    """

    target: str
    sources: tuple[tuple[str, str | None], ...]
    converter: Any

    def make(self, module: Any, read: dict[str, Tensor]) -> dict[str, Tensor]:
        """Name to tensor.

        Args:
            read: every source's tensor; taken out, so that none is held beside what it becomes.
        """
        if self.converter is None:
            return {self.target: read.pop(self.sources[0][0])}
        converter = deepcopy(self.converter)
        for source, pattern in self.sources:
            converter.add_tensor(self.target, source, pattern, read.pop(source))
        made = converter.convert(self.target, model=module, config=module.config)
        return {name: part[0] if isinstance(part, list) else part for name, part in made.items()}


class Checkpoint:
    """A model's parameters and stored buffers, each read from the shards when it is asked for.

    Args:
        name: of the model, for messages.
        module: a transformers model, whose weights may be anywhere.
        shards: what it is stored in.
        device, dtype: of the parameters that are read; values have bf16 precision either way.
    Attributes:
        read_bytes: stored bytes that have been read so far.
    Raises:
        ModelError: the shards lack a tensor of the model, or have it in another shape.
    """

    def __init__(
        self, name: str, module: Any, shards: Shards, device: torch.device, dtype: torch.dtype
    ):
        self.read_bytes = 0
        self._module, self._shards, self._device, self._dtype = module, shards, device, dtype
        wanted = module.state_dict()
        exact = module._keep_in_fp32_modules_strict or ()
        self._buffer_dtypes = {
            buffer: torch.float32 if any(part in buffer for part in exact) else tensor.dtype
            for buffer, tensor in module.named_buffers()
            if buffer in wanted
        }
        self._recipe_of: dict[str, _Recipe] = {}
        shapes: dict[str, torch.Size] = {}
        for recipe in _recipes(module, shards):
            empty = {source: shards[source].empty for source, _ in recipe.sources}
            for target, tensor in recipe.make(module, empty).items():
                self._recipe_of[target], shapes[target] = recipe, tensor.shape
        self._stored_as = _stored_as(module, self._recipe_of)
        lacking = [key for key in wanted if self._stored_as.get(key, key) not in self._recipe_of]
        if lacking:
            raise ModelError(
                f"model '{name}': its checkpoint lacks '{lacking[0]}' and {len(lacking) - 1} more "
                "weights that its architecture has; get it again"
            )
        for target, shape in shapes.items():
            if target in wanted and shape != wanted[target].shape:
                raise ModelError(
                    f"model '{name}': its checkpoint has '{target}' as {tuple(shape)} and its "
                    f"config asks for {tuple(wanted[target].shape)}; get both again"
                )

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Parameters and stored buffers by their names in the model, as it computes with them."""
        plain = self.read_plain(names, self._device)
        return {
            name: tensor if name in self._buffer_dtypes else tensor.to(self._dtype)
            for name, tensor in plain.items()
        }

    def read_plain(
        self, names: Iterable[str], device: torch.device | None = None
    ) -> dict[str, Tensor]:
        """The same in bf16, and on the CPU unless told otherwise.

        Raises:
            ModelError: a file has changed since it was opened.
        """
        stored_as = {name: self._stored_as.get(name, name) for name in names}
        made: dict[str, Tensor] = {}
        for recipe in dict.fromkeys(self._recipe_of[name] for name in stored_as.values()):
            sources = [source for source, _ in recipe.sources]
            self.read_bytes += sum(self._shards[source].nbytes for source in sources)
            # A buffer may need more precision than a weight.
            dtype = self._buffer_dtypes.get(recipe.target, torch.bfloat16)
            made |= recipe.make(self._module, self._shards.read(sources, device, dtype))
        return {name: made[stored] for name, stored in stored_as.items()}


def _recipes(module: Any, shards: Shards) -> Iterator[_Recipe]:
    """What is to be done with the stored tensors to get the model's, as transformers says.

    Its loader takes one pass over all of them; here are the same steps, model tensor by tensor.

    Source: `convert_and_load_state_dict_in_model` of transformers 5.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(module)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    prefix, wanted = module.base_model_prefix, module.state_dict()
    sources: dict[str, list[tuple[str, str | None]]] = {}
    for stored in sorted(shards, key=dot_natural_key):
        target, pattern = rename_source_key(stored, renamings, converters, prefix, wanted)
        if target not in wanted and stored in wanted:
            target, pattern = rename_source_key(stored, [], [], prefix, wanted)
        if target in wanted:  # others, such as old rotary buffers, are nothing to this model
            sources.setdefault(target, []).append((stored, pattern))
    for target, found in sources.items():
        first = found[0][1]
        yield _Recipe(target, tuple(found), None if first is None else by_pattern[first])


def _stored_as(module: Any, stored: Collection[str]) -> dict[str, str]:
    """Each name of a parameter to one under which it is stored, as a tied one is under one only."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {
        name: next((other for other in alike if other in stored), name)
        for alike in names.values()
        for name in alike
    }


@dataclass(frozen=True, eq=False)
class Skeleton:
    """A model without its blocks' weights.

    Attributes:
        model: asked only by what puts weights in its blocks, as `mpsearch.walk` does. Its
            `originals` and `kept` are read anew each time.
        checkpoint: supplies those weights.
    """

    model: Model
    checkpoint: Checkpoint


class _Read(Mapping[str, Tensor]):
    """Tensors by name that are read when they are looked up, and not kept."""

    def __init__(self, names: Iterable[str], read: Callable[[str], Tensor]):
        self._names, self._read = dict.fromkeys(names), read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def load_skeleton(
    name: str,
    chat_template: bool = False,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Skeleton:
    """Open what `load_model` opens without loading its blocks.

    All weights are read once, one after another, for the fingerprint and to find NaN.

    Args:
        chat_template: ask facts as a user's turn in the tokenizer's chat template.
        device, dtype: to compute on and with, by default what `load_model` takes.
    Raises:
        ModelError: as `load_model`, or its blocks stand in no list.
        CheckError: a weight is NaN or infinite.
    """
    device = device or pick_device()
    dtype = dtype or compute_dtype(device)
    folder = locate(name)
    check_folder(folder, name)
    with one_line(name):
        tokenizer = read_tokenizer(folder, name, chat_template)
        with torch.device("meta"):  # as the loader does, and with the dtypes that it gives
            module = loader(folder).from_config(
                config_of(folder), dtype=torch.bfloat16, attn_implementation=ATTENTION
            )
        module.eval()
        _compute_buffers(module, device)
        checkpoint = Checkpoint(name, module, Shards(folder, name), device, dtype)
    stored = list(module.state_dict())
    fingerprint = _fingerprint(name, checkpoint, stored)  # before anything is in memory
    _empty(module, device, dtype)
    _fill_outside_blocks(name, module, checkpoint, stored)
    model = _model(name, folder, module, tokenizer, checkpoint, stored)
    model = replace(model, chat=chat_template, fingerprint=fingerprint)
    return Skeleton(model, checkpoint)


def _fingerprint(name: str, checkpoint: Checkpoint, stored: Iterable[str]) -> str:
    """Of all weights, which are read one after another and must be finite."""

    def finite(key: str) -> Tensor:
        tensor = checkpoint.read_plain([key])[key]
        require_finite(name, key, tensor)
        return tensor

    return fingerprint_of(_Read(stored, finite))


def _compute_buffers(module: Any, device: torch.device) -> None:
    """Give the buffers that no checkpoint stores, such as rotary frequencies, their values.

    Source: transformers' loader, which computes them on the CPU by the same calls.
    """
    for name, buffer in module.named_non_persistent_buffers():
        owner, _, leaf = name.rpartition(".")
        module.get_submodule(owner)._buffers[leaf] = torch.empty_like(buffer, device="cpu")
    for parameter in module.parameters():
        parameter._is_hf_initialized = True
    module.initialize_weights()
    for name, buffer in module.named_non_persistent_buffers():
        owner, _, leaf = name.rpartition(".")
        module.get_submodule(owner)._buffers[leaf] = buffer.to(device)


def _empty(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Make every parameter a placeholder, and keep those one that are one."""
    placeholders: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for leaf, parameter in owner._parameters.items():
            if parameter is not None and id(parameter) not in placeholders:
                nan = torch.full((), torch.nan, device=device, dtype=dtype)
                empty = nn.Parameter(nan.expand(parameter.shape), requires_grad=False)
                placeholders[id(parameter)] = placeholders[id(empty)] = empty
            if parameter is not None:
                owner._parameters[leaf] = placeholders[id(parameter)]


def _fill_outside_blocks(
    name: str, module: Any, checkpoint: Checkpoint, stored: Iterable[str]
) -> None:
    """Read what is in no block, and all stored buffers."""
    blocks = find_blocks(module, find_places(module))
    if not blocks:
        raise ModelError(
            f"model '{name}' ({type(module).__name__}) keeps its blocks in no list that is known "
            "here, so it cannot be run one block at a time; give it the memory to be loaded whole"
        )
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for key in stored:
        if key not in parameters:
            owner, _, leaf = key.rpartition(".")
            device = parameters[next(iter(parameters))].device
            module.get_submodule(owner)._buffers[leaf] = checkpoint.read([key])[key].to(device)
        elif id(parameters[key]) not in inside:
            inside.add(id(parameters[key]))  # a tied one is read once
            parameters[key].data = checkpoint.read([key])[key]


def _model(
    name: str,
    folder: Path,
    module: Any,
    tokenizer: Any,
    checkpoint: Checkpoint,
    stored: Sequence[str],
) -> Model:
    """What `mpsearch.models.from_module` makes of a loaded module."""
    found = find_places(module), find_embedding(module), find_head(module)
    layers, embedding, head = map(layers_at, found)
    if not layers:
        raise ModelError(f"model '{name}' has no linear layers that could be quantized")
    places = {layer: place for part in found for layer, place in part.items()}
    parameters = dict(module.named_parameters(remove_duplicate=False))
    name_of = {id(parameter): key for key, parameter in parameters.items()}
    seen = {id(place.parameter) for place in found[0].values()}
    kept = []
    for key in stored:
        same = id(parameters.get(key, key))  # a buffer is nothing else's
        if same not in seen:
            seen.add(same)
            kept.append(key)

    def original(layer: str) -> Tensor:
        place = places[layer]
        parameter = name_of[id(place.parameter)]
        return place.part(checkpoint.read([parameter])[parameter])

    def plain(key: str) -> Tensor:
        return checkpoint.read_plain([key])[key]

    return Model(
        name=name,
        folder=folder,
        module=module,
        tokenizer=tokenizer,
        layers=layers,
        embedding=embedding[0] if embedding else None,
        head=head[0] if head else None,
        places=places,
        originals=_Read(places, original),
        kept=_Read(kept, plain),
        why_kept=why_kept(module, kept),
        fingerprint="",
    )
