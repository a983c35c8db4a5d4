"""Files: written whole or not at all, whatever breaks off in between."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from mpsearch.errors import ResourceError, RunError
from mpsearch.files import Claims, published, write_atomically


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_file_is_written_as_utf8_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_atomically(path, "räder ±\n")
    assert path.read_bytes() == "räder ±\n".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_replaced_whole_and_a_reader_keeps_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_atomically(path, "a long first text")
    with open(path, encoding="utf-8") as reader:
        write_atomically(path, "short")
        assert reader.read() == "a long first text"
    assert path.read_text() == "short"


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_keeps_the_old_file_and_leaves_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "run.json"
    write_atomically(path, "old")
    monkeypatch.setattr(os, step, full_disk)
    with pytest.raises(ResourceError) as caught:
        write_atomically(path, "new")
    assert "No space left on device" in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupt_keeps_the_old_file_and_the_next_write_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.json"
    write_atomically(path, "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_atomically(path, "new")
    assert path.read_text() == "old"
    write_atomically(path, "newer")
    assert path.read_text() == "newer"
    assert list(tmp_path.iterdir()) == [path]


def test_an_older_folder_comes_back_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "old").touch()
    real = Path.rename

    def rename(path: Path, to: Path) -> Path:
        if (path / "new").exists() and to == folder:
            raise KeyboardInterrupt
        return real(path, to)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt), published(folder, overwrite=True) as unfinished:
        (unfinished / "new").touch()
    assert [path.name for path in folder.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [folder]


def test_a_link_and_the_current_folder_are_replaced_where_they_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, link = tmp_path / "folder", tmp_path / "link"
    folder.mkdir()
    link.symlink_to(folder)
    with published(link, overwrite=True) as unfinished:
        (unfinished / "one").touch()
    assert link.is_symlink() and [path.name for path in folder.iterdir()] == ["one"]
    monkeypatch.chdir(folder)
    with published(Path(), overwrite=True) as unfinished:
        (unfinished / "two").touch()
    assert [path.name for path in folder.iterdir()] == ["two"]
    assert sorted(tmp_path.iterdir()) == [folder, link]


def test_the_text_is_on_the_disk_before_it_takes_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    for step in ("fsync", "replace"):
        real = getattr(os, step)

        def record(*args: object, step: str = step, real: object = real) -> None:
            order.append(step)
            real(*args)  # type: ignore[operator]

        monkeypatch.setattr(os, step, record)
    write_atomically(tmp_path / "run.json", "text")
    assert order == ["fsync", "replace"]


@pytest.mark.parametrize("blocked", ["missing/run.json", "file/run.json", "folder"])
def test_a_path_that_cannot_be_written_is_a_resource_error(tmp_path: Path, blocked: str) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ResourceError, match=r"^cannot write '"):
        write_atomically(tmp_path / blocked, "text")
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_is_published_whole_with_its_parents(tmp_path: Path) -> None:
    target = tmp_path / "bank" / "a1b2"
    with published(target) as folder:
        (folder / "inside").mkdir()
        (folder / "inside" / "codes").write_text("1 2 3")
        assert not target.exists()
        assert folder.parent == target.parent  # a sibling, so that renaming is atomic
    assert (target / "inside" / "codes").read_text() == "1 2 3"
    assert list(target.parent.iterdir()) == [target]
    assert target.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, ResourceError])
def test_a_block_that_fails_publishes_nothing(tmp_path: Path, failure: type[BaseException]) -> None:
    target = tmp_path / "bank" / "a1b2"
    with pytest.raises(failure), published(target) as folder:
        (folder / "codes").write_text("half")
        raise failure("halfway")
    assert list(target.parent.iterdir()) == []


def test_a_block_that_fails_leaves_what_was_published_before(tmp_path: Path) -> None:
    target = tmp_path / "a1b2"
    with published(target) as folder:
        (folder / "codes").write_text("first")
    with pytest.raises(ValueError), published(target) as folder:
        raise ValueError("halfway")
    assert (target / "codes").read_text() == "first"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("alike", [True, False])
def test_of_two_publishers_the_first_to_finish_stays(alike: bool, tmp_path: Path) -> None:
    target = tmp_path / "a1b2"
    refused = nullcontext() if alike else pytest.raises(RunError, match=r"'.*a1b2' was written by")
    with refused, published(target, alike=alike) as slow:
        (slow / "codes").write_text("slow")
        with published(target) as fast:
            assert fast != slow
            (fast / "codes").write_text("fast")
    assert (target / "codes").read_text() == "fast"
    assert list(tmp_path.iterdir()) == [target]


def test_a_rename_that_fails_for_another_reason_is_not_swallowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "rename", full_disk)
    with pytest.raises(OSError, match="No space left"), published(tmp_path / "a1b2"):
        pass
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------ claims


def take_elsewhere(folder: Path, number: int) -> bool:
    """Whether another process could take the piece."""
    code = (
        "import sys; from pathlib import Path; from mpsearch.files import Claims\n"
        "with Claims(Path(sys.argv[1])) as claims: print(claims.take(int(sys.argv[2])))"
    )
    command = [sys.executable, "-c", code, str(folder), str(number)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout == "True\n"


def test_a_claimed_piece_is_refused_elsewhere_until_it_is_released(tmp_path: Path) -> None:
    with Claims(tmp_path) as claims:
        assert claims.take(3)
        assert not take_elsewhere(tmp_path, 3)
        assert take_elsewhere(tmp_path, 2)
        claims.release(3)
        assert take_elsewhere(tmp_path, 3)


def test_claims_end_with_their_process(tmp_path: Path) -> None:
    assert take_elsewhere(tmp_path, 7)
    with Claims(tmp_path) as claims:
        assert claims.take(7)
    assert take_elsewhere(tmp_path, 7)


def test_claims_where_no_file_can_be_made_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"cannot write '.*claims' \(No such file") as caught:
        Claims(tmp_path / "missing").__enter__()
    assert "\n" not in str(caught.value)
