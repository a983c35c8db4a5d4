"""A checkpoint as the library that serves it loads it, with that library's arithmetic.

`reload` puts decoded weights into the reference's modules, to compare weights and nothing else.
Here the loader's own modules answer, as they will for whoever serves the checkpoint.
"""

from __future__ import annotations

from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from mpsearch.codecs import import_gptqmodel
from mpsearch.device import compute_dtype, pick_device
from mpsearch.errors import ModelError, MpsearchError, ResourceError, exhausted
from mpsearch.export.gguf import GGUF_FILE
from mpsearch.export.gguf_reload import load_gguf
from mpsearch.export.reload import load_any, quantization_of
from mpsearch.models import Model
from mpsearch.shards import weight_files


def load_as_served(name: str, chat_template: bool = False) -> tuple[Model, str]:
    """A folder that `mpsearch export` wrote, or another quantized checkpoint.

    A checkpoint without quantization is loaded as any model is.

    Returns:
        A model that can be asked and has no layers of ours, and the loader with its version.
    Raises:
        ModelError: it does not load.
        UsageError: its library is missing.
    """
    folder = Path(name).expanduser()
    quantization = quantization_of(folder)
    if not quantization:
        return load_any(name, chat_template), _named("transformers")
    method, device = str(quantization.get("quant_method")), pick_device()
    if method != "gguf" and not weight_files(folder, name):
        raise ModelError(
            f"checkpoint '{name}' holds no .safetensors weights and no {GGUF_FILE}, and no other "
            "are read"
        )
    # Libraries of several quantizers raise what they like for a damaged checkpoint.
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()), torch.no_grad():
            if method == "gptq":
                module, loader = _load_gptq(folder, device), _named("gptqmodel")
            elif method == "gguf":
                module = _computing(load_gguf(folder), device)
                loader = _named("transformers", "gguf")
            else:
                module = _load_transformers(folder, method, device)
                loader = _named("transformers", *_LIBRARIES.get(method, ()))
        # Where nothing is said of remote code, transformers asks at the terminal.
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except MpsearchError:
        raise
    except Exception as error:
        if ran_out := exhausted(error):
            raise ResourceError(f"checkpoint '{name}': {ran_out}") from error
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"checkpoint '{name}' does not load: {reason}") from error
    return replace(_askable(name, folder, module, tokenizer), chat=chat_template), loader


# Whose version decides, beside transformers.
_LIBRARIES = {"compressed-tensors": ("compressed-tensors",), "bitsandbytes": ("bitsandbytes",)}


def _named(*libraries: str) -> str:
    return " with ".join(f"{library} {version(library)}" for library in libraries)


def _load_gptq(folder: Path, device: torch.device) -> Any:
    gptqmodel = import_gptqmodel()
    # Kernels that are faster on a GPU are fetched from the network, or compiled, when first used.
    backend = gptqmodel.BACKEND.GPTQ_TORCH
    return gptqmodel.GPTQModel.load(
        str(folder), dtype=torch.float16, backend=backend, device=str(device)
    ).model


def _load_transformers(folder: Path, method: str, device: torch.device) -> Any:
    # Of what it does not know it would load the weights as if they were not quantized.
    if not {method, f"{method}_4bit"} & set(AUTO_QUANTIZATION_CONFIG_MAPPING):
        raise ModelError(f"checkpoint '{folder}' is quantized by '{method}', which transformers "
                         f"{version('transformers')} does not load")  # fmt: skip
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    named = (config.architectures or [""])[0]
    auto: Any = getattr(transformers, named, AutoModelForCausalLM)
    module, loaded = auto.from_pretrained(
        folder,
        output_loading_info=True,
        dtype=torch.bfloat16,
        attn_implementation="sdpa",
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
    )
    if lost := sorted(loaded["missing_keys"]):
        raise ModelError(f"checkpoint '{folder}' lacks '{lost[0]}' and {len(lost) - 1} more")
    if method == "compressed-tensors":
        # It decompresses its weights on the first pass, and then keeps them where they are.
        module.to(device)(torch.zeros(1, 1, dtype=torch.long, device=device))
        return _computing(module, device)
    for layer in module.modules():
        # On some CPUs bitsandbytes (0.50) packs 4-bit weights again, with scales rounded to bf16:
        # other weights than were written, and than a GPU computes with.
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    return module.to(device)


def _computing(module: Any, device: torch.device) -> Any:
    """With its weights in the dtype of the device's arithmetic."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(compute_dtype(device))
    return module.to(device)


def _askable(name: str, folder: Path, module: Any, tokenizer: Any) -> Model:
    return Model(
        name=name,
        folder=folder,
        module=module.eval().requires_grad_(False),
        tokenizer=tokenizer,
        layers=(),
        embedding=None,
        head=None,
        places={},
        originals={},
        kept={},
        why_kept={},
        fingerprint="",
    )
