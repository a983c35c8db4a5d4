"""The table: a planted weak spot, weight errors, what may be left out, and what comes with it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from banks import built
from torch import Tensor

from mpsearch.bank import Bank
from mpsearch.errors import CheckError
from mpsearch.facts import Fact, FactSet
from mpsearch.formats import Format
from mpsearch.measures import Sensitivity
from mpsearch.models import Model
from mpsearch.quantizers import InputStatistics
from mpsearch.quantizers.rounding import Rounding
from mpsearch.sensitivity import measure_sensitivity
from mpsearch.space import ResolvedSpace, SearchSpace

PLANTED = "model.layers.1.mlp.gate_proj"


class Spoilt(Rounding):
    """Rounding that adds noise, forty times the weights' size, to one layer."""

    name = "spoilt"

    def __init__(self, spoilt: Tensor):
        self.spoilt = spoilt.float()

    def quantize(
        self, weight: Tensor, formats: Sequence[Format], statistics: InputStatistics | None
    ) -> dict[str, dict[str, Tensor]]:
        if torch.equal(weight, self.spoilt):
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
            weight = weight + 40 * weight.std() * noise
        return super().quantize(weight, formats, statistics)


class Broken(Rounding):
    """Rounding whose first scale of every layer is NaN."""

    name = "broken"

    def quantize(
        self, weight: Tensor, formats: Sequence[Format], statistics: InputStatistics | None
    ) -> dict[str, dict[str, Tensor]]:
        stored = super().quantize(weight, formats, statistics)
        for tensors in stored.values():
            tensors["weight_scale"][0, 0] = torch.nan
        return stored


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("banks")


@pytest.fixture(scope="module")
def bank(tiny: Model, tiny_space: ResolvedSpace, root: Path) -> Bank:
    return built(tiny, Rounding(), tiny_space, root)


@pytest.fixture(scope="module")
def facts(tiny_facts: FactSet) -> tuple[Fact, ...]:
    return tiny_facts.part("search")


@pytest.fixture(scope="module")
def table(
    tiny_space: ResolvedSpace, bank: Bank, tiny_facts: FactSet, facts: tuple[Fact, ...]
) -> Sensitivity:
    return measure_sensitivity(tiny_space, bank, tiny_facts, facts, seed=0)


def test_a_planted_weak_spot_ranks_first_in_every_format(
    tiny: Model,
    tiny_space: ResolvedSpace,
    tiny_facts: FactSet,
    facts: tuple[Fact, ...],
    table: Sensitivity,
    root: Path,
) -> None:
    bank = built(tiny, Spoilt(tiny.originals[PLANTED]), tiny_space, root)
    found = measure_sensitivity(tiny_space, bank, tiny_facts, facts, seed=0)
    planted = next(g.name for g in tiny_space.groups if PLANTED in [x.name for x in g.layers])
    for fmt in ("int2-g64", "int3-g64", "int4-g64", "int8-g64"):
        damage = {group: found.fisher_nats[group, fmt] for group in tiny_space.options}
        assert max(damage, key=lambda group: damage[group]) == planted
        errors = {group: found.weight_error[group, fmt] for group in tiny_space.options}
        assert max(errors, key=lambda group: errors[group]) == planted
        assert damage.pop(planted) > 2 * max(damage.values())
        # Everyone else's row is untouched.
        assert damage == {group: table.fisher_nats[group, fmt] for group in damage}


def test_weight_error_is_the_relative_frobenius_error_of_the_group(
    tiny: Model, tiny_space: ResolvedSpace, bank: Bank, table: Sensitivity
) -> None:
    for group in tiny_space.groups:
        whole = torch.cat([tiny.originals[layer.name].flatten() for layer in group.layers])
        for fmt in tiny_space.options[group.name]:
            decoded = torch.cat([bank.weight(x.name, fmt).flatten() for x in group.layers])
            expected = (decoded.double() - whole.double()).norm() / whole.double().norm()
            assert table.weight_error[group.name, fmt.name] == pytest.approx(
                float(expected), rel=1e-2
            )


