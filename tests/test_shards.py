"""Shards: a table of tensors, and what is wrong with a checkpoint said before any of it is read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mpsearch.errors import ModelError
from mpsearch.model_files import check_folder
from mpsearch.shards import INDEX, Shards

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
DOWN, UP = "layers.0.down.weight", "layers.1.up.weight"


def tensors() -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator).bfloat16()

    return {
        FIRST: {"embed.weight": matrix(10, 4), DOWN: matrix(4, 8)},
        SECOND: {UP: matrix(8, 4), "layers.1.router": torch.randn(3, generator=generator)},
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards and their index."""
    for file, parts in tensors().items():
        save_file(parts, tmp_path / file)
    edit_index(tmp_path, lambda index: None)
    return tmp_path


def edit_index(folder: Path, edit: Callable[[dict[str, str]], object]) -> None:
    places = {name: file for file, parts in tensors().items() for name in parts}
    edit(places)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        Shards(folder, "m")
    message = str(caught.value)
    assert "\n" not in message and message.startswith("model 'm': ")
    return message


def test_every_tensor_is_there_once_and_is_read_as_it_was_stored(folder: Path) -> None:
    shards, expected = Shards(folder, "m"), {k: t for f in tensors().values() for k, t in f.items()}
    assert sorted(shards) == sorted(expected) and len(shards) == 4
    for name, tensor in expected.items():
        assert shards[name].shape == tuple(tensor.shape)
        assert shards[name].dtype == tensor.dtype
        assert shards[name].nbytes == tensor.nbytes
        assert shards[name].empty.shape == tensor.shape
        assert torch.equal(shards.read([name])[name], tensor)
    whole = shards.read(shards)
    assert all(torch.equal(whole[name], tensor) for name, tensor in expected.items())
    assert shards.file_bytes == sum((folder / file).stat().st_size for file in tensors())


def test_floating_tensors_are_cast_on_request_and_only_they(tmp_path: Path) -> None:
    stored = {"a": torch.tensor([1.0, 2.5]), "n": torch.tensor([3])}
    save_file(stored, tmp_path / "model.safetensors")
    found = Shards(tmp_path, "m").read(stored, dtype=torch.bfloat16)
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        "a": torch.bfloat16,
        "n": torch.int64,
    }


def mapped(folder: Path) -> bool:
    return str(folder) in Path("/proc/self/maps").read_text()


def test_no_file_stays_mapped_or_open(folder: Path) -> None:
    shards = Shards(folder, "m")
    kept = shards.read([DOWN, UP])
    assert kept and not mapped(folder)
    links = [path for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    opened = [str(path.readlink()) for path in links if path.is_symlink()]
    assert not any(str(folder) in path for path in opened)


def test_scalars_and_empty_tensors_are_read(tmp_path: Path) -> None:
    stored = {"scalar": torch.tensor(2.5), "none": torch.empty(0, 3)}
    save_file(stored, tmp_path / "model.safetensors")
    found = Shards(tmp_path, "m").read(stored)
    assert torch.equal(found["scalar"], stored["scalar"])
    assert found["none"].shape == (0, 3)


def test_opening_reads_no_tensor(tmp_path: Path) -> None:
    """A hundred shards of a terabyte each, of which the disk holds nothing but headers."""
    count, numbers = 100, 2**39
    for index in range(count):
        head = {f"layers.{index}.w": {"dtype": "BF16", "shape": [numbers],
                                      "data_offsets": [0, 2 * numbers]}}  # fmt: skip
        text = json.dumps(head).encode()
        with (tmp_path / f"model-{index}.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + 2 * numbers)
    shards = Shards(tmp_path, "m")
    assert sum(stored.nbytes for stored in shards.values()) == count * 2 * numbers


def test_a_missing_shard(folder: Path) -> None:
    (folder / SECOND).unlink()
    assert f"shard {SECOND} is missing" in refusal(folder)


@pytest.mark.parametrize(("by", "words"), [(-1, "is cut short"), (1, "is longer than its tensors")])
def test_a_shard_of_another_length_than_its_header_says(folder: Path, by: int, words: str) -> None:
    size = (folder / SECOND).stat().st_size
    os.truncate(folder / SECOND, size + by)
    message = refusal(folder)
    assert f"{SECOND} {words}" in message
    assert f"it has {size + by} bytes and its header promises {size} bytes" in message


@pytest.mark.parametrize(
    "content",
    [b"", b"version https://git-lfs.github.com/spec/v1\n", b"\0" * 8, b"\2" + b"\0" * 7 + b"[]"],
)
def test_a_file_that_is_none(folder: Path, content: bytes) -> None:
    (folder / FIRST).write_bytes(content)
    assert f"{FIRST} is no safetensors file" in refusal(folder)


def test_an_index_that_promises_what_no_shard_has(folder: Path) -> None:
    edit_index(folder, lambda index: index.update({"layers.2.up.weight": SECOND, "more": FIRST}))
    message = refusal(folder)
    assert f"'layers.2.up.weight' is in {SECOND}, which does not have it" in message
    assert "(1 more like it)" in message


def test_an_index_that_places_a_tensor_in_another_shard(folder: Path) -> None:
    edit_index(folder, lambda index: index.update({UP: FIRST}))
    assert f"'{UP}' is in {FIRST}, which does not have it;" in refusal(folder)


def test_an_index_that_leads_out_of_the_folder(folder: Path) -> None:
    edit_index(folder, lambda index: index.update({UP: "../other.safetensors"}))
    assert "names '../other.safetensors', which lies outside its folder" in refusal(folder)


def test_an_index_that_is_none(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": 3}')
    assert "is no index of shards" in refusal(folder)


def test_a_tensor_in_two_shards(folder: Path) -> None:
    save_file({**load_file(folder / SECOND), DOWN: torch.zeros(4, 8).bfloat16()}, folder / SECOND)
    assert f"'{DOWN}' is in {FIRST} and in {SECOND}" in refusal(folder)


def test_shards_of_two_precisions(folder: Path) -> None:
    save_file({**load_file(folder / SECOND), "layers.1.down.weight": torch.zeros(2)},
              folder / SECOND)  # fmt: skip
    message = refusal(folder)
    assert f"'layers.1.down.weight' is float32 in {SECOND}" in message
    assert f"'{DOWN}' bfloat16 in {FIRST}" in message


def test_a_kind_of_tensor_may_have_its_own_precision(folder: Path) -> None:
    assert Shards(folder, "m")["layers.1.router"].dtype == torch.float32


def test_a_dtype_that_no_reference_has(folder: Path) -> None:
    text = json.dumps({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    (folder / FIRST).write_bytes(len(text).to_bytes(8, "little") + text + b"\0")
    assert f"{FIRST} stores 'a' as F4, which is not read here" in refusal(folder)


@pytest.mark.parametrize("change", [Path.unlink, lambda path: os.truncate(path, 200)])
def test_a_file_that_changes_while_it_is_in_use(
    folder: Path, change: Callable[[Path], object]
) -> None:
    shards = Shards(folder, "m")
    change(folder / FIRST)
    with pytest.raises(ModelError, match="was changed while it was in use"):
        shards.read([DOWN])


def test_a_model_is_refused_before_it_is_loaded(tiny_folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_folder, tmp_path / "copy")
    os.truncate(copy / "model.safetensors", (copy / "model.safetensors").stat().st_size - 1)
    with pytest.raises(ModelError, match="is cut short"):
        check_folder(copy, "m")
