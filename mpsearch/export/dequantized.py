"""Dequantized: what the chosen formats decode to, in a plain checkpoint for any evaluator.

It says what a point's weights are worth where nothing loads its formats, and is as large as the
model it came from.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from mpsearch.assignment import Assignment
from mpsearch.bank import Bank
from mpsearch.codecs import decode
from mpsearch.export.checkpoint import write_folder
from mpsearch.formats import BF16, Format
from mpsearch.models import Model

DEQUANTIZED = "dequantized"


def write_dequantized(
    model: Model, bank: Bank, formats: Mapping[str, Format], folder: Path
) -> None:
    """Write weights, config and tokenizer into a folder.

    A layer is stored in the dtype that its format decodes to, which is bf16, and fp16 for GPTQ's.
    So whoever loads it in the dtype in which the candidate was scored, be it bf16 or float32, has
    the candidate's weights; fp16 is as large, and bf16 would have rounded GPTQ's for float32.

    Args:
        formats: layer name to format, for every searched layer, of any container.
    """
    names = {parameter: name for name, parameter in model.module.named_parameters()}
    decoded: dict[str, Tensor] = {}
    for layer, fmt in formats.items():
        place = model.places[layer]
        weight = decode(bank.stored(layer, fmt), fmt)
        name = names[place.parameter]
        if name not in decoded:  # of one layer, or of all experts of a block
            decoded[name] = place.loaded.to("cpu", weight.dtype, copy=True).contiguous()
        place.part(decoded[name]).copy_(weight)
    kept = {name: tensor.contiguous() for name, tensor in model.kept.items()}
    write_folder(model, {**kept, **decoded}, folder)


def as_stored(assignment: Assignment, to: str) -> Assignment:
    """The formats in which an export to a target stores an assignment, to say how large it is.

    They are its own, but 16 bits throughout where it is dequantized.
    """
    if to != DEQUANTIZED:
        return assignment
    return Assignment.of(dict.fromkeys(assignment, BF16.name), assignment.bank)
