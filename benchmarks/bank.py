"""What each quantizer makes of each format, what the whole bank costs, and how fast it swaps.

Protocol: the built-in model, calibration text of its own, drawn once for all rows. For each
quantizer and format all linears are quantized into an empty bank; `weight_error` and `output_error`
are relative errors over all of them (of outputs: on the calibration inputs), `answer_loss` is with
all linears in that format, on search facts. Rows of `awq` are of the model that AWQ prepared, which
is the same function; its weights have a scale of their own, so only `output_error` compares. The
whole bank at 2, 3, 4 and 8 bits with GPTQ, together and at one width alone, calibration included.
Putting 5 groups and all groups in place, decoded weights at hand and not, beside a copy of the same
bytes in memory; medians of `--repeats`.

    python benchmarks/bank.py [--facts 240] [--repeats 15] [--out FILE]

Writes one JSON: `rows` of quantizer, format, weight_error, output_error, answer_loss, seconds,
stored_bits_per_weight; `bank_seconds`, `bank_bytes`, `peak_bytes`, `one_width_seconds`; `swap` in
milliseconds; `awq_seconds`. What is there already is not measured again, so it can run in parts.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import mpsearch as mps
from mpsearch import awq
from mpsearch.asked import known_facts
from mpsearch.assignment import Assignment
from mpsearch.bank import Bank
from mpsearch.calibration import Calibration, calibration_tokens, input_statistics
from mpsearch.console import Progress, quiet_libraries, say
from mpsearch.device import peak_memory_bytes
from mpsearch.evaluate import Bench
from mpsearch.files import write_atomically
from mpsearch.formats import FORMATS, Format
from mpsearch.quantizers import InputStatistics, get_quantizer
from mpsearch.space import ResolvedSpace, SearchSpace

PACKED = [f"int{bits}-g64" for bits in (2, 3, 4, 5, 6, 8)]
COMPARED = {
    "rounding": [*PACKED, "int4-g64-asym", "int4-g32", "int4-channel", "fp8"],
    "gptq": [*PACKED, "gptq4-g64"],
    "hqq": [f"{name}-asym" for name in PACKED],
    "bitsandbytes": ["nf4", "nf4-dq", "fp4", "fp4-dq", "int8"],
}
AFTER_AWQ = {name: ["int3-g64", "int4-g64"] for name in ("rounding", "gptq")}
WHOLE = ("int2-g64", "int3-g64", "int4-g64", "int8-g64")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="builtin:smollm2-135m")
    parser.add_argument("--facts", type=int, default=240)
    parser.add_argument("--fact-file", type=Path, help="the built-in facts")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/bank.json"))
    args = parser.parse_args()
    quiet_libraries()
    model = mps.load_model(args.model)
    facts = mps.FactSet.load(args.fact_file) if args.fact_file else mps.FactSet.builtin()
    asked = known_facts(model, facts, args.facts)[1]
    result = _load(args.out)
    result["conditions"] = {
        "model": args.model,
        "fingerprint": model.fingerprint,
        "facts": len(asked),
        "dtype": str(model.dtype),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("mpsearch", "torch")},
    }

    def save(found: dict[str, Any]) -> None:
        result.update(found)
        result["peak_bytes"] = max(result.get("peak_bytes", 0), peak_memory_bytes())
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(args.out, json.dumps(result, indent=1) + "\n")

    def missing(after: str, compared: dict[str, list[str]]) -> list[tuple[str, str, Format]]:
        known = {(row["quantizer"], row["format"]) for row in result["rows"]}
        return [
            (quantizer, after, FORMATS[name])
            for quantizer, names in compared.items()
            for name in names
            if (quantizer + after, name) not in known
        ]

    def measure(model: mps.Model, rows: list[tuple[str, str, Format]]) -> None:
        text = calibration_tokens(model, Calibration())
        inputs = input_statistics(model, text, lambda done, total: None)
        proxy = mps.RecallProxy(model, facts, asked, contrast=False)
        with patch("mpsearch.bank.calibration_tokens", lambda *_: text):
            for row in rows:
                save({"rows": [*result["rows"], _row(model, *row, proxy, inputs)]})

    if "bank_seconds" not in result:
        save(_whole_bank(model, args.repeats))
    if rows := missing("", COMPARED):
        measure(model, rows)
    if rows := missing(" after awq", AFTER_AWQ):
        with Progress() as report:
            start = time.perf_counter()
            model = awq.prepare(model, report=report)
            save({"awq_seconds": time.perf_counter() - start})
        measure(model, rows)


def _load(path: Path) -> dict[str, Any]:
    if path.exists():
        return dict(json.loads(path.read_text(encoding="utf-8")))
    return {"rows": []}


def _space(model: mps.Model, container: str, names: tuple[str, ...]) -> ResolvedSpace:
    text = f"version: 1\ntarget: {container}\nformats: [{', '.join(names)}]\n"
    return SearchSpace.parse(text, "benchmark").resolve(model)


def _row(
    model: mps.Model,
    quantizer: str,
    after: str,
    fmt: Format,
    proxy: mps.RecallProxy,
    inputs: dict[str, InputStatistics],
) -> dict[str, Any]:
    """One quantizer and format on all linears."""
    say(f"{quantizer}{after} {fmt.name}")
    space = _space(model, fmt.container, (fmt.name,))
    with tempfile.TemporaryDirectory() as folder:
        bank = Bank(model, get_quantizer(quantizer, fmt.container), root=Path(folder))
        started: list[float] = []

        def report(stage: str, done: int, total: int) -> None:
            if stage.startswith("quantizing") and not started:
                started.append(time.perf_counter())  # the calibration before it is shared

        bank.build([(layer, fmt) for layer in model.layers], report)
        seconds = time.perf_counter() - started[0]
        errors = torch.zeros(4, dtype=torch.float64)
        for layer in model.layers:
            weight = model.originals[layer.name].float()
            error = bank.weight(layer.name, fmt).float() - weight
            gram = inputs[layer.name].gram
            errors += torch.stack(
                [
                    error.square().sum(),
                    weight.square().sum(),
                    ((error @ gram) * error).sum(),
                    ((weight @ gram) * weight).sum(),
                ]
            ).double()
        with Bench(space, bank) as bench:
            evaluation = bench.evaluate(space.largest, proxy)
    group_bytes = sum(fmt.layer_bytes(layer) for layer in model.layers)
    return {
        "quantizer": quantizer + after,
        "format": fmt.name,
        "weight_error": float(errors[0] / errors[1]) ** 0.5,
        "output_error": float(errors[2] / errors[3]) ** 0.5,
        "answer_loss": evaluation.answer_loss.mean,
        "answer_loss_stderr": evaluation.answer_loss.stderr,
        "seconds": seconds,
        "stored_bits_per_weight": 8 * group_bytes / sum(layer.weights for layer in model.layers),
        "nominal_bits": fmt.bits,
    }


def _whole_bank(model: mps.Model, repeats: int) -> dict[str, Any]:
    """GPTQ at all widths, at one width, and swapping among what it made."""
    space = _space(model, "compressed-tensors", WHOLE)
    wanted = [(layer, FORMATS[name]) for layer in model.layers for name in WHOLE]
    with tempfile.TemporaryDirectory() as folder, Progress() as report:
        bank = Bank(model, get_quantizer("gptq", "compressed-tensors"), root=Path(folder, "all"))
        start = time.perf_counter()
        bank.build(wanted, report)
        bank_seconds = time.perf_counter() - start
        alone = Bank(model, bank.quantizer, root=Path(folder, "one"))
        start = time.perf_counter()
        alone.build([pair for pair in wanted if pair[1].name == "int4-g64"], report)
        one_width_seconds = time.perf_counter() - start
        files = list(bank.folder.glob("*.safetensors"))
        return {
            "bank_seconds": bank_seconds,
            "bank_bytes": sum(file.stat().st_size for file in files),
            "bank_peak_bytes": peak_memory_bytes(),
            "one_width_seconds": one_width_seconds,
            "swap": [
                _swap(space, bank, changed, warm, repeats)
                for changed in (5, len(space.groups))
                for warm in (True, False)
            ],
        }


def _swap(
    space: ResolvedSpace, bank: Bank, changed: int, warm: bool, repeats: int
) -> dict[str, Any]:
    """Put assignments that differ in some groups in place, in turn with a copy of their bytes."""
    choice = random.Random(0)
    model, names = bank.model, [group.name for group in space.groups]
    formats = dict.fromkeys(names, "int4-g64")
    swapping, copying, swapped_bytes = [], [], 0
    with Bench(space, bank) as bench:
        for name in WHOLE:  # decodes everything once
            bench.put(Assignment.of(dict.fromkeys(names, name)))
        for _ in range(repeats):
            bench.put(Assignment.of(formats))
            other = dict(formats)
            for name in choice.sample(names, changed):
                other[name] = choice.choice([f for f in WHOLE if f != formats[name]])
            if not warm:
                bank.forget()
            start = time.perf_counter()
            bench.put(Assignment.of(other))
            swapping.append(time.perf_counter() - start)
            layers = [
                layer.name
                for group in space.groups
                for layer in group.layers
                if other[group.name] != formats[group.name]
            ]
            targets = [torch.empty_like(model.originals[name]) for name in layers]
            start = time.perf_counter()
            for target, name in zip(targets, layers, strict=True):
                target.copy_(model.originals[name])
            copying.append(time.perf_counter() - start)
            swapped_bytes = sum(target.nbytes for target in targets)
            formats = other
    return {
        "groups": changed,
        "cache": "warm" if warm else "cold",
        "bytes": swapped_bytes,
        "put_ms": 1000 * statistics.median(swapping),
        "copy_ms": 1000 * statistics.median(copying),
    }


if __name__ == "__main__":
    main()
