"""A model run block by block from its checkpoint, beside the same model loaded whole.

Protocol: `memory`: Llama-like models of growing depth, built from a config with random weights and
written as shards, each asked facts in a fresh process, loaded (`load_whole`, then `Pass.run`) and
streamed (`load_skeleton`, then a `Walk` over a candidate in int4-g64). The peak is the kernel's own
count of what was resident (VmHWM, Linux only), pages of mapped files included; that of a process
which only imports what the other two use is given beside it. Embedding and head are in memory both
ways.

`speed`: the built-in model on built-in search facts without distractors, candidates that hold a
random format in every group, banks by rounding. Loaded: `Bench.put` and `Pass.run`, from which all
blocks are run; decoded weights are kept as a search keeps them, after a first turn that is not
counted. Streamed: one walk over 1, then over 4 candidates, from the checkpoint and the packed
codes. Seconds are an evaluation's, by the clock and of the processor (a second thread reads ahead),
the least of `--turns`, taken in turn. Log-probabilities must be equal to the bit. Bytes are those
of tensors asked for, which a warm page cache does not read from the disk again.

    python benchmarks/streaming.py [--facts 96] [--turns 3] [--depths 4 8 16 32] [--out FILE]

Writes `memory` rows of blocks, way, weights_bytes, outside_bytes (of what is in no block) and
peak_bytes, and `speed` rows of way, candidates, seconds, cpu_seconds, read_bytes and, of all, the
ratios to the loaded model. What the file holds already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from result_file import commit, load, save
from torch import Tensor

from mpsearch.asked import balanced
from mpsearch.assignment import Assignment
from mpsearch.bank import Bank
from mpsearch.builtin import builtin_folder
from mpsearch.codecs import compressor
from mpsearch.console import quiet_libraries, say
from mpsearch.evaluate import Bench, all_layers, quantized_layers
from mpsearch.facts import FactSet
from mpsearch.formats import FORMATS, Format
from mpsearch.forward import Pass
from mpsearch.models import Model, load_whole
from mpsearch.quantizers.rounding import Rounding
from mpsearch.recall import SHOTS, ask
from mpsearch.skeleton import load_skeleton
from mpsearch.space import ResolvedSpace, SearchSpace
from mpsearch.walk import Walk

MODEL = "builtin:smollm2-135m"
WAYS = ("imports", "loaded", "streamed")
CANDIDATES = (1, 4)
SPACE = "version: 1\ntarget: compressed-tensors\nformats: [int3-g64, int4-g64, int8-g64]\n"
_MEMORY_FACTS = 16
_SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--facts", type=int, default=96)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/streaming.json"))
    parser.add_argument("--peak-of", nargs=2, metavar=("FOLDER", "WAY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    if args.peak_of:
        print(json.dumps(peak_of(Path(args.peak_of[0]), args.peak_of[1])))
        return
    result = {"memory": [], "speed": [], **load(args.out)}
    result.pop("rows", None)
    result["conditions"] = {
        "model": MODEL,
        "commit": commit(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, "
        f"{torch.backends.cpu.get_cpu_capability()}",
        "load": os.getloadavg(),
        "threads": 1,
        "versions": {name: version(name) for name in ("mpsearch", "torch", "transformers")},
    }
    for depth in args.depths:
        if all(row["blocks"] != depth for row in result["memory"]):
            result["memory"] += memory(depth)
            save(args.out, result)
    if not result["speed"]:
        result["speed"] = speed(args.facts, args.turns)
    save(args.out, result)
    show(result)


# ----------------------------------------------------------------------------------------- memory


def memory(depth: int) -> list[dict[str, Any]]:
    """The peaks of processes that ask a model of so many blocks."""
    with tempfile.TemporaryDirectory() as made:
        sizes = write_model(Path(made), depth)
        rows = []
        for way in WAYS:
            say(f"peak of {depth} blocks, {way}")
            # A process of its own for each, as the peak of one never falls.
            command = [sys.executable, __file__, "--peak-of", made, way]
            environment = {**os.environ, "MPSEARCH_HOME": f"{made}/home"}
            done = subprocess.run(
                command, capture_output=True, text=True, check=True, env=environment
            )
            rows.append({"blocks": depth, "way": way, **sizes, **json.loads(done.stdout)})
    return rows


def write_model(folder: Path, depth: int) -> dict[str, int]:
    """Shards of a Llama-like model with the built-in model's tokenizer, and the bank it needs."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(builtin_folder())
    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=depth, vocab_size=len(tokenizer), **_SIZES)
    module = LlamaForCausalLM(config).to(torch.bfloat16)
    module.save_pretrained(folder, max_shard_size="200MB")
    tokenizer.save_pretrained(folder)
    outside = sum(
        parameter.nbytes for name, parameter in module.named_parameters() if ".layers." not in name
    )
    del module
    skeleton = load_skeleton(str(folder))
    bank = Bank(skeleton, Rounding(), root=folder / "home" / "bank")
    first = [layer for layer in skeleton.layers if ".0." in layer.name]
    bank.build([(layer, FORMATS["int4-g64"]) for layer in first])
    for layer in skeleton.layers:  # quantizing them all would say nothing more
        alike = next(other for other in first if other.name.endswith(layer.name.split(".", 3)[3]))
        source, copy = (bank.path(one.name, FORMATS["int4-g64"]) for one in (alike, layer))
        if source != copy:
            shutil.copy(source, copy)
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return {"weights_bytes": weights, "outside_bytes": outside}


