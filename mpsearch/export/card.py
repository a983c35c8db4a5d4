"""The model card of an export: what it is, what it still knows, how it is served and was made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mpsearch.budget import RUNTIMES
from mpsearch.export.dequantized import DEQUANTIZED
from mpsearch.fit import resident_bytes, unpacks
from mpsearch.formats import Format
from mpsearch.outcome import outcome
from mpsearch.points import SIMPLE_KINDS, Point
from mpsearch.promise import Promise
from mpsearch.run import Run
from mpsearch.sizes import format_size
from mpsearch.space import ResolvedSpace

FIGURE = "formats.png"
_TRANSFORMERS = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="bfloat16")
tokenizer = AutoTokenizer.from_pretrained(FOLDER)"""
_VLLM = "vllm serve FOLDER"
_SERVE = {
    "compressed-tensors": ("python", _TRANSFORMERS),
    "vllm": ("sh", _VLLM),
    "gptq": (
        "python",
        "from gptqmodel import GPTQModel\n\nmodel = GPTQModel.load(FOLDER)",
    ),
    "auto-gptq": (
        "python",
        "from auto_gptq import AutoGPTQForCausalLM\n\n"
        "model = AutoGPTQForCausalLM.from_quantized(FOLDER, use_safetensors=True)",
    ),
    "bitsandbytes": ("python", _TRANSFORMERS),
    "gguf": ("sh", "llama-server --model FOLDER/model.gguf"),
    DEQUANTIZED: ("python", _TRANSFORMERS),
}


def model_card(
    about: Mapping[str, Any],
    space: ResolvedSpace,
    formats: Mapping[str, Format],
    able: Sequence[str],
    tables: bool,
    run: Run | None,
    point: Point | None,
    promise: Promise | None,
) -> str:
    """Markdown.

    Args:
        about: what `mpsearch.json` holds.
        formats: of every searched layer.
        able: the targets that can hold them.
        tables: whether the embedding or the head is quantized.
        run, point, promise: where the assignment is a run's point; all of them or none.
    """
    sections = [
        _head(about),
        _what(about, space, formats, tables, run),
        _serve(about, able),
        *([_knows(run, point, promise)] if run and point and promise else []),
        _formats(about, space),
        _made(about, run),
        _unverified(),
    ]
    return "\n".join("\n".join(section) + "\n" for section in sections)


def _head(about: Mapping[str, Any]) -> list[str]:
    """What the hub reads. JSON's strings are YAML's."""
    return [
        "---",
        *([f"base_model: {json.dumps(about['base_model'])}"] * bool(about["base_revision"])),
        f"tags: [mpsearch, quantized, {json.dumps(about['target'])}]",
        "---",
    ]


def _what(
    about: Mapping[str, Any],
    space: ResolvedSpace,
    formats: Mapping[str, Format],
    tables: bool,
    run: Run | None,
) -> list[str]:
    counts: dict[str, int] = {}
    for fmt in formats.values():
        counts[fmt.name] = counts.get(fmt.name, 0) + 1
    named = ", ".join(f"{count} layers {name}" for name, count in counts.items())
    revision = f", revision {about['base_revision']}" if about["base_revision"] else ""
    folded = " (AWQ's scales folded in)" if about["awq"] else ""
    stored, plain = about["stored_bytes"], about["target"] == DEQUANTIZED
    return [
        f"# {about['base_model']}, quantized",
        "",
        f"Made by mpsearch from {about['base_model']}{revision}, weights "
        f"{about['base_fingerprint'][:16]}{folded}: {stored:,} bytes of tensors "
        f"({format_size(stored)}), {about['bits_per_weight']:.2f} bits a searched weight, for "
        f"{about['target']}.",
        "",
        f"- Formats: {named}; everything else bf16"
        f"{', norms and biases float32' if about['target'] == 'gguf' else ''}."
        + (" All are stored dequantized, in 16 bits a weight." if plain else ""),
        *([] if plain else _resident(space, formats, stored, tables)),
        *([f"- Made for: {run.budget_line}."] if run and run.budget_line else []),
        f"- Codes chosen by {about['bank']['quantizer']}; assignment {about['assignment_id']}.",
    ]


def _resident(
    space: ResolvedSpace, formats: Mapping[str, Format], stored: int, tables: bool
) -> list[str]:
    """What the weights take in the memory of the runtimes that serve all of the formats."""
    said = []
    for runtime in RUNTIMES.values():
        loads = space.target.container in runtime.targets
        takes = runtime.tables or not tables
        if loads and takes and all(map(runtime.serves, formats.values())):
            size = resident_bytes(space, stored, runtime)
            how = ", which unpacks it" if unpacks(space, runtime) else ""
            said.append(f"{runtime.name}{how} {size:,} bytes")
    return [f"- In memory: {'; '.join(said)}."] if said else []


