"""`mpsearch.json` of an export: what it is, and its files by size and digest.

The digests tell an accident or an edit from what was written. They are no signature: who can write
the folder can write them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpsearch.errors import RunError
from mpsearch.files import write_atomically

NAME = "mpsearch.json"
# What loaders may read or run, though nobody wrote it here.
_READ_BY_LOADERS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".json", ".jinja", ".py"}
_CHUNK_BYTES = 1 << 24


def write_manifest(folder: Path, about: Mapping[str, Any]) -> None:
    """Describe a folder that is finished but for this file.

    Args:
        about: as JSON; `files` and `digest` are added.
    """
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.iterdir())
        if path.name != NAME
    }
    content = {**about, "files": files}
    write_atomically(folder / NAME, json.dumps({**content, "digest": _digest(content)}, indent=1))


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """What `write_manifest` wrote.

    Raises:
        RunError: it is not there, or no such file.
    """
    path = Path(folder) / NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"'{folder}' is no export of mpsearch: it has no {NAME}") from None
    except (OSError, ValueError) as error:
        raise RunError(f"'{path}' cannot be read ({error}); export again") from None
    if not isinstance(content, dict):
        raise RunError(f"'{path}' is no manifest of an export; export again")
    return content


def faults(folder: Path, content: Mapping[str, Any]) -> list[str]:
    """What differs from what was written, a sentence each; empty if nothing does."""
    listed = content.get("files")
    if not isinstance(listed, dict) or "digest" not in content:
        return [f"{NAME} lists no files: another version of mpsearch wrote it; export again"]
    found = []
    if _digest({key: content[key] for key in content if key != "digest"}) != content["digest"]:
        found.append(f"{NAME} was edited")
    for name, written in listed.items():
        path = folder / name
        if Path(name).name != name or not isinstance(written, dict):
            found.append(f"{NAME} names '{name}', which is no file of this folder")
        elif not path.is_file():
            found.append(f"'{name}' is missing")
        elif (size := path.stat().st_size) != written.get("bytes"):
            found.append(f"'{name}' has {size:,} bytes, not {written.get('bytes'):,}")
        elif _sha256(path) != written.get("sha256"):
            found.append(f"'{name}' was changed: its digest is another")
    added = (path for path in sorted(folder.iterdir()) if path.name not in (NAME, *listed))
    found += [
        f"'{path.name}' was added, and loaders may read it"
        for path in added
        if path.suffix in _READ_BY_LOADERS
    ]
    return found


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
