"""A bank of one assignment, quantized in order: codes, kills, damage, and whose it is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from banks import Calibrated, files, unfinished_in, weights_in
from conftest import tiny_family

from mpsearch.bank import Bank
from mpsearch.calibration import Calibration, calibration_tokens, input_statistics
from mpsearch.errors import CheckError, RunError
from mpsearch.files import Claims
from mpsearch.formats import FORMATS
from mpsearch.in_order import reading_order
from mpsearch.models import Model
from mpsearch.quantizers import get_quantizer
from mpsearch.tensor_files import read_tensors
from mpsearch.wanted import Wanted, digest_of

RECIPE = Calibration(sequences=9, length=16, seed=1)
MIXED = ("int2-g64", "int3-g64", "int4-g64", "bf16")


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_family("llama")


@pytest.fixture(scope="module")
def mixed(model: Model) -> Wanted:
    """Every layer and the head; formats in turn, some bf16."""
    layers = (*model.layers, *filter(None, [model.head]))
    return [(layer, FORMATS[MIXED[i % len(MIXED)]]) for i, layer in enumerate(layers)]


def bank_of(model: Model, wanted: Wanted, root: Path, quantizer: Calibrated | None = None) -> Bank:
    return Bank(model, quantizer or Calibrated(), RECIPE, root, in_order=digest_of(wanted))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*.safetensors")}


class Killed(Calibrated):
    """Ends its process's work at one of its calls."""

    def __init__(self, at: int):
        super().__init__()
        self.at = at

    def quantize(self, weight, formats, statistics):  # type: ignore[no-untyped-def]
        if len(self.calls) == self.at:
            raise KeyboardInterrupt
        return super().quantize(weight, formats, statistics)


@pytest.fixture(autouse=True)
def untouched(model: Model) -> Iterator[None]:
    """Whatever happens, the reference is in place afterwards."""
    before = {name: place.weight.clone() for name, place in model.places.items()}
    yield
    assert all(torch.equal(model.places[name].weight, was) for name, was in before.items())


def test_every_layer_is_quantized_once_by_what_it_reads_behind_the_others(
    model: Model, mixed: Wanted, tmp_path: Path
) -> None:
    quantizer = Calibrated()
    bank = bank_of(model, mixed, tmp_path, quantizer)
    bank.build(mixed)
    tokens = calibration_tokens(model, RECIPE)
    formats = {layer.name: fmt for layer, fmt in mixed}
    order = [name for step in reading_order(model, tokens[:1]) for name in step]
    quantized = [name for name in order if name in formats and formats[name].quantized]
    assert quantizer.calls == [(formats[name].name,) for name in quantized]
    for name, seen in zip(quantized, quantizer.seen, strict=True):
        # All before it in place, all behind it as in the reference: what a pass shows then.
        for before in order[: order.index(name)]:
            shares = any({before, name} <= set(step) for step in reading_order(model, tokens[:1]))
            if before in formats and not shares:
                model.places[before].put(bank.weight(before, formats[before]))
        expected = input_statistics(model, tokens, lambda done, total: None)[name]
        model.restore()
        assert seen is not None
        assert torch.equal(seen.gram, expected.gram), name
        assert seen.tokens == expected.tokens


def test_the_first_layers_have_the_codes_of_the_shared_bank_and_later_ones_have_not(
    model: Model, tmp_path: Path
) -> None:
    gptq = get_quantizer("gptq", "compressed-tensors")
    wanted = [(layer, FORMATS["int3-g64"]) for layer in model.layers]
    shared = Bank(model, gptq, RECIPE, tmp_path)
    shared.build(wanted)
    refined = Bank(model, gptq, RECIPE, tmp_path, in_order=digest_of(wanted))
    refined.build(wanted)
    assert refined.folder != shared.folder
    same = {
        layer.name: all(
            torch.equal(tensor, refined.stored(layer.name, fmt)[name])
            for name, tensor in shared.stored(layer.name, fmt).items()
        )
        for layer, fmt in wanted
    }
    first = {f"model.layers.0.self_attn.{part}_proj" for part in "qkv"}
    assert {name for name, equal in same.items() if equal} == first


def test_what_is_there_is_not_made_again(model: Model, mixed: Wanted, tmp_path: Path) -> None:
    bank_of(model, mixed, tmp_path).build(mixed)
    before = files(tmp_path)
    again = Calibrated()
    bank_of(model, mixed, tmp_path, again).build(mixed)
    assert again.calls == []
    assert files(tmp_path) == before


