"""What the table of sensitivities costs, in evaluations, and how it ranks what it predicts.

Protocol: the built-in model, a bank by rounding, as many facts as a search takes for the table and
for an evaluation. Costs are processor seconds of one thread, the table and evaluations in turn; an
evaluation is of candidates with other formats in every group, nothing reused, and their mean.

The ranking is Spearman's between KL-Fisher and the KL that is measured with one group alone in a
format (`perturb.py`), on the same facts, for groups at even distances through the model. A seed is
one of the sampled answers. What the file holds already is not measured again.

    python benchmarks/sensitivity.py [--groups 24] [--seeds N ...] [--turns 3] [--out FILE]
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evaluation_cost import cpu_seconds
from result_file import commit, load, save

import mpsearch as mps
from mpsearch.asked import MOST_FACTS, balanced
from mpsearch.assignment import Assignment
from mpsearch.bank import Bank
from mpsearch.console import Progress, quiet_libraries, say
from mpsearch.evaluate import Bench, all_layers
from mpsearch.facts import Fact
from mpsearch.quantizers import get_quantizer
from mpsearch.recall import RecallProxy
from mpsearch.space import ResolvedSpace

MODEL = "builtin:smollm2-135m"
SPACE = Path(__file__).parents[1] / "search_spaces" / "compressed_tensors.yaml"
_CANDIDATES = 3  # a turn


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--groups", type=int, default=24)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--facts", type=int, default=MOST_FACTS["sensitivity"])
    parser.add_argument("--search-facts", type=int, default=MOST_FACTS["search"])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/sensitivity.json"))
    args = parser.parse_args(arguments)
    quiet_libraries()
    torch.set_num_threads(1)
    model, facts = mps.load_model(args.model), mps.FactSet.builtin()
    space = mps.SearchSpace.load(SPACE).resolve(model)
    bank = Bank(model, get_quantizer("rounding", space.target.name))
    asked = facts.part("search")
    some = tuple(balanced(asked, args.facts))
    result = load(args.out)
    result["conditions"] = {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "commit": commit(),
        "dtype": str(model.dtype),
        "threads": 1,
        "machine": f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "facts_of_the_table": len(some),
        "facts_of_an_evaluation": args.search_facts,
        "formats": list(space.space.formats),
        "versions": {name: version(name) for name in ("mpsearch", "torch", "transformers")},
    }
    with Progress() as progress:
        bank.build(all_layers(space), progress)

        def table(of: ResolvedSpace, seed: int, check: bool = False) -> mps.Sensitivity:
            return mps.measure_sensitivity(
                of, bank, facts, some, seed=seed, around=False, check=check, report=progress
            )

        if "cost" not in result:
            result["cost"] = _cost(space, bank, facts, args, lambda: table(space, 0))
            save(args.out, result)
        few = _some(space, args.groups)
        for seed in args.seeds:
            if seed not in {row["seed"] for row in result["rows"]}:
                found = table(few, seed, check=True).correlations()
                result["rows"] += [
                    {"seed": seed, "groups": len(few.groups), **asdict(correlation)}
                    for correlation in found
                    if {correlation.a, correlation.b} == {"fisher_nats", "perturb_nats"}
                ]
                save(args.out, result)
    say(f"a table costs {result['cost']['evaluations']:.1f} evaluations")
    for row in result["rows"]:
        say(f"seed {row['seed']}, {row['over']}: {row['pairs']} pairs, rho {row['spearman']:.3f}")


def _cost(
    space: ResolvedSpace,
    bank: Bank,
    facts: mps.FactSet,
    args: argparse.Namespace,
    table: Callable[[], object],
) -> dict[str, Any]:
    """Processor seconds of tables and of evaluations, in turn."""
    asked: list[Fact] = balanced(facts.part("search"), args.search_facts)
    tables: list[float] = []
    evaluations: list[float] = []
    with Bench(space, bank) as bench:
        proxy = RecallProxy(bank.model, facts, asked, contrast=False, prompts=True)
        for turn in range(args.turns):
            bench.restore()
            tables.append(cpu_seconds(table))
            some = _candidates(space, turn)
            evaluations += [cpu_seconds(partial(bench.evaluate, c, proxy)) for c in some]
    mean = sum(evaluations) / len(evaluations)
    return {
        "table_cpu_seconds": tables,
        "evaluation_cpu_seconds": evaluations,
        "evaluations": sorted(tables)[len(tables) // 2] / mean,
    }


def _candidates(space: ResolvedSpace, turn: int) -> list[Assignment]:
    """Each with another format in every group than the one before; other ones every turn."""
    starts = np.random.default_rng(turn).integers(0, 1000, len(space.groups))
    return [
        Assignment.of({
            name: formats[(int(start) + shift) % len(formats)].name
            for start, (name, formats) in zip(starts, space.options.items(), strict=True)
        })
        for shift in range(_CANDIDATES)
    ]  # fmt: skip


def _some(space: ResolvedSpace, most: int) -> ResolvedSpace:
    """Of groups at even distances, the last one included."""
    count = len(space.groups)
    taken = min(most, count)
    places = {count - 1 - number * count // taken for number in range(taken)}
    groups = tuple(space.groups[place] for place in sorted(places))
    return replace(space, groups=groups, options={g.name: space.options[g.name] for g in groups})


if __name__ == "__main__":
    main()
