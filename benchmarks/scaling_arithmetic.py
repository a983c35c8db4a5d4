"""What a search of a model costs that does not fit its card: docs/scaling.md, number by number.

Nothing is measured here but what `MEASURED` quotes. Shapes come from the config's fields through
`mpsearch.architecture`, bytes from `mpsearch.formats`, and the rest from the assumptions that
stand as constants below, each of them printed. None of it was verified on a GPU.

    python benchmarks/scaling_arithmetic.py > tables.md
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from mpsearch.architecture import Architecture, read_architecture
from mpsearch.formats import BF16, FORMATS
from mpsearch.layers import Layer

GB = 10**9
SPACE = ("int2-g64", "int3-g64", "int4-g64", "int8-g64")  # search_spaces/compressed_tensors.yaml
# Distinct tokens of a pass with the built-in facts and the built-in model's tokenizer.
TOKENS = {"search": 3502, "sensitivity": 3502 * 150 // 500}
FACTS = 500  # search facts, a logit row read for each answer token
EVALUATIONS = 200
WALKS = (1, 4, 16)  # candidates a walk
SENSITIVITY_ROWS = 10  # of about 100 tokens, as `mpsearch.sensitivity` packs them
SENSITIVITY_DRAWS = 7  # backward passes a row, for at least 64 samples over all rows
CALIBRATION_TOKENS = 64 * 128
UTILISATION = 0.5  # of the sheet's dense bf16 rate, in matrix products of a few thousand tokens
PCIE = 25 * GB  # bytes a second, 4.0 x16
NVME = 5 * GB  # between the 3 and 7 of drives on PCIe 4.0
CHECKSUM = 1.8 * GB  # SHA-256 of a bank's tensors as they are read, with SHA instructions
CHECKSUM_HERE = 0.46 * GB  # measured on two busy cores without them
DECODING = 20  # bytes of device memory that decoding moves, a weight
CLIPPING = 500  # the same for rounding with its 12 tried ranges, a weight and format
GPTQ_COLUMN = 100e-6  # seconds: about ten small kernels, one after another
COLUMNS_OF_A_HESSIAN = 4 / 3  # cubes of columns for Cholesky and inverse


@dataclass(frozen=True)
class Card:
    """Of the vendor's sheet.

    Attributes:
        memory_bytes: as sold.
        flops: dense bf16 products with float32 sums, a second.
        bandwidth: bytes a second of its own memory.
    """

    name: str
    memory_bytes: int
    flops: float
    bandwidth: float


@dataclass(frozen=True)
class Case:
    """A model, the card, and the bits a weight that the budget allows.

    Attributes:
        bits: mean of a candidate's layers.
    """

    name: str
    config: Mapping[str, object]
    card: Card
    bits: float


_LLAMA = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8}
CASES = (
    Case(
        "8B",
        {
            **_LLAMA,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 131072,
        },
        Card("RTX 4070", 12 * GB, 58.3e12, 504 * GB),
        bits=5.0,
    ),
    Case(
        "70B",
        {
            **_LLAMA,
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "max_position_embeddings": 131072,
        },
        Card("RTX 4090", 24 * GB, 165.2e12, 1008 * GB),
        bits=2.4,
    ),
)


@dataclass(frozen=True)
class Costs:
    """What the tables are made of, for one case."""

    case: Case
    shape: Architecture

    @property
    def searched(self) -> int:
        """Weights of the layers, all in blocks."""
        return sum(layer.weights for layer in self.shape.layers)

    @property
    def reference_bytes(self) -> int:
        return 2 * self.searched + self.shape.kept_bytes

    @property
    def outside_bytes(self) -> int:
        """Embedding, norms and head, which stay on the card."""
        return self.shape.kept_bytes

    @property
    def block_bytes(self) -> int:
        return 2 * self.searched // len(self.shape.blocks)

    @property
    def candidate_bytes(self) -> float:
        """Packed layers of one candidate."""
        return self.searched * self.case.bits / 8

    @property
    def bank_bytes(self) -> int:
        return sum(FORMATS[name].layer_bytes(layer) for name in SPACE for layer in self.layers)

    @property
    def layers(self) -> Sequence[Layer]:
        return self.shape.layers

    def flops(self, tokens: int, read: int) -> float:
        """Of a forward pass, attention's scores aside, which are under 2 % at 255 tokens a row."""
        return 2 * self.searched * tokens + 2 * self.shape.hidden * self.shape.vocabulary * read

    def states_bytes(self, tokens: int) -> int:
        return 2 * self.shape.hidden * tokens

    def moved_bytes(self, candidates: int) -> float:
        """A walk's, at most: formats are drawn alike for each, and one is fetched once."""
        distinct = len(SPACE) * (1 - (1 - 1 / len(SPACE)) ** candidates)
        return min(candidates, distinct) * self.candidate_bytes

    def compute_seconds(self) -> float:
        rate = self.case.card.flops * UTILISATION
        decoding = DECODING * self.searched / self.case.card.bandwidth
        return self.flops(TOKENS["search"], FACTS) / rate + decoding

    def walk_seconds(self, candidates: int, bytes_a_second: float) -> float:
        """Fetching and computing overlap, so the longer of the two."""
        fetching = self.moved_bytes(candidates) / bytes_a_second
        return max(candidates * self.compute_seconds(), fetching)

    def rounding_seconds(self) -> float:
        traffic = CLIPPING * len(SPACE) * self.searched / self.case.card.bandwidth
        return traffic + 2 * self.searched / NVME + self.bank_bytes / CHECKSUM

    def gptq_seconds(self) -> float:
        """Two walks over the reference, Hessians, their inverses, and column after column."""
        rate = self.case.card.flops * UTILISATION
        columns = [layer.columns for layer in self.layers]
        hessians = sum(2 * CALIBRATION_TOKENS * n * n for n in columns) / rate
        # In float32: half the rate of bf16 on these cards.
        inverses = sum(COLUMNS_OF_A_HESSIAN * n**3 for n in columns) / (rate / 2)
        steps = len(SPACE) * sum(columns) * GPTQ_COLUMN
        forward = 2 * self.flops(CALIBRATION_TOKENS, 0) / rate + 2 * 2 * self.searched / NVME
        return hessians + inverses + steps + forward + self.bank_bytes / CHECKSUM

    def sensitivity_seconds(self) -> float:
        """Forward, forward again, and a backward of twice a forward for each sample; then every
        gradient times every format's error, read from the card's memory once a sample."""
        rate = self.case.card.flops * UTILISATION
        tokens, samples = TOKENS["sensitivity"], SENSITIVITY_ROWS * SENSITIVITY_DRAWS
        computing = self.flops(tokens, FACTS * 150 // 500) * (2 + 2 * SENSITIVITY_DRAWS) / rate
        products = samples * 2 * self.searched * (1 + len(SPACE)) / self.case.card.bandwidth
        fetching = 2 * 2 * self.searched / NVME + self.bank_bytes / CHECKSUM
        return max(computing + products, fetching)

    def peak_bytes(self, candidates: int) -> float:
        """On the card: outside, two blocks of the reference, a decoded one, codes, states."""
        codes = 2 * self.moved_bytes(candidates) / len(self.shape.blocks)
        states = candidates * self.states_bytes(TOKENS["search"])
        return self.outside_bytes + 3 * self.block_bytes + codes + states


def costs() -> list[Costs]:
    return [Costs(case, read_architecture(case.config, case.name)) for case in CASES]


def gb(size_bytes: float) -> str:
    return f"{size_bytes / GB:.1f} GB" if size_bytes < 100 * GB else f"{size_bytes / GB:.0f} GB"


def seconds(value: float) -> str:
    if value < 120:
        return f"{value:.1f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def rows(head: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    names = list(head)
    lines = [names, ["---"] * len(names), *map(list, body)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def sizes_table(found: Sequence[Costs]) -> str:
    def column(of: Costs) -> list[str]:
        return [
            f"{of.shape.parameters:,}",
            gb(of.reference_bytes),
            of.case.card.name,
            gb(of.case.card.memory_bytes),
            f"{of.case.bits} bits a weight, {gb(of.candidate_bytes)}",
            gb(of.bank_bytes),
            gb(of.outside_bytes),
            gb(of.block_bytes),
            f"{of.states_bytes(TOKENS['search']) / 1e6:.0f} MB",
            *(gb(of.peak_bytes(candidates)) for candidates in WALKS),
            f"{of.flops(TOKENS['search'], FACTS) / 1e12:.0f} TFLOP",
        ]

    names = (
        *("parameters", "reference in bf16", "card", "its memory", "a candidate's layers"),
        *("bank of four formats, on disk", "embedding, norms, head", "a block in bf16"),
        "hidden states of 3,502 tokens",
        *(f"peak on the card, {candidates} a walk" for candidates in WALKS),
        "an evaluation computes",
    )
    body = zip(names, *map(column, found), strict=True)
    return rows(["", *(of.case.name for of in found)], body)


def walks_table(found: Sequence[Costs]) -> str:
    body = []
    for of in found:
        alone = of.compute_seconds()
        body.append([of.case.name, "loaded, if it fitted", "0", seconds(alone), *["-"] * 3])
        for candidates in WALKS:
            each = [
                of.walk_seconds(candidates, rate) / candidates
                for rate in (PCIE, CHECKSUM, CHECKSUM_HERE)
            ]
            body.append(
                [
                    of.case.name,
                    f"streamed, {candidates} a walk",
                    gb(of.moved_bytes(candidates) / candidates),
                    "-",
                    *map(seconds, each),
                ]
            )
    head = ("model", "way", "bytes moved", "computing alone", "PCIe 25 GB/s", "checksum 1.8 GB/s",
            "checksum 0.46 GB/s")  # fmt: skip
    return rows(head, body)


def stages_table(found: Sequence[Costs]) -> str:
    body = []
    for of in found:
        for quantizer, bank in (("rounding", of.rounding_seconds()), ("GPTQ", of.gptq_seconds())):
            table = of.sensitivity_seconds()
            asked = {n: EVALUATIONS * of.walk_seconds(n, CHECKSUM) / n for n in WALKS}
            body.append(
                [
                    *(of.case.name, quantizer, seconds(bank), seconds(table)),
                    *(seconds(value) for value in asked.values()),
                    seconds(bank + table + asked[4]),
                ]
            )
    evaluations = [f"{EVALUATIONS} evaluations, {n} a walk" for n in WALKS]
    head = ("model", "quantizer", "bank", "sensitivity", *evaluations, "all, 4 a walk")
    return rows(head, body)


def workers_table(found: Sequence[Costs]) -> str:
    body = []
    for of in found:
        for quantizer, bank in (("rounding", of.rounding_seconds()), ("GPTQ", of.gptq_seconds())):
            table = of.sensitivity_seconds()
            asked = EVALUATIONS * of.walk_seconds(4, CHECKSUM) / 4
            whole = bank + table + asked
            # The bank is shared layer by layer, the table is one worker's.
            sped = [whole / (bank / k + table + ceil(EVALUATIONS / k) / EVALUATIONS * asked)
                    for k in (2, 4, 8)]  # fmt: skip
            share = f"{table / whole:.0%}"
            body.append([of.case.name, quantizer, share, *(f"{ratio:.2f} x" for ratio in sped)])
    return rows(("model", "quantizer", "not shared", "2 workers", "4", "8"), body)


def assumptions() -> str:
    said = {
        "matrix products run at": f"{UTILISATION:.0%} of the vendor's dense bf16 rate "
        + ", ".join(f"({c.card.name}: {c.card.flops / 1e12:.1f} TFLOPS)" for c in CASES),
        "PCIe 4.0 x16": f"{PCIE / GB:.0f} GB/s",
        "disk": f"{NVME / GB:.0f} GB/s",
        "SHA-256 of codes as they are read": f"{CHECKSUM / GB} GB/s with SHA instructions; "
        f"{CHECKSUM_HERE / GB} GB/s was measured here, on two busy cores",
        "decoding moves": f"{DECODING} bytes of card memory a weight",
        "rounding moves": f"{CLIPPING} bytes a weight and format",
        "GPTQ takes": f"{GPTQ_COLUMN * 1e6:.0f} us a column and format, launches of small kernels",
        "an evaluation asks": f"{FACTS} facts, {TOKENS['search']:,} distinct tokens (counted with "
        "the built-in facts and tokenizer)",
        "sensitivity asks": f"150 facts, {TOKENS['sensitivity']:,} tokens, "
        f"{SENSITIVITY_ROWS} rows and {SENSITIVITY_DRAWS} backward passes a row",
        "formats": ", ".join(f"{name}" for name in SPACE) + f" ({BF16.name} only outside blocks)",
    }
    return "\n".join(f"- {what}: {value}" for what, value in said.items())


TABLES = {
    "assumptions": lambda found: assumptions(),
    "sizes": sizes_table,
    "an evaluation": walks_table,
    "a search": stages_table,
    "workers": workers_table,
}


def main() -> None:
    found = costs()
    print("\n\n".join(f"<!-- {name} -->\n{make(found)}" for name, make in TABLES.items()))


if __name__ == "__main__":
    main()
