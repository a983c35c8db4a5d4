"""The bench: swaps only what changed, scores the same thing the same, restores the very tensors."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FAMILIES, tiny_family

from mpsearch.assignment import Assignment
from mpsearch.bank import Bank
from mpsearch.errors import CheckError
from mpsearch.estimates import relation_mean
from mpsearch.evaluate import Bench, all_layers, quantized_layers
from mpsearch.facts import FactSet
from mpsearch.formats import BF16, FORMATS, Format
from mpsearch.models import Model
from mpsearch.quantizers.rounding import Rounding
from mpsearch.recall import RecallProxy
from mpsearch.space import ResolvedSpace, SearchSpace


@pytest.fixture(scope="module")
def bank(tiny: Model, tiny_space: ResolvedSpace, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    bank = Bank(tiny, Rounding(), root=tmp_path_factory.mktemp("bank"))
    bank.build(all_layers(tiny_space))
    return bank


@pytest.fixture(scope="module")
def proxy(tiny: Model, tiny_facts: FactSet) -> RecallProxy:
    return RecallProxy(tiny, tiny_facts, tiny_facts.part("search"), contrast=False)


def uniform(space: ResolvedSpace, fmt: str) -> Assignment:
    return Assignment.of(dict.fromkeys(space.options, fmt))


def but(assignment: Assignment, **changes: str) -> Assignment:
    """The same with other formats for the groups whose names contain the given words."""
    return Assignment.of(
        {
            name: next((new for word, new in changes.items() if word in name), fmt)
            for name, fmt in assignment.items()
        }
    )


def digest(model: Model) -> str:
    """Of every bit that the module holds."""
    found = hashlib.sha256()
    for name, tensor in model.module.state_dict().items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


def places(model: Model) -> dict[str, int]:
    return {layer.name: model.places[layer.name].weight.data_ptr() for layer in model.layers}


# ------------------------------------------------------------------------------ swapping


def test_every_layer_gets_the_weight_of_its_format(
    tiny: Model, tiny_space: ResolvedSpace, bank: Bank
) -> None:
    mixed = but(uniform(tiny_space, "int4-g64"), down="int2-g64", o_proj="bf16")
    with Bench(tiny_space, bank) as bench:
        bench.put(mixed)
        for layer, fmt in tiny_space.layer_formats(mixed).items():
            assert torch.equal(tiny.places[layer].weight, bank.weight(layer, fmt))
            changed = not torch.equal(tiny.places[layer].weight, tiny.originals[layer])
            assert changed == fmt.quantized


def test_only_layers_whose_format_changed_are_touched(
    tiny: Model, tiny_space: ResolvedSpace, bank: Bank
) -> None:
    int3 = uniform(tiny_space, "int3-g64")
    with Bench(tiny_space, bank) as bench:
        bench.put(uniform(tiny_space, "bf16"))
        assert bench.swapped_layers == 0
        bench.put(int3)
        assert bench.swapped_layers == 14
        bench.put(int3)
        assert bench.swapped_layers == 14
        before = places(tiny)
        bench.put(but(int3, gate="int2-g64"))
        assert bench.swapped_layers == 14 + 4
        moved = {name for name, place in places(tiny).items() if place != before[name]}
        assert moved == {
            layer.name for layer in tiny.layers if "gate" in layer.name or "up_" in layer.name
        }
        bench.put(but(int3, down="bf16"))
        assert bench.swapped_layers == 18 + 4 + 2


def test_swapping_never_writes_to_the_bank_or_the_reference(
    tiny: Model, tiny_space: ResolvedSpace, bank: Bank
) -> None:
    originals = {name: weight.clone() for name, weight in tiny.originals.items()}
    with Bench(tiny_space, bank) as bench:
        for fmt in ("int2-g64", "bf16", "int8-g64", "int2-g64"):
            bench.put(uniform(tiny_space, fmt))
    fresh = Bank(tiny, Rounding(), root=bank.folder.parents[1])
    for layer, fmt in all_layers(tiny_space):
        assert torch.equal(tiny.originals[layer.name], originals[layer.name])
        assert torch.equal(bank.weight(layer.name, fmt), fresh.weight(layer.name, fmt))


# ------------------------------------------------------------------------------ restoring


def test_the_very_tensors_come_back(tiny: Model, tiny_space: ResolvedSpace, bank: Bank) -> None:
    bits, where = digest(tiny), places(tiny)
    with Bench(tiny_space, bank) as bench:
        bench.put(uniform(tiny_space, "int2-g64"))
        assert digest(tiny) != bits
        bench.restore()
        assert (digest(tiny), places(tiny)) == (bits, where)
        bench.put(uniform(tiny_space, "int4-g64"))
    assert (digest(tiny), places(tiny)) == (bits, where)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, CheckError])
def test_the_very_tensors_come_back_whatever_happens(
    tiny: Model, tiny_space: ResolvedSpace, bank: Bank, error: type[BaseException]
) -> None:
    bits, where = digest(tiny), places(tiny)
    with pytest.raises(error), Bench(tiny_space, bank) as bench:
        bench.put(uniform(tiny_space, "int2-g64"))
        raise error
    assert (digest(tiny), places(tiny)) == (bits, where)


class Flaky(Bank):
    """A bank that cannot read one layer until it is repaired."""

    broken = "model.layers.0.mlp.gate_proj"

    def weight(self, layer: str, fmt: object) -> torch.Tensor:
        if layer == self.broken:
            raise CheckError(f"bank file of '{layer}' cannot be read")
        return super().weight(layer, fmt)  # type: ignore[arg-type]


@pytest.fixture
def flaky(tiny: Model, bank: Bank) -> Flaky:
    return Flaky(tiny, Rounding(), root=bank.folder.parents[1])


def test_the_very_tensors_come_back_after_a_swap_that_broke_off(
    tiny: Model, tiny_space: ResolvedSpace, flaky: Flaky
) -> None:
    bits, where = digest(tiny), places(tiny)
    with pytest.raises(CheckError), Bench(tiny_space, flaky) as bench:
        bench.put(uniform(tiny_space, "int2-g64"))
    assert (digest(tiny), places(tiny)) == (bits, where)


def test_a_layer_that_could_not_be_swapped_is_swapped_next_time(
    tiny: Model, tiny_space: ResolvedSpace, flaky: Flaky
) -> None:
    int2 = uniform(tiny_space, "int2-g64")
    with Bench(tiny_space, flaky) as bench:
        with pytest.raises(CheckError):
            bench.put(int2)
        flaky.broken = ""
        bench.put(int2)
        for layer, fmt in tiny_space.layer_formats(int2).items():
            assert torch.equal(tiny.places[layer].weight, flaky.weight(layer, fmt))


# ------------------------------------------------------------------------------ scoring


def test_bf16_everywhere_loses_exactly_nothing(
    tiny_space: ResolvedSpace, bank: Bank, proxy: RecallProxy
) -> None:
    with Bench(tiny_space, bank) as bench:
        bench.put(uniform(tiny_space, "int2-g64"))
        found = bench.evaluate(uniform(tiny_space, "bf16"), proxy)
    assert (found.loss_per_fact == 0).all()
    assert (found.scores.kl == 0).all()
    assert (found.answer_loss.mean, found.answer_loss.stderr) == (0, 0)
    assert (found.kl.mean, found.kl.stderr) == (0, 0)


def test_an_assignment_scores_the_same_whatever_was_in_place_before(
    tiny_space: ResolvedSpace, bank: Bank, proxy: RecallProxy
) -> None:
    mixed = but(uniform(tiny_space, "int3-g64"), down="int2-g64")
    with Bench(tiny_space, bank) as bench:
        first = bench.evaluate(mixed, proxy)
        again = bench.evaluate(mixed, proxy)
        bench.evaluate(uniform(tiny_space, "int8-g64"), proxy)
        later = bench.evaluate(mixed, proxy)
    with Bench(tiny_space, bank) as bench:
        elsewhere = bench.evaluate(mixed, proxy)
    for other in (again, later, elsewhere):
        assert (other.loss_per_fact == first.loss_per_fact).all()
        assert (other.scores.kl == first.scores.kl).all()
        assert (other.answer_loss, other.kl, other.top1) == (
            first.answer_loss, first.kl, first.top1,
        )  # fmt: skip
    assert first.answer_loss.mean != 0


def test_estimates_are_means_over_relations_of_the_per_fact_values(
    tiny: Model, tiny_space: ResolvedSpace, tiny_facts: FactSet, bank: Bank
) -> None:
    # Of one relation many facts, of the others few, so that a plain mean would differ.
    facts = [
        fact
        for fact in tiny_facts.part("validation")
        if fact.relation == "color" or int(fact.subject[1:]) % 2
    ]
    proxy = RecallProxy(tiny, tiny_facts, facts, contrast=True)
    worst = uniform(tiny_space, "int2-g64")
    with Bench(tiny_space, bank) as bench:
        found = bench.evaluate(worst, proxy)
    scores = found.scores
    assert found.assignment is worst
    assert scores.correct is not None
    loss = proxy.reference.log_prob - scores.log_prob
    assert np.array_equal(found.loss_per_fact, loss)
    assert found.answer_loss == relation_mean(loss.tolist(), proxy.relations)
    assert found.kl == relation_mean(scores.kl.tolist(), proxy.relations)
    assert found.top1 == relation_mean(scores.top1.tolist(), proxy.relations)
    assert found.recall == relation_mean(scores.correct.tolist(), proxy.relations)
    assert found.answer_loss.mean != pytest.approx(loss.mean(), rel=1e-6)
    assert found.seconds > 0


def test_fewer_bits_lose_more(tiny_space: ResolvedSpace, bank: Bank, proxy: RecallProxy) -> None:
    with Bench(tiny_space, bank) as bench:
        found = [
            bench.evaluate(uniform(tiny_space, fmt), proxy)
            for fmt in ("int2-g64", "int3-g64", "int4-g64", "int8-g64")
        ]
    losses = [evaluation.answer_loss.mean for evaluation in found]
    kls = [evaluation.kl.mean for evaluation in found]
    assert losses[:3] == sorted(losses[:3], reverse=True)
    assert kls == sorted(kls, reverse=True)
    assert losses[2] > losses[3] - 1e-3  # at 8 bits, what is left is bf16 arithmetic
    assert kls[0] > 10 * kls[3] > 0


def test_recall_is_there_only_where_distractors_were_asked(
    tiny_space: ResolvedSpace, bank: Bank, proxy: RecallProxy
) -> None:
    with Bench(tiny_space, bank) as bench:
        assert bench.evaluate(uniform(tiny_space, "int8-g64"), proxy).recall is None


# ------------------------------------------------------------------------------ what to build


def test_all_layers_are_every_layer_in_every_format_of_its_group(
    tiny: Model, tiny_space: ResolvedSpace
) -> None:
    found = all_layers(tiny_space)
    assert len(found) == len(set(found)) == 14 * 4
    assert {layer for layer, _ in found} == set(tiny.layers)
    assert {fmt.name for _, fmt in found} == {f"int{bits}-g64" for bits in (2, 3, 4, 8)}


def test_quantized_layers_leave_out_those_in_bf16(tiny: Model, tiny_space: ResolvedSpace) -> None:
    mixed = but(uniform(tiny_space, "int4-g64"), q_proj=BF16.name, down="int2-g64")
    found = dict(quantized_layers(tiny_space, mixed))
    attention = tuple(f"{part}_proj" for part in "qkv")
    assert set(found) == {layer for layer in tiny.layers if not layer.name.endswith(attention)}
    assert all(
        fmt is FORMATS["int2-g64" if "down" in layer.name else "int4-g64"]
        for layer, fmt in found.items()
    )


# ------------------------------------------------------------------------------ other families


FEW = "version: 1\ntarget: compressed-tensors\nformats: [int2-g64, int4-g64, bf16]\n"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_put_in_place_and_restored_to_the_bit(family: str, tmp_path: Path) -> None:
    model = tiny_family(family)
    space = SearchSpace.parse(FEW, "test").resolve(model)
    bank = Bank(model, Rounding(), root=tmp_path)
    bank.build(all_layers(space))
    formats = ("int2-g64", "bf16", "int4-g64")
    mixed = Assignment.of({name: formats[i % 3] for i, name in enumerate(space.options)})
    bits, where = digest(model), places(model)
    with pytest.raises(ZeroDivisionError), Bench(space, bank) as bench:
        bench.put(uniform(space, "int4-g64"))
        bench.put(mixed)
        for layer, fmt in space.layer_formats(mixed).items():
            assert torch.equal(model.places[layer].weight, bank.weight(layer, fmt))
        assert digest(model) != bits
        _ = 1 / 0
    assert (digest(model), places(model)) == (bits, where)


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head_are_put_in_place_and_restored_to_the_bit(
    tied: bool, tmp_path: Path
) -> None:
    model = tiny_family("llama", tie_word_embeddings=tied)
    keys = "embedding: [int8-g64-unpacked, bf16]\n" + ("" if tied else "head: [int2-g64]\n")
    space = SearchSpace.parse(FEW + keys, "test").resolve(model)
    bank = Bank(model, Rounding(), root=tmp_path)
    bank.build(all_layers(space))
    embedding, head = model.module.model.embed_tokens, model.module.lm_head
    bits, where = digest(model), (embedding.weight.data_ptr(), head.weight.data_ptr())
    with pytest.raises(ZeroDivisionError), Bench(space, bank) as bench:
        bench.put(space.smallest)
        unpacked = bank.weight("model.embed_tokens", FORMATS["int8-g64-unpacked"])
        assert torch.equal(embedding.weight, unpacked)
        packed = unpacked if tied else bank.weight("lm_head", FORMATS["int2-g64"])
        assert torch.equal(head.weight, packed)
        bench.put({**space.smallest, "model.embed_tokens": "bf16"})
        assert embedding.weight.data_ptr() == where[0]
        assert (head.weight.data_ptr() == where[1]) == tied
        assert digest(model) != bits
        _ = 1 / 0
    assert digest(model) == bits
    assert (embedding.weight.data_ptr(), head.weight.data_ptr()) == where


def test_an_interrupt_within_a_stack_of_experts_is_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_family("mixtral")
    space = SearchSpace.parse(FEW, "test").resolve(model)
    bank = Bank(model, Rounding(), root=tmp_path)
    bank.build(all_layers(space))
    weight = bank.weight

    def interrupted(layer: str, fmt: Format) -> torch.Tensor:
        if layer.endswith("experts.2.up_proj"):
            raise KeyboardInterrupt
        return weight(layer, fmt)

    bits, where = digest(model), places(model)
    monkeypatch.setattr(bank, "weight", interrupted)
    with pytest.raises(KeyboardInterrupt), Bench(space, bank) as bench:
        bench.put(uniform(space, "int2-g64"))
    assert (digest(model), places(model)) == (bits, where)
