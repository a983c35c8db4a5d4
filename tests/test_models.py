"""Loading: what is complete, and that a reference is what it seems."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, build_tokenizer, tiny_config, tiny_family, tiny_llama
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from mpsearch import device
from mpsearch.errors import ModelError
from mpsearch.model_files import check_folder
from mpsearch.models import Model, fingerprint_of, from_module, load_whole
from mpsearch.space import SearchSpace


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model's folder, to be spoilt."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def shard(folder: Path, source: Path) -> Path:
    """The same model in several files."""
    module = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    module.save_pretrained(folder, max_shard_size="50KB")
    for file in source.glob("tokenizer*"):
        shutil.copy(file, folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def untied() -> Any:
    torch.manual_seed(1)
    config = tiny_llama(71).config
    config.tie_word_embeddings = False
    return AutoModelForCausalLM.from_config(config)


def with_biases() -> Any:
    torch.manual_seed(2)
    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=71,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config)


architectures = pytest.mark.parametrize(
    "build", [lambda: tiny_llama(71), untied, with_biases], ids=["tied", "untied", "with_biases"]
)


def wrapped(module: Any, dtype: torch.dtype = torch.float32) -> Model:
    return from_module("m", Path(), module, build_tokenizer(), torch.device("cpu"), dtype)


# ------------------------------------------------------------------------------ what is loaded


def test_shards_load_as_the_single_file_does(
    tiny_folder: Path, tiny: Model, tmp_path: Path
) -> None:
    found = load_whole(str(shard(tmp_path / "sharded", tiny_folder)))
    assert found.fingerprint == tiny.fingerprint
    assert found.layers == tiny.layers
    ours, theirs = found.module.state_dict(), tiny.module.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_bytes_of_a_folder_are_those_of_its_weight_files(tiny_folder: Path, tmp_path: Path) -> None:
    size = (tiny_folder / "model.safetensors").stat().st_size
    assert check_folder(tiny_folder, "m") == size
    sharded = shard(tmp_path / "sharded", tiny_folder)
    assert check_folder(sharded, "m") == sum(
        file.stat().st_size for file in sharded.glob("*.safetensors")
    )


def test_the_module_is_a_frozen_reference(tiny: Model) -> None:
    assert not tiny.module.training
    assert not any(parameter.requires_grad for parameter in tiny.module.parameters())
    assert tiny.dtype == device.compute_dtype(torch.device("cpu"))
    assert tiny.device == torch.device("cpu")
    for name, original in tiny.originals.items():
        assert tiny.places[name].weight.data_ptr() == original.data_ptr()


def test_the_reference_answers_as_transformers_does(tiny_folder: Path, tiny: Model) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(
        tiny_folder, dtype=tiny.dtype, attn_implementation="sdpa"
    )
    tokens = torch.randint(5, 71, (1, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(tiny.module(tokens).logits, theirs(tokens).logits)


def test_float32_arithmetic_runs_on_bf16_values() -> None:
    module = tiny_llama(71, seed=3)
    exact = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    model = wrapped(module, torch.float32)
    assert model.dtype == torch.float32
    for name, tensor in model.module.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, exact[name].to(torch.bfloat16).float())


# ------------------------------------------------------------------------------ its layers


@architectures
def test_every_parameter_is_a_layer_or_kept_exactly_once(build: Callable[[], Any]) -> None:
    module = build()
    model = wrapped(module)
    searched = [f"{layer.name}.weight" for layer in model.layers]
    found = Counter([*searched, *model.kept])
    assert set(found.values()) == {1}
    # named_parameters gives a shared tensor once, under its first name.
    assert set(found) == {name for name, _ in module.named_parameters()}
    sizes = dict(module.named_parameters())
    for layer in model.layers:
        assert tuple(sizes[f"{layer.name}.weight"].shape) == (layer.rows, layer.columns)
    for name, tensor in model.kept.items():
        assert tensor.dtype == torch.bfloat16
        assert tensor.device.type == "cpu"
        assert torch.equal(tensor.float(), sizes[name].float())


@architectures
def test_embedding_and_head_are_kept_and_linears_searched_in_model_order(
    build: Callable[[], Any],
) -> None:
    model = wrapped(build())
    assert [layer.name for layer in model.layers] == [
        f"model.layers.{block}.{part}_proj"
        for block in (0, 1)
        for part in (
            *(f"self_attn.{letter}" for letter in "qkvo"),
            *(f"mlp.{word}" for word in ("gate", "up", "down")),
        )
    ]
    assert "model.embed_tokens.weight" in model.kept
    assert ("lm_head.weight" in model.kept) == (not model.module.config.tie_word_embeddings)


@architectures
def test_kept_bytes_are_what_safetensors_stores(build: Callable[[], Any], tmp_path: Path) -> None:
    module = build().to(torch.bfloat16)
    module.save_pretrained(tmp_path)
    model = wrapped(module)
    stored = load_file(tmp_path / "model.safetensors")
    searched = sum(2 * layer.weights for layer in model.layers)
    assert model.kept_bytes + searched == sum(tensor.nbytes for tensor in stored.values())
    save_file({name: t.contiguous() for name, t in model.kept.items()}, tmp_path / "kept")
    content = (tmp_path / "kept").read_bytes()
    assert model.kept_bytes == len(content) - 8 - int.from_bytes(content[:8], "little")


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_of_an_unquantized_assignment_are_what_safetensors_stores(
    family: str, tmp_path: Path
) -> None:
    model = tiny_family(family)
    file = "version: 1\ntarget: compressed-tensors\nformats: [bf16]\n"
    space = SearchSpace.parse(file, "test").resolve(model)
    model.module.to(torch.bfloat16).save_pretrained(tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    assert space.stored_bytes(space.largest) == len(content) - header


@pytest.mark.parametrize("tied", [True, False])
def test_an_untied_head_costs_what_the_embedding_costs(tied: bool) -> None:
    model = tiny_family("llama", tie_word_embeddings=tied)
    assert model.kept_bytes == 2 * ((1 if tied else 2) * 71 * 64 + 5 * 64)


def test_kept_tensors_are_summed_by_reason_the_largest_first() -> None:
    model = tiny_family("mixtral")
    rows = model.kept_by_reason()
    assert [row["reason"] for row in rows] == ["embedding", "output head", "router", "norm"]
    assert [row["weights"] for row in rows] == [71 * 64, 71 * 64, 2 * 4 * 64, 5 * 64]
    assert sum(row["stored_bytes"] for row in rows) == model.kept_bytes
    assert sorted(name for row in rows for name in row["names"]) == sorted(model.kept)
    searched = model.kept_by_reason({"model.embed_tokens", "lm_head"})
    assert [row["reason"] for row in searched] == ["router", "norm"]


# ------------------------------------------------------------------------------ unknown kinds


class Cube(nn.Module):
    """A linear beside a weight that nobody knows."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.cube = nn.Parameter(torch.randn(size, 64, 64))
        self.inner = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + x @ self.cube.sum(0) * 0.01


