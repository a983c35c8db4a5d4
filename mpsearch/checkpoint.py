"""A checkpoint's tensors as the parameters of a model, each read when it is asked for.

What a checkpoint stores is not always what the model computes with: names change, and the experts
of a block become one tensor. transformers' own renaming and conversion is applied here a parameter
at a time, so that a model need never be in memory whole.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpsearch.errors import ModelError
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
