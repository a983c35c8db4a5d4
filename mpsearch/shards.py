"""A checkpoint's safetensors files as one table of tensors by name, each read when it is asked for.

Opening reads the headers alone, a few kilobytes a file, and so finds in milliseconds what would
otherwise break a load, or an hour of work, half way: a shard that is missing or cut short, a tensor
that the index promises and no shard has, one that two shards have, shards of two precisions.

A tensor is read into memory of its own and no file is mapped: under a limit of address space a file
larger than it could not be, and mapped pages count as this process's memory beside the copy.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpsearch.errors import ModelError
from mpsearch.sizes import format_size

_ANY_INDEX = ".safetensors.index.json"
INDEX = "model" + _ANY_INDEX
_MOST_HEADER_BYTES = 100_000_000  # safetensors' own limit
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class StoredTensor:
    """What a header says of one tensor."""

    file: Path
    offset: int  # in bytes, in the file
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def empty(self) -> Tensor:
        """A tensor of that shape and dtype without content, on the meta device."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


class Shards(Mapping[str, StoredTensor]):
    """The tensors of a checkpoint by name.

    Args:
        folder: of the model.
        name: of the model, for messages.
    Attributes:
        files: the safetensors files, none of them empty of tensors or damaged.
    Raises:
        ModelError: as `weight_files`; a file is no safetensors file or not as long as its header
            says; the index names a tensor that its shard lacks; two files have a tensor; the same
            kind of tensor has another floating dtype in another file.
    """

    def __init__(self, folder: Path, name: str):
        self.files = weight_files(folder, name)
        self._stored: dict[str, StoredTensor] = {}
        for file in self.files:
            for tensor, stored in _read_header(file, name).items():
                if tensor in self._stored:
                    raise ModelError(
                        f"model '{name}': '{tensor}' is in {self._stored[tensor].file.name} and in "
                        f"{file.name}; remove the file that does not belong to the checkpoint"
                    )
                self._stored[tensor] = stored
        _check_index(folder, name, self._stored)
        _check_dtypes(name, self._stored)

    def __getitem__(self, tensor: str) -> StoredTensor:
        return self._stored[tensor]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    @property
    def file_bytes(self) -> int:
        """Of all files, headers included."""
        return sum(file.stat().st_size for file in self.files)

    def read(
        self,
        tensors: Iterable[str],
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> dict[str, Tensor]:
        """Some tensors, which hold no file open.

        Args:
            device: by default the CPU.
            dtype: of floating tensors; by default the stored one.
        Raises:
            ModelError: a file has changed since it was opened.
        """
        found: dict[str, Tensor] = {}
        for tensor in tensors:
            part = _read_tensor(self[tensor])
            wanted = dtype if part.is_floating_point() else None
            found[tensor] = part.to(device or "cpu", wanted or part.dtype)
        return found


def _read_tensor(stored: StoredTensor) -> Tensor:
    read = torch.empty(stored.shape, dtype=stored.dtype)
    content = read.view(-1).view(torch.uint8).numpy().data
    try:
        with stored.file.open("rb", buffering=0) as file:
            file.seek(stored.offset)
            done = 0
            while done < len(content) and (more := file.readinto(content[done:])):
                done += more
        if done < len(content):
            raise OSError("it has become shorter")
    except OSError as error:
        raise ModelError(
            f"'{stored.file}' was changed while it was in use ({error}); put it back and run again"
        ) from None
    return read


def weight_files(folder: Path, name: str) -> list[Path]:
    """The safetensors files of a folder: the shards of its index, or all that there are.

    Raises:
        ModelError: an index is none, or names a file outside the folder, one that is no safetensors
            file, or one that is missing.
    """
    # All indices are looked at: gptqmodel prefers one of another name.
    places = {index.name: _read_index(index, name) for index in folder.glob("*" + _ANY_INDEX)}
    if INDEX not in places:
        return sorted(folder.glob("*.safetensors"))
    files = [folder / shard for shard in sorted(set(places[INDEX].values()))]
    if missing := [file.name for file in files if not file.exists()]:
        raise ModelError(f"model '{name}': shard {missing[0]} is missing; download it again")
    return files


def _read_index(index: Path, name: str) -> dict[str, str]:
    """Tensor to the name of its file."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        places = {str(tensor): str(shard) for tensor, shard in content.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise ModelError(
            f"model '{name}': {index.name} is no index of shards; get it again"
        ) from None
    for shard in sorted(set(places.values())):
        wrong = None
        if Path(shard).name != shard:
            wrong = "lies outside its folder"
        elif not shard.endswith(".safetensors"):
            wrong = "is no safetensors file"  # transformers would read it as pickle
        if wrong:
            raise ModelError(
                f"model '{name}': {index.name} names '{shard}', which {wrong}; do not use this "
                "checkpoint"
            )
    return places


def _read_header(file: Path, name: str) -> dict[str, StoredTensor]:
    """Name to what the file's header says, after checking that the file is as long as that.

    Source: the safetensors format; eight bytes of length, JSON, then the tensors.
    """
    size_bytes = file.stat().st_size
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if length > min(_MOST_HEADER_BYTES, size_bytes):
                raise ValueError
            header: dict[str, Any] = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        promised_bytes = 8 + length
        found = {}
        for tensor, said in header.items():
            start, end = said["data_offsets"]
            promised_bytes = max(promised_bytes, 8 + length + end)
            if said["dtype"] not in _DTYPES:
                raise ModelError(
                    f"model '{name}': {file.name} stores '{tensor}' as {said['dtype']}, which is "
                    f"not read here; a reference has {', '.join(_DTYPES)}"
                )
            found[tensor] = StoredTensor(
                file, 8 + length + start, _DTYPES[said["dtype"]], tuple(said["shape"])
            )
            if end - start != found[tensor].nbytes:
                raise ValueError
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise ModelError(
            f"model '{name}': {file.name} is no safetensors file, or its header is damaged; "
            "get it again"
        ) from None
    if size_bytes != promised_bytes:
        what = "is cut short" if size_bytes < promised_bytes else "is longer than its tensors"
        raise ModelError(
            f"model '{name}': {file.name} {what}: it has {_exactly(size_bytes)} and its header "
            f"promises {_exactly(promised_bytes)}; get it again"
        )
    return found


def _exactly(size_bytes: int) -> str:
    return f"{size_bytes} bytes" if size_bytes < 2**20 else format_size(size_bytes)


def _check_index(folder: Path, name: str, stored: Mapping[str, StoredTensor]) -> None:
    """Refuse an index that promises a tensor which its shard does not have."""
    index = folder / INDEX
    lacking = [
        (tensor, shard)
        for tensor, shard in (_read_index(index, name) if index.exists() else {}).items()
        if tensor not in stored or stored[tensor].file.name != shard
    ]
    if lacking:
        (tensor, shard), *others = lacking
        more = f" ({len(others)} more like it)" if others else ""
        raise ModelError(
            f"model '{name}': {INDEX} says that '{tensor}' is in {shard}, which does not have it"
            f"{more}; index and shards come from different checkpoints, get "
            "them again"
        )


def _check_dtypes(name: str, stored: Mapping[str, StoredTensor]) -> None:
    """Refuse shards that hold the same kind of tensor, block numbers aside, in several precisions.

    One kind may well have its own, as routers in float32 do.
    """
    first: dict[str, tuple[str, StoredTensor]] = {}
    for tensor, here in stored.items():
        if not here.dtype.is_floating_point:
            continue
        other, there = first.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "N", tensor), (tensor, here))
        if here.dtype != there.dtype and here.file != there.file:
            raise ModelError(
                f"model '{name}': '{tensor}' is {_called(here)} in {here.file.name} and "
                f"'{other}' {_called(there)} in {there.file.name}; the shards come from "
                "different checkpoints, get them again"
            )


def _called(stored: StoredTensor) -> str:
    return str(stored.dtype).removeprefix("torch.")
