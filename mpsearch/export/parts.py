"""What an export stores, planned by names and shapes, then read and written a part at a time.

huggingface_hub splits tensors into shards and safetensors writes a file only of tensors that are
all there. A model that does not fit in memory has them one layer after another, so here the split
is theirs, made from shapes, and the files are written here. They are the libraries' to the byte.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from mpsearch.errors import CheckError
from mpsearch.formats import StoredTensor

_METADATA = {"format": "pt"}  # by which loaders know that it was torch
# What a file calls each dtype, in the order in which it holds them.
_DTYPES = MappingProxyType(
    {
        "int64": "I64",
        "float32": "F32",
        "int32": "I32",
        "bfloat16": "BF16",
        "float16": "F16",
        "float8_e4m3fn": "F8_E4M3",
        "int8": "I8",
        "uint8": "U8",
    }
)
_ORDER = tuple(_DTYPES)


@dataclass(frozen=True, eq=False)
class Part:
    """Tensors that are read together.

    Attributes:
        stored: name in the export to dtype and shape, known before anything is read.
        read: gives them under the same names, on the CPU.
    """

    stored: Mapping[str, StoredTensor]
    read: Callable[[], Mapping[str, Tensor]]


def write_parts(parts: Collection[Part], folder: Path, shard_bytes: int) -> None:
    """Write model.safetensors, or shards and their index.

    One part is in memory at a time; one that two shards have tensors of is read for each.

    Args:
        parts: in the order in which shards take their tensors.
        shard_bytes: that a file holds at most, unless one tensor has more.
    Raises:
        CheckError: a part reads as something else than it was planned as.
    """
    stored = {name: tensor for part in parts for name, tensor in part.stored.items()}
    empty = {name: _empty(tensor) for name, tensor in stored.items()}
    split = split_torch_state_dict_into_shards(empty, max_shard_size=shard_bytes)
    for file, names in split.filename_to_tensors.items():
        _write_file(folder / file, {name: stored[name] for name in names}, parts)
    if split.is_sharded:
        index = {
            "metadata": {**split.metadata, **_METADATA},
            "weight_map": split.tensor_to_filename,
        }
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2), encoding="utf-8")


def _empty(tensor: StoredTensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype), device="meta")


def _write_file(path: Path, stored: Mapping[str, StoredTensor], parts: Collection[Part]) -> None:
    """One safetensors file of these tensors, each written where the header says it lies.

    Source: the format, eight bytes of length, JSON that spaces fill to a multiple of eight, then
    the tensors; safetensors (0.8) puts wide dtypes first, and the same ones in order of names.
    """
    header: dict[str, object] = {"__metadata__": _METADATA}
    start_of: dict[str, int] = {}
    end = 0
    for name in sorted(stored, key=lambda name: (_ORDER.index(stored[name].dtype), name)):
        tensor = stored[name]
        start_of[name], end = end, end + tensor.stored_bytes
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": (start_of[name], end),
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        first = file.tell()
        for part in parts:
            starts = {name: first + start_of[name] for name in part.stored if name in start_of}
            if starts:
                _write_part(file, part, starts)
    path.chmod(0o644)  # a server may run as another user


def _write_part(file: IO[bytes], part: Part, starts: Mapping[str, int]) -> None:
    """Write those of a part's tensors that start somewhere in the file."""
    tensors = part.read()
    for name, start in starts.items():
        tensor, planned = tensors[name], part.stored[name]
        found = StoredTensor(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        if found != planned:
            raise CheckError(
                f"'{name}' was planned as {planned} and is {found}; this is our fault, please "
                "report it"
            )
        file.seek(start)
        file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
