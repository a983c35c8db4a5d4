"""bitsandbytes: one 4-bit format or LLM.int8, beside layers that stay in bf16.

transformers (5.23) puts the library's modules in the place of every plain linear that
`llm_int8_skip_modules` does not name. What they decode is the bank's weight to the bit; what they
compute with it may not be: see `caveats`.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from mpsearch.bank import Bank
from mpsearch.errors import UsageError
from mpsearch.export.checkpoint import write_checkpoint
from mpsearch.formats import FOUR_BIT_BLOCK, Format
from mpsearch.models import Model

log = logging.getLogger(__name__)

_PACKED_ROWS = 32  # that the kernel for AVX512-BF16 takes at once


def write_bitsandbytes(
    model: Model, bank: Bank, formats: Mapping[str, Format], folder: Path
) -> None:
    """Write weights, config and tokenizer into a folder.

    Args:
        formats: layer name to format, for every searched layer; one of them quantized.

    Raises:
        UsageError: several quantized formats, or a layer that transformers would not load so.
    """
    used = {fmt.name: fmt for fmt in formats.values() if fmt.quantized}
    if len(used) != 1:
        raise UsageError(
            "one bitsandbytes checkpoint holds one quantized format, and this point has "
            f"{' and '.join(used) or 'none'}; search a space of one, beside bf16"
        )
    (fmt,) = used.values()
    quantized = [layer for layer, of in formats.items() if of.quantized]
    kept = kept_linears(model.module, quantized)
    for caveat in caveats(model, formats):
        log.warning("%s", caveat)
    write_checkpoint(model, bank, formats, folder, quantization_config(fmt, kept))


def kept_linears(module: Any, quantized: Collection[str]) -> list[str]:
    """Names of the linears that stay as they are, in model order; tied heads are among them.

    transformers takes a name in `llm_int8_skip_modules` for all that lies below it, and for all
    that ends in it, too, so its own rule is asked whether it would quantize the very layers wanted.

    Args:
        module: a transformers model.
        quantized: names of the layers that are stored quantized.

    Raises:
        UsageError: one that is no plain linear, or that the name of a kept one would keep as well.
    """
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.quantizers_utils import should_convert_module

    modules = dict(module.named_modules())
    replaced = {name for name, child in modules.items() if type(child) in (nn.Linear, Conv1D)}
    kept = [name for name in modules if name in replaced.difference(quantized)]
    skipped = [*kept, *(getattr(module, "_keep_in_fp32_modules", None) or ())]
    for layer in quantized:
        if layer not in replaced:
            raise UsageError(
                f"'{layer}' is no plain linear, and transformers loads nothing else from "
                "bitsandbytes; search a space that leaves such layers bf16"
            )
        if not should_convert_module(layer, skipped):
            name = next(name for name in skipped if not should_convert_module(layer, [name]))
            raise UsageError(
                f"transformers would take '{layer}' for unquantized, as '{name}' is; search a "
                "space that leaves both bf16"
            )
    return kept


def quantization_config(fmt: Format, kept: list[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json.

    4-bit weights are computed with in bf16, the dtype that they decode to; the default, float32,
    would leave them unrounded.

    Args:
        fmt: of all quantized layers.
        kept: names of the linears that stay as they are.
    """
    if fmt.number == "int":
        width: dict[str, Any] = {"load_in_4bit": False, "load_in_8bit": True}
    else:
        name, _, double = fmt.name.partition("-")
        width = {
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": name,
            "bnb_4bit_use_double_quant": bool(double),
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
        }
    return {"quant_method": "bitsandbytes", **width, "llm_int8_skip_modules": kept}


def caveats(model: Model, formats: Mapping[str, Format]) -> tuple[str, ...]:
    """Where bitsandbytes computes with something else than the weights that were scored.

    On a CPU with AVX512-BF16 its first forward pass (0.50) packs 4-bit weights anew, with levels
    and absmax rounded to bf16; that needs whole blocks a row and rows in multiples of 32. LLM.int8
    rounds the inputs of layers, which no weight shows.

    Args:
        formats: layer name to format, for every searched layer.
    """
    quantized = [
        layer for layer in model.every_layer
        if layer.name in formats and formats[layer.name].quantized
    ]  # fmt: skip
    if any(formats[layer.name].number == "int" for layer in quantized):
        return (
            "LLM.int8 also rounds the inputs of layers as it runs: what was scored is its weights, "
            "so its answers differ a little from that",
        )
    said = [
        "on CPUs with AVX512-BF16 bitsandbytes (0.50) rounds scales to bf16, so answers there "
        "differ a little from those scored; do not save a model that ran there, as it saves other "
        "scales"
    ]
    if odd := [
        layer for layer in quantized
        if layer.rows % _PACKED_ROWS or layer.columns % FOUR_BIT_BLOCK
    ]:  # fmt: skip
        said.append(
            f"bitsandbytes (0.50) cannot run {len(odd)} of {len(quantized)} quantized layers on "
            f"those CPUs: '{odd[0].name}' is {odd[0].rows} x {odd[0].columns}, no multiple of "
            f"{_PACKED_ROWS} x {FOUR_BIT_BLOCK}"
        )
    return tuple(said)
