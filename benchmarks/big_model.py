"""A model twice as large as the memory that a process may have: searched and exported all the same.

Protocol: a Llama-like model of `--gigabytes` in bf16 is built from a config with random weights and
written as shards, a block each. Every stage then runs in a fresh process under a limit of the
kernel's, and opens the model as a user would, by `mpsearch.load_model` with that limit:

    loaded       `load_whole`, which is expected to fail
    bank         every layer in every format, by rounding
    sensitivity  the table of 16 samples, without what no allocation needs
    evaluate     ten assignments, four a walk: uniform ones, knapsack points of the table, random
    export       a knapsack point to compressed-tensors; export compares its bytes with its promise

Random weights know no fact, so facts are given and no gate is asked; losses say nothing here.

The limit is RLIMIT_DATA, private memory that can be written: what allocations take, used or not,
and the shards that torch maps to load them. RLIMIT_AS would count the code of libraries, too, which
is mapped and for the most part never read (torch with transformers: 0.8 GiB, of which 0.35 GiB are
data). What was resident, all files included, stands beside it. One thread computes and another
reads ahead; they share one arena of malloc, as each arena reserves memory of its own.

    python benchmarks/big_model.py [--gigabytes 4] [--limit 2] [--facts 8] [--folder DIR]

Writes `rows` of stage, done, seconds, cpu_seconds, peak_bytes (VmHWM: resident), peak_address_bytes
(VmPeak) and read_bytes (of tensors asked of the checkpoint), or the error; an evaluation's row has
its scores. Ends with 1 unless all stages but `loaded` are done, and that one is not.
What was broken off goes on, if it has a --folder.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from result_file import commit, load, save
from safetensors.torch import save_file

import mpsearch as mps
from mpsearch.allocate import knapsack, uniform
from mpsearch.asked import balanced
from mpsearch.assignment import Assignment
from mpsearch.bank import Bank
from mpsearch.builtin import builtin_folder
from mpsearch.console import quiet_libraries, say
from mpsearch.evaluate import Bench, Evaluation, all_layers
from mpsearch.export import export, tensor_bytes
from mpsearch.facts import Fact, FactSet
from mpsearch.footprint import JOBS
from mpsearch.measures import Sensitivity
from mpsearch.models import Model, load_whole
from mpsearch.opening import needs_of
from mpsearch.quantizers.rounding import Rounding
from mpsearch.recall import RecallProxy
from mpsearch.sensitivity import measure_sensitivity
from mpsearch.space import ResolvedSpace, SearchSpace

GIB = 2**30
STAGES = ("loaded", "bank", "sensitivity", "evaluate", "export")
SPACE = "version: 1\ntarget: compressed-tensors\nformats: [int3-g64, int4-g64]\n"
EVALUATIONS, A_WALK, KNAPSACKS, SAMPLES = 10, 4, 4, 16
SIZES = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
}
_JOB_OF = {"evaluate": "search"}  # others have the stage's name
_ENVIRONMENT = {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--limit", type=float, default=2.0, help="GiB")
    parser.add_argument("--facts", type=int, default=8)
    parser.add_argument("--folder", type=Path, help="goes on with what an earlier run left there")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/big_model.json"))
    parser.add_argument("--stage", nargs=2, metavar=("STAGE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    limit_bytes = int(args.limit * GIB)
    if args.stage:
        resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))
        print(json.dumps(run_stage(args.stage[0], Path(args.stage[1]), args.facts, limit_bytes)))
        return 0
    made = args.folder or Path(tempfile.mkdtemp(prefix="big_model_"))
    result: dict[str, Any] = {
        "limit_bytes": limit_bytes,
        "limit": "RLIMIT_DATA",
        "conditions": {
            "facts": args.facts,
            "samples": SAMPLES,
            "space": SPACE,
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, "
            f"{torch.backends.cpu.get_cpu_capability()}",
            "threads": 1,
            "versions": {name: version(name) for name in ("mpsearch", "torch", "transformers")},
        },
        "rows": [],
    }
    so_far = made / "result.json"
    if so_far.exists():
        result = load(so_far)
    else:
        say(f"writing {args.gigabytes:g} GB")
        result |= write_model(made / "model", args.gigabytes)
        save(so_far, result)
    for stage in STAGES[len(result["rows"]) :]:
        say(stage)
        row = {**held_to(limit_bytes, stage, made, args.facts), "commit": commit()}
        if not row["done"] and stage != "loaded":
            raise SystemExit(f"{stage}: {row['error']}; '{made}' is left as it is")
        result["rows"].append(row)
        save(so_far, result)
    save(args.out, result)
    shutil.rmtree(made)
    show(result)
    return 0 if proven(result["rows"]) else 1


def proven(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the loaded way failed and all else was done, block by block."""
    return len(rows) == len(STAGES) and all(
        not row["done"] if row["stage"] == "loaded" else row["done"] and row["streamed"]
        for row in rows
    )


