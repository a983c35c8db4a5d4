"""A GPTQ export, reloaded by gptqmodel in a fresh process, is the candidate."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_family
from safetensors.torch import load_file

import mpsearch as mps
from mpsearch.assignment import Assignment
from mpsearch.bank import Bank
from mpsearch.codecs import decode
from mpsearch.errors import UsageError
from mpsearch.export.gptq import quantization_config
from mpsearch.formats import BF16, FORMATS
from mpsearch.models import Model, load_whole
from mpsearch.quantizers import get_quantizer
from mpsearch.space import ResolvedSpace, SearchSpace

RELOAD = """
import sys, torch
from safetensors.torch import save_file
from gptqmodel import BACKEND, GPTQModel
folder, tokens, out = sys.argv[1], eval(sys.argv[2]), sys.argv[3]
loaded = GPTQModel.load(folder, backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16)
model = loaded.model.eval()
with torch.inference_mode():
    logits = model(torch.tensor([tokens])).logits
weights = {}
for name, module in model.named_modules():
    if hasattr(module, "qweight"):
        weights[name] = module.dequantize_weight().T.contiguous()
    elif isinstance(module, torch.nn.Linear):
        weights[name] = module.weight.detach().contiguous()
assert "mpsearch" not in sys.modules
save_file({"logits": logits.contiguous(), **weights}, out)
"""
BY_TRANSFORMERS = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
folder, tokens, out = sys.argv[1], eval(sys.argv[2]), sys.argv[3]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
assert "gptqmodel" in type(model.model.layers[0].mlp.up_proj).__module__
with torch.inference_mode():
    logits = model(torch.tensor([tokens])).logits
assert "mpsearch" not in sys.modules
save_file({"logits": logits.contiguous()}, out)
"""
# The tiny model's layers have 64 and 128 columns: a group of 128 is short in most.
EVERY_WIDTH = (
    *("gptq2-g64", "gptq3-g32", "gptq4-g128", "gptq4-g64", "gptq8-g32", "bf16", "gptq3-g64"),
)


@pytest.fixture(scope="module")
def space(tiny: Model) -> ResolvedSpace:
    formats = ", ".join(dict.fromkeys(EVERY_WIDTH))
    text = f"version: 1\ntarget: gptq\nformats: [{formats}]\n"
    return SearchSpace.parse(text, "test").resolve(tiny)


@pytest.fixture(scope="module")
def bank(tiny: Model) -> Bank:
    return Bank(tiny, get_quantizer("rounding", "gptq"))


def mixed(space: ResolvedSpace, bank: Bank) -> Assignment:
    """Every format in turn, with the bank that made it."""
    names = [group.name for group in space.groups]
    turns = {name: EVERY_WIDTH[i % len(EVERY_WIDTH)] for i, name in enumerate(names)}
    return Assignment.of(turns, json.dumps(bank.settings))


def test_a_mix_reloads_bit_equal_in_gptqmodel_in_a_fresh_process(
    tiny: Model, space: ResolvedSpace, bank: Bank, tmp_path: Path
) -> None:
    pytest.importorskip("gptqmodel")
    assignment = mixed(space, bank)
    folder = mps.export(tiny, assignment, to="gptq", out=tmp_path / "export", space=space)
    check_reload(tiny, space, assignment, bank, folder, tmp_path)


TOKENS = [2, 5, 3, 23, 4]


