"""The memory benchmark measures what a forward holds, and predicts that."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import memory


def test_a_row_predicts_the_terms_and_measures_a_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=1000, max_position_embeddings=128,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    sizes = iter([100_000, 140_000])
    asked = []
    monkeypatch.setattr(memory, "_status_bytes", lambda field: asked.append(field) or next(sizes))
    row = memory._row("tiny", config, model, 80, 2)
    assert asked == ["VmRSS", "VmHWM"]
    assert row["measured_bytes"] == 40_000
    assert row["activation_bytes"] == 80 * 2 * 2 * (4 * 32 + 3 * 64)
    assert row["kv_cache_bytes"] == 80 * 2 * 2 * 2 * 2 * 8 * 2
    assert row["mask_bytes"] == 2 * 80**2
    assert row["predicted_bytes"] == sum(
        row[f"{term}_bytes"] for term in ("activation", "kv_cache", "mask", "scores")
    )
    assert row["ratio"] == 40_000 / row["predicted_bytes"]


def test_the_kernel_says_what_is_resident() -> None:
    before = memory._status_bytes("VmRSS")
    with mmap.mmap(-1, 64 * 2**20) as fresh:  # pages that no allocator has kept
        fresh.write(b"x" * len(fresh))
        assert memory._status_bytes("VmRSS") - before > len(fresh) // 2
    assert memory._status_bytes("VmHWM") >= before
