"""Device memory: what a model takes beside its weights, term by term, and what that leaves.

Everything follows from the model's config, before anything is loaded. What a CPU can check is
checked (`tests/test_budget.py`, `benchmarks/memory.py`). The constants of `RUNTIMES` are of GPUs
that this project was not run on: they are on the large side, and every one can be overridden.

    kv cache     for every token in the cache: keys and values of every block
    activations  of the tokens that run through a block at once, where a block holds most
    scores       of attention, of families for which transformers has no fused kernel
    mask         which tokens see which, of runtimes that write it out
    logits       of the tokens that are read
    workspace    one dequantized weight, of runtimes whose kernels want it
    runtime      what the driver keeps, device context, libraries, fragmentation
    unused       for the desktop, or what the runtime leaves alone
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import ceil
from types import MappingProxyType
from typing import Any

from mpsearch.architecture import Architecture, Attention, Block
from mpsearch.errors import UsageError
from mpsearch.formats import Format, nearest
from mpsearch.sizes import format_size

GIB = 2**30
RESERVE_BYTES = GIB // 2  # what a desktop and its browser keep of a card
FRAGMENTATION_BYTES = GIB // 4  # what an allocator loses, beside a measured device context
_MOST = 10**9  # tokens or sequences: more is a slip
_COMPUTE_BYTES = 2  # of a bf16 activation
# Bits that the KV cache takes for a value; q8_0 and q4_0 have an fp16 scale for 32 values.
KV_BITS: Mapping[str, float] = MappingProxyType(
    {"bf16": 16, "fp16": 16, "fp32": 32, "fp8": 8, "q8_0": 8.5, "q4_0": 4.5}
)


@dataclass(frozen=True)
class Runtime:
    """How a serving runtime uses memory.

    Attributes:
        name: on the command line.
        targets: containers that it loads.
        unpacks: of these, the ones whose weights it keeps in bf16 once they are loaded.
        bits: widths that its usual GPU kernels take.
        kv: dtypes of its KV cache, the default first.
        kv_tokens: it takes cache for so many tokens at a time.
        prefill_tokens: that run through a block at once; None for all prompts of the batch.
        reads_prefill: whether logits have room for each of these tokens, not one a sequence.
        sequences: for which it has room for logits at least, whatever the batch.
        masks: whether attention wants a mask for windows and padding; see `mask_bytes`.
        workspace: whether kernels dequantize a whole weight to multiply with it.
        overhead_bytes: what the driver keeps of the memory that it reports (about 0.3 GiB of 12),
            device context, libraries, and what an allocator loses.
        share: of the device's memory that it uses at most.
        unified: whether it also runs on devices that share their memory with the system.
        tables: whether it takes a quantized embedding or head.
    """

    name: str
    targets: tuple[str, ...]
    kv: tuple[str, ...]
    overhead_bytes: int
    bits: tuple[int, ...] = (2, 3, 4, 5, 6, 8, 16)
    unpacks: tuple[str, ...] = ()
    kv_tokens: int = 1
    prefill_tokens: int | None = None
    reads_prefill: bool = False
    sequences: int = 1
    masks: bool = False
    workspace: bool = False
    share: float = 1.0
    unified: bool = True
    tables: bool = True

    def serves(self, fmt: Format) -> bool:
        """Whether its usual GPU kernels take the format's width."""
        return fmt.bits in self.bits


