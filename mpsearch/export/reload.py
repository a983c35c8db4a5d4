"""Load an export the way its users do, to score what ships and not what was meant to.

transformers' own loaders make the weights of compressed-tensors and GGUF. GPTQ's are decoded here,
as no loader of theirs runs everywhere; `mpsearch.codecs` is tested against gptqmodel's. So are
those of bitsandbytes, with its functions, as its modules round more than the weights on some
devices. All are then put into the model's plain modules, so that the arithmetic is the reference's
and only the weights differ.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import redirect_stderr
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from mpsearch.codecs import decode
from mpsearch.device import compute_dtype, pick_device
from mpsearch.errors import ModelError, ResourceError, exhausted
from mpsearch.export.dequantized import DEQUANTIZED
from mpsearch.export.gguf import is_gguf
from mpsearch.export.gguf_reload import read_gguf
from mpsearch.formats import FORMATS, FOUR_BIT_BLOCK, Format, StoredTensor
from mpsearch.hub import local_path
from mpsearch.models import Model, from_module, load_whole
from mpsearch.opening import load_model

# What transformers, safetensors and the containers' decoders raise for a damaged folder.
_FROM_BELOW = (
    OSError, ValueError, LookupError, RuntimeError, ImportError, TypeError, AttributeError,
    AssertionError, SafetensorError,
)  # fmt: skip


def load_any(
    name: str, chat_template: bool = False, memory_limit_bytes: int | None = None
) -> Model:
    """A model as `load_model` opens it to be asked, or the whole of what `mpsearch export` wrote.

    Raises:
        ModelError: neither can be had.
        CheckError, ResourceError: as `load_model`.
    """
    folder = local_path(name)
    if quantization := quantization_of(folder):
        return replace(load_export(name, quantization), chat=chat_template)
    if _field(folder / "mpsearch.json", "target") == DEQUANTIZED:
        model = load_whole(name, chat_template)
        _put_halves(model, folder)
        return model
    return load_model(name, chat_template, memory_limit_bytes, job="ask")


def quantization_of(folder: Path) -> dict[str, Any]:
    """The `quantization_config` of a local folder; empty where there is none."""
    if is_gguf(folder):  # whose config.json is the unquantized model's
        return {"quant_method": "gguf"}
    found = _field(folder / "config.json", "quantization_config")
    return found if isinstance(found, dict) else {}


def load_export(name: str, quantization: dict[str, Any]) -> Model:
    """An exported folder as a model whose weights are the dequantized ones.

    Args:
        quantization: the `quantization_config` of its config.json.
    Raises:
        ModelError: transformers cannot load it.
    """
    method = quantization.get("quant_method")
    if method not in ("gptq", "compressed-tensors", "bitsandbytes", "gguf"):
        raise ModelError(
            f"'{name}' is quantized by {method or 'an unknown method'}; scored here are models, "
            "compressed-tensors, GPTQ, bitsandbytes and GGUF exports, so pass the model it was "
            "made from"
        )
    if (version := quantization.get("checkpoint_format", "gptq")) != "gptq":
        raise ModelError(
            f"'{name}' is a GPTQ checkpoint of format '{version}', and 'gptq' is read here; save "
            "it in that one"
        )
    schemes = quantization.get("config_groups") or {}
    try:
        of_weights = [scheme["weights"] or {} for scheme in schemes.values()]
        symmetric = all(weights.get("symmetric") is not False for weights in of_weights)
    except (AttributeError, LookupError, TypeError):
        raise ModelError(f"'{name}': config.json holds no config_groups that can be read") from None
    if not symmetric:
        raise ModelError(
            f"'{name}' stores zero-points, which transformers cannot load from compressed-tensors "
            "(5.23) and vLLM can; search symmetric formats to score the export here"
        )
    folder = local_path(name)
    device = pick_device()
    dtype = compute_dtype(device)
    decoded: dict[str, Tensor] = {}
    try:
        if method == "compressed-tensors":
            module = _load_compressed(folder)
        elif method == "gptq":
            module, decoded = _load_gptq(folder)
        elif method == "gguf":
            module = _plain(*read_gguf(folder))
        else:
            module, decoded = _load_bitsandbytes(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except _FROM_BELOW as error:
        if ran_out := exhausted(error):
            raise ResourceError(f"export '{name}': {ran_out}") from error
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"export '{name}' does not load: {reason}") from error
    model = from_module(name, folder, module, tokenizer, device, dtype)
    for layer, weight in decoded.items():
        if layer in model.places:  # GPTQ's fp16, of which a model's own bf16 holds too little
            model.places[layer].put(weight.to(device, dtype))
    return model


def _load_compressed(folder: Path) -> Any:
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    auto: Any = getattr(transformers, config.architectures[0])
    with redirect_stderr(StringIO()), torch.no_grad():  # its bars
        packed: Any = auto.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True)
        packed(torch.zeros(1, 1, dtype=torch.long))  # decompresses its weights on the first pass
    return _plain(config, packed.state_dict())


def _load_gptq(folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """The module, and the decoded fp16 weights by layer, which it holds in bf16."""
    stored: dict[str, dict[str, Tensor]] = {}
    for key, tensor in _tensors(folder).items():
        layer, _, part = key.rpartition(".")
        stored.setdefault(layer, {})[part] = tensor
    decoded = {
        layer: decode(parts, _gptq_format(parts))
        for layer, parts in stored.items()
        if "qweight" in parts
    }
    weights = {f"{layer}.weight": weight for layer, weight in decoded.items()}
    for layer, parts in stored.items():
        kept = {part: t for part, t in parts.items() if layer not in decoded or part == "bias"}
        weights.update({f"{layer}.{part}": tensor for part, tensor in kept.items()})
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    return _plain(config, weights), decoded


def _gptq_format(parts: Mapping[str, Tensor]) -> Format:
    """A GPTQ format of the width in which a layer is packed; its groups are stored with it."""
    bits = parts["qweight"].shape[0] * 32 // parts["g_idx"].numel()
    return FORMATS[f"gptq{bits}-g128"]


def _load_bitsandbytes(folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """The module, and the decoded weights by layer."""
    weights = _tensors(folder)
    layers = {
        found[1] for key in weights if (found := re.fullmatch(r"(.+)\.(SCB|weight\.absmax)", key))
    }
    decoded: dict[str, Tensor] = {}
    for layer in layers:
        of_layer = [
            key for key in weights if key.startswith(f"{layer}.") and key != f"{layer}.bias"
        ]
        parts = {key.removeprefix(f"{layer}."): weights.pop(key) for key in of_layer}
        weights[f"{layer}.weight"] = decoded[layer] = decode(parts, _bitsandbytes_format(parts))
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    return _plain(config, weights), decoded


_QUANT_STATE = "weight.quant_state.bitsandbytes__"
_BLOCKS = {"blocksize": FOUR_BIT_BLOCK, "nested_blocksize": 256}


def _bitsandbytes_format(parts: Mapping[str, Tensor]) -> Format:
    """The format of a layer's tensors, which the library's decoder reads without a check.

    Raises:
        ValueError: they are not those that the format stores.
    """
    described = next((part for part in parts if part.startswith(_QUANT_STATE)), "")
    name = described.removeprefix(_QUANT_STATE)
    shape = list(parts["weight"].shape)
    if described:
        state = json.loads(bytes(parts[described].tolist()))
        shape = state["shape"]
        if state["quant_type"] != name or any(state.get(k, n) != n for k, n in _BLOCKS.items()):
            raise ValueError(f"it stores {name} in another way than is read here")
        name += "-dq" if "weight.nested_absmax" in parts else ""
    fmt = FORMATS[name or "int8"]
    for part, spec in fmt.tensors(*shape).items():
        found = StoredTensor(str(parts[part].dtype)[6:], tuple(parts[part].shape))
        if part != described and found != spec:
            raise ValueError(f"a '{part}' is not that of {shape[0]} x {shape[1]} {fmt.name}")
    return fmt


def _tensors(folder: Path) -> dict[str, Tensor]:
    """Everything that its files hold."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(load_file(path))
    return found


