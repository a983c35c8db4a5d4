"""How codes are chosen: one file a library, one contract for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from mpsearch.errors import UsageError
from mpsearch.formats import Format, nearest
from mpsearch.layers import Layer

_FLOATS_A_WEIGHT = 15  # float32 that a quantizer holds at most: HQQ and GPTQ 14
_FEWER_FLOATS = {
    "rounding": 8,
    "gguf": 8,
    "bitsandbytes": 8,
}  # the first on layers up to 25 million
_FLOATS_A_PRODUCT = 3  # beside the Gram matrix: GPTQ factors it


@dataclass(frozen=True, eq=False)
class InputStatistics:
    """What calibration saw at a layer's input.

    Attributes:
        gram: `(columns, columns)` float32, the sum over tokens of `x x^T`.
        tokens: how many.
    """

    gram: Tensor
    tokens: int


class Quantizer(Protocol):
    """Chooses codes and scales for one weight matrix.

    `quantize` gets the float32 weight `(rows, columns)`, the formats wanted, and input statistics
    if `calibrated`, unless it is an embedding, which has none; it returns, for each format name,
    the tensors that `Format.tensors` lists, on the weight's device. The weight is not modified. The
    result depends on the arguments alone.
    """

    name: str
    calibrated: bool

    def makes(self, fmt: Format) -> bool:
        """Whether it has codes for that format."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """Everything beside the arguments that decides the result, library version included."""
        ...

    def quantize(
        self, weight: Tensor, formats: Sequence[Format], statistics: InputStatistics | None
    ) -> dict[str, dict[str, Tensor]]: ...


def floats_a_weight(quantizer: Quantizer) -> int:
    """float32 numbers for each weight of a layer that quantizing it holds at most."""
    return _FEWER_FLOATS.get(quantizer.name, _FLOATS_A_WEIGHT)


def working_bytes(layer: Layer, quantizer: Quantizer) -> int:
    """Memory that quantizing a layer takes, beside its weight and its statistics.

    Source: measured on layers of 0.5 to 4 million weights, two or three formats at once.
    """
    products = layer.columns**2 if quantizer.calibrated else 0
    return 4 * (floats_a_weight(quantizer) * layer.weights + _FLOATS_A_PRODUCT * products)


# By container; the first is its default.
QUANTIZERS: Mapping[str, tuple[str, ...]] = {
    "compressed-tensors": ("rounding", "gptq", "hqq"),
    "gptq": ("gptq", "rounding", "auto-gptq"),
    "bitsandbytes": ("bitsandbytes",),
    "gguf": ("gguf",),
}


def get_quantizer(name: str | None, container: str) -> Quantizer:
    """The quantizer of that name, for the formats of one container; None for the default.

    Raises:
        UsageError: unknown, missing its library, or made for another container.
    """
    from mpsearch.quantizers.autogptq import AutoGptq
    from mpsearch.quantizers.bitsandbytes import BitsAndBytes
    from mpsearch.quantizers.gguf import Gguf
    from mpsearch.quantizers.gptq import Gptq
    from mpsearch.quantizers.hqq import Hqq
    from mpsearch.quantizers.rounding import Rounding

    quantizers: dict[str, type[Quantizer]] = {
        "rounding": Rounding,
        "gptq": Gptq,
        "auto-gptq": AutoGptq,
        "hqq": Hqq,
        "bitsandbytes": BitsAndBytes,
        "gguf": Gguf,
    }
    if name is not None and name not in quantizers:
        raise UsageError(f"no quantizer '{name}'{nearest(name, quantizers)}")
    if name is not None and name not in QUANTIZERS[container]:
        raise UsageError(
            f"quantizer '{name}' does not make {container} formats, which the space asks for; "
            f"use {' or '.join(QUANTIZERS[container])}"
        )
    return quantizers[name or QUANTIZERS[container][0]]()
