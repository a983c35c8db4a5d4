"""GGUF: one file of mixed block types that llama.cpp runs and transformers dequantizes.

Names come from the gguf library's own table. llama.cpp rotates neighbouring channels where Llama
rotates halves, so rows of queries and keys stand there in another order: whole rows of codes, of
which none is changed. What llama.cpp or transformers' reader (5.23) would take for another model
is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
import torch

from mpsearch.bank import Bank
from mpsearch.codecs import block_type
from mpsearch.errors import UsageError
from mpsearch.export.checkpoint import write_beside
from mpsearch.export.gguf_tokenizer import TokenizerFields, tokenizer_fields
from mpsearch.formats import BF16, ITEM_BYTES, Format
from mpsearch.models import Model

GGUF_FILE = "model.gguf"
RECIPE_FILE = "llama.cpp.txt"
# By the `model_type` of a config.
_ARCHITECTURES = MappingProxyType(
    {
        "llama": gguf.MODEL_ARCH.LLAMA,
        "mistral": gguf.MODEL_ARCH.LLAMA,
        "qwen2": gguf.MODEL_ARCH.QWEN2,
        "qwen3": gguf.MODEL_ARCH.QWEN3,
    }
)
_QWEN3_HEAD_DIM = 128  # that transformers (5.23) takes every Qwen3 to have


@dataclass(frozen=True)
class FileTensor:
    """One tensor of the file.

    Attributes:
        name: there.
        source: its name in the model's state dict.
        shape: of a matrix, rows and the bytes of a row; of a vector, its length.
        kind: the library's name for how it is stored.
        fmt: of a matrix; None for a vector, which is stored in float32.
        heads: whose rows stand in llama.cpp's order; 0 where the model's order stays.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    fmt: Format | None
    heads: int = 0


def write_gguf(model: Model, bank: Bank, formats: Mapping[str, Format], folder: Path) -> None:
    """Write model.gguf, a recipe for llama.cpp's own tools, configs and tokenizer into a folder.

    Args:
        formats: layer name to format, for every searched layer.
    Raises:
        UsageError: a family, setting or tokenizer that would be read as another one.
    """
    tokenizer = check_model(model)
    config = model.module.config
    architecture = _ARCHITECTURES[config.model_type]
    tensors = list(_tensors(model, formats, architecture))
    rows = model.module.get_input_embeddings().weight.shape[0]
    name = gguf.MODEL_ARCH_NAMES[architecture]
    with closing(gguf.GGUFWriter(folder / GGUF_FILE, name)) as writer:
        _describe(writer, config, model.name, rows)
        tokenizer.add_to(writer)
        for tensor in tensors:
            dtype = np.dtype(np.uint8 if tensor.fmt else np.float32)
            size = prod(tensor.shape) * dtype.itemsize
            writer.add_tensor_info(tensor.name, tensor.shape, dtype, size, tensor.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(_content(tensor, model, bank))
    write_beside(model, folder, torch.bfloat16)
    (folder / RECIPE_FILE).write_text(recipe(tensors), encoding="utf-8")


def is_gguf(folder: Path) -> bool:
    """Whether a folder holds its weights as an exported GGUF file alone."""
    return (folder / GGUF_FILE).is_file() and not any(folder.glob("*.safetensors"))


def gguf_tensor_bytes(folder: Path) -> int:
    """Bytes of all tensors in an exported file, without what pads them."""
    return sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(folder / GGUF_FILE).tensors)


def check_model(model: Model) -> TokenizerFields:
    """What a GGUF file says of a model's tokenizer.

    Raises:
        UsageError: the file could not describe the model or its tokenizer to both its readers.
    """
    config = model.module.config
    family = config.model_type
    if family not in _ARCHITECTURES:
        raise UsageError(
            f"model '{model.name}' is of the family '{family}', which is not written to GGUF; "
            f"written are {', '.join(_ARCHITECTURES)}"
        )
    rotary = config.rope_parameters
    width = config.hidden_size // config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or width
    window = getattr(config, "sliding_window", None)
    biases = [name for name in model.kept if name.endswith(".bias")]
    faults = {
        f"hidden_act {config.hidden_act!r} (silu is)": config.hidden_act != "silu",
        f"rope_type {rotary['rope_type']!r} (default is)": rotary["rope_type"] != "default",
        "a partial_rotary_factor": rotary.get("partial_rotary_factor", 1) != 1,
        f"a sliding_window of {window} in a context of {config.max_position_embeddings}": (
            window is not None and window < config.max_position_embeddings
        ),
        f"the bias {biases[:1]}": bool(biases) and family != "qwen2",
        f"head_dim {head_dim} ({width} is)": family == "qwen2" and head_dim != width,
        f"head_dim {head_dim} ({_QWEN3_HEAD_DIM} is)": (
            family == "qwen3" and head_dim != _QWEN3_HEAD_DIM
        ),
    }
    for what, wrong in faults.items():
        if wrong:
            raise UsageError(
                f"model '{model.name}' has {what}, which is not written to GGUF for {family}: "
                "llama.cpp or transformers would read it as another model; use another target"
            )
    return tokenizer_fields(model.tokenizer, model.module.get_input_embeddings().weight.shape[0])


