"""`mpsearch bank`: what is there, what is made, on which text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from mpsearch import cli, tensor_files

SPACE = "version: 1\ntarget: compressed-tensors\nformats: [int4-g64, int3-g32-asym]\n"
LAYERS = 14  # of the tiny model


@pytest.fixture
def space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MPSEARCH_HOME", str(tmp_path / "home"))
    (tmp_path / "space.yaml").write_text(SPACE)
    return tmp_path / "space.yaml"


def bank(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main(["bank", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def files(home: Path) -> list[Path]:
    return sorted(home.rglob("*.safetensors"))


def test_listing_makes_nothing_and_building_says_what_it_will_write(
    tiny_folder: Path, space: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = bank(capsys, tiny_folder, "--space", space, "--list")
    assert code == 0
    assert f"0 of {2 * LAYERS}" in out
    assert "to write" not in err
    assert not files(tmp_path / "home")

    code, out, err = bank(capsys, tiny_folder, "--space", space)
    assert code == 0
    assert f"{2 * LAYERS} of {2 * LAYERS} files to write" in err
    told = err.index(" for the rest, by a layer of each shape")
    assert err.index("to write") < told < err.index("quantizing (rounding): ")
    assert err.splitlines()[-1].startswith("next: mpsearch search ")
    assert f"{2 * LAYERS} of {2 * LAYERS}" in out
    made = files(tmp_path / "home")
    assert len(made) == 2 * LAYERS

    made[0].write_bytes(b"damaged")
    code, out, err = bank(capsys, tiny_folder, "--space", space, "--json")
    assert code == 0
    assert f"1 of {2 * LAYERS} files to write" in err
    told = json.loads(out)
    assert [row["files"] for row in told["formats"]] == [LAYERS, LAYERS]
    assert {row["format"] for row in told["formats"]} == {"int4-g64", "int3-g32-asym"}
    payload = sum(row["stored_bytes"] for row in told["formats"])
    on_disk = sum(file.stat().st_size for file in made)
    assert payload < on_disk < payload + 1000 * len(made)  # their headers
    assert told["settings"]["quantizer"] == "rounding"


def test_every_file_is_read_once(
    tiny_folder: Path,
    space: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[str] = []

    def noted(path: Path, framework: str) -> Any:
        read.append(path.name)
        return safe_open(path, framework)

    monkeypatch.setattr(tensor_files, "safe_open", noted)
    assert bank(capsys, tiny_folder, "--space", space)[0] == 0
    assert read == []  # all is new
    assert bank(capsys, tiny_folder, "--space", space)[0] == 0
    assert sorted(read) == [file.name for file in files(tmp_path / "home")]


def test_another_text_is_another_bank(
    tiny_folder: Path, space: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gptqmodel")
    (tmp_path / "text").write_text("the color of s1 is red " * 2000)
    (tmp_path / "short").write_text("the color of s1 is red")
    call = (tiny_folder, "--space", space, "--quantizer", "gptq", "--json", "--calibration")
    code, out, _ = bank(capsys, *call, tmp_path / "text")
    assert code == 0
    assert json.loads(out)["settings"]["calibration"]["text"] == "of a file"
    made = len(files(tmp_path / "home"))
    assert made == 2 * LAYERS
    code, out, err = bank(capsys, *call, tmp_path / "short")
    assert (code, out) == (2, "")
    assert "6 tokens, and 8192 are needed" in err.splitlines()[-1]
    code, out, err = bank(capsys, *call, tmp_path / "missing")
    assert (code, out) == (2, "")
    assert "cannot be read" in err.splitlines()[-1]
    assert len(files(tmp_path / "home")) == made


def test_a_format_that_a_quantizer_does_not_make_is_one_line(
    tiny_folder: Path, space: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("hqq")
    code, out, err = bank(capsys, tiny_folder, "--space", space, "--quantizer", "hqq")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("mpsearch: quantizer 'hqq' does not make format 'int4-")
    assert "to write" not in err
    assert not files(tmp_path / "home")
