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
_READ_BY_LOADERS = {
    *(".safetensors", ".bin", ".pt", ".pth", ".gguf", ".json", ".jinja", ".py"),
    *(".model", ".v3", ".tiktoken", ".txt"),  # of tokenizers
}
_CHUNK_BYTES = 1 << 24


def write_manifest(folder: Path, about: Mapping[str, Any]) -> None:
    """Describe a folder that is finished but for this file.

    Args:
        about: as JSON; `files` and `digest` are added.
    """
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)}
        for name in _names(folder)
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
        size = written.get("bytes") if isinstance(written, dict) else None
        if Path(name).is_absolute() or ".." in Path(name).parts:
            found.append(f"{NAME} names '{name}', which is no file of this folder")
        elif not isinstance(size, int):
            found.append(f"{NAME} does not say how '{name}' was written")
        elif not path.is_file():
            found.append(f"'{name}' is missing")
        elif (now := path.stat().st_size) != size:
            found.append(f"'{name}' has {now:,} bytes, not {size:,}")
        elif _sha256(path) != written.get("sha256"):
            found.append(f"'{name}' was changed: its digest is another")
    found += [
        f"'{name}' was added, and loaders may read it"
        for name in unlisted(folder, content)
        if Path(name).suffix in _READ_BY_LOADERS
    ]
    return found


def unlisted(folder: Path, content: Mapping[str, Any]) -> list[str]:
    """Files, by their paths in the folder, that were not written with it."""
    listed = content.get("files")
    return [n for n in _names(folder) if not isinstance(listed, dict) or n not in listed]


def _names(folder: Path) -> list[str]:
    """All files but the manifest, also those in folders below: tokenizers write some there."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    return sorted(path.as_posix() for path in found if path != Path(NAME))


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
