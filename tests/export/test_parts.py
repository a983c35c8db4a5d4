"""Files written a part at a time are the ones that the libraries write of tensors all there."""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from mpsearch.errors import CheckError
from mpsearch.export.parts import Part, write_parts
from mpsearch.formats import ITEM_BYTES, StoredTensor


def tensors_of_every_dtype() -> dict[str, Tensor]:
    """In no order, of odd sizes, one of no dimension and one that is empty."""
    torch.manual_seed(0)
    made = {
        f'{"zay"[i % 3]}.{dtype} é"': (100 * torch.randn(3 + i, 5)).to(getattr(torch, dtype))
        for i, dtype in enumerate(ITEM_BYTES)
    }
    return {**made, "none": torch.empty(0, 4), "one": torch.tensor(7, dtype=torch.uint8)}


def planned(tensor: Tensor) -> StoredTensor:
    return StoredTensor(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


def parts_of(tensors: Mapping[str, Tensor], size: int = 3) -> list[Part]:
    """So many tensors a part."""

    def part(names: list[str]) -> Part:
        return Part(
            {name: planned(tensors[name]) for name in names},
            lambda: {name: tensors[name] for name in reversed(names)},
        )

    names = list(tensors)
    return [part(names[i : i + size]) for i in range(0, len(names), size)]


@pytest.mark.parametrize("shard_bytes", [10**9, 150, 1])
def test_the_files_are_the_libraries_own(tmp_path: Path, shard_bytes: int) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    theirs.mkdir()
    tensors = tensors_of_every_dtype()
    write_parts(parts_of(tensors), ours, shard_bytes)
    save_torch_state_dict(
        dict(tensors), theirs, max_shard_size=shard_bytes, metadata={"format": "pt"}
    )
    names = sorted(path.name for path in theirs.iterdir())
    assert sorted(path.name for path in ours.iterdir()) == names
    assert len(names) == 1 if shard_bytes == 10**9 else len(names) > 3
    for name in names:
        if name.endswith(".json"):
            assert json.loads((ours / name).read_text()) == json.loads((theirs / name).read_text())
        else:
            assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
            assert (ours / name).stat().st_mode & 0o777 == 0o644


def test_a_part_is_gone_before_the_next_is_read(tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def part(number: int) -> Part:
        def read() -> dict[str, Tensor]:
            assert not any(other() is not None for other in alive)
            made = torch.full((8,), number)
            alive.append(weakref.ref(made))
            return {f"{number}": made}

        return Part({f"{number}": StoredTensor("int64", (8,))}, read)

    write_parts([part(number) for number in range(5)], tmp_path, shard_bytes=150)
    assert len(alive) == 5
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def test_a_part_of_two_shards_is_read_for_each(tmp_path: Path) -> None:
    reads = []
    tensors = {name: torch.ones(8) for name in "abcd"}

    def read() -> dict[str, Tensor]:
        reads.append(1)
        return tensors

    part = Part({name: planned(tensor) for name, tensor in tensors.items()}, read)
    write_parts([part], tmp_path, shard_bytes=64)
    assert len(reads) == len(list(tmp_path.glob("*.safetensors"))) == 2


@pytest.mark.parametrize("other", [torch.ones(4, 2), torch.ones(2, 4, dtype=torch.int32)])
def test_what_reads_as_something_else_than_was_planned_is_our_fault(
    tmp_path: Path, other: Tensor
) -> None:
    part = Part({"a": StoredTensor("float32", (2, 4))}, lambda: {"a": other})
    with pytest.raises(CheckError, match=r"'a' was planned as .* this is our fault"):
        write_parts([part], tmp_path, shard_bytes=64)
