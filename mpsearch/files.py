"""Writing whole or not at all, and working without doing things twice."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mpsearch.errors import ResourceError, RunError


def home() -> Path:
    """Where prepared models and the weight bank live: `MPSEARCH_HOME`, or the user's cache."""
    return Path(os.environ.get("MPSEARCH_HOME") or Path.home() / ".cache" / "mpsearch")


def write_atomically(path: Path, text: str) -> None:
    """Replace a file in one step. Raises `ResourceError` when it cannot be written."""
    # Named after the process: several may write the same file.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        with open(unfinished, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        unfinished.replace(path)
    except OSError as error:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise ResourceError(
            f"cannot write '{path}': {error.strerror}; free some space or choose another folder"
        ) from None


@contextmanager
def published(folder: Path, overwrite: bool = False, alike: bool = False) -> Iterator[Path]:
    """A temporary sibling to write into; renamed to `folder` if the block ends well, else removed.

    Args:
        overwrite: put it in the place of an older folder, which is removed then.
        alike: whoever writes this folder writes the same, so one that has appeared meanwhile stays.
    Raises:
        RunError: it has appeared meanwhile, and may hold something else.
    """
    folder = folder.resolve()  # neither a link nor "." can be renamed
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)
        if overwrite and folder.exists():
            older = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
            folder.rename(older)  # over an empty folder
            try:
                unfinished.rename(folder)
            except BaseException:
                if not folder.exists():
                    older.rename(folder)
                raise
            shutil.rmtree(older, ignore_errors=True)
            return
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.exists():
                raise
            if not alike:
                raise RunError(
                    f"'{folder}' was written by another process meanwhile, and is left as it is; "
                    "choose another -o"
                ) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


class Claims:
    """Numbered pieces of work in a folder, each done by one process at a time.

    A claim is a lock on one byte of a file, so it ends with its process, however that ends. Use it
    as a context manager, once a process and folder: closing the file gives up all its claims.
    Entering raises `ResourceError` if the file cannot be made.
    """

    def __init__(self, folder: Path):
        self._path = folder / ".claims"

    def __enter__(self) -> Claims:
        try:
            self._stream = open(self._path, "ab")
        except OSError as error:
            raise ResourceError(
                f"cannot write '{self._path}' ({error.strerror}); free some disk space, or set "
                "MPSEARCH_HOME to a folder that can be written"
            ) from None
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def take(self, number: int) -> bool:
        """Whether the piece is now this process's; not so while another has it."""
        try:
            fcntl.lockf(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise
        return True

    def release(self, number: int) -> None:
        fcntl.lockf(self._stream, fcntl.LOCK_UN, 1, number)
