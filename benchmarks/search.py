"""Uniform, greedy, knapsack and search at the same stored bytes, scored on test facts.

Protocol: one model, one bank, one space. Sizes: uniform 3-bit plus 8 %, half-way to uniform 4-bit,
uniform 4-bit. At each size and seed a whole search runs (its seed decides the sensitivity draws
and the proposals); then the best uniform that fits, greedy, knapsack and the searched point with
the lowest validation loss are scored on all test facts of the relations that the reference knows.
The searched point is taken whether or not it beat the simple ones, so losses show. Test facts
decide nothing. Bias left: all searches share one bank, so the calibration text is the same for all.

    python benchmarks/search.py [--trials 60] [--seeds 3] [--quantizer gptq] [--out FILE]

Writes one JSON: `rows` of size, budget, rival, seed, stored bytes, answer loss, its standard
error, KL, recall, paired difference to the knapsack, dtype of the arithmetic. A row that is there
already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from result_file import load, save

import mpsearch as mps
from mpsearch.allocate import greedy, knapsack, uniform
from mpsearch.assignment import Assignment
from mpsearch.bank import Bank
from mpsearch.console import Progress, quiet_libraries, say
from mpsearch.device import peak_memory_bytes
from mpsearch.estimates import paired_difference
from mpsearch.evaluate import Bench, Evaluation
from mpsearch.run import Run

MODEL = "builtin:smollm2-135m"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--search-facts", type=int, default=400)
    parser.add_argument("--quantizer", default="gptq")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/search.json"))
    args = parser.parse_args()
    quiet_libraries()
    model = mps.load_model(MODEL)
    space = mps.SearchSpace.default().resolve(model)
    sizes = {name: space.stored_bytes(a) for name, a in uniform(space).items()}
    low, high = sizes["int3-g64"], sizes["int4-g64"]
    budgets = {
        "uniform 3-bit + 8 %": int(low * 1.08),
        "half-way to 4-bit": (low + high) // 2,
        "uniform 4-bit": high,
    }
    result = load(args.out)
    result["conditions"] = {
        "model": MODEL,
        "fingerprint": model.fingerprint,
        "quantizer": args.quantizer,
        "trials": args.trials,
        "search_facts": args.search_facts,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("mpsearch", "torch", "optuna")},
    }
    for seed in range(args.seeds):
        for size, budget_bytes in budgets.items():
            if any(row["size"] == size and row["seed"] == seed for row in result["rows"]):
                continue
            say(f"{size}, seed {seed}")
            folder = args.runs / f"{size.replace(' ', '-')}-{seed}"
            start = time.monotonic()
            with Progress() as report:
                run = mps.search(
                    model,
                    space,
                    budget=budget_bytes,
                    out=folder,
                    trials=args.trials,
                    seed=seed,
                    quantizer=args.quantizer,
                    search_facts=args.search_facts,
                    resume=folder.exists(),
                    report=report,
                )
            seconds = time.monotonic() - start
            result["rows"] += _rows(run, model, space, size, seed, seconds)
            most = max(result.get("peak_memory_bytes", 0), peak_memory_bytes())
            result["peak_memory_bytes"] = most
            save(args.out, result)


def _rows(
    run: Run, model: mps.Model, space: Any, size: str, seed: int, seconds: float
) -> list[dict[str, Any]]:
    """Score the rivals of one finished run on all test facts of its known relations."""
    facts = mps.FactSet.builtin()
    known = set(run.relations("search"))
    rivals = _rivals(run, space)
    bank = Bank.of(model, run.question["bank"])
    proxy = mps.RecallProxy(model, facts, facts.part("test", known), contrast=True)
    with Bench(space, bank) as bench:
        scored = {name: bench.evaluate(a, proxy) for name, a in rivals.items()}

    def row(name: str, evaluation: Evaluation) -> dict[str, Any]:
        against = paired_difference(
            evaluation.loss_per_fact, scored["knapsack"].loss_per_fact, proxy.relations
        )
        recall = evaluation.recall
        return {
            "size": size,
            "budget_bytes": run.budget_bytes,
            "rival": name,
            "seed": seed,
            "stored_bytes": space.stored_bytes(evaluation.assignment),
            "answer_loss": evaluation.answer_loss.mean,
            "stderr": evaluation.answer_loss.stderr,
            "kl": evaluation.kl.mean,
            "recall": recall.mean if recall else None,
            "recall_stderr": recall.stderr if recall else None,
            "against_knapsack": against.mean,
            "against_knapsack_stderr": against.stderr,
            "test_facts": len(proxy.facts),
            "dtype": str(model.dtype),
            "search_seconds": seconds if name == "search" else None,
        }

    return [row(name, evaluation) for name, evaluation in scored.items()]


def _rivals(run: Run, space: Any) -> dict[str, Assignment]:
    """The best uniform and the best searched point by validation loss; greedy and knapsack at the
    run's budget, which may be the same assignment."""
    rivals: dict[str, Assignment] = {}
    points = sorted(run.points(), key=lambda point: point.answer_loss.mean)
    for point in points:
        if point.stored_bytes <= run.budget_bytes and point.kind in ("uniform", "search"):
            rivals.setdefault(point.kind, point.assignment)
    table = json.loads((run.folder / "sensitivity.json").read_text(encoding="utf-8"))
    damage = mps.Sensitivity.from_json(table).fisher_nats
    rivals["greedy"] = greedy(space, damage, run.budget_bytes)
    (rivals["knapsack"],) = knapsack(space, damage, [run.budget_bytes])
    return rivals


if __name__ == "__main__":
    main()
