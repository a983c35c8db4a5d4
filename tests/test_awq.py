"""AWQ: the prepared model is the same function to the bit, and its linears err less."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tokenizer, tiny_family, tiny_llama
from safetensors.torch import load_file

from mpsearch import awq, cli
from mpsearch.calibration import Calibration, calibration_tokens, input_statistics
from mpsearch.codecs import decode
from mpsearch.errors import ModelError, ResourceError, RunError
from mpsearch.formats import FORMATS
from mpsearch.models import Model, from_module
from mpsearch.quantizers.rounding import Rounding
from mpsearch.run import Run
from mpsearch.skeleton import load_skeleton

TEXT = Calibration(8, 24)
NORMS = 4  # of the tiny Llama that linears read
TOKENS = torch.tensor([[2, 5, 3, 23, 4, 9, 30]])


def uneven(dtype: torch.dtype = torch.float32) -> Model:
    """A tiny Llama, a few of whose channels carry activations thirty times as large."""
    tokenizer = build_tokenizer()
    module = tiny_llama(len(tokenizer), seed=4)
    generator = torch.Generator().manual_seed(0)
    for block in module.model.layers:
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            loud = torch.rand(64, generator=generator) < 0.1
            norm.weight.data = torch.where(loud, 30.0, 1.0) * (
                1 + torch.rand(64, generator=generator) / 3
            )
    return from_module("uneven", Path(), module, tokenizer, torch.device("cpu"), dtype)


def logits(model: Model) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model.module(TOKENS, use_cache=False).logits
    return found


def output_error(model: Model, layer: str) -> float:
    """Relative error of a layer's outputs on the calibration text, rounded to 3 bits."""
    tokens = calibration_tokens(model, TEXT)
    gram = input_statistics(model, tokens, lambda done, total: None)[layer].gram
    weight, fmt = model.originals[layer].float(), FORMATS["int3-g64"]
    stored = Rounding().quantize(weight, [fmt], None)[fmt.name]
    wrong = decode(stored, fmt).float() - weight
    return float((((wrong @ gram) * wrong).sum() / ((weight @ gram) * weight).sum()).sqrt())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_prepared_model_computes_the_very_same(dtype: torch.dtype) -> None:
    model = uneven(dtype)
    before, fingerprint = logits(model), model.fingerprint
    prepared = awq.prepare(model, TEXT)
    assert torch.equal(logits(prepared), before)
    assert prepared.fingerprint != fingerprint
    assert len(prepared.preparation) == NORMS


def test_linears_behind_loud_channels_err_less_and_others_are_untouched() -> None:
    plain = uneven()
    layers = [layer.name for layer in plain.layers]
    before = {layer: output_error(plain, layer) for layer in layers}
    weights = {layer: plain.originals[layer].clone() for layer in layers}
    prepared = awq.prepare(plain, TEXT)
    readers = {layer for folded in prepared.preparation.values() for layer in folded["readers"]}
    after = {layer: output_error(prepared, layer) for layer in layers}
    for layer in layers:
        reads_norm = layer.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"))
        assert (layer in readers) is reads_norm
        if not reads_norm:
            assert torch.equal(prepared.originals[layer], weights[layer])
    for folding in prepared.preparation.values():
        if any(folding["exponents"]):
            mine = folding["readers"]
            assert sum(after[x] ** 2 for x in mine) < sum(before[x] ** 2 for x in mine)
    assert sum(after[x] for x in readers) < 0.97 * sum(before[x] for x in readers)


