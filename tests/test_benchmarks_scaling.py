"""What the scaling benchmark fits, and that its assignments are what its protocol says."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import scaling
from scaling import Ground, build_model, exponents, least_seconds, memory_line, rows_of


def test_the_exponent_of_a_power_law_is_its_own_and_a_fixed_cost_hides_in_small_values() -> None:
    rows = [
        {"measured": "evaluation", "varied": varied, "value": value, "seconds": seconds}
        for value in (1, 2, 4, 8, 16)
        for varied, seconds in (("facts", 3.0 * value**1.5), ("layers", 10.0 + value))
    ]
    facts, layers = exponents(rows)
    assert (facts["varied"], layers["varied"]) == ("facts", "layers")
    assert facts["exponent"] == pytest.approx(1.5)
    assert facts["exponent_of_larger_half"] == pytest.approx(1.5)
    assert layers["exponent"] < layers["exponent_of_larger_half"] < 1


def test_the_memory_line_separates_what_is_fixed() -> None:
    rows = [{"weights_bytes": size, "peak_bytes": 700 + 3 * size} for size in (100, 400, 200)]
    assert memory_line(rows) == {
        "bytes_a_weight_byte": pytest.approx(3),
        "fixed_bytes": pytest.approx(700),
        "least_step": pytest.approx(3),
        "most_step": pytest.approx(3),
    }


def test_assignments_in_turn_hold_every_format_and_differ_in_every_group(tmp_path: Path) -> None:
    ground = Ground(str(tmp_path), build_model(1, hidden=64), facts=5, formats=2)
    assert len(ground.asked) == 5
    one, other = ground.shifted(0), ground.shifted(1)
    assert set(one.values()) == {"int4-g64", "int8-g64"}
    assert all(one[name] != other[name] for name in ground.space.options)
    with pytest.raises(ValueError, match="search facts, 5000 are wanted"):
        Ground(str(tmp_path), ground.model, facts=5000, formats=2)


def test_works_take_turns_and_the_least_of_each_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, lasts, order = 0.0, {"a": [5.0, 2.0, 3.0], "b": [1.0, 4.0, 7.0]}, []

    def work(name: str) -> None:
        nonlocal clock
        clock += lasts[name][order.count(name)]
        order.append(name)

    monkeypatch.setattr(scaling.time, "process_time", lambda: clock)
    works = [lambda name=name: work(name) for name in lasts]
    assert least_seconds(works, 3) == [2.0, 1.0]
    assert order == ["a", "b"] * 3


@pytest.mark.parametrize("measured", scaling.MEASURES)
def test_each_value_gets_a_row(measured: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "VALUES", {"facts": (2, 4)})
    monkeypatch.setattr(scaling, "MIDDLE", {"facts": 2, "layers": 7, "formats": 2})
    rows = rows_of(measured, "facts", 1)
    assert [(row["measured"], row["varied"], row["value"]) for row in rows] == [
        (measured, "facts", 2), (measured, "facts", 4),
    ]  # fmt: skip
    assert all(row["seconds"] > 0 for row in rows)


def test_an_evaluation_runs_every_block_in_every_turn(tmp_path: Path) -> None:
    ground = Ground(str(tmp_path), build_model(2, hidden=64), facts=5, formats=2)
    ran: list[str] = []
    for name, module in ground.model.module.named_modules():
        if name.endswith("down_proj"):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    with ExitStack() as stack:
        evaluate = scaling.evaluation(ground, stack)
        for _ in range(3):
            ran.clear()
            evaluate()
            assert len(set(ran)) == 2
