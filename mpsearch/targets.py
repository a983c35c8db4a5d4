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
        head: whether an output head with a weight of its own may be quantized.
        embedding: whether the input embedding may be, and with it a head that is tied to it, in
            formats that store codes in the weight's place.
    """

    name: str
    mixes: bool
    fused: tuple[tuple[str, ...], ...]
    fuses_experts: bool
    head: bool
    embedding: bool

    @property
    def formats(self) -> tuple[Format, ...]:
        return tuple(fmt for fmt in FORMATS.values() if fmt.container in (self.name, "any"))

    @property
    def head_formats(self) -> tuple[Format, ...]:
        """What an output head may get; nothing where it has to stay as it is."""
        return self.formats if self.head else ()

    @property
    def embedding_formats(self) -> tuple[Format, ...]:
        """What an input embedding may get; nothing where it has to stay as it is."""
        return tuple(fmt for fmt in self.formats if not fmt.packed) if self.embedding else ()


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
            # transformers (5.23) builds linears and embeddings from compressed-tensors (0.20). It
            # initializes every embedding by its `weight`, which a packed one has not, and ties
            # tensors of that name only: codes are shared, each module's scales stand beside it.
            Target(
                "compressed-tensors",
                mixes=True,
                fused=_FUSED,
                fuses_experts=True,
                head=True,
                embedding=True,
            ),
            # Several widths load in gptqmodel (7.6); other loaders read one beside bf16. It reads
            # heads too, but embeddings with groups that run down the vocabulary.
            Target(
                "gptq",
                mixes=True,
                fused=_FUSED,
                fuses_experts=True,
                head=True,
                embedding=False,
            ),
            # nf4 beside int8 in one checkpoint does not load in transformers (5.23), which puts
            # bitsandbytes' modules in the place of linears only. No head was exported yet.
            Target(
                "bitsandbytes",
                mixes=False,
                fused=_FUSED,
                fuses_experts=True,
                head=False,
                embedding=False,
            ),
        )
    }
)
