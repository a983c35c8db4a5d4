"""A bitsandbytes export, reloaded by transformers in a fresh process, is the candidate."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tokenizer, tiny_config
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import mpsearch as mps
from mpsearch.assignment import Assignment
from mpsearch.bank import Bank
from mpsearch.device import compute_dtype
from mpsearch.errors import UsageError
from mpsearch.evaluate import Bench
from mpsearch.export.bitsandbytes import (
    caveats,
    kept_linears,
    quantization_config,
    write_bitsandbytes,
)
from mpsearch.formats import BF16, FORMATS, Format
from mpsearch.models import Model, from_module, load_whole
from mpsearch.quantizers import get_quantizer
from mpsearch.space import ResolvedSpace, SearchSpace

bitsandbytes = pytest.importorskip("bitsandbytes")

EVERY = ["nf4", "nf4-dq", "fp4", "fp4-dq", "int8"]
TOKENS = [2, 5, 3, 23, 4]
RELOAD = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
tokens, dtype = torch.tensor([eval(sys.argv[1])]), getattr(torch, sys.argv[2])
for folder in sys.argv[3:]:
    with torch.no_grad():
        served = AutoModelForCausalLM.from_pretrained(folder).eval()(tokens).logits
        plain = AutoModelForCausalLM.from_pretrained(folder).dequantize(torch.bfloat16).eval()
        weights = {name: p.detach().clone() for name, p in plain.named_parameters()}
        for parameter in plain.parameters():  # to the candidate's arithmetic, on the same values
            parameter.data = parameter.data.to(dtype)
        decoded = plain(tokens).logits
    save_file({"served": served, "decoded": decoded, **weights}, f"{folder}.reloaded")
assert "mpsearch" not in sys.modules
"""


def family(**changes: Any) -> Model:
    """A Llama of random weights, computing as loaded ones do here."""
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(tiny_config("llama", **changes))
    cpu = torch.device("cpu")
    return from_module("llama", Path(), module, build_tokenizer(), cpu, compute_dtype(cpu))


def resolve(model: Model, formats: str, more: str = "") -> ResolvedSpace:
    text = f"version: 1\ntarget: bitsandbytes\nformats: [{formats}]\n{more}"
    return SearchSpace.parse(text, "test").resolve(model)


def alternating(space: ResolvedSpace) -> Assignment:
    """The space's formats in turn."""
    options = list(space.options.items())
    return Assignment.of({name: of[i % len(of)].name for i, (name, of) in enumerate(options)})


def bank_of(model: Model) -> Bank:
    return Bank(model, get_quantizer(None, "bitsandbytes"))


