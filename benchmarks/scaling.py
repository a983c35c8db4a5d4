"""How time and memory grow: with facts, with layers, with formats, with the size of the model.

Protocol: Llama-like models built from a config, random weights, float32, banks by rounding. One
thing is varied at a time, the others stay at their middle value. An evaluation is swapping and
scoring two assignments in turn that hold every format and differ in every group, nothing reused, so
that every block runs; a sensitivity is the table that a search measures, with its decoding. All
values of what is varied are measured in turn, `--repeats` times, so that a slow minute of the
machine is no single value's; the least counts, in seconds of the processor, which other programs
change less than the clock. The exponent is the slope
of log seconds over log value: 1 is linear. What does not grow makes it smaller, so the exponent of
the larger half of the values is given, too. Memory is the peak of a process of its own that loads a
model, measures its sensitivity and evaluates, without the caches that else take an eighth each of
what is free; a line is fitted to it over the weights' bytes, in float32, so that what Python and
the libraries take stands apart.

    python benchmarks/scaling.py [--repeats 8] [--out FILE]

Writes one JSON: `rows` of measured, varied, value, seconds; `exponents`; `memory` rows of blocks,
weights_bytes, peak_bytes, and `memory_line`. Rows that are there already are not measured again.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from itertools import cycle, pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from result_file import commit, load, save
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mpsearch.assignment import Assignment
from mpsearch.bank import Bank
from mpsearch.console import quiet_libraries, say, table
from mpsearch.device import limit_memory, peak_memory_bytes
from mpsearch.evaluate import Bench, all_layers
from mpsearch.facts import Fact, FactSet
from mpsearch.models import Model, from_module
from mpsearch.quantizers import get_quantizer
from mpsearch.recall import RecallProxy
from mpsearch.sensitivity import measure_sensitivity
from mpsearch.space import ResolvedSpace, SearchSpace

VALUES = {
    "facts": (25, 50, 100, 200, 400),
    "layers": (14, 28, 56, 112, 224),
    "formats": (2, 4, 8, 16),
}
MIDDLE = {"facts": 50, "layers": 28, "formats": 4}
MEMORY_BLOCKS = (2, 4, 8, 16)
LAYERS_A_BLOCK = 7
FORMATS = [
    f"int{bits}-{columns}" for columns in ("g64", "g32", "channel") for bits in (4, 8, 3, 2, 6, 5)
]
SUBJECTS = 1000  # of which four in ten are search facts
ANSWERS = ("red", "green", "blue", "white", "black", "brown")
Rows = list[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scaling.json"))
    parser.add_argument("--memory-of", type=int, metavar="BLOCKS", help=argparse.SUPPRESS)
    args = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    if args.memory_of:
        print(json.dumps(memory_of(args.memory_of)))
        return
    result = {"memory": [], **load(args.out)}
    result["conditions"] = {
        "commit": commit(),
        "machine": platform.machine(),
        "middle": MIDDLE,
        "repeats": args.repeats,
        "threads": 1,
        "versions": {name: version(name) for name in ("mpsearch", "torch", "transformers")},
    }
    known = {(row["measured"], row["varied"]) for row in result["rows"]}
    for measured, varied in product(MEASURES, VALUES):
        if (measured, varied) not in known:
            result["rows"] += rows_of(measured, varied, args.repeats)
            save(args.out, result)
    for blocks in MEMORY_BLOCKS:
        if all(row["blocks"] != blocks for row in result["memory"]):
            say(f"memory of {blocks} blocks")
            command = [sys.executable, __file__, "--memory-of", str(blocks)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            result["memory"].append(json.loads(done.stdout))
            save(args.out, result)
    result["exponents"] = exponents(result["rows"])
    result["memory_line"] = memory_line(result["memory"])
    save(args.out, result)
    show(result)


def exponents(rows: Rows) -> Rows:
    """Of everything measured, over all values and over the larger half of them."""
    found = []
    for measured, varied in dict.fromkeys((row["measured"], row["varied"]) for row in rows):
        points = sorted(
            (row["value"], row["seconds"])
            for row in rows
            if (row["measured"], row["varied"]) == (measured, varied)
        )
        found.append(
            {
                "measured": measured,
                "varied": varied,
                "exponent": slope(points),
                "exponent_of_larger_half": slope(points[(len(points) - 1) // 2 :]),
            }
        )
    return found


def slope(points: list[tuple[float, float]]) -> float:
    """Of log second over log first, by least squares."""
    x, y = np.log(np.array(points)).T
    return float(np.polyfit(x, y, 1)[0])


def memory_line(rows: Rows) -> dict[str, float]:
    """Peak bytes as `fixed_bytes + bytes_a_weight_byte * weights_bytes`, by least squares."""
    weights, peaks = np.array([(row["weights_bytes"], row["peak_bytes"]) for row in rows]).T
    rate, fixed = np.polyfit(weights, peaks, 1)
    steps = [
        (b["peak_bytes"] - a["peak_bytes"]) / (b["weights_bytes"] - a["weights_bytes"])
        for a, b in pairwise(sorted(rows, key=lambda row: row["weights_bytes"]))
    ]
    return {
        "bytes_a_weight_byte": float(rate),
        "fixed_bytes": float(fixed),
        "least_step": min(steps),
        "most_step": max(steps),
    }


# ---------------------------------------------------------------------------------- what is run


def build_facts() -> FactSet:
    """Made-up facts that no model knows, of one relation."""
    template = "the color of {} is"
    return FactSet(
        tuple(
            Fact("color", template, f"s{number}", ANSWERS[number % len(ANSWERS)])
            for number in range(SUBJECTS)
        ),
        "made up",
    )


def build_model(blocks: int, hidden: int = 128) -> Model:
    """Random weights, a word a token."""
    words = ["<pad>", "<unk>", "the", "color", "of", "is", *ANSWERS]
    words += [f"s{number}" for number in range(SUBJECTS)]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return from_module(
        f"{blocks} blocks of {hidden}",
        Path(),
        LlamaForCausalLM(config),
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>"),
        torch.device("cpu"),
        torch.float32,
    )


class Ground:
    """A model, its facts, a space and a bank that is built."""

    def __init__(self, folder: str, model: Model, facts: int, formats: int):
        names = ", ".join(FORMATS[:formats])
        text = f"version: 1\ntarget: compressed-tensors\nformats: [{names}]\n"
        self.model, self.fact_set = model, build_facts()
        self.asked = self.fact_set.part("search")[:facts]
        if len(self.asked) < facts:
            raise ValueError(f"{len(self.asked)} search facts, {facts} are wanted; raise SUBJECTS")
        self.space: ResolvedSpace = SearchSpace.parse(text, "benchmark").resolve(model)
        quantizer = get_quantizer("rounding", "compressed-tensors")
        self.bank = Bank(model, quantizer, root=Path(folder))
        self.bank.build(all_layers(self.space))

    def proxy(self) -> RecallProxy:
        """As a search asks it."""
        return RecallProxy(self.model, self.fact_set, self.asked, contrast=False, prompts=True)

    def sensitivity(self) -> None:
        measure_sensitivity(self.space, self.bank, self.fact_set, tuple(self.asked), around=False)

    def shifted(self, by: int) -> Assignment:
        """Every format in turn, from the one at that place."""
        return Assignment.of(
            {
                name: formats[(place + by) % len(formats)].name
                for place, (name, formats) in enumerate(self.space.options.items())
            }
        )


def rows_of(measured: str, varied: str, repeats: int) -> Rows:
    """What is measured, of each value of what is varied."""
    with ExitStack() as stack:
        works = []
        for value in VALUES[varied]:
            say(f"{measured} with {value} {varied}")
            of = {**MIDDLE, varied: value}
            model = build_model(of["layers"] // LAYERS_A_BLOCK)
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            ground = Ground(folder, model, of["facts"], of["formats"])
            works.append(MEASURES[measured](ground, stack))
        seconds = least_seconds(works, repeats)
    return [
        {"measured": measured, "varied": varied, "value": value, "seconds": least}
        for value, least in zip(VALUES[varied], seconds, strict=True)
    ]


def least_seconds(works: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Of the processor, for each; they take turns."""
    found: list[list[float]] = [[] for _ in works]
    for _ in range(repeats):
        for work, seconds in zip(works, found, strict=True):
            start = time.process_time()
            work()
            seconds.append(time.process_time() - start)
    return [min(seconds) for seconds in found]


