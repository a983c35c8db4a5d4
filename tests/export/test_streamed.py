"""A model whose blocks hold no weights is exported to the files that the loaded one gives."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_level import byte_level
from conftest import build_tokenizer, tiny_config
from transformers import AutoModelForCausalLM, GenerationConfig

import mpsearch as mps
from mpsearch.assignment import Assignment
from mpsearch.errors import UsageError
from mpsearch.export.reload import load_any
from mpsearch.formats import BF16
from mpsearch.models import Model, load_whole
from mpsearch.skeleton import load_skeleton
from mpsearch.space import ResolvedSpace, SearchSpace

EXPERTS_KEPT = "rules:\n- {match: '*experts*', formats: [bf16]}\n"
BLOCKS_KEPT = (
    "embedding: [int8-g64-unpacked]\nrules:\n- {match: 'transformer.h*', formats: [bf16]}\n"
)
CASES: dict[str, tuple[str, dict[str, Any], str, str, str]] = {
    "integers": ("llama", {}, "compressed-tensors", "int3-g64, int4-g64-asym, fp8, bf16", ""),
    "tied": (
        *("qwen2", {"tie_word_embeddings": True}, "compressed-tensors", "int4-g64, bf16"),
        "embedding: [int8-g64-unpacked]\n",
    ),
    "fused": ("phi3", {}, "compressed-tensors", "int2-g64, bf16", ""),
    "transposed": ("gpt2", {}, "compressed-tensors", "int4-g64, bf16", BLOCKS_KEPT),
    "experts": ("mixtral", {}, "compressed-tensors", "int4-g64, bf16", EXPERTS_KEPT),
    "gptq": ("llama", {"vocab_size": 96}, "gptq", "gptq4-g64, bf16", "head: [gptq4-g64]\n"),
    "nf4": ("mistral", {}, "bitsandbytes", "nf4-dq, bf16", ""),
    "gguf": ("llama", {"vocab_size": 420}, "gguf", "q4_0, q5_1, bf16", "embedding: [q8_0]\n"),
}


def saved(folder: Path, family: str, changes: dict[str, Any], target: str) -> Path:
    """A model with random weights in shards, and its own settings of how it generates."""
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(tiny_config(family, **changes)).to(torch.bfloat16)
    module.generation_config = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9)
    module.save_pretrained(folder, max_shard_size="60KB")
    (byte_level() if target == "gguf" else build_tokenizer()).save_pretrained(folder)
    (folder / "LICENSE").write_text("do as you like")
    return folder


def alternating(space: ResolvedSpace) -> Assignment:
    """The space's formats in turn."""
    options = list(space.options.items())
    return Assignment.of({name: of[i % len(of)].name for i, (name, of) in enumerate(options)})


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def exported(model: Model, case: str, to: str, out: Path) -> Path:
    _, _, target, formats, more = CASES[case]
    text = f"version: 1\ntarget: {target}\nformats: [{formats}]\n{more}"
    space = SearchSpace.parse(text, "test").resolve(model)
    return mps.export(model, alternating(space), to=to, out=out, space=space)


@pytest.fixture(autouse=True)
def no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """It shows formats alone, and takes as long as all else."""
    monkeypatch.setattr(
        sys.modules["mpsearch.export"], "plot_bits", lambda *given: given[-1].write_bytes(b"")
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("dequantized", "shard_bytes"), [(False, 5_000_000_000), (False, 20_000), (True, 20_000)]
)
def test_it_is_the_loaded_models_export_file_for_file(
    case: str,
    dequantized: bool,
    shard_bytes: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.modules["mpsearch.export.checkpoint"], "SHARD_BYTES", shard_bytes)
    family, changes, target, *_ = CASES[case]
    source = str(saved(tmp_path / "model", family, changes, target))
    to = "dequantized" if dequantized else target
    loaded, streamed = (
        exported(load(source), case, to, tmp_path / name)
        for name, load in (("loaded", load_whole), ("streamed", load_skeleton))
    )
    theirs, ours = files(loaded), files(streamed)
    assert set(ours) == set(theirs)
    assert [name for name, content in theirs.items() if ours[name] != content] == []
    assert b'"temperature": 0.6' in ours["generation_config.json"]
    split = to != "gguf" and shard_bytes < 1_000_000
    assert ("model.safetensors.index.json" in ours) == split


@pytest.mark.parametrize("case", ["fused", "experts", "nf4"])
def test_what_it_wrote_loads(case: str, tmp_path: Path) -> None:
    family, changes, target, *_ = CASES[case]
    source = str(saved(tmp_path / "model", family, changes, target))
    model = load_skeleton(source)
    again = load_any(str(exported(model, case, target, tmp_path / "out")))
    for name, tensor in model.kept.items():
        assert torch.equal(again.module.state_dict()[name].bfloat16(), tensor), name
    assert not any(parameter.isnan().any() for parameter in again.module.parameters())


def test_nothing_is_read_to_plan_and_each_weight_once_to_write(tmp_path: Path) -> None:
    source = saved(tmp_path / "model", "mixtral", {}, "compressed-tensors")
    model = load_skeleton(str(source))
    checkpoint = model.checkpoint
    assert checkpoint is not None
    before = checkpoint.read_bytes
    space = SearchSpace.parse(
        f"version: 1\ntarget: compressed-tensors\nformats: [int4-g64, bf16]\n{EXPERTS_KEPT}", "test"
    ).resolve(model)
    assert model.kept_by_reason() and not model.unrecognised and model.vector_weights
    assert "model.norm.weight" in model.kept
    assert checkpoint.read_bytes == before
    mps.export(model, space.smallest, out=tmp_path / "first", space=space)  # fills the bank
    before = checkpoint.read_bytes
    mps.export(model, space.smallest, out=tmp_path / "out", space=space)
    weights = sum(BF16.stored_bytes(group) for group in space.groups if "experts" in group.name)
    assert checkpoint.read_bytes - before == weights + model.kept_bytes


def test_experts_that_no_checkpoint_holds_are_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    source = saved(tmp_path / "model", "mixtral", {}, "compressed-tensors")
    model = load_skeleton(str(source))
    space = SearchSpace.default().resolve(model)
    with pytest.raises(UsageError, match="is no linear"):
        mps.export(model, space.smallest, out=tmp_path / "out", space=space)
    assert not (tmp_path / "out").exists()