@pytest.mark.parametrize("at", [0, 1, 6, 11])
def test_a_killed_walk_goes_on_to_the_same_codes_without_repeating_any(
    at: int, model: Model, mixed: Wanted, tmp_path: Path
) -> None:
    bank_of(model, mixed, tmp_path / "whole").build(mixed)
    total = len(weights_in(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        bank_of(model, mixed, tmp_path / "killed", Killed(at)).build(mixed)
    done = files(tmp_path / "killed")
    assert len(weights_in(tmp_path / "killed")) == at
    assert unfinished_in(tmp_path / "killed") == []
    rest = Calibrated()
    bank_of(model, mixed, tmp_path / "killed", rest).build(mixed)
    assert len(rest.calls) == total - at
    after = files(tmp_path / "killed")
    assert all(after[name] == was for name, was in done.items() if name.endswith("tensors"))
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_damaged_file_in_the_middle_is_made_again_and_nothing_else(
    model: Model, mixed: Wanted, tmp_path: Path
) -> None:
    bank = bank_of(model, mixed, tmp_path)
    bank.build(mixed)
    whole = contents(tmp_path)
    path = sorted(bank.folder.glob("*.safetensors"))[5]
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(bytes(damaged))
    with pytest.raises(CheckError, match="damaged"):
        read_tensors(path)
    again = Calibrated()
    bank_of(model, mixed, tmp_path, again).build(mixed)
    assert len(again.calls) == 1
    assert contents(tmp_path) == whole


def test_a_second_process_waits_and_then_finds_everything_done(
    model: Model, mixed: Wanted, tmp_path: Path
) -> None:
    first, second = Calibrated(), Calibrated()
    bank = bank_of(model, mixed, tmp_path, first)
    bank.folder.mkdir(parents=True)
    waiting = bank_of(model, mixed, tmp_path, second)
    taken: list[int] = []
    said: list[str] = []

    def busy(self: Claims, number: int) -> bool:
        """The other process has it until it has built everything."""
        if self._path.parent != bank.folder:
            return True  # of the calibration text
        taken.append(number)
        if len(taken) == 1:
            with pytest.MonkeyPatch.context() as free:
                free.setattr(Claims, "take", lambda *_: True)
                bank.build(mixed)
            return False
        return True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Claims, "take", busy)
        waiting.build(mixed, lambda stage, done, total: said.append(stage))
    assert "waiting for another process that quantizes this" in said
    assert taken == [0, 0]
    assert len(first.calls) == len(weights_in(tmp_path))
    assert second.calls == []


def test_a_bank_holds_one_assignment_and_refuses_another(
    model: Model, mixed: Wanted, tmp_path: Path
) -> None:
    bank = bank_of(model, mixed, tmp_path)
    for other in (mixed[:-1], [(mixed[0][0], FORMATS["int8-g64"]), *mixed[1:]]):
        assert digest_of(other) != digest_of(mixed)
        with pytest.raises(RunError, match="codes of another assignment"):
            bank.build(other)
    assert weights_in(tmp_path) == []
    assert digest_of(reversed(mixed)) == digest_of(mixed)


def test_settings_written_as_json_find_the_same_bank_again(model: Model, mixed: Wanted) -> None:
    gptq = get_quantizer("gptq", "compressed-tensors")
    bank = Bank(model, gptq, RECIPE, in_order=digest_of(mixed))
    found = Bank.of(model, json.loads(json.dumps(bank.settings)))
    assert (found.folder, found.in_order) == (bank.folder, digest_of(mixed))
    folders = {
        Bank(model, gptq, recipe, in_order=digest).folder
        for recipe in (RECIPE, Calibration(9, 16, seed=2))
        for digest in ("", digest_of(mixed), digest_of(mixed[1:]))
    }
    assert len(folders) == 6


def test_progress_counts_layers(model: Model, mixed: Wanted, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    bank_of(model, mixed, tmp_path).build(mixed, lambda *call: seen.append(call))
    total = sum(fmt.quantized for _, fmt in mixed)
    counted = [done for stage, done, of in seen if stage.startswith("re-quantizing")]
    assert counted[0] == 0 and counted[-1] == total
    assert counted == sorted(counted)
