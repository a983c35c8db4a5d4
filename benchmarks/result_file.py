"""The JSON that a benchmark writes, row by row, so that it can be stopped and goes on."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from mpsearch.files import write_atomically


def load(path: Path) -> dict[str, Any]:
    """What is there already, or no rows."""
    if path.exists():
        return dict(json.loads(path.read_text(encoding="utf-8")))
    return {"rows": []}


def save(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(result, indent=1) + "\n")


def commit() -> str:
    """The commit that is checked out, short; empty outside a repository."""
    asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
