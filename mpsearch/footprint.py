"""Peak memory of a job, part by part, told by a checkpoint's headers before anything is loaded.

    process     interpreter and libraries, of which a GPU holds nothing
    outside     weights that stand in no block: embedding, norms, head
    blocks      of a loaded model all, of a streamed one two: one computes, the next is read
    reading     what is beside a tensor while it is converted to the computing dtype
    kept        what a loaded model keeps in bf16 beside what it computes with
    candidate   decoded weights in place: of all blocks, or of the one that is streamed
    codes       of candidates that share a walk, in two blocks
    cache       decoded weights that the bank hands out again
    activations of the tokens that run through a block at once
    logits      of the tokens of a row, as computed, in float32, and what is made of them
    rows        masks, rotary angles and tokens of all that is asked
    text        what the reference said of running text and of prompts
    states      of all rows between two blocks, of a streamed model; they go to disk
    reference   the first tokens' distributions, from which KL is measured
    grams       of what layers read, of calibrated quantizers
    decoding    a weight between its codes and the computing dtype
    quantizing  one weight in float32, what a quantizer makes on the way, a Gram matrix's factors
    gradients   of samples, or of facts and their float32 sum, with respect to one block
    graph       what a backward pass needs of a row in one block
    whole       what both are of all the other blocks; of a loaded model, where there is room
    checkpoint  what an export holds until it is written

A job takes what its largest stage takes. Checked by `benchmarks/footprint.py`. Other caches take a
share of what is left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from mpsearch.budget import Workload, activation_bytes, scores_bytes
from mpsearch.contents import Contents
from mpsearch.device import CPU_ROW_TOKENS, GPU_ROW_TOKENS

MIB = 2**20
PROCESS_BYTES = 480 * MIB  # torch and transformers with what they import, the tokenizer, the facts
_CALIBRATED_BYTES = 150 * MIB  # gptqmodel with what it imports
_PLAIN_BYTES = 2  # of a weight in bf16
_FLOAT_BYTES = 4
_LOGITS = 4  # float32 tensors of all read tokens at once, beside them as computed
_ROTARY_BYTES = 1024  # of a token: cosines and sines of 128 angles in float32
_TEXT_TOKENS, _TEXT_TOP = 4096, 4096
_PROMPT_TOKENS = 2000  # of one prompt a relation, kept as text is
_TOKENS = 12_000  # distinct ones of what is asked at once; the gate's of the built-in facts
_FACTS = 1000  # whose first tokens are remembered
_GRADIENT_TOKENS = 4_000
_CANDIDATES = 4  # of a streamed model that share a walk
_GRADIENTS = 2  # of a part of the model: one sample's is used while the next is computed
_DRAWS = 4  # of answers; each has a gradient of every state
_GRADIENT_NODES = 128
_FIRST_BYTES = 40 * MIB  # what libraries make when they quantize and pack for the first time
_FACTORS = 3  # float32 matrices of the size of a Gram matrix, beside it


@dataclass(frozen=True)
class Part:
    """Of a stage's memory, named as above; `spared` where memory is short: what lies on disk then,
    or is computed again."""

    name: str
    size_bytes: int
    spared: bool = False


@dataclass(frozen=True)
class Footprint:
    """What a job takes at its peak, which is in one of its stages.

    Attributes:
        stage: that takes most.
        parts: of it.
    """

    stage: str
    parts: tuple[Part, ...]

    @property
    def peak_bytes(self) -> int:
        """With everything in memory that may be there."""
        return sum(part.size_bytes for part in self.parts)

    @property
    def least_bytes(self) -> int:
        """Without all that can be spared: the smallest limit that works."""
        return sum(part.size_bytes for part in self.parts if not part.spared)

    def __getitem__(self, name: str) -> int:
        """Bytes of the part of that name; 0 if it has none."""
        return sum(part.size_bytes for part in self.parts if part.name == name)


@dataclass(frozen=True)
class Way:
    """How a model is run.

    Attributes:
        streamed: block by block from its checkpoint, or loaded whole.
        item_bytes: of a weight and an activation as they are computed with.
        on_cpu: whether interpreter and libraries share the memory.
    """

    streamed: bool
    item_bytes: int
    on_cpu: bool = True

    @property
    def row_tokens(self) -> int:
        """That run through it at once."""
        return CPU_ROW_TOKENS if self.on_cpu else GPU_ROW_TOKENS


@dataclass(frozen=True)
class Job:
    """What is done with a model.

    Attributes:
        stages: names of `_STAGES`.
        calibrated: whether weights are quantized by what layers read.
        tables: whether embedding or head are quantized, too.
        floats: float32 numbers for each weight of a layer that its quantizer holds at most; see
            `mpsearch.quantizers.floats_a_weight`.
    """

    stages: tuple[str, ...]
    calibrated: bool = False
    tables: bool = False
    floats: int = 15

    def largest(self, contents: Contents) -> int:
        """Weights of the largest matrix that is quantized."""
        return max(contents.largest_layer, contents.largest_outside if self.tables else 0)


JOBS: Mapping[str, Job] = MappingProxyType(
    {
        "look": Job(()),
        "ask": Job(("asking",)),
        "bank": Job(("quantizing",)),
        "sensitivity": Job(("asking", "quantizing", "sensitivity")),
        "search": Job(("asking", "quantizing", "sensitivity", "candidates", "slopes")),
        "refine": Job(("quantizing", "candidates"), calibrated=True),
        "export": Job(("export",)),
    }
)


def footprint(contents: Contents, way: Way, job: Job) -> Footprint:
    """What a job takes at its peak."""
    held = _held(contents, way)
    stages = {"opening": _opening(contents, way)}
    for name in job.stages:
        stages[name] = (*held, *_STAGES[name](contents, way, job))
    found = [
        Footprint(name, tuple(part for part in parts if part.size_bytes))
        for name, parts in stages.items()
    ]
    return max(found, key=lambda footprint: footprint.least_bytes)


def held_bytes(contents: Contents, way: Way) -> int:
    """What of it is in memory once the model is open."""
    return sum(part.size_bytes for part in _held(contents, way))


def _process(way: Way, calibrated: bool = False) -> int:
    if not way.on_cpu:
        return 0
    return PROCESS_BYTES + (_CALIBRATED_BYTES if calibrated else 0)


def _held(contents: Contents, way: Way) -> tuple[Part, ...]:
    """What is in memory in every stage."""
    item = way.item_bytes
    copied = not way.streamed and way.item_bytes != _PLAIN_BYTES
    return (
        Part("process", _process(way)),
        Part("outside", contents.outside * item),
        Part("kept", contents.outside * _PLAIN_BYTES if copied and way.on_cpu else 0),
        Part("blocks", contents.inside * item if not way.streamed else 0),
    )


def _opening(contents: Contents, way: Way) -> tuple[Part, ...]:
    largest = max(contents.largest_outside, contents.largest_read)
    if not way.streamed:
        plain = contents.inside * _PLAIN_BYTES if way.item_bytes != _PLAIN_BYTES else 0
        return (*_held(contents, way), Part("reading", plain))
    return (*_held(contents, way), Part("reading", _reading(contents, way, largest)))


def _reading(contents: Contents, way: Way, weights: int) -> int:
    """Of a tensor of so many weights: as stored, in bf16, and what stacking makes beside."""
    copies = contents.stored_bytes if contents.stored_bytes != way.item_bytes else 0
    if contents.stored_bytes != _PLAIN_BYTES != way.item_bytes:
        copies += _PLAIN_BYTES
    return weights * (copies + (_PLAIN_BYTES if contents.stacked else 0))


def _running(contents: Contents, way: Way) -> tuple[Part, ...]:
    """What a forward pass takes, whatever is asked."""
    item, tokens = way.item_bytes, way.row_tokens
    if architecture := contents.architecture:
        activations = tokens * activation_bytes(architecture, item)
        activations += scores_bytes(architecture, Workload(tokens, 1, "bf16"), item)
    else:
        activations = tokens * item * (contents.rows + 4 * contents.hidden)
    each = tokens + (_ROTARY_BYTES if way.streamed else 0)
    return (
        Part("blocks", 2 * contents.block * item if way.streamed else 0),
        Part("reading", _reading(contents, way, contents.largest_read) if way.streamed else 0),
        Part("activations", activations),
        _logits(contents, way),
        Part("rows", _TOKENS * each),
        Part("states", _TOKENS * contents.hidden * item if way.streamed else 0, spared=True),
    )


def _logits(contents: Contents, way: Way) -> Part:
    computed = way.item_bytes if way.item_bytes != _FLOAT_BYTES else 0
    each = contents.vocabulary * (_FLOAT_BYTES * _LOGITS + computed)
    return Part("logits", way.row_tokens * each)


def _said(contents: Contents, way: Way) -> tuple[Part, ...]:
    """What is remembered of the reference."""
    top = min(_TEXT_TOP, contents.vocabulary)
    return (
        # A float32 and an int32 of each; and of a row's, what KL is computed with in float64.
        Part("text", 8 * top * (_TEXT_TOKENS + _PROMPT_TOKENS + 5 * way.row_tokens)),
        Part("reference", _FACTS * contents.vocabulary * _FLOAT_BYTES, spared=True),
    )


def _asking(contents: Contents, way: Way, job: Job) -> tuple[Part, ...]:
    return (*_running(contents, way), *_said(contents, way))


def _candidates(contents: Contents, way: Way, job: Job) -> tuple[Part, ...]:
    asking = _asking(contents, way, job)
    decoding = Part("decoding", job.largest(contents) * 2 * _FLOAT_BYTES)
    if not way.streamed:
        decoded = contents.inside * way.item_bytes
        needed = decoded + sum(part.size_bytes for part in asking if not part.spared)
        # The bank takes a quarter of what is left beside the model.
        return (*asking, decoding, Part("candidate", decoded), Part("cache", needed // 3))
    states = sum(part.size_bytes for part in asking if part.name == "states")
    return (
        *asking,
        decoding,
        Part("candidate", contents.block * way.item_bytes),
        Part("codes", 2 * _CANDIDATES * contents.block),  # of 8 bits
        Part("states", (_CANDIDATES - 1) * states, spared=True),
    )


def _quantizing(contents: Contents, way: Way, job: Job) -> tuple[Part, ...]:
    first = _FIRST_BYTES if way.on_cpu else 0
    factored = _FACTORS * contents.columns**2 if job.calibrated else 0
    return (
        Part("process", _process(way, job.calibrated) - _process(way) + first),
        *(_running(contents, way) if job.calibrated else ()),
        Part("grams", _FLOAT_BYTES * (contents.squares if way.streamed else contents.all_squares)
             if job.calibrated else 0),
        Part("quantizing", _FLOAT_BYTES * (job.largest(contents) * job.floats + factored)),
    )  # fmt: skip


def _sensitivity(contents: Contents, way: Way, job: Job) -> tuple[Part, ...]:
    return (
        *(part for part in _running(contents, way) if part.name != "states"),
        *_said(contents, way),
        *_differentiating(contents, way, _GRADIENTS * way.item_bytes, _GRADIENT_NODES, _DRAWS),
        Part("decoding", job.largest(contents) * _FLOAT_BYTES * (_GRADIENTS + 4)),
    )


def _slopes(contents: Contents, way: Way, job: Job) -> tuple[Part, ...]:
    """Of a candidate, which is in place meanwhile."""
    alone = (p for p in _candidates(contents, way, job) if p.name not in ("states", "codes"))
    each_bytes = way.item_bytes + _FLOAT_BYTES
    return (*alone, *_differentiating(contents, way, each_bytes, way.row_tokens, 1))


def _differentiating(
    contents: Contents, way: Way, each_bytes: int, tokens: int, draws: int
) -> tuple[Part, ...]:
    """Going back through a model, with so many bytes a weight and tokens a row."""
    graph = tokens * 2 * (contents.rows + 8 * contents.hidden) * way.item_bytes
    blocks = 0 if way.streamed else len(contents.blocks)
    others = (contents.inside - contents.block) * each_bytes + (blocks - 1) * graph
    states = _GRADIENT_TOKENS * contents.hidden * way.item_bytes
    states *= len(contents.blocks) + 2 * draws
    return (
        _logits(contents, way),  # what goes back through them
        Part("gradients", contents.block * each_bytes),
        Part("graph", graph),
        Part("whole", others if blocks else 0, spared=True),
        Part("states", states if way.streamed else 0, spared=True),
    )


def _export(contents: Contents, way: Way, job: Job) -> tuple[Part, ...]:
    packed = contents.inside + contents.outside * _PLAIN_BYTES
    if way.streamed:
        packed = max(contents.largest_outside, contents.largest_read) * _PLAIN_BYTES
    return (Part("checkpoint", packed),)


_STAGES: Mapping[str, Callable[[Contents, Way, Job], tuple[Part, ...]]] = MappingProxyType(
    {
        "asking": _asking,
        "candidates": _candidates,
        "quantizing": _quantizing,
        "sensitivity": _sensitivity,
        "slopes": _slopes,
        "export": _export,
    }
)
