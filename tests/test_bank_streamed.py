"""The bank of a streamed model: file for file that of the loaded one, with a block in memory."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from banks import INT2, INT4, Calibrated, Counting, Stored, files, unfinished_in, weights_in
from test_bank_processes import in_processes
from test_skeleton import CPU, loaded, saved
from torch import Tensor

from mpsearch import tensor_files
from mpsearch.bank import Bank
from mpsearch.blocks import find_blocks
from mpsearch.calibration import Calibration
from mpsearch.checkpoint import Checkpoint
from mpsearch.errors import ResourceError
from mpsearch.flow import is_placeholder
from mpsearch.formats import FORMATS, Format
from mpsearch.models import Model
from mpsearch.quantizers import InputStatistics, get_quantizer
from mpsearch.skeleton import load_skeleton
from mpsearch.wanted import Wanted, digest_of

RECIPE = Calibration(sequences=9, length=12, seed=1)
BF16, FLOAT = torch.bfloat16, torch.float32
FAMILIES = {
    "llama": ("llama", FLOAT, {}),
    "bf16": ("llama", BF16, {}),
    "tied": ("qwen2", FLOAT, {"tie_word_embeddings": True}),
    "stored transposed": ("gpt2", BF16, {}),
    "stacked experts": ("mixtral", FLOAT, {}),
    "states in a tuple": ("falcon", FLOAT, {
        "alibi": False, "ffn_hidden_size": 128, "new_decoder_architecture": True,
        "num_kv_heads": 2,
    }),
}  # fmt: skip


def streamed(folder: Path, dtype: torch.dtype = FLOAT) -> Model:
    return load_skeleton(str(folder), device=CPU, dtype=dtype)


def all_of(model: Model, *formats: Format) -> Wanted:
    """Every layer in two formats, or those given, and the embedding in one."""
    head = (model.head,) if model.head else ()
    layers = (*model.layers, *head)
    wanted = [(layer, fmt) for layer in layers for fmt in formats or (INT2, INT4)]
    return [*wanted, (model.embedding, FORMATS["fp8"])] if model.embedding else wanted


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*tensors")}


def empty(model: Model) -> bool:
    """Whether no block holds a weight."""
    blocks = find_blocks(model.module, model.places)
    return all(is_placeholder(part.data) for block in blocks for part in block.parameters())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("quantizer", ["rounding", "gptq"])
def test_its_files_are_those_of_the_loaded_model(tmp_path: Path, name: str, quantizer: str) -> None:
    family, dtype, changes = FAMILIES[name]
    folder = saved(tmp_path / "model", family, **changes)  # type: ignore[arg-type]
    for model in (loaded(folder, dtype), streamed(folder, dtype)):
        root = tmp_path / ("streamed" if model.streamed else "loaded")
        gptq_or_not = get_quantizer(quantizer, "compressed-tensors")
        Bank(model, gptq_or_not, RECIPE, root).build(all_of(model))
    assert empty(model)
    expected = contents(tmp_path / "loaded")
    assert len(expected) == len(all_of(model))
    assert contents(tmp_path / "streamed") == expected


@pytest.mark.parametrize("name", ["llama", "stored transposed", "stacked experts"])
def test_so_are_those_of_one_assignment_quantized_in_order(tmp_path: Path, name: str) -> None:
    family, dtype, changes = FAMILIES[name]
    folder = saved(tmp_path / "model", family, **changes)  # type: ignore[arg-type]
    for model in (loaded(folder, dtype), streamed(folder, dtype)):
        root = tmp_path / ("streamed" if model.streamed else "loaded")
        wanted = all_of(model, FORMATS["int3-g64"])
        gptq = get_quantizer("gptq", "compressed-tensors")
        Bank(model, gptq, RECIPE, root, in_order=digest_of(wanted)).build(wanted)
    assert empty(model)
    expected = contents(tmp_path / "loaded")
    assert len(expected) == len(wanted)
    assert contents(tmp_path / "streamed") == expected


# ------------------------------------------------------------------------------ in memory, read


class Watching(Calibrated):
    """Notes which blocks hold weights, and how many Gram matrices there are, at each call."""

    def __init__(self, calibrated: bool) -> None:
        super().__init__()
        self.calibrated = calibrated
        self.model: Model
        self.holding: list[set[int]] = []

    def quantize(
        self, weight: Tensor, formats: Sequence[Format], statistics: InputStatistics | None
    ) -> Stored:
        blocks = find_blocks(self.model.module, self.model.places)
        parts = [(i, part.data) for i, block in enumerate(blocks) for part in block.parameters()]
        self.holding.append({depth for depth, part in parts if not is_placeholder(part)})
        assert not weight.isnan().any()
        return super().quantize(weight, formats, statistics)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_one_block_has_weights_at_a_time_and_they_are_read_once(
    tmp_path: Path, family: str, calibrated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = streamed(saved(tmp_path / "model", family, num_hidden_layers=3))
    quantizer = Watching(calibrated)
    quantizer.model = model
    bank = Bank(model, quantizer, Calibration(text="the " * 60, sequences=9, length=6), tmp_path)
    read: Counter[str] = Counter()
    plain = Checkpoint.read_plain

    def noted(self: Checkpoint, names: Iterable[str], *rest: Any) -> dict[str, Tensor]:
        names = list(names)
        read.update(names)
        return plain(self, names, *rest)

    monkeypatch.setattr(Checkpoint, "read_plain", noted)
    bank.build([(layer, fmt) for layer in model.layers for fmt in (INT2, INT4)])
    assert len(quantizer.holding) == len(model.layers)
    assert all(len(held) == 1 for held in quantizer.holding)
    assert [*dict.fromkeys(min(held) for held in quantizer.holding)] == [0, 1, 2]
    assert set(read.values()) == {1}
    assert any("experts" in name for name in read) == (family == "mixtral")
    assert any("norm" in name for name in read) == calibrated


def test_only_the_newest_decoded_weight_is_kept(tmp_path: Path) -> None:
    model = streamed(saved(tmp_path / "model", "llama"))
    bank = Bank(model, Counting(), root=tmp_path)
    first, second = (layer.name for layer in model.layers[:2])
    kept = bank.weight(first, INT4)
    assert bank.weight(first, INT4) is kept
    bank.weight(second, INT4)
    assert bank.weight(first, INT4) is not kept


def test_a_walk_ends_behind_the_last_block_that_lacks_something(tmp_path: Path) -> None:
    model = streamed(saved(tmp_path / "model", "llama", num_hidden_layers=4))
    text = Calibration(text="the color of s1 " * 20, sequences=9, length=6)
    bank = Bank(model, Calibrated(), text, tmp_path)
    calls: Counter[int] = Counter()
    watched: set[int] = set()

    def note(block: Any, inputs: object) -> None:
        if "forward" not in vars(block):
            depth = list(model.module.model.layers).index(block)
            calls[depth] += 1
            watched.update([depth] if block.mlp.up_proj._forward_pre_hooks else [])

    for block in model.module.model.layers:
        block.register_forward_pre_hook(note)
    in_block = [layer for layer in model.layers if ".2." in layer.name]
    bank.build([(layer, INT4) for layer in in_block])
    assert (set(calls), watched) == ({0, 1, 2}, {2})
    bank.build([(layer, INT4) for layer in model.layers if ".3." not in layer.name])
    assert (set(calls), watched) == ({0, 1, 2}, {0, 1, 2})
    assert calls == {0: 4, 1: 4, 2: 2}
    calls.clear()
    bank.build([(model.embedding, FORMATS["fp8"])])  # type: ignore[list-item]
    assert not calls


# ------------------------------------------------------------------------------ broken off


class Killed(Calibrated):
    """Ends its process's work at one of its calls."""

    def __init__(self, at: int):
        super().__init__()
        self.at = at

    def quantize(
        self, weight: Tensor, formats: Sequence[Format], statistics: InputStatistics | None
    ) -> Stored:
        if len(self.calls) == self.at:
            raise KeyboardInterrupt
        return super().quantize(weight, formats, statistics)


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("at", [0, 5, 9])
def test_killed_half_way_it_goes_on(tmp_path: Path, at: int, in_order: bool) -> None:
    model = streamed(saved(tmp_path / "model", "llama"))
    wanted = all_of(model, INT4)
    digest = digest_of(wanted) if in_order else ""

    def bank(name: str, quantizer: Calibrated) -> Bank:
        return Bank(model, quantizer, RECIPE, tmp_path / name, in_order=digest)

    bank("whole", Calibrated()).build(wanted)
    with pytest.raises(KeyboardInterrupt):
        bank("killed", Killed(at)).build(wanted)
    assert empty(model)
    done = files(tmp_path / "killed")
    assert len(weights_in(tmp_path / "killed")) == at
    assert unfinished_in(tmp_path / "killed") == []
    rest, stages = Calibrated(), set[str]()
    bank("killed", rest).build(wanted, lambda stage, *count: stages.add(stage))
    assert "calibration text" not in stages  # it is kept
    assert len(rest.calls) == len(wanted) - at
    after = files(tmp_path / "killed")
    assert all(after[name] == was for name, was in done.items() if name.endswith("tensors"))
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_disk_that_fills_up_is_one_line_and_what_is_finished_stays(
    tmp_path: Path, calibrated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = streamed(saved(tmp_path / "model", "llama"))
    quantizer = Calibrated()
    quantizer.calibrated = calibrated
    bank = Bank(model, quantizer, replace(RECIPE, text="the color " * 60), tmp_path / "bank")
    written = 0

    def full(tensors: dict[str, Tensor], path: Path, **more: Any) -> None:
        nonlocal written
        written += 1
        plain(tensors, path, **more)
        if written > 9:
            path.write_bytes(path.read_bytes()[:50])
            raise OSError(errno.ENOSPC, "No space left on device")

    plain = tensor_files.save_file
    monkeypatch.setattr(tensor_files, "save_file", full)
    with pytest.raises(ResourceError, match=r"No space left.*free some disk space") as caught:
        bank.build(all_of(model, INT4))
    assert "\n" not in str(caught.value)
    assert empty(model)
    assert len(weights_in(tmp_path / "bank")) == 9
    assert not unfinished_in(tmp_path / "bank")
    monkeypatch.undo()
    quantizer.calls.clear()
    bank.build(all_of(model, INT4))
    assert len(quantizer.calls) == len(all_of(model, INT4)) - 9


def test_processes_share_the_layers_of_each_block(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "llama")
    model = streamed(folder)
    Bank(model, Calibrated(), RECIPE, tmp_path / "one").build(all_of(model))

    def build() -> None:
        quantizer = Calibrated()
        Bank(model, quantizer, RECIPE, tmp_path / "three").build(all_of(model))
        with open(tmp_path / "calls", "a", encoding="utf-8") as calls:
            calls.write(f"{len(quantizer.calls)}\n")

    in_processes(3, build)
    calls = [int(line) for line in (tmp_path / "calls").read_text().split()]
    assert sum(calls) == len(model.every_layer)
    assert contents(tmp_path / "three") == contents(tmp_path / "one")
