"""Dequantized: what the chosen formats decode to, in a plain checkpoint for any evaluator.

It says what a point's weights are worth where nothing loads its formats, and is as large as the
model it came from.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mpsearch.assignment import Assignment
from mpsearch.bank import Bank
from mpsearch.codecs import decode
from mpsearch.export.checkpoint import kept_parts, parameter_names, reference, write_folder
from mpsearch.export.parts import Part
from mpsearch.formats import BF16, Format, StoredTensor
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
    inside: dict[str, list[str]] = {}  # a parameter's layers: one, or those of a block's experts
    for layer, parameter in parameter_names(model).items():
        if layer in formats:
            inside.setdefault(parameter, []).append(layer)
    decoded = {
        parameter: _decoded_part(
            model, bank, {layer: formats[layer] for layer in layers}, parameter
        )
        for parameter, layers in inside.items()
    }
    write_folder(model, {**kept_parts(model), **decoded}.values(), folder)


def _decoded_part(model: Model, bank: Bank, formats: Mapping[str, Format], parameter: str) -> Part:
    """A parameter, and in it what its layers decode to."""
    first, fmt = next(iter(formats.items()))
    dtype = torch.float16 if fmt.container == "gptq" else torch.bfloat16
    shape = tuple(model.places[first].parameter.shape)

    def read() -> dict[str, Tensor]:
        whole = reference(model, first, parameter).to(dtype, copy=True)
        for layer, fmt in formats.items():
            if fmt.quantized:
                model.places[layer].part(whole).copy_(decode(bank.stored(layer, fmt), fmt))
        return {parameter: whole}

    return Part({parameter: StoredTensor(str(dtype).removeprefix("torch."), shape)}, read)


def as_stored(assignment: Assignment, to: str) -> Assignment:
    """The formats in which an export to a target stores an assignment, to say how large it is.

    They are its own, but 16 bits throughout where it is dequantized.
    """
    if to != DEQUANTIZED:
        return assignment
    return Assignment.of(dict.fromkeys(assignment, BF16.name), assignment.bank)
