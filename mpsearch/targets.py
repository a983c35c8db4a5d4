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
        fuses_experts: whether they run a block's experts as one, and want one format for them.
    """

    name: str
    mixes: bool
    fused: tuple[tuple[str, ...], ...]
    fuses_experts: bool

    @property
    def formats(self) -> tuple[Format, ...]:
        return tuple(fmt for fmt in FORMATS.values() if fmt.container in (self.name, "any"))


# Phi-3's qkv_proj and gate_up_proj, GPT-2's c_attn and GPT-NeoX's query_key_value are one matrix
# in the checkpoint already.
_FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),  # latent attention of DeepSeek
)

TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        target.name: target
        for target in (
            # vLLM refuses a block whose gate, up and down of all experts have not one scheme.
            Target("compressed-tensors", mixes=True, fused=_FUSED, fuses_experts=True),
            # Several widths load in gptqmodel (7.6); other loaders read one beside bf16.
            Target("gptq", mixes=True, fused=_FUSED, fuses_experts=True),
            # nf4 beside int8 in one checkpoint does not load in transformers (5.23).
            Target("bitsandbytes", mixes=False, fused=_FUSED, fuses_experts=True),
        )
    }
)
