"""What a CUDA GPU computes, beside what a CPU does; without such a GPU there is nothing to test.

Not every number can be the same: kernels differ in the order of their sums.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from searches import SEARCH_FACTS

import mpsearch as mps
from mpsearch.assignment import Assignment
from mpsearch.bank import Bank
from mpsearch.device import available_memory_bytes, limit_memory, return_freed_memory
from mpsearch.evaluate import Bench, all_layers
from mpsearch.export.own_loader import load_as_served
from mpsearch.facts import FactSet
from mpsearch.guard import TextGuard
from mpsearch.models import Model, load_whole
from mpsearch.quantizers import get_quantizer
from mpsearch.recall import RecallProxy
from mpsearch.sensitivity import measure_sensitivity
from mpsearch.skeleton import load_skeleton
from mpsearch.space import ResolvedSpace, SearchSpace
from mpsearch.text import Text

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

FORMATS_OF = {
    "compressed-tensors": ["int2-g64", "int3-g64", "int8-g64", "bf16"],
    "gptq": ["gptq2-g32", "gptq3-g64", "gptq8-g64", "bf16"],
    "bitsandbytes": ["nf4-dq", "bf16"],
    "gguf": ["q4_0", "q8_0"],
}
ASYMMETRIC = ["int2-g64-asym", "int4-g64-asym"]


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPSEARCH_DEVICE", "cuda")


@pytest.fixture
def gpu(tiny_folder: Path, on_gpu: None) -> Model:
    model = load_whole(str(tiny_folder))
    assert model.device.type == "cuda" and model.dtype == torch.bfloat16
    return model


@pytest.fixture
def gpu_space(gpu: Model) -> ResolvedSpace:
    return SearchSpace.default().resolve(gpu)


def mixed(space: ResolvedSpace, bank: Bank) -> Assignment:
    names = {
        group: formats[number % len(formats)].name
        for number, (group, formats) in enumerate(space.options.items())
    }
    return Assignment.of(names, json.dumps(bank.settings))


def built(model: Model, space: ResolvedSpace, quantizer: str | None = "rounding") -> Bank:
    bank = Bank(model, get_quantizer(quantizer, space.target.container))
    bank.build(all_layers(space))
    return bank


def test_it_is_the_same_model_with_the_same_answers(
    gpu: Model, tiny: Model, tiny_facts: FactSet
) -> None:
    assert gpu.fingerprint == tiny.fingerprint
    facts = tiny_facts.facts[:40]
    here, there = (RecallProxy(m, tiny_facts, facts, contrast=True) for m in (gpu, tiny))
    assert here.reference.log_prob == pytest.approx(there.reference.log_prob, abs=0.05)
    assert here.reference.correct == pytest.approx(there.reference.correct)
    paragraphs = ["the color of s1 is red the shape of s2 is", "the place of s3 is north of s4"]
    of_text = [TextGuard(m, paragraphs).reference.log_prob_nats for m in (gpu, tiny)]
    assert of_text[0] == pytest.approx(of_text[1], rel=0.02)


@pytest.mark.parametrize(
    ("quantizer", "target"),
    [("rounding", "compressed-tensors"), ("gptq", "compressed-tensors"), ("gguf", "gguf"),
     ("hqq", "compressed-tensors"), ("bitsandbytes", "bitsandbytes")],
)  # fmt: skip
def test_what_it_quantizes_is_as_near_to_the_weights_as_a_cpus(
    gpu: Model, tiny: Model, quantizer: str, target: str
) -> None:
    formats = ASYMMETRIC if quantizer == "hqq" else FORMATS_OF[target]
    text = f"version: 1\ntarget: {target}\nformats: [{', '.join(formats)}]\n"
    errors = []
    for model in (gpu, tiny):
        space = SearchSpace.parse(text, "test").resolve(model)
        bank = Bank(model, get_quantizer(quantizer, space.target.container))
        bank.build(all_layers(space))
        for layer, fmt in all_layers(space):
            weight = bank.weight(layer.name, fmt)
            assert weight.device == model.device
            error = weight.float() - model.places[layer.name].weight.float()
            errors.append(float(error.norm()))
    half = len(errors) // 2
    assert errors[:half] == pytest.approx(errors[half:], rel=0.02, abs=1e-6)


def test_a_streamed_model_says_what_a_loaded_one_does(
    gpu: Model, gpu_space: ResolvedSpace, tiny_folder: Path, tiny_facts: FactSet
) -> None:
    facts = tiny_facts.facts[:40]
    scores = []
    for model in (gpu, load_skeleton(str(tiny_folder))):
        space = SearchSpace.default().resolve(model)
        bank = built(model, space)
        with Bench(space, bank) as bench:
            proxy = RecallProxy(model, tiny_facts, facts, contrast=True, prompts=True)
            (found,) = bench.evaluate_all([mixed(space, bank)], proxy)
            assert not isinstance(found, Exception)
            scores.append(found.scores)
    assert np.array_equal(scores[0].log_prob, scores[1].log_prob)
    assert np.array_equal(scores[0].kl, scores[1].kl)


def test_sensitivities_rank_as_on_a_cpu(
    gpu: Model, gpu_space: ResolvedSpace, tiny: Model, tiny_space: ResolvedSpace,
    tiny_facts: FactSet,
) -> None:  # fmt: skip
    found = []
    for model, space in ((gpu, gpu_space), (tiny, tiny_space)):
        table = measure_sensitivity(space, built(model, space), tiny_facts, tiny_facts.facts[:60])
        found.append([math.log(v) for v in table.fisher_nats.values() if v > 0])
        assert table.output_error and all(map(math.isfinite, table.output_error.values()))
    assert np.corrcoef(*found)[0, 1] > 0.95


def test_a_search_is_exported_and_promises_hold(
    gpu: Model, gpu_space: ResolvedSpace, budget: int, tiny_facts: FactSet, facts_file: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    run = mps.search(
        gpu, gpu_space, budget=budget, trials=6, out=tmp_path / "run", facts=tiny_facts,
        search_facts=SEARCH_FACTS, text=Text.builtin(), max_text_kl_nats=50.0,
        quantizer="rounding",
    )  # fmt: skip
    pick = run.front().best(budget)
    mps.export(gpu, pick.assignment, run=run, out=tmp_path / "export")
    report = mps.verify(tmp_path / "export", facts=str(facts_file))
    assert report.passed, report


@pytest.mark.parametrize("target", ["compressed-tensors", "gptq", "bitsandbytes"])
def test_an_export_answers_as_its_candidate_did(
    gpu: Model, tiny_facts: FactSet, target: str, tmp_path: Path
) -> None:
    text = f"version: 1\ntarget: {target}\nformats: [{', '.join(FORMATS_OF[target])}]\n"
    if target == "bitsandbytes":
        text = text.replace("nf4-dq, bf16", "nf4-dq")
    space = SearchSpace.parse(text, "test").resolve(gpu)
    bank = built(gpu, space, None if target == "bitsandbytes" else "rounding")
    assignment = mixed(space, bank)
    folder = mps.export(gpu, assignment, to=target, out=tmp_path / "export", space=space)
    served, _ = load_as_served(str(folder))
    assert served.device.type == "cuda"
    facts = tiny_facts.facts[:40]
    with Bench(space, bank) as bench:
        asked = RecallProxy(gpu, tiny_facts, facts, contrast=False)
        of_candidate = bench.evaluate(assignment, asked).scores.log_prob
    of_export = RecallProxy(served, tiny_facts, facts, contrast=False).reference.log_prob
    assert of_export == pytest.approx(of_candidate, abs=0.1)


def test_memory_is_the_gpus(gpu: Model) -> None:
    free, total = torch.cuda.mem_get_info()
    assert available_memory_bytes(gpu.device) == pytest.approx(free, rel=0.05)
    held = torch.zeros(2**28, dtype=torch.uint8, device=gpu.device)
    limit_memory(2**29)
    try:
        assert 0 < available_memory_bytes(gpu.device) <= 2**29 - 2**28
        del held
        return_freed_memory(gpu.device)
        assert available_memory_bytes(gpu.device) > 2**28
    finally:
        limit_memory(None)
    assert total > free
