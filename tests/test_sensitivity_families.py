"""The damage table of every family, and of experts that no fact reached."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from banks import built
from conftest import FAMILIES, tiny_family
from test_sensitivity_exact import Key
from torch import Tensor

from mpsearch.bank import Bank
from mpsearch.facts import FactSet
from mpsearch.formats import Format
from mpsearch.layers import Layer
from mpsearch.measures import Sensitivity
from mpsearch.models import Model
from mpsearch.quantizers.rounding import Rounding
from mpsearch.sensitivity import _with_unreached, measure_sensitivity
from mpsearch.space import ResolvedSpace, SearchSpace

FEW = "version: 1\ntarget: compressed-tensors\nformats: [int2-g64, int8-g64]\n"


def family_table(
    family: str, facts: FactSet, root: Path, change: Callable[[Model], None] = lambda model: None
) -> tuple[Sensitivity, ResolvedSpace, Bank]:
    model = tiny_family(family)
    change(model)
    space = SearchSpace.parse(FEW, "test").resolve(model)
    bank = built(model, Rounding(), space, root)
    return measure_sensitivity(space, bank, facts, facts.part("search")[:4]), space, bank


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gets_a_whole_table_of_damages(
    family: str, tiny_facts: FactSet, tmp_path: Path
) -> None:
    table, space, bank = family_table(family, tiny_facts, tmp_path)
    keys = {(name, fmt.name) for name, formats in space.options.items() for fmt in formats}
    assert set(table.fisher_nats) == set(table.weight_error) == keys
    assert all(0 < damage < float("inf") for damage in table.fisher_nats.values())
    for name in space.options:  # fewer bits hurt more
        assert table.fisher_nats[name, "int2-g64"] > 10 * table.fisher_nats[name, "int8-g64"]
    assert not any(place.parameter.requires_grad for place in bank.model.places.values())


def starve(*blocks: int) -> Callable[[Model], None]:
    """Send every token of these blocks to the first two experts."""

    def change(model: Model) -> None:
        for block in blocks:
            gate = model.module.model.layers[block].mlp.gate
            gate.forward = lambda x, gate=gate: first_two(gate, x)

    def first_two(gate: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = x.reshape(-1, gate.hidden_dim)
        chosen = torch.tensor([0, 1]).expand(len(x), 2)
        return x @ gate.weight.T, torch.full((len(x), 2), 0.5), chosen

    return change


def test_an_expert_that_no_fact_reached_hurts_as_its_reached_neighbours_do(
    tiny_facts: FactSet, tmp_path: Path
) -> None:
    table, space, bank = family_table("mixtral", tiny_facts, tmp_path, starve(0, 1))
    assert table.provenance["unreached"] == [
        f"model.layers.{block}.mlp.experts.{expert}.{part}_proj"
        for block in (0, 1)
        for expert in (2, 3)
        for part in ("gate", "up", "down")
    ]
    group = next(group for group in space.groups if group.name == "model.layers.0.mlp.experts")
    fmt = space.options[group.name][0]
    squares = {
        layer.name: float((bank.weight(layer.name, fmt) - bank.model.originals[layer.name])
                          .square().sum())
        for layer in group.layers
    }  # fmt: skip
    reached = sum(
        square for name, square in squares.items() if ".experts.0." in name or ".experts.1." in name
    )
    alone = measured_with_reached_only(space, bank, tiny_facts)
    expected = alone[group.name, fmt.name] * sum(squares.values()) / reached
    assert table.fisher_nats[group.name, fmt.name] == pytest.approx(expected, rel=1e-4)
    attention = "model.layers.0.self_attn.o_proj"
    for fmt in space.options[attention]:
        key = (attention, fmt.name)
        assert table.fisher_nats[key] == pytest.approx(alone[key], rel=1e-6)


def measured_with_reached_only(
    space: ResolvedSpace, bank: Bank, facts: FactSet
) -> dict[Key, float]:
    """The table of a model whose unreached experts lose nothing in any format."""
    weight = bank.weight

    class Spared(Bank):
        def weight(self, layer: str, fmt: Format) -> Tensor:
            spared = ".experts.2." in layer or ".experts.3." in layer
            return self.model.originals[layer] if spared else weight(layer, fmt)

    spared = Spared(bank.model, Rounding(), root=bank.folder.parents[1])
    return measure_sensitivity(space, spared, facts, facts.part("search")[:4]).fisher_nats


def test_a_group_that_no_fact_reached_gets_the_rate_of_its_kind() -> None:
    layers = [
        *(Layer(f"m.{block}.experts.0.up_proj", 4, 64) for block in (0, 1, 2, 3)),
        *(Layer(f"m.{block}.q_proj", 4, 64) for block in (0, 1)),
    ]
    space = SearchSpace.parse(FEW, "test").resolve(SimpleNamespace(layers=layers, kept_bytes=0))
    errors = {
        (group.name, "int2-g64"): {group.layers[0].name: error}
        for group, error in zip(space.groups, (0.1, 0.2, 0.3, 0.4, 0.5, 0.0), strict=True)
    }
    rates = dict(zip(errors, (2.0, 3.0, 7.0, 0.0, 1000.0, 0.0), strict=True))
    damage = {key: rates[key] * sum(errors[key].values()) for key in errors}
    reached = {layer.name for layer in layers if damage[layer.name, "int2-g64"]}
    found = _with_unreached(damage, errors, reached, space)
    assert found == {
        **damage,
        ("m.3.experts.0.up_proj", "int2-g64"): pytest.approx(0.4 * 3.0),  # the median of its kind
        ("m.1.q_proj", "int2-g64"): 0.0,  # no error, no damage
    }
    alone = {key: value for key, value in errors.items() if key[0].startswith("m.3.")}
    assert _with_unreached(dict.fromkeys(alone, 0.0), alone, set(), space) == {
        key: pytest.approx(0.4) for key in alone
    }
