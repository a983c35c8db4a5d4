"""The GPU that was measured: kept as it was, and refused where it is missing or damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpsearch.errors import UsageError
from mpsearch.this_device import ThisDevice


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MPSEARCH_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_what_is_saved_is_loaded(home: Path) -> None:
    device = ThisDevice("A card", 12 * 2**30, 500, 700)
    assert device.save() == home / "device.json"
    assert ThisDevice.load() == device


def test_nothing_measured_says_how_to() -> None:
    with pytest.raises(UsageError, match="has not been measured; run 'mpsearch fit --calibrate'"):
        ThisDevice.load()


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"name": "A card"}', "damaged"),
        ('{"name": "A", "memory_bytes": "x", "other_bytes": 0, "context_bytes": 0}', "damaged"),
        ('{"name": "A", "memory_bytes": 9, "other_bytes": 5, "context_bytes": 5}', "cannot be"),
        ('{"name": "A", "memory_bytes": 9, "other_bytes": -5, "context_bytes": 0}', "cannot be"),
    ],
)
def test_a_file_that_makes_no_sense_is_named(text: str, word: str, home: Path) -> None:
    home.mkdir()
    (home / "device.json").write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=word) as caught:
        ThisDevice.load()
    assert "calibrate" in str(caught.value)
