"""Blocks: found by the names of layers, recorded, and made to return something else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mpsearch.blocks import called, find_blocks, hand_on_all, recorded, returning


@pytest.mark.parametrize(
    ("names", "count"),
    [
        (["h.0.fc", "h.1.fc", "embed", "head"], 2),
        (["h.0.fc", "g.0.fc"], 0),
        (["embed", "head"], 0),
        (["named.0.fc"], 0),
    ],
)
def test_blocks_are_the_one_list_in_which_layers_are_numbered(names: list[str], count: int) -> None:
    def blocks() -> nn.ModuleList:
        return nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(2, 2)}) for _ in range(2))

    named = nn.ModuleDict({"0": nn.ModuleDict({"fc": nn.Linear(2, 2)})})
    module = nn.ModuleDict({"h": blocks(), "g": blocks(), "named": named})
    assert find_blocks(module, names) == (list(module["h"]) if count else [])


def test_outputs_are_recorded_and_replaced_only_meanwhile() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    inputs, other = torch.ones(1, 2), torch.zeros(1, 2)
    with recorded([first]) as outputs:
        expected = first(inputs)
        second(inputs)
    assert len(outputs) == 1 and outputs[0] is expected
    with pytest.raises(RuntimeError), returning([first], other):
        assert first(inputs) is other
        raise RuntimeError
    assert torch.equal(first(inputs), expected)
    assert len(outputs) == 1
    assert "forward" not in vars(first)


@pytest.mark.parametrize("as_tuple", [False, True])
def test_calls_are_noted_and_repeat_what_the_model_does(as_tuple: bool) -> None:
    class Scaling(nn.Module):
        def forward(self, state: torch.Tensor, factor: float, *, shift: float) -> object:
            state = state * factor + shift
            return (state, "more") if as_tuple else state

    blocks, inputs = [Scaling(), Scaling()], torch.arange(3.0)

    def model() -> torch.Tensor:
        state = inputs
        for depth, block in enumerate(blocks):
            output = block(state, 2.0, shift=float(depth))
            state = output[0] if as_tuple else output
        return state

    expected = model()
    with called(blocks, as_tuple) as calls:
        assert model() is inputs
    assert [state is inputs for state, _ in calls] == [True, True]
    state = inputs
    for block, (_, call) in zip(blocks, calls, strict=True):
        state = call.of(block, state)
    assert torch.equal(state, expected)
    assert not any("forward" in vars(block) for block in blocks)


class Block(nn.Module):
    """Adds one, notes what it read, and may add what another left in the shared dictionary."""

    def __init__(self, shared: dict[str, torch.Tensor], reads: str = ""):
        super().__init__()
        self.shared, self.reads = shared, reads

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        state = state + 1 + (self.shared.pop("left") if self.reads else 0)
        self.shared["left"] = state
        return state


@pytest.mark.parametrize("reads", ["", "what the one before it left"])
def test_blocks_hand_on_all_if_each_alone_returns_the_same(reads: str) -> None:
    shared: dict[str, torch.Tensor] = {}
    blocks = [Block(shared), Block(shared, reads), Block(shared)]

    def run() -> None:
        state = torch.ones(1, 2)
        for block in blocks:
            state = block(state)
        shared.clear()

    with recorded(blocks) as states:
        run()
    assert hand_on_all(blocks, states, run) is (not reads)
    assert not hand_on_all(blocks, [states[0], states[0], states[2]], run)
