"""What a bank does not take: formats that do not fit, broken inputs, unpromised tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from banks import INT2, Calibrated, Counting, files, unfinished_in, weights_in
from torch import Tensor

from mpsearch.bank import Bank
from mpsearch.calibration import Calibration, WatchedInputs
from mpsearch.errors import CheckError, UsageError
from mpsearch.formats import BF16, FORMATS
from mpsearch.layers import Layer
from mpsearch.models import Model
from mpsearch.quantizers import InputStatistics
from mpsearch.quantizers.rounding import Rounding
from mpsearch.wanted import Wanted, check_formats


def test_inputs_that_are_nan_name_the_layer(
    monkeypatch: pytest.MonkeyPatch, tiny: Model, wanted: Wanted, tmp_path: Path
) -> None:
    def broken(seen: WatchedInputs) -> dict[str, InputStatistics]:
        gram = torch.eye(64)
        gram[3, 3] = float("nan")
        return {name: InputStatistics(gram, 8) for name in seen._read}

    monkeypatch.setattr(WatchedInputs, "statistics", property(broken))
    with pytest.raises(CheckError, match=rf"inputs of '{tiny.layers[0].name}' .* in 1 of 64"):
        Bank(tiny, Calibrated(), Calibration(2, 4), root=tmp_path).build(wanted)
    assert not weights_in(tmp_path)


def test_input_columns_that_are_never_used_are_counted(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tiny: Model,
    wanted: Wanted,
    tmp_path: Path,
) -> None:
    def dead(seen: WatchedInputs) -> dict[str, InputStatistics]:
        grams = {layer.name: torch.eye(layer.columns) for layer in seen._read.values()}
        if tiny.layers[2].name in grams:
            grams[tiny.layers[2].name][5, 5] = 0
        return {name: InputStatistics(gram, 8) for name, gram in grams.items()}

    monkeypatch.setattr(WatchedInputs, "statistics", property(dead))
    Bank(tiny, Calibrated(), Calibration(2, 4), root=tmp_path).build(wanted)
    asked = {layer.name for layer, fmt in wanted if fmt.quantized}
    assert f"1 of {len(asked)} layers have input columns" in caplog.text


def shorter(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**stored, "weight_packed": stored["weight_packed"][:, :-1]}


def wider(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**stored, "weight_scale": stored["weight_scale"].float()}


def fewer(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in stored.items() if name != "weight_shape"}


def more(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**stored, "weight_zero_point": torch.zeros(1)}


@pytest.mark.parametrize("spoil", [shorter, wider, fewer, more])
def test_tensors_other_than_promised_are_refused_and_not_written(
    tiny: Model, tmp_path: Path, spoil: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> None:
    quantizer = Counting(lambda call, made: {name: spoil(t) for name, t in made.items()})
    with pytest.raises(CheckError, match=r"quantizer 'counting' made .* int2-g64 stores"):
        Bank(tiny, quantizer, root=tmp_path).build([(tiny.layers[0], INT2)])
    assert not weights_in(tmp_path)
    assert not unfinished_in(tmp_path)


@pytest.mark.parametrize(
    ("fmt", "nearest"), [("int4-g64", "int4-g32"), ("int3-g128-asym", "int3-g32-asym")]
)
def test_groups_that_do_not_divide_the_columns_are_refused_with_the_nearest_that_do(
    tiny: Model, tmp_path: Path, fmt: str, nearest: str
) -> None:
    ragged = Layer("model.layers.0.mlp.down_proj", 64, 96)
    quantizer = Counting()
    with pytest.raises(UsageError, match=f"'{fmt}' cannot hold .* 96 columns; use {nearest},"):
        Bank(tiny, quantizer, root=tmp_path).build([(ragged, FORMATS[fmt])])
    assert not quantizer.calls
    assert not files(tmp_path)


def test_a_format_that_the_quantizer_does_not_make_is_refused(tiny: Model, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="quantizer 'counting' does not make format 'nf4'"):
        Bank(tiny, Counting(), root=tmp_path).build([(tiny.layers[0], FORMATS["nf4"])])


@pytest.mark.parametrize(("rows", "columns"), [(48, 64), (64, 80), (31, 64)])
def test_sides_that_gptq_words_do_not_fill_are_refused_in_one_line(rows: int, columns: int) -> None:
    fmt = FORMATS["gptq4-g32"]
    check_formats(Rounding(), [(Layer("a.b", 96, 64), fmt), (Layer("a.b", rows, columns), BF16)])
    with pytest.raises(UsageError, match=rf"'gptq4-g32' cannot hold .*a.b.*{rows} x {columns}"):
        check_formats(Rounding(), [(Layer("a.b", rows, columns), fmt)])
