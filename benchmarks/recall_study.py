"""A published study of factual recall under quantization, on the model that runs here.

Protocol: facts of the LRE data set, asked after five solved examples of their relation, right if
the likeliest first token is a prefix of the answer; two-hop questions composed from the built-in
facts, asked likewise and also among seven distractors; and both hops of each alone. Examples are
the demonstration facts of a relation; where it has fewer than five, others fill up and are not
asked. At most so many facts a relation and chains a pair of relations, chosen by a hash. Every
linear of the model in one format; all models are asked the same tokens. Intervals are 95 %,
bootstrapped over subjects (over bridges for chains); flips are tested by exact McNemar, corrected
by Holm over models. AWQ is the package's: activation-aware scales folded into the norms, then
rounding. Calibration text is the model's own.

    python benchmarks/recall_study.py LRE_FOLDER [--facts-per-relation 60] [--chains-per-pair 16]

Writes one JSON, a row a model as it is finished, so that it can be stopped and goes on; then
`table`, `relations`, and `findings` (see recall_study_findings.py), and a figure.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from recall_study_findings import REFERENCE, Answers, Asked, changes, findings, percent
from result_file import commit, load, save

import mpsearch as mps
from mpsearch import awq
from mpsearch.allocate import uniform
from mpsearch.bank import Bank
from mpsearch.bootstrap import subject_bootstrap
from mpsearch.console import Progress, emit, quiet_libraries, say, table
from mpsearch.errors import UsageError
from mpsearch.estimates import relation_mean
from mpsearch.evaluate import Bench, quantized_layers
from mpsearch.facts import Fact, FactSet
from mpsearch.facts.fact import unit_hash
from mpsearch.facts.two_hop import compose
from mpsearch.formats import FORMATS
from mpsearch.quantizers import get_quantizer
from mpsearch.scores import FactScores, wilson
from mpsearch.significance import holm, mcnemar

MODEL = "builtin:smollm2-135m"
SHOTS = 5
SEED = 0


@dataclass(frozen=True)
class Candidate:
    name: str
    quantizer: str
    format: str
    after_awq: bool = False


CANDIDATES = (
    Candidate("bitsandbytes NF4", "bitsandbytes", "nf4"),
    Candidate("bitsandbytes int8", "bitsandbytes", "int8"),
    Candidate("GPTQ 4-bit", "gptq", "int4-g64"),
    Candidate("GPTQ 8-bit", "gptq", "int8-g64"),
    Candidate("rounding 4-bit", "rounding", "int4-g64"),
    Candidate("rounding 3-bit", "rounding", "int3-g64"),
    Candidate("AWQ 4-bit", "rounding", "int4-g64", after_awq=True),
)


@dataclass(frozen=True)
class Example(Fact):
    """A solved example where the demonstration facts are too few."""

    partition = "demonstrations"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lre", type=Path)
    parser.add_argument("--facts-per-relation", type=int, default=60)
    parser.add_argument("--chains-per-pair", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/recall_study.json"))
    parser.add_argument("--figure", type=Path, default=Path("docs/recall_study.png"))
    args = parser.parse_args()
    quiet_libraries()
    study = Study.prepare(args.lre, args.facts_per_relation, args.chains_per_pair)
    result = load(args.out)
    if result.setdefault("asked", study.digest) != study.digest:
        raise UsageError(f"'{args.out}' was measured on other facts; give another --out")

    def add(row: dict[str, Any]) -> None:
        result["rows"].append(row)
        save(args.out, result)

    if len(result["rows"]) <= len(CANDIDATES):
        model = mps.load_model(MODEL)
        result["conditions"] = _conditions(model, study, vars(args))
        _measure(model, study, result["rows"], add)
    result |= summary(result["rows"], study)
    save(args.out, result)
    _show(result)
    _figure(result["table"], 100 * result["chance_among_distractors"], args.figure)


@dataclass(frozen=True)
class Study:
    """What is asked.

    Attributes:
        asked: facts and chains, in the order of the answers.
        hops: both hops of all chains, each once, in the order of their answers.
    """

    lre: FactSet
    chains: FactSet
    one_hop: FactSet
    asked: Asked
    hops: tuple[Fact, ...]

    @classmethod
    def prepare(cls, folder: Path, facts_per_relation: int, chains_per_pair: int) -> Study:
        lre = with_examples(FactSet.load(folder), SHOTS)
        one_hop = FactSet.builtin()
        chains = compose(one_hop)
        asked = Asked(some(lre, facts_per_relation), some(chains, chains_per_pair))
        hops = {(f.relation, f.subject): f for chain in asked.chains for f in chain.hops}
        return cls(lre, chains, one_hop, asked, tuple(hops.values()))

    @property
    def digest(self) -> str:
        content = (self.lre.digest, self.chains.digest, self.asked, self.hops, SHOTS)
        return hashlib.sha256(repr(content).encode()).hexdigest()

    def proxies(self, model: mps.Model) -> dict[str, mps.RecallProxy]:
        sets = {
            "one_hop": (self.lre, self.asked.facts, False),
            "two_hop": (self.chains, self.asked.chains, True),
            "hops": (self.one_hop, self.hops, False),
        }
        return {
            name: mps.RecallProxy(model, source, facts, contrast=contrast, shots=SHOTS)
            for name, (source, facts, contrast) in sets.items()
        }

    def answers(self, row: dict[str, Any]) -> Answers:
        """Of a row, with the hops in the chains' order."""
        found: dict[str, NDArray[Any]] = {
            name: np.array(list(bits)) == "1" for name, bits in row["right"].items()
        }
        place = {(fact.relation, fact.subject): i for i, fact in enumerate(self.hops)}

        def of_hop(number: int) -> NDArray[Any]:
            hops = (chain.hops[number] for chain in self.asked.chains)
            return found["hops"][[place[hop.relation, hop.subject] for hop in hops]]

        return Answers(
            found["one_hop"], found["two_hop"], found["contrastive"], of_hop(0), of_hop(1)
        )


