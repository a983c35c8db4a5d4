"""KL-Fisher: unbiased against the exact sum, ranks measured damage, finds a planted weak spot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from mpsearch.assignment import Assignment
from mpsearch.bank import Bank
from mpsearch.errors import CheckError
from mpsearch.evaluate import Bench, all_layers
from mpsearch.facts import Fact, FactSet
from mpsearch.formats import Format
from mpsearch.forward import Pass
from mpsearch.measures import Sensitivity
from mpsearch.models import Model, from_module
from mpsearch.quantizers import InputStatistics
from mpsearch.quantizers.rounding import Rounding
from mpsearch.recall import SHOTS, RecallProxy, ask
from mpsearch.sensitivity import measure_sensitivity
from mpsearch.space import ResolvedSpace, SearchSpace

Key = tuple[str, str]
SEEDS = range(8)
LOW_BITS = ("int2-g64", "int3-g64")
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


def built(model: Model, quantizer: Rounding, space: ResolvedSpace, root: Path) -> Bank:
    bank = Bank(model, quantizer, root=root)
    bank.build(all_layers(space))
    return bank


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


@pytest.fixture(scope="module")
def float32_bank(tiny_folder: Path, tiny: Model, tiny_space: ResolvedSpace, root: Path) -> Bank:
    """Of the taught model in float32: in bf16 small damage drowns in rounding."""
    module = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    cpu = torch.device("cpu")
    model = from_module("float32", tiny_folder, module, tiny.tokenizer, cpu, torch.float32)
    return built(model, Rounding(), tiny_space, root)


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


# ------------------------------------------------------------------------------ is it right


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


def test_more_bits_do_less_damage(runs: list[Sensitivity], tiny_space: ResolvedSpace) -> None:
    mean = mean_damage(runs)
    formats = ("int2-g64", "int3-g64", "int4-g64", "int8-g64")
    for group in tiny_space.options:
        assert mean[group, "int2-g64"] > mean[group, "int4-g64"] > mean[group, "int8-g64"] > 0
        errors = [runs[0].weight_error[group, fmt] for fmt in formats]
        assert errors == sorted(errors, reverse=True)
    totals = [sum(mean[group, fmt] for group in tiny_space.options) for fmt in formats]
    assert totals == sorted(totals, reverse=True)


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


# ------------------------------------------------------------------------------ is it well-behaved


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
