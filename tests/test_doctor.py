"""The doctor: every fact that decides what can be done here, missing libraries included."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

import pytest

from mpsearch import doctor


def found() -> dict[str, str]:
    return {name: value for name, value, _ in doctor.examine()}


def test_it_names_python_device_memory_home_disk_and_every_library() -> None:
    findings = doctor.examine()
    names = [name for name, _, _ in findings]
    assert names[:5] == ["python", "device", "memory", "home", "disk"]
    assert {"torch", "transformers", "optuna", "compressed-tensors"} <= set(names)
    assert {"gptqmodel", "bitsandbytes"} <= set(names)
    assert len(set(names)) == len(names)
    assert all(value and use for _, value, use in findings)


def test_it_says_what_is_really_here() -> None:
    values = found()
    assert values["python"] == platform.python_version()
    assert values["torch"] == importlib.metadata.version("torch")
    assert values["device"].split(", ")[1] in ("bfloat16", "float32")
    for name in ("memory", "disk"):
        number, unit = values[name].split()
        assert float(number) > 0
        assert unit in ("KiB", "MiB", "GiB", "TiB")


def test_a_missing_library_is_missing_and_its_use_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    version = importlib.metadata.version

    def without(name: str) -> str:
        if name in ("gptqmodel", "bitsandbytes"):
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without)
    findings = doctor.examine()
    assert {"gptqmodel", "bitsandbytes"} <= {name for name, _, _ in findings}
    for name, value, use in findings:
        assert (value == "missing") == (name in ("gptqmodel", "bitsandbytes"))
        if value == "missing":
            assert "pip install" in use


def test_a_home_that_is_not_there_yet_is_shown_and_not_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    home = tmp_path / "not" / "yet"
    monkeypatch.setenv("MPSEARCH_HOME", str(home))
    assert found()["home"] == str(home)
    assert not home.parent.exists()


def test_the_device_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPSEARCH_DEVICE", "cpu")
    assert found()["device"].startswith("cpu, ")
