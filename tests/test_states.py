"""Hidden states: what was written is read, in memory or on disk, and neither is ever overrun."""

from __future__ import annotations

import errno
import os
from io import BytesIO
from pathlib import Path

import pytest
import torch

from mpsearch.errors import ResourceError
from mpsearch.states import StateRoom


def rows(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, tokens, 8, generator=generator).to(dtype) for tokens in (5, 1, 7)]


@pytest.mark.parametrize("most_bytes", [0, 10**6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_row_is_read_as_it_was_last_written(most_bytes: int, dtype: torch.dtype) -> None:
    states = StateRoom(most_bytes).states(100)
    assert states.in_memory == (most_bytes > 0)
    for seed in range(3):  # each in place of the one before, in another order
        for row in (2, 0, 1):
            states[row] = rows(seed, dtype)[row]
        for row in range(3):
            assert states[row].dtype == dtype
            assert torch.equal(states[row], rows(seed, dtype)[row])


def test_a_file_has_no_name_and_does_not_grow_when_rows_are_written_again(tmp_path: Path) -> None:
    states = StateRoom(0, tmp_path).states(100)
    for _ in range(4):
        for row, state in enumerate(rows()):
            states[row] = state
    assert states._file is not None
    assert os.fstat(states._file.fileno()).st_size == sum(state.nbytes for state in rows())
    assert list(tmp_path.iterdir()) == []


def test_views_are_written_as_they_read(tmp_path: Path) -> None:
    states = StateRoom(0, tmp_path).states(100)
    state = torch.arange(24.0).view(2, 3, 4).transpose(0, 2)
    states[0] = state
    assert torch.equal(states[0], state)


def test_memory_is_given_to_as_many_as_fit() -> None:
    room = StateRoom(250)
    assert [room.states(100).in_memory for _ in range(3)] == [True, True, False]
    assert room.held_bytes == 200
    assert room.states(50).in_memory
    assert not room.states(1).in_memory


def test_a_full_disk_is_told() -> None:
    class Full(BytesIO):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    states = StateRoom(0).states(100)
    states._file = Full()
    with pytest.raises(ResourceError, match="cannot be written to disk \\(No space left") as caught:
        states[0] = rows()[0]
    assert caught.value.exit_code == 5


def test_a_folder_that_takes_no_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="set TMPDIR"):
        StateRoom(0, tmp_path / "none").states(1)