def write_model(folder: Path, gigabytes: float, sizes: Mapping[str, Any] = SIZES) -> dict[str, int]:
    """Shards of a block each, of which one is in memory at a time, as many as come nearest.

    Args:
        sizes: of transformers' LlamaConfig; embedding and head must be tied.
    Returns:
        What it came to: blocks and weights_bytes.
    """
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(builtin_folder())
    config = LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=1, **sizes)
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in LlamaForCausalLM(config).state_dict().items()}
    block = {name: shape for name, shape in shapes.items() if ".layers.0." in name}
    outside = {n: s for n, s in shapes.items() if n not in block and n != "lm_head.weight"}
    block_bytes, outside_bytes = (
        2 * sum(shape.numel() for shape in part.values()) for part in (block, outside)
    )
    blocks = config.num_hidden_layers = max(
        1, round((gigabytes * 1e9 - outside_bytes) / block_bytes)
    )
    generator = torch.Generator().manual_seed(0)
    drawn, places = _drawn(block, generator), dict[str, str]()
    for number in range(-1, blocks):
        part = _drawn(outside, generator) if number < 0 else _numbered(drawn, number)
        file = f"model-{number + 2:05d}-of-{blocks + 1:05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    weights_bytes = outside_bytes + blocks * block_bytes
    index = {"metadata": {"total_size": weights_bytes}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"blocks": blocks, "weights_bytes": weights_bytes}


