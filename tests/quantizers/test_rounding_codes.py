"""Rounding: the nearest code of what is stored, on the range that errs least."""

from __future__ import annotations

import pytest
import torch
from contract import (
    codes_of,
    in_groups,
    made_by,
    per_column,
    quantized,
    scale_of,
    weight,
    zeros_of,
)

from mpsearch.codecs import stored_scale
from mpsearch.formats import Format
from mpsearch.quantizers import rounding

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
    grouped = in_groups(weight(), fmt).double()
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
    found = in_groups((decoded - weight()).square(), fmt).sum(-1)
    # Float32 may move a weight that lies between two codes.
    torch.testing.assert_close(found, least, rtol=1e-2, atol=0)
    assert fmt.bits > 4 or float(least.sum()) < 0.99 * float(errors[0].sum())


def test_fp8_is_the_nearest_float_on_a_scale_that_spans_the_row() -> None:
    stored = quantized("rounding")["fp8"]
    largest = weight().abs().amax(-1, keepdim=True)
    torch.testing.assert_close(stored["weight_scale"].float() * 448, largest, rtol=2**-7, atol=0)
    codes = (weight() / stored["weight_scale"].float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(stored["weight"].float(), codes.float())


def test_slices_of_a_weight_get_the_codes_that_it_gets_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    formats, whole = made_by("rounding"), quantized("rounding")
    monkeypatch.setattr(rounding, "_SLICE", weight().shape[1] * 5)  # does not divide the rows
    assert len(weight()) % 5
    sliced = rounding.Rounding().quantize(weight(), formats, None)
    for fmt in formats:
        assert set(sliced[fmt.name]) == set(whole[fmt.name])
        for name, tensor in whole[fmt.name].items():
            assert torch.equal(sliced[fmt.name][name].float(), tensor.float()), (fmt.name, name)
