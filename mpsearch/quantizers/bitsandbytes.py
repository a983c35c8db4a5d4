"""NF4, FP4 and LLM.int8 through bitsandbytes (Dettmers et al., arXiv:2305.14314 and 2208.07339)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version

import torch
from torch import Tensor, nn

from mpsearch.codecs import import_bitsandbytes
from mpsearch.formats import FOUR_BIT_BLOCK, Format
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

    def makes(self, fmt: Format) -> bool:
        return fmt.container == "bitsandbytes"

    @torch.no_grad()
    def quantize(
        self, weight: Tensor, formats: Sequence[Format], statistics: InputStatistics | None
    ) -> dict[str, dict[str, Tensor]]:
        return {
            fmt.name: self._int8(weight) if fmt.number == "int" else self._four_bits(weight, fmt)
            for fmt in formats
        }

    def _four_bits(self, weight: Tensor, fmt: Format) -> dict[str, Tensor]:
        name, _, double = fmt.name.partition("-")
        packed, state = self._functional.quantize_4bit(
            weight.to(torch.bfloat16),
            blocksize=FOUR_BIT_BLOCK,
            quant_type=name,
            compress_statistics=bool(double),
        )
        stored = {f"weight.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}
        described = f"weight.quant_state.bitsandbytes__{name}"
        # The digits of an offset vary in number; blanks after the JSON make its length that of
        # the format.
        (length,) = fmt.tensors(*weight.shape)[described].shape
        missing = length - len(stored[described])
        stored[described] = nn.functional.pad(stored[described], (0, missing), value=ord(" "))
        return {"weight": packed, **stored}

    def _int8(self, weight: Tensor) -> dict[str, Tensor]:
        codes, row_absmax, _ = self._functional.int8_vectorwise_quant(weight.to(torch.float16))
        layout = torch.tensor(0, dtype=torch.uint8)  # row major, the only one still supported
        return {"weight": codes, "SCB": row_absmax, "weight_format": layout}
