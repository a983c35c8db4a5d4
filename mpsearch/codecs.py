"""Stored tensors to weights and back, with the containers' own code.

Decoding runs the very functions that the target's loader runs, so a candidate is scored with the
weights that its checkpoint will have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mpsearch.errors import UsageError
from mpsearch.formats import Format

Stored = Mapping[str, Tensor]


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


def compressor(fmt: Format) -> Any:
    """compressed-tensors' class that stores and restores a format; its `name` is the config's."""
    from compressed_tensors.compressors import BaseCompressor

    return BaseCompressor.load_from_registry(COMPRESSION[fmt.number])


COMPRESSION = {"int": "pack-quantized", "float": "float-quantized"}


def pack(
    codes: Tensor, scale: Tensor, fmt: Format, zero_point: Tensor | None = None
) -> dict[str, Tensor]:
    """Tensors of a compressed-tensors layer.

    Its own `compress()` would quantize again from a float weight; this packs the codes that were
    chosen.

    Args:
        codes: `(rows, columns)`; int8, each in `[-2^(bits-1), 2^(bits-1) - 1]`, or float8.
        scale: `(rows, groups)` bfloat16.
        zero_point: `(rows, groups)` int8 of asymmetric formats, in the range of the codes.
    """
    from compressed_tensors.compressors.pack_quantized import pack_to_int32

    if fmt.number == "float":
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


@torch.no_grad()
def decode(stored: Stored, fmt: Format) -> Tensor:
    """The `(rows, columns)` bfloat16 weight that a loader makes of stored tensors."""
    if not fmt.quantized:
        return stored["weight"]
    decode_container = {
        "compressed-tensors": _decode_compressed,
        "bitsandbytes": _decode_bitsandbytes,
    }
    weight: Tensor = decode_container[fmt.container](stored, fmt)
    return weight


def _decode_compressed(stored: Stored, fmt: Format) -> Any:
    from compressed_tensors.quantization import QuantizationScheme

    scheme = QuantizationScheme(targets=["Linear"], weights=quantization_args(fmt))
    return compressor(fmt).decompress(dict(stored), scheme)["weight"]


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


def import_bitsandbytes() -> Any:
    """The library, or a `UsageError` that says how to get it."""
    try:
        import bitsandbytes
    except ImportError:
        raise UsageError(
            "nf4, fp4 and int8 formats need bitsandbytes; pip install 'mpsearch[bitsandbytes]'"
        ) from None
    return bitsandbytes
