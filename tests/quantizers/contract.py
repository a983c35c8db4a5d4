"""Quantizers, what they are asked for in the tests, and stored tensors read without them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from mpsearch.formats import FORMATS, Format
from mpsearch.quantizers import QUANTIZERS, InputStatistics, Quantizer, get_quantizer

ROWS, COLUMNS, TOKENS = 48, 192, 512
HALF_ULP = 2.0**-8  # largest relative error of rounding to bf16
LIBRARY = {
    "rounding": "compressed_tensors",
    "gptq": "gptqmodel",
    "auto-gptq": "auto_gptq",
    "hqq": "hqq",
    "bitsandbytes": "bitsandbytes",
    "gguf": "gguf",
}
CONTAINER = {name: container for container, names in QUANTIZERS.items() for name in names}

Stored = dict[str, dict[str, Tensor]]


@lru_cache
def quantizer(name: str) -> Quantizer:
    return get_quantizer(name, CONTAINER[name])


# Every width, group size, kind of zero-point and container at least once; a short last group.
EXAMPLES = (
    "int2-g64", "int3-g64", "int4-g64", "int8-g64", "int5-g32", "int6-channel", "int2-g64-asym",
    "int3-g64-asym", "int4-g64-asym", "int8-g64-asym", "int5-channel-asym", "int6-g32-asym", "fp8",
    "int8-g64-unpacked", "int8-channel-unpacked",
    "nf4", "nf4-dq", "fp4", "fp4-dq", "int8",
    "gptq2-g64", "gptq3-g64", "gptq4-g64", "gptq4-g32", "gptq8-g64", "gptq4-g128",
    "q4_0", "q4_1", "q5_0", "q5_1", "q8_0",
)  # fmt: skip


@lru_cache
def made_by(name: str) -> list[Format]:
    if find_spec(LIBRARY[name]) is None:  # its tests are skipped
        return [fmt for fmt in FORMATS.values() if fmt.container == CONTAINER[name]][:1]
    return [FORMATS[example] for example in EXAMPLES if quantizer(name).makes(FORMATS[example])]


def installed(name: str) -> list[pytest.MarkDecorator]:
    missing = find_spec(LIBRARY[name]) is None
    return [pytest.mark.skipif(missing, reason=f"{LIBRARY[name]} is not installed")]


each_quantizer = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=installed(name)) for name in CONTAINER]
)
each_format = pytest.mark.parametrize(
    ("name", "fmt"),
    [
        pytest.param(name, fmt, marks=installed(name), id=f"{name}-{fmt.name}")
        for name in CONTAINER
        for fmt in made_by(name)
    ],
)
each_packed_format = pytest.mark.parametrize(
    ("name", "fmt"),
    [
        pytest.param(name, fmt, marks=installed(name), id=f"{name}-{fmt.name}")
        for name in QUANTIZERS["compressed-tensors"]
        for fmt in made_by(name)
        if fmt.number == "int" and fmt.packed
        if fmt.container == "compressed-tensors"
    ],
)


@lru_cache
def weight() -> Tensor:
    """Float32, with outliers; do not write to it."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(ROWS, COLUMNS, generator=generator) * 0.05
    values[torch.rand(ROWS, COLUMNS, generator=generator) < 0.003] *= 8
    return values


@lru_cache
def inputs() -> Tensor:
    """`(tokens, columns)`, strongly correlated as a language model's are."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(COLUMNS // 4, COLUMNS, generator=generator)
    hidden = torch.randn(TOKENS, COLUMNS // 4, generator=generator)
    return hidden @ mixing + 0.3 * torch.randn(TOKENS, COLUMNS, generator=generator)


def statistics_of(name: str, seen: Tensor) -> InputStatistics | None:
    return InputStatistics(seen.T @ seen, len(seen)) if quantizer(name).calibrated else None


@lru_cache
def quantized(name: str) -> Stored:
    """The weight in all formats of a quantizer."""
    return quantizer(name).quantize(weight(), made_by(name), statistics_of(name, inputs()))


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def output_error(decoded: Tensor) -> float:
    return relative_error(inputs().double() @ decoded.double().T, inputs() @ weight().T)


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a)


def unpacked(words: Tensor, count: int, bits: int) -> Tensor:
    """Unsigned codes from packed rows, read as a little-endian stream of bits."""
    stream = (((words.long() & 0xFFFFFFFF)[:, :, None] >> torch.arange(32)) & 1).flatten(1)
    return (stream[:, : count * bits].unflatten(1, (count, bits)) << torch.arange(bits)).sum(-1)


def codes_of(stored: Mapping[str, Tensor], fmt: Format) -> Tensor:
    if not fmt.packed:
        return stored["weight"].long()
    transposed = fmt.container == "gptq"
    packed = stored["qweight"].T if transposed else stored["weight_packed"]
    columns = len(stored["g_idx"]) if transposed else int(stored["weight_shape"][1])
    return unpacked(packed, columns, fmt.bits) - 2 ** (fmt.bits - 1)


def zeros_of(stored: Mapping[str, Tensor], fmt: Format) -> Tensor:
    """`(rows, groups)` zero-points, packed down the rows; zero where symmetric."""
    if fmt.symmetric:
        return torch.zeros_like(scale_of(stored), dtype=torch.int64)
    rows = int(stored["weight_shape"][0])
    return unpacked(stored["weight_zero_point"].T, rows, fmt.bits).T - 2 ** (fmt.bits - 1)


def scale_of(stored: Mapping[str, Tensor]) -> Tensor:
    """`(rows, groups)`, whichever way round it is stored."""
    return stored["scales"].T if "scales" in stored else stored["weight_scale"]


def per_column(scale: Tensor, fmt: Format) -> Tensor:
    return scale.double().repeat_interleave(fmt.group_size or COLUMNS, dim=1)[:, :COLUMNS]


def in_groups(matrix: Tensor, fmt: Format) -> Tensor:
    """`(rows, groups, group size)`; a last group that columns do not fill gets zeros."""
    size = fmt.group_size or COLUMNS
    return torch.nn.functional.pad(matrix, (0, -COLUMNS % size)).unflatten(1, (-1, size))
