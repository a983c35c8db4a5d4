"""One contract for all quantizers, in all their formats; see `mpsearch.quantizers.Quantizer`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from mpsearch.codecs import decode, pack, quantization_args, stored_scale
from mpsearch.errors import CheckError, UsageError
from mpsearch.formats import FORMATS, Format
from mpsearch.layers import Layer
from mpsearch.quantizers import QUANTIZERS, InputStatistics, Quantizer, get_quantizer

ROWS, COLUMNS, TOKENS = 48, 192, 512
HALF_ULP = 2.0**-8  # largest relative error of rounding to bf16
LIBRARY = {
    "rounding": "compressed_tensors",
    "gptq": "gptqmodel",
    "auto-gptq": "auto_gptq",
    "hqq": "hqq",
    "bitsandbytes": "bitsandbytes",
}
CONTAINER = {name: container for container, names in QUANTIZERS.items() for name in names}

Stored = dict[str, dict[str, Tensor]]


@lru_cache
def quantizer(name: str) -> Quantizer:
    return get_quantizer(name, CONTAINER[name])


# Every width, group size, kind of zero-point and container at least once.
EXAMPLES = (
    "int2-g64", "int3-g64", "int4-g64", "int8-g64", "int5-g32", "int6-channel", "int2-g64-asym",
    "int3-g64-asym", "int4-g64-asym", "int8-g64-asym", "int5-channel-asym", "int6-g32-asym", "fp8",
    "int8-g64-unpacked", "int8-channel-unpacked",
    "nf4", "nf4-dq", "fp4", "fp4-dq", "int8",
    "gptq2-g64", "gptq3-g64", "gptq4-g64", "gptq4-g32", "gptq8-g64",
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
    return scale.double().repeat_interleave(fmt.group_size or COLUMNS, dim=1)


# ------------------------------------------------------------------------------ what is stored


@each_format
def test_stored_tensors_are_those_that_the_format_promises(name: str, fmt: Format) -> None:
    found = {
        key: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for key, tensor in quantized(name)[fmt.name].items()
    }
    promised = {key: (t.dtype, t.shape) for key, t in fmt.tensors(ROWS, COLUMNS).items()}
    assert found == promised


@each_format
def test_stored_bytes_are_those_that_the_format_predicts(name: str, fmt: Format) -> None:
    actual = sum(t.numel() * t.element_size() for t in quantized(name)[fmt.name].values())
    assert actual == fmt.layer_bytes(Layer("layer", ROWS, COLUMNS))


@each_format
@pytest.mark.parametrize("shape", [(1, 64), (11, 128), (130, 64)])
def test_other_shapes_keep_the_promise_too(name: str, fmt: Format, shape: tuple[int, int]) -> None:
    rows, columns = shape
    rows += -rows % fmt.side_multiple
    small = torch.randn((rows, columns), generator=torch.Generator().manual_seed(2))
    seen = inputs()[:, :columns]
    stored = quantizer(name).quantize(small, [fmt], statistics_of(name, seen))[fmt.name]
    promised = fmt.tensors(rows, columns)
    assert {key: tuple(t.shape) for key, t in stored.items()} == {
        key: t.shape for key, t in promised.items()
    }
    decoded = decode(stored, fmt)
    assert decoded.shape == (rows, columns)
    assert relative_error(decoded, small) < 1


@each_format
def test_codes_of_a_format_do_not_depend_on_the_formats_beside_it(name: str, fmt: Format) -> None:
    alone = quantizer(name).quantize(weight(), [fmt], statistics_of(name, inputs()))
    assert list(alone) == [fmt.name]
    assert equal(alone[fmt.name], quantized(name)[fmt.name])


@each_quantizer
def test_the_order_of_formats_does_not_matter(name: str) -> None:
    backwards = made_by(name)[::-1]
    stored = quantizer(name).quantize(weight(), backwards, statistics_of(name, inputs()))
    assert all(equal(stored[fmt.name], quantized(name)[fmt.name]) for fmt in backwards)


@each_quantizer
def test_the_same_arguments_give_the_same_codes_whatever_the_global_seed(name: str) -> None:
    state = torch.get_rng_state()
    torch.manual_seed(1234)
    fresh = get_quantizer(name, CONTAINER[name])
    again = fresh.quantize(weight(), made_by(name), statistics_of(name, inputs()))
    torch.set_rng_state(state)
    assert all(equal(again[fmt.name], quantized(name)[fmt.name]) for fmt in made_by(name))


@each_quantizer
def test_neither_weight_nor_statistics_are_modified(name: str) -> None:
    given, seen = weight().clone(), statistics_of(name, inputs())
    quantizer(name).quantize(given, made_by(name), seen)
    assert torch.equal(given, weight())
    assert seen is None or torch.equal(seen.gram, inputs().T @ inputs())


@each_quantizer
def test_settings_name_the_version_of_the_library_that_decides(name: str) -> None:
    library = LIBRARY[name].replace("_", "-")
    assert quantizer(name).settings[library] == version(library)
    assert quantizer(name).name == name


# ------------------------------------------------------------------------------ how good it is


@each_quantizer
def test_error_falls_with_bits(name: str) -> None:
    alike = [fmt for fmt in made_by(name) if fmt.group_size in (64, None) and fmt.name != "fp8"]
    alike = [fmt for fmt in alike if "channel" not in fmt.name and "fp4" not in fmt.name]
    alike = [fmt for fmt in alike if fmt.symmetric == alike[0].symmetric and "-dq" not in fmt.name]
    alike = [fmt for fmt in alike if fmt.container == alike[0].container]
    alike = [fmt for fmt in alike if fmt.packed == alike[0].packed]
    formats = sorted(alike, key=lambda fmt: fmt.bits)
    assert len(formats) > 1
    decoded = [decode(quantized(name)[fmt.name], fmt) for fmt in formats]
    in_weights = [relative_error(found, weight()) for found in decoded]
    in_outputs = [output_error(found) for found in decoded]
    assert in_weights == sorted(in_weights, reverse=True)
    assert in_outputs == sorted(in_outputs, reverse=True)
    assert len(set(in_weights)) == len(formats)


# Of Gaussian weights with 0.3 % outliers, measured once.
@each_packed_format
def test_error_is_of_the_size_that_its_bits_allow(name: str, fmt: Format) -> None:
    allowed = {2: 0.8, 3: 0.4, 4: 0.2, 5: 0.14, 6: 0.08, 8: 0.02}[fmt.bits]
    assert 0 < relative_error(decode(quantized(name)[fmt.name], fmt), weight()) < allowed


each_rounded = pytest.mark.parametrize(
    "fmt", [fmt for fmt in made_by("rounding") if fmt.number == "int"], ids=lambda fmt: fmt.name
)


@each_rounded
def test_rounding_takes_the_nearest_code_of_what_is_stored(fmt: Format) -> None:
    stored = quantized("rounding")[fmt.name]
    half = 2 ** (fmt.bits - 1)
    steps = weight() / per_column(scale_of(stored), fmt)
    steps = steps + per_column(zeros_of(stored, fmt), fmt)
    nearest = steps.round().clamp(-half, half - 1)
    tied = ((steps - steps.floor()) - 0.5).abs() < 1e-5
    assert torch.equal(codes_of(stored, fmt)[~tied].double(), nearest[~tied].double())


@each_rounded
def test_rounding_keeps_the_range_that_errs_least(fmt: Format) -> None:
    grouped = weight().unflatten(1, (-1, fmt.group_size or COLUMNS)).double()
    half, levels = 2 ** (fmt.bits - 1), 2**fmt.bits - 1
    errors = []
    for twentieths in range(12):
        low = grouped.amin(-1).clamp(max=0) * (1 - twentieths / 20)
        high = grouped.amax(-1).clamp(min=0) * (1 - twentieths / 20)
        if fmt.symmetric:
            scale, zero = torch.maximum(high, -low) * 2 / levels, torch.zeros_like(low)
        else:
            scale = (high - low) / levels
            zero = (-half - low / scale).round().clamp(-half, half - 1)
        scale = stored_scale(scale, fmt).double()[..., None]
        codes = (grouped / scale + zero[..., None]).round().clamp(-half, half - 1)
        errors.append(((codes - zero[..., None]) * scale - grouped).square().sum(-1))
    least = torch.stack(errors).amin(0)
    stored = quantized("rounding")[fmt.name]
    decoded = (codes_of(stored, fmt) - per_column(zeros_of(stored, fmt), fmt)) * per_column(
        scale_of(stored), fmt
    )
    found = (decoded - weight()).square().unflatten(1, (-1, fmt.group_size or COLUMNS)).sum(-1)
    # Float32 may move a weight that lies between two codes.
    torch.testing.assert_close(found, least, rtol=1e-2, atol=0)
    assert fmt.bits > 4 or float(least.sum()) < 0.99 * float(errors[0].sum())


def test_fp8_is_the_nearest_float_on_a_scale_that_spans_the_row() -> None:
    stored = quantized("rounding")["fp8"]
    largest = weight().abs().amax(-1, keepdim=True)
    torch.testing.assert_close(stored["weight_scale"].float() * 448, largest, rtol=2**-7, atol=0)
    codes = (weight() / stored["weight_scale"].float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(stored["weight"].float(), codes.float())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("prefix", ["int", "gptq"])
@pytest.mark.parametrize("name", [pytest.param("gptq", marks=installed("gptq"))])
def test_gptq_harms_outputs_less_than_rounding_on_correlated_inputs(
    name: str, prefix: str, bits: int
) -> None:
    fmt = FORMATS[f"{prefix}{bits}-g64"]
    ours = output_error(decode(quantized(name)[fmt.name], fmt))
    rounded = output_error(decode(quantized("rounding")[fmt.name], fmt))
    assert ours < 0.7 * rounded


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("prefix", ["int", "gptq"])
@pytest.mark.parametrize("name", [pytest.param("gptq", marks=installed("gptq"))])
def test_gptq_on_unrelated_inputs_takes_the_nearest_code_of_the_stored_scale(
    name: str, prefix: str, bits: int
) -> None:
    fmt, half = FORMATS[f"{prefix}{bits}-g64"], 2 ** (bits - 1)
    unrelated = InputStatistics(torch.eye(COLUMNS), COLUMNS)
    stored = quantizer(name).quantize(weight(), [fmt], unrelated)[fmt.name]
    steps = weight() / per_column(scale_of(stored), fmt)
    nearest = steps.round().clamp(-half, half - 1)
    tied = ((steps - steps.floor()) - 0.5).abs() < 1e-4
    assert torch.equal(codes_of(stored, fmt)[~tied].double(), nearest[~tied].double())


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("name", [pytest.param("gptq", marks=installed("gptq"))])
def test_gptq_clips_outliers_where_codes_are_few(name: str, bits: int) -> None:
    fmt = FORMATS[f"int{bits}-g64"]
    unrelated = InputStatistics(torch.eye(COLUMNS), COLUMNS)
    stored = quantizer(name).quantize(weight(), [fmt], unrelated)[fmt.name]
    largest = weight().unflatten(1, (-1, 64)).abs().amax(-1)
    reached = stored["weight_scale"].float() * (2**bits - 1) / 2
    assert float((reached < 0.98 * largest).double().mean()) > 0.5
    assert (reached > 0.4 * largest).all()


@pytest.mark.parametrize("name", [pytest.param("gptq", marks=installed("gptq"))])
def test_gptq_looks_at_the_inputs_it_is_given(name: str) -> None:
    fmt = FORMATS["int3-g64"]
    other = inputs().flip(1)
    stored = quantizer(name).quantize(weight(), [fmt], statistics_of(name, other))[fmt.name]
    assert output_error(decode(quantized(name)[fmt.name], fmt)) < 0.7 * output_error(
        decode(stored, fmt)
    )


@pytest.mark.parametrize("name", [pytest.param("gptq", marks=installed("gptq"))])
def test_gptq_depends_on_the_mean_of_the_inputs_and_not_on_their_number(name: str) -> None:
    fmt = FORMATS["int3-g64"]
    doubled = torch.cat([inputs(), inputs()])
    stored = quantizer(name).quantize(weight(), [fmt], statistics_of(name, doubled))[fmt.name]
    agree = (codes_of(stored, fmt) == codes_of(quantized(name)[fmt.name], fmt)).double().mean()
    assert agree > 0.99  # float32 sums of twice as many terms may move a tie


@pytest.mark.parametrize("name", [pytest.param("gptq", marks=installed("gptq"))])
def test_gptq_rounds_what_has_no_inputs_as_an_embedding(name: str) -> None:
    formats = [fmt for fmt in made_by(name) if fmt.container == "compressed-tensors"]
    stored = quantizer(name).quantize(weight(), formats, None)
    rounded = quantizer("rounding").quantize(weight(), formats, None)
    assert all(equal(stored[fmt.name], rounded[fmt.name]) for fmt in formats)


# ----------------------------------------------------------------------- decoded by the library


@each_packed_format
def test_codes_read_off_the_decoded_weight_pack_to_the_same_words(name: str, fmt: Format) -> None:
    if fmt.bits == 8 and not fmt.symmetric:
        return  # code minus zero-point has 9 bits, of which bf16 keeps 8
    stored = quantized(name)[fmt.name]
    zeros = zeros_of(stored, fmt)
    steps = decode(stored, fmt).double() / per_column(stored["weight_scale"], fmt)
    codes = (steps.round() + per_column(zeros, fmt)).to(torch.int8)
    zero_point = None if fmt.symmetric else zeros.to(torch.int8)
    assert equal(pack(codes, stored["weight_scale"], fmt, zero_point), stored)


@each_packed_format
def test_the_library_decompresses_the_very_weight_that_is_scored(name: str, fmt: Format) -> None:
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    stored = quantized(name)[fmt.name]
    scheme = QuantizationScheme(targets=["Linear"], weights=quantization_args(fmt))
    theirs = PackedQuantizationCompressor.decompress(dict(stored), scheme)["weight"]
    codes = codes_of(stored, fmt) - per_column(zeros_of(stored, fmt), fmt)
    by_hand = codes * per_column(stored["weight_scale"], fmt)
    assert torch.equal(decode(stored, fmt), theirs)
    assert torch.equal(theirs, by_hand.to(torch.bfloat16))


@pytest.mark.parametrize("fmt", ["nf4", "nf4-dq", "fp4", "fp4-dq"])
@pytest.mark.parametrize("name", [pytest.param("bitsandbytes", marks=installed("bitsandbytes"))])
def test_four_bits_decode_as_the_library_dequantizes(name: str, fmt: str) -> None:
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(
        weight().to(torch.bfloat16),
        blocksize=64,
        quant_type=fmt[:3],
        compress_statistics="dq" in fmt,
    )
    stored = quantized(name)[fmt]
    assert torch.equal(stored["weight"], packed)
    assert torch.equal(decode(stored, FORMATS[fmt]), functional.dequantize_4bit(packed, state))
    key = f"weight.quant_state.bitsandbytes__{fmt[:3]}"
    theirs = state.as_dict(packed=True)[key.removeprefix("weight.")]
    assert bytes(stored[key].tolist()).rstrip() == bytes(theirs.tolist())


@pytest.mark.parametrize("name", [pytest.param("bitsandbytes", marks=installed("bitsandbytes"))])
def test_int8_decodes_as_the_library_dequantizes(name: str) -> None:
    from bitsandbytes import functional

    codes, row_max, _ = functional.int8_vectorwise_quant(weight().to(torch.float16))
    stored = quantized(name)["int8"]
    assert torch.equal(stored["weight"], codes)
    theirs = functional.int8_vectorwise_dequant(codes, row_max).to(torch.bfloat16)
    assert torch.equal(decode(stored, FORMATS["int8"]), theirs)


# ------------------------------------------------------------------------------ degenerate input


@each_quantizer
def test_zero_groups_columns_and_rows_stay_finite_and_harm_nothing_else(name: str) -> None:
    holed = weight().clone()
    holed[3, :64] = 0
    holed[:, 5] = 0
    holed[9] = 0
    stored = quantizer(name).quantize(holed, made_by(name), statistics_of(name, inputs()))
    for fmt in made_by(name):
        decoded = decode(stored[fmt.name], fmt)
        assert decoded.isfinite().all()
        assert not decoded[9].any()
        rest = torch.ones(ROWS, COLUMNS, dtype=torch.bool)
        rest[3, :64] = rest[:, 5] = rest[9] = False
        whole = relative_error(decode(quantized(name)[fmt.name], fmt), weight())
        assert relative_error(decoded[rest], holed[rest]) < 1.3 * whole


@each_quantizer
def test_a_weight_of_zeros_decodes_to_zeros(name: str) -> None:
    zeros = torch.zeros(32, 64)
    seen = statistics_of(name, inputs()[:, :64])
    for fmt in made_by(name):
        stored = quantizer(name).quantize(zeros, [fmt], seen)[fmt.name]
        assert not decode(stored, fmt).any()


@each_quantizer
def test_an_input_that_is_always_zero_stays_finite(name: str) -> None:
    seen = inputs().clone()
    seen[:, 7] = 0
    stored = quantizer(name).quantize(weight(), made_by(name), statistics_of(name, seen))
    assert all(decode(stored[fmt.name], fmt).isfinite().all() for fmt in made_by(name))


@each_packed_format
@pytest.mark.parametrize("factor", [1e-6, 1e4])
def test_very_small_and_very_large_weights_keep_their_relative_error(
    name: str, fmt: Format, factor: float
) -> None:
    stored = quantizer(name).quantize(weight() * factor, [fmt], statistics_of(name, inputs()))
    found = relative_error(decode(stored[fmt.name], fmt), weight() * factor)
    usual = relative_error(decode(quantized(name)[fmt.name], fmt), weight())
    assert found == pytest.approx(usual, rel=0.1)


GPTQ_NAMES = [pytest.param(name, marks=installed(name)) for name in QUANTIZERS["gptq"]]


@pytest.mark.parametrize("factor", [0.03, 1e4])
@pytest.mark.parametrize("name", GPTQ_NAMES)
def test_gptq_weights_that_fp16_holds_keep_their_relative_error(name: str, factor: float) -> None:
    formats = [fmt for fmt in made_by(name) if fmt.container == "gptq"]
    stored = quantizer(name).quantize(weight() * factor, formats, statistics_of(name, inputs()))
    for fmt in formats:
        found = relative_error(decode(stored[fmt.name], fmt), weight() * factor)
        usual = relative_error(decode(quantized(name)[fmt.name], fmt), weight())
        assert found == pytest.approx(usual, rel=0.1)


@pytest.mark.parametrize("name", GPTQ_NAMES)
def test_gptq_weights_below_what_fp16_holds_vanish_and_those_above_are_refused(name: str) -> None:
    formats = [fmt for fmt in made_by(name) if fmt.container == "gptq"]
    seen = statistics_of(name, inputs())
    for fmt in formats:
        tiny = quantizer(name).quantize(weight() * 1e-8, [fmt], seen)[fmt.name]
        assert not decode(tiny, fmt).any()
        with pytest.raises(CheckError, match=rf"{fmt.name}.*fp16.*rule of the space"):
            quantizer(name).quantize(weight() * 1e6, [fmt], seen)


# ------------------------------------------------------------------------------ finding one


def test_each_container_has_a_default_quantizer() -> None:
    found = {container: get_quantizer(None, container).name for container in QUANTIZERS}
    assert found == {container: names[0] for container, names in QUANTIZERS.items()}


def test_an_unknown_quantizer_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UsageError, match="no quantizer 'roundng'; did you mean 'rounding'"):
        get_quantizer("roundng", "compressed-tensors")


def test_a_quantizer_for_another_container_is_refused() -> None:
    with pytest.raises(UsageError, match="'rounding' does not make bitsandbytes formats"):
        get_quantizer("rounding", "bitsandbytes")


@pytest.mark.parametrize("name", ["gptq", "bitsandbytes"])
def test_a_missing_library_is_a_usage_error_that_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, LIBRARY[name], None)
    with pytest.raises(UsageError, match=rf"needs? {LIBRARY[name]}.*pip install .*{name}"):
        get_quantizer(name, CONTAINER[name])


def test_auto_gptqs_absence_is_answered_with_the_environment_that_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "auto_gptq", None)
    with pytest.raises(UsageError, match=r"needs auto-gptq and .*make test-autogptq builds"):
        get_quantizer("auto-gptq", "gptq")
