"""Does the proxy measure what it says? Controls on the built-in model and facts.

    python benchmarks/recall_controls.py [--out FILE]

Protocol: test facts, 4 solved examples.

- Noise floor: the facts packed into other rows.
- Shuffled answers: answers dealt anew among the facts of a relation, those shown as examples too.
  Blind guessing is right once in so many options; a model that knows which answers are frequent,
  and nothing else, is right more often. So it is set beside that of a guesser who always takes the
  option that is most frequent in the relation.
- Random weights: the same architecture, untrained.
- Coverage: facts are drawn with known recall by relation and with subjects that share their luck;
  the share of 95 % bootstrap intervals that hold the truth.

Writes one JSON with a part for each.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

import mpsearch as mps
from mpsearch.bootstrap import subject_bootstrap
from mpsearch.console import emit, say, table
from mpsearch.facts import Fact, FactSet
from mpsearch.files import write_atomically
from mpsearch.models import Model, from_module
from mpsearch.recall import RecallProxy

SIMULATIONS = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    out = Path("benchmarks/results/recall_controls.json")
    parser.add_argument("--model", default="builtin:smollm2-135m")
    parser.add_argument("--out", type=Path, default=out)
    args = parser.parse_args()
    facts = FactSet.builtin()
    result: dict[str, Any] = {"model": args.model, "coverage": coverage(facts)}
    emit(f"95 % intervals that hold the truth: {result['coverage']['covered']:.1%}")

    model = mps.load_model(args.model)
    say("asking the facts, then the same packed otherwise")
    proxy = RecallProxy(model, facts, facts.part("test"), contrast=True)
    result["noise_floor"] = asdict(proxy.noise_floor())
    result["as_is"] = recall_of(proxy)
    say("asking shuffled facts")
    dealt = shuffled(facts, seed=0)
    proxy = RecallProxy(model, dealt, dealt.part("test"), contrast=True)
    result["shuffled"] = {**recall_of(proxy), "by_frequency": by_frequency(dealt)}
    say("asking random weights")
    proxy = RecallProxy(untrained(model), facts, facts.part("test"), contrast=True)
    result["random_weights"] = recall_of(proxy)

    table(
        ["control", "recall % [95 %]", "chance %", "top-1 %"],
        [
            [
                name.replace("_", " "),
                "{mean:.1%} [{low:.1%}, {high:.1%}]".format(**result[name]["recall"]),
                f"{result[name]['chance']:.1%}",
                f"{result[name]['top1']['mean']:.1%}",
            ]
            for name in ("as_is", "shuffled", "random_weights")
        ],
        left=1,
    )
    emit(f"shuffled, guessing by frequency: {result['shuffled']['by_frequency']:.1%}")
    emit(f"noise floor: {result['noise_floor']}")
    write_atomically(args.out, json.dumps(result, indent=1) + "\n")


def recall_of(proxy: RecallProxy) -> dict[str, Any]:
    summary = proxy.summary(np.random.default_rng(0)).to_json()
    return {key: summary[key] for key in ("facts", "recall", "top1", "chance")}


def shuffled(facts: FactSet, seed: int) -> FactSet:
    """The same subjects and answers, dealt anew within each relation."""
    dealer = random.Random(seed)
    pools = {name: [f.answer for f in facts.of(name)] for name in facts.relations}
    for pool in pools.values():
        dealer.shuffle(pool)
    dealt = (replace(f, answer=pools[f.relation].pop(), aliases=()) for f in facts.facts)
    return FactSet(tuple(dealt), "shuffled")


def by_frequency(facts: FactSet) -> float:
    """Recall of taking the option that most of a relation's facts have for an answer."""
    counts = {name: Counter(f.answer for f in facts.of(name)) for name in facts.relations}

    def right(fact: Fact) -> float:
        """Of equally frequent options any may be taken."""
        among = [counts[fact.relation][a] for a in (fact.answer, *facts.distractors(fact))]
        return (among[0] == max(among)) / among.count(max(among))

    shares = [np.mean([right(f) for f in facts.part("test", [name])]) for name in facts.relations]
    return float(np.mean(shares))


def untrained(model: Model) -> Model:
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(
        model.module.config, dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    name = f"{model.name}, random weights"
    return from_module(name, model.folder, module, model.tokenizer, model.device, model.dtype)


def coverage(facts: FactSet) -> dict[str, float]:
    """Of simulated recall on the test facts' own relations and subjects."""
    generator = np.random.default_rng(0)
    asked = facts.part("test")
    relations, subjects = [f.relation for f in asked], [f.subject for f in asked]
    _, relation_of = np.unique(relations, return_inverse=True)
    _, subject_of = np.unique(subjects, return_inverse=True)
    names = int(relation_of.max()) + 1
    total = NormalDist(0, 2**0.5)
    covered = 0
    for _ in range(SIMULATIONS):
        share = generator.uniform(0.2, 0.9, names)
        luck = generator.normal(size=int(subject_of.max()) + 1)[subject_of]
        # Half of the variance is the subject's, in all of its facts.
        threshold = np.array([total.inv_cdf(1 - s) for s in share])[relation_of]
        right = luck + generator.normal(size=len(asked)) > threshold
        found, _ = subject_bootstrap(right, relations, subjects, generator, draws=500)
        covered += found.low <= share.mean() <= found.high
    return {"simulations": SIMULATIONS, "covered": covered / SIMULATIONS}


if __name__ == "__main__":
    main()
