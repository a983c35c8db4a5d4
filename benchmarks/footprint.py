"""Estimated memory beside measured: the peaks of processes held to the limit that is named.

Protocol: Llama-like models of several depths and widths, built from a config with random weights
and written as shards, with a bank of arbitrary codes. For each job and each way in which a model
is run, a fresh process is told to take as much memory as `mpsearch.footprint` says it needs at
least, and does the job's parts that take most: `ask` scores facts with distractors and text twice;
`search` measures sensitivity, scores two candidates, and measures slopes at one; `bank` rounds the
largest layer. The peak is the kernel's count of what was resident (VmHWM, Linux only), mapped files
included. Above the limit the estimate was too small; far below it, too large. The process that
reads the headers alone is no part of it.

    python benchmarks/footprint.py [--models NAME ...] [--jobs JOB ...] [--out FILE]

Writes rows of model, job, way, dtype, stage (which is estimated to take most), limit_bytes,
peak_bytes and their ratio. What the file holds already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from result_file import commit, load, save

from mpsearch.asked import balanced
from mpsearch.assignment import Assignment
from mpsearch.bank import Bank
from mpsearch.builtin import builtin_folder
from mpsearch.codecs import compressor
from mpsearch.console import quiet_libraries, say
from mpsearch.contents import Contents
from mpsearch.device import compute_dtype, limit_memory, pick_device
from mpsearch.evaluate import Bench
from mpsearch.facts import FactSet
from mpsearch.footprint import JOBS, Way, footprint
from mpsearch.formats import FORMATS
from mpsearch.guard import TextGuard
from mpsearch.models import Model, load_whole
from mpsearch.quantizers import floats_a_weight
from mpsearch.quantizers.rounding import Rounding
from mpsearch.recall import RecallProxy
from mpsearch.sensitivity import measure_sensitivity
from mpsearch.shards import Shards
from mpsearch.skeleton import load_skeleton
from mpsearch.slopes import measure_slopes
from mpsearch.space import SearchSpace
from mpsearch.tensor_files import write_tensors
from mpsearch.text import Text

# Blocks, words beyond the tokenizer's, and what the config says.
MODELS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "deep": (32, 0, {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16,
                     "num_key_value_heads": 4, "tie_word_embeddings": True}),
    "wide": (3, 0, {"hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24,
                    "num_key_value_heads": 8, "tie_word_embeddings": True}),
    "untied": (8, 0, {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32,
                      "num_key_value_heads": 8, "tie_word_embeddings": False}),
    "words": (6, 131072, {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12,
                          "num_key_value_heads": 4, "tie_word_embeddings": True}),
}  # fmt: skip
WAYS = ("loaded", "streamed")
_JOBS = ("ask", "search", "bank")
_FORMATS = ("int3-g64", "int4-g64", "int8-g64")
SPACE = f"version: 1\ntarget: compressed-tensors\nformats: [{', '.join(_FORMATS)}]\n"
_FACTS = 24
_DTYPES = {"int8": torch.int8, "int32": torch.int32, "bfloat16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--jobs", nargs="+", default=list(_JOBS), choices=_JOBS)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/footprint.json"))
    parser.add_argument("--peak-of", nargs=3, metavar=("FOLDER", "JOB", "WAY"))
    args = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    if args.peak_of:
        folder, job, way = args.peak_of
        print(json.dumps(peak_of(Path(folder), job, way == "streamed")))
        return
    result = load(args.out)
    result["conditions"] = {
        "commit": commit(),
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": 1,
        "versions": {name: version(name) for name in ("mpsearch", "torch", "transformers")},
    }
    for name in args.models:
        done = {(row["job"], row["way"]) for row in result["rows"] if row["model"] == name}
        left = [(job, way) for job in args.jobs for way in args.ways if (job, way) not in done]
        if not left:
            continue
        with tempfile.TemporaryDirectory() as made:
            write_model(Path(made), name)
            for job, way in left:
                say(f"{name}: {job}, {way}")
                result["rows"].append({"model": name, **measured(Path(made), job, way)})
                save(args.out, result)
    show(result)


def measured(folder: Path, job: str, way: str) -> dict[str, Any]:
    """A row, from a process of its own, as the peak of one never falls."""
    command = [sys.executable, __file__, "--peak-of", str(folder), job, way]
    environment = {**os.environ, "MPSEARCH_HOME": str(folder / "home")}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return {"job": job, "way": way, **json.loads(done.stdout)}


def write_model(folder: Path, name: str) -> None:
    """Shards of a model with the built-in model's tokenizer, and a bank of arbitrary codes."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(builtin_folder())
    depth, words, changes = MODELS[name]
    config = LlamaConfig(num_hidden_layers=depth, vocab_size=words or len(tokenizer), **changes)
    torch.manual_seed(0)
    module = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    module.save_pretrained(folder, max_shard_size="200MB")
    tokenizer.save_pretrained(folder)
    del module
    model = load_skeleton(str(folder))
    bank = Bank(model, Rounding(), root=folder / "home" / "bank")
    bank.folder.mkdir(parents=True)
    for layer in model.layers:
        for fmt in (FORMATS[name] for name in _FORMATS):
            stored = {
                tensor: torch.tensor([layer.rows, layer.columns])
                if tensor == "weight_shape"
                else torch.full(spec.shape, 0.01 if "float" in spec.dtype else 1,
                                dtype=_DTYPES[spec.dtype])
                for tensor, spec in fmt.tensors(layer.rows, layer.columns).items()
            }  # fmt: skip
            write_tensors(bank.path(layer.name, fmt), stored)


