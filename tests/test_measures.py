"""The table of sensitivities: ranks, what is shown for a group, its file, and bad values."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from mpsearch.errors import CheckError, RunError
from mpsearch.measures import MEASURES, OF_GROUPS, OF_PAIRS, Sensitivity, spearman

GROUPS = ("m.0.a", "m.0.b", "m.1.a")
FORMATS = ("int2-g64", "int3-g64", "int4-g64", "bf16")
PAIRS = list(product(GROUPS, FORMATS))


def made(**changes: Any) -> Sensitivity:
    """Every measure, falling with the bits and rising with the group."""
    by_pair = {
        (group, fmt): (GROUPS.index(group) + 1) * (0.0 if fmt == "bf16" else 4.0 ** -int(fmt[3]))
        for group, fmt in PAIRS
    }
    of_pairs: dict[str, Any] = {name: dict(by_pair) for name in OF_PAIRS}
    of_groups: dict[str, Any] = {
        name: {group: float(number + 1) for number, group in enumerate(GROUPS)}
        for name in OF_GROUPS
    }
    return Sensitivity(**{**of_pairs, **of_groups, "provenance": {"seed": 0}, **changes})


# ------------------------------------------------------------------------------------ ranks


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 2, 3, 4, 5], [1, 3, 2, 5, 4], 0.8),  # 1 - 6 * 4 / (5 * 24)
        ([1, 2, 2, 3], [1, 2, 3, 4], 0.9486832980505138),  # 4.5 / sqrt(4.5 * 5)
        ([1, 2, 2, 3], [5, 7, 7, 9], 1.0),
    ],
)
def test_spearman_by_hand(a: list[float], b: list[float], expected: float) -> None:
    assert spearman(a, b) == pytest.approx(expected)


def test_spearman_looks_at_ranks_alone() -> None:
    assert spearman([1, 2, 3, 4], [1e-9, 1e-3, 5, 1e12]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("a", "b"), [([1, 1, 1], [1, 2, 3]), ([1, 2], [7, 7]), ([1], [2]), ([], [])]
)
def test_what_has_no_ranks_has_no_correlation(a: list[float], b: list[float]) -> None:
    assert spearman(a, b) is None


def test_measures_are_compared_over_pairs_and_over_groups() -> None:
    rising = {group: float(number) for number, group in enumerate(GROUPS)}
    falling = {group: -value for group, value in rising.items()}
    found = {
        (row.a, row.b, row.over): (row.pairs, row.spearman)
        for row in made(drift=falling).correlations()
    }
    # bf16, where all are zero, never counts.
    assert found["fisher_nats", "perturb_nats", "all"] == (9, pytest.approx(1))
    assert found["fisher_nats", "perturb_nats", "3 bits and more"] == (6, pytest.approx(1))
    assert found["fisher_nats", "perturb_nats", "int2-g64"] == (3, pytest.approx(1))
    assert found["weight_error", "drift", "int4-g64"] == (3, pytest.approx(-1))
    assert found["outlier_ratio", "drift", "groups"] == (3, pytest.approx(-1))
    assert ("weight_error", "drift", "all") not in found
    assert not any("bf16" in key for key in found)


def test_a_group_without_a_value_is_left_out_of_the_comparison() -> None:
    some = {"m.0.a": 1.0, "m.1.a": 2.0}
    found = [row for row in made(drift=some).correlations() if row.b == "drift"]
    assert {row.pairs for row in found} == {2}


def test_equal_sensitivities_have_no_correlation_and_are_kept() -> None:
    table = made(fisher_nats=dict.fromkeys(PAIRS, 1.0))
    assert {row.spearman for row in table.correlations() if row.a == "fisher_nats"} == {None}
    assert Sensitivity.from_json(json.loads(json.dumps(table.to_json()))) == table


# ------------------------------------------------------------------------ a value a group


def test_a_group_is_shown_in_the_middle_format() -> None:
    table = made()
    assert table.formats == FORMATS
    assert table.middle_format == "int4-g64"
    assert table.of_groups("fisher_nats") == {
        group: table.fisher_nats[group, "int4-g64"] for group in GROUPS
    }
    assert table.of_groups("weight_error", "int2-g64") == {
        group: table.weight_error[group, "int2-g64"] for group in GROUPS
    }
    assert table.of_groups("drift", "int2-g64") == table.drift


def test_one_format_is_its_own_middle() -> None:
    only = {(group, "int8-g64"): 1.0 for group in GROUPS}
    table = Sensitivity(only, only, {})
    assert table.middle_format == "int8-g64"
    assert table.measures == ("fisher_nats", "weight_error")


# ------------------------------------------------------------------------------------ the file


@pytest.mark.parametrize("left_out", [(), ("perturb_nats",), ("output_error", *OF_GROUPS)])
def test_a_saved_table_comes_back_equal(left_out: tuple[str, ...], tmp_path: Path) -> None:
    table = made(**{name: {} for name in left_out})
    table.save(tmp_path / "table.json")
    assert Sensitivity.load(tmp_path / "table.json") == table
    assert table.measures == tuple(name for name in MEASURES if name not in left_out)


def test_a_table_from_before_the_other_measures_is_read(tmp_path: Path) -> None:
    rows = [
        {"group": group, "format": fmt, "fisher_nats": 1.0, "weight_error": 0.5}
        for group, fmt in PAIRS
    ]
    (tmp_path / "old.json").write_text(json.dumps({"provenance": {}, "rows": rows}))
    table = Sensitivity.load(tmp_path / "old.json")
    assert table.measures == ("fisher_nats", "weight_error")
    assert table.fisher_nats == dict.fromkeys(PAIRS, 1.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("measure", MEASURES)
def test_a_value_that_is_no_number_is_named(measure: str, value: float) -> None:
    key: Any = ("m.0.b", "int3-g64") if measure in OF_PAIRS else "m.0.b"
    with pytest.raises(CheckError) as caught:
        made(**{measure: {**getattr(made(), measure), key: value}})
    assert f"the {measure} of m.0.b" in str(caught.value)
    assert ("int3-g64" in str(caught.value)) == (measure in OF_PAIRS)
    assert str(value) in str(caught.value)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    with pytest.raises(RunError, match=r"table\.json' cannot be used: No such file"):
        Sensitivity.load(path)
    made().save(path)
    whole = path.read_text()
    for damage in (whole[:200], "{}", "[]", "null", '{"rows": [{"group": "a"}], "provenance": {}}'):
        path.write_text(damage)
        with pytest.raises(RunError, match=r"table\.json' cannot be used: it is cut short or"):
            Sensitivity.load(path)
    content = json.loads(whole)
    content["rows"][4]["weight_error"] = float("nan")
    path.write_text(json.dumps(content))
    with pytest.raises(RunError, match=r"the weight_error of m\.0\.b in int2-g64 is nan"):
        Sensitivity.load(path)
