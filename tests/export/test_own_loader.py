"""Checkpoints as their own libraries load them: they can be asked, and answer as was scored."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mpsearch as mps
from mpsearch.assignment import Assignment
from mpsearch.bank import Bank
from mpsearch.errors import ModelError, ResourceError
from mpsearch.evaluate import Bench
from mpsearch.export.own_loader import load_as_served
from mpsearch.facts import FactSet
from mpsearch.models import Model
from mpsearch.quantizers import get_quantizer
from mpsearch.recall import RecallProxy
from mpsearch.space import SearchSpace

ROUNDED = ("compressed-tensors", "gptq")


@pytest.mark.parametrize(
    ("target", "formats", "library"),
    [
        ("compressed-tensors", ["int2-g64", "int3-g64", "int8-g64", "bf16"], "compressed-tensors"),
        ("gptq", ["gptq2-g32", "gptq3-g64", "gptq8-g64", "bf16"], "gptqmodel"),
        ("bitsandbytes", ["nf4-dq", "bf16"], "bitsandbytes"),
    ],
)
def test_its_own_library_answers_as_the_candidate_did(
    tiny: Model,
    tiny_facts: FactSet,
    target: str,
    formats: list[str],
    library: str,
    tmp_path: Path,
) -> None:
    text = f"version: 1\ntarget: {target}\nformats: [{', '.join(formats)}]\n"
    space = SearchSpace.parse(text, "test").resolve(tiny)
    options = list(space.options.items())
    bank = Bank(tiny, get_quantizer("rounding" if target in ROUNDED else None, target))
    assignment = Assignment.of(
        {name: fmts[i % len(fmts)].name for i, (name, fmts) in enumerate(options)},
        json.dumps(bank.settings),
    )
    folder = mps.export(tiny, assignment, to=target, out=tmp_path / "export", space=space)
    served, loader = load_as_served(str(folder))
    assert library in loader and any(part[0].isdigit() for part in loader.split())
    assert served.layers == () and served.device == tiny.device
    facts = tiny_facts.part("validation")
    proxy = RecallProxy(tiny, tiny_facts, facts, contrast=True)
    with Bench(space, bank) as bench:
        scored = bench.evaluate(assignment, proxy).scores
    answered = RecallProxy(served, tiny_facts, facts, contrast=True).reference
    moved = abs(answered.log_prob - scored.log_prob).max()
    if served.dtype == tiny.dtype:
        assert moved == 0.0
    else:  # fp16 or bf16 there
        assert moved <= 0.15
    assert answered.correct is not None and scored.correct is not None
    assert (answered.correct == scored.correct).mean() >= 0.99
    # The candidate differs from the reference, for GPTQ by more than arithmetic does.
    loss = abs(proxy.reference.log_prob - scored.log_prob)
    assert loss.max() > (0.15 if target == "gptq" else 0.0)


def test_what_is_not_quantized_loads_as_any_model(tiny: Model, tiny_folder: Path) -> None:
    served, loader = load_as_served(str(tiny_folder))
    assert served.fingerprint == tiny.fingerprint and loader.startswith("transformers ")


def test_a_method_without_a_loader_is_one_line(tiny_folder: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "nothing-known"}
    for path in tiny_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="by 'nothing-known', which transformers") as caught:
        load_as_served(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_lacks_a_weight_is_not_filled_with_chance(
    tiny: Model, tmp_path: Path
) -> None:
    out = mps.export(tiny, SearchSpace.default().resolve(tiny).smallest, out=tmp_path / "export")
    tensors = load_file(out / "model.safetensors")
    lost = next(name for name in tensors if name.endswith("layernorm.weight"))
    kept = {name: tensor for name, tensor in tensors.items() if name != lost}
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"lacks '{lost}'"):
        load_as_served(str(out))


def test_an_index_that_leads_outside_is_refused(
    tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = mps.export(tiny, SearchSpace.default().resolve(tiny).smallest, out=tmp_path / "export")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "../other.safetensors"}}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    monkeypatch.setattr(torch, "zeros", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(ModelError, match="lies outside its folder"):
        load_as_served(str(out))
    # gptqmodel looks for an index of this name first.
    (out / "model.safetensors.index.json").rename(
        out / "gptq_model-4bit-32g.safetensors.index.json"
    )
    with pytest.raises(ModelError, match="lies outside its folder"):
        load_as_served(str(out))


def test_nobody_is_asked_whether_code_of_a_checkpoint_may_run(
    tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = mps.export(tiny, SearchSpace.default().resolve(tiny).smallest, out=tmp_path / "export")
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config |= {"auto_map": {"AutoTokenizer": [None, "own.Own"]}, "tokenizer_class": "Own"}
    path.write_text(json.dumps(config))
    (out / "own.py").write_text("raise SystemExit('this was run')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it was asked"))
    with pytest.raises(ModelError, match="does not load"):
        load_as_served(str(out))


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_memory_that_runs_out_is_no_fault_of_the_checkpoint(
    tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    out = mps.export(tiny, SearchSpace.default().resolve(tiny).smallest, out=tmp_path / "export")

    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(sys.modules[load_as_served.__module__], "_load_transformers", full)
    with pytest.raises(ResourceError, match="memory ran out"):
        load_as_served(str(out))
