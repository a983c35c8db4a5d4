"""Tensor files: whole or not there, and a checksum that sees every change."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mpsearch import tensor_files
from mpsearch.errors import CheckError, ResourceError
from mpsearch.tensor_files import CheckedFiles, intact, read_tensors, write_tensors

TENSORS = {
    "codes": torch.arange(-6, 6, dtype=torch.int8).reshape(3, 4),
    "scale": torch.tensor([[0.5], [1.5], [-2.0]], dtype=torch.bfloat16),
    "floats": torch.tensor([1.0, 448.0]).to(torch.float8_e4m3fn),
    "scalar": torch.tensor(7, dtype=torch.uint8),
}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(
        a[name].dtype == b[name].dtype
        and torch.equal(
            a[name].reshape(-1).view(torch.uint8), b[name].reshape(-1).view(torch.uint8)
        )
        for name in a
    )


def test_what_is_written_is_read_by_us_and_by_others(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, TENSORS)
    assert same(read_tensors(path), TENSORS)
    assert same(load_file(path), TENSORS)
    assert intact(path)
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_tensors_are_mapped_and_not_copied_into_memory(tmp_path: Path) -> None:
    path, large = tmp_path / "large.safetensors", torch.arange(2**20)

    def read_bytes() -> int:
        """What this process has read by system calls so far."""
        return int(Path("/proc/self/io").read_text().split()[1])

    write_tensors(path, {"large": large})
    before = read_bytes()
    found = read_tensors(path)["large"]
    assert read_bytes() - before < large.nbytes / 8  # the header; all else comes as it is touched
    assert str(path) in Path("/proc/self/maps").read_text()
    assert torch.equal(found, large)


def test_views_are_written_as_they_look(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a", {"t": TENSORS["codes"].T})
    assert torch.equal(read_tensors(tmp_path / "a")["t"], TENSORS["codes"].T)


@pytest.mark.parametrize("place", [-1, -5, -20])
def test_any_flipped_bit_of_the_data_is_seen(tmp_path: Path, place: int) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, TENSORS)
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(bytes(content))
    assert not intact(path)
    with pytest.raises(CheckError, match=r"is damaged.*rebuilt"):
        read_tensors(path)


def test_the_same_bytes_under_another_name_type_or_shape_are_another_content(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"t": torch.zeros(4, dtype=torch.int8)})
    with tensor_files.safe_open(path, framework="pt") as stored:
        checksum = stored.metadata()
    for other in (
        {"u": torch.zeros(4, dtype=torch.int8)},
        {"t": torch.zeros(4, dtype=torch.uint8)},
        {"t": torch.zeros(2, 2, dtype=torch.int8)},
    ):
        save_file(other, path, metadata=checksum)
        assert not intact(path)


def test_missing_foreign_and_broken_files_are_not_intact(tmp_path: Path) -> None:
    foreign, broken = tmp_path / "foreign", tmp_path / "broken"
    save_file(TENSORS, foreign)
    broken.write_bytes(b"{}")
    for path in (tmp_path / "missing", foreign, broken):
        assert not intact(path)
        with pytest.raises(CheckError, match=path.name):
            read_tensors(path)


def test_a_full_disk_leaves_the_old_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, TENSORS)

    def full(tensors: object, place: Path, **_: object) -> None:
        Path(place).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensor_files, "save_file", full)
    with pytest.raises(ResourceError, match=r"No space left.*free some disk space"):
        write_tensors(path, {"t": torch.zeros(1)})
    assert same(read_tensors(path), TENSORS)
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


# ------------------------------------------------------------------------------ checked once


def test_a_file_is_checked_once_and_again_when_it_was_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, files, digests = tmp_path / "a", CheckedFiles(), []
    digest = tensor_files._digest
    monkeypatch.setattr(
        tensor_files, "_digest", lambda tensors: digests.append(1) or digest(tensors)
    )
    write_tensors(path, TENSORS)
    digests.clear()
    assert all(same(files.read(path), TENSORS) for _ in range(3))
    assert len(digests) == 1
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    for _ in range(2):
        with pytest.raises(CheckError, match="damaged"):
            files.read(path)


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckError, match="cannot be read"):
        CheckedFiles().read(tmp_path / "a")
