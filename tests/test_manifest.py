"""The manifest: every change to a folder is found, and named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mpsearch.errors import RunError
from mpsearch.manifest import NAME, faults, read_manifest, write_manifest

Damage = Callable[[Path], object]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in (("config.json", "{}"), ("README.md", "card"), ("w.safetensors", "weights")):
        (tmp_path / name).write_text(text)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x.jinja").write_text("one")
    write_manifest(tmp_path, {"target": "gptq", "bits": 3.25})
    return tmp_path


def test_what_was_written_is_read_and_without_fault(folder: Path) -> None:
    about = read_manifest(folder)
    assert (about["target"], about["bits"]) == ("gptq", 3.25)
    assert set(about["files"]) == {*("config.json", "README.md", "w.safetensors", "sub/x.jinja")}
    assert faults(folder, about) == []


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)


def reworded(folder: Path, key: str, value: object) -> None:
    content = json.loads((folder / NAME).read_text())
    content[key] = value
    (folder / NAME).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: flip(f / "w.safetensors"), "'w.safetensors' was changed: its digest is another"),
        (lambda f: flip(f / "README.md"), "'README.md' was changed: its digest is another"),
        (lambda f: (f / "w.safetensors").unlink(), "'w.safetensors' is missing"),
        (lambda f: (f / "README.md").write_text("c"), "'README.md' has 1 bytes, not 4"),
        (lambda f: (f / "x.py").write_text(""), "'x.py' was added, and loaders may read it"),
        (lambda f: (f / "x.bin").write_text(""), "'x.bin' was added, and loaders may read it"),
        (lambda f: reworded(f, "bits", 2.0), "mpsearch.json was edited"),
        (
            lambda f: (f / "tokenizer.model").write_text(""),
            "'tokenizer.model' was added, and loaders may read it",
        ),
        (
            lambda f: (f / "sub" / "y.jinja").write_text(""),
            "'sub/y.jinja' was added, and loaders may read it",
        ),
        (
            lambda f: (f / "sub" / "x.jinja").write_text("evi"),
            "'sub/x.jinja' was changed: its digest is another",
        ),
    ],
)
def test_a_change_is_named(folder: Path, damage: Damage, said: str) -> None:
    damage(folder)
    assert faults(folder, read_manifest(folder)) == [said]


def test_notes_of_the_owner_may_be_added(folder: Path) -> None:
    (folder / "NOTES.md").write_text("mine")
    assert faults(folder, read_manifest(folder)) == []


@pytest.mark.parametrize("written", [{}, {"bytes": None}, {"bytes": "4"}, [], "4"])
def test_an_entry_that_says_no_size_is_named(folder: Path, written: object) -> None:
    about = read_manifest(folder)
    reworded(folder, "files", {**about["files"], "README.md": written})
    found = faults(folder, read_manifest(folder))
    assert "mpsearch.json does not say how 'README.md' was written" in found


@pytest.mark.parametrize(
    "name", ["../w.safetensors", "/etc/passwd", "sub/../../w.safetensors", ".."]
)
def test_names_that_lead_outside_are_not_followed(folder: Path, name: str) -> None:
    (folder.parent / "w.safetensors").write_text("weights")
    about = read_manifest(folder)
    reworded(folder, "files", {**about["files"], name: {"bytes": 7, "sha256": ""}})
    assert f"mpsearch.json names '{name}', which is no file of this folder" in faults(
        folder, read_manifest(folder)
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "has no mpsearch.json"), ("{", "cannot be read"), ("[]", "is no manifest")],
)
def test_what_is_no_manifest_is_refused_in_one_line(
    tmp_path: Path, content: str | None, words: str
) -> None:
    if content is not None:
        (tmp_path / NAME).write_text(content)
    with pytest.raises(RunError, match=words) as caught:
        read_manifest(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_older_manifest_without_files_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text('{"target": "gptq"}')
    assert faults(tmp_path, read_manifest(tmp_path)) == [
        "mpsearch.json lists no files: another version of mpsearch wrote it; export again"
    ]
