"""Weights that are in their places while they are needed: a streamed model runs as a loaded one."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from conftest import tiny_family
from test_bank_streamed import BF16, FAMILIES, empty, streamed
from test_skeleton import loaded, saved
from torch import Tensor, nn

from mpsearch.blocks import returning
from mpsearch.checkpoint import Checkpoint
from mpsearch.flow import BlockWeights, flowing, is_placeholder
from mpsearch.models import Model

TOKENS = torch.tensor([[3, 9, 5, 40], [8, 8, 2, 60]])


@torch.no_grad()
def logits(model: Model) -> Tensor:
    found: Tensor = model.module(TOKENS, use_cache=False).logits
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_the_model_says_what_the_loaded_one_says(tmp_path: Path, name: str) -> None:
    family, dtype, changes = FAMILIES[name]
    folder = saved(tmp_path, family, **changes)  # type: ignore[arg-type]
    whole, model = loaded(folder, dtype), streamed(folder, dtype)
    with flowing(model), flowing(whole):
        for _ in range(2):
            assert torch.equal(logits(model), logits(whole))
    assert empty(model)
    assert not any(module._forward_hooks for module in model.module.modules())


def test_each_block_has_weights_while_it_computes_and_the_next_is_read_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = streamed(saved(tmp_path, "llama", num_hidden_layers=5), BF16)
    blocks = model.module.model.layers
    holding: list[set[int]] = []
    by: set[str] = set()
    read: list[str] = []
    plain = Checkpoint.read

    def noted(self: Checkpoint, names: Iterable[str]) -> dict[str, Tensor]:
        read.append(next(iter(names)).split(".")[2])
        by.add(threading.current_thread().name)
        return plain(self, names)

    def note(block: nn.Module, inputs: object) -> None:
        parts = [(i, part.data) for i, other in enumerate(blocks) for part in other.parameters()]
        holding.append({depth for depth, part in parts if not is_placeholder(part)})

    monkeypatch.setattr(Checkpoint, "read", noted)
    with flowing(model):
        for block in blocks:
            block.mlp.register_forward_pre_hook(note)
        logits(model)
        logits(model)
    assert holding == [{depth} for depth in range(5)] * 2
    assert "".join(read) == "01234012340"  # the first once more, ahead
    assert all(name.startswith("fetch") for name in by)


def test_blocks_that_compute_nothing_read_nothing(tmp_path: Path) -> None:
    model = streamed(saved(tmp_path, "llama"))
    assert model.checkpoint is not None
    with flowing(model):
        before = model.checkpoint.read_bytes
        with returning(model.module.model.layers, torch.zeros(2, 4, 64)):
            logits(model)
    assert model.checkpoint.read_bytes - before <= 2 * sum(
        part.numel() for part in model.module.model.layers[0].parameters()
    )  # the first one's, ahead


def test_after_an_error_no_block_holds_anything(tmp_path: Path) -> None:
    model = streamed(saved(tmp_path, "llama"))

    def refuse(module: object, inputs: object) -> None:
        raise KeyboardInterrupt

    handle = model.module.model.layers[1].mlp.register_forward_pre_hook(refuse)
    with pytest.raises(KeyboardInterrupt), flowing(model):
        logits(model)
    handle.remove()
    assert empty(model)
    with flowing(model):
        assert not logits(model).isnan().any()


@pytest.mark.parametrize("family", ["mixtral", "gpt2"])
def test_one_block_is_held_whole_or_some_of_its_layers(tmp_path: Path, family: str) -> None:
    model = streamed(saved(tmp_path, family))
    weights = BlockWeights(model)
    for depth in (0, 1):
        weights.hold(depth)
        for layer in model.layers:
            weight = model.places[layer.name].weight
            inside = weights.depth_of[layer.name] == depth
            assert is_placeholder(weight) != inside
            assert not inside or torch.equal(weight, model.originals[layer.name])
    some = [layer.name for layer in model.layers if weights.depth_of[layer.name] == 0][-2:]
    weights.hold_layers(some)
    held = [x.name for x in model.layers if not is_placeholder(model.places[x.name].weight)]
    assert set(some) <= set(held)
    assert all(weights.depth_of[layer] == 0 for layer in held)
    weights.release()
    assert empty(model)


def test_a_loaded_model_keeps_its_weights() -> None:
    model = tiny_family("llama")
    before = [parameter.data_ptr() for parameter in model.module.parameters()]
    weights = BlockWeights(model)
    weights.hold(1)
    weights.hold_layers([model.layers[0].name])
    weights.release()
    assert [parameter.data_ptr() for parameter in model.module.parameters()] == before
    assert weights.read(0) == {}
