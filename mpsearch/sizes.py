"""Sizes in bytes: parsing what users write, and refusing what cannot be reached."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

from mpsearch.errors import InfeasibleError, UsageError

_UNITS = {
    "B": 1,
    **{f"{prefix}B": 10 ** (3 * power) for power, prefix in enumerate("kMGT", start=1)},
    **{f"{prefix}iB": 2 ** (10 * power) for power, prefix in enumerate("KMGT", start=1)},
}
_BY_LOWER = {unit.lower(): unit for unit in _UNITS}
_HINT = "write a number and a unit, such as 96MiB, 1.5GB or 12GiB (MiB = 2^20, MB = 10^6)"


def parse_size(text: str) -> int:
    """Bytes in a size such as `96 MiB`, rounded down.

    Raises:
        UsageError: no unit, an unknown unit, or not a positive number.
    """
    found = re.fullmatch(r"\s*([+-]?[\d.]+(?:e[+-]?\d+)?)\s*([A-Za-z]*)\s*", text, re.IGNORECASE)
    try:
        number = Decimal(found.group(1)) if found else None
    except InvalidOperation:
        number = None
    if found is None or number is None:
        raise UsageError(f"size '{text}' is not a number and a unit; {_HINT}")
    unit = _BY_LOWER.get(found.group(2).lower())
    if unit is None:
        fault = f"has the unknown unit '{found.group(2)}'" if found.group(2) else "has no unit"
        raise UsageError(f"size '{text}' {fault}; {_HINT}")
    size_bytes = int(number * _UNITS[unit]) if number < 10**15 else 0
    if size_bytes <= 0:
        raise UsageError(f"size '{text}' is not a positive, reachable size; {_HINT}")
    return size_bytes


def format_size(size_bytes: float) -> str:
    """`98.42 MiB`; two decimals in the largest binary unit that keeps the number above one."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if abs(size_bytes) >= _UNITS[unit]:
            return f"{size_bytes / _UNITS[unit]:.2f} {unit}"
    return f"{size_bytes:.0f} B"


def check_reachable(budget_bytes: int, smallest_bytes: int, largest_bytes: int, way: str) -> None:
    """Refuse a budget that no assignment meets.

    Args:
        budget_bytes: what the user allows.
        smallest_bytes: stored bytes of the smallest assignment, kept weights included.
        largest_bytes: the same for the largest.
        way: one way out, appended to the message.
    Raises:
        InfeasibleError: with the reachable range.
    """
    if budget_bytes < smallest_bytes:
        raise InfeasibleError(
            f"budget {format_size(budget_bytes)} ({budget_bytes:,} bytes) is below the smallest "
            f"reachable size: this space reaches {format_size(smallest_bytes)} "
            f"({smallest_bytes:,} bytes) to {format_size(largest_bytes)}; {way}"
        )
