"""A dequantized export is the candidate to whoever reads plain models."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_cases import Cli
from conftest import build_tokenizer, tiny_config, tiny_llama
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import mpsearch as mps
from mpsearch.assignment import Assignment
from mpsearch.bank import Bank
from mpsearch.codecs import decode
from mpsearch.errors import UsageError
from mpsearch.evaluate import Bench
from mpsearch.export.dequantized import as_stored
from mpsearch.export.reload import load_any
from mpsearch.facts import FactSet
from mpsearch.models import Model, from_module, load_whole
from mpsearch.quantizers import get_quantizer
from mpsearch.recall import RecallProxy
from mpsearch.served import ask
from mpsearch.space import ResolvedSpace, SearchSpace
from mpsearch.verify import verify

TOKENS = [2, 5, 3, 23, 4]
CPU = torch.device("cpu")
RELOAD = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, pipeline
tokens = torch.tensor([eval(sys.argv[1])])
for folder in sys.argv[2:]:
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        with torch.no_grad():
            found[f"{dtype} logits"] = model(tokens).logits
        found |= {f"{dtype} {name}": p.detach().clone() for name, p in model.named_parameters()}
        assert not hasattr(model.config, "quantization_config")
    save_file(found, f"{folder}.reloaded")
    ask = pipeline("text-generation", model=folder)
    assert ask.model.dtype == torch.bfloat16
    question = ask.tokenizer.decode(tokens[0])
    (answer,) = ask(question, max_new_tokens=1, do_sample=False, return_tensors=True)
    best = found["torch.bfloat16 logits"][0, -1].argmax()
    assert answer["generated_token_ids"] == [*tokens[0], best], (question, answer, best)
assert "mpsearch" not in sys.modules
"""


def wrapped(module: Any, dtype: torch.dtype) -> Model:
    return from_module("tiny", Path(), module, build_tokenizer(), CPU, dtype)


def family(name: str, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Model:
    torch.manual_seed(0)
    return wrapped(AutoModelForCausalLM.from_config(tiny_config(name, **changes)), dtype)


def resolve(model: Model, target: str, formats: str, more: str = "") -> ResolvedSpace:
    text = f"version: 1\ntarget: {target}\nformats: [{formats}]\n{more}"
    return SearchSpace.parse(text, "test").resolve(model)


def alternating(space: ResolvedSpace) -> Assignment:
    """The space's formats in turn."""
    options = list(space.options.items())
    return Assignment.of({name: of[i % len(of)].name for i, (name, of) in enumerate(options)})


def candidate(model: Model, space: ResolvedSpace, assignment: Assignment) -> dict[str, Tensor]:
    """Logits and parameters as the search scores them."""
    bank = Bank(model, get_quantizer(None, space.target.container))
    with Bench(space, bank) as bench, torch.no_grad():
        bench.put(assignment)
        found = {name: p.detach().clone() for name, p in model.module.named_parameters()}
        return {"logits": model.module(torch.tensor([TOKENS])).logits, **found}


def stored_bytes(folder: Path) -> int:
    return sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())


