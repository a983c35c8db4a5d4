"""A model whose blocks hold no weights: built from its config, its weights read when they are asked
for.

Embedding, norms, head and all else outside the blocks are in memory as in a loaded model. A block's
parameters are placeholders, one NaN seen at every index, which take no memory and let nothing run
by mistake unnoticed. `Checkpoint` gives the tensors to put in their place, made by transformers'
own renaming and conversion, as a loaded model has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.blocks import find_blocks
from mpsearch.checkpoint import Checkpoint
from mpsearch.device import compute_dtype, pick_device
from mpsearch.errors import ModelError
from mpsearch.model_files import check_folder, locate
from mpsearch.models import (
    ATTENTION,
    Model,
    config_of,
    fingerprint_of,
    layers_at,
    loader,
    read_tokenizer,
)
from mpsearch.places import find_embedding, find_head, find_places, why_kept
from mpsearch.refusals import one_line, require_finite
from mpsearch.shards import Shards


class _Read(Mapping[str, Tensor]):
    """Tensors by name that are read when they are looked up, and not kept."""

    def __init__(self, names: Iterable[str], read: Callable[[str], Tensor]):
        self._names, self._read = dict.fromkeys(names), read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # by default it would be read

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def load_skeleton(
    name: str,
    chat_template: bool = False,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Model:
    """Open what `load_whole` loads without loading its blocks.

    All weights are read once, one after another, for the fingerprint and to find NaN.

    Args:
        chat_template: ask facts as a user's turn in the tokenizer's chat template.
        device, dtype: to compute on and with, by default what `load_whole` takes.
    Raises:
        ModelError: as `load_whole`, or its blocks stand in no list.
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
        _read_generation_settings(module, folder)
        _compute_buffers(module, device)
        checkpoint = Checkpoint(name, module, Shards(folder, name), device, dtype)
    stored = list(module.state_dict())
    fingerprint = _fingerprint(name, checkpoint, stored)  # before anything is in memory
    _empty(module, device, dtype)
    _fill_outside_blocks(name, module, checkpoint, stored)
    model = _model(name, folder, module, tokenizer, checkpoint, stored)
    return replace(model, chat=chat_template, fingerprint=fingerprint, checkpoint=checkpoint)


def _fingerprint(name: str, checkpoint: Checkpoint, stored: Iterable[str]) -> str:
    """Of all weights, which are read one after another and must be finite."""

    def finite(key: str) -> Tensor:
        tensor = checkpoint.read_plain([key])[key]
        require_finite(name, key, tensor)
        return tensor

    return fingerprint_of(_Read(stored, finite))


def _read_generation_settings(module: Any, folder: Path) -> None:
    """What the folder says about generating text, which an export hands on.

    Source: transformers' loader, which makes the same call.
    """
    if not module.can_generate():
        return
    module.adjust_generation_fn(
        None, False, False, folder,
        cache_dir=None, force_download=False, proxies=None, local_files_only=True, token=None,
        revision=None, subfolder="", trust_remote_code=False,
    )  # fmt: skip


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
