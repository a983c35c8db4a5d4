"""One contract for all quantizers, in all their formats; see `mpsearch.quantizers.Quantizer`."""

from __future__ import annotations

import sys
from importlib.metadata import version

import pytest
import torch
from contract import (
    COLUMNS,
    CONTAINER,
    LIBRARY,
    ROWS,
    codes_of,
    each_format,
    each_packed_format,
    each_quantizer,
    equal,
    inputs,
    installed,
    made_by,
    output_error,
    per_column,
    quantized,
    quantizer,
    relative_error,
    statistics_of,
    weight,
    zeros_of,
)

from mpsearch.codecs import decode, pack, quantization_args
from mpsearch.errors import CheckError, UsageError
from mpsearch.formats import FORMATS, Format
from mpsearch.layers import Layer
from mpsearch.quantizers import QUANTIZERS, get_quantizer

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
    usual = (32,) if CONTAINER[name] == "gguf" else (64, None)
    alike = [fmt for fmt in made_by(name) if fmt.group_size in usual and fmt.name != "fp8"]
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


@pytest.mark.parametrize("fmt", [fmt.name for fmt in made_by("gguf")])
def test_gguf_blocks_decode_as_the_library_dequantizes(fmt: str) -> None:
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType[fmt.upper()]
    theirs = quants.quantize(weight().numpy(), kind)
    stored = quantized("gguf")[fmt]
    assert torch.equal(stored["weight"], torch.from_numpy(theirs))
    dequantized = torch.from_numpy(quants.dequantize(theirs, kind))
    assert torch.equal(decode(stored, FORMATS[fmt]), dequantized.to(torch.bfloat16))
    largest = weight().unflatten(1, (-1, 32)).abs().amax(-1).repeat_interleave(32, 1)
    steps = {"q4_0": 8, "q4_1": 15, "q5_0": 16, "q5_1": 31, "q8_0": 127}[fmt]
    step = largest * (1 if FORMATS[fmt].symmetric else 2) / steps
    # Half a step, or a whole one where the codes of one sign end before the largest weight.
    assert ((dequantized - weight()).abs() <= step * 1.01).all()


def test_weights_beyond_fp16_are_refused_by_gguf_in_one_line() -> None:
    large = weight().clone()
    large[3, 5] = 70_000
    with pytest.raises(CheckError, match="scales are fp16, which cannot hold weights of 7e"):
        quantizer("gguf").quantize(large, made_by("gguf"), None)


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
