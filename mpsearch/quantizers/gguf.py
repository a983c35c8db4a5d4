"""llama.cpp's block types without calibration, through its gguf library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from mpsearch.codecs import block_type
from mpsearch.errors import CheckError
from mpsearch.formats import Format
from mpsearch.quantizers import InputStatistics

_MOST = torch.finfo(torch.float16).max


class Gguf:
    """The library rounds to a scale that the largest weight of each 32 decides, or to a scale and
    a minimum that their range decides. It computes on the CPU."""

    name = "gguf"
    calibrated = False

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"gguf": version("gguf")}

    def makes(self, fmt: Format) -> bool:
        return fmt.container == "gguf"

    @torch.no_grad()
    def quantize(
        self, weight: Tensor, formats: Sequence[Format], statistics: InputStatistics | None
    ) -> dict[str, dict[str, Tensor]]:
        from gguf.quants import quantize  # not where auto-gptq has an environment of its own

        largest = float(weight.abs().max())
        if not largest <= _MOST:  # as no scale or minimum can be then
            raise CheckError(
                f"GGUF's scales are fp16, which cannot hold weights of {largest:.3g}; give this "
                "layer bf16 by a rule of the space"
            )
        values = weight.cpu().numpy()
        return {
            fmt.name: {
                "weight": torch.from_numpy(quantize(values, block_type(fmt))).to(weight.device)
            }
            for fmt in formats
        }