def with_examples(fact_set: FactSet, shots: int) -> FactSet:
    """The facts, with as many solved examples in every relation; those added are asked no more."""
    facts: list[Fact] = []
    for relation in fact_set.relations:
        mine = fact_set.of(relation)
        missing = shots - sum(fact.partition == "demonstrations" for fact in mine)
        others = some(FactSet(mine, ""), max(0, missing))
        facts += [
            Example(f.relation, f.template, f.subject, f.answer, f.aliases, f.paraphrases)
            if f in others
            else f
            for f in mine
        ]
    return FactSet(tuple(facts), fact_set.source, fact_set.about)


def some(fact_set: FactSet, most: int) -> list[Fact]:
    """At most so many facts of each relation that are no solved examples."""
    chosen: list[Fact] = []
    for relation in fact_set.relations:
        mine = [f for f in fact_set.of(relation) if f.partition != "demonstrations"]
        chosen += sorted(mine, key=lambda f: unit_hash(f"asked|{f.subject.casefold()}"))[:most]
    return chosen


def _conditions(model: mps.Model, study: Study, arguments: dict[str, Any]) -> dict[str, Any]:
    libraries = ("mpsearch", "torch", "transformers", "gptqmodel", "bitsandbytes")
    return {
        "model": MODEL,
        "fingerprint": model.fingerprint,
        "commit": commit(),
        "dtype": str(model.dtype),
        "threads": torch.get_num_threads(),
        "machine": f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "versions": {name: version(name) for name in libraries},
        "shots": SHOTS,
        "seed": SEED,
        "facts_per_relation": arguments["facts_per_relation"],
        "chains_per_pair": arguments["chains_per_pair"],
        "facts": len(study.asked.facts),
        "relations": len(study.lre.relations),
        "chains": len(study.asked.chains),
        "bridges": len(set(study.asked.bridges)),
        "pairs": len(study.chains.relations),
        "hops": len(study.hops),
    }