def _drawn(shapes: Mapping[str, torch.Size], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Matrices as models begin with them, and norms of ones."""
    return {
        name: torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
        if len(shape) > 1
        else torch.ones(shape, dtype=torch.bfloat16)
        for name, shape in shapes.items()
    }


def _numbered(block: Mapping[str, torch.Tensor], number: int) -> dict[str, torch.Tensor]:
    """Another block of the same numbers, moved on, as to draw billions takes minutes."""
    return {
        name.replace(".layers.0.", f".layers.{number}."): tensor.roll(number)
        for name, tensor in block.items()
    }


def held_to(limit_bytes: int, stage: str, made: Path, facts: int) -> dict[str, Any]:
    """A stage in a process under the limit, and how it ended."""
    command = [sys.executable, __file__, f"--limit={limit_bytes / GIB}", f"--facts={facts}"]
    environment = {**os.environ, **_ENVIRONMENT, "MPSEARCH_HOME": f"{made}/home"}
    done = subprocess.run(
        [*command, "--stage", stage, str(made)],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    if done.returncode:
        say(done.stderr)
        lines = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
        error = lines[-1].replace(f"{made}/", "")[:300]
        return {"stage": stage, "done": False, "error": error}
    return {"stage": stage, "done": True, **json.loads(done.stdout.splitlines()[-1])}


# ------------------------------------------------------------------------- in the limited process


def run_stage(stage: str, made: Path, facts: int, limit_bytes: int) -> dict[str, Any]:
    """Do it in this process, and say what it took."""
    start, folder = time.perf_counter(), str(made / "model")
    if stage == "loaded":
        model, found = load_whole(folder), {}
    else:
        job = _JOB_OF.get(stage, stage)
        model = mps.load_model(folder, memory_limit_bytes=limit_bytes, job=job)
        found = {"why": needs_of(model, JOBS[job], stage).why}
        found |= _WORK[stage](model, made, facts)
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time(),
        "peak_bytes": _status_bytes("VmHWM"),
        "peak_address_bytes": _status_bytes("VmPeak"),
        "read_bytes": model.checkpoint.read_bytes if model.checkpoint else 0,
        "streamed": model.streamed,
        **found,
    }


def build_bank(model: Model, made: Path, facts: int) -> dict[str, Any]:
    bank, wanted = Bank(model, Rounding()), all_layers(_space(model))
    bank.build([item for item in wanted if item[1].quantized])
    files = list(bank.folder.glob("*.safetensors"))
    return {"files": len(files), "bank_bytes": sum(file.stat().st_size for file in files)}


def measure(model: Model, made: Path, facts: int) -> dict[str, Any]:
    space, asked = _space(model), FactSet.builtin()
    table = measure_sensitivity(
        space, Bank(model, Rounding()), asked, _some(asked, facts), samples=SAMPLES, around=False
    )
    table.save(made / "sensitivity.json")
    return {"pairs": len(table.fisher_nats)}


def evaluate(model: Model, made: Path, facts: int) -> dict[str, Any]:
    space, asked = _space(model), FactSet.builtin()
    proxy = RecallProxy(model, asked, _some(asked, facts), contrast=False)
    chosen = list(assignments(space, made).items())
    scores: dict[str, Any] = {}
    with Bench(space, Bank(model, Rounding())) as bench:
        for first in range(0, len(chosen), A_WALK):
            walk = chosen[first : first + A_WALK]
            found = bench.evaluate_all([assignment for _, assignment in walk], proxy)
            for (name, _), evaluation in zip(walk, found, strict=True):
                if not isinstance(evaluation, Evaluation):
                    raise evaluation
                scores[name] = {"seconds": evaluation.seconds, "kl_nats": evaluation.kl.mean}
    return {"evaluations": scores, "tokens": proxy.tokens}


def write_export(model: Model, made: Path, facts: int) -> dict[str, Any]:
    space = _space(model)
    chosen = assignments(space, made)[f"knapsack {KNAPSACKS // 2}"]
    out = export(model, chosen, out=made / "export", space=space)
    return {
        "predicted_bytes": space.stored_bytes(chosen),
        "stored_bytes": tensor_bytes(out),
        "layers_in": {
            name: list(space.layer_formats(chosen).values()).count(fmt)
            for name, fmt in ((fmt.name, fmt) for fmt in space.layer_formats(chosen).values())
        },
    }


_WORK = {
    "bank": build_bank,
    "sensitivity": measure,
    "evaluate": evaluate,
    "export": write_export,
}


def assignments(space: ResolvedSpace, made: Path) -> dict[str, Assignment]:
    """Ten by name, the same in every process: uniform, knapsack points by rising size, random."""
    damage = Sensitivity.load(made / "sensitivity.json").fisher_nats
    found = {f"uniform {name}": assignment for name, assignment in uniform(space).items()}
    least, most = (space.stored_bytes(end) for end in (space.smallest, space.largest))
    budgets = [least + (most - least) * n // (KNAPSACKS + 1) for n in range(1, KNAPSACKS + 1)]
    points = knapsack(space, damage, budgets)
    found |= {f"knapsack {number}": point for number, point in enumerate(points, start=1)}
    rng = random.Random(0)
    for number in range(1, EVALUATIONS - len(found) + 1):
        drawn = {group: rng.choice(of).name for group, of in space.options.items()}
        found[f"random {number}"] = Assignment.of(drawn)
    return found


def _space(model: Model) -> ResolvedSpace:
    return SearchSpace.parse(SPACE, "big_model").resolve(model)


def _some(asked: FactSet, most: int) -> tuple[Fact, ...]:
    return tuple(balanced(asked.part("search"), most))


def _status_bytes(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None, field
    return int(found.group(1)) * 1024


# ----------------------------------------------------------------------------------------- output


def show(result: Mapping[str, Any]) -> None:
    """The table, as Markdown."""
    print(
        f"{result['weights_bytes'] / 1e9:.2f} GB in {result['blocks']} blocks, "
        f"{result['limit']} {result['limit_bytes'] / GIB:g} GiB\n"
    )
    print("| stage | done | s | CPU s | peak resident | address space | read |")
    print("|---|---|---|---|---|---|---|")
    for row in result["rows"]:
        if not row["done"]:
            print(f"| {row['stage']} | no: {row['error']} | | | | | |")
            continue
        print(
            f"| {row['stage']} | yes | {row['seconds']:.0f} | {row['cpu_seconds']:.0f} | "
            f"{row['peak_bytes'] / 2**20:.0f} MiB | {row['peak_address_bytes'] / 2**20:.0f} MiB | "
            f"{row['read_bytes'] / 1e9:.1f} GB |"
        )


if __name__ == "__main__":
    raise SystemExit(main())