def in_a_fresh_process(script: str, folder: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    out = tmp_path / "reloaded.safetensors"
    subprocess.run(
        [sys.executable, "-c", script, str(folder), repr(TOKENS), str(out)],
        check=True,
        capture_output=True,
        timeout=300,
        env={**os.environ, "TORCHDYNAMO_DISABLE": "1", "GPTQMODEL_CPU_WORKERS": "2"},
    )
    return load_file(out)


def test_one_width_loads_in_transformers_too(tiny_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("gptqmodel")
    model = load_whole(str(tiny_folder))  # of its own, as its dtype is changed
    text = "version: 1\ntarget: auto-gptq\nformats: [gptq4-g32]\n"
    space = SearchSpace.parse(text, "test").resolve(model)
    out = tmp_path / "export"
    folder = mps.export(model, space.smallest, to="auto-gptq", out=out, space=space)
    found = in_a_fresh_process(BY_TRANSFORMERS, folder, tmp_path)["logits"].float()
    bank = Bank(model, get_quantizer(None, "gptq"))
    module = model.module.float()  # the exact weights: bf16 would round them
    with torch.inference_mode():
        unquantized = module(torch.tensor([TOKENS])).logits
        for name, fmt in space.layer_formats(space.smallest).items():
            model.places[name].parameter.data = decode(bank.stored(name, fmt), fmt).float()
        logits = module(torch.tensor([TOKENS])).logits
    # Its kernel for CPUs rounds scales to bf16; what is not rounding would show as much more.
    assert (found - logits).std() < 0.02 * logits.std()
    assert (found - logits).std() < 0.2 * (found - unquantized).std()


def check_reload(
    model: Model,
    space: ResolvedSpace,
    assignment: Assignment,
    bank: Bank,
    folder: Path,
    tmp_path: Path,
) -> None:
    loaded = in_a_fresh_process(RELOAD, folder, tmp_path)
    for name, fmt in space.layer_formats(assignment).items():
        weight = decode(bank.stored(name, fmt), fmt)
        assert torch.equal(loaded[name], weight.to(torch.float16)), name
        model.places[name].put(weight.to(model.dtype))
    with torch.inference_mode():
        logits = model.module(torch.tensor([TOKENS])).logits
    model.restore()
    assert torch.allclose(loaded["logits"].float(), logits.float(), atol=0.5, rtol=0.05)


@pytest.mark.parametrize("fmt", ["gptq3-g32", "gptq4-g64", "bf16"])
def test_an_untied_head_reloads_bit_equal_in_gptqmodel(fmt: str, tmp_path: Path) -> None:
    pytest.importorskip("gptqmodel")
    model = tiny_family("llama", vocab_size=96)  # whole words of codes
    text = f"version: 1\ntarget: gptq\nformats: [gptq4-g64]\nhead: [{fmt}]\n"
    space = SearchSpace.parse(text, "test").resolve(model)
    bank = Bank(model, get_quantizer("rounding", "gptq"), root=tmp_path / "bank")
    assignment = Assignment.of(dict(space.smallest), json.dumps(bank.settings))
    folder = mps.export(model, assignment, to="gptq", out=tmp_path / "export", space=space)
    stored = load_file(folder / "model.safetensors")
    assert sum(tensor.nbytes for tensor in stored.values()) == space.stored_bytes(assignment)
    config = json.loads((folder / "quantize_config.json").read_text())
    assert config["lm_head"] == (fmt != "bf16")
    assert ("dynamic" in config) == (fmt == "gptq3-g32")
    check_reload(model, space, assignment, bank, folder, tmp_path)


def test_stored_tensors_are_the_banks_own_and_of_the_predicted_size(
    tiny: Model, space: ResolvedSpace, bank: Bank, tmp_path: Path
) -> None:
    assignment = mixed(space, bank)
    folder = mps.export(tiny, assignment, to="gptq", out=tmp_path / "export", space=space)
    stored = load_file(folder / "model.safetensors")
    assert sum(tensor.nbytes for tensor in stored.values()) == space.stored_bytes(assignment)
    for name, fmt in space.layer_formats(assignment).items():
        for suffix, tensor in bank.stored(name, fmt).items():
            assert torch.equal(stored[f"{name}.{suffix}"], tensor)
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "float16"
    assert config["quantization_config"] == json.loads(
        (folder / "quantize_config.json").read_text()
    )


@pytest.mark.parametrize(("fmt", "warned"), [("gptq4-g128", True), ("gptq4-g64", False)])
def test_short_last_groups_are_said_to_load_in_few_places(
    tiny: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture, fmt: str, warned: bool
) -> None:
    text = f"version: 1\ntarget: gptq\nformats: [{fmt}]\n"
    space = SearchSpace.parse(text, "test").resolve(tiny)
    mps.export(tiny, space.smallest, to="gptq", out=tmp_path / "export", space=space)
    assert ("last group of some layers is short" in caplog.text) is warned


def test_one_width_is_what_every_loader_reads_and_names_no_layer() -> None:
    config = quantization_config({f"m.{i}.q": FORMATS["gptq4-g64"] for i in range(3)})
    assert config == {
        **{"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True, "desc_act": False},
        **{"checkpoint_format": "gptq", "pack_dtype": "int32", "lm_head": False},
    }


def test_layers_that_differ_from_the_commonest_format_are_named_one_by_one() -> None:
    formats = {
        **{f"m.{i}.q": FORMATS["gptq4-g64"] for i in range(3)},
        **{"m.1.o": FORMATS["gptq4-g32"], "m.1.out": FORMATS["gptq8-g64"], "m.2.o": BF16},
    }
    config = quantization_config(formats)
    assert (config["bits"], config["group_size"]) == (4, 64)
    found = {}
    for pattern, overrides in config["dynamic"].items():
        matched = [name for name in formats if re.match(pattern[2:], name)]
        found[(pattern[:2], *matched)] = overrides
    assert found == {
        ("+:", "m.1.o"): {"bits": 4, "group_size": 32},
        ("+:", "m.1.out"): {"bits": 8, "group_size": 64},
        ("-:", "m.2.o"): {},
    }


def test_what_a_target_cannot_hold_is_said_with_a_layer_and_a_way_out(
    tiny: Model, tiny_space: ResolvedSpace, tmp_path: Path
) -> None:
    with pytest.raises(
        UsageError,
        match=r"a checkpoint for gptq cannot hold this point: 'model\.layers\.0\.\S+' is int2-g64 "
        r"and \d+ more layers do not fit; it holds gptq2-g32.*, or export to compressed-tensors",
    ):
        mps.export(tiny, tiny_space.smallest, to="gptq", out=tmp_path / "out", space=tiny_space)
