"""The streaming benchmark asks the same facts both ways and counts what is read."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from conftest import build_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import streaming

from mpsearch.facts import FactSet
from mpsearch.forward import Pass

TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


@pytest.fixture
def tiny_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path, tiny_facts: FactSet
) -> None:
    """On the tiny tokenizer and its facts."""
    monkeypatch.setenv("MPSEARCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(streaming, "_SIZES", TINY)
    monkeypatch.setattr(streaming, "builtin_folder", lambda: tiny_folder)
    monkeypatch.setattr(streaming.FactSet, "builtin", lambda: tiny_facts)
    monkeypatch.setattr(streaming, "MODEL", str(tiny_folder))


@pytest.mark.usefixtures("tiny_benchmark")
def test_a_written_model_is_asked_both_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    run = Pass.run
    monkeypatch.setattr(Pass, "run", lambda work, **how: asked.append(run(work, **how)))
    sizes = streaming.write_model(tmp_path, depth=3)
    assert sizes["outside_bytes"] == 2 * (len(build_tokenizer()) * 64 + 64)
    assert sizes["weights_bytes"] > sizes["outside_bytes"] + 3 * 2 * 3 * 64 * 128
    for way in streaming.WAYS:
        assert streaming.peak_of(tmp_path, way)["peak_bytes"] > 2**20
    loaded, streamed = asked
    assert loaded.shape == streamed.shape == (16,)
    assert not torch.equal(loaded, streamed)  # the second is of a candidate
    assert (loaded - streamed).abs().max() < 20


@pytest.mark.usefixtures("tiny_benchmark")
def test_bytes_are_of_an_evaluation_and_shared_by_candidates(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = {row["way"]: row for row in streaming.speed(facts=8, turns=1)}
    assert list(rows) == ["loaded", "streamed, 1", "streamed, 4"]
    assert rows["loaded"]["read_bytes"] == 0
    assert rows["loaded"]["cpu_seconds_ratio"] == 1.0
    # Norms, and all layers packed; four candidates of three formats share many.
    norms = 2 * 2 * 2 * 64
    assert rows["streamed, 1"]["read_bytes"] == rows["loaded"]["packed_bytes_of_the_first"] + norms
    assert 0 < rows["streamed, 4"]["read_bytes"] < rows["streamed, 1"]["read_bytes"]
    streaming.show({"memory": [], "speed": list(rows.values())})
    assert "| streamed, 4 |" in capsys.readouterr().out
