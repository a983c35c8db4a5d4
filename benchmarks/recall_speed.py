"""Facts a second of recall, beside two loops over transformers that ask the same tokens.

Protocol: built-in search facts, `--facts` of every fifth relation; a search with 400 facts asks as
many of each. The sequences are those that the proxy asks. `loop` is what a careful user writes:
sorted by length, padded on the right (so causal attention needs no mask), the last token not fed,
the output head only where an answer is read, inference mode. `cached loop` also computes the solved
examples of a relation once and hands their keys and values to every batch. Each loop runs at the
batch size that was fastest on a few of the facts. The proxy's time includes the top-1 answers
and the KL that the loops do not compute. All three are timed in turn, `--repeats` times; medians.
Ratios are given of seconds by the clock and of seconds on the processors, which other programs on
the machine change less. Tokenizing and packing, done once for all candidates, are left out and
reported.

    python benchmarks/recall_speed.py [--facts 14] [--repeats 3] [--out FILE]

Writes one JSON: a row a setting with facts a second, tokens through the model, batch sizes, ratios,
and how far the log-probabilities of all sequences are apart, in nats.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from result_file import commit, save
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

import mpsearch as mps
from mpsearch.console import quiet_libraries, say, table
from mpsearch.facts import Fact, FactSet
from mpsearch.forward import Pass, TokenSequence
from mpsearch.recall import ask

MODEL = "builtin:smollm2-135m"
SETTINGS = {
    "contrastive, 5-shot": (True, 5),
    "answer only, 5-shot": (False, 5),
    "contrastive, 0-shot": (True, 0),
    "answer only, 0-shot": (False, 0),
}
BATCHES = (4, 8, 16, 32)
Loop = Callable[[Any, Sequence[list[TokenSequence]], int], tuple[Tensor, int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--facts", type=int, default=14, help="of each relation asked")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/recall_speed.json"))
    args = parser.parse_args()
    quiet_libraries()
    model = mps.load_model(MODEL)
    fact_set = FactSet.builtin()
    relations = fact_set.relations[::5]
    facts = [f for name in relations for f in fact_set.part("search", {name})[: args.facts]]
    result: dict[str, Any] = {
        "conditions": {
            "model": MODEL,
            "fingerprint": model.fingerprint,
            "commit": commit(),
            "dtype": str(model.dtype),
            "device": str(model.device),
            "threads": torch.get_num_threads(),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, "
            f"{torch.backends.cpu.get_cpu_capability()}",
            "load_before": os.getloadavg(),
            "facts": len(facts),
            "relations": relations,
            "repeats": args.repeats,
            "versions": {name: version(name) for name in ("mpsearch", "torch", "transformers")},
        },
        "rows": [],
    }
    for setting, (contrast, shots) in SETTINGS.items():
        say(setting)
        row = _row(model, fact_set, facts, contrast, shots, args.repeats)
        result["rows"].append({"setting": setting, **row})
        result["conditions"]["load_after"] = os.getloadavg()
        save(args.out, result)
    table(
        ["setting", *(f"{name}, facts/s" for name in METHODS), "x loop", "x cached loop",
         "apart (nats)"],
        [
            [
                row["setting"],
                *(f"{row[name]['facts_per_second']:.2f}" for name in METHODS),
                *(
                    f"{row[name]['times']:.1f} (processor {row[name]['times_cpu']:.1f})"
                    for name in ("loop", "cached loop")
                ),
                f"{row['loop']['largest_difference_nats']:.1e}",
            ]
            for row in result["rows"]
        ],
    )  # fmt: skip


def _row(
    model: mps.Model,
    fact_set: FactSet,
    facts: list[Fact],
    contrast: bool,
    shots: int,
    repeats: int,
) -> dict[str, Any]:
    proxy = mps.RecallProxy(model, fact_set, facts, contrast=contrast, shots=shots)
    start = time.process_time()
    by_relation = _sequences(model, fact_set, facts, contrast, shots)
    sequences = [s for group in by_relation for s in group]
    ours = Pass(model, sequences)
    preparing = time.process_time() - start
    some = [group[: max(8, len(group) // 8)] for group in by_relation[::3]]
    batches = {
        name: _best_batch(loop, model.module, some) for name, loop in METHODS.items() if loop
    }
    clock: dict[str, list[float]] = {name: [] for name in METHODS}
    cpu: dict[str, list[float]] = {name: [] for name in METHODS}
    said: dict[str, tuple[Tensor, int]] = {}
    for _ in range(repeats):
        for name, loop in METHODS.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            if loop is None:
                proxy.score()
            else:
                said[name] = loop(model.module, by_relation, batches[name])
            clock[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - cpu_start)
    said["proxy"] = ours.run(), ours.tokens
    row: dict[str, Any] = {
        "facts": len(facts),
        "sequences": len(sequences),
        "sequence_tokens": sum(len(s.tokens) - 1 for s in sequences),
        "preparing_cpu_seconds": preparing,
    }
    for name in METHODS:
        apart = (said[name][0] - said["proxy"][0]).abs()
        row[name] = {
            "facts_per_second": len(facts) / statistics.median(clock[name]),
            "seconds": clock[name],
            "cpu_seconds": cpu[name],
            "tokens": said[name][1],
            "batch": batches.get(name),
            "largest_difference_nats": float(apart.max()),
            "mean_difference_nats": float(apart.mean()),
        }
        for ratio, seconds in (("times", clock), ("times_cpu", cpu)):
            pairs = zip(seconds[name], seconds["proxy"], strict=True)
            row[name][ratio] = statistics.median(a / b for a, b in pairs)
    return row


def _sequences(
    model: mps.Model, fact_set: FactSet, facts: list[Fact], contrast: bool, shots: int
) -> list[list[TokenSequence]]:
    """What the proxy asks, a list a relation."""
    groups: dict[str, list[TokenSequence]] = {}
    for fact in facts:
        answers = (fact.answer, *(fact_set.distractors(fact) if contrast else ()))
        asked = [ask(model, fact_set, fact, answer, shots) for answer in answers]
        groups.setdefault(fact.relation, []).extend(asked)
    return list(groups.values())


def _best_batch(loop: Loop, module: Any, some: list[list[TokenSequence]]) -> int:
    def seconds(batch: int) -> float:
        start = time.process_time()
        loop(module, some, batch)
        return time.process_time() - start

    loop(module, [some[0]], BATCHES[0])  # warms up
    return min(BATCHES, key=seconds)


@torch.inference_mode()
def padded(module: Any, groups: Sequence[list[TokenSequence]], batch: int) -> tuple[Tensor, int]:
    """Log-probabilities `(sequences,)` of the continuations, and tokens that went through."""
    sequences = [s for group in groups for s in group]
    return _batches(module, sequences, batch, 0, None)


@torch.inference_mode()
def cached(module: Any, groups: Sequence[list[TokenSequence]], batch: int) -> tuple[Tensor, int]:
    """The same, with what a relation's sequences have in common computed once."""
    sums, tokens = [], 0
    for group in groups:
        first, last = min(s.tokens for s in group), max(s.tokens for s in group)
        most = min(s.start for s in group) - 1  # the token before an answer is read, so fed
        same = (a == b for a, b in zip(first[:most], last[:most], strict=True))
        common = next((place for place, equal in enumerate(same) if not equal), most)
        cache = DynamicCache(config=module.config)
        if common:
            module.get_decoder()(torch.tensor([first[:common]]), past_key_values=cache)
        found, fed = _batches(module, group, batch, common, cache if common else None)
        sums.append(found)
        tokens += common + fed
    return torch.cat(sums), tokens


