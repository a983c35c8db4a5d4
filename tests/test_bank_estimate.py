"""How long a bank will take is told from a layer of each shape, before the others are begun."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from banks import INT2, INT4, Counting, Stored, weights_in
from torch import Tensor

from mpsearch import bank as bank_module
from mpsearch.bank import Bank
from mpsearch.formats import Format
from mpsearch.models import Model
from mpsearch.quantizers import InputStatistics
from mpsearch.wanted import Wanted


class Clocked(Counting):
    """Takes a second a thousand weights and format, and fifty more the first time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def quantize(
        self, weight: Tensor, formats: Sequence[Format], statistics: InputStatistics | None
    ) -> Stored:
        self.now += self.seconds(weight.numel(), len(formats)) + (0 if self.calls else 50)
        return super().quantize(weight, formats, statistics)

    @staticmethod
    def seconds(weights: int, formats: int) -> float:
        return weights / 1000 * formats


@pytest.fixture
def quantizer(monkeypatch: pytest.MonkeyPatch) -> Clocked:
    made = Clocked()
    clock = SimpleNamespace(perf_counter=lambda: made.now, sleep=time.sleep)
    monkeypatch.setattr(bank_module, "time", clock)
    return made


def all_of(model: Model) -> Wanted:
    return [(layer, fmt) for layer in model.layers for fmt in (INT2, INT4)]


def told_by(bank: Bank, wanted: Wanted) -> tuple[list[float], int]:
    """What was estimated, and how many layers were made before."""
    told: list[float] = []
    made_before = 0

    def estimated(seconds: float) -> None:
        nonlocal made_before
        told.append(seconds)
        made_before = len(bank.quantizer.calls)  # type: ignore[attr-defined]

    bank.build(wanted, estimated=estimated)
    return told, made_before


def test_the_estimate_is_what_the_rest_then_takes(
    tiny: Model, quantizer: Clocked, tmp_path: Path
) -> None:
    bank = Bank(tiny, quantizer, root=tmp_path)
    (seconds,), made_before = told_by(bank, all_of(tiny))
    shapes = {(layer.rows, layer.columns) for layer in tiny.layers}
    assert made_before == 1 + len(shapes)  # the first, whose time says nothing
    weights = sum(layer.weights for layer in tiny.layers)
    made = [tiny.layers[0].weights, *(rows * columns for rows, columns in shapes)]
    assert seconds == pytest.approx(Clocked.seconds(weights - sum(made), 2))
    assert len(quantizer.calls) == len(tiny.layers)
    assert len(weights_in(tmp_path)) == 2 * len(tiny.layers)


def test_layers_that_lack_fewer_formats_are_timed_on_their_own(
    tiny: Model, quantizer: Clocked, tmp_path: Path
) -> None:
    bank = Bank(tiny, quantizer, root=tmp_path)
    wanted = [pair for pair in all_of(tiny) if pair[0].rows == pair[0].columns]
    assert len(wanted) == 8  # q and o of both blocks
    bank.build([pair for pair in wanted[2:] if pair[1] is INT4])
    quantizer.calls.clear()
    (seconds,), _ = told_by(bank, wanted)
    assert seconds == pytest.approx(Clocked.seconds(wanted[0][0].weights, 1) * 2)


def test_processes_share_the_time(
    tiny: Model, quantizer: Clocked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (alone,), _ = told_by(Bank(tiny, quantizer, root=tmp_path / "one"), all_of(tiny))
    quantizer.calls.clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        bank = Bank(tiny, quantizer, root=tmp_path / "two")
        (together,), _ = told_by(bank, all_of(tiny))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert together == pytest.approx(alone / 2)
    assert len(weights_in(tmp_path / "two")) == 2 * len(tiny.layers)


@pytest.mark.parametrize("layers", [0, 1])
def test_nothing_is_estimated_where_nothing_is_left(
    tiny: Model, quantizer: Clocked, tmp_path: Path, layers: int
) -> None:
    told, _ = told_by(Bank(tiny, quantizer, root=tmp_path), all_of(tiny)[: 2 * layers])
    assert told == []
    assert len(quantizer.calls) == layers


def test_it_is_not_measured_where_nobody_asks(
    tiny: Model, quantizer: Clocked, tmp_path: Path
) -> None:
    stages: list[str] = []
    report: Callable[[str, int, int], None] = lambda stage, done, total: stages.append(stage)  # noqa: E731
    Bank(tiny, quantizer, root=tmp_path).build(all_of(tiny), report)
    assert set(stages) == {"quantizing (counting)"}