RUNTIMES: Mapping[str, Runtime] = MappingProxyType(
    {
        runtime.name: runtime
        for runtime in (
            # Defaults of `vllm serve` below 70 GiB: blocks of 16 tokens, 2,048 tokens a step, 256
            # sequences whose logits it measures before it sizes the cache, 0.9 of the memory.
            # Its CUDA graphs are captured in the tenth that it leaves alone.
            Runtime(
                "vllm",
                targets=("compressed-tensors",),
                bits=(4, 8, 16),
                kv=("bf16", "fp16", "fp8"),
                kv_tokens=16,
                prefill_tokens=2048,
                sequences=256,
                overhead_bytes=GIB,
                share=0.9,
                unified=False,
                tables=False,
            ),
            # Defaults of llama-server: 512 tokens a micro-batch, whose logits all have room; the
            # cache is padded to 256 tokens.
            Runtime(
                "llama.cpp",
                targets=("gguf",),
                kv=("fp16", "bf16", "fp32", "q8_0", "q4_0"),
                kv_tokens=256,
                prefill_tokens=512,
                reads_prefill=True,
                overhead_bytes=3 * GIB // 4,
            ),
            # GGUF's weights are dequantized when they are loaded, compressed-tensors' at the first
            # forward.
            Runtime(
                "transformers",
                targets=("compressed-tensors", "bitsandbytes", "gguf"),
                unpacks=("compressed-tensors", "gguf"),
                kv=("bf16", "fp16", "fp32"),
                masks=True,
                workspace=True,
                overhead_bytes=GIB,
            ),
            Runtime(
                "gptqmodel",
                targets=("gptq",),
                kv=("bf16", "fp16", "fp32"),
                masks=True,
                workspace=True,
                overhead_bytes=GIB,
            ),
        )
    }
)


def find_runtime(target: str, name: str | None = None) -> Runtime:
    """The runtime of that name, or the usual one of a target.

    Raises:
        UsageError: there is none, or it does not load the target's checkpoints.
    """
    able = {r.name: r for r in RUNTIMES.values() if target in r.targets}
    if name is None:
        return next(iter(able.values()))
    if name not in RUNTIMES:
        raise UsageError(f"no runtime '{name}'{nearest(name, RUNTIMES)}")
    if name not in able:
        raise UsageError(
            f"{name} loads no {target} checkpoint; use {' or '.join(able)}, or a space with the "
            f"target {' or '.join(RUNTIMES[name].targets)}"
        )
    return able[name]


@dataclass(frozen=True)
class Workload:
    """What is to run at once.

    Attributes:
        context: tokens of each sequence, prompt and answer.
        batch: sequences.
        kv: dtype of the KV cache; see `KV_BITS`.
    Raises:
        UsageError: a number below 1, or an unknown dtype.
    """

    context: int
    batch: int
    kv: str

    def __post_init__(self) -> None:
        for what, value in (("context", self.context), ("batch", self.batch)):
            if not 1 <= value <= _MOST:
                raise UsageError(f"{what} {value:,} makes no sense; give 1 to {_MOST:,}")
        if self.kv not in KV_BITS:
            raise UsageError(f"no KV dtype '{self.kv}'{nearest(self.kv, KV_BITS)}")


@dataclass(frozen=True)
class Term:
    """A part of the memory.

    Attributes:
        name: as in JSON, without `_bytes`.
        why: how it comes about, in words and numbers.
    """

    name: str
    size_bytes: int
    why: str