SPACES = {
    "integers": ("compressed-tensors", "int2-g64, int3-channel, int4-g64-asym, fp8, bf16", ""),
    "tied": ("compressed-tensors", "int4-g64", "embedding: [int8-g64-unpacked]\n"),
    "gptq": ("gptq", "gptq2-g32, gptq3-g64, gptq8-g128, bf16", ""),
    "nf4": ("bitsandbytes", "nf4, bf16", ""),
    "int8": ("bitsandbytes", "int8", ""),
}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of each space, reloaded in one fresh process by what knows plain models only."""
    root = tmp_path_factory.mktemp("exports")
    folders = {}
    for name, spec in SPACES.items():
        model = wrapped(tiny_llama(len(build_tokenizer())), torch.float32)
        space = resolve(model, *spec)
        folders[name] = mps.export(
            model, alternating(space), to="dequantized", out=root / name, space=space
        )
    done = subprocess.run(
        [sys.executable, "-c", RELOAD, repr(TOKENS), *map(str, folders.values())],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folders


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", SPACES)
def test_a_plain_loader_gets_the_candidate_to_the_bit_in_either_arithmetic(
    name: str, dtype: torch.dtype, exports: Mapping[str, Path]
) -> None:
    model = wrapped(tiny_llama(len(build_tokenizer())), dtype)
    space = resolve(model, *SPACES[name])
    found = load_file(f"{exports[name]}.reloaded")
    for part, tensor in candidate(model, space, alternating(space)).items():
        assert torch.equal(found[f"{dtype} {part}"], tensor), part


@pytest.mark.parametrize("name", SPACES)
def test_the_folder_is_as_large_as_it_says_and_names_no_quantization(
    name: str, exports: Mapping[str, Path]
) -> None:
    model = wrapped(tiny_llama(len(build_tokenizer())), torch.float32)
    space, folder = resolve(model, *SPACES[name]), exports[name]
    about = json.loads((folder / "mpsearch.json").read_text())
    weights = sum(layer.weights for layer in model.layers)
    kept = sum(tensor.numel() for tensor in model.kept.values())
    assert stored_bytes(folder) == about["stored_bytes"] == 2 * (weights + kept)
    assert about["stored_bytes"] > space.stored_bytes(alternating(space))
    assert about["bits_per_weight"] == 16
    assert about["target"] == "dequantized"
    assert about["assignment"] == dict(alternating(space))
    assert f"{about['stored_bytes']:,} bytes of tensors" in (folder / "README.md").read_text()
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert (folder / "tokenizer.json").exists()


def test_what_a_target_stores_is_its_own_but_for_dequantized_weights() -> None:
    assignment = Assignment.of({"a": "int4-g64", "b": "bf16"}, "{}")
    assert as_stored(assignment, "vllm") == assignment
    assert dict(as_stored(assignment, "dequantized")) == {"a": "bf16", "b": "bf16"}


def test_a_tied_embedding_is_stored_once_and_loads_in_both_its_places(
    exports: Mapping[str, Path],
) -> None:
    stored = load_file(exports["tied"] / "model.safetensors")
    assert {key for key in stored if "layers" not in key} == {
        *("model.embed_tokens.weight", "model.norm.weight")
    }
    loaded: Any = AutoModelForCausalLM.from_pretrained(exports["tied"])
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_gptq_keeps_the_fp16_that_bf16_would_round(exports: Mapping[str, Path]) -> None:
    model = wrapped(tiny_llama(len(build_tokenizer())), torch.float32)
    space = resolve(model, *SPACES["gptq"])
    bank = Bank(model, get_quantizer(None, "gptq"))
    stored = load_file(exports["gptq"] / "model.safetensors")
    rounded = []
    for name, fmt in space.layer_formats(alternating(space)).items():
        weight = decode(bank.stored(name, fmt), fmt)
        assert weight.dtype == (torch.float16 if fmt.quantized else torch.bfloat16)
        assert stored[f"{name}.weight"].dtype == weight.dtype
        assert torch.equal(stored[f"{name}.weight"], weight)
        if fmt.quantized:
            off = weight.float() - weight.bfloat16().float()
            rounded.append(float(off.norm() / weight.float().norm()))
    assert 0.0005 < min(rounded) < max(rounded) < 0.003


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["integers", "gptq"])
def test_scored_again_it_is_the_candidate_fact_by_fact(
    name: str,
    dtype: torch.dtype,
    tiny_folder: Path,
    tiny_facts: FactSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mpsearch.models.compute_dtype", lambda device: dtype)
    model = load_whole(str(tiny_folder))
    space = resolve(model, *SPACES[name])
    assignment = alternating(space)
    folder = mps.export(model, assignment, to="dequantized", out=tmp_path / "out", space=space)
    facts = tiny_facts.part("validation")
    proxy = RecallProxy(model, tiny_facts, facts, contrast=True)
    with Bench(space, Bank(model, get_quantizer(None, space.target.container))) as bench:
        scored = bench.evaluate(assignment, proxy).scores
    loaded = load_any(str(folder))
    assert loaded.dtype == dtype
    again = RecallProxy(loaded, tiny_facts, facts, contrast=True, against=proxy.first)
    assert scored.kl.max() > 0
    for score in ("log_prob", "kl", "top1", "margin"):
        assert (getattr(again.reference, score) == getattr(scored, score)).all(), score


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("name", "changes"), [("mixtral", {}), ("gpt2", {}), ("llama", {"tie_word_embeddings": False})]
)
@pytest.mark.parametrize("target", ["compressed-tensors", "gptq"])
def test_layers_that_no_quantized_checkpoint_holds_are_stored_too(
    name: str,
    changes: dict[str, Any],
    target: str,
    dtype: torch.dtype,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stacked experts, transposed linears, and a head with a weight of its own."""
    model = family(name, dtype, vocab_size=96, **changes)
    fmt = "int3-g64" if target == "compressed-tensors" else "gptq3-g64"
    space = resolve(model, target, fmt, "" if name == "gpt2" else f"head: [{fmt}]\n")
    folder = mps.export(model, space.smallest, to="dequantized", out=tmp_path / "out", space=space)
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        found = {"logits": loaded.eval()(torch.tensor([TOKENS])).logits}
    found |= dict(loaded.named_parameters())
    monkeypatch.setattr("mpsearch.models.compute_dtype", lambda device: dtype)
    again = dict(load_any(str(folder)).module.named_parameters())
    for part, tensor in candidate(model, space, space.smallest).items():
        assert torch.equal(found[part], tensor), part
        assert part == "logits" or torch.equal(again[part], tensor), part
    about = json.loads((folder / "mpsearch.json").read_text())
    assert stored_bytes(folder) == about["stored_bytes"]


