"""Portions: a block's layers with their weights and statistics, or as many as memory holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import tiny_family
from test_bank_streamed import empty, streamed
from test_skeleton import saved
from test_text_walk import TOKENS, hand_on_more, same
from torch import Tensor

from mpsearch import portions as portions_module
from mpsearch.calibration import input_statistics
from mpsearch.models import Model
from mpsearch.portions import Portion, portions


def all_names(model: Model) -> list[str]:
    return [layer.name for layer in model.every_layer]


def of(
    model: Model, tokens: Tensor | None = None, lacks: Callable[[str], bool] = lambda name: True
) -> list[Portion]:
    return list(portions(model, all_names(model), lacks, tokens, lambda *_: None))


def shape(found: list[Portion]) -> list[tuple[int, float]]:
    """Of each portion how many layers, and the share of the way."""
    return [(len(portion.layers), round(portion.walked, 2)) for portion in found]


def test_a_loaded_model_is_one_portion_where_nothing_asks_for_inputs() -> None:
    model = tiny_family("llama")
    (portion,) = of(model)
    assert list(portion.layers) == all_names(model)
    assert not portion.statistics


def test_of_a_streamed_model_it_is_a_block(tmp_path: Path) -> None:
    model = streamed(saved(tmp_path, "llama", num_hidden_layers=3))
    assert shape(of(model)) == [(7, 0.25), (7, 0.5), (7, 0.75), (2, 1.0)]
    assert shape(of(model, TOKENS)) == [(7, 0.33), (7, 0.67), (7, 1.0), (1, 1.0), (1, 1.0)]
    assert of(model)[-1].layers == ["model.embed_tokens", "lm_head"]
    assert of(model, TOKENS)[-1].layers == ["model.embed_tokens"]
    assert empty(model)


def test_weights_are_in_place_and_statistics_those_of_a_whole_pass(tmp_path: Path) -> None:
    model = streamed(saved(tmp_path, "mixtral"))
    whole = tiny_family("mixtral")
    expected = input_statistics(whole, TOKENS, lambda *_: None)
    found = {}
    for portion in portions(model, all_names(model), lambda name: True, TOKENS, lambda *_: None):
        for name in portion.layers:
            assert torch.equal(model.places[name].weight, model.originals[name])
        found |= portion.statistics
    assert set(found) == set(expected)


@pytest.mark.parametrize(
    ("available_bytes", "expected"),
    [(2**34, [22]), (4 * 2 * 6 * 4 * 64**2 + 4 * 2 * 4 * 128**2, [14, 8]), (0, [7, 7, 7, 1])],
)
def test_gram_matrices_of_a_loaded_model_take_a_quarter_of_memory(
    monkeypatch: pytest.MonkeyPatch, available_bytes: int, expected: list[int]
) -> None:
    model = tiny_family("llama", num_hidden_layers=3)
    whole = input_statistics(model, TOKENS, lambda *_: None)
    monkeypatch.setattr(portions_module, "available_memory_bytes", lambda device: available_bytes)
    *found, embedding = of(model, TOKENS)
    assert [len(portion.layers) for portion in found] == expected
    assert same({k: v for portion in found for k, v in portion.statistics.items()}, whole)
    assert (embedding.layers, embedding.statistics) == (["model.embed_tokens"], {})


def test_what_is_made_meanwhile_is_left_out(tmp_path: Path) -> None:
    model = streamed(saved(tmp_path, "llama", num_hidden_layers=3))
    for tokens in (None, TOKENS):
        made: set[str] = set()
        found: list[list[str]] = []
        lacks = lambda name: name not in made  # noqa: B023, E731
        for portion in portions(model, all_names(model), lacks, tokens, lambda *_: None):
            found.append(list(portion.layers))
            made |= {name for name in all_names(model) if ".1." in name or "down" in name}
            made.add("model.embed_tokens")
        assert [len(names) for names in found] == [7, 6, 1]
        assert found[2] == ["lm_head"]


def test_where_blocks_hand_on_more_a_loaded_model_is_one_portion() -> None:
    model = tiny_family("llama")
    expected = input_statistics(model, TOKENS, lambda *_: None)
    hand_on_more(model)
    (portion,) = of(model, TOKENS)
    assert list(portion.layers) == all_names(model)
    assert same(dict(portion.statistics), expected)


def test_blocks_are_counted_up_to_the_last_that_lacks_something() -> None:
    model = tiny_family("llama", num_hidden_layers=4)
    seen: list[tuple[int, int]] = []
    names = [name for name in all_names(model) if ".0." in name or ".2." in name]
    list(portions(model, names, lambda name: True, TOKENS, lambda *count: seen.append(count)))
    assert seen == [(0, 3), (0, 3), (1, 3), (2, 3)]
