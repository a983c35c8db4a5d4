"""Calibration: a seed decides the text, and Gram matrices are those of the layers' inputs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tokenizer, tiny_family, tiny_llama
from test_bank_streamed import FAMILIES
from test_skeleton import CPU, loaded, saved
from torch import Tensor, nn

from mpsearch import calibration
from mpsearch.calibration import (
    Calibration,
    calibration_tokens,
    input_statistics,
    sample_text,
)
from mpsearch.errors import ResourceError, UsageError
from mpsearch.models import Model, from_module
from mpsearch.skeleton import load_skeleton

RECIPE = Calibration(sequences=11, length=24, seed=3)  # a full batch of eight and a part of one


def ignore(done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def model() -> Model:
    """Float32, so that Gram matrices may be compared closely; random weights write any token."""
    tokenizer = build_tokenizer()
    module = tiny_llama(len(tokenizer), seed=2)
    return from_module("random", Path(), module, tokenizer, torch.device("cpu"), torch.float32)


@torch.no_grad()
def inputs_of(model: Model, layer: str, tokens: Tensor) -> Tensor:
    """`(tokens, columns)`: what one layer reads in a plain pass of one text after another."""
    seen: list[Tensor] = []
    hook = model.module.get_submodule(layer).register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0][0].clone())
    )
    for text in tokens:
        model.module(text[None])
    hook.remove()
    return torch.cat(seen)


# ------------------------------------------------------------------------------ the text


def test_the_text_has_the_recipes_size_and_only_known_tokens(model: Model) -> None:
    tokens = sample_text(model, RECIPE)
    assert tokens.shape == (RECIPE.sequences, RECIPE.length)
    assert tokens.dtype == torch.int64
    assert 0 <= int(tokens.min()) <= int(tokens.max()) < len(model.tokenizer)


def test_a_seed_decides_the_text(tiny: Model) -> None:
    first, again = sample_text(tiny, RECIPE), sample_text(tiny, RECIPE)
    other = sample_text(tiny, Calibration(RECIPE.sequences, RECIPE.length, seed=4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_sampling_neither_reads_nor_moves_the_global_generator(model: Model) -> None:
    torch.manual_seed(0)
    expected = sample_text(model, RECIPE)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert torch.equal(sample_text(model, RECIPE), expected)
    assert torch.equal(torch.get_rng_state(), before)


@torch.no_grad()
def test_the_text_is_what_the_model_writes_without_a_cache(model: Model) -> None:
    generator = torch.Generator().manual_seed(RECIPE.seed)
    vocabulary = len(model.tokenizer)
    tokens = torch.randint(vocabulary, (RECIPE.sequences, 1), generator=generator)
    while tokens.shape[1] < RECIPE.length:
        chances = model.module(tokens).logits[:, -1].softmax(-1)
        drawn = torch.rand(len(tokens), 1, generator=generator)
        newest = (chances.cumsum(-1) < drawn).sum(-1, keepdim=True)
        tokens = torch.cat([tokens, newest], dim=1)
    # A draw within float32 rounding of an edge may fall on its other side on another machine.
    assert (sample_text(model, RECIPE) == tokens).all(dim=1).double().mean() > 0.85


@pytest.mark.parametrize("name", FAMILIES)
def test_a_streamed_model_writes_the_very_same_text(tmp_path: Path, name: str) -> None:
    family, dtype, changes = FAMILIES[name]
    folder = saved(tmp_path, family, **changes)  # type: ignore[arg-type]
    whole, streamed = loaded(folder, dtype), load_skeleton(str(folder), device=CPU, dtype=dtype)
    written = sample_text(streamed, RECIPE)
    assert torch.equal(written, sample_text(whole, RECIPE))
    assert len(written.unique()) > 20


def test_a_streamed_model_reads_its_blocks_once_a_token(tmp_path: Path) -> None:
    model = load_skeleton(str(saved(tmp_path, "llama")), device=CPU, dtype=torch.float32)
    assert model.checkpoint is not None
    before, steps = model.checkpoint.read_bytes, list[tuple[int, int]]()
    sample_text(model, RECIPE, lambda *step: steps.append(step))
    block_bytes = 2 * sum(part.numel() for part in model.module.model.layers[0].parameters())
    # And the first once more, ahead of a token that does not come.
    assert model.checkpoint.read_bytes - before == block_bytes * (2 * (RECIPE.length - 1) + 1)
    assert steps == [(done, RECIPE.length) for done in range(1, RECIPE.length + 1)]


def test_a_text_whose_keys_and_values_fit_no_memory_is_refused_at_its_first_token(
    model: Model, monkeypatch: pytest.MonkeyPatch, module_calls: Counter[nn.Module]
) -> None:
    # Keys and values of two blocks, two heads of 16 in float32, of all tokens but the first and
    # the last, which is not read.
    needed = 2 * 2 * 2 * 16 * 4 * RECIPE.sequences * (RECIPE.length - 2)
    monkeypatch.setattr(calibration, "available_memory_bytes", lambda device: needed)
    sample_text(model, RECIPE)
    module_calls.clear()
    monkeypatch.setattr(calibration, "available_memory_bytes", lambda device: needed - 1)
    with pytest.raises(ResourceError, match=r"11 x 24 tokens .*give a text with --calibration"):
        sample_text(model, RECIPE)
    assert module_calls[model.module] == 1


def test_a_text_is_written_once_and_found_again(model: Model, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []

    def kept(recipe: Calibration) -> Tensor:
        steps.clear()
        return calibration_tokens(model, recipe, lambda *step: steps.append(step), tmp_path)

    first = kept(RECIPE).clone()  # the file is mapped
    assert torch.equal(first, sample_text(model, RECIPE))
    assert len(steps) == RECIPE.length
    assert torch.equal(kept(RECIPE), first)
    assert steps == []
    assert not torch.equal(kept(replace(RECIPE, seed=4)), first)
    paths = sorted(tmp_path.glob("*.tokens"), key=lambda path: path.stat().st_mtime_ns)
    assert len(paths) == 2
    paths[0].write_bytes(paths[0].read_bytes()[:-1] + b"?")
    assert torch.equal(kept(RECIPE), first)
    assert len(steps) == RECIPE.length


def test_a_tokenizer_may_know_tokens_that_the_model_does_not(model: Model) -> None:
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["more", "words"])
    other = replace(model, tokenizer=tokenizer)
    assert torch.equal(sample_text(other, RECIPE), sample_text(model, RECIPE))


def test_settings_name_all_that_decides_the_text() -> None:
    first = dict(Calibration(5, 6, 7).settings)
    assert first == {
        "text": "sampled from the model by inversion",
        "sequences": 5,
        "length": 6,
        "seed": 7,
    }
    for other in (Calibration(4, 6, 7), Calibration(5, 5, 7), Calibration(5, 6, 8)):
        assert dict(other.settings) != first


# ------------------------------------------------------------------------------ the matrices


def test_gram_matrices_are_the_sums_of_outer_products_of_the_inputs(model: Model) -> None:
    tokens = sample_text(model, RECIPE)
    statistics = input_statistics(model, tokens, ignore)
    assert set(statistics) == {layer.name for layer in model.layers}
    for layer in model.layers:
        seen = inputs_of(model, layer.name, tokens).double()
        expected = sum(torch.outer(x, x) for x in seen)
        found = statistics[layer.name]
        assert found.gram.dtype == torch.float32
        assert found.tokens == len(seen) == tokens.numel()
        scale = float(expected.diagonal().max())
        torch.testing.assert_close(found.gram.double(), expected, atol=1e-5 * scale, rtol=0)


def test_a_heads_matrix_is_of_what_the_final_norm_gives_and_a_tied_head_has_none(
    model: Model,
) -> None:
    tokens = torch.arange(5, 65).reshape(12, 5)
    untied = tiny_family("llama")
    seen: list[torch.Tensor] = []
    hook = untied.module.lm_head.register_forward_pre_hook(lambda module, x: seen.append(x[0]))
    with torch.no_grad():
        untied.module(tokens)
    hook.remove()
    inputs = seen[0].reshape(-1, 64)
    found = input_statistics(untied, tokens, ignore)["lm_head"]
    assert found.tokens == len(inputs) == 60
    torch.testing.assert_close(found.gram, inputs.T @ inputs, atol=1e-4, rtol=1e-4)
    tied = input_statistics(model, tokens, ignore)
    assert set(tied) == {layer.name for layer in model.layers}


def test_layers_that_read_one_tensor_share_one_matrix_and_no_others_do(model: Model) -> None:
    statistics = input_statistics(model, sample_text(model, RECIPE), ignore)
    owners: dict[int, list[str]] = {}
    for layer in model.layers:
        owners.setdefault(id(statistics[layer.name].gram), []).append(layer.name)
    blocks = [f"model.layers.{block}" for block in (0, 1)]
    assert list(owners.values()) == [
        names
        for block in blocks
        for names in (
            [f"{block}.self_attn.{part}_proj" for part in "qkv"],
            [f"{block}.self_attn.o_proj"],
            [f"{block}.mlp.gate_proj", f"{block}.mlp.up_proj"],
            [f"{block}.mlp.down_proj"],
        )
    ]


def test_the_same_text_gives_the_same_matrices(tiny: Model) -> None:
    tokens = sample_text(tiny, RECIPE)
    first, again = (input_statistics(tiny, tokens, ignore) for _ in range(2))
    assert all(torch.equal(first[name].gram, again[name].gram) for name in first)


def test_progress_counts_texts(model: Model) -> None:
    seen: list[tuple[int, int]] = []
    input_statistics(
        model, sample_text(model, RECIPE), lambda done, total: seen.append((done, total))
    )  # fmt: skip
    assert seen == [(8, 11), (11, 11)]


def test_no_hook_is_left_behind_even_after_an_interrupt(model: Model) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    tokens = sample_text(model, RECIPE)
    with pytest.raises(KeyboardInterrupt):
        input_statistics(model, tokens, interrupt)
    input_statistics(model, tokens, ignore)
    assert not any(
        model.module.get_submodule(layer.name)._forward_pre_hooks for layer in model.layers
    )


# ------------------------------------------------------------------------------ experts


@torch.no_grad()
def expert_inputs_one_by_one(model: Model, tokens: Tensor) -> dict[str, list[Tensor]]:
    """Layer name to the vectors that it reads, from the block's definition, token by token."""
    seen: dict[str, list[Tensor]] = {}
    blocks = {name: m for name, m in model.module.named_modules() if hasattr(m, "experts")}

    def watch(name: str, block: Any) -> Any:
        def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:
            for x in inputs[0].flatten(0, 1):
                chosen = (block.gate.weight @ x).topk(2).indices
                for expert in chosen.tolist():
                    up_and_gate = block.experts.gate_up_proj[expert] @ x
                    gate, up = up_and_gate.chunk(2)
                    path = f"{name}.experts.{expert}"
                    seen.setdefault(f"{path}.gate_proj", []).append(x)
                    seen.setdefault(f"{path}.up_proj", []).append(x)
                    inner = torch.nn.functional.silu(gate) * up
                    seen.setdefault(f"{path}.down_proj", []).append(inner)

        return block.register_forward_pre_hook(hook)

    hooks = [watch(name, block) for name, block in blocks.items()]
    model.module(tokens)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_an_experts_matrices_are_of_its_own_tokens(family: str) -> None:
    model = tiny_family(family)
    tokens = torch.randint(5, 71, (3, 2), generator=torch.Generator().manual_seed(0))
    seen = expert_inputs_one_by_one(model, tokens)
    statistics = input_statistics(model, tokens, ignore)
    assert set(statistics) == {layer.name for layer in model.every_layer} - {"model.embed_tokens"}
    missed = 0
    for layer in model.layers:
        if ".experts." not in layer.name:
            continue
        found = statistics[layer.name]
        if layer.name not in seen:  # all inputs matter alike
            missed += 1
            assert torch.equal(found.gram, torch.eye(layer.columns))
            assert found.tokens == 1
            continue
        inputs = torch.stack(seen[layer.name])
        assert found.tokens == len(inputs)
        torch.testing.assert_close(found.gram, inputs.T @ inputs, atol=1e-4, rtol=1e-4)
    assert len(seen) > 12
    assert missed == len([n for n in statistics if ".experts." in n]) - len(seen)


