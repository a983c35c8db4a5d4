"""The exported checkpoint, reloaded by transformers in a fresh process, is the candidate."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, build_tokenizer, tiny_config, tiny_family
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import mpsearch as mps
from mpsearch.assignment import Assignment
from mpsearch.bank import Bank
from mpsearch.errors import InfeasibleError, ResourceError, RunError, UsageError
from mpsearch.evaluate import Bench, quantized_layers
from mpsearch.models import Model, from_module, load_whole
from mpsearch.quantizers import get_quantizer
from mpsearch.space import ResolvedSpace, SearchSpace

RELOAD = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
folder, tokens, out, dtype = sys.argv[1], eval(sys.argv[2]), sys.argv[3], sys.argv[4]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
with torch.no_grad():
    model(torch.tensor([[0]]))  # decompresses
    for parameter in model.parameters():  # to the arithmetic of the candidate, on the same values
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(getattr(torch, dtype))
    logits = model(torch.tensor([tokens])).logits
weights = {
    name: module.weight.detach().clone().contiguous()
    for name, module in model.named_modules()
    if isinstance(module, (torch.nn.Linear, torch.nn.Embedding))
}
assert "mpsearch" not in sys.modules
save_file({"logits": logits.contiguous(), **weights}, out)
"""


def mixed(space: ResolvedSpace, formats: Sequence[str]) -> Assignment:
    """Every format in turn, so that all widths and kinds of layer meet."""
    return Assignment.of(
        {group.name: formats[i % len(formats)] for i, group in enumerate(space.groups)}
    )


