"""Safetensors files that appear whole and carry a checksum of what is in them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mpsearch.errors import CheckError, ResourceError


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors in one step. One process at a time may write a path.

    Raises:
        ResourceError: the disk is full or cannot be written.
    """
    held = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        save_file(held, unfinished, metadata={"sha256": _digest(held)})
        unfinished.chmod(0o644)
        unfinished.replace(path)
    except (OSError, SafetensorError) as error:
        raise ResourceError(
            f"cannot write '{path}' ({error}); free some disk space and run again, what is "
            "finished is kept"
        ) from None
    finally:
        unfinished.unlink(missing_ok=True)


def read_tensors(path: Path, check: bool = True) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU.

    Args:
        check: whether to compare what is read with the checksum.
    Raises:
        CheckError: it is missing, damaged, or no such file.
    """
    try:
        with safe_open(path, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            promised = (stored.metadata() or {}).get("sha256")
    except (OSError, SafetensorError) as error:
        raise CheckError(f"'{path}' cannot be read ({error}); run again, it is rebuilt") from None
    if check and _digest(tensors) != promised:
        raise CheckError(f"'{path}' is damaged: not the checksum it had; run again, it is rebuilt")
    return tensors


class CheckedFiles:
    """Reads files, and compares each with its checksum once, and again when it was written again.

    A streamed evaluation reads every code anew, and a checksum takes longer than a warm read.
    """

    def __init__(self) -> None:
        self._checked: dict[Path, tuple[int, int]] = {}

    def read(self, path: Path) -> dict[str, Tensor]:
        """As `read_tensors`."""
        mark = _mark(path)
        tensors = read_tensors(path, check=mark is None or self._checked.get(path) != mark)
        if mark is not None:
            self._checked[path] = mark
        return tensors


def _mark(path: Path) -> tuple[int, int] | None:
    """Changes when the file is written; None if there is none."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size


def intact(path: Path) -> bool:
    """Whether the file is there and holds what was written."""
    if not path.exists():
        return False
    try:
        read_tensors(path)
    except CheckError:
        return False
    return True


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
