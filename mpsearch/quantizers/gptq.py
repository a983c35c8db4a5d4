"""GPTQ through gptqmodel, the successor of auto-gptq (Frantar et al., arXiv:2210.17323)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.codecs import import_gptqmodel, pack, stored_scale
from mpsearch.formats import Format
from mpsearch.quantizers import InputStatistics
from mpsearch.quantizers.rounding import Rounding

# Of a group's range, shrunk by 0 to 11 twentieths, the one with the least squared error is kept.
CLIP = {"power": 2.0, "grid": 20, "maxshrink": 0.6}


class Gptq:
    """Columns are quantized one after another, each one's error spread over those still to come.

    All widths of a layer share its Hessian and its factorization. A group's range is the one of
    `CLIP` that leaves the least squared error. Scales are rounded as they are stored inside the
    column loop, so the errors that later columns absorb are those of the checkpoint. Floating-point
    formats have no such scheme in the library: they are rounded to nearest. So are embeddings,
    which have no inputs whose products an error could harm.
    """

    name = "gptq"
    calibrated = True

    def __init__(self) -> None:
        self._rounding = Rounding()
        import_gptqmodel()  # here, so that it fails before any work

    @property
    def settings(self) -> Mapping[str, Any]:
        return {
            "gptqmodel": version("gptqmodel"),
            "clip": CLIP,
            "floats": dict(self._rounding.settings),
        }

    def makes(self, fmt: Format) -> bool:
        return fmt.container in ("compressed-tensors", "gptq")

    def quantize(
        self, weight: Tensor, formats: Sequence[Format], statistics: InputStatistics | None
    ) -> dict[str, dict[str, Tensor]]:
        from gptqmodel.quantization.gptq import SharedHessianFactorCache

        if statistics is None:
            return self._rounding.quantize(weight, formats, None)
        floats = [fmt for fmt in formats if fmt.number == "float"]
        stored = self._rounding.quantize(weight, floats, None)
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device)
        linear.weight.data = weight.float()
        leader = _task(linear, formats[0])
        leader.H = statistics.gram * (2 / statistics.tokens)
        leader.nsamples = statistics.tokens
        factors = SharedHessianFactorCache(generation=0, cohort="layer")
        for fmt in (fmt for fmt in formats if fmt.number == "int"):
            task = _task(linear, fmt)
            task.adopt_hessian_from(leader)
            task.attach_shared_hessian_cache(factors)
            dequantized, scale, zero, *_ = task.quantize()
            task.free()
            stored[fmt.name] = pack_dequantized(dequantized.float(), scale, zero, fmt)
        return stored


def _task(linear: nn.Linear, fmt: Format) -> Any:
    from gptqmodel.looper.named_module import NamedModule
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ
    from gptqmodel.quantization.quantizer import Quantizer

    class StoredScales(Quantizer):  # type: ignore[misc]  # the library is untyped
        """Scales as the checkpoint will hold them."""

        def find_params(self, x: Tensor, weight: bool = False) -> None:
            super().find_params(x, weight)
            self.scale: Tensor = stored_scale(self.scale, fmt).float()

    class Task(GPTQ):  # type: ignore[misc]
        def create_quantizer(self, name: str) -> StoredScales:
            return StoredScales(qcfg=self.qcfg, name=name)

    config = QuantizeConfig(
        bits=fmt.bits,
        group_size=fmt.group_size or -1,
        sym=fmt.symmetric,
        desc_act=False,
        act_group_aware=bool(fmt.group_size),
        mse=CLIP["power"],
        offload_to_disk=False,
    )
    named = NamedModule(linear, name="layer", full_name="layer", layer_index=0)
    task = Task(named, qcfg=config)
    task.quantizer.configure(perchannel=True, grid=int(CLIP["grid"]), maxshrink=CLIP["maxshrink"])
    return task


@torch.no_grad()
def pack_dequantized(
    dequantized: Tensor, scale: Tensor, zero: Tensor, fmt: Format
) -> dict[str, Tensor]:
    """Stored tensors from GPTQ's dequantized weights; exact, since those are code times scale.

    Args:
        dequantized: `(rows, columns)` float32.
        scale: `(rows, groups)`, as stored.
        zero: `(rows, groups)` the unsigned code that means zero.
    """
    group_size = fmt.group_size or dequantized.shape[1]
    half = 2 ** (fmt.bits - 1)
    zero_point = (zero - half).to(torch.int8)

    def per_column(of_groups: Tensor) -> Tensor:
        return of_groups.repeat_interleave(group_size, dim=1)[:, : dequantized.shape[1]]

    codes = (dequantized / per_column(scale)).round() + per_column(zero_point)
    codes = codes.clamp(-half, half - 1).to(torch.int8)
    return pack(codes, stored_scale(scale, fmt), fmt, None if fmt.symmetric else zero_point)
