"""GPTQ through auto-gptq, the archived library whose checkpoints the format is named after.

It imports with transformers 4 only, so it lives in an environment of its own, without gptqmodel;
`make test-autogptq` builds one and compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from importlib.metadata import version
from io import StringIO
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from mpsearch.codecs import stored_scale
from mpsearch.errors import UsageError
from mpsearch.formats import Format
from mpsearch.quantizers import InputStatistics
from mpsearch.quantizers.gptq import CLIP, pack_dequantized


class AutoGptq:
    """The same column loop as `Gptq`, with the same choice of range, by an older implementation.

    gptqmodel also reorders columns and groups by their inputs and damps five times as much;
    without these the two err alike.
    """

    name = "auto-gptq"
    calibrated = True

    def __init__(self) -> None:
        try:
            with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                import auto_gptq  # noqa: F401  (here, so that it fails before any work)
        except ImportError as error:
            raise UsageError(
                f"quantizer 'auto-gptq' needs auto-gptq and transformers 4 ({error}); "
                "make test-autogptq builds that environment, or use gptq"
            ) from None

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"auto-gptq": version("auto-gptq"), "clip": CLIP}

    def makes(self, fmt: Format) -> bool:
        return fmt.container == "gptq"

    def quantize(
        self, weight: Tensor, formats: Sequence[Format], statistics: InputStatistics | None
    ) -> dict[str, dict[str, Tensor]]:
        if statistics is None:
            raise ValueError("GPTQ needs input statistics")
        return {fmt.name: _quantize(weight, fmt, statistics) for fmt in formats}


@torch.no_grad()
def _quantize(weight: Tensor, fmt: Format, statistics: InputStatistics) -> dict[str, Tensor]:
    from auto_gptq.quantization import GPTQ, Quantizer

    class StoredScales(Quantizer):  # type: ignore[misc]  # the library is untyped
        """Scales as the checkpoint will hold them."""

        def find_params(self, x: Tensor, weight: bool = False) -> None:
            super().find_params(x, weight)
            self.scale: Tensor = stored_scale(self.scale, fmt).float()

    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device)
    linear.weight.data = weight.float()
    task = GPTQ(linear)
    task.H = statistics.gram * (2 / statistics.tokens)
    task.nsamples = statistics.tokens
    task.quantizer = StoredScales()
    task.quantizer.configure(
        fmt.bits,
        perchannel=True,
        sym=True,
        mse=True,
        norm=CLIP["power"],
        grid=int(CLIP["grid"]),
        maxshrink=CLIP["maxshrink"],
    )
    # It waits for a GPU when it is done, also where there is none.
    waiting = nullcontext() if torch.cuda.is_available() else patch("torch.cuda.synchronize")
    with waiting:
        scale, zero, _ = task.fasterquant(group_size=fmt.group_size or -1)
    return pack_dequantized(linear.weight.data, scale, zero, fmt)
