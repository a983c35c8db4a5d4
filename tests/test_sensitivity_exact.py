"""What the table says, against exact sums and what is measured of each group alone, in float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from banks import built
from torch import Tensor

from mpsearch.assignment import Assignment
from mpsearch.bank import Bank
from mpsearch.evaluate import Bench, all_layers
from mpsearch.facts import Fact, FactSet
from mpsearch.formats import Format
from mpsearch.forward import Pass
from mpsearch.measures import Sensitivity
from mpsearch.models import Model
from mpsearch.quantizers.rounding import Rounding
from mpsearch.recall import SHOTS, RecallProxy, ask
from mpsearch.sensitivity import measure_sensitivity
from mpsearch.space import ResolvedSpace, SearchSpace

Key = tuple[str, str]
SEEDS = range(8)
LOW_BITS = ("int2-g64", "int3-g64")


@pytest.fixture(scope="module")
def facts(tiny_facts: FactSet) -> tuple[Fact, ...]:
    return tiny_facts.part("search")


@pytest.fixture(scope="module")
def float32_bank(
    taught: Model, tiny_space: ResolvedSpace, tmp_path_factory: pytest.TempPathFactory
) -> Bank:
    return built(taught, Rounding(), tiny_space, tmp_path_factory.mktemp("bank"))


@pytest.fixture(scope="module")
def runs(
    tiny_space: ResolvedSpace, float32_bank: Bank, tiny_facts: FactSet, facts: tuple[Fact, ...]
) -> list[Sensitivity]:
    """The same question with many seeds."""
    return [
        measure_sensitivity(tiny_space, float32_bank, tiny_facts, facts, seed=seed)
        for seed in SEEDS
    ]


@pytest.fixture(scope="module")
def measured(
    tiny_space: ResolvedSpace, float32_bank: Bank, tiny_facts: FactSet, facts: tuple[Fact, ...]
) -> dict[Key, float]:
    """KL of quantizing one group alone, in nats a fact."""
    proxy = RecallProxy(float32_bank.model, tiny_facts, facts, contrast=False)
    bf16 = dict.fromkeys(tiny_space.options, "bf16")
    with Bench(tiny_space, float32_bank) as bench:
        return {
            (group, fmt): float(
                bench.evaluate(Assignment.of({**bf16, group: fmt}), proxy).scores.kl.mean()
            )
            for group in bf16
            for fmt in LOW_BITS
        }


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's, of values without ties."""
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def mean_damage(runs: Sequence[Sensitivity]) -> dict[Key, float]:
    return {
        key: float(np.mean([run.fisher_nats[key] for run in runs])) for key in runs[0].fisher_nats
    }


@torch.no_grad()
def exact_damage(
    space: ResolvedSpace, bank: Bank, fact_set: FactSet, facts: Sequence[Fact]
) -> dict[Key, float]:
    """`1/2 sum_y p(y) <d log p(y) / dW, dW>^2` a fact, over its answer's tokens, summed over the
    whole vocabulary; the derivative by central differences.
    """
    model = bank.model
    work = Pass(model, [ask(model, fact_set, f, f.answer, SHOTS) for f in facts])

    def log_probs(step: float, group: str, fmt: Format) -> Tensor:
        for layer in (layer for g in space.groups if g.name == group for layer in g.layers):
            original = model.originals[layer.name]
            error = bank.weight(layer.name, fmt) - original
            model.places[layer.name].put(original + step * error)
        found = torch.cat([found.double() for _, found, _ in work.continuations()])
        model.restore()
        return found

    damage = {}
    for group, formats in space.options.items():
        for fmt in formats:
            step = 1e-3 * 2 ** (fmt.bits - 2)  # times the error: about the same for all formats
            ahead, behind = log_probs(step, group, fmt), log_probs(-step, group, fmt)
            slope = (ahead - behind) / (2 * step)
            chances = log_probs(0, group, fmt).exp()
            damage[group, fmt.name] = float((chances * slope.square()).sum()) / 2 / len(facts)
    return damage


@pytest.fixture(scope="module")
def wordy() -> FactSet:
    """Answers of one to three words, which the model is unsure of: more terms, fewer rare ones."""
    answers = ["red", "red green", "blue", "white black brown", "flat long", "north"]
    return FactSet(
        tuple(
            Fact("color", "the color of {} is", f"s{n}", answers[n % len(answers)])
            for n in range(48)
        ),
        "wordy",
    )


def test_the_mean_over_seeds_is_the_exact_fisher_damage(
    tiny_space: ResolvedSpace, float32_bank: Bank, wordy: FactSet
) -> None:
    some = wordy.part("search")
    exact = exact_damage(tiny_space, float32_bank, wordy, some)
    mean = mean_damage(
        [measure_sensitivity(tiny_space, float32_bank, wordy, some, seed=seed) for seed in SEEDS]
    )
    ratios = np.array([mean[key] / exact[key] for key in exact])
    assert np.exp(np.log(ratios).mean()) == pytest.approx(1, abs=0.15)
    assert 0.5 < ratios.min() <= ratios.max() < 2
    assert rank_correlation(list(mean.values()), [exact[key] for key in mean]) > 0.98