@pytest.mark.parametrize(("size", "said"), [(8, True), (0, False)])
def test_an_unknown_weight_is_said_if_it_is_large_and_linears_work(size: int, said: bool) -> None:
    module = tiny_llama(71)
    module.model.layers[0].mlp.act_fn = nn.SiLU()
    module.model.layers[0].self_attn.o_proj = Cube(size)
    model = wrapped(module)
    name = "model.layers.0.self_attn.o_proj"
    assert f"{name}.inner" in model.places
    assert model.unrecognised == (
        {f"{name}.cube": "not recognised: 3-D 'cube' of Cube"} if said else {}
    )


class Leak(nn.Module):
    """Adds each token's state to the next one's, past any attention mask."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x + nn.functional.pad(x, (0, 0, 1, 0))[:, :-1])


def test_a_model_whose_tokens_see_past_the_mask_is_refused() -> None:
    module = tiny_llama(71)
    module.model.layers[1].mlp = Leak(module.model.layers[1].mlp)
    with pytest.raises(ModelError, match="lets a token see another that its mask hides"):
        wrapped(module)


def test_attention_that_takes_a_mask_for_numbers_is_refused() -> None:
    module = tiny_llama(71)
    module.set_attn_implementation("eager")
    with pytest.raises(ModelError, match="lets a token see another that its mask hides"):
        wrapped(module)


def test_a_model_that_takes_no_general_mask_is_refused() -> None:
    sizes = {"vocab_size": 71, "hidden_size": 64, "n_layer": 1, "n_head": 4}
    module = AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", **sizes))
    with pytest.raises(ModelError, match=r"\(BloomForCausalLM\) does not run under a general"):
        wrapped(module)


# ------------------------------------------------------------------------------ multimodal


def test_a_multimodal_folder_loads_and_its_text_model_is_searched(tmp_path: Path) -> None:
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64}
    vision |= {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    config = LlavaConfig(text_config=tiny_config("llama"), vision_config=vision)
    module = LlavaForConditionalGeneration(config).to(torch.bfloat16)
    module.save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    model = load_whole(str(tmp_path))
    assert type(model.module) is LlavaForConditionalGeneration
    assert len(model.layers) == 14
    assert all(".language_model.layers." in layer.name for layer in model.layers)
    stored = load_file(tmp_path / "model.safetensors")
    searched = sum(2 * layer.weights for layer in model.layers)
    assert model.kept_bytes + searched == sum(tensor.nbytes for tensor in stored.values())


# ------------------------------------------------------------------------------ its fingerprint


def test_the_fingerprint_is_of_the_weights_and_not_of_the_folder(folder: Path, tiny: Model) -> None:
    edit_config(folder, some_note="changes nothing")
    assert load_whole(str(folder)).fingerprint == tiny.fingerprint


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_one_changed_weight_changes_the_fingerprint(folder: Path, tiny: Model, name: str) -> None:
    edit_weights(folder, lambda weights: weights[name].view(-1)[-1:].mul_(1.01))
    assert load_whole(str(folder)).fingerprint != tiny.fingerprint


def test_the_fingerprint_does_not_depend_on_the_arithmetic(tiny_folder: Path, tiny: Model) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        module = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=dtype)
        assert wrapped(module, dtype).fingerprint == tiny.fingerprint


def test_swapped_tensors_of_one_shape_change_the_fingerprint(folder: Path, tiny: Model) -> None:
    def swap(weights: dict[str, torch.Tensor]) -> None:
        up, gate = (f"model.layers.0.mlp.{word}_proj.weight" for word in ("up", "gate"))
        weights[up], weights[gate] = weights[gate], weights[up]

    edit_weights(folder, swap)
    assert load_whole(str(folder)).fingerprint != tiny.fingerprint


def test_the_same_bytes_in_another_shape_change_the_fingerprint() -> None:
    plain, turned = tiny_llama(71), tiny_llama(71)
    for block in turned.model.layers:
        block.mlp.down_proj.weight.data = block.mlp.down_proj.weight.data.view(128, 64)
    assert fingerprint_of(turned.state_dict()) != fingerprint_of(plain.state_dict())
