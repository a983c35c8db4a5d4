"""Which (layer, format) pairs are asked of a bank, whether they can be had, and their digest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from mpsearch.errors import UsageError
from mpsearch.formats import FORMATS, Format
from mpsearch.layers import Layer
from mpsearch.quantizers import Quantizer

Wanted = list[tuple[Layer, Format]]


def digest_of(wanted: Iterable[tuple[Layer, Format]]) -> str:
    """SHA-256 of which layer is quantized to which format, whatever the order."""
    named = sorted(f"{layer.name} {fmt.name}\n" for layer, fmt in wanted if fmt.quantized)
    return hashlib.sha256("".join(named).encode()).hexdigest()


def holdings(wanted: Wanted, missing: Wanted) -> dict[str, tuple[int, int, int]]:
    """By format: files there, files wanted, and stored bytes of those that are there."""
    held: dict[str, tuple[int, int, int]] = {}
    lacking = set(missing)
    for layer, fmt in wanted:
        if fmt.quantized:
            there = (layer, fmt) not in lacking
            have, of, size = held.get(fmt.name, (0, 0, 0))
            held[fmt.name] = (have + there, of + 1, size + there * fmt.layer_bytes(layer))
    return held


def check_formats(quantizer: Quantizer, wanted: Iterable[tuple[Layer, Format]]) -> None:
    """Raise `UsageError` for a format that the quantizer or a layer's shape cannot take."""
    for layer, fmt in wanted:
        if fmt.quantized and not quantizer.makes(fmt):
            raise UsageError(
                f"quantizer '{quantizer.name}' does not make format '{fmt.name}'; use another, or "
                "leave the format out of the space"
            )
        if layer.rows % fmt.side_multiple or layer.columns % fmt.side_multiple:
            raise UsageError(
                f"format '{fmt.name}' cannot hold layer '{layer.name}': its {layer.rows} x "
                f"{layer.columns} weights are no multiples of {fmt.side_multiple} on both sides; "
                "give it bf16 by a rule of the space"
            )
        if not fmt.fits(layer):
            other = _nearest_fit(fmt, layer)
            raise UsageError(
                f"format '{fmt.name}' cannot hold layer '{layer.name}': groups of "
                f"{fmt.group_size} do not divide its {layer.columns} columns; "
                + (f"use {other.name}, or " if other else "")
                + "give the layer bf16 by a rule of the space"
            )


def _nearest_fit(fmt: Format, layer: Layer) -> Format | None:
    """The same kind of format with the largest groups below its own that divide the columns."""
    alike = [
        other
        for other in FORMATS.values()
        if (other.container, other.bits, other.symmetric, other.number, other.packed)
        == (fmt.container, fmt.bits, fmt.symmetric, fmt.number, fmt.packed)
        and other.fits(layer)
        and (other.group_size or 0) < (fmt.group_size or 0)
    ]
    return max(alike, key=lambda other: other.group_size or 0, default=None)