def peak_of(folder: Path, job: str, streamed: bool) -> dict[str, Any]:
    """Do a job in this process, held to what it is said to need; its peak."""
    dtype = compute_dtype(pick_device())
    config = json.loads((folder / "config.json").read_text())
    contents = Contents.of(Shards(folder, "bench"), config)
    planned = replace(JOBS[job], floats=floats_a_weight(Rounding()))
    said = footprint(contents, Way(streamed, dtype.itemsize), planned)
    limit_memory(said.least_bytes)
    compressor(FORMATS["int4-g64"])
    model = (load_skeleton if streamed else load_whole)(str(folder))
    {"ask": _ask, "search": _search, "bank": _quantize}[job](model)
    peak = int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "stage": said.stage,
        "limit_bytes": said.least_bytes,
        "peak_bytes": peak,
        "ratio": peak / said.least_bytes,
    }


def _ask(model: Model) -> None:
    facts = FactSet.builtin()
    asked = balanced(facts.part("search"), _FACTS)
    proxy = RecallProxy(model, facts, asked, contrast=True)
    guard = TextGuard(model, Text.builtin().held_out)
    proxy.score({})
    guard.score({})


def _search(model: Model) -> None:
    space = SearchSpace.parse(SPACE, "footprint").resolve(model)
    facts, bank = FactSet.builtin(), Bank(model, Rounding())
    asked = balanced(facts.part("search"), _FACTS)
    measure_sensitivity(space, bank, facts, tuple(asked[:4]), around=False)
    with Bench(space, bank) as bench:
        proxy = RecallProxy(model, facts, asked, contrast=False, prompts=True)
        guard = TextGuard(model, Text.builtin().held_out)
        uniform = Assignment.of(dict.fromkeys(space.options, _FORMATS[0]))
        mixed = Assignment.of(
            {group: _FORMATS[number % 3] for number, group in enumerate(space.options)}
        )
        bench.evaluate_all([uniform, mixed], proxy)
        bench.read_all([uniform, mixed], guard)
        measure_slopes(bench, mixed, [proxy])


def _quantize(model: Model) -> None:
    layer = max(model.layers, key=lambda layer: layer.weights)
    stored = Rounding().quantize(
        model.originals[layer.name].float(), [FORMATS[name] for name in _FORMATS], None
    )
    assert len(stored) == len(_FORMATS)


def show(result: dict[str, Any]) -> None:
    """The table, as Markdown."""
    print("| model | job | way | said | measured | of it |\n|---|---|---|---|---|---|")
    for row in result["rows"]:
        print(
            f"| {row['model']} | {row['job']} | {row['way']} | {row['limit_bytes'] / 2**20:.0f} MiB"
            f" | {row['peak_bytes'] / 2**20:.0f} MiB | {row['ratio']:.2f} |"
        )


if __name__ == "__main__":
    main()
