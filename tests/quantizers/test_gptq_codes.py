"""GPTQ: it uses its inputs, clips where codes are few, and survives a singular Hessian."""

from __future__ import annotations

import pytest
import torch
from contract import (
    COLUMNS,
    codes_of,
    equal,
    inputs,
    installed,
    made_by,
    output_error,
    per_column,
    quantized,
    quantizer,
    relative_error,
    scale_of,
    statistics_of,
    weight,
)
from torch import Tensor

from mpsearch.codecs import decode
from mpsearch.errors import CheckError
from mpsearch.formats import FORMATS
from mpsearch.quantizers import QUANTIZERS, InputStatistics


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


def error_of(stored: Tensor, seen: Tensor) -> float:
    """Relative error of the outputs on some inputs."""
    return relative_error(seen.double() @ stored.double().T, seen @ weight().T)


@pytest.mark.parametrize("name", [pytest.param("gptq", marks=installed("gptq"))])
def test_gptq_zeroes_the_columns_that_no_input_uses_and_harms_no_others(name: str) -> None:
    seen, dead = inputs().clone(), [0, 7, 100, 191]
    seen[:, dead] = 0
    made = quantizer(name).quantize(weight(), made_by(name), statistics_of(name, seen))
    for fmt in (fmt for fmt in made_by(name) if fmt.number == "int"):
        decoded = decode(made[fmt.name], fmt)
        assert not decoded[:, dead].any()
        usual = output_error(decode(quantized(name)[fmt.name], fmt))
        assert error_of(decoded, seen) < 1.15 * usual


@pytest.mark.parametrize("tokens", [1, 8, COLUMNS // 2])
@pytest.mark.parametrize("name", [pytest.param("gptq", marks=installed("gptq"))])
def test_gptq_with_fewer_tokens_than_columns_errs_less_on_them_than_rounding(
    name: str, tokens: int
) -> None:
    seen = inputs()[:tokens]
    formats = [fmt for fmt in made_by(name) if fmt.number == "int"]
    made = quantizer(name).quantize(weight(), formats, statistics_of(name, seen))
    rounded = quantizer("rounding").quantize(weight(), formats, None)
    for fmt in formats:
        decoded = decode(made[fmt.name], fmt)
        nearest = decode(rounded[fmt.name], fmt)
        assert decoded.isfinite().all()
        assert error_of(decoded, seen) < error_of(nearest, seen)
        # What few tokens leave open does not run away.
        assert relative_error(decoded, weight()) < 3 * relative_error(nearest, weight())