def test_without_memory_for_gram_matrices_the_rest_is_measured(
    tiny_space: ResolvedSpace,
    bank: Bank,
    tiny_facts: FactSet,
    facts: tuple[Fact, ...],
    table: Sensitivity,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("mpsearch.sensitivity.available_memory_bytes", lambda device: 300_000)
    small = measure_sensitivity(tiny_space, bank, tiny_facts, facts, seed=0)
    assert small.measures == ("fisher_nats", "weight_error")
    assert small.fisher_nats == table.fisher_nats
    assert small.weight_error == table.weight_error
    assert any("output error and geometry are left out" in text for text in caplog.messages)


def test_what_no_allocation_needs_is_left_out_on_request(
    tiny_space: ResolvedSpace,
    bank: Bank,
    tiny_facts: FactSet,
    facts: tuple[Fact, ...],
    table: Sensitivity,
) -> None:
    stages: set[str] = set()
    cheap = measure_sensitivity(
        tiny_space,
        bank,
        tiny_facts,
        facts,
        around=False,
        report=lambda stage, *_: stages.add(stage),
    )
    assert cheap.measures == ("fisher_nats", "weight_error")
    assert (cheap.fisher_nats, cheap.weight_error) == (table.fisher_nats, table.weight_error)
    assert stages == {"decoding", "sensitivity"}


def test_unquantized_groups_take_no_damage(
    tiny: Model, tiny_facts: FactSet, facts: tuple[Fact, ...], root: Path
) -> None:
    text = "version: 1\ntarget: compressed-tensors\nformats: [int2-g64, bf16]\n"
    space = SearchSpace.parse(text, "here").resolve(tiny)
    bank = built(tiny, Rounding(), space, root)
    found = measure_sensitivity(space, bank, tiny_facts, facts)
    for group in space.options:
        assert found.fisher_nats[group, "bf16"] == found.weight_error[group, "bf16"] == 0
        assert found.fisher_nats[group, "int2-g64"] > 0


def test_the_table_has_every_group_in_every_format(
    tiny_space: ResolvedSpace, table: Sensitivity
) -> None:
    keys = [(group, f.name) for group, formats in tiny_space.options.items() for f in formats]
    assert list(table.fisher_nats) == list(table.weight_error) == keys


def test_a_seed_decides_the_table(
    tiny_space: ResolvedSpace,
    bank: Bank,
    tiny_facts: FactSet,
    facts: tuple[Fact, ...],
    table: Sensitivity,
) -> None:
    torch.manual_seed(99)
    before = torch.get_rng_state()
    again = measure_sensitivity(tiny_space, bank, tiny_facts, facts, seed=0)
    other = measure_sensitivity(tiny_space, bank, tiny_facts, facts, seed=1)
    assert again == table
    assert other.fisher_nats != table.fisher_nats
    assert other.weight_error == table.weight_error
    assert torch.equal(torch.get_rng_state(), before)


def test_as_many_samples_are_drawn_as_are_asked_for(
    tiny_space: ResolvedSpace,
    bank: Bank,
    tiny_facts: FactSet,
    facts: tuple[Fact, ...],
    table: Sensitivity,
) -> None:
    one = measure_sensitivity(tiny_space, bank, tiny_facts, facts, samples=1, around=False)
    assert one.provenance["draws"] == 1 < table.provenance["draws"]
    assert one.fisher_nats != table.fisher_nats


def test_provenance_says_what_produced_the_table(
    tiny: Model, bank: Bank, tiny_facts: FactSet, facts: tuple[Fact, ...], table: Sensitivity
) -> None:
    found = table.provenance
    assert found["fingerprint"] == tiny.fingerprint
    assert found["bank"] == bank.settings
    assert found["facts"]["digest"] == tiny_facts.digest
    assert found["facts"]["used"] == len(facts)
    assert (found["seed"], found["dtype"]) == (0, str(tiny.dtype))


def test_a_saved_table_comes_back_equal(table: Sensitivity, tmp_path: Path) -> None:
    path = tmp_path / "sensitivity.json"
    table.save(path)
    assert Sensitivity.from_json(json.loads(path.read_text(encoding="utf-8"))) == table


def model_is_as_before(model: Model) -> bool:
    return all(
        not parameter.requires_grad and parameter.grad is None
        for parameter in model.module.parameters()
    ) and all(
        model.places[name].weight.data_ptr() == original.data_ptr()
        for name, original in model.originals.items()
    )


def test_the_model_is_left_without_gradients(tiny: Model, table: Sensitivity) -> None:
    assert table
    assert model_is_as_before(tiny)


def test_the_model_is_left_without_gradients_after_an_interrupt(
    tiny: Model,
    tiny_space: ResolvedSpace,
    bank: Bank,
    tiny_facts: FactSet,
    facts: tuple[Fact, ...],
) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("sensitivity", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(tiny_space, bank, tiny_facts, facts, report=interrupt)
    assert model_is_as_before(tiny)


def test_broken_weights_in_the_bank_are_a_check_error(
    tiny: Model, tiny_space: ResolvedSpace, tiny_facts: FactSet, facts: tuple[Fact, ...], root: Path
) -> None:
    bank = built(tiny, Broken(), tiny_space, root)
    with pytest.raises(CheckError, match="NaN or infinite") as caught:
        measure_sensitivity(tiny_space, bank, tiny_facts, facts[:5])
    assert "\n" not in str(caught.value)
    assert model_is_as_before(tiny)
