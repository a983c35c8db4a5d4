"""compressed-tensors: packed integers of mixed widths and fp8, in one safetensors file."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpsearch.bank import Bank
from mpsearch.codecs import compression, quantization_args
from mpsearch.export.checkpoint import write_checkpoint
from mpsearch.formats import Format
from mpsearch.models import Model

log = logging.getLogger(__name__)


def write_compressed_tensors(
    model: Model, bank: Bank, formats: Mapping[str, Format], folder: Path
) -> None:
    """Write weights, config and tokenizer into a folder.

    Args:
        formats: layer name to format, for every searched layer.

    Raises:
        UsageError: a quantized layer is no linear, and so nothing could load it.
    """
    if any(not fmt.symmetric for fmt in formats.values()):
        log.warning(
            "transformers cannot load the zero-points of compressed-tensors (5.23): serve this "
            "with vLLM, or search symmetric formats"
        )
    write_checkpoint(model, bank, formats, folder, quantization_config(model, formats))


def quantization_config(model: Model, formats: Mapping[str, Format]) -> dict[str, Any]:
    """The `quantization_config` of config.json: a group a format, its layers by exact name.

    A head that is tied to an embedding is named beside it.
    """
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
    )

    layers_of: dict[str, list[str]] = {}
    for layer, fmt in formats.items():
        tied = model.places[layer].tied
        layers_of.setdefault(fmt.name, []).extend([layer, tied] if tied else [layer])
    used = {fmt.name: fmt for fmt in formats.values() if fmt.quantized}
    targets = {layer for name in used for layer in layers_of[name]}
    head = model.module.get_output_embeddings()
    heads = [name for name, module in model.module.named_modules() if module is head]
    unquantized = [*heads, *(layer for layer, fmt in formats.items() if not fmt.quantized)]
    ways = {compression(fmt) for fmt in used.values()}
    config = QuantizationConfig(
        config_groups={
            name: QuantizationScheme(
                targets=layers_of[name],
                weights=quantization_args(fmt),
                format=compression(fmt),
            )
            for name, fmt in used.items()
        },
        format=ways.pop() if len(ways) == 1 else "mixed-precision",
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=[layer for layer in dict.fromkeys(unquantized) if layer not in targets],
    )
    dumped: dict[str, Any] = config.model_dump(mode="json", exclude_none=True)
    return dumped