def test_a_tied_embedding_takes_the_damage_of_both_its_uses(
    float32_bank: Bank, wordy: FactSet
) -> None:
    """Central differences move the lookup and the head at once, as quantizing the weight does."""
    text = "version: 1\ntarget: compressed-tensors\nformats: [int8-g64]\n"
    text += "embedding: [fp8, int8-channel-unpacked, bf16]\n"
    whole = SearchSpace.parse(text, "test").resolve(float32_bank.model)
    alone = {"model.embed_tokens": whole.options["model.embed_tokens"]}
    space = replace(whole, groups=whole.groups[-1:], options=alone)
    float32_bank.build(all_layers(space))
    some = wordy.part("search")
    exact = exact_damage(space, float32_bank, wordy, some)
    mean = mean_damage(
        [measure_sensitivity(space, float32_bank, wordy, some, seed=seed) for seed in SEEDS]
    )
    assert len(exact) == 3
    for (group, fmt), damage in mean.items():
        assert damage == pytest.approx(exact[group, fmt], rel=0.25)
        assert (damage > 0) == (fmt != "bf16")
    assert not float32_bank.model.places["model.embed_tokens"].parameter.requires_grad


def test_exact_fisher_damage_ranks_groups_as_measured_kl_does(
    tiny_space: ResolvedSpace,
    float32_bank: Bank,
    tiny_facts: FactSet,
    facts: tuple[Fact, ...],
    measured: dict[Key, float],
) -> None:
    exact = exact_damage(tiny_space, float32_bank, tiny_facts, facts)
    assert rank_correlation([exact[key] for key in measured], list(measured.values())) > 0.95


def test_the_mean_over_seeds_ranks_groups_as_measured_kl_does(
    runs: list[Sensitivity], measured: dict[Key, float]
) -> None:
    mean = mean_damage(runs)
    assert rank_correlation([mean[key] for key in measured], list(measured.values())) > 0.85


def test_three_runs_in_four_rank_groups_as_measured_kl_does(
    runs: list[Sensitivity], measured: dict[Key, float]
) -> None:
    wanted = list(measured.values())
    found = [rank_correlation([run.fisher_nats[k] for k in measured], wanted) for run in runs]
    assert np.quantile(found, 0.25) >= 0.7


def test_more_bits_do_less_damage(runs: list[Sensitivity], tiny_space: ResolvedSpace) -> None:
    mean = mean_damage(runs)
    formats = ("int2-g64", "int3-g64", "int4-g64", "int8-g64")
    for group in tiny_space.options:
        assert mean[group, "int2-g64"] > mean[group, "int4-g64"] > mean[group, "int8-g64"] > 0
        errors = [runs[0].weight_error[group, fmt] for fmt in formats]
        assert errors == sorted(errors, reverse=True)
    totals = [sum(mean[group, fmt] for group in tiny_space.options) for fmt in formats]
    assert totals == sorted(totals, reverse=True)


def test_output_error_is_the_relative_error_of_what_the_group_gives(
    tiny_space: ResolvedSpace,
    float32_bank: Bank,
    tiny_facts: FactSet,
    facts: tuple[Fact, ...],
    runs: list[Sensitivity],
) -> None:
    model = float32_bank.model
    seen: dict[str, list[Tensor]] = {layer.name: [] for layer in model.layers}
    hooks = [
        model.module.get_submodule(name).register_forward_pre_hook(
            lambda module, inputs, into=into: into.append(inputs[0][0])
        )
        for name, into in seen.items()
    ]
    Pass(model, [ask(model, tiny_facts, f, f.answer, SHOTS) for f in facts], max_nodes=128).run()
    for hook in hooks:
        hook.remove()
    for group in tiny_space.groups:
        for fmt in tiny_space.options[group.name]:
            wrong = right = 0.0
            for layer in group.layers:
                inputs, weight = torch.cat(seen[layer.name]).double(), model.originals[layer.name]
                error = float32_bank.weight(layer.name, fmt) - weight
                wrong += float((inputs @ error.double().T).square().sum())
                right += float((inputs @ weight.double().T).square().sum())
            found = runs[0].output_error[group.name, fmt.name]
            assert found == pytest.approx((wrong / right) ** 0.5, rel=1e-3)
    assert runs[0].output_error.keys() == runs[0].weight_error.keys()


def test_on_request_each_group_is_measured_alone(
    tiny_space: ResolvedSpace,
    float32_bank: Bank,
    tiny_facts: FactSet,
    facts: tuple[Fact, ...],
    measured: dict[Key, float],
) -> None:
    """The answers here are one token, at which the proxy measures KL, too."""
    found = measure_sensitivity(tiny_space, float32_bank, tiny_facts, facts, check=True)
    assert {key: found.perturb_nats[key] for key in measured} == {
        key: pytest.approx(nats, rel=1e-4, abs=1e-7) for key, nats in measured.items()
    }
    assert found.perturb_nats.keys() == found.fisher_nats.keys()