def _measure(model: mps.Model, study: Study, rows: list[dict[str, Any]], add: Any) -> None:
    """Every row that is missing, the reference first; AWQ last, as it changes the model."""
    known = {row["model"] for row in rows}
    missing = [candidate for candidate in CANDIDATES if candidate.name not in known]
    start = time.perf_counter()
    proxies: dict[str, mps.RecallProxy] = {}
    if not all(candidate.after_awq for candidate in missing) or REFERENCE not in known:
        say(REFERENCE)
        proxies = study.proxies(model)
    if REFERENCE not in known:
        found = {name: proxy.reference for name, proxy in proxies.items()}
        bits_16 = sum(layer.weights * 2 for layer in model.layers) + model.kept_bytes
        add(_row(REFERENCE, found, found, study, bits_16, 16.0, start))
    for candidate in missing:
        start = time.perf_counter()
        say(candidate.name)
        with Progress() as report:
            if candidate.after_awq and not model.preparation:
                model = awq.prepare(model, report=report)
                # Asked anew, as preparing must change no answer; its own row says so.
                proxies = study.proxies(model)
            fmt = FORMATS[candidate.format]
            text = f"version: 1\ntarget: {fmt.container}\nformats: [{fmt.name}]\n"
            space = mps.SearchSpace.parse(text, "benchmark").resolve(model)
            assignment = uniform(space)[fmt.name]
            bank = Bank(model, get_quantizer(candidate.quantizer, fmt.container))
            bank.build(quantized_layers(space, assignment), report)
        with Bench(space, bank) as bench:
            found = {name: bench.evaluate(assignment, p).scores for name, p in proxies.items()}
        reference = {name: proxy.reference for name, proxy in proxies.items()}
        stored_bytes, bits = space.stored_bytes(assignment), space.bits_per_weight(assignment)
        row = _row(candidate.name, found, reference, study, stored_bytes, bits, start)
        if candidate.after_awq:
            before, after = rows[0]["right"], _right(reference)
            row["answers_changed_by_preparing"] = sum(
                a != b for rule in before for a, b in zip(before[rule], after[rule], strict=True)
            )
        add(row)


def _row(
    name: str,
    found: dict[str, FactScores],
    reference: dict[str, FactScores],
    study: Study,
    stored_bytes: int,
    bits_per_weight: float,
    start: float,
) -> dict[str, Any]:
    generator = np.random.default_rng(SEED)
    asked = study.asked
    losses = {name: reference[name].log_prob - found[name].log_prob for name in found}
    loss, within = subject_bootstrap(losses["one_hop"], asked.relations, asked.subjects, generator)
    chain_loss, _ = subject_bootstrap(losses["two_hop"], asked.pairs, asked.bridges, generator)
    return {
        "model": name,
        "stored_bytes": stored_bytes,
        "bits_per_weight": bits_per_weight,
        "answer_loss_nats": vars(loss),
        "two_hop_answer_loss_nats": vars(chain_loss),
        "relation_answer_loss_nats": {name: i.mean for name, i in within.items()},
        "right": _right(found),
        "seconds": time.perf_counter() - start,
    }


def _right(found: dict[str, FactScores]) -> dict[str, str]:
    """A 1 for every right answer and a 0 for every wrong one."""
    right = {name: scores.top1 for name, scores in found.items()}
    contrastive = found["two_hop"].correct
    assert contrastive is not None, "two-hop questions have distractors"
    right["contrastive"] = contrastive
    return {rule: "".join("01"[int(value)] for value in answers) for rule, answers in right.items()}


def summary(rows: list[dict[str, Any]], study: Study) -> dict[str, Any]:
    """The table, the relations and the findings, from the answers alone."""
    generator = np.random.default_rng(SEED)
    asked = study.asked
    models = {row["model"]: study.answers(row) for row in rows}
    before = models[REFERENCE]
    shown = []
    for row in rows:
        mine = models[row["model"]]
        top1, _ = subject_bootstrap(mine.one_hop, asked.relations, asked.subjects, generator)
        line = {
            **{key: row[key] for key in ("model", "stored_bytes", "bits_per_weight")},
            "answer_loss_nats": row["answer_loss_nats"],
            "one_hop_top1": percent(top1),
        }
        for rule in ("two_hop", "contrastive", "first", "second"):
            share, _ = subject_bootstrap(getattr(mine, rule), asked.pairs, asked.bridges, generator)
            line[rule] = percent(share)
        for rule in ("one_hop", "two_hop", "contrastive"):
            forgotten, gained = changes(getattr(before, rule), getattr(mine, rule))
            line[f"{rule}_forgotten"], line[f"{rule}_gained"] = forgotten, gained
            line[f"{rule}_p"] = mcnemar(forgotten, gained)
        shown.append(line)
    for rule in ("one_hop", "two_hop", "contrastive"):
        for line, p in zip(shown[1:], holm([s[f"{rule}_p"] for s in shown[1:]]), strict=True):
            line[f"{rule}_p_holm"] = p
    wrong = [len(study.chains.distractors(chain)) for chain in asked.chains]
    return {
        "chance_among_distractors": relation_mean([1 / (1 + n) for n in wrong], asked.pairs).mean,
        "table": shown,
        "relations": _relations(rows, models, study),
        "findings": findings(models, asked, SEED),
    }