def reload(tokens: list[int], dtype: torch.dtype, *folders: Path) -> list[dict[str, Tensor]]:
    """Of each folder, from one fresh process.

    `served` are the logits of the library's modules, `decoded` those of its weights in plain ones,
    which are there by their names, too.
    """
    arguments = [repr(tokens), str(dtype).removeprefix("torch."), *map(str, folders)]
    done = subprocess.run(
        [sys.executable, "-c", RELOAD, *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return [load_file(f"{folder}.reloaded") for folder in folders]


def in_memory(model: Model, bank: Bank, formats: Mapping[str, Format]) -> Any:
    """The model in bf16 with the library's modules, made of the bank's tensors by hand."""
    module = copy.deepcopy(model.module)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    for layer, fmt in formats.items():
        if fmt.quantized:
            stored = bank.stored(layer, fmt)
            module.set_submodule(layer, library_module(stored, fmt, module.get_submodule(layer)))
    return module.eval()


def library_module(stored: dict[str, Tensor], fmt: Format, plain: Any) -> nn.Module:
    rows, columns = plain.weight.shape
    module: Any
    if fmt.name == "int8":
        module = bitsandbytes.nn.Linear8bitLt(
            columns, rows, bias=False, has_fp16_weights=False, threshold=6.0
        )
        parameter = bitsandbytes.nn.Int8Params(stored["weight"], requires_grad=False)
        parameter.CB, parameter.SCB = stored["weight"], stored["SCB"]
        module.weight = parameter
        return module  # type: ignore[no-any-return]
    module = bitsandbytes.nn.Linear4bit(columns, rows, bias=False, compute_dtype=torch.bfloat16)
    weight = stored.pop("weight")
    state = {name.removeprefix("weight."): tensor for name, tensor in stored.items()}
    module.weight = bitsandbytes.nn.Params4bit.from_prequantized(weight, state, device="cpu")
    return module  # type: ignore[no-any-return]


def check_export(
    space: ResolvedSpace,
    assignment: Assignment,
    model: Model,
    tokens: list[int],
    folder: Path,
    loaded: Mapping[str, Tensor],
) -> None:
    bank, formats = bank_of(model), space.layer_formats(assignment)
    with Bench(space, bank) as bench, torch.no_grad():
        bench.put(assignment)
        for layer in model.every_layer:
            weight = model.places[layer.name].weight.to(torch.bfloat16)
            assert torch.equal(loaded[f"{layer.name}.weight"], weight), layer.name
        assert torch.equal(loaded["decoded"], model.module(torch.tensor([tokens])).logits)
    with torch.no_grad():
        served = in_memory(model, bank, formats)(torch.tensor([tokens])).logits
    assert torch.equal(loaded["served"], served)

    stored = load_file(folder / "model.safetensors")
    assert sum(tensor.nbytes for tensor in stored.values()) == space.stored_bytes(assignment)
    for name, fmt in formats.items():
        for suffix, tensor in bank.stored(name, fmt).items():
            assert torch.equal(stored[f"{name}.{suffix}"], tensor)


def exported(space: ResolvedSpace, assignment: Assignment, model: Model, out: Path) -> Path:
    return mps.export(model, assignment, to="bitsandbytes", out=out, space=space)


# A format, and that of an output head with a weight of its own if there is one.
CASES = [(name, "") for name in EVERY] + [("nf4", "nf4"), ("nf4-dq", "bf16"), ("int8", "int8")]
Case = tuple[ResolvedSpace, Assignment, Model]


@pytest.fixture(scope="module")
def cases(tiny: Model) -> dict[tuple[str, str], Case]:
    untied = family(vocab_size=96, tie_word_embeddings=False)  # the packed kernel takes 32 rows
    found = {}
    for name, head in CASES:
        model = untied if head else tiny
        space = resolve(model, f"{name}, bf16", f"head: [{head}]\n" if head else "")
        found[name, head] = space, alternating(space), model
    return found


@pytest.fixture(scope="module")
def reloaded(
    cases: Mapping[tuple[str, str], Case], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], tuple[Path, dict[str, Tensor]]]:
    """The folder of each case and what a fresh process found in it."""
    root = tmp_path_factory.mktemp("exports")
    folders = [exported(*case, root / "-".join(names)) for names, case in cases.items()]
    tiny = cases[CASES[0]][2]
    found = reload(TOKENS, tiny.dtype, *folders)
    return dict(zip(cases, zip(folders, found, strict=True), strict=True))


@pytest.mark.parametrize("names", CASES, ids="-".join)
def test_a_format_beside_bf16_reloads_bit_equal_in_a_fresh_process(
    names: tuple[str, str],
    cases: Mapping[tuple[str, str], Case],
    reloaded: Mapping[tuple[str, str], tuple[Path, dict[str, Tensor]]],
) -> None:
    space, assignment, model = cases[names]
    assert {names[0], "bf16"} == set(assignment.values())
    check_export(space, assignment, model, TOKENS, *reloaded[names])


def test_the_built_in_model_reloads_bit_equal_in_a_fresh_process(tmp_path: Path) -> None:
    model = load_whole("builtin:smollm2-135m")
    tokens = model.tokenizer("The capital of France is Paris. The capital of Italy is")["input_ids"]
    space = resolve(model, "nf4, bf16")
    assignment = alternating(space)
    folder = exported(space, assignment, model, tmp_path / "export")
    (loaded,) = reload(tokens, model.dtype, folder)
    check_export(space, assignment, model, tokens, folder, loaded)


def test_a_kept_layer_1_keeps_no_layer_11(tmp_path: Path) -> None:
    """Layer 0 and one v_proj kept by name, as in a reload that once could not be explained."""
    model = family(num_hidden_layers=12, hidden_size=64)
    bank = bank_of(model)
    kept = {"model.layers.1.self_attn.v_proj"}
    kept |= {layer.name for layer in model.layers if layer.name.startswith("model.layers.0.")}
    formats = {layer.name: BF16 if layer.name in kept else FORMATS["nf4"] for layer in model.layers}
    folder = tmp_path / "export"
    folder.mkdir()
    write_bitsandbytes(model, bank, formats, folder)
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder)
    found = {
        name
        for name, module in loaded.named_modules()
        if isinstance(module, bitsandbytes.nn.Linear4bit)
    }
    assert found == set(formats) - kept
    assert "model.layers.11.self_attn.v_proj" in found
    with torch.no_grad():
        tokens = torch.tensor([TOKENS])
        logits = loaded(tokens).logits
        assert torch.equal(logits, in_memory(model, bank, formats)(tokens).logits)


