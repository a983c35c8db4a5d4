"""Every rival's assignment at the same stored bytes, scored once on facts that nobody tunes on.

Protocol: one model, one bank, one space with its ties, one count of bytes, the same search facts.
Sizes: uniform 3-bit, midway to uniform 4-bit, uniform 4-bit, and its quantized part plus 25 %.
Rivals:

- uniform: the largest uniform format that fits;
- greedy: gives up bytes where the squared relative weight error grows least for each;
- greedy-fisher: the same on the KL-Fisher table;
- knapsack: exact, on the KL-Fisher table; inverted: the same with the groups' rows exchanged, the
  most sensitive for the least; random: random groups raised until nothing fits;
- auto-round, modelopt: the packages' own choices (`rival_environment.py`);
- nsga2, tpe: Optuna's, and -warm from knapsack, uniform and the knapsack's neighbours;
- evopress: `rival_searches.evolutionary` from a start of its own, and -warm from the knapsack;
- mpsearch: `mps.search`, the point of lowest validation loss, whether or not beyond noise.

A search gets so many evaluations of all search facts, counted by the unique tokens of facts that it
pushes through the model (three times as many for evopress at the midpoint), and contributes its
lowest search loss. All lower the same: answer loss plus twice the prompt KL. Ours pays for its
baselines, for slopes (thrice their facts) and for the validation facts by which it picks, which
no rival sees. The sensitivity table, which ours and all warm starts use, counts for nobody; it has
the seed of the search. Final facts are those of `peers_facts.py`, final text is the held-out half
of the built-in one; nothing is chosen by them. `answer_loss`, `stderr` and `recall` are of final
facts, `kl` is of text, nats a token, `seconds` are those spent on evaluations. Bias left: all
rivals share one bank, as what is compared is where the bits go; the packages score with their own
rounding.

    python benchmarks/peers.py [--lre FOLDER] [--sizes SIZE ...] [--rivals NAME ...]
        [--seeds N ...] [--evaluations 200] [--quantizer rounding] [--minutes M]

Every evaluation is kept under --runs, so it may be stopped anywhere and goes on with the same
command; a row that is in --out already is not measured again. What is cheap comes first, then ours,
then evopress-warm, seed by seed. Prints a Markdown table and the findings (`peers_findings.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peers_choices import PACKAGES, SIZES, TIGHT, Peers
from peers_facts import Asked, untouched
from peers_findings import OURS, UNSEEDED, findings
from peers_report import report
from result_file import commit, load, save
from rival_searches import OutOfTime

import mpsearch as mps
from mpsearch.bank import Bank
from mpsearch.console import Progress, quiet_libraries, say
from mpsearch.errors import RunError
from mpsearch.evaluate import Bench, all_layers
from mpsearch.facts import FactSet
from mpsearch.files import write_atomically
from mpsearch.quantizers import get_quantizer

MODEL = "builtin:smollm2-135m"
SPACE = Path(__file__).parents[1] / "search_spaces" / "compressed_tensors.yaml"
CHEAP = ("uniform", "greedy", "greedy-fisher", "knapsack", "random", "inverted")
ORDER = (
    CHEAP,
    PACKAGES,
    (OURS,),
    ("evopress-warm",),
    ("evopress", "tpe-warm", "nsga2-warm", "tpe", "nsga2"),
)
RIVALS = tuple(name for tier in ORDER for name in tier)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--space", type=Path, default=SPACE)
    parser.add_argument("--facts", type=Path, help="search facts; the built-in ones by default")
    parser.add_argument("--lre", type=Path, default=Path("../shared/facts/lre"))
    parser.add_argument("--quantizer", default="rounding")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES)
    parser.add_argument("--rivals", nargs="+", choices=RIVALS, default=RIVALS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--evaluations", type=int, default=200)
    parser.add_argument("--search-facts", type=int, default=400)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--runs", type=Path, default=Path("runs/peers"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/peers.json"))
    parser.add_argument("--figure", type=Path, default=Path("docs/peers.png"))
    args = parser.parse_args(arguments)
    end = time.monotonic() + 60 * args.minutes
    quiet_libraries()
    facts = FactSet.load(args.facts) if args.facts else FactSet.builtin()
    final = untouched(FactSet.load(args.lre), facts)
    model = mps.load_model(args.model)
    space = mps.SearchSpace.load(args.space).resolve(model)
    bank = Bank(model, get_quantizer(args.quantizer, space.target.name))

    def check_time() -> None:
        if time.monotonic() >= end:
            raise OutOfTime

    with Progress() as progress:

        def tell(stage: str, done: int, total: int) -> None:
            check_time()
            progress(stage, done, total)

        bank.build(all_layers(space), progress)
        asked = Asked.frozen(args.runs, model, facts, final, args.search_facts)
        with Bench(space, bank) as bench:
            peers = Peers(bench, facts, final, asked, args.evaluations, args.runs, check_time, tell)
            result = load(args.out)
            _check(result, args.out, peers)
            try:
                _measure(peers, result, args)
            except OutOfTime:
                say("the time is over; the same command goes on")
            finals = peers.finals(result["rows"])
            result["findings"] = findings(
                {key: final.loss_nats for key, final in finals.items()},
                {key: final.correct for key, final in finals.items()},
                [fact.relation for fact in asked.final],
                [fact.subject for fact in asked.final],
                result["curves"],
                SIZES,
                TIGHT,
                RIVALS,
            )
            save(args.out, result)
            report(result, args.figure)


def _measure(peers: Peers, result: dict[str, Any], args: argparse.Namespace) -> None:
    """Every missing row that is asked for, what is cheap first."""
    done = {(row["size"], row["rival"], row["seed"]) for row in result["rows"]}
    for seed in args.seeds:
        for tier in ORDER:
            for size in args.sizes:
                for rival in tier:
                    if rival not in args.rivals or (size, rival, seed) in done:
                        continue
                    if seed and rival in UNSEEDED:
                        continue
                    say(f"{size}: {rival}, seed {seed}")
                    choice = peers.choice(rival, size, seed)
                    if choice is None:
                        continue
                    result["rows"].append(peers.row(size, rival, seed, choice))
                    if choice.curve:
                        result["curves"].append({
                            "size": size, "rival": rival, "seed": seed,
                            "fact_tokens": choice.fact_tokens, "points": choice.curve,
                        })  # fmt: skip
                    save(args.out, result)


def _check(result: dict[str, Any], out: Path, peers: Peers) -> None:
    """Note the conditions; raise `RunError` where those of earlier rows or evaluations differ."""
    fixed = json.loads(json.dumps(peers.conditions))
    result.setdefault("curves", [])
    path = peers.folder / "conditions.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else fixed
    for where, known in ((out, result.get("conditions", fixed)), (peers.folder, before)):
        if changed := [key for key in fixed if known.get(key) != fixed[key]]:
            raise RunError(
                f"'{where}' was measured with another '{changed[0]}'; ask as before, or give "
                "another --out and --runs"
            )
    write_atomically(path, json.dumps(fixed, indent=1))
    libraries = ("mpsearch", "torch", "transformers", "optuna", "numpy")
    result["conditions"] = {
        **fixed,
        "commit": commit(),
        "threads": torch.get_num_threads(),
        "machine": f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {name: version(name) for name in libraries},
    }


if __name__ == "__main__":
    main()
