"""How a weight is stored, to the byte.

A format lists the tensors that a checkpoint holds for one layer; its size is theirs. Scales,
zero-points and the small bookkeeping tensors that a loader needs are all counted.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import ceil, prod
from types import MappingProxyType

from mpsearch.errors import UsageError
from mpsearch.layers import Layer, LayerGroup

ITEM_BYTES = MappingProxyType(
    {
        "int64": 8,
        "int32": 4,
        "float32": 4,
        "bfloat16": 2,
        "float16": 2,
        "float8_e4m3fn": 1,
        "int8": 1,
        "uint8": 1,
    }
)


@dataclass(frozen=True)
class StoredTensor:
    dtype: str
    shape: tuple[int, ...]

    @property
    def weights(self) -> int:
        return prod(self.shape)

    @property
    def stored_bytes(self) -> int:
        return ITEM_BYTES[self.dtype] * self.weights


@dataclass(frozen=True)
class Format:
    """How one weight matrix is stored.

    Attributes:
        name: what space files and tables say.
        bits: nominal width of a code. What a weight really costs is `bits_per_weight`.
        container: the checkpoint format that holds it; `any` for unquantized weights.
        tensors: `(rows, columns)` to the tensors stored, by the suffix after `<layer>.`.
        group_size: columns that share a scale; None where a whole row does, or the container has
            another rule.
        symmetric: no zero-point; zero is the middle code.
        number: what a code is, `int` or `float`.
        side_multiple: rows and columns must both be multiples of it.
    """

    name: str
    bits: int
    container: str
    tensors: Callable[[int, int], dict[str, StoredTensor]] = field(repr=False, compare=False)
    group_size: int | None = None
    symmetric: bool = True
    number: str = "int"
    side_multiple: int = 1

    def fits(self, layer: Layer) -> bool:
        """Whether loaders take a layer of so many columns.

        A GPTQ checkpoint names the group of each column, so the last group may be short.
        compressed-tensors wants whole groups: `_process_group` (0.20) raises otherwise, also when
        it only decompresses, and no `g_idx` is stored.
        """
        return self.container == "gptq" or self.whole_groups(layer)

    def whole_groups(self, layer: Layer) -> bool:
        """Whether the layer's columns fill the last group."""
        return self.group_size is None or layer.columns % self.group_size == 0

    @property
    def quantized(self) -> bool:
        return self.container != "any"

    @property
    def packed(self) -> bool:
        """Whether its codes have a tensor of their own, instead of being the weight's."""
        return "weight" not in self.tensors(1, 1)

    def layer_bytes(self, layer: Layer) -> int:
        """Bytes of all tensors stored; a tied weight's is shared, what stands beside it is not."""
        stored = self.tensors(layer.rows, layer.columns)
        size = sum(tensor.stored_bytes for tensor in stored.values())
        if layer.tied:
            size += sum(of.stored_bytes for name, of in stored.items() if name != "weight")
        return size

    def stored_bytes(self, group: LayerGroup) -> int:
        return sum(count * self.layer_bytes(layer) for layer, count in group.shapes)

    def bits_per_weight(self, group: LayerGroup) -> float:
        return 8 * self.stored_bytes(group) / group.weights


def _packed_integer(bits: int, group_size: int | None, symmetric: bool) -> Format:
    """Integers of compressed-tensors' `pack-quantized`.

    A row's codes are packed densely into 32-bit words; a bf16 scale a group; the shape as two
    int64. Asymmetric ones add a zero-point a group, packed down the rows. Source:
    compressed_tensors/compressors/pack_quantized (0.20).

    Args:
        group_size: None for one group a row.
    """

    def tensors(rows: int, columns: int) -> dict[str, StoredTensor]:
        groups = ceil(columns / (group_size or columns))
        stored = {
            "weight_packed": StoredTensor("int32", (rows, ceil(columns * bits / 32))),
            "weight_scale": StoredTensor("bfloat16", (rows, groups)),
            "weight_shape": StoredTensor("int64", (2,)),
        }
        if not symmetric:
            stored["weight_zero_point"] = StoredTensor("int32", (ceil(rows * bits / 32), groups))
        return stored

    name = f"int{bits}-{f'g{group_size}' if group_size else 'channel'}"
    return Format(
        name if symmetric else f"{name}-asym",
        bits,
        "compressed-tensors",
        tensors,
        group_size=group_size,
        symmetric=symmetric,
    )


