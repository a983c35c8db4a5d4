"""What on search facts foretells the answer loss on facts that a search does not ask?

A search chooses among candidates that are nearly as good as each other, so what it lowers has to
rank those. Protocol: of a finished run on the built-in model, the candidates of least answer loss
that were measured whole and fill the budget, asked the search facts and then all validation and
test facts. Relations are halved at random, again and again: a measure on the search facts of one
half is ranked against the answer loss on the other facts of the same half (`same_relations`) and of
the other half (`other_relations`), by Spearman's correlation over candidates. Rows hold the means
over the halvings. Candidates were chosen by their answer loss on all search facts, which narrows
its range; every measure is seen within it.

    python benchmarks/foretelling.py [--runs FOLDER ...] [--most 30] [--halvings 200] [--out FILE]

A run that the file holds is not measured again.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from result_file import commit, load, save

import mpsearch as mps
from mpsearch.asked import asked_facts
from mpsearch.assignment import Assignment
from mpsearch.bank import Bank
from mpsearch.console import quiet_libraries, say
from mpsearch.estimates import relation_mean
from mpsearch.evaluate import Bench
from mpsearch.facts import FactSet
from mpsearch.measures import spearman
from mpsearch.recall import RecallProxy
from mpsearch.run import Run

MODEL = "builtin:smollm2-135m"
WEIGHTS = (1, 2, 3, 5)  # of prompt KL beside answer loss
_FULL = 0.985  # share of the budget


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, nargs="+", default=[Path("runs/demo")])
    parser.add_argument("--most", type=int, default=30)
    parser.add_argument("--halvings", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/foretelling.json"))
    args = parser.parse_args(arguments)
    quiet_libraries()
    model, facts = mps.load_model(MODEL), FactSet.builtin()
    result = load(args.out)
    for folder in args.runs:
        run = Run.open(folder)
        about = {
            "budget_bytes": run.budget_bytes,
            "seed": run.question["seed"],
            "lowered": run.question["objective"],
        }
        if any(about.items() <= row.items() for row in result["rows"]):
            continue
        search, others = _measure(model, facts, run, args.most)
        parts = "search", "validation", "test"
        relations, *other_relations = (run.relations(part) for part in parts)
        found = correlations(
            search, relations, others, [name for part in other_relations for name in part],
            args.halvings, np.random.default_rng(0),
        )  # fmt: skip
        about |= {"candidates": len(others), "dtype": str(model.dtype), "commit": commit()}
        result["rows"] += [{**about, "measure": name, **rhos} for name, rhos in found.items()]
        save(args.out, result)
    for row in result["rows"]:
        say(
            f"{row['budget_bytes']:,} bytes, {row['measure']}: rho {row['same_relations']:.2f} in "
            f"the same relations, {row['other_relations']:.2f} in others"
        )


def _measure(
    model: mps.Model, facts: FactSet, run: Run, most: int
) -> tuple[dict[str, NDArray[Any]], NDArray[Any]]:
    """`(candidates, search facts)` of each measure, `(candidates, other facts)` of answer loss."""
    space = run.space
    chosen = candidates(run, most)
    asked = [asked_facts(run, facts, part) for part in ("search", "validation", "test")]
    with Bench(space, Bank.of(model, run.question["bank"])) as bench:
        search = RecallProxy(model, facts, asked[0], contrast=False, prompts=True)
        rest = RecallProxy(model, facts, [*asked[1], *asked[2]], contrast=False)
        found = []
        for number, assignment in enumerate(chosen, start=1):
            say(f"{run.folder}: candidate {number} of {len(chosen)}")
            one, other = (bench.evaluate(assignment, proxy) for proxy in (search, rest))
            found.append((one.loss_per_fact, one.scores.kl, one.scores.prompt_kl,
                          other.loss_per_fact))  # fmt: skip
    loss, kl, prompt_kl, others = (np.array(values) for values in zip(*found, strict=True))
    measures = {
        "answer loss": loss,
        "KL": kl,
        "prompt KL": prompt_kl,
        "answer loss + KL": loss + kl,
        **{f"answer loss + {weight} prompt KL": loss + weight * prompt_kl for weight in WEIGHTS},
    }
    return measures, others


def candidates(run: Run, most: int) -> list[Assignment]:
    """Those of least answer loss on all search facts that fill the budget."""
    relations, least_bytes = run.relations("search"), _FULL * run.budget_bytes
    ranked = sorted(
        (relation_mean(score.loss_per_fact, relations).mean, score.assignment.id, score.assignment)
        for score in run.scores()
        if score.partition == "search"
        and least_bytes <= run.space.stored_bytes(score.assignment) <= run.budget_bytes
    )
    return [assignment for _, _, assignment in ranked[:most]]


def correlations(
    search: Mapping[str, NDArray[Any]],
    relations: Sequence[str],
    others: NDArray[Any],
    other_relations: Sequence[str],
    halvings: int,
    rng: np.random.Generator,
) -> dict[str, dict[str, float]]:
    """Mean rank correlation of each measure with the answer loss on other facts.

    Args:
        search: by measure `(candidates, facts)`.
        others: `(candidates, other facts)` answer loss.
    """
    names = sorted(set(relations) & set(other_relations))
    means = {name: _by_relation(values, relations, names) for name, values in search.items()}
    loss = _by_relation(others, other_relations, names)
    sums = {name: np.zeros(2) for name in search}
    for _ in range(halvings):
        order = rng.permutation(len(names))
        half, rest = order[: len(names) // 2], order[len(names) // 2 :]
        for name, mean in means.items():
            seen = mean[:, half].mean(1).tolist()
            sums[name] += [
                spearman(seen, loss[:, some].mean(1).tolist()) or 0.0 for some in (half, rest)
            ]
    return {
        name: dict(zip(("same_relations", "other_relations"), (total / halvings).tolist(),
                       strict=True))
        for name, total in sums.items()
    }  # fmt: skip


def _by_relation(
    values: NDArray[Any], relations: Sequence[str], names: Sequence[str]
) -> NDArray[Any]:
    """`(candidates, relations)` means of `(candidates, facts)`."""
    of = np.asarray(relations)
    return np.stack([values[:, of == name].mean(1) for name in names], axis=1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
