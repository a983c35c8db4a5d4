"""GPTQ: one width that every GPTQ loader reads, or a mix for gptqmodel's own.

The checkpoint's commonest format is its base; layers that differ are named in `dynamic`, which
gptqmodel reads (7.6) and transformers, with one width for all, does not (5.23).
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mpsearch.bank import Bank
from mpsearch.export.checkpoint import write_checkpoint
from mpsearch.formats import Format
from mpsearch.models import Model

log = logging.getLogger(__name__)


def write_gptq(model: Model, bank: Bank, formats: Mapping[str, Format], folder: Path) -> None:
    """Write weights, config and tokenizer into a folder.

    Scales are fp16, so fp16 is what the config asks loaders to compute in; bf16 would round them.

    Args:
        formats: layer name to format, for every searched layer.
    """
    searched = (layer for layer in model.every_layer if layer.name in formats)
    if not all(formats[layer.name].whole_groups(layer) for layer in searched):
        log.warning(
            "the last group of some layers is short: gptqmodel's torch and Triton kernels load "
            "them (7.6), vLLM does not; for it, search groups that divide every layer's columns"
        )
    quantization = quantization_config(formats, model.head.name if model.head else "")
    write_checkpoint(model, bank, formats, folder, quantization, dtype=torch.float16)
    # auto-gptq and its contemporaries look for the same in a file of its own.
    (folder / "quantize_config.json").write_text(json.dumps(quantization, indent=2))


def quantization_config(formats: Mapping[str, Format], head: str = "") -> dict[str, Any]:
    """The `quantization_config` of config.json: the commonest format, then who differs from it.

    `checkpoint_format` gptq is the first version: a zero-point is stored less one.

    Args:
        head: name of the output head, which loaders take for unquantized unless `lm_head` is set.
    """
    used = Counter(fmt for fmt in formats.values() if fmt.quantized)
    base = used.most_common(1)[0][0]
    differing: dict[str, dict[str, int]] = {}
    for layer, fmt in formats.items():
        pattern = f"^{re.escape(layer)}$"
        if not fmt.quantized and layer != head:
            differing[f"-:{pattern}"] = {}
        elif fmt.quantized and fmt != base and fmt.group_size is not None:
            differing[f"+:{pattern}"] = {"bits": fmt.bits, "group_size": fmt.group_size}
    return {
        "quant_method": "gptq",
        "bits": base.bits,
        "group_size": base.group_size,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "lm_head": head in formats and formats[head].quantized,
        **({"dynamic": differing} if differing else {}),
    }