def _unpacked_integer(group_size: int | None) -> Format:
    """Codes of 8 bits and bf16 scales: compressed-tensors' `int-quantized`, weights only.

    The codes are stored in the weight's place, without which transformers (5.23) loads no
    embedding and ties none to the head. Source: compressors/naive_quantized (0.20).

    Args:
        group_size: None for one group a row.
    """

    def tensors(rows: int, columns: int) -> dict[str, StoredTensor]:
        groups = ceil(columns / (group_size or columns))
        return {
            "weight": StoredTensor("int8", (rows, columns)),
            "weight_scale": StoredTensor("bfloat16", (rows, groups)),
        }

    name = f"int8-{f'g{group_size}' if group_size else 'channel'}-unpacked"
    return Format(name, 8, "compressed-tensors", tensors, group_size=group_size)


def _gptq(bits: int, group_size: int) -> Format:
    """Symmetric integers of a GPTQ checkpoint, all tensors transposed: inputs run downwards.

    A column's codes are packed densely into 32-bit words, and so are a group's zero-points; an
    fp16 scale a group; the group of each input. Kernels read whole words on both sides. The last
    group has the columns that are left. Source: gptqmodel 7.6, nn_modules/qlinear,
    `_register_gptq_buffers`.
    """

    def tensors(rows: int, columns: int) -> dict[str, StoredTensor]:
        groups = ceil(columns / group_size)
        return {
            "qweight": StoredTensor("int32", (ceil(columns * bits / 32), rows)),
            "qzeros": StoredTensor("int32", (groups, ceil(rows * bits / 32))),
            "scales": StoredTensor("float16", (groups, rows)),
            "g_idx": StoredTensor("int32", (columns,)),
        }

    name = f"gptq{bits}-g{group_size}"
    return Format(name, bits, "gptq", tensors, group_size=group_size, side_multiple=32)


def _fp8(rows: int, columns: int) -> dict[str, StoredTensor]:
    """E4M3 codes and a bf16 scale a row: compressed-tensors' `float-quantized`, weights only."""
    return {
        "weight": StoredTensor("float8_e4m3fn", (rows, columns)),
        "weight_scale": StoredTensor("bfloat16", (rows, 1)),
    }


def _bf16(rows: int, columns: int) -> dict[str, StoredTensor]:
    return {"weight": StoredTensor("bfloat16", (rows, columns))}


FOUR_BIT_BLOCK = 64
_ABSMAX_BLOCK = 256
_LONGEST_FLOAT = 24  # characters of a double's shortest decimal form, at most


