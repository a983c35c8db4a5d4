"""Assignments by real packages: auto-round's AutoScheme and nvidia-modelopt's auto_quantize.

Each runs in an environment of its own, `.venv-peers`, which the Makefile builds when it is missing,
and contributes a choice of formats; bytes are counted here. Both read the same texts: statements of
search facts that the reference knows, of a relation each, the very facts that every rival searches
with. Text of the usual kind would leave them to find out what recall needs; text that the model
writes itself takes minutes to sample. A seed decides which facts are read.

    python benchmarks/rival_environment.py [--seeds 0 1 2] [--out FILE]

Writes `rows` of package, size, seed, budget_bytes, stored_bytes, formats (in the order of
`groups`), asked_bits, solves, solve_seconds, and `runs` of package, seed, versions, what the
package was given, score_seconds. What is there already is not computed again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import result_file

import mpsearch as mps
from mpsearch.asked import known_facts
from mpsearch.assignment import Assignment
from mpsearch.console import quiet_libraries, say
from mpsearch.errors import CheckError
from mpsearch.facts import Fact
from mpsearch.formats import FORMATS
from mpsearch.space import ResolvedSpace

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "peers_packages.json"
PACKAGES = ("auto-round", "modelopt")
SEARCH_FACTS = 400
TEXTS, TOKENS = 16, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="builtin:smollm2-135m")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    quiet_libraries()
    model = mps.load_model(args.model)
    space = mps.SearchSpace.default().resolve(model)
    for seed in args.seeds:
        package_assignments(space, model, sizes(space), seed, args.out)


def sizes(space: ResolvedSpace) -> dict[str, int]:
    """The four budgets in bytes: uniform 3-bit, midway, uniform 4-bit, its linears 25 % larger."""
    three, four = (
        space.stored_bytes({group.name: f"int{bits}-g64" for group in space.groups})
        for bits in (3, 4)
    )
    return {
        "uniform 3-bit": three,
        "midway": (three + four) // 2,
        "uniform 4-bit": four,
        "uniform 4-bit + 25 %": space.kept_bytes + (four - space.kept_bytes) * 5 // 4,
    }


def package_assignments(
    space: ResolvedSpace, model: mps.Model, budgets: Mapping[str, int], seed: int, results: Path
) -> dict[str, dict[str, Assignment]]:
    """What each package chooses within each budget.

    Args:
        space: packed symmetric integers of one group size, the embedding kept.
        budgets: size name to bytes of the whole checkpoint.
        seed: of the facts that the packages are calibrated on.
        results: JSON that holds what is known already, and is written to after each package.
    Returns:
        Package to size name to assignment.
    Raises:
        CheckError: the environment cannot be built, a package fails, or the file is of another
            model or space.
    """
    result = _load(results, space, model)
    for package in PACKAGES:
        rows = result["rows"]
        missing = {
            size: b for size, b in budgets.items() if not _rows(rows, package, seed, size, b)
        }
        if not missing:
            continue
        say(f"{package}, seed {seed}: {', '.join(missing)}")
        texts = calibration_texts(model.tokenizer, known_search_facts(model), seed)
        reply = _ask(package, request(space, model, missing, texts))
        for size, found in reply.pop("sizes").items():
            assignment = _assignment(space, found.pop("bits"))
            size_bytes = space.stored_bytes(assignment)
            if size_bytes != found["stored_bytes"] or size_bytes > missing[size]:
                raise CheckError(f"{package} at '{size}' takes {size_bytes:,} bytes")
            row = {"package": package, "size": size, "seed": seed, "budget_bytes": missing[size]}
            rows.append({**row, **found, "formats": " ".join(assignment.values())})
        result["runs"].append({"package": package, "seed": seed, **reply})
        result_file.save(results, result)
    return {
        package: {
            size: Assignment.of(
                dict(
                    zip(
                        result["groups"],
                        _rows(result["rows"], package, seed, size, budget)[0]["formats"].split(),
                        strict=True,
                    )
                )
            )
            for size, budget in budgets.items()
        }
        for package in PACKAGES
    }


def _rows(
    rows: Sequence[dict[str, Any]], package: str, seed: int, size: str, budget_bytes: int
) -> list[dict[str, Any]]:
    wanted = (package, seed, size, budget_bytes)
    keys = ("package", "seed", "size", "budget_bytes")
    return [row for row in rows if tuple(row[key] for key in keys) == wanted]


def _load(results: Path, space: ResolvedSpace, model: mps.Model) -> dict[str, Any]:
    """What the file holds, if it is of this model and space."""
    known = result_file.load(results)
    about = {
        "fingerprint": model.fingerprint,
        "calibration": {
            "texts": TEXTS, "tokens": TOKENS, "of": f"{SEARCH_FACTS} known search facts, by seed"
        },
        "groups": [group.name for group in space.groups],
    }  # fmt: skip
    if not known["rows"]:
        return {"commit": result_file.commit(), **about, "runs": [], "rows": []}
    for key, value in about.items():
        if known[key] != value:
            raise CheckError(f"'{results}' is of another model or space ({key}); move it away")
    return known


# ------------------------------------------------------------------------------ what is asked


@cache
def known_search_facts(model: mps.Model) -> tuple[Fact, ...]:
    """The search facts that the reference gets right, as a run with so many chooses them."""
    return tuple(known_facts(model, mps.FactSet.builtin(), SEARCH_FACTS)[1])


def calibration_texts(tokenizer: Any, facts: Sequence[Fact], seed: int) -> list[str]:
    """`TEXTS` texts of at least `TOKENS` tokens: a relation's facts, a line each, in seeded order.

    A relation whose facts run out before is followed by the next one.
    """
    order = random.Random(seed)
    relations = sorted({fact.relation for fact in facts})
    order.shuffle(relations)
    texts, text = [], ""
    for relation in relations:
        of_relation = [fact for fact in facts if fact.relation == relation]
        order.shuffle(of_relation)
        for fact in of_relation:
            text += f"{fact.prompt} {fact.answer}\n"
            if len(tokenizer(text.rstrip())["input_ids"]) >= TOKENS:
                texts.append(text.rstrip())
                text = ""
    if len(texts) < TEXTS:
        raise CheckError(f"the known facts fill {len(texts)} texts, {TEXTS} are needed")
    return order.sample(texts, TEXTS)


def request(
    space: ResolvedSpace, model: mps.Model, budgets: Mapping[str, int], texts: Sequence[str]
) -> dict[str, Any]:
    """What `rival_packages.py` reads, but for the package and a folder to work in."""
    formats = [FORMATS[name] for name in space.space.formats]
    group_sizes = {fmt.group_size for fmt in formats}
    if len(group_sizes) > 1 or not all(fmt.symmetric and fmt.number == "int" for fmt in formats):
        raise CheckError("the packages are asked for symmetric integers of one group size")
    return {
        "model": str(model.folder),
        "texts": list(texts),
        "tokens": TOKENS,
        "group_size": group_sizes.pop(),
        "groups": [
            {
                "name": group.name,
                "layers": [layer.name for layer in group.layers],
                "weights": group.weights,
                "bytes": {str(fmt.bits): fmt.stored_bytes(group) for fmt in formats},
            }
            for group in space.groups
        ],
        "kept_bytes": space.kept_bytes,
        "budgets_bytes": dict(budgets),
    }


def _assignment(space: ResolvedSpace, bits: Mapping[str, int]) -> Assignment:
    names = {FORMATS[name].bits: name for name in space.space.formats}
    return Assignment.of({group.name: names[bits[group.name]] for group in space.groups})


def _ask(package: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The reply of a package to a request; its talk is kept under `build/`.

    Raises:
        CheckError: the environment cannot be built, or the package fails.
    """
    log = ROOT / "build" / f"rival-{package}.log"
    log.parent.mkdir(exist_ok=True)
    python = ROOT / ".venv-peers" / "bin" / "python"
    with tempfile.TemporaryDirectory() as work, open(log, "w", encoding="utf-8") as talk:
        paths = [Path(work, "request.json"), Path(work, "reply.json")]
        paths[0].write_text(json.dumps({**asked, "package": package, "work": work}))
        commands: list[list[str | Path]] = [
            ["make", "-C", ROOT, ".venv-peers/installed"],
            [python, ROOT / "benchmarks" / "rival_packages.py", *paths],
        ]
        for command in commands:
            environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
            environment.pop("PYTHONPATH", None)
            done = subprocess.run(command, stdout=talk, stderr=talk, env=environment, check=False)
            if done.returncode:
                raise CheckError(f"{package} failed; its last words are in '{log}'")
        return dict(json.loads(paths[1].read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
