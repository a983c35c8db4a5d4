"""Geometry by hand: outliers, effective rank, drift, and what every family's groups get."""

from __future__ import annotations

import math
import random
import weakref
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import FAMILIES, tiny_family
from test_skeleton import CPU, loaded
from test_walk import empty, folder_of, some_pass
from torch import nn

from mpsearch.bank import silent
from mpsearch.blocks import find_blocks
from mpsearch.errors import CheckError
from mpsearch.forward import Pass, TokenSequence
from mpsearch.geometry import (
    effective_rank,
    geometry,
    gram_bytes,
    outlier_ratio,
    read_by_block,
    read_inputs,
)
from mpsearch.layers import Layer
from mpsearch.models import Model
from mpsearch.quantizers import InputStatistics
from mpsearch.skeleton import load_skeleton
from mpsearch.space import SearchSpace


def some_work(model: Model, count: int = 6) -> Pass:
    rng = random.Random(0)
    sequences = [
        TokenSequence(tuple(rng.randrange(3, 70) for _ in range(8)), 5) for _ in range(count)
    ]
    return Pass(model, sequences, max_nodes=24)


# ------------------------------------------------------------------------------------ one matrix


def test_the_outlier_ratio_is_of_root_mean_squares() -> None:
    assert outlier_ratio(torch.diag(torch.tensor([1.0, 4.0, 4.0, 4.0, 400.0]))) == pytest.approx(10)
    assert outlier_ratio(torch.eye(7)) == 1


def test_channels_that_are_never_used_do_not_count() -> None:
    assert outlier_ratio(torch.diag(torch.tensor([0.0] * 9 + [1.0, 1.0, 9.0]))) == pytest.approx(3)
    assert outlier_ratio(torch.zeros(3, 3)) == 1
    assert effective_rank(torch.zeros(3, 3)) == 0


def test_the_effective_rank_of_equal_directions_is_their_number() -> None:
    turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))[0]
    for number in (1, 3, 8):
        values = torch.tensor([5.0] * number + [0.0] * (8 - number))
        assert effective_rank(turn @ torch.diag(values) @ turn.T) == pytest.approx(number, rel=1e-4)


def test_the_effective_rank_is_exp_of_the_entropy() -> None:
    shares = (0.5, 0.25, 0.25)
    expected = math.exp(-sum(share * math.log(share) for share in shares))
    assert effective_rank(4 * torch.diag(torch.tensor(shares))) == pytest.approx(expected)


# ------------------------------------------------------------------------------------ a model


@pytest.mark.parametrize("family", FAMILIES)
def test_every_group_of_every_family_has_its_geometry(family: str) -> None:
    model = tiny_family(family)
    space = SearchSpace.default().resolve(model)
    work = some_work(model)
    readings = read_inputs(work, silent)
    found = geometry(space.groups, readings, silent)
    assert all(set(values) == set(space.options) for values in found.values())
    assert all(value >= 1 for value in found["outlier_ratio"].values())
    for group in space.groups:
        assert 1 <= found["effective_rank"][group.name] <= group.layers[0].columns
    assert all(0 < drift < 2 for drift in found["drift"].values())
    assert len(readings.drift) == len(find_blocks(model.module, model.places)) == 2
    modules = model.module.modules()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def test_drift_is_one_minus_the_cosine_averaged_over_tokens() -> None:
    model = tiny_family("llama")
    work = some_work(model, 1)
    with torch.no_grad():
        states = model.module(**work.rows[0].inputs, output_hidden_states=True).hidden_states
    first = 1 - torch.cosine_similarity(states[0][0], states[1][0], dim=-1)
    drift = read_inputs(work, silent).drift
    assert drift[0] == pytest.approx(float(first.mean()), rel=1e-5)
    assert drift[0] != pytest.approx(drift[1], rel=1e-2)


def test_a_planted_outlier_channel_shows_in_the_groups_that_read_it() -> None:
    model = tiny_family("llama")
    space = SearchSpace.default().resolve(model)
    before = geometry(space.groups, read_inputs(some_work(model), silent), silent)
    model.module.model.layers[1].input_layernorm.weight.data[5] *= 100
    after = geometry(space.groups, read_inputs(some_work(model), silent), silent)
    reads_it = "model.layers.1.self_attn.q_proj+k_proj+v_proj"
    assert after["outlier_ratio"][reads_it] > 20 * before["outlier_ratio"][reads_it]
    assert after["effective_rank"][reads_it] < 2 < before["effective_rank"][reads_it]
    other = "model.layers.0.mlp.down_proj"
    assert after["outlier_ratio"][other] == before["outlier_ratio"][other]


