"""Where in depth a candidate loses the answers that its reference gives.

Both models are read after every block (`mpsearch.lens`, which says what that can and cannot tell).
The shortfall is the reference's log-probability of the answer minus the candidate's. An answer is
lost at the first block from which on the shortfall stays at or above half of the last block's.
Blocks are counted from 0, as in the names of layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpsearch.bootstrap import Interval, subject_bootstrap
from mpsearch.errors import UsageError
from mpsearch.estimates import relation_mean
from mpsearch.facts import Fact
from mpsearch.scores import NoiseFloor


@dataclass(frozen=True)
class BlockReading:
    """What is read of the answers after one block; means over relations, in nats.

    Attributes:
        shortfall: with its 95 % bootstrap interval over subjects.
        forgotten: how many of the forgotten facts are lost at this block.
    """

    reference_log_prob: float
    candidate_log_prob: float
    shortfall: Interval
    forgotten: int


@dataclass(frozen=True)
class LostFact:
    """A forgotten fact and the block where its answer is lost.

    Attributes:
        block: None where the answer itself loses nothing beyond noise: a distractor overtook it.
    """

    relation: str
    subject: str
    answer: str
    block: int | None


@dataclass(frozen=True)
class Depth:
    """Where a candidate loses what its reference knows.

    Attributes:
        blocks: from the first to the last, whose readings are the models' own log-probabilities.
        half_from: the block where the mean over relations is lost; None if the last block's mean
            shortfall is not beyond noise.
        forgotten: the facts that the candidate forgot.
    """

    blocks: tuple[BlockReading, ...]
    half_from: int | None
    forgotten: tuple[LostFact, ...]

    @property
    def most(self) -> tuple[int, int] | None:
        """First and last of the fewest blocks in a row where most forgotten facts are lost.

        Most is more than half of those that are lost at any block.
        """
        counts = np.array([block.forgotten for block in self.blocks])
        spans = combinations_with_replacement(range(len(counts)), 2)
        enough = [(a, b) for a, b in spans if 2 * counts[a : b + 1].sum() > counts.sum()]
        return min(enough, key=lambda span: span[1] - span[0], default=None)

    @property
    def verdict(self) -> str:
        """One plain sentence about the block of the loss and those of the forgotten facts."""
        last = len(self.blocks) - 1
        if self.half_from is None:
            said = f"After the last block, {last}, no loss is beyond noise"
        else:
            said = f"Half of the loss is there from block {self.half_from} on, of 0 to {last}"
        if self.most is not None:
            first, end = self.most
            said += "; most forgotten facts are lost at " + (
                f"block {first}" if first == end else f"blocks {first} to {end}"
            )
        if elsewhere := sum(fact.block is None for fact in self.forgotten):
            said += f"; {elsewhere} are forgotten though the answer loses nothing beyond noise"
        return said + ("." if self.forgotten else "; no fact is forgotten.")

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "most": self.most, "verdict": self.verdict}


def compare_depth(
    reference: NDArray[Any],
    candidate: NDArray[Any],
    facts: Sequence[Fact],
    forgotten: NDArray[Any],
    noise: NoiseFloor,
    generator: np.random.Generator,
) -> Depth:
    """Compare two models' readings of the same facts.

    Args:
        reference, candidate: `(facts, blocks)` log-probabilities of the answers, in nats.
        facts: in the order of the readings.
        forgotten: `(facts,)` bool.
        noise: of the reference; a shortfall that is no larger is none.
        generator: of the bootstrap.
    Raises:
        UsageError: the models have different numbers of blocks.
    """
    if reference.shape[1] != candidate.shape[1]:
        raise UsageError(
            f"the reference has {reference.shape[1]} blocks and the candidate "
            f"{candidate.shape[1]}, so they cannot be compared block by block; compare without "
            "--depth"
        )
    relations = [fact.relation for fact in facts]
    subjects = [fact.subject for fact in facts]
    shortfall = reference - candidate
    lost = [
        LostFact(
            facts[i].relation,
            facts[i].subject,
            facts[i].answer,
            lost_at(shortfall[i], noise.log_prob_nats),
        )
        for i in np.flatnonzero(forgotten)
    ]
    blocks = tuple(
        BlockReading(
            relation_mean(reference[:, block], relations).mean,
            relation_mean(candidate[:, block], relations).mean,
            # Every block gets the same draws, so that their intervals can be compared.
            subject_bootstrap(shortfall[:, block], relations, subjects, deepcopy(generator))[0],
            sum(fact.block == block for fact in lost),
        )
        for block in range(shortfall.shape[1])
    )
    curve = np.array([block.shortfall.mean for block in blocks])
    beyond_noise = blocks[-1].shortfall.low > 0
    half_from = lost_at(curve, noise.mean_nats) if beyond_noise else None
    return Depth(blocks, half_from, tuple(lost))


def lost_at(shortfall: NDArray[Any], floor_nats: float) -> int | None:
    """The first block from which on a shortfall stays at or above half of the last block's.

    Args:
        shortfall: `(blocks,)` in nats.
        floor_nats: at least zero.
    Returns:
        None if the last block's shortfall is at most the floor.
    """
    if shortfall[-1] <= floor_nats:
        return None
    short = np.flatnonzero(shortfall < shortfall[-1] / 2)
    return int(short[-1]) + 1 if short.size else 0
