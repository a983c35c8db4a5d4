"""Rounding to nearest, on compressed-tensors' own grid, which is also GPTQ's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.codecs import pack, quantization_args, stored_scale
from mpsearch.formats import Format
from mpsearch.quantizers import InputStatistics

# Of a group's range, shrunk by 0 to 11 twentieths, the one with the least squared error is kept.
CLIP = {"grid": 20, "steps": 12}

_SLICE = 2**20  # weights that are tried at once: what that makes stays near the processor


class Rounding:
    """Each weight takes the nearest code; each group's range is the one of `CLIP` that errs least.

    Scales are rounded as they are stored before codes are chosen, so these suit them.
    """

    name = "rounding"
    calibrated = False

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"compressed-tensors": version("compressed-tensors"), "clip": CLIP}

    def makes(self, fmt: Format) -> bool:
        return fmt.container in ("compressed-tensors", "gptq")

    @torch.no_grad()
    def quantize(
        self, weight: Tensor, formats: Sequence[Format], statistics: InputStatistics | None
    ) -> dict[str, dict[str, Tensor]]:
        return {fmt.name: self._quantize(weight, fmt) for fmt in formats}

    def _quantize(self, weight: Tensor, fmt: Format) -> dict[str, Tensor]:
        # Rows do not know of each other, so slices give the same codes.
        found = [self._codes(rows, fmt) for rows in torch.split(weight, _rows_at_once(weight))]
        codes, scale, zero_point = (torch.cat(parts) for parts in zip(*found, strict=True))
        return pack(codes, scale, fmt, None if fmt.symmetric else zero_point)

    def _codes(self, weight: Tensor, fmt: Format) -> tuple[Tensor, Tensor, Tensor]:
        """Codes `(rows, columns)`, scales as stored and zero-points `(rows, groups)`."""
        from compressed_tensors.quantization.lifecycle.forward import fake_quantize, quantize
        from compressed_tensors.quantization.utils import calculate_qparams

        args = quantization_args(fmt)
        columns = weight.shape[1]
        size = fmt.group_size or columns
        # Zeros fill up a short last group: they lie on every grid, so range and error stay.
        weight = nn.functional.pad(weight, (0, -columns % size))
        grouped = weight.reshape(len(weight), -1, size)
        low, high = grouped.amin(-1), grouped.amax(-1)
        # Floats are denser near zero: clipping the largest gains nothing.
        steps = CLIP["steps"] if fmt.number == "int" else 1
        least = torch.full_like(low, float("inf"))
        scale, zero_point = calculate_qparams(low, high, args)
        for step in range(steps):
            kept = 1 - step / CLIP["grid"]
            tried, zero = calculate_qparams(low * kept, high * kept, args)
            tried = stored_scale(tried, fmt).float()
            rounded = fake_quantize(weight, tried, zero, args).reshape(grouped.shape)
            error = (rounded - grouped).square().sum(-1)
            better = error < least
            least = torch.where(better, error, least)
            scale = torch.where(better, tried, scale)
            zero_point = torch.where(better, zero, zero_point)
        codes = quantize(weight, scale, zero_point, args, dtype=args.pytorch_dtype())[:, :columns]
        return codes, stored_scale(scale, fmt), zero_point


def _rows_at_once(weight: Tensor) -> int:
    return max(1, _SLICE // weight.shape[1])
