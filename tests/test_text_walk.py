"""The text on its way through the blocks: statistics of a whole pass, taken on the way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import tiny_family
from test_bank_streamed import FAMILIES, empty, streamed
from test_skeleton import loaded, saved

from mpsearch import text_walk
from mpsearch.blocks import find_blocks
from mpsearch.calibration import input_statistics
from mpsearch.errors import ModelError
from mpsearch.flow import is_placeholder
from mpsearch.models import Model
from mpsearch.quantizers import InputStatistics
from mpsearch.text_walk import BEFORE, TextWalk

TOKENS = torch.randint(5, 71, (11, 6), generator=torch.Generator().manual_seed(0))


def readers(model: Model) -> list[str]:
    return [layer.name for layer in (*model.layers, *filter(None, [model.head]))]


def walked(model: Model) -> dict[str, InputStatistics]:
    """Of every layer, watched as the text goes through its block, or behind all."""
    found: dict[str, InputStatistics] = {}
    with TextWalk(model, TOKENS) as walk:
        for depth in range(walk.end):
            walk.reach(depth)
            found |= walk.leave(
                [name for name in readers(model) if walk.depth_of.get(name) == depth]
            )
        outside = [name for name in readers(model) if name not in walk.depth_of]
        return found | walk.statistics(outside)


def same(found: dict[str, InputStatistics], expected: dict[str, InputStatistics]) -> bool:
    return set(found) == set(expected) and all(
        torch.equal(seen.gram, expected[name].gram) and seen.tokens == expected[name].tokens
        for name, seen in found.items()
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_statistics_are_to_the_bit_those_of_a_whole_pass(tmp_path: Path, name: str) -> None:
    family, dtype, changes = FAMILIES[name]
    folder = saved(tmp_path, family, **changes)  # type: ignore[arg-type]
    whole, model = loaded(folder, dtype), streamed(folder, dtype)
    expected = input_statistics(whole, TOKENS, lambda *_: None)
    assert set(expected) == set(readers(whole))
    assert same(walked(whole), expected)
    assert same(walked(model), expected)
    assert empty(model)


def test_a_text_may_be_watched_in_a_block_again_and_again_before_it_leaves() -> None:
    model = tiny_family("llama")
    first, second = (f"model.layers.{depth}.mlp.down_proj" for depth in (0, 1))
    expected = input_statistics(model, TOKENS, lambda *_: None)
    with TextWalk(model, TOKENS) as walk:
        assert walk.reached == BEFORE
        walk.reach(0)
        for _ in range(2):
            assert same(walk.statistics([first]), {first: expected[first]})
        model.places[first].put(model.originals[first] * 2)
        walk.reach(1)
        model.restore()
        assert not torch.equal(walk.statistics([second])[second].gram, expected[second].gram)
        assert walk.leave() == {}
        assert walk.reached == walk.end == 2


def test_a_block_has_its_weights_from_when_the_text_arrives_until_it_arrives_elsewhere(
    tmp_path: Path,
) -> None:
    model = streamed(saved(tmp_path, "llama"))
    blocks = find_blocks(model.module, model.places)

    def holding() -> list[bool]:
        return [not is_placeholder(block.mlp.up_proj.weight.data) for block in blocks]  # type: ignore[union-attr]

    with TextWalk(model, TOKENS) as walk:
        assert holding() == [False, False]
        walk.reach(0)
        assert holding() == [True, False]
        walk.leave()
        assert holding() == [True, False]
        walk.reach(1)
        assert holding() == [False, True]
        walk.reach(2)
        assert holding() == [False, False]
    with pytest.raises(KeyboardInterrupt), TextWalk(model, TOKENS) as walk:
        walk.reach(1)
        raise KeyboardInterrupt
    assert empty(model)


def hand_on_more(model: Model) -> None:
    """Let blocks share an object in which one could leave something for another."""
    shared: dict[str, object] = {"keys": object()}
    for block in find_blocks(model.module, model.places):
        block.register_forward_pre_hook(
            lambda block, args, kwargs: (args, {**kwargs, "shared": shared}), with_kwargs=True
        )


def test_where_blocks_hand_on_more_all_run_each_time(tmp_path: Path) -> None:
    model = tiny_family("llama")
    expected = input_statistics(model, TOKENS, lambda *_: None)
    hand_on_more(model)
    with TextWalk(model, TOKENS) as walk:
        assert not walk.separable
        walk.reach(1)
        assert walk.reached == BEFORE
        assert same(walk.statistics(readers(model)), expected)
    other = streamed(saved(tmp_path, "llama"))
    hand_on_more(other)
    with pytest.raises(ModelError, match="cannot be run one block at a time"):
        TextWalk(other, TOKENS)


def test_it_is_tried_on_two_tokens_only(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    plain = text_walk.Pass

    def noted(model: Model, sequences: list[text_walk.TokenSequence]) -> text_walk.Pass:
        tried.extend(len(sequence.tokens) for sequence in sequences)
        return plain(model, sequences)

    monkeypatch.setattr(text_walk, "Pass", noted)
    TextWalk(tiny_family("llama"), TOKENS)
    assert tried == [2]
