"""Where answers are lost: the rule on curves made by hand, and planted losses by block."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mpsearch.depth import Depth, compare_depth, lost_at
from mpsearch.errors import UsageError
from mpsearch.facts import Fact
from mpsearch.scores import NoiseFloor

BLOCKS = 6
# Relations of unequal size, so that a mean over facts is not the mean over relations.
FACTS = [
    Fact(relation, f"the {relation} of {{}} is", f"s{n}", f"answer {n}")
    for relation, count in (("color", 30), ("place", 10))
    for n in range(count)
]
NOISE = NoiseFloor(facts=40, mean_nats=0.01, log_prob_nats=0.1, margin_nats=0.1, flips=0)


def compared(shortfall: np.ndarray, forgotten: np.ndarray | None = None) -> Depth:
    reference = np.random.default_rng(1).normal(-5, 1, (len(FACTS), BLOCKS))
    none = np.zeros(len(FACTS), dtype=bool)
    return compare_depth(
        reference,
        reference - shortfall,
        FACTS,
        none if forgotten is None else forgotten,
        NOISE,
        np.random.default_rng(0),
    )


def planted(block: int, nats: float = 2.0) -> np.ndarray:
    """`(facts, blocks)`: every fact lacks that much from a block on."""
    shortfall = np.zeros((len(FACTS), BLOCKS))
    shortfall[:, block:] = nats
    return shortfall


@pytest.mark.parametrize(
    ("curve", "block"),
    [
        ([0, 0, 0, 4, 4, 4], 3),
        ([4, 4, 4, 4, 4, 4], 0),
        ([0, 0, 0, 0, 0, 4], 5),
        ([0, 1.9, 2, 3, 2.5, 4], 2),  # half counts
        ([0, 9, 9, 1, 3, 4], 4),  # what came back was not lost for good
        ([-3, -2, -1, 0, 1, 2], 4),
        ([5, 5, 5, 5, 5, 0.1], None),  # at most the floor
        ([5, 5, 5, 5, 5, -1], None),
        ([0, 0, 0, 0, 0, 0.11], 5),
    ],
)
def test_an_answer_is_lost_where_half_of_its_last_shortfall_stays(
    curve: list[float], block: int | None
) -> None:
    assert lost_at(np.array(curve), floor_nats=0.1) == block


@pytest.mark.parametrize("block", range(BLOCKS))
def test_a_loss_planted_at_a_block_is_found_there(block: int) -> None:
    forgotten = np.zeros(len(FACTS), dtype=bool)
    forgotten[[3, 7, 35]] = True
    found = compared(planted(block), forgotten)
    assert found.half_from == block
    assert [b.forgotten for b in found.blocks] == [3 * (b == block) for b in range(BLOCKS)]
    assert [(f.relation, f.subject, f.answer, f.block) for f in found.forgotten] == [
        ("color", "s3", "answer 3", block),
        ("color", "s7", "answer 7", block),
        ("place", "s5", "answer 5", block),
    ]
    assert found.most == (block, block)
    assert found.verdict == (
        f"Half of the loss is there from block {block} on, of 0 to 5; "
        f"most forgotten facts are lost at block {block}."
    )


def test_readings_are_means_over_relations_with_intervals_over_subjects() -> None:
    draw = np.random.default_rng(2)
    reference, candidate = draw.normal(-4, 1, (2, len(FACTS), BLOCKS))
    found = compare_depth(
        reference, candidate, FACTS, np.zeros(len(FACTS), dtype=bool), NOISE, draw
    )
    for number, block in enumerate(found.blocks):
        means = [
            np.mean([values[:30, number].mean(), values[30:, number].mean()])
            for values in (reference, candidate)
        ]
        assert block.reference_log_prob == pytest.approx(means[0])
        assert block.candidate_log_prob == pytest.approx(means[1])
        assert block.shortfall.mean == pytest.approx(means[0] - means[1])
        assert block.shortfall.low < block.shortfall.mean < block.shortfall.high


def test_equal_readings_have_equal_intervals() -> None:
    shortfall = np.repeat(np.random.default_rng(4).normal(1, 1, (len(FACTS), 1)), BLOCKS, axis=1)
    intervals = {block.shortfall for block in compared(shortfall).blocks}
    assert max(i.low for i in intervals) == pytest.approx(min(i.low for i in intervals))
    assert max(i.high for i in intervals) == pytest.approx(min(i.high for i in intervals))


@pytest.mark.parametrize(
    ("lost", "most"),
    [
        ([0, 2, 2, 3, 3, 5, 5], (2, 3)),
        ([1, 1, 4, 4], (1, 4)),  # half is not most
        ([0, 0, 0, 1, 5], (0, 0)),
        ([0, 1, 4, 5], (0, 4)),  # the first of two such
    ],
)
def test_most_forgotten_facts_are_in_the_fewest_blocks_that_hold_more_than_half(
    lost: list[int], most: tuple[int, int]
) -> None:
    shortfall, forgotten = np.zeros((len(FACTS), BLOCKS)), np.zeros(len(FACTS), dtype=bool)
    for fact, block in enumerate(lost):
        shortfall[fact, block:], forgotten[fact] = 1.0, True
    found = compared(shortfall, forgotten)
    assert [block.forgotten for block in found.blocks] == [lost.count(b) for b in range(BLOCKS)]
    assert found.most == most
    first, end = most
    where = f"block {first}" if first == end else f"blocks {first} to {end}"
    assert f"most forgotten facts are lost at {where}." in found.verdict


def test_without_a_loss_no_block_is_named() -> None:
    draw = np.random.default_rng(3)
    found = compared(draw.normal(0, 0.5, (len(FACTS), BLOCKS)))
    assert found.half_from is None
    assert found.most is None
    assert found.verdict == (
        "After the last block, 5, no loss is beyond noise; no fact is forgotten."
    )
    assert compared(planted(2, nats=0.009)).half_from is None  # below the noise floor
    assert compared(-planted(2)).half_from is None  # a gain


def test_a_fact_whose_answer_lost_nothing_is_forgotten_at_no_block() -> None:
    forgotten = np.zeros(len(FACTS), dtype=bool)
    forgotten[:2] = True
    shortfall = planted(4)
    shortfall[1] = 0.0
    found = compared(shortfall, forgotten)
    assert [fact.block for fact in found.forgotten] == [4, None]
    assert sum(block.forgotten for block in found.blocks) == 1
    assert found.verdict.endswith("; 1 are forgotten though the answer loses nothing beyond noise.")


def test_it_is_json() -> None:
    forgotten = np.arange(len(FACTS)) < 5
    found = compared(planted(4), forgotten)
    told = json.loads(json.dumps(found.to_json()))
    assert len(told["blocks"]) == BLOCKS
    assert told["blocks"][4]["forgotten"] == len(told["forgotten"]) == 5
    assert set(told["blocks"][4]["shortfall"]) == {"mean", "low", "high"}
    assert (told["half_from"], told["most"]) == (4, [4, 4])
    assert told["verdict"] == found.verdict


def test_models_of_other_depths_are_refused() -> None:
    with pytest.raises(UsageError, match="the reference has 6 blocks and the candidate 5"):
        compare_depth(
            np.zeros((len(FACTS), 6)),
            np.zeros((len(FACTS), 5)),
            FACTS,
            np.zeros(len(FACTS), dtype=bool),
            NOISE,
            np.random.default_rng(0),
        )
