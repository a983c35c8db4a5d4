"""Stored tensors to weights and back, with the containers' own code.

Decoding runs the very functions that the target's loader runs, so a candidate is scored with the
weights that its checkpoint will have.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mpsearch.errors import CheckError, UsageError
from mpsearch.formats import Format

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

Stored = Mapping[str, Tensor]


def compression(fmt: Format) -> str:
    """What a config.json of compressed-tensors calls the way in which a format is stored."""
    if fmt.packed:
        return "pack-quantized"
    return "int-quantized" if fmt.number == "int" else "float-quantized"


def quantization_args(fmt: Format) -> Any:
    """compressed-tensors' description of one of its formats."""
    from compressed_tensors.quantization import QuantizationArgs

    return QuantizationArgs(
        num_bits=fmt.bits,
        type=fmt.number,
        strategy="group" if fmt.group_size else "channel",
        group_size=fmt.group_size,
        symmetric=fmt.symmetric,
    )


def stored_scale(scale: Tensor, fmt: Format) -> Tensor:
    """Scales in the dtype that the checkpoint holds, kept from zero, by which codes are divided."""
    if fmt.container == "gptq":
        return scale.clamp(min=2.0**-24).to(torch.float16)  # the smallest subnormal
    return scale.clamp(min=torch.finfo(torch.bfloat16).tiny).to(torch.bfloat16)


def compressor(fmt: Format) -> Any:
    """compressed-tensors' class that stores and restores one of its formats."""
    from compressed_tensors.compressors import BaseCompressor

    return BaseCompressor.load_from_registry(compression(fmt))


def pack(
    codes: Tensor, scale: Tensor, fmt: Format, zero_point: Tensor | None = None
) -> dict[str, Tensor]:
    """Tensors of a compressed-tensors or GPTQ layer.

    Its own `compress()` would quantize again from a float weight; this packs the codes that were
    chosen.

    Args:
        codes: `(rows, columns)`; int8, each in `[-2^(bits-1), 2^(bits-1) - 1]`, or float8.
        scale: `(rows, groups)`, from `stored_scale`.
        zero_point: `(rows, groups)` int8 of asymmetric formats, in the range of the codes.
    Raises:
        CheckError: GPTQ's fp16 cannot hold the weights.
    """
    from compressed_tensors.compressors.pack_quantized import pack_to_int32

    if fmt.container == "gptq":
        return _pack_gptq(codes, scale, fmt)
    if not fmt.packed:
        return {"weight": codes.contiguous(), "weight_scale": scale.contiguous()}
    stored = {
        "weight_packed": pack_to_int32(codes, fmt.bits).contiguous(),
        "weight_scale": scale.contiguous(),
        "weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
    }
    if zero_point is not None:
        packed = pack_to_int32(zero_point, fmt.bits, packed_dim=0)
        stored["weight_zero_point"] = packed.contiguous()
    return stored


def _pack_gptq(codes: Tensor, scale: Tensor, fmt: Format) -> dict[str, Tensor]:
    """A GPTQ layer in the first checkpoint version, where a zero-point is stored less one.

    Its dense words are those of compressed-tensors, transposed.
    """
    from compressed_tensors.compressors.pack_quantized import pack_to_int32

    largest = float(scale.float().max()) * 2 ** (fmt.bits - 1)
    if not largest <= torch.finfo(torch.float16).max:
        raise CheckError(
            f"format '{fmt.name}' computes in fp16, which cannot hold weights of {largest:.3g}; "
            "give this layer bf16 by a rule of the space"
        )
    rows, columns = codes.shape
    # The packer adds half the range: -1 is stored as the middle code less one.
    zeros = torch.full((scale.shape[1], rows), -1, dtype=torch.int8, device=codes.device)
    group = torch.arange(columns, device=codes.device) // (fmt.group_size or columns)
    return {
        "qweight": pack_to_int32(codes, fmt.bits).T.contiguous(),
        "qzeros": pack_to_int32(zeros, fmt.bits).contiguous(),
        "scales": scale.T.contiguous(),
        "g_idx": group.to(torch.int32),
    }


@torch.no_grad()
def decode(stored: Stored, fmt: Format) -> Tensor:
    """The `(rows, columns)` weight that a loader makes of stored tensors: fp16 from GPTQ's, else
    bf16."""
    if not fmt.quantized:
        return stored["weight"]
    decode_container = {
        "compressed-tensors": _decode_compressed,
        "gptq": _decode_gptq,
        "bitsandbytes": _decode_bitsandbytes,
        "gguf": _decode_gguf,
    }
    weight: Tensor = decode_container[fmt.container](stored, fmt)
    return weight


def _decode_compressed(stored: Stored, fmt: Format) -> Any:
    from compressed_tensors.quantization import QuantizationScheme

    scheme = QuantizationScheme(targets=["Linear"], weights=quantization_args(fmt))
    return compressor(fmt).decompress(dict(stored), scheme)["weight"]


def _decode_gptq(stored: Stored, fmt: Format) -> Any:
    """Scale times code less zero-point, rounded once to fp16, as GPTQ's loaders compute it."""
    from compressed_tensors.compressors.pack_quantized import unpack_from_int32

    scale, group = stored["scales"], stored["g_idx"].long()
    (groups, rows), columns = scale.shape, len(group)
    words = stored["qweight"].T.contiguous()
    codes = unpack_from_int32(words, fmt.bits, torch.Size((rows, columns))).to(torch.int16)
    zeros = unpack_from_int32(stored["qzeros"], fmt.bits, torch.Size((groups, rows))) + 1
    return scale.T[:, group] * (codes - zeros.T[:, group])


def _decode_bitsandbytes(stored: Stored, fmt: Format) -> Any:
    functional = import_bitsandbytes().functional
    if fmt.name == "int8":
        weight = functional.int8_vectorwise_dequant(stored["weight"], stored["SCB"])
        return weight.to(torch.bfloat16)
    state = {name.removeprefix("weight."): t for name, t in stored.items() if name != "weight"}
    device = stored["weight"].device
    return functional.dequantize_4bit(
        stored["weight"], functional.QuantState.from_dict(state, device=device)
    )


def block_type(fmt: Format) -> GGMLQuantizationType:
    """gguf's name for one of its formats, or for bf16."""
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType[fmt.name.upper()]


def _decode_gguf(stored: Stored, fmt: Format) -> Any:
    """By the library's own code, in float32 and rounded once, as transformers reads a file."""
    from gguf.quants import dequantize

    blocks = stored["weight"]
    weight = torch.from_numpy(dequantize(blocks.cpu().numpy(), block_type(fmt)))
    return weight.to(blocks.device, torch.bfloat16)


def import_bitsandbytes() -> Any:
    """The library, or a `UsageError` that says how to get it."""
    try:
        import bitsandbytes
    except ImportError:
        raise UsageError(
            "nf4, fp4 and int8 formats need bitsandbytes; pip install 'mpsearch[bitsandbytes]'"
        ) from None
    return bitsandbytes


def import_gptqmodel() -> Any:
    """The library, which prints nothing meanwhile, or a `UsageError` that says how to get it."""
    # On two cores its worker pool crashes unless told its size.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    # Its first forward otherwise compiles for minutes.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    try:
        # It prints a banner; standard output is for data.
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            import gptqmodel
            from gptqmodel.utils.logger import setup_logger
        setup_logger().setLevel("ERROR")
    except ImportError as error:
        raise UsageError(
            f"GPTQ needs gptqmodel ({error}); pip install --no-build-isolation gptqmodel==7.6.0"
        ) from None
    return gptqmodel
