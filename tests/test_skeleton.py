"""A skeleton: what a loaded model is, tensor for tensor, without its blocks' weights in memory."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from conftest import build_tokenizer, tiny_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mpsearch.blocks import find_blocks
from mpsearch.errors import CheckError, ModelError
from mpsearch.models import Model, from_module
from mpsearch.skeleton import load_skeleton

CPU = torch.device("cpu")
MODELS = {
    "llama": ("llama", {}),
    "tied": ("qwen2", {"tie_word_embeddings": True}),
    "scaled embedding": ("gemma", {}),
    "windows": ("gemma3_text", {"head_dim": 16}),
    "stored transposed": ("gpt2", {}),
    "stacked experts": ("mixtral", {}),
    "fused": ("phi3", {}),
    "a router's own bias": ("deepseek_v3", {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
        "moe_intermediate_size": 64, "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 16, "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
    }),
}  # fmt: skip


def saved(
    folder: Path, family: str, dtype: torch.dtype = torch.bfloat16, **changes: object
) -> Path:
    """A model of that family with random weights, in shards."""
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(tiny_config(family, **changes)).to(dtype)
    for name, buffer in module.named_buffers():
        if name.endswith("correction_bias"):
            buffer.copy_(torch.rand(4))
    module.save_pretrained(folder, max_shard_size="60KB")
    build_tokenizer().save_pretrained(folder)
    return folder


def loaded(folder: Path, dtype: torch.dtype) -> Model:
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return from_module(str(folder), folder, module, build_tokenizer(), CPU, dtype)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_is_the_loaded_model_tensor_for_tensor(
    tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    kind, changes = MODELS[family]
    folder = saved(tmp_path, kind, **changes)  # type: ignore[arg-type]
    expected, model = loaded(folder, dtype), load_skeleton(str(folder), device=CPU, dtype=dtype)
    assert model.checkpoint is not None and expected.checkpoint is None
    assert model.layers == expected.layers
    assert (model.embedding, model.head) == (expected.embedding, expected.head)
    assert model.fingerprint == expected.fingerprint
    assert model.why_kept == expected.why_kept
    assert (model.dtype, model.device) == (expected.dtype, expected.device)
    for ours, theirs in ((model.kept, expected.kept), (model.originals, expected.originals)):
        assert list(ours) == list(theirs)
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype
            assert torch.equal(ours[name], tensor), name
    assert model.kept_stored == expected.kept_stored
    for name, stored in model.kept_stored.items():
        assert stored.shape == expected.kept[name].shape, name
        assert f"torch.{stored.dtype}" == str(expected.kept[name].dtype), name
    theirs = dict(expected.module.named_parameters())
    read = model.checkpoint.read(theirs)
    for name, tensor in theirs.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name
    buffers = dict(expected.module.named_buffers())
    assert list(dict(model.module.named_buffers())) == list(buffers)
    for name, tensor in buffers.items():
        ours = model.module.get_buffer(name)
        assert ours.dtype == tensor.dtype and torch.equal(ours, tensor), name


def test_blocks_hold_nothing_and_all_else_is_there(tmp_path: Path) -> None:
    model = load_skeleton(str(saved(tmp_path, "llama")), device=CPU, dtype=torch.float32)
    inside = [p for block in find_blocks(model.module, model.places) for p in block.parameters()]
    assert all(p.untyped_storage().nbytes() == 4 and p.isnan().all() for p in inside)
    outside = {id(p) for p in model.module.parameters()} - {id(p) for p in inside}
    assert len(outside) == 3
    assert not any(p.isnan().any() for p in model.module.parameters() if id(p) in outside)
    assert not model.module.training
    assert not any(p.requires_grad for p in model.module.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_precisions_are_read_as_the_loader_reads_them(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    folder = saved(tmp_path, "llama", dtype)
    found = load_skeleton(str(folder), device=CPU, dtype=torch.float32)
    assert found.fingerprint == loaded(folder, torch.float32).fingerprint


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    model = load_skeleton(str(saved(tmp_path, "mixtral")), device=CPU, dtype=torch.float32)
    checkpoint = model.checkpoint
    assert checkpoint is not None
    before = checkpoint.read_bytes
    checkpoint.read(["model.layers.0.mlp.experts.gate_up_proj", "model.norm.weight"])
    assert checkpoint.read_bytes - before == 2 * (4 * 2 * 128 * 64 + 64)


def spoil(folder: Path, name: str, change: str) -> None:
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            if change == "nan":
                tensors[name].view(-1)[3] = torch.nan
            elif change == "shape":
                tensors[name] = tensors[name][1:].contiguous()
            else:
                tensors["other"] = tensors.pop(name)
            save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ("nan", CheckError, "'model.layers.1.mlp.up_proj.weight' holds 1 NaN or infinite"),
        ("shape", ModelError, r"'model.layers.1.mlp.up_proj.weight' as \(127, 64\)"),
        ("name", ModelError, "lacks 'model.layers.1.mlp.up_proj.weight' and 0 more"),
    ],
)
def test_what_a_loaded_model_is_refused_for(
    tmp_path: Path, change: str, error: type[Exception], words: str
) -> None:
    folder = saved(tmp_path, "llama")
    spoil(folder, "model.layers.1.mlp.up_proj.weight", change)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(error, match=words):
        load_skeleton(str(folder), device=CPU, dtype=torch.float32)


def test_a_model_whose_blocks_stand_in_no_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path, "llama")
    monkeypatch.setattr("mpsearch.skeleton.find_blocks", lambda *_: [])
    with pytest.raises(ModelError, match="so it cannot be run one block at a time"):
        load_skeleton(str(folder), device=CPU, dtype=torch.float32)


def test_the_chat_template_is_as_a_loaded_model_has_it(tiny_folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_folder, tmp_path / "copy")
    with pytest.raises(ModelError, match="has no chat template"):
        load_skeleton(str(copy), chat_template=True)
