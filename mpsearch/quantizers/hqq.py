"""HQQ: half-quadratic quantization (Badri and Shaji, 2023), through the hqq library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from mpsearch.codecs import pack, stored_scale
from mpsearch.errors import UsageError
from mpsearch.formats import Format
from mpsearch.quantizers import InputStatistics


class Hqq:
    """Zero-points that minimise a sparsity-promoting norm of the error, without calibration.

    The library's zero-points are real numbers; a checkpoint stores whole ones. So each is rounded,
    as its scale is to bf16, and every weight takes the nearest code of what is stored.
    """

    name = "hqq"
    calibrated = False

    def __init__(self) -> None:
        try:
            from hqq.core.quantize import Quantizer
        except ImportError as error:
            raise UsageError(
                f"quantizer 'hqq' needs hqq ({error}); pip install --no-build-isolation hqq"
            ) from None
        self._library: Any = Quantizer

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"hqq": version("hqq")}

    def makes(self, fmt: Format) -> bool:
        packed = fmt.container == "compressed-tensors" and fmt.number == "int"
        return packed and not fmt.symmetric

    @torch.no_grad()
    def quantize(
        self, weight: Tensor, formats: Sequence[Format], statistics: InputStatistics | None
    ) -> dict[str, dict[str, Tensor]]:
        return {fmt.name: self._quantize(weight, fmt) for fmt in formats}

    def _quantize(self, weight: Tensor, fmt: Format) -> dict[str, Tensor]:
        rows, columns = weight.shape
        group_size = fmt.group_size or columns
        # The library takes ranges below 1e-4 for zero; a power of two changes no digit.
        magnitude = 2.0 ** weight.abs().max().clamp(min=1e-30).log2().floor()
        _, found = self._library.quantize(
            weight / magnitude,
            nbits=fmt.bits,
            group_size=group_size,
            axis=1,
            bitpack=False,
            device=str(weight.device),
        )
        highest = 2**fmt.bits - 1
        scale = stored_scale(found["scale"].float() * magnitude, fmt)
        zero = found["zero"].float().round().clamp(0, highest)
        codes = (weight.reshape(-1, group_size) / scale.float() + zero).round().clamp(0, highest)
        half = 2 ** (fmt.bits - 1)
        return pack(
            (codes - half).to(torch.int8).reshape(rows, columns),
            scale.reshape(rows, -1),
            fmt,
            (zero - half).to(torch.int8).reshape(rows, -1),
        )
