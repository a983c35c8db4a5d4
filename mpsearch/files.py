"""Writing whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mpsearch.errors import ResourceError


def write_atomically(path: Path, text: str) -> None:
    """Replace a file in one step. Raises `ResourceError` when it cannot be written."""
    unfinished = path.with_name(f".{path.name}.unfinished")
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
def published(folder: Path) -> Iterator[Path]:
    """A temporary sibling to write into; renamed to `folder` if the block ends well, else removed.

    Another process may publish the same folder first: then its copy stays.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
