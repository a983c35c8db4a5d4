"""Slopes are derivatives: a small step along them changes the measured objective as they say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from banks import built
from conftest import FAMILIES, tiny_family
from test_skeleton import CPU, loaded
from test_walk import empty, folder_of

from mpsearch.allocate import uniform
from mpsearch.assignment import Assignment
from mpsearch.bank import Bank
from mpsearch.errors import CheckError, ResourceError
from mpsearch.estimates import relation_mean
from mpsearch.evaluate import Bench, all_layers
from mpsearch.facts import FactSet
from mpsearch.formats import FORMATS, Format
from mpsearch.layers import LayerGroup
from mpsearch.models import Model
from mpsearch.quantizers.rounding import Rounding
from mpsearch.recall import RecallProxy
from mpsearch.scores import objective
from mpsearch.skeleton import load_skeleton
from mpsearch.slopes import measure_slopes
from mpsearch.space import ResolvedSpace, SearchSpace

STEP = 0.02


@pytest.fixture(scope="module")
def bench(
    taught: Model, tiny_space: ResolvedSpace, tmp_path_factory: pytest.TempPathFactory
) -> Bench:
    bank = built(taught, Rounding(), tiny_space, tmp_path_factory.mktemp("bank"))
    return Bench(tiny_space, bank)


@pytest.fixture(scope="module")
def proxy(bench: Bench, tiny_facts: FactSet) -> RecallProxy:
    facts = tiny_facts.part("search")
    return RecallProxy(bench.bank.model, tiny_facts, facts, contrast=False, prompts=True)


def stepped(bench: Bench, proxy: RecallProxy, group: LayerGroup, there: str, here: str) -> float:
    """The measured derivative of the objective from one format of a group towards another."""
    losses = []
    for sign in (-1, 1):
        for layer in group.layers:
            at, to = (bench.bank.weight(layer.name, FORMATS[name]) for name in (here, there))
            bench.bank.model.places[layer.name].put(at + sign * STEP * (to - at))
        scores = proxy.score()
        assert scores.prompt_kl is not None
        lost = objective(proxy.reference.log_prob - scores.log_prob, scores.prompt_kl)
        losses.append(relation_mean(lost, proxy.relations).mean)
    for layer in group.layers:
        bench.bank.model.places[layer.name].put(bench.bank.weight(layer.name, FORMATS[here]))
    return (losses[1] - losses[0]) / (2 * STEP)


def test_a_small_step_towards_another_format_changes_the_loss_by_the_slope(
    bench: Bench, proxy: RecallProxy
) -> None:
    assignment = uniform(bench.space)["int2-g64"]
    slopes = measure_slopes(bench, assignment, [proxy])
    assert set(slopes) == {
        (group, fmt.name) for group, formats in bench.space.options.items() for fmt in formats
    }
    found = [
        (slopes[group.name, fmt.name], stepped(bench, proxy, group, fmt.name, "int2-g64"))
        for group in bench.space.groups[:4]
        for fmt in bench.space.options[group.name]
    ]
    bench.restore()
    assert max(abs(measured) for _, measured in found) > 0.02
    for slope, measured in found:
        assert slope == pytest.approx(measured, rel=0.05, abs=5e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_slopes_of_every_family_embeddings_and_experts_included(
    family: str, tiny_facts: FactSet, tmp_path: Path
) -> None:
    # All experts for every token: where a step changes the choice, the loss jumps.
    everywhere = {"num_experts_per_tok": 4} if "moe" in family or family == "mixtral" else {}
    space = SearchSpace.parse(
        "version: 1\ntarget: compressed-tensors\nformats: [int2-g64, int8-g64, bf16]\n"
        "embedding: [fp8, bf16]\n",
        "test",
    ).resolve(model := tiny_family(family, **everywhere))
    bank = built(model, Rounding(), space, tmp_path)
    bench = Bench(space, bank)
    proxy = RecallProxy(
        model, tiny_facts, tiny_facts.part("search")[:12], contrast=False, prompts=True
    )
    slopes = measure_slopes(bench, space.smallest, [proxy])
    largest = sorted(slopes, key=lambda pair: -abs(slopes[pair]))[:4]
    largest += [pair for pair in slopes if "embed" in pair[0] or "wte" in pair[0]]
    by_name = {group.name: group for group in space.groups}
    for group, fmt in dict.fromkeys(largest):
        measured = stepped(bench, proxy, by_name[group], fmt, space.smallest[group])
        assert slopes[group, fmt] == pytest.approx(measured, rel=0.1, abs=2e-3)
    assert abs(slopes[largest[0]]) > 0.02


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
            prompts=True,
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

    def broken(layers: list[str], *_: object) -> Iterator[dict[str, torch.Tensor]]:
        originals = bench.bank.model.originals
        yield {layer: torch.full_like(originals[layer], torch.nan) for layer in layers}

    monkeypatch.setattr(proxy, "objective_gradients", broken)
    with pytest.raises(CheckError, match=f"slopes at assignment {assignment.id} are NaN"):
        measure_slopes(bench, assignment, [proxy])
    bench.restore()


# ------------------------------------------------------------------------------ streamed

TEXT = "version: 1\ntarget: compressed-tensors\nformats: [int2-g64, int8-g64, bf16]\n"


def both_ways(
    name: str, text: str, dtype: torch.dtype, facts: FactSet, root: Path, parts: int = 1
) -> list[dict[tuple[str, str], float]]:
    """The slopes at a mixed assignment of a loaded model, and of a streamed one."""
    folder, found = folder_of(root, name), []
    for model in (loaded(folder, dtype), load_skeleton(str(folder), device=CPU, dtype=dtype)):
        space = SearchSpace.parse(text, "test").resolve(model)
        bank = built(model, Rounding(), space, root / "bank")
        asked = facts.part("search")[: 12 * parts]
        proxies = [
            RecallProxy(
                model, facts, asked[12 * part : 12 * part + 12], contrast=True, prompts=True
            )
            for part in range(parts)
        ]
        options = enumerate(space.options.items())
        mixed = {group: formats[number % len(formats)].name for number, (group, formats) in options}
        with Bench(space, bank) as bench:
            found.append(measure_slopes(bench, Assignment.of(mixed), proxies))
    assert empty(model)
    assert not any(parameter.requires_grad for parameter in model.module.parameters())
    return found


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
def test_a_streamed_model_has_the_slopes_of_the_loaded_one_to_the_bit(
    name: str, dtype: torch.dtype, tiny_facts: FactSet, tmp_path: Path
) -> None:
    whole, streamed = both_ways(name, TEXT, dtype, tiny_facts, tmp_path)
    assert streamed == whole
    assert sum(bool(slope) for slope in streamed.values()) > len(streamed) / 2


@pytest.mark.parametrize("name", ["llama", "tied", "gpt2"])
def test_slopes_of_embedding_and_head_of_a_streamed_model(
    name: str, tiny_facts: FactSet, tmp_path: Path
) -> None:
    head = "head: [int8-g64, bf16]\n" if name == "llama" else ""
    text = f"{TEXT}embedding: [fp8, int8-channel-unpacked, bf16]\n{head}"
    whole, streamed = both_ways(name, text, torch.float32, tiny_facts, tmp_path)
    assert streamed == pytest.approx(whole, rel=1e-4, abs=1e-6)
    outside = [pair for pair in whole if ".0." not in pair[0] and "bf16" not in pair[1]]
    assert any(abs(whole[pair]) > 1e-4 for pair in outside)


def test_a_streamed_model_is_asked_in_two_parts_to_the_bit_as_well(
    tiny_facts: FactSet, tmp_path: Path
) -> None:
    whole, streamed = both_ways("llama", TEXT, torch.float32, tiny_facts, tmp_path, parts=2)
    assert streamed == whole


def test_a_weight_that_cannot_be_read_leaves_a_streamed_model_as_it_was(
    tiny_facts: FactSet, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path, "llama")
    model = load_skeleton(str(folder), device=CPU, dtype=torch.float32)
    space = SearchSpace.parse(TEXT, "test").resolve(model)

    class Failing(Bank):
        def weight(self, layer: str, fmt: Format) -> torch.Tensor:
            if ".1." in layer:
                raise ResourceError("gone")
            return super().weight(layer, fmt)

    bank = Failing(model, Rounding(), root=tmp_path / "bank")
    bank.build(all_layers(space))
    proxy = RecallProxy(
        model, tiny_facts, tiny_facts.part("search")[:12], contrast=False, prompts=True
    )
    with pytest.raises(ResourceError, match="gone"):
        measure_slopes(Bench(space, bank), uniform(space)["int2-g64"], [proxy])
    assert empty(model)
