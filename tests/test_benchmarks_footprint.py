"""The benchmark of footprints: a model is written, each job runs both ways, rows are kept."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import footprint as benchmark

from mpsearch import device
from mpsearch.facts import FactSet

TINY = (2, 0, {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
               "num_key_value_heads": 2, "tie_word_embeddings": True})  # fmt: skip


@pytest.fixture
def written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path, tiny_facts: FactSet
) -> Path:
    """The tiny model as the benchmark writes one, with its bank."""
    monkeypatch.setenv("MPSEARCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(benchmark, "MODELS", {"tiny": TINY})
    monkeypatch.setattr(benchmark, "builtin_folder", lambda: tiny_folder)
    monkeypatch.setattr(benchmark.FactSet, "builtin", lambda: tiny_facts)
    benchmark.write_model(tmp_path, "tiny")
    return tmp_path


@pytest.mark.parametrize("job", benchmark._JOBS)
def test_a_job_runs_both_ways_and_says_its_peak(
    written: Path, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    # The tests' own process has grown beyond what a small model is said to need.
    monkeypatch.setattr(benchmark, "limit_memory", told.append)
    assert len(list((written / "home").rglob("*.safetensors"))) == 2 * 7 * 3
    for streamed in (False, True):
        row = benchmark.peak_of(written, job, streamed)
        assert row["limit_bytes"] == told[-1] > 2**28
        assert row["ratio"] == row["peak_bytes"] / row["limit_bytes"]
        assert row["peak_bytes"] >= device.used_memory_bytes(device.pick_device()) // 2


def test_rows_are_kept_and_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, str]] = []

    def measured(folder: Path, job: str, way: str) -> dict[str, Any]:
        asked.append((job, way))
        return {"job": job, "way": way, "limit_bytes": 2**30, "peak_bytes": 2**29, "ratio": 0.5}

    monkeypatch.setattr(benchmark, "measured", measured)
    monkeypatch.setattr(benchmark, "write_model", lambda folder, name: None)
    out = tmp_path / "rows.json"
    command = ["footprint.py", "--models", "deep", "--out", str(out), "--jobs"]
    for jobs in (["ask"], ["ask", "bank"]):
        monkeypatch.setattr(sys, "argv", [*command, *jobs])
        benchmark.main()
    assert asked == [(job, way) for job in ("ask", "bank") for way in ("loaded", "streamed")]
    kept = json.loads(out.read_text(encoding="utf-8"))
    assert [(row["model"], row["job"]) for row in kept["rows"]] == [
        ("deep", job) for job in ("ask", "ask", "bank", "bank")
    ]
    assert kept["conditions"]["commit"]
    assert "| deep | bank | streamed | 1024 MiB | 512 MiB | 0.50 |" in capsys.readouterr().out
