"""Blocks on several devices: who gets which, and that states follow them. Meta stands for a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tokenizer, tiny_config
from test_opening import plenty, sizes
from torch import nn
from transformers import AutoModelForCausalLM

from mpsearch import device, opening
from mpsearch.blocks import find_blocks
from mpsearch.device import place_blocks, spread
from mpsearch.errors import ResourceError
from mpsearch.footprint import JOBS
from mpsearch.models import from_module
from mpsearch.places import find_places

CPU, META = torch.device("cpu"), torch.device("meta")


def fullest(blocks: Sequence[int], free: Sequence[int], of: Sequence[int]) -> float:
    on = [sum(b for b, d in zip(blocks, of, strict=True) if d == n) for n in range(len(free))]
    return max(used / max(room, 1e-9) for used, room in zip(on, free, strict=True))


@pytest.mark.parametrize(
    ("blocks", "free"),
    [
        ([10] * 7, [100, 100]),
        ([10] * 7, [100, 50, 20]),
        ([5, 5, 30, 5, 5, 5], [40, 40]),
        ([10] * 6, [0, 70]),
        ([1, 1, 8], [8, 3]),
        ([9, 1, 9, 1, 9], [11, 11, 11]),
    ],
)
def test_the_fullest_device_is_as_little_full_as_can_be(blocks: list[int], free: list[int]) -> None:
    cuts = combinations(range(len(blocks) + len(free) - 1), len(free) - 1)
    runs = []
    for cut in cuts:  # where a device's run ends and the next one's begins
        marks = [place in cut for place in range(len(blocks) + len(free) - 1)]
        runs.append([sum(marks[:n]) for n, mark in enumerate(marks) if not mark])
    best = min(fullest(blocks, free, run) for run in runs)
    if best > 1:
        with pytest.raises(ResourceError, match="is free on its devices; close other programs"):
            spread(blocks, free)
        return
    found = spread(blocks, free)
    assert found == sorted(found) and len(found) == len(blocks)
    assert fullest(blocks, free, found) <= best + 1e-3


def test_equal_devices_take_halves() -> None:
    assert spread([10] * 8, [100, 100]) == [0] * 4 + [1] * 4
    assert spread([10] * 9, [200, 100]) == [0] * 6 + [1] * 3
    assert spread([], [1]) == []


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Four blocks, of which the second half lies on meta; head tied to the embedding."""
    module = AutoModelForCausalLM.from_config(
        tiny_config("llama", num_hidden_layers=4, tie_word_embeddings=True)
    ).eval()
    blocks = find_blocks(module, find_places(module))
    block_bytes = sum(parameter.nbytes for parameter in blocks[0].parameters())
    outside_bytes = sum(p.nbytes for p in module.parameters()) - 4 * block_bytes
    free = {CPU: outside_bytes + 4 * block_bytes, META: 4 * block_bytes}
    monkeypatch.setattr(device, "available_memory_bytes", free.__getitem__)
    place_blocks(module, blocks, (CPU, META))
    return module


def test_blocks_are_on_their_devices_and_all_else_on_the_first(split: Any) -> None:
    blocks = find_blocks(split, find_places(split))
    on = [{parameter.device for parameter in block.parameters()} for block in blocks]
    assert on == [{CPU}, {CPU}, {META}, {META}]
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    others = [*split.parameters(), *split.buffers()]
    assert {t.device for t in others if id(t) not in inside} == {CPU}
    assert split.lm_head.weight is split.get_input_embeddings().weight


def test_a_block_is_called_with_what_is_on_its_device(split: Any) -> None:
    blocks = find_blocks(split, find_places(split))
    seen: list[set[torch.device]] = []

    def note(block: nn.Module, args: Any, kwargs: Any) -> None:
        given = [*args, *kwargs.values()]
        given += [part for value in given if isinstance(value, tuple) for part in value]
        assert sum(isinstance(value, torch.Tensor) for value in given) >= 4  # mask, angles, states
        seen.append({value.device for value in given if isinstance(value, torch.Tensor)})

    for block in blocks:
        block.register_forward_pre_hook(note, with_kwargs=True)
    left = []
    blocks[2].register_forward_hook(lambda block, args, output: left.append(output))
    handed = []
    norm = split.model.norm
    norm.register_forward_pre_hook(lambda module, args: handed.append(args[0].device))
    blocks[3].forward = lambda state, **named: torch.zeros(state.shape, device=META)
    fake = device.moved

    def from_meta(value: Any, where: torch.device) -> Any:
        """What is on meta has no values to copy."""
        if isinstance(value, torch.Tensor) and value.device == META and where == CPU:
            return torch.zeros(value.shape)
        return fake(value, where)

    with pytest.MonkeyPatch.context() as patched, torch.no_grad():
        patched.setattr(device, "moved", from_meta)
        mask = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
        output = split(input_ids=torch.tensor([[1, 2, 3]]), attention_mask=mask, use_cache=False)
    assert seen == [{CPU}, {CPU}, {META}, {META}]
    assert left[0].device == META
    assert handed == [CPU]
    assert output.logits.device == CPU


def test_a_wrapped_model_knows_where_a_layer_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    module = AutoModelForCausalLM.from_config(tiny_config("llama", num_hidden_layers=4))
    asked: list[tuple[torch.device, ...]] = []

    def noted(module: nn.Module, blocks: Sequence[nn.Module], on: Any) -> None:
        asked.append(on)
        assert len(blocks) == 4

    monkeypatch.setattr("mpsearch.models.place_blocks", noted)
    model = from_module("m", Path(), module, build_tokenizer(), CPU, torch.float32, (META,))
    assert asked == [(CPU, META)]
    name = next(layer.name for layer in model.layers if ".3." in layer.name)
    there = nn.Parameter(torch.empty(1, 1, device=META))
    model.places[name] = replace(model.places[name], parameter=there)
    assert (model.device_of(name), model.device) == (META, CPU)


def test_several_devices_are_used_where_one_does_not_hold_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(opening, "pick_devices", lambda: (CPU, META))
    ask = JOBS["ask"]
    plenty(monkeypatch, 2**40)
    whole = opening.choose("big", sizes(), ask)
    assert whole.beside == () and not whole.streamed
    plenty(monkeypatch, whole.footprint.least_bytes * 2 // 3)
    shared = opening.choose("big", sizes(), ask)
    assert shared.beside == (META,) and not shared.streamed
    assert "on 2 devices" in shared.why
    device.limit_memory(whole.footprint.least_bytes * 2 // 3)
    try:
        assert opening.choose("big", sizes(), ask).streamed
    finally:
        device.limit_memory(None)
