"""Rounding to nearest, with compressed-tensors' own scales and grid; GPTQ's grid is the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version

import torch
from torch import Tensor

from mpsearch.codecs import pack, quantization_args, stored_scale
from mpsearch.formats import Format
from mpsearch.quantizers import InputStatistics


class Rounding:
    """Each group's scale spans its largest magnitude; each weight takes the nearest code.

    The scale is rounded before codes are chosen, so they suit the scale that is stored.
    """

    name = "rounding"
    calibrated = False

    @property
    def settings(self) -> Mapping[str, str]:
        return {"compressed-tensors": version("compressed-tensors")}

    @torch.no_grad()
    def quantize(
        self, weight: Tensor, formats: Sequence[Format], statistics: InputStatistics | None
    ) -> dict[str, dict[str, Tensor]]:
        return {fmt.name: self._quantize(weight, fmt) for fmt in formats}

    def _quantize(self, weight: Tensor, fmt: Format) -> dict[str, Tensor]:
        from compressed_tensors.quantization.lifecycle.forward import quantize
        from compressed_tensors.quantization.utils import calculate_qparams

        args = quantization_args(fmt)
        grouped = weight.reshape(len(weight), -1, fmt.group_size or weight.shape[1])
        scale, zero_point = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
        scale = stored_scale(scale, fmt)
        codes = quantize(weight, scale.float(), zero_point, args, dtype=torch.int8)
        return pack(codes, scale, fmt)