def test_of_a_large_layer_some_rows_are_tried_and_tell_nearly_as_much(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    by_all = awq.prepare(uneven(), TEXT).preparation
    tried: list[int] = []

    class Noted(Rounding):
        def quantize(self, weight: torch.Tensor, *rest: Any) -> dict[str, dict[str, torch.Tensor]]:
            tried.append(len(weight))
            return super().quantize(weight, *rest)

    monkeypatch.setattr(awq, "Rounding", Noted)
    monkeypatch.setattr(awq, "_MOST_ROWS", 64)
    by_some = awq.prepare(uneven(), TEXT).preparation
    # Every second of 64 rows of q, 32 of k and of v; every fourth of 128 of gate and of up.
    assert set(tried) == {32 + 16 + 16, 32 + 32}
    same = sum(by_some[norm]["exponents"] == by_all[norm]["exponents"] for norm in by_all)
    assert same >= NORMS - 1


def test_scales_are_powers_of_two_shared_by_all_readers_of_a_norm() -> None:
    before = {name: weight.clone() for name, weight in uneven().originals.items()}
    prepared = awq.prepare(uneven(), TEXT)
    for folding in prepared.preparation.values():
        scale = 2.0 ** torch.tensor(folding["exponents"])
        for layer in folding["readers"]:
            assert torch.equal(prepared.originals[layer], before[layer] * scale)
    assert any(len(set(folded["exponents"])) > 1 for folded in prepared.preparation.values())


def test_folding_again_what_was_found_gives_the_same_model() -> None:
    prepared = awq.prepare(uneven(), TEXT)
    again = awq.fold(uneven(), prepared.preparation)
    assert again.fingerprint == prepared.fingerprint
    assert again.preparation == prepared.preparation


def test_stored_in_bf16_it_is_still_the_same_function() -> None:
    """The checkpoint holds bf16; a power of two changes no digit of it."""
    prepared = awq.prepare(uneven(), TEXT)
    for layer in prepared.layers:
        weight = prepared.originals[layer.name]
        assert torch.equal(weight.bfloat16().float(), weight)
    norms = [name for name in prepared.kept if "layernorm" in name]
    assert all(prepared.kept[name].dtype == torch.bfloat16 for name in norms)


def test_layer_norms_with_a_bias_are_folded_too() -> None:
    model = tiny_family("gpt_neox")
    before = logits(model)
    assert torch.equal(logits(awq.prepare(model, TEXT)), before)


def test_a_norm_that_does_not_multiply_by_its_weight_is_refused() -> None:
    norm, attention = "model.layers.0.input_layernorm", "model.layers.0.self_attn"
    readers = [f"{attention}.{name}_proj" for name in "qkv"]
    folding: dict[str, Any] = {norm: {"readers": readers, "exponents": [1] * 64}}
    with pytest.raises(ModelError, match=r"changes what it computes; leave --awq away"):
        awq.fold(tiny_family("gemma"), folding)
    awq.fold(tiny_family("llama"), folding)


def test_a_norm_that_something_else_reads_is_refused() -> None:
    model = uneven()
    norm = "model.layers.0.input_layernorm"
    half: dict[str, Any] = {
        norm: {"readers": ["model.layers.0.self_attn.q_proj"], "exponents": [1] * 64}
    }
    with pytest.raises(ModelError, match="changes what it computes"):
        awq.fold(model, half)


def test_a_streamed_model_is_refused_at_once(tiny_folder: Path) -> None:
    model = load_skeleton(str(tiny_folder))
    for refused in (lambda: awq.prepare(model, TEXT), lambda: awq.fold(model, {})):
        with pytest.raises(ResourceError, match=r"give it more memory, or leave --awq away$") as it:
            refused()
        assert it.value.exit_code == 5


def test_progress_speaks_of_every_norm() -> None:
    steps: list[tuple[str, int, int]] = []
    awq.prepare(uneven(), TEXT, lambda *step: steps.append(step))
    assert [step for step in steps if step[0] == "awq"] == [
        ("awq", done, NORMS) for done in range(NORMS + 1)
    ]


def test_a_search_ships_the_scales_it_was_scored_with(
    tiny_folder: Path, facts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "export"
    ask = ["search", str(tiny_folder), "--facts", str(facts_file), "--budget", "57KiB"]
    ask += ["--trials", "2", "-o", str(run)]
    assert cli.main([*ask, "--awq"]) == 0
    preparation = Run.open(run).preparation
    assert len(preparation) == NORMS
    assert cli.main([*ask, "--resume"]) == 2  # the question was about a prepared model
    assert "awq was true and is now false" in capsys.readouterr().err.lower()
    assert cli.main([*ask, "--awq", "--resume"]) == 0
    assert cli.main(["export", str(run), "best", "-o", str(out)]) == 0
    stored = load_file(out / "model.safetensors")
    original = load_file(tiny_folder / "model.safetensors")
    for norm, folding in preparation.items():
        scale = 2.0 ** torch.tensor(folding["exponents"])
        assert torch.equal(stored[f"{norm}.weight"] * scale, original[f"{norm}.weight"].float())


def test_a_damaged_preparation_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "preparation.json").write_text("[1, 2")
    with pytest.raises(RunError, match=r"preparation\.json' cannot be read"):
        _ = Run(tmp_path, {}).preparation
