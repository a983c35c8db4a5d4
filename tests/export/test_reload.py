"""An export loaded again is the candidate to the bit, and what cannot be scored says why."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mpsearch as mps
from mpsearch.assignment import Assignment
from mpsearch.bank import Bank
from mpsearch.errors import ModelError
from mpsearch.evaluate import Bench
from mpsearch.export.reload import load_any
from mpsearch.facts import FactSet
from mpsearch.models import Model
from mpsearch.quantizers import get_quantizer
from mpsearch.recall import RecallProxy
from mpsearch.space import ResolvedSpace, SearchSpace


def space_of(model: Model, target: str, *formats: str) -> ResolvedSpace:
    text = f"version: 1\ntarget: {target}\nformats: [{', '.join(formats)}]\n"
    return SearchSpace.parse(text, "test").resolve(model)


def exported(
    model: Model, space: ResolvedSpace, out: Path, to: str = ""
) -> tuple[Path, Assignment]:
    """Every format of the space in turn."""
    options = list(space.options.items())
    assignment = Assignment.of(
        {name: formats[i % len(formats)].name for i, (name, formats) in enumerate(options)}
    )
    to = to or space.target.name
    return mps.export(model, assignment, to=to, out=out, space=space), assignment


@pytest.mark.parametrize(
    ("target", "formats"),
    [
        ("compressed-tensors", ["int2-g64", "int3-g64", "int8-g64", "bf16"]),
        ("compressed-tensors", ["fp8", "int4-g32", "int6-channel"]),
        ("gptq", ["gptq4-g64"]),
        ("gptq", ["gptq2-g32", "gptq3-g64", "gptq8-g128", "bf16"]),
        ("bitsandbytes", ["nf4", "bf16"]),
        ("bitsandbytes", ["nf4-dq", "bf16"]),
        ("bitsandbytes", ["fp4"]),
        ("bitsandbytes", ["fp4-dq"]),
        ("bitsandbytes", ["int8", "bf16"]),
    ],
)
def test_a_reloaded_export_has_the_weights_and_scores_of_its_candidate(
    tiny: Model, tiny_facts: FactSet, target: str, formats: list[str], tmp_path: Path
) -> None:
    space = space_of(tiny, target, *formats)
    folder, assignment = exported(tiny, space, tmp_path / "export")
    loaded = load_any(str(folder))
    facts = tiny_facts.part("validation")
    proxy = RecallProxy(tiny, tiny_facts, facts, contrast=True)
    bank = Bank(tiny, get_quantizer(None, target))
    with Bench(space, bank) as bench:
        scored = bench.evaluate(assignment, proxy).scores
        for layer in tiny.layers:
            assert torch.equal(loaded.places[layer.name].weight, tiny.places[layer.name].weight), (
                layer.name
            )
    reloaded = RecallProxy(loaded, tiny_facts, facts, contrast=True, against=proxy.first)
    assert scored.kl.max() > 0
    for name in ("log_prob", "kl", "top1", "margin"):
        assert (getattr(reloaded.reference, name) == getattr(scored, name)).all(), name
    assert [layer.name for layer in loaded.layers] == [layer.name for layer in tiny.layers]


def test_a_model_is_loaded_as_ever(tiny: Model, tiny_folder: Path) -> None:
    assert load_any(str(tiny_folder)).fingerprint == tiny.fingerprint
    with pytest.raises(ModelError, match="neither a folder here nor a hub id"):
        load_any("no/such/folder")


def test_what_transformers_cannot_load_is_one_line_that_names_what_can(
    tiny: Model, tmp_path: Path
) -> None:
    for target, formats, words in (
        ("compressed-tensors", ["int4-g64-asym"], "zero-points, .* vLLM can"),
    ):
        folder, _ = exported(tiny, space_of(tiny, target, *formats), tmp_path / formats[0])
        with pytest.raises(ModelError, match=words) as caught:
            load_any(str(folder))
        assert "\n" not in str(caught.value)


def test_other_quantized_and_damaged_folders_are_refused(tiny: Model, tmp_path: Path) -> None:
    space = space_of(tiny, "compressed-tensors", "int4-g64")
    folder, _ = exported(tiny, space, tmp_path / "export")
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ModelError, match="does not load") as caught:
        load_any(str(folder))
    assert "\n" not in str(caught.value)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for groups, words in (([1], "no config_groups that"), ({"a": 1}, "no config_groups that")):
        config["quantization_config"]["config_groups"] = groups
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        with pytest.raises(ModelError, match=words):
            load_any(str(folder))
    gptq, _ = exported(tiny, space_of(tiny, "gptq", "gptq4-g64"), tmp_path / "gptq")
    tensors = load_file(gptq / "model.safetensors")
    norm = next(name for name in tensors if "layernorm" in name)
    kept = {name: tensor for name, tensor in tensors.items() if name != norm}
    save_file(kept, gptq / "model.safetensors")
    with pytest.raises(ModelError, match=f"its files lack '{norm}'"):
        load_any(str(gptq))
    config = json.loads((gptq / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "gptq_v2"
    (gptq / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="format 'gptq_v2'"):
        load_any(str(gptq))
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(ModelError, match="quantized by awq"):
        load_any(str(other))


@pytest.mark.parametrize(
    ("fmt", "part", "words"),
    [
        ("nf4", "weight.absmax", "a 'weight.absmax' is not that of 64 x 64 nf4"),
        ("nf4", "weight", "a 'weight' is not that of"),
        ("nf4-dq", "weight.nested_absmax", "a 'weight.nested_absmax' is not that of"),
        ("int8", "SCB", "a 'SCB' is not that of 64 x 64 int8"),
    ],
)
def test_tensors_that_the_librarys_decoder_would_read_past_the_end_of_are_refused(
    tiny: Model, tmp_path: Path, fmt: str, part: str, words: str
) -> None:
    folder, _ = exported(tiny, space_of(tiny, "bitsandbytes", fmt), tmp_path / "export")
    tensors = load_file(folder / "model.safetensors")
    key = f"model.layers.0.self_attn.q_proj.{part}"
    tensors[key] = tensors[key][:-1].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=words):
        load_any(str(folder))


@pytest.mark.parametrize(
    ("was", "becomes"),
    [
        ('"blocksize": 64', '"blocksize": 32'),
        ('"nested_blocksize": 256', '"nested_blocksize": 4'),
        ('"quant_type": "nf4"', '"quant_type": "fp4"'),
        ('"dtype": "bfloat16"', '"dtype": "bfloat61"'),
        ('"shape": [64, 64]', '"shape": [99, 64]'),
        ('"shape"', '"shap"'),
        ('{"quant', '["quant'),
    ],
)
def test_a_damaged_description_of_a_layer_is_one_line(
    tiny: Model, tmp_path: Path, was: str, becomes: str
) -> None:
    folder, _ = exported(tiny, space_of(tiny, "bitsandbytes", "nf4-dq"), tmp_path / "export")
    tensors = load_file(folder / "model.safetensors")
    key = "model.layers.0.self_attn.q_proj.weight.quant_state.bitsandbytes__nf4"
    text = bytes(tensors[key].tolist()).decode()
    assert was in text
    tensors[key] = torch.tensor(list(text.replace(was, becomes).encode()), dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="does not load") as caught:
        load_any(str(folder))
    assert "\n" not in str(caught.value)
