"""Peak memory of real forwards on a CPU, beside what `mpsearch fit` predicts for them.

Protocol: small models of several kinds, built from configs with random weights, in float32 and in
bfloat16; a whole prompt at once through transformers with its cache, several lengths and batches.
Measured is the process's largest resident size above that before the forward (the kernel's own
count, Linux only). Predicted are the activation, KV cache, mask and scores terms of
`mpsearch/budget.py`, for that dtype. In a batch one prompt is a token shorter. Logits are read at
one token.

    python benchmarks/memory.py [--out FILE]

Prints a Markdown table; writes `rows` of model, dtype, length, batch, measured_bytes,
predicted_bytes, each term's bytes, ratio, and the extreme ratios.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from result_file import commit, load, save
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3Config,
)

from mpsearch.architecture import read_architecture
from mpsearch.budget import (
    RUNTIMES,
    Workload,
    activation_bytes,
    kv_cache_bytes,
    mask_bytes,
    scores_bytes,
)
from mpsearch.console import quiet_libraries, say

_SIZES = {"num_hidden_layers": 2, "vocab_size": 1000, "max_position_embeddings": 8192}
MODELS: dict[str, PretrainedConfig] = {
    "grouped queries, wide feed-forward": LlamaConfig(
        hidden_size=1024, intermediate_size=3584, num_attention_heads=16, num_key_value_heads=4,
        **_SIZES,
    ),
    "multi-head, narrow feed-forward": LlamaConfig(
        hidden_size=1024, intermediate_size=1024, num_attention_heads=16, num_key_value_heads=16,
        **_SIZES,
    ),
    "one key-value head": LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_attention_heads=8, num_key_value_heads=1,
        **_SIZES,
    ),
    "wide heads": Qwen3Config(
        hidden_size=1024, intermediate_size=1024, num_attention_heads=16, num_key_value_heads=8,
        head_dim=128, **_SIZES,
    ),
    "sliding window of 512": Gemma3TextConfig(
        hidden_size=1024, intermediate_size=3072, num_attention_heads=8, num_key_value_heads=4,
        head_dim=128, sliding_window=512, layer_types=["sliding_attention", "full_attention"],
        **_SIZES,
    ),
    "softcapped scores": Gemma2Config(
        hidden_size=1024, intermediate_size=3072, num_attention_heads=8, num_key_value_heads=4,
        head_dim=128, sliding_window=512, layer_types=["sliding_attention", "full_attention"],
        **_SIZES,
    ),
    "2 of 4 experts": MixtralConfig(
        hidden_size=1024, intermediate_size=1792, num_attention_heads=16, num_key_value_heads=4,
        num_local_experts=4, num_experts_per_tok=2, **_SIZES,
    ),
    "GPT-2": GPT2Config(n_embd=1024, n_head=16, n_layer=2, n_positions=8192, vocab_size=1000),
}  # fmt: skip
SHAPES = ((2048, 1), (4096, 1), (1024, 4), (512, 16))  # length, batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/memory.json"))
    args = parser.parse_args()
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        # Freed blocks go back to the system at once, so that a peak is one of what is in use.
        changed = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        os.execve(sys.executable, [sys.executable, *sys.argv], changed)
    quiet_libraries()
    result: dict[str, Any] = load(args.out)
    result["conditions"] = {
        "commit": commit(),
        "versions": {name: version(name) for name in ("mpsearch", "torch", "transformers")},
    }
    result["rows"] = []
    for name, config in MODELS.items():
        for dtype in (torch.float32, torch.bfloat16):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
            for length, batch in SHAPES:
                row = _row(name, config, model, length, batch)
                say(f"{name}, {row['dtype']}, {length} x {batch}: {row['ratio']:.3f}")
                result["rows"].append(row)
    ratios = [row["ratio"] for row in result["rows"]]
    result["ratios"] = {"least": min(ratios), "most": max(ratios)}
    save(args.out, result)
    print("| model | measured / predicted |\n|---|---|")
    for name in MODELS:
        mine = [row["ratio"] for row in result["rows"] if row["model"] == name]
        print(f"| {name} | {min(mine):.2f} to {max(mine):.2f} |")


def _row(
    name: str, config: PretrainedConfig, model: Any, length: int, batch: int
) -> dict[str, Any]:
    architecture = read_architecture(config.to_dict(), name)
    item_bytes = model.dtype.itemsize
    workload = Workload(length, batch, "fp32" if item_bytes == 4 else "bf16")
    predicted = {
        "activation_bytes": length * batch * activation_bytes(architecture, item_bytes),
        "kv_cache_bytes": kv_cache_bytes(architecture, RUNTIMES["transformers"], workload),
        "mask_bytes": mask_bytes(architecture, workload),
        "scores_bytes": scores_bytes(architecture, workload, item_bytes),
    }
    measured = _peak_bytes(model, length, batch)
    return {
        "model": name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "length": length,
        "batch": batch,
        "measured_bytes": measured,
        "predicted_bytes": sum(predicted.values()),
        **predicted,
        "ratio": measured / sum(predicted.values()),
    }


@torch.inference_mode()
def _peak_bytes(model: Any, length: int, batch: int) -> int:
    """Resident above what was resident before, at its highest."""
    tokens = torch.randint(0, 1000, (batch, length), generator=torch.Generator().manual_seed(0))

    read = torch.ones_like(tokens)
    if batch > 1:
        read[0, 0] = 0  # a shorter prompt than the others

    def run(some: torch.Tensor) -> Any:
        cache = DynamicCache(config=model.config)
        shown = read[: len(some), : some.shape[1]]
        return model(some, attention_mask=shown, past_key_values=cache, logits_to_keep=1)

    run(tokens[:, :64])  # what is made once
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status_bytes("VmRSS")
    run(tokens)
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"{field}:\s+(\d+) kB", status)
    assert found is not None, field
    return int(found.group(1)) * 1024


if __name__ == "__main__":
    main()