def evaluation(ground: Ground, stack: ExitStack) -> Callable[[], object]:
    proxy, bench = ground.proxy(), stack.enter_context(Bench(ground.space, ground.bank))
    turns = cycle(range(2))

    def evaluate() -> None:
        bench.put(ground.shifted(next(turns)))
        proxy.score()  # not told what is held, so it starts at the first block

    for _ in range(2):  # decodes what they need
        evaluate()
    return evaluate


def sensitivity(ground: Ground, stack: ExitStack) -> Callable[[], object]:
    return ground.sensitivity


MEASURES: dict[str, Callable[[Ground, ExitStack], Callable[[], object]]] = {
    "evaluation": evaluation,
    "sensitivity": sensitivity,
}


def memory_of(blocks: int) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        ground = Ground(folder, build_model(blocks, hidden=512), facts=12, formats=2)
        limit_memory(1)  # nothing is left to share out
        ground.sensitivity()
        proxy = ground.proxy()
        with Bench(ground.space, ground.bank) as bench:
            bench.evaluate(ground.shifted(0), proxy)
        weights = sum(parameter.nbytes for parameter in ground.model.module.parameters())
    return {"blocks": blocks, "weights_bytes": weights, "peak_bytes": peak_memory_bytes()}


def show(result: dict[str, Any]) -> None:
    table(
        ["measured", "varied", "exponent", "of the larger half"],
        [
            [row["measured"], row["varied"], f"{row['exponent']:.2f}",
             f"{row['exponent_of_larger_half']:.2f}"]
            for row in result["exponents"]
        ],
    )  # fmt: skip
    line = result["memory_line"]
    say(
        f"peak memory: {line['fixed_bytes'] / 2**20:.0f} MiB and {line['bytes_a_weight_byte']:.2f} "
        f"bytes a byte of weights ({line['least_step']:.2f} to {line['most_step']:.2f})"
    )


if __name__ == "__main__":
    main()
