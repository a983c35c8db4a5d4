"""Formats: sizes to the byte, by hand, against real tensors and against the libraries' packers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpsearch.errors import UsageError
from mpsearch.formats import (
    BF16,
    FORMATS,
    ITEM_BYTES,
    Format,
    StoredTensor,
    get_format,
    nearest,
)
from mpsearch.layers import Layer, LayerGroup

GPTQ = {
    f"gptq{bits}-g{size}": (bits, "gptq", size, True)
    for bits in (2, 3, 4, 8)
    for size in (32, 64, 128)
}
PACKED = [f.name for f in FORMATS.values() if "weight_packed" in f.tensors(1, 1)]
SHAPES = ((576, 576), (192, 576), (1536, 576), (576, 1536), (5, 65), (7, 96), (1, 1), (3, 127))
sides = st.integers(1, 400)


def size(name: str, rows: int, columns: int) -> int:
    return FORMATS[name].layer_bytes(Layer("a.b", rows, columns))


@pytest.mark.parametrize(
    ("name", "stored_bytes"),
    [
        # words a row x 4 bytes + 9 bf16 scales a row + the shape as two int64
        ("int2-g64", 576 * 36 * 4 + 576 * 9 * 2 + 16),
        ("int3-g64", 576 * 54 * 4 + 576 * 9 * 2 + 16),
        ("int4-g64", 576 * 72 * 4 + 576 * 9 * 2 + 16),
        ("int8-g64", 576 * 144 * 4 + 576 * 9 * 2 + 16),
        # code words and zero-point words x 4 bytes, fp16 scales, an int32 for each input
        ("gptq2-g64", 36 * 576 * 4 + 9 * 36 * 4 + 9 * 576 * 2 + 576 * 4),
        ("gptq3-g64", 54 * 576 * 4 + 9 * 54 * 4 + 9 * 576 * 2 + 576 * 4),
        ("gptq4-g64", 72 * 576 * 4 + 9 * 72 * 4 + 9 * 576 * 2 + 576 * 4),
        ("gptq4-g32", 72 * 576 * 4 + 18 * 72 * 4 + 18 * 576 * 2 + 576 * 4),
        ("gptq8-g64", 144 * 576 * 4 + 9 * 144 * 4 + 9 * 576 * 2 + 576 * 4),
        # half a byte a weight + an fp32 absmax for each 64 + 16 fp32 levels + the state as JSON
        (
            "nf4",
            165_888
            + 5_184 * 4
            + 64
            + len(
                '{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [576, 576]}'
            ),
        ),
        ("int8", 576 * 576 + 576 * 4 + 1),
        # 90 words a row + 18 scales a row + 18 zero-points of 5 bits for 576 rows + the shape
        ("int5-g32-asym", 576 * 90 * 4 + 576 * 18 * 2 + 18 * 90 * 4 + 16),
        ("int6-channel", 576 * 108 * 4 + 576 * 2 + 16),
        ("fp8", 576 * 576 + 576 * 2),
        # 18 blocks a row: an fp16 scale, an fp16 minimum where the name ends in 1, 32 codes
        ("q4_0", 576 * 18 * (2 + 16)),
        ("q4_1", 576 * 18 * (2 + 2 + 16)),
        ("q5_0", 576 * 18 * (2 + 20)),
        ("q5_1", 576 * 18 * (2 + 2 + 20)),
        ("q8_0", 576 * 18 * (2 + 32)),
        ("bf16", 576 * 576 * 2),
    ],
)
def test_size_of_a_576_square_by_hand(name: str, stored_bytes: int) -> None:
    assert size(name, 576, 576) == stored_bytes


def test_int4_g64_of_a_576_square_is_176272_bytes() -> None:
    assert size("int4-g64", 576, 576) == 176_272


def test_columns_that_fill_no_word_and_no_group_are_rounded_up_in_each_row() -> None:
    assert size("int4-g64", 5, 65) == 5 * 9 * 4 + 5 * 2 * 2 + 16  # 260 bits are 9 words; 2 groups
    assert size("int3-g64", 5, 65) == 5 * 7 * 4 + 5 * 2 * 2 + 16  # 195 bits are 7 words


def test_nf4_is_rounded_up_once_over_the_flattened_matrix() -> None:
    state = '{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [3, 43]}'
    assert size("nf4", 3, 43) == 65 + 3 * 4 + 64 + len(state)  # 129 weights, 3 blocks


@pytest.mark.parametrize("name", FORMATS)
@given(rows=sides, columns=sides)
@settings(deadline=None, max_examples=25)
def test_size_is_that_of_real_tensors(name: str, rows: int, columns: int) -> None:
    tensors = {
        suffix: torch.empty(stored.shape, dtype=getattr(torch, stored.dtype))
        for suffix, stored in FORMATS[name].tensors(rows, columns).items()
    }
    assert size(name, rows, columns) == sum(t.numel() * t.element_size() for t in tensors.values())


@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_item_bytes_are_torchs(dtype: str) -> None:
    assert ITEM_BYTES[dtype] == getattr(torch, dtype).itemsize


def test_a_scalar_is_one_item() -> None:
    assert StoredTensor("uint8", ()).stored_bytes == 1
    assert StoredTensor("float32", (3, 5)).stored_bytes == 60


@pytest.mark.parametrize("name", PACKED)
def test_packed_shapes_are_those_of_compressed_tensors(name: str) -> None:
    from compressed_tensors.compressors.pack_quantized import pack_to_int32

    fmt = FORMATS[name]
    for rows, columns in SHAPES:
        packed = pack_to_int32(torch.zeros(rows, columns, dtype=torch.int8), fmt.bits)
        stored = fmt.tensors(rows, columns)
        found = stored["weight_packed"]
        assert (found.dtype, found.shape) == ("int32", tuple(packed.shape))
        assert packed.dtype is torch.int32
        assert ("weight_zero_point" in stored) is not fmt.symmetric
        if not fmt.symmetric:
            zeros = torch.zeros(stored["weight_scale"].shape, dtype=torch.int8)
            packed = pack_to_int32(zeros, fmt.bits, packed_dim=0)
            assert stored["weight_zero_point"].shape == tuple(packed.shape)


@pytest.mark.parametrize("name", GPTQ)
def test_gptq_tensors_are_those_of_auto_gptqs_successor(name: str) -> None:
    pytest.importorskip("gptqmodel")
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    fmt = FORMATS[name]
    for rows, columns in ((64, 128), (96, 256), (576, 1536), (64, 576), (32, 32), (96, 224)):
        module = TorchLinear(fmt.bits, fmt.group_size, True, False, columns, rows)
        assert {
            key: (str(tensor.dtype), tuple(tensor.shape))
            for key, tensor in module.state_dict().items()
        } == {
            key: (f"torch.{stored.dtype}", stored.shape)
            for key, stored in fmt.tensors(rows, columns).items()
        }


@pytest.mark.parametrize("name", ["nf4", "nf4-dq", "fp4", "fp4-dq"])
def test_four_bit_tensors_are_those_of_bitsandbytes(name: str) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    for rows, columns in SHAPES:
        codes, state = functional.quantize_4bit(
            torch.ones(rows, columns, dtype=torch.bfloat16),
            quant_type=name[:3],
            blocksize=64,
            compress_statistics="dq" in name,
        )
        real = {"weight": codes}
        real |= {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        described = FORMATS[name].tensors(rows, columns)
        assert {key: str(tensor.dtype) for key, tensor in real.items()} == {
            key: f"torch.{stored.dtype}" for key, stored in described.items()
        }
        shapes = {key: tuple(tensor.shape) for key, tensor in real.items()}
        promised = {key: stored.shape for key, stored in described.items()}
        described_at = f"weight.quant_state.bitsandbytes__{name[:3]}"
        slack = promised.pop(described_at)[0] - shapes.pop(described_at)[0]
        assert shapes == promised
        # Room for the digits of the offset, which vary.
        assert 0 <= slack < 24 if "dq" in name else slack == 0


@pytest.mark.parametrize("name", FORMATS)
@given(rows=sides, columns=sides)
@settings(deadline=None, max_examples=25)
def test_codes_take_at_least_their_nominal_bits(name: str, rows: int, columns: int) -> None:
    group = LayerGroup((Layer("a.b", rows, columns),))
    fmt = FORMATS[name]
    assert fmt.bits_per_weight(group) >= fmt.bits
    assert 8 * fmt.stored_bytes(group) == pytest.approx(fmt.bits_per_weight(group) * group.weights)
    assert (fmt.bits_per_weight(group) == fmt.bits) is (not fmt.quantized)


@given(rows=sides, columns=sides)
@settings(deadline=None, max_examples=50)
def test_neither_more_bits_nor_a_larger_layer_takes_fewer_bytes(rows: int, columns: int) -> None:
    for kind in ("g32", "g64", "g128", "channel", "g64-asym", "channel-asym"):
        sizes = [size(f"int{bits}-{kind}", rows, columns) for bits in (2, 3, 4, 5, 6, 8)]
        assert sizes == sorted(sizes)
    for name in FORMATS:
        assert size(name, rows + 1, columns) >= size(name, rows, columns)
        assert size(name, rows, columns + 1) >= size(name, rows, columns)


def test_int4_g64_costs_four_and_a_quarter_bits_and_the_shape() -> None:
    group = LayerGroup((Layer("a.b", 576, 576),))
    assert FORMATS["int4-g64"].bits_per_weight(group) == 4.25 + 128 / 576**2


def test_a_group_is_the_sum_of_its_layers() -> None:
    query, key = Layer("a.q", 576, 576), Layer("a.k", 192, 576)
    for fmt in FORMATS.values():
        assert fmt.stored_bytes(LayerGroup((query, key))) == (
            fmt.layer_bytes(query) + fmt.layer_bytes(key)
        )


def test_the_formats_are_these() -> None:
    integers = {
        f"int{bits}-{'channel' if group is None else f'g{group}'}{'' if symmetric else '-asym'}": (
            bits, "compressed-tensors", group, symmetric, "int",
        )
        for bits in (2, 3, 4, 5, 6, 8)
        for group in (32, 64, 128, None)
        for symmetric in (True, False)
    }  # fmt: skip
    assert {
        name: (fmt.bits, fmt.container, fmt.group_size, fmt.symmetric, fmt.number)
        for name, fmt in FORMATS.items()
    } == {
        **integers,
        **{name: (*said, "int") for name, said in GPTQ.items()},
        "int8-g64-unpacked": (8, "compressed-tensors", 64, True, "int"),
        "int8-channel-unpacked": (8, "compressed-tensors", None, True, "int"),
        "fp8": (8, "compressed-tensors", None, True, "float"),
        "nf4": (4, "bitsandbytes", None, True, "float"),
        "nf4-dq": (4, "bitsandbytes", None, True, "float"),
        "fp4": (4, "bitsandbytes", None, True, "float"),
        "fp4-dq": (4, "bitsandbytes", None, True, "float"),
        "int8": (8, "bitsandbytes", None, True, "int"),
        "q4_0": (4, "gguf", 32, True, "int"),
        "q4_1": (4, "gguf", 32, False, "int"),
        "q5_0": (5, "gguf", 32, True, "int"),
        "q5_1": (5, "gguf", 32, False, "int"),
        "q8_0": (8, "gguf", 32, True, "int"),
        "bf16": (16, "any", None, True, "int"),
    }
    assert all(fmt.name == name for name, fmt in FORMATS.items())
    assert [fmt.name for fmt in FORMATS.values() if not fmt.quantized] == ["bf16"]
    assert {name for name, fmt in FORMATS.items() if fmt.side_multiple != 1} == set(GPTQ)
    assert FORMATS["bf16"] is BF16


@pytest.mark.parametrize(
    ("name", "alone", "beside"),
    [  # what stands beside the weight's own tensor is stored for the embedding and for the head
        ("bf16", 71 * 192 * 2, 0),
        ("fp8", 71 * 192, 71 * 2),
        ("int8-channel-unpacked", 71 * 192, 71 * 2),
        ("int8-g64-unpacked", 71 * 192, 71 * 3 * 2),
        ("q5_1", 71 * 6 * 24, 0),
        ("int4-g64", 0, 71 * 24 * 4 + 71 * 3 * 2 + 16),
    ],
)
def test_a_tied_weight_is_stored_once_and_what_stands_beside_it_twice(
    name: str, alone: int, beside: int
) -> None:
    fmt = FORMATS[name]
    assert fmt.layer_bytes(Layer("e", 71, 192)) == alone + beside
    assert fmt.layer_bytes(Layer("e", 71, 192, tied="h")) == alone + 2 * beside
    assert fmt.packed == (alone == 0)


def test_groups_fit_where_they_divide_the_columns_and_in_gptq_everywhere() -> None:
    layer = Layer("a.b", 8, 192)
    assert FORMATS["gptq4-g128"].fits(layer)
    assert FORMATS["int4-g64"].fits(layer)
    assert not FORMATS["int4-g128"].fits(layer)
    assert FORMATS["int4-channel"].fits(layer)
    assert FORMATS["nf4"].fits(layer)
    assert FORMATS["q4_0"].fits(layer)
    assert not FORMATS["q4_0"].fits(Layer("a.b", 32, 200))


@pytest.mark.parametrize("name", [f.name for f in FORMATS.values() if f.container == "gguf"])
def test_gguf_tensors_are_those_of_llama_cpps_library(name: str) -> None:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quant_shape_to_byte_shape

    kind = GGMLQuantizationType[name.upper()]
    assert GGML_QUANT_SIZES[kind][0] == FORMATS[name].group_size
    for rows, columns in ((1, 32), (7, 96), (576, 1536)):
        stored = FORMATS[name].tensors(rows, columns)
        assert {key: (tensor.dtype, tensor.shape) for key, tensor in stored.items()} == {
            "weight": ("uint8", quant_shape_to_byte_shape((rows, columns), kind))
        }


def test_the_table_of_formats_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        FORMATS["int1"] = BF16  # type: ignore[index]


def test_formats_are_equal_by_what_they_say_and_hashable() -> None:
    twin = Format("bf16", 16, "any", lambda rows, columns: {})
    assert twin == BF16
    assert len({twin, BF16}) == 1
    assert len(set(FORMATS.values())) == len(FORMATS)


def test_get_format_finds_by_name() -> None:
    assert all(get_format(name) is fmt for name, fmt in FORMATS.items())


def test_an_unknown_format_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UsageError, match=r"^no format 'int4g64'; did you mean 'int4-g64'\?$"):
        get_format("int4g64")


def test_a_name_near_nothing_is_answered_with_all_that_is_known() -> None:
    assert nearest("zzz", ["one", "two"]) == "; known: one, two"
    assert nearest("zzz", [f"n{i}" for i in range(20)]).endswith(", n11 and 8 more")
    assert nearest("onw", iter(["one", "two"])) == "; did you mean 'one'?"
