"""What auto-gptq is compared with, written by the libraries of the main environment.

    python tests_autogptq/prepare.py FOLDER

FOLDER gets `export/`, the built-in model in 4-bit GPTQ; `answers.json`, what that candidate
answers, in fp32 and in the arithmetic that a search scores it in; `layers.safetensors`, weights and
Gram matrices of some layers; and `errors.json`, the output errors on them of gptqmodel, of the same
without what auto-gptq does not have, and of rounding.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from torch import Tensor

import mpsearch as mps
from mpsearch.asked import balanced
from mpsearch.assignment import Assignment
from mpsearch.bank import Bank
from mpsearch.calibration import Calibration, input_statistics, sample_text
from mpsearch.codecs import decode
from mpsearch.evaluate import Bench, quantized_layers
from mpsearch.facts import FactSet
from mpsearch.formats import FORMATS
from mpsearch.forward import Pass, TokenSequence
from mpsearch.models import Model
from mpsearch.quantizers import InputStatistics, get_quantizer
from mpsearch.recall import SHOTS, ask
from mpsearch.space import SearchSpace

SPACE = "version: 1\ntarget: gptq\nformats: [gptq4-g64]\n"
CALIBRATION = Calibration(sequences=16)  # a quarter of the usual: both engines see the same
LAYERS = (
    *("model.layers.0.self_attn.q_proj", "model.layers.7.self_attn.v_proj"),
    *("model.layers.15.self_attn.o_proj", "model.layers.22.mlp.up_proj"),
    "model.layers.29.mlp.down_proj",
)
FACTS = 200
# No reordering by inputs, and auto-gptq's damping.
AS_AUTO_GPTQ = {"act_group_aware": False, "damp_percent": 0.01}


def relative_error(weight: Tensor, decoded: Tensor, gram: Tensor) -> float:
    """`|X (decoded - weight)^T| / |X weight^T|` from `X^T X`."""
    error = decoded.double() - weight.double()
    squares = [((part @ gram.double()) * part).sum() for part in (error, weight.double())]
    return math.sqrt(squares[0] / squares[1])


def write_layers(model: Model, folder: Path) -> None:
    statistics = input_statistics(model, sample_text(model, CALIBRATION), lambda done, of: None)
    get_quantizer("gptq", "gptq")  # it prepares gptqmodel for being imported
    from gptqmodel.quantization import QuantizeConfig

    def plain(**given: Any) -> QuantizeConfig:
        return QuantizeConfig(**{**given, **AS_AUTO_GPTQ})

    tensors: dict[str, Tensor] = {}
    errors: dict[str, dict[str, float]] = {}
    for name in LAYERS:
        weight, seen = model.originals[name].float(), statistics[name]
        tensors |= {f"{name}.weight": weight, f"{name}.gram": seen.gram}
        errors[f"{name} rounding"] = measured(weight, seen, "rounding")
        errors[f"{name} gptq"] = measured(weight, seen, "gptq")
        with patch("gptqmodel.quantization.QuantizeConfig", plain):
            errors[f"{name} plain gptq"] = measured(weight, seen, "gptq")
    tokens = {"tokens": str(seen.tokens)}
    save_file(tensors, folder / "layers.safetensors", metadata=tokens)
    (folder / "errors.json").write_text(json.dumps(errors, indent=1))


def measured(weight: Tensor, seen: InputStatistics, name: str) -> dict[str, float]:
    """Output error of one quantizer at each width."""
    formats = [FORMATS[f"gptq{bits}-g64"] for bits in (2, 3, 4, 8)]
    stored = get_quantizer(name, "gptq").quantize(weight, formats, seen)
    return {
        fmt.name: relative_error(weight, decode(stored[fmt.name], fmt), seen.gram)
        for fmt in formats
    }


def write_export(model: Model, folder: Path) -> None:
    space = SearchSpace.parse(SPACE, "prepare.py").resolve(model)
    bank = Bank(model, get_quantizer("gptq", "gptq"), CALIBRATION)
    candidate = Assignment.of(space.smallest, json.dumps(bank.settings))
    bank.build(quantized_layers(space, candidate))
    mps.export(model, candidate, to="auto-gptq", out=folder / "export", space=space)

    facts = FactSet.builtin()
    asked = balanced(facts.part("test"), FACTS)
    sequences = [ask(model, facts, fact, fact.answer, SHOTS) for fact in asked]
    with Bench(space, bank) as bench:
        bench.put(candidate)
        scored, _ = answered(model, sequences)
    model.module.float()
    for name, fmt in space.layer_formats(candidate).items():
        model.places[name].parameter.data = decode(bank.stored(name, fmt), fmt).float()
    exact, log_probs = answered(model, sequences)
    answers = [
        {"tokens": s.tokens, "start": s.start, "scored": a, "first": b, "log_prob": c}
        for s, a, b, c in zip(sequences, scored, exact, log_probs, strict=True)
    ]
    (folder / "answers.json").write_text(json.dumps(answers))


@torch.inference_mode()
def answered(model: Model, sequences: list[TokenSequence]) -> tuple[list[int], list[float]]:
    """The likeliest first token of each answer, and the answer's log-probability in nats."""
    first: dict[int, int] = {}

    def visit(index: int, log_probs: Tensor) -> None:
        first[index] = int(log_probs[0].argmax())

    log_probs = Pass(model, sequences).run(visit).tolist()
    return [first[index] for index in range(len(sequences))], log_probs


if __name__ == "__main__":
    where = Path(sys.argv[1])
    shutil.rmtree(where, ignore_errors=True)
    where.mkdir(parents=True)
    reference = mps.load_model("builtin:smollm2-135m")
    write_layers(reference, where)
    write_export(reference, where)