def test_gate_and_up_of_an_expert_share_one_matrix() -> None:
    model = tiny_family("mixtral")
    statistics = input_statistics(model, torch.arange(5, 65)[None], ignore)
    path = "model.layers.0.mlp.experts.0"
    assert statistics[f"{path}.gate_proj"].gram is statistics[f"{path}.up_proj"].gram


def test_an_expert_without_tokens_gets_the_identity() -> None:
    model = tiny_family("mixtral")
    gate = model.module.model.layers[0].mlp.gate
    gate.weight.data = torch.zeros_like(gate.weight)  # ties go to the same two experts
    statistics = input_statistics(model, torch.arange(5, 25)[None], ignore)
    reached = {
        name.split(".")[5]
        for name, found in statistics.items()
        if name.startswith("model.layers.0.mlp.experts.") and found.tokens == 20
    }
    assert len(reached) == 2
    for expert in set("0123") - reached:
        found = statistics[f"model.layers.0.mlp.experts.{expert}.down_proj"]
        assert torch.equal(found.gram, torch.eye(128))


def test_conv1d_layers_get_matrices_of_their_inputs() -> None:
    model = tiny_family("gpt2")
    tokens = torch.arange(5, 25)[None]
    statistics = input_statistics(model, tokens, ignore)
    for layer in model.layers:
        seen = inputs_of(model, layer.name, tokens)
        found = statistics[layer.name].gram
        assert found.shape == (layer.columns, layer.columns)
        torch.testing.assert_close(found, seen.T @ seen, atol=1e-3, rtol=1e-4)