def peak_of(folder: Path, way: str) -> dict[str, int]:
    """Ask facts in this process; its peak."""
    from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: F401

    compressor(FORMATS["int4-g64"])
    if way == "loaded":
        _pass(load_whole(str(folder)), _MEMORY_FACTS).run()
    elif way == "streamed":
        skeleton = load_skeleton(str(folder))
        bank = Bank(skeleton, Rounding())
        work = _pass(skeleton, _MEMORY_FACTS)
        coded = bank.stored, FORMATS["int4-g64"]
        work.run(logits=Walk(work).logits({layer.name: coded for layer in skeleton.layers[::2]}))
    return {"peak_bytes": _status_bytes("VmHWM")}


def _status_bytes(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None, field
    return int(found.group(1)) * 1024


# ------------------------------------------------------------------------------------------ speed


def speed(facts: int, turns: int) -> list[dict[str, Any]]:
    """Seconds and bytes of an evaluation, loaded and streamed with few and more candidates."""
    model = load_whole(MODEL)
    space = SearchSpace.parse(SPACE, "streaming").resolve(model)
    bank = Bank(model, Rounding())
    bank.build([item for item in all_layers(space) if item[1].quantized])
    rng = random.Random(0)
    assignments = [_drawn(space, rng) for _ in range(max(CANDIDATES))]
    packed_bytes = sum(
        sum(tensor.nbytes for tensor in bank.stored(layer.name, fmt).values())
        for layer, fmt in quantized_layers(space, assignments[0])
    )
    ways = {"loaded": _loaded(space, bank, assignments, facts)}
    ways |= {
        f"streamed, {count}": _streamed(space, bank, assignments[:count], facts)
        for count in CANDIDATES
    }
    expected = ways["loaded"]()[0]  # the turn that is not counted
    least: dict[str, dict[str, float]] = {}
    for turn in range(turns):
        for name, run in ways.items():
            say(f"turn {turn + 1} of {turns}: {name}")
            clock, cpu = time.perf_counter(), time.process_time()
            found, read_bytes = run()
            spent = {
                "seconds": (time.perf_counter() - clock) / len(found),
                "cpu_seconds": (time.process_time() - cpu) / len(found),
            }
            if not all(map(torch.equal, found, expected)):
                raise SystemExit(f"{name} does not say what the loaded model says")
            before = least.setdefault(name, spent | {"read_bytes": read_bytes / len(found)})
            for part, seconds in spent.items():
                before[part] = min(before[part], seconds)
    return [
        {
            "way": name,
            "packed_bytes_of_the_first": packed_bytes,
            **row,
            **{f"{part}_ratio": row[part] / least["loaded"][part]
               for part in ("seconds", "cpu_seconds")},
        }
        for name, row in least.items()
    ]  # fmt: skip


Run = Callable[[], tuple[list[Tensor], int]]  # log-probabilities a candidate, and bytes read


def _loaded(space: ResolvedSpace, bank: Bank, assignments: Sequence[Assignment], facts: int) -> Run:
    work = _pass(bank.model, facts)

    def run() -> tuple[list[Tensor], int]:
        found = []
        with Bench(space, bank) as bench:
            for assignment in assignments:
                bench.put(assignment)
                found.append(work.run())
        return found, 0

    return run


def _streamed(
    space: ResolvedSpace, bank: Bank, assignments: Sequence[Assignment], facts: int
) -> Run:
    skeleton = load_skeleton(MODEL)
    checkpoint = skeleton.checkpoint
    assert checkpoint is not None
    work = _pass(skeleton, facts)
    packed_bytes = 0

    def packed(layer: str, fmt: Format) -> Mapping[str, Tensor]:
        nonlocal packed_bytes
        stored = bank.stored(layer, fmt)
        packed_bytes += sum(tensor.nbytes for tensor in stored.values())
        return stored

    walk = Walk(work)
    candidates = [
        {layer.name: (packed, fmt) for layer, fmt in quantized_layers(space, assignment)}
        for assignment in assignments
    ]

    def run() -> tuple[list[Tensor], int]:
        before = checkpoint.read_bytes + packed_bytes
        found = [work.run(logits=logits) for logits in walk.run(candidates)]
        return found, checkpoint.read_bytes + packed_bytes - before

    return run


def _drawn(space: ResolvedSpace, rng: random.Random) -> Assignment:
    """A random format in every group."""
    return Assignment.of(
        {name: rng.choice(formats).name for name, formats in space.options.items()}
    )


def _pass(model: Model, most: int) -> Pass:
    facts = FactSet.builtin()
    asked = balanced(facts.part("search"), most)
    return Pass(model, [ask(model, facts, fact, fact.answer, SHOTS) for fact in asked])


# ----------------------------------------------------------------------------------------- output


def show(result: Mapping[str, Any]) -> None:
    """The tables, as Markdown."""
    print("| blocks | weights | " + " | ".join(WAYS) + " |")
    print("|" + "---|" * (2 + len(WAYS)))
    rows: Iterable[int] = dict.fromkeys(row["blocks"] for row in result["memory"])
    for blocks in rows:
        mine = {row["way"]: row for row in result["memory"] if row["blocks"] == blocks}
        peaks = " | ".join(f"{mine[way]['peak_bytes'] / 2**20:.0f} MiB" for way in WAYS)
        print(f"| {blocks} | {mine['loaded']['weights_bytes'] / 2**20:.0f} MiB | {peaks} |")
    print("\n| way, candidates | s an evaluation | CPU s | ratio | CPU ratio | read |")
    print("|---|---|---|---|---|---|")
    for row in result["speed"]:
        print(
            f"| {row['way']} | {row['seconds']:.2f} | {row['cpu_seconds']:.2f} | "
            f"{row['seconds_ratio']:.2f} | {row['cpu_seconds_ratio']:.2f} | "
            f"{row['read_bytes'] / 2**20:.0f} MiB |"
        )


if __name__ == "__main__":
    main()
