"""A GGUF export, read by transformers alone in a fresh process, is the candidate."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from byte_level import ROWS, TEMPLATE, TEXTS, byte_level_model
from conftest import tiny_family
from gguf import GGUFReader
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

import mpsearch as mps
from mpsearch.assignment import Assignment
from mpsearch.bank import Bank
from mpsearch.errors import ResourceError, UsageError
from mpsearch.evaluate import Bench
from mpsearch.formats import FORMATS
from mpsearch.models import Model, load_whole
from mpsearch.quantizers import get_quantizer
from mpsearch.space import ResolvedSpace, SearchSpace

# For each folder: logits and weights as it is read, and the ids of the texts. The library's tables
# are kept between calls, which transformers makes for every module: seconds instead of a minute.
RELOAD = """
import functools, json, sys
import gguf, torch
gguf.GGUFReader = functools.cache(gguf.GGUFReader)
gguf.get_tensor_name_map = functools.cache(gguf.get_tensor_name_map)
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder, (tokens, dtype, texts) in json.loads(sys.argv[1]).items():
    read = {"gguf_file": "model.gguf"}
    model, found = AutoModelForCausalLM.from_pretrained(
        folder, **read, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(found.values()), found
    state = {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():  # to the arithmetic of the candidate
            parameter.data = parameter.data.to(getattr(torch, dtype))
        state["logits"] = model.eval()(torch.tensor([tokens])).logits
    save_file(state, folder + "/read.safetensors")
    ways = ({}, read) if len(state) < 100 else ({},)  # of a large vocabulary it takes long
    ids = [AutoTokenizer.from_pretrained(folder, **way)(texts)["input_ids"] for way in ways]
    with open(folder + "/ids.json", "w") as stream:
        json.dump(ids, stream)
assert "mpsearch" not in sys.modules
"""
TOKENS = list(range(40, 60))
TYPES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "bf16")
CASES: Mapping[str, tuple[str, str, dict[str, Any]]] = {
    "tied": ("llama", "embedding: [q5_1]\n", {"tie_word_embeddings": True}),
    "untied": ("llama", "embedding: [q4_0]\nhead: [q8_0]\n", {"tie_word_embeddings": False}),
    "kept": ("llama", "", {"tie_word_embeddings": False, "head_dim": 32}),
    "kept tied": ("mistral", "", {"tie_word_embeddings": True}),
    "mistral": ("mistral", "head: [q4_1]\n", {"tie_word_embeddings": False}),
    "qwen2": ("qwen2", "embedding: [q8_0]\n", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", "", {"tie_word_embeddings": False, "head_dim": 128}),
}


def pre_of(family: str) -> str:
    """transformers (5.23) cuts text for any Qwen as Qwens do, whatever its tokenizer.json says."""
    return "qwen2" if family.startswith("qwen") else "gpt-2"


def space_of(model: Model, more: str = "") -> ResolvedSpace:
    text = f"version: 1\ntarget: gguf\nformats: [{', '.join(TYPES)}]\n{more}"
    return SearchSpace.parse(text, "test").resolve(model)


def mixed(space: ResolvedSpace) -> Assignment:
    """Every type in turn, so that all meet queries, keys and others."""
    options = {name: [fmt.name for fmt in formats] for name, formats in space.options.items()}
    return Assignment.of(
        {name: formats[i % len(formats)] for i, (name, formats) in enumerate(options.items())}
    )


def read_back(asked: Mapping[str, tuple[list[int], str, tuple[str, ...]]]) -> None:
    subprocess.run(
        [sys.executable, "-c", RELOAD, json.dumps(asked)],
        check=True,
        capture_output=True,
        timeout=300,
    )


def check_read(
    model: Model, space: ResolvedSpace, assignment: Assignment, folder: Path, tokens: list[int]
) -> None:
    """What a fresh process left beside the export is what the candidate has in memory."""
    read = load_file(folder / "read.safetensors")
    bank = Bank(model, get_quantizer(None, "gguf"))
    with Bench(space, bank) as bench, torch.inference_mode():
        bench.put(assignment)
        assert torch.equal(read.pop("logits"), model.module(torch.tensor([tokens])).logits)
        state = model.module.state_dict()
        assert set(read) == set(state)
        for name, tensor in state.items():
            assert torch.equal(read[name], tensor.to(torch.bfloat16)), name


@pytest.fixture(scope="module")
def exports(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[Model, ResolvedSpace, Assignment, Path]]:
    """All cases, exported, and read back by one process."""
    root = tmp_path_factory.mktemp("gguf")
    found = {}
    for name, (family, more, changes) in CASES.items():
        model = byte_level_model(family, pre_of(family), **changes)
        space = space_of(model, more)
        assignment = mixed(space)
        folder = mps.export(model, assignment, to="gguf", out=root / name, space=space)
        found[name] = (model, space, assignment, folder)
    read_back(
        {
            str(folder): (TOKENS, str(model.dtype).removeprefix("torch."), TEXTS)
            for model, _, _, folder in found.values()
        }
    )
    return found


Exports = dict[str, tuple[Model, ResolvedSpace, Assignment, Path]]
each_case = pytest.mark.parametrize("case", CASES)


@each_case
def test_weights_and_logits_are_the_candidates_to_the_bit(exports: Exports, case: str) -> None:
    model, space, assignment, folder = exports[case]
    assert {fmt.name for fmt in space.layer_formats(assignment).values()} >= set(TYPES)
    check_read(model, space, assignment, folder, TOKENS)


@each_case
def test_the_tokenizer_gives_the_same_ids(exports: Exports, case: str) -> None:
    model = exports[case][0]
    ids = [model.tokenizer(text)["input_ids"] for text in TEXTS]
    assert json.loads((exports[case][3] / "ids.json").read_text()) == [ids, ids]


@each_case
def test_stored_bytes_are_those_that_the_space_predicts(exports: Exports, case: str) -> None:
    _, space, assignment, folder = exports[case]
    tensors = GGUFReader(folder / "model.gguf").tensors
    assert sum(int(tensor.n_bytes) for tensor in tensors) == space.stored_bytes(assignment)
    about = json.loads((folder / "mpsearch.json").read_text())
    assert about["stored_bytes"] == space.stored_bytes(assignment)


@each_case
def test_names_are_those_of_the_architecture(exports: Exports, case: str) -> None:
    folder = exports[case][3]
    reader = GGUFReader(folder / "model.gguf")
    name = reader.fields["general.architecture"].contents()
    (architecture,) = [key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name]
    templates = [gguf.TENSOR_NAMES[kind] for kind in gguf.MODEL_TENSORS[architecture]]
    known = {template.format(bid=block) for template in templates for block in (0, 1)}
    found = [tensor.name for tensor in reader.tensors]
    assert {part.rpartition(".")[0] for part in found} <= known
    assert len(set(found)) == len(found)
    tied = exports[case][0].module.config.tie_word_embeddings
    assert ("output.weight" in found) is not tied


def in_their_order(codes: Tensor, heads: int) -> Tensor:
    """Row by row: llama.cpp's channels 2i and 2i + 1 of a head are Llama's i and i + half."""
    size = len(codes) // heads
    order = [
        head * size + channel + half * (size // 2)
        for head in range(heads)
        for channel in range(size // 2)
        for half in (0, 1)
    ]
    return codes[order]


@pytest.mark.parametrize("case", ["tied", "untied", "kept", "qwen2", "qwen3"])
def test_codes_are_the_banks_own(exports: Exports, case: str) -> None:
    model, space, assignment, folder = exports[case]
    bank = Bank(model, get_quantizer(None, "gguf"))
    family, config = model.module.config.model_type, model.module.config
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    names = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH[family.upper()], model.module.config.num_hidden_layers
    )
    stored = {tensor.name: tensor for tensor in GGUFReader(folder / "model.gguf").tensors}
    for layer, fmt in space.layer_formats(assignment).items():
        found = stored[f"{names.get_name(layer)}.weight"]
        wanted = bank.stored(layer, fmt)["weight"].view(torch.uint8)
        kind = found.name.split(".")[-2]
        if family == "llama" and kind in heads:
            wanted = in_their_order(wanted, heads[kind])
        assert found.tensor_type.name == fmt.name.upper()
        assert torch.equal(torch.from_numpy(found.data.copy()), wanted), layer
    assert {t.tensor_type.name for t in stored.values() if t.data.ndim == 1} == {"F32"}


def test_the_file_says_what_llama_cpp_asks_for(exports: Exports) -> None:
    folder = exports["kept"][3]
    said = {
        name: field.contents() for name, field in GGUFReader(folder / "model.gguf").fields.items()
    }
    assert {name.removeprefix("llama."): value for name, value in said.items()
            if name.startswith("llama.")} == {
        "context_length": 512, "embedding_length": 64, "block_count": 2,
        "feed_forward_length": 128, "attention.head_count": 4, "attention.head_count_kv": 2,
        "attention.key_length": 32, "attention.value_length": 32, "rope.dimension_count": 32,
        "rope.freq_base": 10000.0, "attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "vocab_size": ROWS,
    }  # fmt: skip
    assert said["general.architecture"] == "llama"
    assert said["tokenizer.ggml.model"] == "gpt2"
    assert said["tokenizer.ggml.pre"] == "gpt-2"
    assert len(said["tokenizer.ggml.tokens"]) == ROWS
    assert said["tokenizer.chat_template"] == TEMPLATE


def test_the_folder_holds_config_and_tokenizer_and_nothing_that_claims_another_container(
    exports: Exports,
) -> None:
    model, _, _, folder = exports["tied"]
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    assert AutoTokenizer.from_pretrained(folder).chat_template == TEMPLATE
    assert {"model.gguf", "llama.cpp.txt", "generation_config.json", "README.md"} <= {
        path.name for path in folder.iterdir()
    }
    assert model.module.config.to_dict().get("quantization_config") is None


@each_case
def test_the_recipe_names_the_type_of_every_matrix(exports: Exports, case: str) -> None:
    folder = exports[case][3]
    text = (folder / "llama.cpp.txt").read_text()
    (command,) = [line for line in text.replace("\\\n", " ").splitlines()
                  if line.startswith("llama-quantize")]  # fmt: skip
    words = shlex.split(command)
    asked = [words[i + 1] for i, word in enumerate(words) if word == "--tensor-type"]
    options = [word for pattern in asked for word in ("--tensor-type", pattern)]
    assert words == ["llama-quantize", *options, "bf16.gguf", "mixed.gguf", "q8_0"]
    assert all(pattern == pattern.lower() for pattern in asked)  # as llama-quantize makes it
    types = [pattern.split("=") for pattern in asked]
    for tensor in GGUFReader(folder / "model.gguf").tensors:
        made = [kind for pattern, kind in types if re.search(pattern, tensor.name)]
        assert made == ([] if tensor.data.ndim == 1 else [tensor.tensor_type.name.lower()])


def test_a_point_of_its_space_is_dequantized_with_norms_in_bf16(
    exports: Exports, tmp_path: Path
) -> None:
    model, space, assignment, _ = exports["tied"]
    folder = mps.export(model, assignment, to="dequantized", out=tmp_path / "plain", space=space)
    stored = load_file(folder / "model.safetensors")
    assert {str(tensor.dtype) for tensor in stored.values()} == {"torch.bfloat16"}
    bank = Bank(model, get_quantizer(None, "gguf"))
    for layer, fmt in space.layer_formats(assignment).items():
        assert torch.equal(stored[f"{layer}.weight"].to(model.dtype), bank.weight(layer, fmt))


# ------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("llama", {"hidden_act": "gelu"}, "has hidden_act 'gelu'"),
        ("llama", {"attention_bias": True}, r"the bias \['model.layers.0.self_attn.q_proj.bias'\]"),
        ("llama", {"mlp_bias": True}, r"has the bias \['model.layers.0.mlp"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "has rope_type 'linear'",
        ),
        ("mistral", {"sliding_window": 256}, "has a sliding_window of 256 in a context of 512"),
        ("qwen2", {"head_dim": 32}, r"has head_dim 32 \(16 is\)"),
        ("qwen3", {"head_dim": 16}, r"has head_dim 16 \(128 is\)"),
        ("phi3", {}, "family 'phi3', .*; written are llama, mistral, qwen2, qwen3"),
        ("gemma", {"head_dim": 16}, "is of the family 'gemma'"),
    ],
)
def test_a_model_that_would_be_read_as_another_is_refused(
    family: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    model = byte_level_model(family, **changes)
    space = space_of(model)
    with pytest.raises(UsageError, match=words) as caught:
        mps.export(model, space.smallest, to="gguf", out=tmp_path / "export", space=space)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_that_llama_cpp_has_not_is_refused(tmp_path: Path) -> None:
    model = tiny_family("llama")
    space = space_of(model)
    with pytest.raises(UsageError, match="is no byte-level BPE"):
        mps.export(model, space.smallest, to="gguf", out=tmp_path / "export", space=space)
    assert list(tmp_path.iterdir()) == []


def test_columns_that_fill_no_block_are_refused(tmp_path: Path) -> None:
    model = byte_level_model(hidden_size=72, head_dim=16)
    with pytest.raises(UsageError) as caught:
        Bank(model, get_quantizer(None, "gguf"), root=tmp_path).missing(
            [(model.layers[0], FORMATS["q4_0"])]
        )
    assert str(caught.value) == (
        "format 'q4_0' cannot hold layer 'model.layers.0.self_attn.q_proj': groups of 32 do not "
        "divide its 72 columns; give the layer bf16 by a rule of the space"
    )


def test_a_full_disk_leaves_nothing_that_looks_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    model = byte_level_model()
    space = space_of(model)
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises((OSError, ResourceError)):
        mps.export(model, space.smallest, to="gguf", out=tmp_path / "export", space=space)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------ the real model


def test_the_built_in_model_reloads_bit_equal_in_a_fresh_process(tmp_path: Path) -> None:
    model = load_whole("builtin:smollm2-135m")
    space = space_of(model, "embedding: [q4_0, q8_0]\n")
    assignment = mixed(space)
    folder = mps.export(model, assignment, to="gguf", out=tmp_path / "export", space=space)
    texts = (*TEXTS, "The capital of France is Paris. The capital of Italy is")
    ids = [model.tokenizer(text)["input_ids"] for text in texts]
    read_back({str(folder): (ids[-1], str(model.dtype).removeprefix("torch."), texts)})
    check_read(model, space, assignment, folder, ids[-1])
    assert json.loads((folder / "ids.json").read_text()) == [ids]
