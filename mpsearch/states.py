"""Hidden states of many rows: in memory up to a limit, in files beyond it.

A file has no name, so nothing of it stays behind when the process is killed. It is read and written
a row at a time and not mapped: a full disk is then an error that can be told, where a mapped page
would end the process, and what lies in it is not counted as the process's memory.
"""

from __future__ import annotations

import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from mpsearch.errors import ResourceError
from mpsearch.sizes import format_size


class StateRoom:
    """Bounded memory for the hidden states of one walk, and files for those that do not fit.

    Args:
        most_bytes: held in memory at most.
        folder: for files; by default the system's temporary folder.
    """

    def __init__(self, most_bytes: int, folder: Path | None = None):
        self._most_bytes, self._folder = most_bytes, folder
        self.held_bytes = 0  # promised to those who asked

    def states(self, size_bytes: int) -> States:
        """Room for states that take so many bytes."""
        if self.held_bytes + size_bytes > self._most_bytes:
            return States(self._file())
        self.held_bytes += size_bytes
        return States()

    def _file(self) -> IO[bytes]:
        try:
            return tempfile.TemporaryFile(dir=self._folder)
        except OSError as error:
            raise ResourceError(
                f"no file for hidden states can be made ({error}); set TMPDIR to a folder that can "
                "be written"
            ) from None


@dataclass(frozen=True)
class _Written:
    """Where a tensor lies in the file, and what it was."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class States:
    """A tensor for each row, which is written before it is read.

    Args:
        file: that holds them; by default they stay in memory.
    """

    def __init__(self, file: IO[bytes] | None = None):
        self._file = file
        if file is not None:
            weakref.finalize(self, file.close)
        self._rows: dict[int, Tensor] = {}
        self._written: dict[int, _Written] = {}
        self._end = 0

    @property
    def in_memory(self) -> bool:
        return self._file is None

    def __contains__(self, row: int) -> bool:
        return row in self._rows or row in self._written

    def __setitem__(self, row: int, state: Tensor) -> None:
        """Keep a row's state in place of its earlier one, whose size it has.

        Raises:
            ResourceError: the disk is full.
        """
        if self._file is None:
            self._rows[row] = state
            return
        offset = self._written[row].offset if row in self._written else self._end
        self._end = max(self._end, offset + state.nbytes)
        self._written[row] = _Written(offset, state.shape, state.dtype, state.device)
        content = state.detach().cpu().contiguous().view(-1).view(torch.uint8)
        try:
            self._file.seek(offset)
            self._file.write(content.numpy().data)
            self._file.flush()
        except OSError as error:
            raise ResourceError(
                f"hidden states of {format_size(self._end)} cannot be written to disk "
                f"({error.strerror}); free some space, or set TMPDIR to a folder with more, and "
                "run again: what is finished is kept"
            ) from None

    def __getitem__(self, row: int) -> Tensor:
        if self._file is None:
            return self._rows[row]
        written = self._written[row]
        content = torch.empty(written.shape, dtype=written.dtype)
        self._file.seek(written.offset)
        self._file.readinto(content.view(-1).view(torch.uint8).numpy().data)  # type: ignore[attr-defined]
        return content.to(written.device)
