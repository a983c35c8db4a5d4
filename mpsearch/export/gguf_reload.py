"""The model in a GGUF file, as transformers' own reader makes it."""

from __future__ import annotations

import struct
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from mpsearch.builtin import parsed_once
from mpsearch.export.gguf import GGUF_FILE


def load_gguf(folder: Path) -> Any:
    """The module that transformers makes of an exported folder, its weights dequantized to bf16.

    Raises:
        ValueError: no whole GGUF file, or a tensor is missing; others as transformers raises them.
    """
    try:
        with parsed_once(), redirect_stderr(StringIO()):  # its bars
            module, found = AutoModelForCausalLM.from_pretrained(
                folder,
                gguf_file=GGUF_FILE,
                dtype=torch.bfloat16,
                attn_implementation="sdpa",
                local_files_only=True,
                output_loading_info=True,
            )
    except struct.error as error:
        raise ValueError(f"{GGUF_FILE} is cut off ({error})") from None
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{GGUF_FILE} lacks '{missing[0]}'")
    return module


def read_gguf(folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """Its config and weights, by transformers' names. Raises as `load_gguf`."""
    module = load_gguf(folder)
    module.config.architectures = [type(module).__name__]
    return module.config, module.state_dict()
