"""This machine's GPU as its driver describes it: measured once, kept for `--device this`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from mpsearch.errors import ResourceError, UsageError
from mpsearch.files import home, write_atomically

THIS = "this"  # the name by which `--device` means it


@dataclass(frozen=True)
class ThisDevice:
    """What was measured.

    Attributes:
        memory_bytes: that the driver offers in all.
        other_bytes: that others had taken: a desktop, and what the driver keeps for itself.
        context_bytes: that a process takes before it allocates anything: device context, kernels
            and workspaces of the libraries.
    """

    name: str
    memory_bytes: int
    other_bytes: int
    context_bytes: int

    def save(self) -> Path:
        """Keep it beside the bank. Raises `ResourceError` if it cannot be written."""
        path = _path()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResourceError(
                f"cannot create '{path.parent}': {error.strerror}; set MPSEARCH_HOME"
            ) from None
        write_atomically(path, json.dumps(asdict(self), indent=1))
        return path

    @classmethod
    def load(cls) -> ThisDevice:
        """What `save` kept. Raises `UsageError` where nothing sound was."""
        try:
            content = json.loads(_path().read_text(encoding="utf-8"))
            found = cls(str(content.pop("name")), **{key: int(content[key]) for key in content})
        except FileNotFoundError:
            raise UsageError(
                "this machine's GPU has not been measured; run 'mpsearch fit --calibrate' on it, "
                "or name a card"
            ) from None
        except (OSError, ValueError, TypeError, LookupError, AttributeError, OverflowError):
            raise UsageError(
                f"'{_path()}' is damaged; run 'mpsearch fit --calibrate' again"
            ) from None
        if not 0 <= found.other_bytes + found.context_bytes < found.memory_bytes:
            raise UsageError(
                f"'{_path()}' holds sizes that cannot be; run 'mpsearch fit --calibrate' again"
            )
        return found


def _path() -> Path:
    return home() / "device.json"