def test_an_embedding_reads_no_vectors_and_the_head_does() -> None:
    model = tiny_family("llama", tie_word_embeddings=False)
    text = "version: 1\ntarget: compressed-tensors\nformats: [int8-g64]\n"
    text += "embedding: [fp8, bf16]\nhead: [int8-g64, bf16]\n"
    space = SearchSpace.parse(text, "test").resolve(model)
    found = geometry(space.groups, read_inputs(some_work(model), silent), silent)
    assert "model.embed_tokens" in space.options
    assert set(space.options) - set(found["effective_rank"]) == {"model.embed_tokens"}
    assert set(space.options) - set(found["drift"]) == {"model.embed_tokens", "lm_head"}


def test_inputs_that_are_nan_are_named() -> None:
    model = tiny_family("llama")
    model.module.model.layers[1].input_layernorm.weight.data[5] = torch.nan
    with pytest.raises(CheckError, match=r"'model\.layers\.1\.self_attn\.q_proj' are NaN"):
        read_inputs(some_work(model), silent)


def test_siblings_share_one_matrix_and_experts_have_their_own() -> None:
    names = ["m.0.attn.q_proj", "m.0.attn.k_proj", "m.0.attn.v_proj"]
    names += [f"m.0.mlp.experts.{expert}.up_proj" for expert in range(4)]
    layers: Any = SimpleNamespace(layers=[Layer(name, 4, 64) for name in names], kept_bytes=0)
    space = SearchSpace.default().resolve(layers)
    assert gram_bytes(space.groups) == 4 * 64**2 * (1 + 4)


# ------------------------------------------------------------------------------ streamed


@pytest.mark.parametrize("name", ["llama", "tied", "gpt2", "mixtral", "states in a tuple"])
def test_a_streamed_model_reads_block_by_block_what_the_loaded_one_reads(
    name: str, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path, name)
    expected = read_inputs(some_pass(loaded(folder, torch.bfloat16)), silent)
    model = load_skeleton(str(folder), device=CPU, dtype=torch.bfloat16)
    found: dict[str, InputStatistics] = {}
    drift: dict[int, float] = {}
    seen: list[int] = []
    layers: list[str] = []
    report = lambda stage, done, total: seen.append(done)  # noqa: E731
    for names, readings in read_by_block(some_pass(model), report):
        assert names >= readings.inputs.keys()
        assert torch.isfinite(model.places[min(names)].weight).all()
        found |= readings.inputs
        drift |= readings.drift
        layers += names
    assert found.keys() == expected.inputs.keys()
    assert Counter(layers) == Counter(layer.name for layer in model.every_layer)
    for layer, statistics in expected.inputs.items():
        assert found[layer].tokens == statistics.tokens, layer
        assert torch.equal(found[layer].gram, statistics.gram), layer
    assert drift == expected.drift
    assert seen == list(range(5))
    assert empty(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())


def test_matrices_of_one_block_alone_are_held(tmp_path: Path) -> None:
    model = load_skeleton(str(folder_of(tmp_path, "llama")), device=CPU, dtype=torch.float32)
    grams: list[weakref.ref[torch.Tensor]] = []
    for _, readings in read_by_block(some_pass(model), silent):
        assert not any(gram() is not None for gram in grams)
        now = {id(s.gram): s.gram for s in readings.inputs.values()}
        grams += map(weakref.ref, now.values())
        del readings, now
    assert len(grams) == 3 * 4 + 1


def test_without_readings_no_row_runs(tmp_path: Path, module_calls: Counter[nn.Module]) -> None:
    model = load_skeleton(str(folder_of(tmp_path, "llama")), device=CPU, dtype=torch.float32)
    for names, readings in read_by_block(some_pass(model), silent, inputs=False):
        assert not readings.inputs and not readings.drift
        for layer in names:
            assert torch.equal(model.places[layer].weight, model.originals[layer])
    blocks = find_blocks(model.module, model.places)
    assert not any(module_calls[block] for block in blocks)
    assert empty(model)


def test_inputs_of_a_streamed_model_that_are_nan_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_skeleton(str(folder_of(tmp_path, "llama")), device=CPU, dtype=torch.float32)
    assert model.checkpoint is not None
    right, norm = model.checkpoint.read, "model.layers.1.input_layernorm.weight"

    def read(names: Iterable[str]) -> dict[str, torch.Tensor]:
        return {k: w * torch.nan if k == norm else w for k, w in right(names).items()}

    monkeypatch.setattr(model.checkpoint, "read", read)
    with pytest.raises(CheckError, match=r"'model\.layers\.1\.self_attn\.q_proj' are NaN"):
        list(read_by_block(some_pass(model), silent))
    assert empty(model)