def test_the_built_in_model_is_the_candidate_in_a_pipeline_of_a_fresh_process(
    tmp_path: Path,
) -> None:
    model = load_whole("builtin:smollm2-135m")
    space = resolve(model, "bitsandbytes", "nf4, bf16")
    assignment = alternating(space)
    folder = mps.export(model, assignment, to="dequantized", out=tmp_path / "out", space=space)
    question = "The capital of France is Paris. The capital of Italy is"
    script = (
        "import sys; from transformers import pipeline; "
        "ask = pipeline('text-generation', model=sys.argv[1]); "
        "print(ask(sys.argv[2], max_new_tokens=1, do_sample=False)[0]['generated_text'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder), question],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    tokens = model.tokenizer(question, return_tensors="pt")["input_ids"]
    bank = Bank(model, get_quantizer(None, "bitsandbytes"))
    with Bench(space, bank) as bench, torch.no_grad():
        bench.put(assignment)
        answer = model.module(tokens).logits[0, -1].argmax()
    assert done.stdout.strip() == question + model.tokenizer.decode(answer)
    assert stored_bytes(folder) == 2 * sum(p.numel() for p in model.module.parameters())


def test_the_command_says_its_own_size_and_verify_finds_the_runs_answers(
    whole: Path, facts_file: Path, mpsearch: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    done = mpsearch("export", whole, "best", "--to", "dequantized", "-o", folder)
    assert f"{stored_bytes(folder):,} bytes of tensors" in done.out
    card = (folder / "README.md").read_text()
    assert "All are stored dequantized, in 16 bits a weight." in card
    assert "- In memory:" not in card
    # In this process, which saves seconds.
    monkeypatch.setattr(sys.modules["mpsearch.verify"], "ask_fresh", ask)
    found = verify(folder, facts=str(facts_file))
    assert found.passed, found.reasons
    assert found.agreeing == found.facts > 0


def test_an_unknown_target_names_it_among_those_there_are(tiny: Model, tmp_path: Path) -> None:
    space = resolve(tiny, "gptq", "gptq4-g64")
    with pytest.raises(UsageError, match="did you mean 'dequantized'"):
        mps.export(tiny, space.smallest, to="dequantised", out=tmp_path / "out", space=space)
