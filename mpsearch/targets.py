"""Serving targets: what one checkpoint of each can hold, and what its runtime fuses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from mpsearch.formats import FORMATS, Format


@dataclass(frozen=True)
class Target:
    """A container that serving runtimes load.

    Attributes:
        name: as in a space file's `target:`.
        mixes: whether one checkpoint may hold several quantized formats.
        fused: siblings that its runtimes run as one matrix, and that so share a format.
    """

    name: str
    mixes: bool
    fused: tuple[tuple[str, ...], ...]

    @property
    def formats(self) -> tuple[Format, ...]:
        return tuple(fmt for fmt in FORMATS.values() if fmt.container in (self.name, "any"))


_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        target.name: target
        for target in (
            Target("compressed-tensors", mixes=True, fused=_FUSED),
            # Several widths load in gptqmodel (7.6); other loaders read one beside bf16.
            Target("gptq", mixes=True, fused=_FUSED),
            # nf4 beside int8 in one checkpoint does not load in transformers (5.23).
            Target("bitsandbytes", mixes=False, fused=_FUSED),
        )
    }
)
