"""One search of the built-in model twice, loaded and block by block: is it the same search?

Protocol: the same budget, facts (of a few built-in relations), seed and batches of four proposals;
a bank by rounding that is built anew for each, in a folder of its own. Compared: every file of the
bank, the sensitivity table, the proposals, every value of every fact in every evaluation, slopes
included as they decide proposals, the front, the pick and its test facts. Equal means to the bit.
Seconds are of the whole search by stage, loaded first, then streamed, on a machine as busy as it
was.

    python benchmarks/both_ways.py [--trials 12] [--search-facts 60] [--relations 5] [--out FILE]

Writes one JSON: `same`, what was compared to whether it is equal and how many things that is;
`seconds`, by way and stage. Ends with 1 where anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from result_file import commit, save

import mpsearch as mps
from mpsearch.console import Progress, quiet_libraries, say
from mpsearch.facts import FactSet
from mpsearch.measures import Sensitivity
from mpsearch.models import Model, load_whole
from mpsearch.run import Run
from mpsearch.skeleton import load_skeleton

MODEL = "builtin:smollm2-135m"
OPEN: dict[str, Callable[[str], Model]] = {"loaded": load_whole, "streamed": load_skeleton}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--search-facts", type=int, default=60)
    parser.add_argument("--budget", default="104MiB")
    parser.add_argument("--relations", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/both_ways.json"))
    args = parser.parse_args()
    quiet_libraries()
    question = {"budget": args.budget, "trials": args.trials, "search_facts": args.search_facts}
    every = FactSet.builtin()
    relations = list(dict.fromkeys(fact.relation for fact in every.facts))[: args.relations]
    facts = FactSet(tuple(f for f in every.facts if f.relation in relations), "built-in, a part")
    found: dict[str, dict[str, Any]] = {}
    seconds: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as made:
        models = {way: load(MODEL) for way, load in OPEN.items()}  # before their home is another
        for way, model in models.items():
            say(way)
            run = searched(model, Path(made) / way, {**question, "facts": facts})
            found[way], seconds[way] = held(run, Path(made) / way), run.content["took_seconds"]
    same = {
        what: {"equal": found["loaded"][what] == found["streamed"][what], "count": len(value)}
        for what, value in found["loaded"].items()
    }
    result = {
        "same": same,
        "seconds": seconds,
        "question": {**question, "relations": relations},
        "conditions": {
            "model": MODEL,
            "commit": commit(),
            "threads": torch.get_num_threads(),
            "load": os.getloadavg(),
            "machine": f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
            "versions": {name: version(name) for name in ("mpsearch", "torch", "transformers")},
        },
    }
    save(args.out, result)
    show(result)
    return 0 if all(row["equal"] for row in same.values()) else 1


def searched(model: Model, folder: Path, question: Mapping[str, Any]) -> Run:
    """A search whose bank is its own."""
    os.environ["MPSEARCH_HOME"] = str(folder / "home")
    with Progress() as report:
        found: Run = mps.search(
            model, mps.SearchSpace.default(), quantizer="rounding", at_once=4, report=report,
            out=folder / "run", **question,
        )  # fmt: skip
    return found


def held(run: Run, folder: Path) -> dict[str, Any]:
    """What is compared, each with a length."""
    front, table = run.front(), Sensitivity.load(run.folder / "sensitivity.json")
    bank = sorted((folder / "home").rglob("*.safetensors"))
    scores = run.scores()
    return {
        "bank files": {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in bank},
        "sensitivities": [*table.fisher_nats.items(), *table.weight_error.items()],
        "assignments searched": [dict(s.assignment) for s in scores if s.kind == "search"],
        "answer losses": [
            (s.partition, s.assignment.id, loss) for s in scores for loss in s.loss_per_fact
        ],
        "evaluations": [(s.partition, s.assignment.id, s.kl_nats, s.top1, s.correct, s.text)
                        for s in scores],
        "front": front.pareto_ids,
        "pick": [front.pick and front.pick.id, front.verdict],
    }  # fmt: skip


def show(result: Mapping[str, Any]) -> None:
    print("| compared | count | equal to the bit |\n|---|---|---|")
    for what, row in result["same"].items():
        print(f"| {what} | {row['count']} | {'yes' if row['equal'] else 'NO'} |")
    print("\n| stage | loaded, s | streamed, s | ratio |\n|---|---|---|---|")
    for stage, loaded in result["seconds"]["loaded"].items():
        streamed = result["seconds"]["streamed"][stage]
        ratio = f"{streamed / loaded:.2f}" if loaded > 0.05 else ""
        print(f"| {stage} | {loaded:.1f} | {streamed:.1f} | {ratio} |")


if __name__ == "__main__":
    raise SystemExit(main())
