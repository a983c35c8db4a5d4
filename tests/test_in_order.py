"""What layers read behind quantized ones: in the order of a pass, and equal to a walk by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import tiny_family
from torch import Tensor, nn

from mpsearch import text_walk
from mpsearch.calibration import batches, input_statistics
from mpsearch.in_order import Step, inputs_in_order, reading_order
from mpsearch.models import Model
from mpsearch.quantizers import InputStatistics
from mpsearch.tensor_files import _digest

TOKENS = torch.randint(5, 71, (11, 6), generator=torch.Generator().manual_seed(0))


def in_block(block: str, *steps: str) -> list[Step]:
    return [tuple(f"{block}.{name}" for name in step.split()) for step in steps]


def llama_block(number: int) -> list[Step]:
    return in_block(
        f"model.layers.{number}",
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj mlp.up_proj",
        "mlp.down_proj",
    )


def gpt2_block(number: int) -> list[Step]:
    block = f"transformer.h.{number}"
    return in_block(block, "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def mixtral_block(number: int) -> list[Step]:
    def experts(*parts: str) -> str:
        return " ".join(f"mlp.experts.{expert}.{part}" for expert in range(4) for part in parts)

    return in_block(
        f"model.layers.{number}",
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
        "self_attn.o_proj",
        experts("gate_proj", "up_proj"),
        experts("down_proj"),
    )


@pytest.mark.parametrize(
    ("family", "steps"),
    [
        (
            "llama",
            [("model.embed_tokens",), *llama_block(0), *llama_block(1), ("lm_head",)],
        ),
        ("gpt2", [("transformer.wte",), *gpt2_block(0), *gpt2_block(1)]),
        (
            "mixtral",
            [("model.embed_tokens",), *mixtral_block(0), *mixtral_block(1), ("lm_head",)],
        ),
    ],
)
def test_layers_come_in_the_order_of_a_pass_with_those_that_read_one_tensor(
    family: str, steps: list[Step]
) -> None:
    assert reading_order(tiny_family(family), TOKENS[:1]) == steps


def other_weight(model: Model, layer: str) -> Tensor:
    """A weight that changes what comes behind it."""
    return (model.originals[layer] * 0.5).round(decimals=1)


def note_inputs(model: Model, name: str, noted: list[Tensor]) -> Any:
    """Append `(tokens, columns)` of every call."""
    return model.module.get_submodule(name).register_forward_pre_hook(
        lambda module, inputs: noted.append(inputs[0].flatten(0, 1).clone())
    )


@torch.no_grad()
def by_hand(model: Model, order: list[Step]) -> Iterator[dict[str, Tensor]]:
    """`(columns, columns)` Gram matrices by layer, step by step, from whole passes each."""
    decoder = model.module.get_decoder()
    for step in order:
        seen: dict[str, list[Tensor]] = {name: [] for name in step if "embed" not in name}
        hooks = [note_inputs(model, name, inputs) for name, inputs in seen.items()]
        left = torch.cat([decoder(batch).last_hidden_state for batch in batches(TOKENS)])
        for hook in hooks:
            hook.remove()
        if "lm_head" in step:
            seen["lm_head"] = [left.flatten(0, 1)]
        yield {name: torch.cat(parts).T @ torch.cat(parts) for name, parts in seen.items()}
        for name in step:
            model.places[name].put(other_weight(model, name))
    model.restore()


def walked(model: Model, order: list[Step], lacking: set[str]) -> dict[str, InputStatistics]:
    found: dict[str, InputStatistics] = {}
    try:
        for step, statistics in inputs_in_order(model, TOKENS, order, lacking):
            assert set(statistics) <= set(step)
            found |= statistics
            for name in step:
                model.places[name].put(other_weight(model, name))
    finally:
        model.restore()
    return found


def every_layer(model: Model) -> set[str]:
    return {layer.name for layer in model.every_layer}


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox", "phi3", "qwen3"])
@pytest.mark.parametrize("separable", [True, False])
def test_statistics_are_those_of_a_walk_by_hand_behind_the_weights_in_place(
    family: str, separable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not separable:  # as where blocks read what others left elsewhere
        monkeypatch.setattr(text_walk, "_as_tuple", lambda model: None)
    model = tiny_family(family)
    order = reading_order(model, TOKENS[:1])
    found = walked(model, order, every_layer(model))
    plain = input_statistics(model, TOKENS, lambda done, total: None)
    assert set(found) == set(plain)
    compared = 0
    for grams in by_hand(model, order):
        for name, gram in grams.items():
            scale = float(gram.abs().max())
            torch.testing.assert_close(found[name].gram, gram, atol=1e-5 * scale, rtol=0)
            assert found[name].tokens == TOKENS.numel()
            assert not torch.allclose(plain[name].gram, gram, atol=1e-2 * scale, rtol=0)
            compared += 1
    assert compared == len(plain)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_with_the_reference_in_place_they_are_the_references_to_the_bit(family: str) -> None:
    model = tiny_family(family)
    plain = input_statistics(model, TOKENS, lambda done, total: None)
    order = reading_order(model, TOKENS[:1])
    found = {
        name: seen
        for _, statistics in inputs_in_order(model, TOKENS, order, every_layer(model))
        for name, seen in statistics.items()
    }
    assert set(found) == set(plain)
    for name, seen in plain.items():
        assert torch.equal(found[name].gram, seen.gram), name
        assert found[name].tokens == seen.tokens


def test_only_what_is_lacking_is_watched_and_nothing_behind_it_is_reached() -> None:
    model = tiny_family("llama")
    order = reading_order(model, TOKENS[:1])
    everything = walked(model, order, every_layer(model))
    lacking = {"model.layers.0.mlp.up_proj", "model.layers.1.self_attn.o_proj"}
    found = walked(model, order, lacking)
    assert set(found) == {*lacking, "model.layers.0.mlp.gate_proj"}
    for name, seen in found.items():
        assert torch.equal(seen.gram, everything[name].gram)
    steps = [step for step, _ in inputs_in_order(model, TOKENS, order, lacking)]
    assert steps == order[: order.index(("model.layers.1.self_attn.o_proj",)) + 1]
    assert list(inputs_in_order(model, TOKENS, order, set())) == []


def test_each_block_runs_alone(module_calls: Counter[nn.Module]) -> None:
    model = tiny_family("llama")
    order = reading_order(model, TOKENS[:1])
    blocks = model.module.model.layers
    module_calls.clear()
    walked(model, order, {"model.layers.1.mlp.down_proj"})
    passes = len(batches(TOKENS))
    assert module_calls[blocks[0]] == passes  # let through
    assert module_calls[blocks[1]] == passes  # watched


def test_no_hook_is_left_and_no_block_stays_replaced_after_an_interrupt() -> None:
    model = tiny_family("llama")
    before = _digest(model.module.state_dict())
    order = reading_order(model, TOKENS[:1])
    walk = inputs_in_order(model, TOKENS, order, every_layer(model))
    for _, statistics in walk:
        if "model.layers.1.self_attn.o_proj" in statistics:
            break
    walk.close()
    for module in model.module.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks
        assert "forward" not in vars(module)
    assert _digest(model.module.state_dict()) == before