def _serve(about: Mapping[str, Any], able: Sequence[str]) -> list[str]:
    language, code = _SERVE[about["target"]]
    lines = ["## Serve", "", f"```{language}", code, "```"]
    if about["target"] == "compressed-tensors" and "vllm" in able:
        lines += ["", f"or `{_VLLM}`."]
    if about["target"] == "gguf":  # given the file, AutoTokenizer leaves special tokens out (5.23)
        lines += [
            "",
            'or `AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file="model.gguf")` of '
            "transformers with `AutoTokenizer.from_pretrained(FOLDER)`, without naming the file. "
            "`llama.cpp.txt` makes the same mix of types with llama.cpp's own tools.",
        ]
    return lines


def _knows(run: Run, point: Point, promise: Promise) -> list[str]:
    """Recall with its interval, what was forgotten, and the simple allocations beside it."""
    recall, loss = promise.recall, promise.answer_loss
    reference = run.content.get(f"reference_{promise.partition}", {}).get("recall")
    unquantized = f" (unquantized {reference:.1%})" if reference is not None else ""
    said = [
        f"On {len(promise.relations)} {promise.partition} facts, asked after {promise.shots} "
        f"solved examples, it recalls {recall.mean:.1%} [{recall.low:.1%}, {recall.high:.1%}]"
        f"{unquantized} and loses {loss.mean:.3f} nats [{loss.low:.3f}, {loss.high:.3f}] an answer"
        " (95 % intervals)."
    ]
    if promise.forgotten is not None:
        said.append(f"{promise.forgotten} facts are forgotten and {promise.gained} gained.")
    if promise.partition == "validation":
        said.append(
            "Validation facts had a part in choosing among points, so the figure may flatter it."
        )
    found = outcome(run)
    if found is not None and found.id == point.id and found.gains:
        said.append(f"Gain on these facts over {'; '.join(map(str, found.gains))}.")
    return ["## What it still knows", "", " ".join(said), "", *_baselines(run, point)]


def _baselines(run: Run, point: Point) -> list[str]:
    """Validation facts, of this point and the simple allocations of every size."""
    rows = [
        [
            f"**{other.kind}, this one**" if other.id == point.id else other.kind,
            f"{other.stored_bytes:,}",
            f"{other.recall.mean:.1%} ± {other.recall.stderr:.1%}",
            f"{other.answer_loss.mean:.3f} ± {other.answer_loss.stderr:.3f}",
        ]
        for other in run.front().points
        if other.id == point.id or other.kind in SIMPLE_KINDS
    ]
    header = ["on validation facts", "stored bytes", "recall", "answer loss (nats)"]
    return _table(header, rows)


def _formats(about: Mapping[str, Any], space: ResolvedSpace) -> list[str]:
    """A row a block, a column a kind of group."""
    kinds, rows = space.by_block(about["assignment"])
    return [
        "## Formats by layer",
        "",
        f"![Bits by block and kind of layer]({FIGURE})",
        "",
        *_table(["block", *kinds], rows),
    ]


def _made(about: Mapping[str, Any], run: Run | None) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = ["## How it was made", "", f"- Versions: {versions}."]
    settings = json.dumps(about["bank"], sort_keys=True)
    lines.append(f"- Quantizer: `{settings}`.")
    if run is not None:
        question = run.question
        lines.append(
            f"- Searched with seed {question['seed']}, sampler {question['sampler']}, budget "
            f"{question['budget_bytes']:,} bytes, {len(run.relations('search'))} search facts, "
            f"arithmetic in {question['dtype'].removeprefix('torch.')}."
        )
        if command := run.content.get("command"):
            lines.append(f"- `{command}`")
    lines.append("- `mpsearch.json` holds the whole assignment and the digests of these files.")
    return lines


def _unverified() -> list[str]:
    return [
        "## Not verified",
        "",
        "- `mpsearch verify FOLDER` loads it in a fresh process and asks the facts again; this "
        "card does not say that anybody did.",
        "- Serving on a GPU was not tested. Kernels there round in other ways than the arithmetic "
        "that scored it.",
        "- Facts are recalled from a prompt with solved examples; chat, code and long contexts "
        "were not measured.",
    ]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in (header, *rows)]
    return [lines[0], "|---" * len(header) + "|", *lines[1:]]
