"""A mixed candidate for every target: exported, loaded by the target's own library, asked again.

Protocol: the built-in model; for each target the space file of its name, formats drawn at random
(seeded) for each group, at the target's default quantizer. The candidate is scored in place on test
facts, exported, and asked again in a fresh process through the loader that serves it, as
`mpsearch verify` does. Export seconds are without quantizing, which the bank has done. Equal facts
are those answered alike, right or wrong; log-probabilities are of the answers, in nats.

    python benchmarks/export.py [--targets NAME ...] [--facts 320] [--out FILE]

Prints a Markdown table; writes `rows` of target, formats, export_seconds, predicted_bytes,
stored_bytes, folder_bytes, facts, equal_facts, largest_difference_nats, load_seconds, ask_seconds,
loader. vLLM and auto-gptq answer in environments of their own: `make test-vllm`,
`make test-autogptq`; here their checkpoints are loaded by transformers and gptqmodel.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from result_file import commit, load, save

import mpsearch as mps
from mpsearch.asked import balanced
from mpsearch.assignment import Assignment
from mpsearch.bank import Bank
from mpsearch.console import quiet_libraries, say
from mpsearch.evaluate import Bench, quantized_layers
from mpsearch.export import EXPORT_TARGETS, tensor_bytes
from mpsearch.export.dequantized import DEQUANTIZED, as_stored
from mpsearch.facts import FactSet
from mpsearch.models import Model
from mpsearch.quantizers import get_quantizer
from mpsearch.recall import SHOTS, RecallProxy
from mpsearch.scores import FactScores
from mpsearch.space import ResolvedSpace
from mpsearch.verify import ask_fresh

MODEL = "builtin:smollm2-135m"
TARGETS = (*EXPORT_TARGETS, DEQUANTIZED)
SPACES = Path(__file__).parents[1] / "search_spaces"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--facts", type=int, default=320)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/export.json"))
    args = parser.parse_args()
    quiet_libraries()
    model, facts = mps.load_model(MODEL), FactSet.builtin()
    asked = balanced(facts.part("test"), args.facts)
    proxy = RecallProxy(model, facts, asked, contrast=True)
    result = load(args.out)
    for target in args.targets:
        say(target)
        row = measure(model, proxy, target)
        result["rows"] = [r for r in result["rows"] if r["target"] != target] + [row]
        result["conditions"] = conditions(model)
        save(args.out, result)
    print(table(result["rows"]))


def measure(model: Model, proxy: RecallProxy, target: str) -> dict[str, Any]:
    """One target's row."""
    space = resolve(model, target)
    bank = Bank(model, get_quantizer(None, space.target.container))
    candidate = drawn(space, json.dumps(bank.settings))
    bank.build(quantized_layers(space, candidate))
    with Bench(space, bank) as bench:
        scored = bench.evaluate(candidate, proxy).scores
    with tempfile.TemporaryDirectory() as scratch:
        began = time.perf_counter()
        folder = mps.export(model, candidate, to=target, out=Path(scratch) / "export", space=space)
        seconds = time.perf_counter() - began
        answered = ask_fresh({
            "model": str(folder), "own": True, "facts": None, "shots": SHOTS,
            "chat_template": False, "keys": [(f.relation, f.subject) for f in proxy.facts],
        })  # fmt: skip
        formats = space.layer_formats(candidate).values()
        return {
            "target": target,
            "formats": sorted({fmt.name for fmt in formats}),
            "export_seconds": seconds,
            "predicted_bytes": space.stored_bytes(as_stored(candidate, target)),
            "stored_bytes": tensor_bytes(folder),
            "folder_bytes": sum(path.stat().st_size for path in folder.iterdir()),
            **agreement(scored, answered),
            **{key: answered[key] for key in ("load_seconds", "ask_seconds", "loader")},
        }


def resolve(model: Model, target: str) -> ResolvedSpace:
    """The space file of a target; what is dequantized has none, and gets packed integers."""
    path = SPACES / f"{target.replace('-', '_')}.yaml"
    own = path if path.exists() else SPACES / "compressed_tensors.yaml"
    return mps.SearchSpace.load(own).resolve(model)


def drawn(space: ResolvedSpace, bank: str) -> Assignment:
    """Formats at random, the same each time."""
    generator = np.random.default_rng(0)
    options = space.options.items()
    chosen = {name: fmts[generator.integers(len(fmts))].name for name, fmts in options}
    return Assignment.of(chosen, bank)


def agreement(scored: FactScores, answered: dict[str, Any]) -> dict[str, Any]:
    assert scored.correct is not None  # distractors were asked
    return {
        "facts": len(scored.correct),
        "equal_facts": int((scored.correct == np.array(answered["correct"])).sum()),
        "largest_difference_nats": float(
            np.abs(scored.log_prob - np.array(answered["log_prob_nats"])).max()
        ),
    }


def conditions(model: Model) -> dict[str, Any]:
    libraries = ("mpsearch", "torch", "transformers", "compressed-tensors", "gptqmodel")
    return {
        "model": MODEL,
        "dtype": str(model.dtype),
        "commit": commit(),
        "threads": torch.get_num_threads(),
        "machine": f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "versions": {name: version(name) for name in libraries},
    }


def table(rows: list[dict[str, Any]]) -> str:
    header = (
        *("target", "export (s)", "bytes predicted", "stored", "facts equal"),
        *("largest difference (nats)", "reload (s)", "loader"),
    )
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for row in rows:
        cells = (
            row["target"],
            f"{row['export_seconds']:.1f}",
            f"{row['predicted_bytes']:,}",
            f"{row['stored_bytes']:,}",
            f"{row['equal_facts']} of {row['facts']}",
            f"{row['largest_difference_nats']:.3g}",
            f"{row['load_seconds']:.1f}",
            row["loader"],
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