def reload(
    folder: Path, tokens: list[int], out: Path, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    arguments = [str(folder), repr(tokens), str(out), str(dtype).removeprefix("torch.")]
    subprocess.run(
        [sys.executable, "-c", RELOAD, *arguments],
        check=True,
        capture_output=True,
        timeout=300,
    )
    return load_file(out)


def check_export(
    model: Model, space: ResolvedSpace, assignment: Assignment, tokens: list[int], tmp_path: Path
) -> None:
    folder = mps.export(model, assignment, out=tmp_path / "export", space=space)
    bank = Bank(model, get_quantizer(None, "compressed-tensors"))
    with Bench(space, bank) as bench, torch.inference_mode():
        bench.put(assignment)
        logits = model.module(torch.tensor([tokens])).logits
        weights = {
            layer.name: model.places[layer.name].weight.detach().clone()
            for layer in model.every_layer
        }
        if model.embedding and model.embedding.tied:
            weights[model.embedding.tied] = weights[model.embedding.name]
    loaded = reload(folder, tokens, tmp_path / "reloaded.safetensors", model.dtype)
    for name, weight in weights.items():
        assert torch.equal(loaded[name], weight), name
    assert torch.equal(loaded["logits"], logits)

    with safe_open(folder / "model.safetensors", framework="pt") as stored:
        tensors = [stored.get_tensor(name) for name in stored.keys()]  # noqa: SIM118
    assert sum(t.nbytes for t in tensors) == space.stored_bytes(assignment)
    about = json.loads((folder / "mpsearch.json").read_text())
    assert about["stored_bytes"] == space.stored_bytes(assignment)


def test_every_width_reloads_bit_equal_in_a_fresh_process(
    tiny: Model, tiny_space: ResolvedSpace, tmp_path: Path
) -> None:
    assignment = mixed(tiny_space, ["int2-g64", "int3-g64", "int4-g64", "int8-g64"])
    check_export(tiny, tiny_space, assignment, [2, 5, 3, 23, 4], tmp_path)


def test_other_groups_and_widths_and_fp8_reload_bit_equal(tiny: Model, tmp_path: Path) -> None:
    formats = ["int4-g32", "int3-g64", "int5-g32", "int6-channel", "fp8", "bf16", "int8-channel"]
    space = SearchSpace.parse(
        f"version: 1\ntarget: compressed-tensors\nformats: [{', '.join(formats)}]\n", "test"
    ).resolve(tiny)
    assert len(space.groups) > len(formats)
    check_export(tiny, space, mixed(space, formats), [2, 5, 3, 23, 4], tmp_path)


def test_a_space_of_several_group_sizes_reloads_bit_equal(tmp_path: Path) -> None:
    model = tiny_family("llama", intermediate_size=256, tie_word_embeddings=True)
    text = (
        "version: 1\ntarget: compressed-tensors\n"
        "formats: [int3-g32, int3-g64, int3-g128, int4-g128]\n"
        "rules:\n- match: '*'\n  formats: [int3-g32, int3-g64]\n"
        "- match: '*.down_proj'\n  formats: [int3-g32, int3-g64, int3-g128, int4-g128]\n"
    )
    space = SearchSpace.parse(text, "test").resolve(model)
    down = "model.layers.{}.mlp.down_proj"
    assert [fmt.name for fmt in space.options[down.format(0)]] == [
        "int3-g128", "int3-g64", "int3-g32", "int4-g128"
    ]  # fmt: skip
    formats = mixed(space, ["int3-g32", "int3-g64"])
    chosen = {**formats, down.format(0): "int3-g128", down.format(1): "int4-g128"}
    check_export(model, space, Assignment.of(chosen), [2, 5, 3, 23, 4], tmp_path)
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"].values()
    assert {group["weights"]["group_size"] for group in groups} == {32, 64, 128}


FEW = "version: 1\ntarget: compressed-tensors\nformats: [int4-g64, bf16]\n"
TOKENS = [2, 5, 3, 23, 4]
UNPACKED = ["int8-g64-unpacked", "int8-channel-unpacked", "fp8"]


def bf16_family(family: str, tied: bool) -> Model:
    """Computing in bf16 as the loader does, so that logits can be equal."""
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(tiny_config(family, tie_word_embeddings=tied))
    cpu = torch.device("cpu")
    return from_module(family, Path(), module, build_tokenizer(), cpu, torch.bfloat16)


@pytest.mark.parametrize("name", UNPACKED)
def test_a_tied_embedding_is_stored_once_and_reloads_bit_equal_in_both_its_places(
    name: str, tmp_path: Path
) -> None:
    model = bf16_family("llama", tied=True)
    space = SearchSpace.parse(f"{FEW}embedding: [{name}]\n", "test").resolve(model)
    check_export(model, space, space.smallest, TOKENS, tmp_path)
    stored = load_file(tmp_path / "export" / "model.safetensors")
    assert {key for key in stored if "layers" not in key} == {
        *("model.embed_tokens.weight", "model.embed_tokens.weight_scale"),
        *("lm_head.weight_scale", "model.norm.weight"),
    }


@pytest.mark.parametrize(
    ("embedding", "head"),
    [
        ("int8-g64-unpacked", "int3-g64"),
        ("fp8", "int4-channel"),
        ("int8-channel-unpacked", "fp8"),
        ("bf16", "int8-g64-unpacked"),
        ("fp8", "bf16"),
    ],
)
def test_an_untied_embedding_and_head_reload_bit_equal_each_in_its_own_format(
    embedding: str, head: str, tmp_path: Path
) -> None:
    model = bf16_family("llama", tied=False)
    keys = f"embedding: [{embedding}]\nhead: [{head}]\n"
    space = SearchSpace.parse(FEW + keys, "test").resolve(model)
    check_export(model, space, space.smallest, TOKENS, tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head_of_every_family_reload_bit_equal(
    family: str, tied: bool, tmp_path: Path
) -> None:
    """With every other layer in bf16, as not all of these can be stored quantized."""
    model = bf16_family(family, tied)
    keys = "rules: [{match: '*', formats: [bf16]}]\nembedding: [int8-g64-unpacked]\n"
    keys += "" if tied else "head: [int4-g64]\n"
    space = SearchSpace.parse(FEW + keys, "test").resolve(model)
    folder = mps.export(model, space.smallest, out=tmp_path / "export", space=space)
    theirs, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, output_loading_info=True
    )
    # compressed-tensors turns Gemma's fixed factor into a weight, which its class fills in itself.
    assert info["missing_keys"] <= {"model.embed_tokens.embed_scale"}
    assert not info["unexpected_keys"]
    bank = Bank(model, get_quantizer(None, "compressed-tensors"))
    tokens = torch.tensor([TOKENS])
    with Bench(space, bank) as bench, torch.no_grad():
        bench.put(space.smallest)
        assert torch.equal(theirs(tokens).logits, model.module(tokens).logits)
        found = dict(theirs.named_parameters())
        for name, parameter in model.module.named_parameters(remove_duplicate=False):
            assert torch.equal(found[name], parameter), name
    stored = load_file(folder / "model.safetensors")
    assert sum(t.nbytes for t in stored.values()) == space.stored_bytes(space.smallest)


def test_zero_points_are_stored_as_compressed_tensors_unpacks_them(
    tiny: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers (5.23) does not load them: it builds the model with unpacked zero-points."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    formats = ["int4-g64-asym", "int3-g32-asym", "int2-channel-asym", "int8-g64-asym"]
    space = SearchSpace.parse(
        f"version: 1\ntarget: compressed-tensors\nformats: [{', '.join(formats)}]\n", "test"
    ).resolve(tiny)
    assignment = mixed(space, formats)
    folder = mps.export(tiny, assignment, out=tmp_path / "export", space=space)
    assert "transformers cannot load" in caplog.text
    bank = Bank(tiny, get_quantizer(None, "compressed-tensors"))
    stored = load_file(folder / "model.safetensors")
    described = json.loads((folder / "config.json").read_text())["quantization_config"]
    schemes = QuantizationConfig.model_validate(described).config_groups.values()
    for layer, fmt in quantized_layers(space, assignment):
        (scheme,) = [scheme for scheme in schemes if layer.name in scheme.targets]
        tensors = {
            name.removeprefix(f"{layer.name}."): tensor
            for name, tensor in stored.items()
            if name.startswith(f"{layer.name}.")
        }
        library = BaseCompressor.load_from_registry(scheme.format or described["format"])
        weight = library.decompress(tensors, scheme)["weight"]
        assert torch.equal(weight.to(tiny.dtype), bank.weight(layer.name, fmt))
    assert sum(t.nbytes for t in stored.values()) == space.stored_bytes(assignment)


def test_layers_kept_in_bf16_reload_bit_equal(tiny: Model, tmp_path: Path) -> None:
    space = SearchSpace.parse(
        "version: 1\ntarget: compressed-tensors\nformats: [int4-g64, bf16]\n", "test"
    ).resolve(tiny)
    check_export(tiny, space, mixed(space, ["bf16", "int4-g64"]), [2, 5, 3, 23, 4], tmp_path)


def test_the_built_in_model_reloads_bit_equal_in_a_fresh_process(tmp_path: Path) -> None:
    model = load_whole("builtin:smollm2-135m")
    space = SearchSpace.default().resolve(model)
    tokens = model.tokenizer("The capital of France is Paris. The capital of Italy is")["input_ids"]
    assignment = mixed(space, ["int4-g64", "int3-g64", "int8-g64", "int4-g64", "int2-g64"])
    check_export(model, space, assignment, tokens, tmp_path)


def test_the_built_in_models_tied_embedding_reloads_bit_equal_in_a_fresh_process(
    tmp_path: Path,
) -> None:
    model = load_whole("builtin:smollm2-135m")
    text = "version: 1\ntarget: compressed-tensors\nformats: [int4-g64, bf16]\n"
    text += "rules: [{match: '*', formats: [bf16]}]\nembedding: [int8-g64-unpacked]\n"
    space = SearchSpace.parse(text, "test").resolve(model)
    tokens = model.tokenizer("The capital of France is Paris. The capital of Italy is")["input_ids"]
    check_export(model, space, space.smallest, tokens, tmp_path)


def test_codes_are_the_banks_own(tiny: Model, tiny_space: ResolvedSpace, tmp_path: Path) -> None:
    assignment = mixed(tiny_space, ["int3-g64", "int8-g64"])
    folder = mps.export(tiny, assignment, out=tmp_path / "export")
    bank = Bank(tiny, get_quantizer(None, "compressed-tensors"))
    stored = load_file(folder / "model.safetensors")
    for layer, fmt in quantized_layers(tiny_space, assignment):
        for suffix, tensor in bank.stored(layer.name, fmt).items():
            assert torch.equal(stored[f"{layer.name}.{suffix}"], tensor)


def test_an_existing_folder_is_never_written_into(
    tiny: Model, tiny_space: ResolvedSpace, tmp_path: Path
) -> None:
    (tmp_path / "export").mkdir()
    with pytest.raises(RunError, match="exists"):
        mps.export(tiny, tiny_space.smallest, out=tmp_path / "export")
    assert list((tmp_path / "export").iterdir()) == []


def test_wrong_targets_and_assignments_are_refused(
    tiny: Model, tiny_space: ResolvedSpace, tmp_path: Path
) -> None:
    out = tmp_path / "export"
    with pytest.raises(UsageError, match="compressed-tensors"):
        mps.export(tiny, tiny_space.smallest, to="compressed-tensor", out=out)
    with pytest.raises(RunError, match="does not fit"):
        mps.export(tiny, Assignment.of({"elsewhere": "int4-g64"}), out=out)
    nf4 = Assignment.of({group.name: "nf4" for group in tiny_space.groups})
    with pytest.raises(UsageError, match=r"is nf4 and .* more layers do not fit"):
        mps.export(tiny, nf4, out=out)
    unquantized = Assignment.of({group.name: "bf16" for group in tiny_space.groups})
    with pytest.raises(InfeasibleError, match="nothing to export"):
        mps.export(tiny, unquantized, out=out)
    assert not out.exists()


def test_a_full_disk_leaves_nothing_that_looks_finished(
    tiny: Model, tiny_space: ResolvedSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    writer = sys.modules["mpsearch.export.checkpoint"]
    monkeypatch.setattr(writer, "write_parts", full)
    with pytest.raises((OSError, ResourceError)):
        mps.export(tiny, tiny_space.smallest, out=tmp_path / "export")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("family", "layer"),
    [
        ("gpt2", "transformer.h.0.attn.c_attn"),
        ("mixtral", "model.layers.0.mlp.experts.0.gate_proj"),
    ],
)
def test_what_no_loader_holds_is_refused_and_leaves_nothing(
    family: str, layer: str, tmp_path: Path
) -> None:
    model = tiny_family(family)
    space = SearchSpace.parse(FEW, "test").resolve(model)
    with pytest.raises(UsageError, match=f"'{layer}' is no linear"):
        mps.export(model, space.smallest, out=tmp_path / "export", space=space)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", ["phi3", "gpt_neox", "qwen3", "mixtral", "qwen2_moe"])
def test_other_families_reload_bit_equal(family: str, tmp_path: Path) -> None:
    """With experts left in bf16, which are then stored as transformers stores them."""
    model = tiny_family(family)
    rules = "rules:\n- match: '*.experts.*'\n  formats: [bf16]\n"
    text = FEW + (rules if family in ("mixtral", "qwen2_moe") else "")
    space = SearchSpace.parse(text, "test").resolve(model)
    folder = mps.export(model, space.smallest, out=tmp_path / "export", space=space)
    theirs, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(info.values())
    tokens = torch.arange(5, 20)[None]
    with torch.no_grad():
        theirs(tokens)  # decompresses its weights on the first pass
    found = dict(theirs.named_parameters())
    bank = Bank(model, get_quantizer(None, "compressed-tensors"))
    with Bench(space, bank) as bench:
        bench.put(space.smallest)
        for name, parameter in model.module.named_parameters():
            assert torch.equal(found[name], parameter.to(torch.bfloat16)), name
    stored = load_file(folder / "model.safetensors")
    assert sum(t.nbytes for t in stored.values()) == space.stored_bytes(space.smallest)