def _relations(
    rows: list[dict[str, Any]], models: dict[str, Answers], study: Study
) -> list[dict[str, Any]]:
    """A row a relation and model: right answers by the first token, and what changed."""
    names, before = np.array(study.asked.relations), models[REFERENCE].one_hop
    found = []
    for relation in dict.fromkeys(study.asked.relations):
        mine = names == relation
        for row in rows:
            now = models[row["model"]].one_hop[mine]
            forgotten, gained = changes(before[mine], now)
            top1 = percent(wilson(int(now.sum()), now.size))
            found.append(
                {
                    "relation": relation,
                    "model": row["model"],
                    "facts": now.size,
                    "top1": top1,
                    "forgotten": forgotten,
                    "gained": gained,
                    "p": mcnemar(forgotten, gained),
                    "answer_loss_nats": row["relation_answer_loss_nats"][relation],
                }
            )
    tested = [row for row in found if row["model"] != REFERENCE]
    for row, p in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row["p_holm"] = p
    return found


def _show(result: dict[str, Any]) -> None:
    def share(interval: dict[str, float]) -> str:
        return f"{interval['mean']:.1f} [{interval['low']:.1f}, {interval['high']:.1f}]"

    table(
        ["model", "bytes", "LRE top-1 (%)", "forgot / gained", "p", "answer loss (nats)",
         "two-hop top-1 (%)", "two-hop among 8 (%)"],
        [
            [
                row["model"],
                f"{row['stored_bytes']:,}",
                share(row["one_hop_top1"]),
                f"{row['one_hop_forgotten']} / {row['one_hop_gained']}",
                f"{row['one_hop_p_holm']:.2g}" if "one_hop_p_holm" in row else "",
                "{mean:.2f} [{low:.2f}, {high:.2f}]".format(**row["answer_loss_nats"]),
                share(row["two_hop"]),
                share(row["contrastive"]),
            ]
            for row in result["table"]
        ],
    )  # fmt: skip
    for found in result["findings"]:
        emit(f"{found['finding']}. {found['claim']}: {found['verdict']}")
        emit(f"   {found['said']}\n   ({found['measure']})")


def _figure(rows: list[dict[str, Any]], chance: float, out: Path) -> None:
    """Accuracy with its interval by model; the band is the unquantized model's interval, the dotted
    line what a blind guess among the answers gives, in percent.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = {
        "LRE facts, first token right (%)": "one_hop_top1",
        "two-hop questions, first token right (%)": "two_hop",
        "two-hop questions, first among 8 answers (%)": "contrastive",
    }
    figure = Figure(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, key) in zip(
        figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True
    ):
        means = [row[key]["mean"] for row in rows]
        low, high = ([abs(r[key][side] - r[key]["mean"]) for r in rows] for side in ("low", "high"))
        places = range(len(rows))
        axes.errorbar(means, places, xerr=[low, high], fmt="o", color="black", capsize=3)
        axes.axvspan(rows[0][key]["low"], rows[0][key]["high"], color="0.92", zorder=0)
        axes.axvline(means[0], color="0.5", linestyle="--", linewidth=1)
        axes.set_yticks(places, [row["model"] for row in rows])
        axes.set_title(title, fontsize=10)
        axes.grid(axis="x", color="0.9")
        axes.set_axisbelow(True)
    figure.axes[0].invert_yaxis()
    figure.axes[-1].axvline(chance, color="0.3", linestyle=":", linewidth=1)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)


if __name__ == "__main__":
    main()
