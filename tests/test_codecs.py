"""Codecs: packed codes come back, laid out as an independent reader expects, decoded exactly."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from mpsearch.codecs import (
    compression,
    decode,
    import_bitsandbytes,
    pack,
    quantization_args,
    stored_scale,
)
from mpsearch.errors import CheckError, UsageError
from mpsearch.formats import BF16, FORMATS, Format

PACKED = [
    FORMATS[f"{name}{end}"]
    for name in ("int2-g64", "int3-g64", "int4-g64", "int8-g64", "int5-g32", "int6-channel")
    for end in ("", "-asym")
]
packed = pytest.mark.parametrize("fmt", PACKED, ids=lambda fmt: fmt.name)
GPTQ = [fmt for fmt in FORMATS.values() if fmt.container == "gptq"]
gptq = pytest.mark.parametrize("fmt", GPTQ, ids=lambda fmt: fmt.name)
# Whole groups of every size; last groups of 96 and 32 columns; less than one group.
short_last_group = pytest.mark.parametrize("columns", [384, 352, 32])
needs_bitsandbytes = pytest.mark.skipif(not find_spec("bitsandbytes"), reason="not installed")


def codes_and_scale(
    fmt: Format, rows: int, columns: int
) -> tuple[Tensor, Tensor, Format, Tensor | None]:
    """What `pack` takes: random codes, the extremes among them, positive bf16 scales, zeros."""
    generator = torch.Generator().manual_seed(fmt.bits)
    half = 2 ** (fmt.bits - 1)
    codes = torch.randint(-half, half, (rows, columns), generator=generator, dtype=torch.int8)
    codes[0, 0], codes[0, -1], codes[-1, 0], codes[-1, -1] = -half, half - 1, half - 1, -half
    groups = -(-columns // (fmt.group_size or columns))
    scale = torch.rand(rows, groups, generator=generator) * 0.1 + 1e-3
    zero = torch.randint(-half, half, (rows, groups), generator=generator, dtype=torch.int8)
    return codes, stored_scale(scale, fmt), fmt, None if fmt.symmetric else zero


def exact(codes: Tensor, scale: Tensor, fmt: Format, zero: Tensor | None) -> Tensor:
    """Code less zero-point, times scale, in float64."""
    zeros = torch.zeros_like(scale) if zero is None else zero
    columns = codes.shape[1]

    def spread(of_groups: Tensor) -> Tensor:
        wide = of_groups.double().repeat_interleave(fmt.group_size or columns, dim=1)
        return wide[:, :columns]

    return (codes.double() - spread(zeros)) * spread(scale)


def bits_of(packed_weight: Tensor, bits: int, columns: int) -> Tensor:
    """Codes read as a little-endian stream of bits, a row at a time, without the library."""
    words = packed_weight.long() & 0xFFFFFFFF
    stream = ((words[:, :, None] >> torch.arange(32)) & 1).flatten(1)
    assert not stream[:, columns * bits :].any()
    values = stream[:, : columns * bits].unflatten(1, (columns, bits)) << torch.arange(bits)
    return values.sum(-1) - 2 ** (bits - 1)


@packed
@pytest.mark.parametrize("columns", [64, 192, 70, 1])
def test_packed_codes_are_a_dense_stream_of_bits(fmt: Format, columns: int) -> None:
    codes, _, *_ = parts = codes_and_scale(fmt, 5, columns)
    stored = pack(*parts)
    assert stored["weight_packed"].dtype == torch.int32
    assert stored["weight_packed"].shape == (5, -(-columns * fmt.bits // 32))
    assert torch.equal(bits_of(stored["weight_packed"], fmt.bits, columns), codes.long())


@packed
def test_packing_stores_scale_and_shape_as_they_are(fmt: Format) -> None:
    _, scale, *_ = parts = codes_and_scale(fmt, 12, 128)
    stored = pack(*parts)
    assert torch.equal(stored["weight_scale"], scale)
    assert stored["weight_shape"].tolist() == [12, 128]
    assert all(tensor.is_contiguous() for tensor in stored.values())


@packed
def test_decoded_weight_is_code_times_scale_rounded_once_to_bf16(fmt: Format) -> None:
    parts = codes_and_scale(fmt, 12, 192)
    weight = decode(pack(*parts), fmt)
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight, exact(*parts).to(torch.bfloat16))


@packed
def test_zero_points_are_a_dense_stream_of_bits_down_the_rows(fmt: Format) -> None:
    *_, zero = parts = codes_and_scale(fmt, 12, 192)
    stored = pack(*parts)
    assert ("weight_zero_point" in stored) is (zero is not None)
    if zero is not None:
        assert torch.equal(bits_of(stored["weight_zero_point"].T, fmt.bits, 12), zero.T.long())


@packed
def test_decoding_is_what_the_library_decompresses(fmt: Format) -> None:
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    stored = pack(*codes_and_scale(fmt, 12, 192))
    scheme = QuantizationScheme(targets=["Linear"], weights=quantization_args(fmt))
    theirs = PackedQuantizationCompressor.decompress(dict(stored), scheme)["weight"]
    assert torch.equal(decode(stored, fmt), theirs)


@packed
def test_decoding_leaves_the_stored_tensors_alone(fmt: Format) -> None:
    stored = pack(*codes_and_scale(fmt, 12, 192))
    before = {name: tensor.clone() for name, tensor in stored.items()}
    decode(stored, fmt)
    assert set(stored) == set(before)
    assert all(torch.equal(stored[name], tensor) for name, tensor in before.items())


@packed
def test_arguments_say_what_the_format_is(fmt: Format) -> None:
    args = quantization_args(fmt)
    assert (args.num_bits, args.group_size) == (fmt.bits, fmt.group_size)
    assert (args.symmetric, args.type) == (fmt.symmetric, "int")
    assert args.strategy == ("group" if fmt.group_size else "channel")


@pytest.mark.parametrize("name", ["int8-g64-unpacked", "int8-channel-unpacked"])
def test_unpacked_codes_are_stored_a_byte_each_in_the_weights_place(name: str) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    codes, scale, fmt, _ = codes_and_scale(FORMATS[name], 12, 192)
    stored = pack(codes, scale, fmt)
    assert set(stored) == {"weight", "weight_scale"}
    assert torch.equal(stored["weight"], codes)
    weight = exact(codes, scale, fmt, None).bfloat16()
    assert torch.equal(decode(stored, fmt), weight)
    scheme = QuantizationScheme(targets=["Embedding"], weights=quantization_args(fmt))
    library = BaseCompressor.get_value_from_registry("int-quantized")
    assert torch.equal(library.decompress(dict(stored), scheme)["weight"], weight)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("int4-g64", "pack-quantized"),
        ("int8-channel-asym", "pack-quantized"),
        ("int8-g64-unpacked", "int-quantized"),
        ("fp8", "float-quantized"),
    ],
)
def test_a_config_says_how_a_format_is_stored(name: str, said: str) -> None:
    assert compression(FORMATS[name]) == said


def test_fp8_is_stored_as_it_is_and_multiplied_by_its_scale() -> None:
    fmt = FORMATS["fp8"]
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(6, 40, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(6, 1, generator=generator).bfloat16()
    stored = pack(codes, scale, fmt)
    assert torch.equal(stored["weight"].float(), codes.float())
    assert torch.equal(decode(stored, fmt), (codes.double() * scale.double()).bfloat16())
    assert (quantization_args(fmt).type, quantization_args(fmt).strategy) == ("float", "channel")


def test_unquantized_weights_are_handed_out_as_stored() -> None:
    weight = torch.randn(3, 4).to(torch.bfloat16)
    assert torch.equal(decode({"weight": weight}, BF16), weight)


@gptq
@short_last_group
def test_gptq_words_are_dense_streams_of_bits_down_the_columns(fmt: Format, columns: int) -> None:
    codes, scale, *_ = parts = codes_and_scale(fmt, 32, columns)
    stored = pack(*parts)
    assert torch.equal(bits_of(stored["qweight"].T, fmt.bits, columns), codes.long())
    assert torch.equal(stored["scales"], scale.T)
    assert stored["g_idx"].tolist() == [column // fmt.group_size for column in range(columns)]
    assert all(tensor.is_contiguous() for tensor in stored.values())


@gptq
def test_gptq_zero_points_are_the_middle_code_stored_less_one(fmt: Format) -> None:
    stored = pack(*codes_and_scale(fmt, 32, 384))
    middle = 2 ** (fmt.bits - 1)
    assert (bits_of(stored["qzeros"], fmt.bits, 32) + middle == middle - 1).all()


@gptq
@short_last_group
def test_a_gptq_weight_is_code_times_scale_rounded_once_to_fp16(fmt: Format, columns: int) -> None:
    parts = codes_and_scale(fmt, 64, columns)
    weight = decode(pack(*parts), fmt)
    assert weight.dtype == torch.float16
    assert torch.equal(weight, exact(*parts).to(torch.float16))


@gptq
@short_last_group
def test_a_gptq_weight_is_what_gptqmodels_kernel_dequantizes(
    fmt: Format, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # it compiles its kernel otherwise
    pytest.importorskip("gptqmodel")
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    stored = pack(*codes_and_scale(fmt, 96, columns))
    module = TorchLinear(fmt.bits, fmt.group_size, True, False, columns, 96).eval()
    module.load_state_dict(stored)
    convert_gptq_v1_to_v2_format_module(module, fmt.bits, torch.int32)
    module._init_wf_unsqueeze_buffers()
    assert torch.equal(decode(stored, fmt), module.dequantize_weight().T)


@gptq
def test_gptq_refuses_weights_beyond_fp16_and_never_divides_by_zero(fmt: Format) -> None:
    codes, scale, *_ = codes_and_scale(fmt, 32, 384)
    with pytest.raises(CheckError, match=f"'{fmt.name}' computes in fp16, which cannot hold"):
        pack(codes, torch.full_like(scale, 65504 / 2 ** (fmt.bits - 1) * 1.01), fmt)
    assert (stored_scale(torch.tensor([0.0, 1e-30]), fmt) == 2.0**-24).all()


@needs_bitsandbytes
def test_int8_is_code_times_row_maximum_over_127() -> None:
    codes = torch.randint(-127, 128, (6, 40), generator=torch.Generator().manual_seed(0))
    row_max = torch.linspace(0.01, 3, 6)
    layout = torch.tensor(0, dtype=torch.uint8)
    stored = {"weight": codes.to(torch.int8), "SCB": row_max, "weight_format": layout}
    weight = decode(stored, FORMATS["int8"])
    assert weight.dtype == torch.bfloat16
    expected = codes.double() * row_max.double()[:, None] / 127
    torch.testing.assert_close(weight.double(), expected, atol=0, rtol=2**-8)


@needs_bitsandbytes
def test_nf4_is_level_times_block_maximum() -> None:
    from bitsandbytes import functional

    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    codes, state = functional.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=False
    )
    extra = {f"weight.{name}": t for name, t in state.as_dict(packed=True).items()}
    decoded = decode({"weight": codes, **extra}, FORMATS["nf4"])
    # Two codes a byte, the first in the high half.
    halves = torch.stack([codes.flatten() >> 4, codes.flatten() & 15], dim=1).flatten().long()
    levels = extra["weight.quant_map"][halves].view(16, 64)
    expected = levels.double() * extra["weight.absmax"].double()[:, None]
    assert decoded.dtype == torch.bfloat16
    torch.testing.assert_close(decoded.double(), expected, atol=0, rtol=2**-8)
    assert torch.equal(decoded, functional.dequantize_4bit(codes, state))


@pytest.mark.parametrize("fmt", [f for f in FORMATS.values() if f.container == "gguf"],
                         ids=lambda fmt: fmt.name)  # fmt: skip
def test_gguf_blocks_are_scale_times_code_plus_minimum(fmt: Format) -> None:
    """Random bytes behind finite scales, read by the layout that ggml-common.h describes."""
    generator = torch.Generator().manual_seed(fmt.bits)
    rows, groups = 7, 3
    numbers = 1 if fmt.symmetric else 2
    (_, row_bytes) = fmt.tensors(rows, 32 * groups)["weight"].shape
    blocks = torch.randint(0, 256, (rows, groups, row_bytes // groups), generator=generator)
    blocks = blocks.to(torch.uint8)
    halves = torch.randn(rows, groups, numbers, generator=generator).to(torch.float16) * 0.01
    blocks[..., : 2 * numbers] = halves.view(torch.uint8)
    rest = blocks[..., 2 * numbers :].long()
    if fmt.bits == 8:
        codes = rest - 256 * (rest > 127)
    else:
        high = rest[..., : 4 * (fmt.bits - 4), None] >> torch.arange(8) & 1
        low = rest[..., 4 * (fmt.bits - 4) :]
        codes = torch.cat([low & 15, low >> 4], dim=-1)  # the first half of the columns, the second
        codes += 16 * high.flatten(-2) if fmt.bits == 5 else 0
        codes -= 2 ** (fmt.bits - 1) if fmt.symmetric else 0
    minimum = 0 if fmt.symmetric else halves[..., 1:].float()
    expected = (halves[..., :1].float() * codes.float() + minimum).flatten(1)
    decoded = decode({"weight": blocks.flatten(1)}, fmt)
    assert decoded.dtype == torch.bfloat16
    assert torch.equal(decoded, expected.to(torch.bfloat16))


def test_without_bitsandbytes_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UsageError, match=r"pip install 'mpsearch\[bitsandbytes\]'"):
        import_bitsandbytes()
