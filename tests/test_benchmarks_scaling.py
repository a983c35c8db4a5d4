"""What the scaling benchmark fits, and that its assignments are what its protocol says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from scaling import Ground, build_model, exponents, memory_line


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