# ------------------------------------------------------------------------------ the user's text


def test_a_text_is_cut_into_pieces_from_its_beginning(model: Model, tmp_path: Path) -> None:
    words = "the color of s1 is red " * 10
    (tmp_path / "text").write_text(words)
    recipe = replace(Calibration.load(tmp_path / "text"), sequences=3, length=4)
    tokens = calibration_tokens(model, recipe)
    expected = model.tokenizer(words, add_special_tokens=False)["input_ids"][:12]
    assert tokens.tolist() == [expected[:4], expected[4:8], expected[8:]]


def test_settings_tell_texts_apart_and_lead_back_to_the_bank() -> None:
    one, two = Calibration(text="one"), Calibration(text="two")
    assert one.settings != two.settings
    assert "seed" not in one.settings
    assert Calibration.of(one.settings).settings == one.settings
    sampled = Calibration(4, 5, 6)
    assert Calibration.of(sampled.settings) == sampled


def test_a_text_that_is_too_short_says_how_much_is_needed(model: Model) -> None:
    with pytest.raises(UsageError, match=r"has 4 tokens, and 15 are needed \(3 pieces of 5\)"):
        calibration_tokens(model, Calibration(3, 5, text="the color of s1"))


def test_a_text_that_is_not_at_hand_is_asked_for(model: Model) -> None:
    recipe = Calibration.of(Calibration(text="gone").settings)
    with pytest.raises(UsageError, match="same --calibration file"):
        calibration_tokens(model, recipe)


def test_a_text_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("missing", "binary"):
        with pytest.raises(UsageError, match=f"calibration text .*{name}.* cannot be read"):
            Calibration.load(tmp_path / name)
