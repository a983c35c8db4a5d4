"""Slopes are derivatives: a small step along them changes the measured loss as they say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mpsearch.allocate import uniform
from mpsearch.bank import Bank
from mpsearch.errors import CheckError
from mpsearch.evaluate import Bench, all_layers
from mpsearch.facts import FactSet
from mpsearch.models import Model, from_module
from mpsearch.quantizers.rounding import Rounding
from mpsearch.recall import RecallProxy
from mpsearch.slopes import measure_slopes
from mpsearch.space import ResolvedSpace

STEP = 0.02


@pytest.fixture(scope="module")
def bench(
    tiny_folder: Path,
    tiny: Model,
    tiny_space: ResolvedSpace,
    tmp_path_factory: pytest.TempPathFactory,
) -> Bench:
    """Of the taught model in float32, for steps that are small."""
    module = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    cpu = torch.device("cpu")
    model = from_module("float32", tiny_folder, module, tiny.tokenizer, cpu, torch.float32)
    bank = Bank(model, Rounding(), root=tmp_path_factory.mktemp("bank"))
    bank.build(all_layers(tiny_space))
    return Bench(tiny_space, bank)


@pytest.fixture(scope="module")
def proxy(bench: Bench, tiny_facts: FactSet) -> RecallProxy:
    return RecallProxy(bench.bank.model, tiny_facts, tiny_facts.part("search"), contrast=False)


def test_a_small_step_towards_another_format_changes_the_loss_by_the_slope(
    bench: Bench, proxy: RecallProxy
) -> None:
    assignment = uniform(bench.space)["int2-g64"]
    slopes = measure_slopes(bench, assignment, [proxy])
    assert set(slopes) == {
        (group, fmt.name) for group, formats in bench.space.options.items() for fmt in formats
    }
    model, found = bench.bank.model, []
    for group in bench.space.groups[:4]:
        for fmt in bench.space.options[group.name]:
            losses = []
            for sign in (-1, 1):
                bench.restore()
                bench.put(assignment)
                for layer in group.layers:
                    here = bench.bank.weight(layer.name, bench.space.options[group.name][0])
                    there = bench.bank.weight(layer.name, fmt)
                    model.places[layer.name].put(here + sign * STEP * (there - here))
                scores = proxy.score()
                names = proxy.relations
                loss = proxy.reference.log_prob - scores.log_prob
                means = [loss[[n == name for n in names]].mean() for name in dict.fromkeys(names)]
                losses.append(sum(means) / len(means))
            measured = (losses[1] - losses[0]) / (2 * STEP)
            found.append((slopes[group.name, fmt.name], measured))
    bench.restore()
    assert max(abs(measured) for _, measured in found) > 0.02
    for slope, measured in found:
        assert slope == pytest.approx(measured, rel=0.05, abs=5e-4)


def test_formats_in_place_have_no_slope(bench: Bench, proxy: RecallProxy) -> None:
    assignment = uniform(bench.space)["int4-g64"]
    slopes = measure_slopes(bench, assignment, [proxy])
    assert all(slopes[pair] == 0.0 for pair in assignment.items())
    bench.restore()


def test_facts_asked_in_two_parts_give_the_same_slopes(
    bench: Bench, proxy: RecallProxy, tiny_facts: FactSet
) -> None:
    assignment = uniform(bench.space)["int2-g64"]
    whole = measure_slopes(bench, assignment, [proxy])
    bench.restore()
    names = list(dict.fromkeys(proxy.relations))
    parts = [
        RecallProxy(
            bench.bank.model,
            tiny_facts,
            [f for f in proxy.facts if (f.relation in names[::2]) == first],
            contrast=False,
        )
        for first in (True, False)
    ]
    both = measure_slopes(bench, assignment, parts)
    bench.restore()
    assert both == pytest.approx(whole, rel=1e-3, abs=1e-4)


def test_parameters_ask_for_no_gradient_afterwards(bench: Bench, proxy: RecallProxy) -> None:
    measure_slopes(bench, uniform(bench.space)["int4-g64"], [proxy])
    bench.restore()
    assert not any(p.requires_grad for p in bench.bank.model.module.parameters())


def test_a_slope_that_is_no_number_is_named(
    bench: Bench, proxy: RecallProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    assignment = uniform(bench.space)["int4-g64"]

    def broken(parameters: list[torch.nn.Parameter], weights: object) -> list[torch.Tensor]:
        return [torch.full_like(parameter, torch.nan) for parameter in parameters]

    monkeypatch.setattr(proxy, "loss_gradients", broken)
    with pytest.raises(CheckError, match=f"slopes at assignment {assignment.id} are NaN"):
        measure_slopes(bench, assignment, [proxy])
    bench.restore()