def _plain(config: Any, weights: Mapping[str, Tensor]) -> Any:
    """The model without its quantization, with given weights; a tied head needs none of its own."""
    del config.quantization_config
    auto: Any = getattr(transformers, config.architectures[0])
    plain = auto._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    tied = getattr(plain, "_tied_weights_keys", None) or {}
    absent = plain.load_state_dict(dict(weights), strict=False).missing_keys
    if lost := [key for key in absent if key not in tied]:
        raise ValueError(f"its files lack '{lost[0]}'")
    return plain


def _put_halves(model: Model, folder: Path) -> None:
    """Give layers that a folder stores in fp16, as GPTQ's dequantized, what bf16 has rounded."""
    halves: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = [k for k in file.keys() if file.get_slice(k).get_dtype() == "F16"]  # noqa: SIM118
            halves |= {name: file.get_tensor(name).to(model.device, model.dtype) for name in names}
    found = {parameter: name for name, parameter in model.module.named_parameters()}
    for place in model.places.values():
        if (name := found[place.parameter]) in halves:
            place.put(place.part(halves[name]))


def _field(path: Path, name: str) -> Any:
    """A field of a local JSON file; None where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8")).get(name)
    except (OSError, ValueError, TypeError, AttributeError):
        return None  # not an export; load_model says what else is wrong
