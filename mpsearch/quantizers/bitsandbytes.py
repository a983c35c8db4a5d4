"""NF4 and LLM.int8 through bitsandbytes (Dettmers et al., arXiv:2305.14314 and 2208.07339)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version

import torch
from torch import Tensor

from mpsearch.codecs import import_bitsandbytes
from mpsearch.formats import Format
from mpsearch.quantizers import InputStatistics


class BitsAndBytes:
    """The library's own kernels choose codes and scales; stored under its own tensor names."""

    name = "bitsandbytes"
    calibrated = False

    def __init__(self) -> None:
        self._functional = import_bitsandbytes().functional

    @property
    def settings(self) -> Mapping[str, str]:
        return {"bitsandbytes": version("bitsandbytes")}

    @torch.no_grad()
    def quantize(
        self, weight: Tensor, formats: Sequence[Format], statistics: InputStatistics | None
    ) -> dict[str, dict[str, Tensor]]:
        make = {"nf4": self._nf4, "int8": self._int8}
        return {fmt.name: make[fmt.name](weight) for fmt in formats}

    def _nf4(self, weight: Tensor) -> dict[str, Tensor]:
        packed, state = self._functional.quantize_4bit(
            weight.to(torch.bfloat16), blocksize=64, quant_type="nf4", compress_statistics=False
        )
        extra = {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
        return {"weight": packed, **extra}

    def _int8(self, weight: Tensor) -> dict[str, Tensor]:
        codes, row_absmax, _ = self._functional.int8_vectorwise_quant(weight.to(torch.float16))
        layout = torch.tensor(0, dtype=torch.uint8)  # row major, the only one still supported
        return {"weight": codes, "SCB": row_absmax, "weight_format": layout}
