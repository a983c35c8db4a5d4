"""The table of a streamed model: that of the loaded one, a block's weights decoded once for all."""

from __future__ import annotations

import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from banks import built
from test_sensitivity_families import FEW
from test_skeleton import CPU, loaded
from test_walk import empty, folder_of
from torch import Tensor

from mpsearch.bank import Bank, silent
from mpsearch.evaluate import all_layers
from mpsearch.facts import FactSet
from mpsearch.formats import Format
from mpsearch.forward import Pass
from mpsearch.measures import Sensitivity
from mpsearch.models import Model
from mpsearch.quantizers.rounding import Rounding
from mpsearch.recall import SHOTS, ask
from mpsearch.sensitivity import _fisher, measure_sensitivity
from mpsearch.skeleton import load_skeleton
from mpsearch.space import SearchSpace


def both_ways(
    name: str, text: str, dtype: torch.dtype, facts: FactSet, root: Path, **asked: Any
) -> tuple[Sensitivity, Sensitivity]:
    """The table of a loaded model, and of a streamed one."""
    folder = folder_of(root, name)
    models = (loaded(folder, dtype), load_skeleton(str(folder), device=CPU, dtype=dtype))
    whole, streamed = (
        measure_sensitivity(
            space := SearchSpace.parse(text, "test").resolve(model),
            built(model, Rounding(), space, root),
            facts,
            facts.part("search")[:12],
            **asked,
        )
        for model in models
    )
    assert empty(models[1])
    assert not any(parameter.requires_grad for parameter in models[1].module.parameters())
    return whole, streamed


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama", torch.float32),
        ("tied", torch.bfloat16),
        ("gpt2", torch.float32),
        ("mixtral", torch.bfloat16),
        ("states in a tuple", torch.float32),
    ],
)
def test_a_streamed_model_has_the_table_of_the_loaded_one_to_the_bit(
    name: str, dtype: torch.dtype, tiny_facts: FactSet, tmp_path: Path
) -> None:
    whole, streamed = both_ways(name, FEW, dtype, tiny_facts, tmp_path, check=name == "llama")
    assert len(streamed.measures) == 6 + (name == "llama")
    assert all(0 < damage < float("inf") for damage in streamed.fisher_nats.values())
    assert list(streamed.fisher_nats) == list(whole.fisher_nats)
    assert {**vars(streamed), "provenance": {}} == {**vars(whole), "provenance": {}}
    differing = {
        key for key in whole.provenance if whole.provenance[key] != streamed.provenance[key]
    }
    assert not differing


def test_one_block_of_gram_matrices_has_to_fit(
    tiny_facts: FactSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grams = 4 * (4 * 64**2 + 128**2)  # of a block, siblings each with their own at most
    measures = ["fisher_nats", "weight_error"]
    for available, count in ((2 * grams, 6), (2 * grams // 3, 2)):
        monkeypatch.setattr(
            "mpsearch.sensitivity.available_memory_bytes", lambda device, of=available: of
        )
        model = load_skeleton(str(folder_of(tmp_path, "llama")), device=CPU, dtype=torch.float32)
        space = SearchSpace.parse(FEW, "test").resolve(model)
        bank = built(model, Rounding(), space, tmp_path)
        found = measure_sensitivity(space, bank, tiny_facts, tiny_facts.part("search")[:4])
        assert len(found.measures) == count
    assert list(found.measures) == measures


@pytest.mark.parametrize("name", ["llama", "tied", "gpt2"])
def test_embedding_and_head_of_a_streamed_model_are_damaged_as_those_of_the_loaded_one(
    name: str, tiny_facts: FactSet, tmp_path: Path
) -> None:
    head = "head: [int8-g64, bf16]\n" if name == "llama" else ""
    text = FEW + "embedding: [fp8, int8-channel-unpacked, bf16]\n" + head
    whole, streamed = both_ways(name, text, torch.float32, tiny_facts, tmp_path, around=False)
    assert list(streamed.fisher_nats) == list(whole.fisher_nats)
    for key, damage in whole.fisher_nats.items():
        assert streamed.fisher_nats[key] == pytest.approx(damage, rel=1e-4)
        assert (damage > 0) == (key[1] != "bf16")


def test_what_is_decoded_does_not_outlive_its_block(tiny_facts: FactSet, tmp_path: Path) -> None:
    model = load_skeleton(str(folder_of(tmp_path, "llama")), device=CPU, dtype=torch.float32)
    space = SearchSpace.parse(FEW, "test").resolve(model)
    held: Counter[int | None] = Counter()
    alive: list[tuple[int | None, weakref.ref[Tensor]]] = []
    depth_of = {layer.name: group.depth for group in space.groups for layer in group.layers}

    class Watched(Bank):
        def weight(self, layer: str, fmt: Format) -> Tensor:
            weight = super().weight(layer, fmt)
            alive.append((depth_of[layer], weakref.ref(weight)))
            held.update({depth for depth, reference in alive if reference() is not None})
            assert {d for d, w in alive if w() is not None} == {depth_of[layer]}
            return weight

    bank = Watched(model, Rounding(), root=tmp_path / "bank")
    bank.build(all_layers(space))
    _fisher(space, bank, small_work(model, tiny_facts), 0, 32, silent)
    decoded = Counter(depth for depth, _ in alive)
    assert decoded == dict.fromkeys(range(3), 7 * 2)  # once for all rows


def small_work(model: Model, facts: FactSet) -> Pass:
    some = facts.part("search")[:12]
    return Pass(model, [ask(model, facts, f, f.answer, SHOTS) for f in some], max_nodes=40)


def test_without_memory_gradients_are_taken_one_by_one_and_say_the_same(
    tiny_facts: FactSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_skeleton(str(folder_of(tmp_path, "llama")), device=CPU, dtype=torch.float32)
    space = SearchSpace.parse(FEW, "test").resolve(model)
    bank = built(model, Rounding(), space, tmp_path / "bank")
    work = small_work(model, tiny_facts)
    assert len(work.rows) > 1
    together = _fisher(space, bank, work, 0, 32, silent)
    monkeypatch.setattr("mpsearch.sensitivity.available_memory_bytes", lambda device: 0)
    assert _fisher(space, bank, work, 0, 32, silent) == together


@pytest.mark.parametrize("done", [1, 3])
def test_a_streamed_model_is_left_as_it_was_after_an_interrupt(
    done: int, tiny_facts: FactSet, tmp_path: Path
) -> None:
    model = load_skeleton(str(folder_of(tmp_path, "llama")), device=CPU, dtype=torch.float32)
    space = SearchSpace.parse(FEW, "test").resolve(model)
    bank = built(model, Rounding(), space, tmp_path / "bank")
    calls = 0

    class Interrupting(Bank):
        def weight(self, layer: str, fmt: Format) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == 10 * done:
                raise KeyboardInterrupt
            return super().weight(layer, fmt)

    bank = Interrupting(model, Rounding(), root=tmp_path / "bank")
    with pytest.raises(KeyboardInterrupt):
        _fisher(space, bank, small_work(model, tiny_facts), 0, 32, silent)
    assert empty(model)
    assert not any(parameter.requires_grad for parameter in model.module.parameters())
