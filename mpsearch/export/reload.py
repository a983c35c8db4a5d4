"""Load an export the way its users do, to score what ships and not what was meant to.

transformers' own loader makes the weights. They are then put into the model's plain modules, so
that the arithmetic is the reference's and only the weights differ.
"""

from __future__ import annotations

import json
from contextlib import redirect_stderr
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from mpsearch.device import compute_dtype, pick_device
from mpsearch.errors import ModelError
from mpsearch.models import Model, from_module, load_model


def load_any(name: str, chat_template: bool = False) -> Model:
    """A model as `load_model` loads it, or a folder that `mpsearch export` wrote.

    Raises:
        ModelError: neither can be had.
        CheckError, ResourceError: as `load_model`.
    """
    if not (quantization := _quantization(Path(name).expanduser())):
        return load_model(name, chat_template)
    return replace(load_export(name, quantization), chat=chat_template)


def load_export(name: str, quantization: dict[str, Any]) -> Model:
    """An exported folder as a model whose weights are the dequantized ones.

    Args:
        quantization: the `quantization_config` of its config.json.
    Raises:
        ModelError: transformers cannot load it.
    """
    method = quantization.get("quant_method")
    if method == "gptq":
        raise ModelError(
            f"'{name}' is a GPTQ checkpoint, which only gptqmodel computes with: "
            "GPTQModel.load(folder) runs it; scored here are models and compressed-tensors exports"
        )
    if method != "compressed-tensors":
        raise ModelError(
            f"'{name}' is quantized by {method or 'an unknown method'}; scored here are models and "
            "compressed-tensors exports, so pass the model it was made from"
        )
    schemes = quantization.get("config_groups", {}).values()
    if any(scheme["weights"].get("symmetric") is False for scheme in schemes):
        raise ModelError(
            f"'{name}' stores zero-points, which transformers cannot load from compressed-tensors "
            "(5.23) and vLLM can; search symmetric formats to score the export here"
        )
    folder = Path(name).expanduser()
    try:
        module, tokenizer = _load(folder)
    except (OSError, ValueError, LookupError, RuntimeError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"export '{name}' does not load: {reason}") from error
    device = pick_device()
    return from_module(name, folder, module, tokenizer, device, compute_dtype(device))


def _load(folder: Path) -> tuple[Any, Any]:
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    auto: Any = getattr(transformers, config.architectures[0])
    with redirect_stderr(StringIO()), torch.no_grad():  # its bars
        packed: Any = auto.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True)
        packed(torch.zeros(1, 1, dtype=torch.long))  # decompresses its weights on the first pass
    weights = packed.state_dict()
    del config.quantization_config
    plain = auto._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    plain.load_state_dict({key: weights[key] for key in plain.state_dict()})
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return plain, tokenizer


def _quantization(folder: Path) -> dict[str, Any]:
    """The `quantization_config` of a local folder; empty where there is none."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return dict(config.get("quantization_config") or {})
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # not an export; load_model says what else is wrong
