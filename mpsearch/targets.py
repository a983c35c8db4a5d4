"""Serving targets: what one checkpoint of each can hold, and what its runtime fuses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from mpsearch.formats import FORMATS, Format


@dataclass(frozen=True)
class Target:
    """What a checkpoint is made for: a container, and the runtimes that load it.

    Attributes:
        name: as in a space file's `target:`.
        container: the checkpoint format.
        mixes: whether one checkpoint may hold several quantized formats.
        fused: siblings that its runtimes run as one matrix, and that so share a format.
        fuses_experts: whether they run a block's experts as one, and want one format for them.
        head: whether an output head with a weight of its own may be quantized.
        embedding: whether the input embedding may be, and with it a head that is tied to it, in
            formats that store codes in the weight's place.
        only: names of the formats that its runtime takes; empty for all of the container.
        float32_vectors: whether it stores norms and biases in float32.
    """

    name: str
    container: str
    mixes: bool
    fused: tuple[tuple[str, ...], ...]
    fuses_experts: bool
    head: bool
    embedding: bool
    only: tuple[str, ...] = ()
    float32_vectors: bool = False

    @property
    def formats(self) -> tuple[Format, ...]:
        if self.only:
            return tuple(FORMATS[name] for name in self.only)
        return tuple(fmt for fmt in FORMATS.values() if fmt.container in (self.container, "any"))

    @property
    def head_formats(self) -> tuple[Format, ...]:
        """What an output head may get; nothing where it has to stay as it is."""
        return self.formats if self.head else ()

    @property
    def embedding_formats(self) -> tuple[Format, ...]:
        """What an input embedding may get; nothing where it has to stay as it is."""
        return tuple(fmt for fmt in self.formats if not fmt.packed) if self.embedding else ()

    def misfits(
        self, formats: Mapping[str, Format], embedding: str = "", head: str = ""
    ) -> dict[str, str]:
        """Why it cannot hold an assignment: layer to what is wrong there; empty if it can.

        Args:
            formats: of every searched layer.
            embedding, head: the names of these layers, of which fewer formats are held.
        """
        beside = {embedding: self.embedding_formats, head: self.head_formats}
        wrong = {
            name: f"is {fmt.name}"
            for name, fmt in formats.items()
            if fmt not in beside.get(name, self.formats) and (fmt.quantized or name not in beside)
        }
        used = Counter(fmt.name for fmt in formats.values() if fmt.quantized)
        if not wrong and len(used) > 1 and not self.mixes:
            usual = used.most_common(1)[0][0]
            wrong = {
                name: f"is {fmt.name} where others are {usual}"
                for name, fmt in formats.items()
                if fmt.quantized and fmt.name != usual
            }
        return wrong


# Phi-3's qkv_proj and gate_up_proj, GPT-2's c_attn and GPT-NeoX's query_key_value are one matrix
# in the checkpoint already.
_FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),  # latent attention of DeepSeek
)

_VLLM = (
    *(f"int{bits}-{groups}" for bits in (4, 8) for groups in ("g32", "g64", "g128", "channel")),
    "bf16",
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
                container="compressed-tensors",
                mixes=True,
                fused=_FUSED,
                fuses_experts=True,
                head=True,
                embedding=True,
            ),
            # What vLLM's kernels for packed integers take on common GPUs; its CPU build takes
            # 4 bits alone (0.32). Embeddings and heads stay as they are.
            Target(
                "vllm",
                container="compressed-tensors",
                mixes=True,
                fused=_FUSED,
                fuses_experts=True,
                head=False,
                embedding=False,
                only=_VLLM,
            ),
            # Several widths load in gptqmodel (7.6); other loaders read one beside bf16. It reads
            # heads too, but embeddings with groups that run down the vocabulary.
            Target(
                "gptq",
                container="gptq",
                mixes=True,
                fused=_FUSED,
                fuses_experts=True,
                head=True,
                embedding=False,
            ),
            # It quantizes every linear of a block in one width (0.7.1).
            Target(
                "auto-gptq",
                container="gptq",
                mixes=False,
                fused=_FUSED,
                fuses_experts=True,
                head=False,
                embedding=False,
                only=tuple(f"gptq4-g{size}" for size in (32, 64, 128)),
            ),
            # nf4 beside int8 in one checkpoint does not load in transformers (5.23), which puts
            # bitsandbytes' modules in the place of linears only: a head of its own, but no
            # embedding, nor a head that is tied to one.
            Target(
                "bitsandbytes",
                container="bitsandbytes",
                mixes=False,
                fused=_FUSED,
                fuses_experts=True,
                head=True,
                embedding=False,
            ),
            # llama.cpp multiplies by each tensor of a file apart, whatever its type, but by a norm
            # or bias only in float32. Experts are one tensor a block.
            Target(
                "gguf",
                container="gguf",
                mixes=True,
                fused=(),
                fuses_experts=True,
                head=True,
                embedding=True,
                float32_vectors=True,
            ),
        )
    }
)