@dataclass(frozen=True)
class DeviceBudget:
    """What a device has, what other things than weights take of it, and what is left for them.

    Attributes:
        device: its name, or the memory that was given.
        memory_bytes: that a process can have.
        runtime: of `RUNTIMES`, or one that differs from it (`dataclasses.replace`).
        reserve_bytes: for everything else that uses the device.
        asked: flags of the command line that made runtime and reserve differ from the usual.
    Raises:
        UsageError: the runtime has no such KV cache.
    """

    architecture: Architecture
    device: str
    memory_bytes: int
    runtime: Runtime
    workload: Workload
    reserve_bytes: int = RESERVE_BYTES
    asked: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.workload.kv not in self.runtime.kv:
            raise UsageError(
                f"{self.runtime.name} keeps no KV cache in {self.workload.kv}; use "
                f"{', '.join(self.runtime.kv)}"
            )

    @cached_property
    def terms(self) -> tuple[Term, ...]:
        """All that is not weights."""
        architecture, runtime, workload = self.architecture, self.runtime, self.workload
        tokens = prefill_tokens(runtime, workload)
        read = tokens if runtime.reads_prefill else max(workload.batch, runtime.sequences)
        masks = mask_bytes(architecture, workload) if runtime.masks else 0
        scores = scores_bytes(architecture, workload, _COMPUTE_BYTES) if runtime.masks else 0
        unused = max(ceil(self.memory_bytes * (1 - runtime.share)), self.reserve_bytes)
        return (
            Term(
                "kv_cache",
                kv_cache_bytes(architecture, runtime, workload),
                f"{workload.context:,} tokens x {workload.batch:,}, {workload.kv}, "
                f"{len(architecture.blocks)} blocks",
            ),
            Term(
                "activation",
                tokens * activation_bytes(architecture, _COMPUTE_BYTES),
                f"{tokens:,} tokens at once through the widest block, bf16",
            ),
            Term(
                "mask",
                masks,
                f"{workload.context:,} x {workload.context:,} tokens, for windows or padding"
                if masks
                else "not written out",
            ),
            Term(
                "scores",
                scores,
                f"of all heads, {workload.context:,} x {workload.context:,} tokens"
                if scores
                else "not written out",
            ),
            Term(
                "logits",
                read * logits_bytes(architecture),
                f"{read:,} tokens x {architecture.vocabulary:,}: bf16, float32, probabilities",
            ),
            Term(
                "workspace",
                workspace_bytes(architecture) if runtime.workspace else 0,
                "the largest weight, dequantized" if runtime.workspace else "its kernels need none",
            ),
            Term("runtime", runtime.overhead_bytes, "driver, device context, libraries"),
            Term(
                "unused",
                unused,
                "left to the desktop and other programs"
                if unused == self.reserve_bytes
                else f"{runtime.name} uses {runtime.share:.0%} of the memory at most",
            ),
        )

    @property
    def left_bytes(self) -> int:
        """For weights; negative where even none would fit."""
        return self.memory_bytes - sum(term.size_bytes for term in self.terms)

    def __getitem__(self, name: str) -> int:
        """Bytes of the term of that name."""
        return next(term.size_bytes for term in self.terms if term.name == name)

    def to_json(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "memory_bytes": self.memory_bytes,
            "runtime": self.runtime.name,
            "context": self.workload.context,
            "batch": self.workload.batch,
            "kv": self.workload.kv,
            "asked": dict(self.asked),
            **{f"{term.name}_bytes": term.size_bytes for term in self.terms},
            "left_bytes": self.left_bytes,
            "terms": {term.name: term.why for term in self.terms},
        }

    def largest_context(self, weights_bytes: int) -> int:
        """The longest context at which so many bytes of weights still fit; 0 where none is.

        Not above what the model's config states, if it states one.
        """
        most = self.architecture.context or _MOST
        return self._largest(lambda n: replace(self.workload, context=n), weights_bytes, most)

    def largest_batch(self, weights_bytes: int) -> int:
        """The most sequences with which so many bytes of weights still fit; 0 where none do."""
        return self._largest(lambda n: replace(self.workload, batch=n), weights_bytes, _MOST)

    def _largest(self, grown: Callable[[int], Workload], weights_bytes: int, most: int) -> int:
        def fits(number: int) -> bool:
            return weights_bytes <= replace(self, workload=grown(number)).left_bytes

        if fits(most):
            return most
        low, high = 0, most
        while high - low > 1:  # no term falls when the workload grows
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low


def terms_line(budget: Mapping[str, Any]) -> str:
    """One line of what `DeviceBudget.to_json` holds: what there is, what is taken, what is left."""
    taken = ", ".join(
        f"{name.replace('_', ' ')} {format_size(budget[f'{name}_bytes'])}"
        for name in budget["terms"]
        if budget[f"{name}_bytes"]
    )
    return (
        f"{budget['device']}, {format_size(budget['memory_bytes'])}, {budget['runtime']}, "
        f"{budget['context']:,} tokens x {budget['batch']:,}: {taken}; "
        f"{format_size(budget['left_bytes'])} left for weights"
    )


# ---------------------------------------------------------------------------------- terms