def _four_bits(name: str, double: bool) -> Format:
    """bitsandbytes' NF4 and FP4: two codes a byte, an absmax for each 64 weights of the flattened
    matrix, the 16 levels, and the quantization state as JSON bytes. Source: `QuantState.as_dict`.

    Args:
        double: the absmax are 8-bit codes themselves, in blocks of 256 with fp32 absmax of their
            own, 256 levels, and an offset whose digits vary: the JSON is padded to the longest.
    """

    def tensors(rows: int, columns: int) -> dict[str, StoredTensor]:
        state: dict[str, object] = {
            "quant_type": name,
            "blocksize": FOUR_BIT_BLOCK,
            "dtype": "bfloat16",
        }
        state["shape"] = [rows, columns]
        blocks = ceil(rows * columns / FOUR_BIT_BLOCK)
        stored = {
            "weight": StoredTensor("uint8", (ceil(rows * columns / 2), 1)),
            "weight.absmax": StoredTensor("uint8" if double else "float32", (blocks,)),
            "weight.quant_map": StoredTensor("float32", (16,)),
        }
        if double:
            state |= {"nested_blocksize": _ABSMAX_BLOCK, "nested_dtype": "float32"}
            state["nested_offset"] = 0
            nested = ceil(blocks / _ABSMAX_BLOCK)
            stored["weight.nested_absmax"] = StoredTensor("float32", (nested,))
            stored["weight.nested_quant_map"] = StoredTensor("float32", (256,))
        length = len(json.dumps(state)) + (_LONGEST_FLOAT - 1 if double else 0)
        stored[f"weight.quant_state.bitsandbytes__{name}"] = StoredTensor("uint8", (length,))
        return stored

    return Format(f"{name}-dq" if double else name, 4, "bitsandbytes", tensors, number="float")


GGUF_BLOCK = 32


def _gguf(name: str, bits: int, offset: bool) -> Format:
    """A block type of GGUF: the codes of 32 columns behind their fp16 scale, in the weight's place.

    Source: `gguf.constants.GGML_QUANT_SIZES` (0.19) has the bytes of a block.

    Args:
        offset: an fp16 minimum stands beside the scale.
    """
    block_bytes = (4 if offset else 2) + GGUF_BLOCK * bits // 8

    def tensors(rows: int, columns: int) -> dict[str, StoredTensor]:
        return {"weight": StoredTensor("uint8", (rows, ceil(columns / GGUF_BLOCK) * block_bytes))}

    return Format(name, bits, "gguf", tensors, group_size=GGUF_BLOCK, symmetric=not offset)


def _int8(rows: int, columns: int) -> dict[str, StoredTensor]:
    """LLM.int8 codes, an fp32 absmax a row, and a byte that names the memory layout."""
    return {
        "weight": StoredTensor("int8", (rows, columns)),
        "SCB": StoredTensor("float32", (rows,)),
        "weight_format": StoredTensor("uint8", ()),
    }


BF16 = Format("bf16", 16, "any", _bf16)

FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        fmt.name: fmt
        for fmt in (
            *(
                _packed_integer(bits, group_size, symmetric)
                for symmetric in (True, False)
                for group_size in (32, 64, 128, None)
                for bits in (2, 3, 4, 5, 6, 8)
            ),
            *(_unpacked_integer(group_size) for group_size in (64, None)),
            *(_gptq(bits, size) for bits in (2, 3, 4, 8) for size in (32, 64, 128)),
            Format("fp8", 8, "compressed-tensors", _fp8, number="float"),
            *(_four_bits(name, double) for name in ("nf4", "fp4") for double in (False, True)),
            Format("int8", 8, "bitsandbytes", _int8),
            *(
                _gguf(f"q{bits}_{int(offset)}", bits, offset)
                for bits, offset in ((4, False), (4, True), (5, False), (5, True), (8, False))
            ),
            BF16,
        )
    }
)


_MOST_LISTED = 12


def nearest(name: str, known: Iterable[str], also: Iterable[str] = ()) -> str:
    """`; did you mean 'x'?` for the closest name, else the list of what is known.

    Args:
        also: further names to be close to, too many to list.
    """
    known = list(known)
    close = difflib.get_close_matches(name, [*known, *also], n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    rest = f" and {len(known) - _MOST_LISTED} more" if len(known) > _MOST_LISTED else ""
    return f"; known: {', '.join(known[:_MOST_LISTED])}{rest}"


def get_format(name: str) -> Format:
    """The format of that name. Raises `UsageError` with the nearest name."""
    if name not in FORMATS:
        raise UsageError(f"no format '{name}'{nearest(name, FORMATS)}")
    return FORMATS[name]