@pytest.mark.parametrize("name", ["nf4", "nf4-dq", "fp4", "fp4-dq"])
def test_what_the_library_computes_with_is_what_is_decoded_but_for_scales_that_a_cpu_rounds(
    name: str,
) -> None:
    """The difference of 0.5 in logits: a kernel for AVX512-BF16 with levels and absmax in bf16."""
    torch.manual_seed(0)
    fmt, weight = FORMATS[name], torch.randn(96, 128)
    stored = get_quantizer(None, "bitsandbytes").quantize(weight, [fmt], None)[name]
    module = library_module(dict(stored), fmt, nn.Linear(128, 96)).eval()
    state, codes = module.weight.quant_state, stored["weight"].view(-1)
    scale = state.absmax
    if state.nested:
        scale = bitsandbytes.functional.dequantize_blockwise(scale, state.state2) + state.offset
    level = state.code[torch.stack([codes >> 4, codes & 15], 1).view(-1, 64).long()]
    decoded = (level * scale[:, None]).view(weight.shape).bfloat16()
    level, scale = level.bfloat16().float(), scale.bfloat16().float()
    rounded = (level * scale[:, None]).view(weight.shape).bfloat16()
    with torch.no_grad():
        used = module(torch.eye(128, dtype=torch.bfloat16)).T
    packs = bool(bitsandbytes.functional.has_avx512bf16())
    assert torch.equal(used, rounded if packs else decoded)
    off = (rounded.float() - decoded.float()).norm() / decoded.float().norm()
    assert 0.001 < off < 0.004  # where the format itself is off by 0.09 to 0.12


def test_what_was_scored_and_what_runs_is_told_apart(
    tiny: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    space = resolve(tiny, "nf4, bf16")
    exported(space, alternating(space), tiny, tmp_path / "out")
    (line,) = caplog.messages
    assert "AVX512-BF16" in line
    (line,) = caveats(tiny, {tiny.layers[0].name: FORMATS["int8"]})
    assert "inputs of layers" in line
    odd = family(head_dim=12)  # queries of 48 rows, outputs from 48 columns
    _, line = caveats(odd, {layer.name: FORMATS["nf4"] for layer in odd.layers})
    assert "cannot run 8 of 14" in line
    assert "'model.layers.0.self_attn.q_proj' is 48 x 64, no multiple of 32 x 64" in line
    if bitsandbytes.functional.has_avx512bf16():
        q = library_module(
            bank_of(odd).stored("model.layers.0.self_attn.q_proj", FORMATS["nf4"]),
            FORMATS["nf4"], nn.Linear(64, 48),
        )  # fmt: skip
        with pytest.raises(AssertionError, match="divisible"), torch.no_grad():
            q.eval()(torch.ones(1, 64, dtype=torch.bfloat16))


@pytest.mark.parametrize("name", EVERY)
def test_the_config_is_one_that_transformers_reads_as_meant(name: str) -> None:
    config = quantization_config(FORMATS[name], ["lm_head"])
    read = BitsAndBytesConfig.from_dict(json.loads(json.dumps(config)))
    assert read.quantization_method() == ("llm_int8" if name == "int8" else name[:3])
    assert read.llm_int8_skip_modules == ["lm_head"]
    assert config["quant_method"] == read.quant_method
    if name != "int8":
        assert read.bnb_4bit_use_double_quant == name.endswith("-dq")
        assert read.bnb_4bit_compute_dtype == torch.bfloat16
        assert read.bnb_4bit_quant_storage == torch.uint8


class Ends(nn.Module):
    """A linear whose name another's ends in."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.q_proj = nn.Linear(4, 4), nn.Linear(4, 4)
        self.table = nn.Embedding(4, 4)


def test_a_layer_that_transformers_would_not_load_so_is_refused() -> None:
    assert kept_linears(Ends(), ["proj"]) == ["q_proj"]
    with pytest.raises(UsageError, match=r"take 'q_proj' for unquantized, as 'proj' is"):
        kept_linears(Ends(), ["q_proj"])
    with pytest.raises(UsageError, match="'table' is no plain linear"):
        kept_linears(Ends(), ["proj", "table"])
    always = Ends()
    always._keep_in_fp32_modules = ["q_proj"]  # type: ignore[assignment]
    with pytest.raises(UsageError, match=r"take 'q_proj' for unquantized, as 'q_proj' is"):
        kept_linears(always, ["proj", "q_proj"])


def test_a_tied_head_is_named_among_the_kept_and_an_embedding_is_refused(
    tiny: Model, tmp_path: Path
) -> None:
    """An unnamed one loads as a 4-bit module that holds no 4-bit weight, and fails as it runs."""
    assert kept_linears(tiny.module, [layer.name for layer in tiny.layers]) == ["lm_head"]
    with pytest.raises(UsageError, match="keeps the embedding in bf16"):
        resolve(tiny, "nf4", "embedding: [nf4]\n")
    assert tiny.embedding
    formats = {tiny.embedding.name: FORMATS["nf4"]}
    with pytest.raises(UsageError, match=r"'model\.embed_tokens' is no plain linear"):
        write_bitsandbytes(tiny, bank_of(tiny), formats, tmp_path)


def test_two_formats_in_one_checkpoint_are_refused(tiny: Model, tmp_path: Path) -> None:
    formats = dict(
        zip([layer.name for layer in tiny.layers], [FORMATS["nf4"], FORMATS["int8"]], strict=False)
    )
    with pytest.raises(UsageError, match="this point has nf4 and int8; search a space of one"):
        write_bitsandbytes(tiny, bank_of(tiny), formats, tmp_path)
    with pytest.raises(UsageError, match="this point has none"):
        write_bitsandbytes(tiny, bank_of(tiny), {tiny.layers[0].name: BF16}, tmp_path)