def prefill_tokens(runtime: Runtime, workload: Workload) -> int:
    """That run through a block at once: all prompts, or as many as the runtime takes in a step."""
    asked = workload.context * workload.batch
    return asked if runtime.prefill_tokens is None else min(asked, runtime.prefill_tokens)


def kv_cache_bytes(architecture: Architecture, runtime: Runtime, workload: Workload) -> int:
    """Keys and values, or states, of all blocks and sequences.

    Of a block that sees all: context x key-value heads x (key + value dimension). A sliding window
    keeps no more tokens than the window, and where a prompt comes in pieces, the piece as well.
    Latent attention keeps one vector a token. A state has one size at any length, kept in float32.
    Sources: transformers' `cache_utils` (5.23), and vLLM's documentation of its hybrid cache.
    """
    total = 0
    for attention, blocks in Counter(block.attention for block in architecture.blocks).items():
        values = _cached_values(attention, runtime, workload)
        bits = 32 if attention.kind == "state" else KV_BITS[workload.kv]
        total += blocks * ceil(workload.batch * values * bits / 8)
    return total


def _cached_values(attention: Attention, runtime: Runtime, workload: Workload) -> int:
    """Of one block and sequence."""
    if attention.kind == "state":
        return attention.state_values
    tokens = workload.context
    if attention.window is not None:
        piece = 0 if runtime.prefill_tokens is None else prefill_tokens(runtime, workload)
        tokens = min(tokens, attention.window + piece)
    tokens = ceil(tokens / runtime.kv_tokens) * runtime.kv_tokens
    if attention.kind == "latent":
        return tokens * attention.latent_dim
    return tokens * attention.kv_heads * (attention.key_dim + attention.value_dim)


def activation_bytes(architecture: Architecture, item_bytes: int) -> int:
    """Of one token, where a block holds most at once, beside what the KV cache holds.

    Four vectors of the hidden width: the embedded tokens, the block's input, the residual and its
    norm. Beside them either the feed-forward part's: three of the inner width (gate, up, their
    product), and for every expert that a token is sent to three more of the hidden width (what it
    reads, what it gives, and that weighted). Or attention's: the queries three times (as projected,
    rotated, and a temporary or the result), and the keys once more. Checked against the peak of
    real forwards in `benchmarks/memory.py`.
    """
    return item_bytes * max(_values_at_once(architecture.hidden, b) for b in architecture.blocks)


def _values_at_once(hidden: int, block: Block) -> int:
    attention = block.attention
    attending = (3 * attention.heads + attention.kv_heads) * attention.key_dim
    inner = block.inner_copies * block.inner + 3 * block.experts * hidden
    return 4 * hidden + max(inner, attending)


def mask_bytes(architecture: Architecture, workload: Workload) -> int:
    """Of runtimes that attend under masks of context x context, a byte each.

    Prompts of several lengths are padded under a mask. Models with a sliding window have two
    masks, at any batch. Source: `masking_utils` of transformers (5.23).
    """
    windows = any(block.attention.window is not None for block in architecture.blocks)
    masks = 2 if windows else int(workload.batch > 1)
    return masks * workload.batch * workload.context**2


def scores_bytes(architecture: Architecture, workload: Workload, item_bytes: int) -> int:
    """Of runtimes that run attention as transformers does, for families without a fused kernel.

    Every head's scores of context x context: as computed, and what the softmax reads and gives in
    float32; computed in float32, it reads them in place. Checked in `benchmarks/memory.py`.
    """
    if not architecture.eager:
        return 0
    heads = max(block.attention.heads for block in architecture.blocks)
    each_bytes = item_bytes + 4 + (0 if item_bytes == 4 else 4)
    return each_bytes * heads * workload.batch * workload.context**2


def logits_bytes(architecture: Architecture) -> int:
    """Of one token that is read: in bf16, in float32, and the probabilities."""
    return architecture.vocabulary * (2 + 4 + 4)


def workspace_bytes(architecture: Architecture) -> int:
    """The largest layer in bf16."""
    return 2 * max(layer.weights for layer in architecture.layers)