def _batches(
    module: Any,
    sequences: Sequence[TokenSequence],
    batch: int,
    skipped: int,
    cache: DynamicCache | None,
) -> tuple[Tensor, int]:
    """Sequences by length, without their first `skipped` tokens, which are in the cache."""
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index].tokens))
    sums = torch.zeros(len(sequences), dtype=torch.float64)
    fed = 0
    for begin in range(0, len(order), batch):
        chosen = order[begin : begin + batch]
        rows, places, targets = [], [], []
        for row, index in enumerate(chosen):
            sequence = sequences[index]
            for place in range(sequence.start, len(sequence.tokens)):
                rows.append(row)
                places.append(place - 1 - skipped)
                targets.append(sequence.tokens[place])
        inputs = pad_sequence(
            [torch.tensor(sequences[i].tokens[skipped:-1]) for i in chosen], batch_first=True
        )
        fed += inputs.numel()
        past = None
        if cache is not None:
            past = copy.deepcopy(cache)
            past.batch_repeat_interleave(len(chosen))
        states = module.get_decoder()(
            inputs, past_key_values=past, use_cache=past is not None
        ).last_hidden_state
        logits = module.get_output_embeddings()(states[rows, places]).float()
        lost = cross_entropy(logits, torch.tensor(targets), reduction="none").double()
        sums.index_add_(0, torch.tensor(chosen)[torch.tensor(rows)], -lost)
    return sums, fed


METHODS: dict[str, Loop | None] = {"proxy": None, "loop": padded, "cached loop": cached}


if __name__ == "__main__":
    main()
