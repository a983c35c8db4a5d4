"""What every quantized checkpoint has: weights in safetensors, config, tokenizer, licence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from mpsearch.bank import Bank
from mpsearch.errors import UsageError
from mpsearch.formats import Format
from mpsearch.models import Model

SHARD_BYTES = 5_000_000_000  # above which weights are split, as on the hub


def write_checkpoint(
    model: Model,
    bank: Bank,
    formats: Mapping[str, Format],
    folder: Path,
    quantization: Mapping[str, Any],
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write weights, config and tokenizer into a folder.

    Args:
        formats: layer name to format, for every searched layer.
        quantization: the `quantization_config` of config.json, by which loaders find their way.
        dtype: that loaders compute in by default.
    Raises:
        UsageError: a quantized layer is no linear, and so nothing could load it.
    """
    tensors = {
        name: tensor.contiguous()
        for name, tensor in model.kept.items()
        if name.removesuffix(".weight") not in formats
    }
    names = {parameter: name for name, parameter in model.module.named_parameters()}
    for layer, fmt in formats.items():
        place = model.places[layer]
        if not fmt.quantized:  # as the model stores it: transposed, or all experts in one
            tensors[names[place.parameter]] = place.loaded.to("cpu", torch.bfloat16).contiguous()
        elif not place.is_linear:
            # transformers 5.23 dequantizes stacked experts by one scheme for the whole model, and
            # compressed-tensors 0.20 and gptqmodel 7.6 store linears only.
            raise UsageError(
                f"'{layer}' is no linear, and what loads {fmt.container} quantizes linears only; "
                "search a space whose rules leave such layers bf16"
            )
        else:
            for suffix, tensor in bank.stored(layer, fmt).items():
                tensors[f"{layer}.{suffix}"] = tensor
                if place.tied and suffix != "weight":  # the head decodes the shared codes itself
                    tensors[f"{place.tied}.{suffix}"] = tensor.clone()
    write_folder(model, tensors, folder, dtype, quantization)


def write_folder(
    model: Model,
    tensors: dict[str, Tensor],
    folder: Path,
    dtype: torch.dtype = torch.bfloat16,
    quantization: Mapping[str, Any] | None = None,
) -> None:
    """Write given weights with the model's config, tokenizer and licence.

    Args:
        tensors: by the names of the model's state dict.
        dtype: that loaders compute in by default.
        quantization: the `quantization_config`; None for a plain model.
    """
    save_torch_state_dict(tensors, folder, max_shard_size=SHARD_BYTES, metadata={"format": "pt"})
    for weights in folder.glob("*.safetensors"):
        weights.chmod(0o644)  # a server may run as another user
    write_beside(model, folder, dtype, quantization)


def write_beside(
    model: Model,
    folder: Path,
    dtype: torch.dtype = torch.bfloat16,
    quantization: Mapping[str, Any] | None = None,
) -> None:
    """Write what stands beside the weights: configs, tokenizer, licence. As `write_folder`."""
    module = model.module
    config = readable_by_transformers_4(module.config.to_dict())
    config["dtype"] = str(dtype).removeprefix("torch.")
    config["architectures"] = [type(module).__name__]
    if quantization:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    if module.generation_config is not None:
        module.generation_config.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    for license_path in model.folder.glob("LICENSE*"):
        if license_path.is_dir():
            shutil.copytree(license_path, folder / license_path.name)
        else:
            shutil.copy(license_path, folder)


def readable_by_transformers_4(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with the rotary settings also where runtimes on transformers 4 look.

    They would not miss them, but rotate by another angle. Source: `rope_parameters` of
    transformers 5, which reads both places.
    """
    rotary = config.get("rope_parameters") or {}
    older = {key: rotary[key] for key in ("rope_theta", "partial_rotary_factor") if key in rotary}
    if older and rotary.get("rope_type", "default") != "default":
        older["rope_scaling"] = {key: rotary[key] for key in rotary if key not in older}
    return {**config, **older}
