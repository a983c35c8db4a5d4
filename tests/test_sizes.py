"""Budgets: parsing sizes exactly, writing them readably, refusing what cannot be reached."""

from __future__ import annotations

from decimal import Decimal
from math import floor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpsearch.errors import InfeasibleError, UsageError
from mpsearch.sizes import check_reachable, format_size, parse_size

UNITS = {
    "B": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("96MiB", 100_663_296),
        ("96 MiB", 100_663_296),
        ("  96\tmib ", 100_663_296),
        ("96MB", 96_000_000),
        ("1.5GB", 1_500_000_000),
        (".5kB", 500),
        ("12GiB", 12_884_901_888),
        ("1TB", 10**12),
        ("1TiB", 2**40),
        ("7B", 7),
        ("1.9B", 1),
        ("+3 KiB", 3072),
        ("1e3 KB", 1_000_000),
        ("103.7MiB", 108_737_331),
    ],
)
def test_a_size_is_a_number_and_a_unit(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("96", "has no unit"),
        ("96 parsecs", "has the unknown unit 'parsecs'"),
        ("96Mib/s", "is not a number and a unit"),
        ("96Mb1", "is not a number and a unit"),
        ("MiB", "is not a number and a unit"),
        ("", "is not a number and a unit"),
        ("1.2.3MB", "is not a number and a unit"),
        ("1,5GB", "is not a number and a unit"),
        ("nan MB", "is not a number and a unit"),
        ("inf", "is not a number and a unit"),
        ("0MB", "is not a positive, reachable size"),
        ("-5MB", "is not a positive, reachable size"),
        ("0.5B", "is not a positive, reachable size"),
        ("1e400MB", "is not a positive, reachable size"),
    ],
)
def test_any_other_text_is_refused_in_one_line_that_says_how(text: str, fault: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_size(text)
    message = str(caught.value)
    assert message.startswith(f"size '{text}' {fault}")
    assert message.endswith("such as 96MiB, 1.5GB or 12GiB (MiB = 2^20, MB = 10^6)")
    assert "\n" not in message


def test_decimal_units_lose_no_byte_to_binary_fractions() -> None:
    assert parse_size("1.001kB") == 1001  # 1.001 * 1000 is 1000.9999999999999 in floating point


@given(st.decimals(0, 5000, places=3).filter(lambda n: n > 0), st.sampled_from(sorted(UNITS)))
@settings(deadline=None, max_examples=300)
def test_a_size_is_the_exact_product_rounded_down(number: Decimal, unit: str) -> None:
    exact = floor(number * UNITS[unit])
    if exact > 0:
        assert parse_size(f"{number:f} {unit}") == exact


@given(st.integers(1, 10**15), st.booleans())
@settings(deadline=None, max_examples=200)
def test_formatting_and_parsing_give_a_size_back_to_two_decimals(size: int, spaced: bool) -> None:
    text = format_size(size)
    again = parse_size(text if spaced else text.replace(" ", ""))
    unit = max(factor for factor in UNITS.values() if factor == 1 or factor <= size)
    assert abs(again - size) <= 0.005 * unit + 1
    if size < 1024:
        assert again == size


@given(st.integers(1, 10**15), st.integers(0, 10**13))
@settings(deadline=None, max_examples=200)
def test_a_larger_size_never_reads_smaller(size: int, more: int) -> None:
    assert parse_size(format_size(size)) <= parse_size(format_size(size + more))


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (103_201_243, "98.42 MiB"),
        (2**30, "1.00 GiB"),
        (1.5 * 2**40, "1.50 TiB"),
        (-2048, "-2.00 KiB"),
    ],
)
def test_sizes_are_written_in_the_largest_binary_unit_above_one(size: float, text: str) -> None:
    assert format_size(size) == text


def test_the_smallest_size_and_anything_above_it_is_reachable() -> None:
    for budget_bytes in (1000, 1001, 5000, 10**12):
        check_reachable(budget_bytes, 1000, 5000, "x")


def test_a_byte_below_the_smallest_is_refused_with_the_range_and_the_way_out() -> None:
    with pytest.raises(InfeasibleError) as caught:
        check_reachable(1_048_575, 1_048_576, 3 * 2**20, "allow int2-g64")
    message = str(caught.value)
    assert "(1,048,575 bytes)" in message
    assert "1.00 MiB (1,048,576 bytes) to 3.00 MiB" in message
    assert message.endswith("; allow int2-g64")
    assert "\n" not in message
