"""What every quantized checkpoint has: weights in safetensors, config, tokenizer, licence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpsearch.bank import Bank
from mpsearch.errors import UsageError
from mpsearch.export.parts import Part, write_parts
from mpsearch.formats import Format, StoredTensor
from mpsearch.model_files import LICENCES
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
    parts = {
        name: part
        for name, part in kept_parts(model).items()
        if name.removesuffix(".weight") not in formats
    }
    names = parameter_names(model)
    for layer, fmt in formats.items():
        place = model.places[layer]
        if not fmt.quantized:  # as the model stores it: transposed, or all experts in one
            parts[names[layer]] = _reference_part(model, layer, names[layer])
        elif not place.is_linear:
            # transformers 5.23 dequantizes stacked experts by one scheme for the whole model, and
            # compressed-tensors 0.20 and gptqmodel 7.6 store linears only.
            raise UsageError(
                f"'{layer}' is no linear, and what loads {fmt.container} quantizes linears only; "
                "search a space whose rules leave such layers bf16"
            )
        else:
            parts[layer] = _coded_part(model, bank, layer, fmt)
    write_folder(model, parts.values(), folder, dtype, quantization)


def kept_parts(model: Model) -> dict[str, Part]:
    """Each of the model's kept tensors, by its name in the state dict."""

    def part(name: str, stored: StoredTensor) -> Part:
        return Part({name: stored}, lambda: {name: model.kept[name]})

    return {name: part(name, stored) for name, stored in model.kept_stored.items()}


def parameter_names(model: Model) -> dict[str, str]:
    """Each layer to the name of the parameter that holds it, alone or among others."""
    names = {parameter: name for name, parameter in model.module.named_parameters()}
    return {layer: names[place.parameter] for layer, place in model.places.items()}


def reference(model: Model, layer: str, parameter: str) -> Tensor:
    """The whole parameter that holds a layer, on the CPU in bf16 and as the model stores it."""
    if model.checkpoint is not None:
        return model.checkpoint.read_plain([parameter])[parameter]
    return model.places[layer].loaded.to("cpu", torch.bfloat16)


def _reference_part(model: Model, layer: str, parameter: str) -> Part:
    shape = tuple(model.places[layer].parameter.shape)
    return Part(
        {parameter: StoredTensor("bfloat16", shape)},
        lambda: {parameter: reference(model, layer, parameter)},
    )


def _coded_part(model: Model, bank: Bank, layer: str, fmt: Format) -> Part:
    """A quantized layer's tensors; a tied head decodes the shared codes itself."""
    rows, columns = model.places[layer].weight.shape
    tied = model.places[layer].tied
    stored, source = {}, {}
    for suffix, tensor in sorted(fmt.tensors(rows, columns).items()):
        for name in (layer, tied) if tied and suffix != "weight" else (layer,):
            stored[f"{name}.{suffix}"], source[f"{name}.{suffix}"] = tensor, suffix

    def read() -> dict[str, Tensor]:
        codes = bank.stored(layer, fmt)
        return {name: codes[suffix] for name, suffix in source.items()}

    return Part(stored, read)


def write_folder(
    model: Model,
    parts: Collection[Part],
    folder: Path,
    dtype: torch.dtype = torch.bfloat16,
    quantization: Mapping[str, Any] | None = None,
) -> None:
    """Write given weights with the model's config, tokenizer and licence.

    Args:
        parts: with tensors by the names of the model's state dict.
        dtype: that loaders compute in by default.
        quantization: the `quantization_config`; None for a plain model.
    """
    write_parts(parts, folder, SHARD_BYTES)
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
    for path in chain.from_iterable(map(model.folder.glob, LICENCES)):
        if path.is_dir():
            shutil.copytree(path, folder / path.name)
        else:
            shutil.copy(path, folder)


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