def _describe(writer: gguf.GGUFWriter, config: Any, name: str, rows: int) -> None:
    head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    writer.add_type("model")
    # Not the bare name: transformers (5.23) looks for an architecture of its own behind 'mistral'.
    writer.add_name(f"{name}, quantized")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(rows)


def _tensors(
    model: Model, formats: Mapping[str, Format], architecture: gguf.MODEL_ARCH
) -> Iterator[FileTensor]:
    """All tensors, in the model's order; one that is shared once."""
    config = model.module.config
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    permuted = (
        {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        if architecture == gguf.MODEL_ARCH.LLAMA
        else {}
    )
    for source, parameter in model.module.state_dict().items():
        layer = source.removesuffix(".weight")
        if layer not in formats and source not in model.kept:
            continue  # the head, where it is the embedding
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UsageError(
                f"model '{model.name}' has a tensor '{source}', for which GGUF has no name; use "
                "another target"
            )
        if parameter.dim() == 1:
            kind = gguf.GGMLQuantizationType.F32
            yield FileTensor(name, source, tuple(parameter.shape), kind, None)
        else:
            fmt = formats.get(layer, BF16)
            stored = fmt.tensors(*parameter.shape)["weight"]
            shape = (stored.shape[0], stored.shape[1] * ITEM_BYTES[stored.dtype])
            heads = permuted.get(layer.rpartition(".")[2], 0)
            yield FileTensor(name, source, shape, block_type(fmt), fmt, heads)


def _content(tensor: FileTensor, model: Model, bank: Bank) -> np.ndarray[Any, Any]:
    """What the file holds of a tensor: the bank's own bytes, or float32 numbers."""
    if tensor.fmt is None:
        vector: np.ndarray[Any, Any] = model.kept[tensor.source].float().numpy()
        return vector
    if tensor.source in model.kept and not tensor.fmt.quantized:
        matrix = model.kept[tensor.source]
    else:
        matrix = bank.stored(tensor.source.removesuffix(".weight"), tensor.fmt)["weight"]
    content: np.ndarray[Any, Any] = matrix.contiguous().view(torch.uint8).numpy()
    if tensor.heads:
        halves = content.reshape(tensor.heads, 2, -1, content.shape[1])
        content = halves.swapaxes(1, 2).reshape(content.shape)
    return content


def recipe(tensors: Sequence[FileTensor]) -> str:
    """How llama.cpp's own tools make the same mix of types: a text with two commands.

    Every matrix is named by a regular expression, one for all blocks in which it has one type.
    """
    blocks: dict[tuple[str, str], list[str]] = {}
    for tensor in tensors:
        if tensor.fmt:
            first, _, rest = tensor.name.partition(".")
            number, _, kind = rest.partition(".") if first == "blk" else ("", "", tensor.name)
            blocks.setdefault((kind, tensor.fmt.name), []).append(number)
    lines = []
    for (kind, fmt), numbers in blocks.items():
        prefix = "" if numbers == [""] else rf"blk\.({'|'.join(numbers)})\."
        pattern = rf"^{prefix}{kind}$".replace(".weight", r"\.weight")
        lines.append(f"  --tensor-type '{pattern}={fmt}' \\\n")
    return (
        "# The same types from the unquantized model by llama.cpp's own tools. What they round is\n"
        "# not this folder's model.gguf to the bit: nothing here was scored with their codes.\n"
        "python convert_hf_to_gguf.py MODEL --outtype bf16 --outfile bf16.gguf\n"
        "llama-quantize \\\n" + "".join(lines) + "  bf16.gguf mixed.gguf q8_0\n"
    )
