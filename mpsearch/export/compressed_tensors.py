"""compressed-tensors: packed integers of mixed widths and fp8, in one safetensors file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mpsearch.bank import Bank
from mpsearch.codecs import COMPRESSION, quantization_args
from mpsearch.errors import UsageError
from mpsearch.formats import Format
from mpsearch.models import Model


def write_compressed_tensors(
    model: Model, bank: Bank, formats: Mapping[str, Format], folder: Path
) -> None:
    """Write weights, config and tokenizer into a folder.

    Args:
        formats: layer name to format, for every searched layer.

    Raises:
        UsageError: a quantized layer is no linear, and so nothing could load it.
    """
    tensors = {name: tensor.contiguous() for name, tensor in model.kept.items()}
    names = {parameter: name for name, parameter in model.module.named_parameters()}
    for layer, fmt in formats.items():
        place = model.places[layer]
        if not fmt.quantized:  # as the model stores it: transposed, or all experts in one
            tensors[names[place.parameter]] = place.loaded.to("cpu", torch.bfloat16).contiguous()
        elif place.transposed or place.expert is not None:
            # transformers 5.23 dequantizes stacked experts by one scheme for the whole model, and
            # compressed-tensors 0.20 compresses linears only.
            raise UsageError(
                f"'{layer}' is no linear, and what loads compressed-tensors quantizes linears "
                "only; search a space whose rules leave such layers bf16"
            )
        else:
            for suffix, tensor in bank.stored(layer, fmt).items():
                tensors[f"{layer}.{suffix}"] = tensor
    weights = folder / "model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # a server may run as another user

    module = model.module
    config = module.config.to_dict()
    config["dtype"] = str(torch.bfloat16).removeprefix("torch.")
    config["architectures"] = [type(module).__name__]
    config["quantization_config"] = quantization_config(model, formats)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    if module.generation_config is not None:
        module.generation_config.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    for license_file in model.folder.glob("LICENSE*"):
        shutil.copy(license_file, folder)


def quantization_config(model: Model, formats: Mapping[str, Format]) -> dict[str, Any]:
    """The `quantization_config` of config.json: a group a format, its layers by exact name."""
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
    )

    layers_of: dict[str, list[str]] = {}
    for layer, fmt in formats.items():
        layers_of.setdefault(fmt.name, []).append(layer)
    used = {fmt.name: fmt for fmt in formats.values() if fmt.quantized}
    head = model.module.get_output_embeddings()
    heads = [name for name, module in model.module.named_modules() if module is head]
    ways = {COMPRESSION[fmt.number] for fmt in used.values()}
    config = QuantizationConfig(
        config_groups={
            name: QuantizationScheme(
                targets=layers_of[name],
                weights=quantization_args(fmt),
                format=COMPRESSION[fmt.number],
            )
            for name, fmt in used.items()
        },
        format=ways.pop() if len(ways) == 1 else "mixed-precision",
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=heads + [layer for layer, fmt in formats.items() if not fmt.quantized],
    )
    dumped: dict[str, Any] = config.model_dump(mode="json", exclude_none=True)
    return dumped
