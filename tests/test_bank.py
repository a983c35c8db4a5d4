"""The bank: exactly the promised tensors on disk, resumed and not redone, never half a file."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import re
import shutil
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import build_tokenizer, tiny_family, tiny_llama
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mpsearch import bank as bank_module
from mpsearch import tensor_files
from mpsearch.bank import Bank, check_formats
from mpsearch.calibration import Calibration
from mpsearch.codecs import decode
from mpsearch.errors import CheckError, MpsearchError, ResourceError, RunError, UsageError
from mpsearch.evaluate import all_layers, quantized_layers
from mpsearch.formats import BF16, FORMATS, Format
from mpsearch.layers import Layer
from mpsearch.models import Model, from_module
from mpsearch.quantizers import InputStatistics
from mpsearch.quantizers.rounding import Rounding
from mpsearch.space import ResolvedSpace

INT2, INT4 = FORMATS["int2-g64"], FORMATS["int4-g64"]
Wanted = list[tuple[Layer, Format]]
Stored = dict[str, dict[str, Tensor]]


class Counting(Rounding):
    """Rounding that notes its calls and may change or refuse them."""

    name = "counting"

    def __init__(self, change: Callable[[int, Stored], Stored] = lambda call, stored: stored):
        self.calls: list[tuple[str, ...]] = []
        self.change = change

    def quantize(
        self, weight: Tensor, formats: Sequence[Format], statistics: InputStatistics | None
    ) -> Stored:
        self.calls.append(tuple(fmt.name for fmt in formats))
        return self.change(len(self.calls), super().quantize(weight, formats, statistics))


class Calibrated(Counting):
    """Notes the statistics that it is given."""

    name = "calibrated"
    calibrated = True

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[InputStatistics | None] = []

    def quantize(
        self, weight: Tensor, formats: Sequence[Format], statistics: InputStatistics | None
    ) -> Stored:
        self.seen.append(statistics)
        return super().quantize(weight, formats, statistics)


@pytest.fixture
def wanted(tiny: Model) -> Wanted:
    """Five layers in two formats each."""
    return [(layer, fmt) for layer in tiny.layers[:5] for fmt in (INT2, INT4)]


def files(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Inode, time and size of everything below, hidden files too."""
    return {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns, path.stat().st_size)
        for path in folder.rglob("*")
        if path.is_file()
    }


def weights_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.safetensors"))


def unfinished_in(folder: Path) -> list[str]:
    expected = (*weights_in(folder), "settings.json", ".claims")
    return [name for name in files(folder) if name not in expected]


def data_bytes(path: Path) -> int:
    """Bytes of a safetensors file after its header, read without the library."""
    content = path.read_bytes()
    return len(content) - 8 - struct.unpack("<Q", content[:8])[0]


# ------------------------------------------------------------------------------ what is written


def test_files_hold_exactly_the_promised_tensors(
    tiny: Model, tiny_space: ResolvedSpace, tmp_path: Path
) -> None:
    bank = Bank(tiny, Rounding(), root=tmp_path)
    bank.build(all_layers(tiny_space))
    assert len(weights_in(tmp_path)) == len(all_layers(tiny_space))
    for layer, fmt in all_layers(tiny_space):
        path = bank.path(layer.name, fmt)
        promised = fmt.tensors(layer.rows, layer.columns)
        assert data_bytes(path) == fmt.layer_bytes(layer)
        made = Rounding().quantize(tiny.originals[layer.name].float(), [fmt], None)[fmt.name]
        stored = load_file(path)
        assert set(stored) == set(promised)
        assert all(torch.equal(stored[name], made[name]) for name in promised)


def test_one_assignment_costs_the_bytes_that_the_space_predicts(
    tiny: Model, tiny_space: ResolvedSpace, tmp_path: Path
) -> None:
    names = [group.name for group in tiny_space.groups]
    mixed = {name: ("int2-g64", "int3-g64", "bf16")[i % 3] for i, name in enumerate(names)}
    bank = Bank(tiny, Rounding(), root=tmp_path)
    bank.build(quantized_layers(tiny_space, mixed))
    stored = [
        bank.stored(layer, fmt) for layer, fmt in tiny_space.layer_formats(mixed).items()
    ]  # fmt: skip
    actual = sum(tensor.nbytes for tensors in stored for tensor in tensors.values())
    assert actual + tiny_space.kept_bytes == tiny_space.stored_bytes(mixed)


def test_stored_and_decoded_weights_agree(tiny: Model, wanted: Wanted, tmp_path: Path) -> None:
    bank = Bank(tiny, Rounding(), root=tmp_path)
    bank.build(wanted)
    for layer, fmt in wanted:
        weight = bank.weight(layer.name, fmt)
        assert weight.dtype == tiny.dtype
        assert torch.equal(weight, decode(bank.stored(layer.name, fmt), fmt).to(tiny.dtype))


def test_unquantized_layers_need_no_file(tiny: Model, tmp_path: Path) -> None:
    bank = Bank(tiny, Rounding(), root=tmp_path)
    layer = tiny.layers[0]
    bank.build([(layer, BF16)])
    assert not files(tmp_path)
    assert bank.weight(layer.name, BF16) is tiny.originals[layer.name]
    stored = bank.stored(layer.name, BF16)["weight"]
    assert stored.dtype == torch.bfloat16
    assert torch.equal(stored.to(tiny.dtype), tiny.originals[layer.name])


def test_all_formats_of_a_layer_are_asked_for_at_once(
    tiny: Model, wanted: Wanted, tmp_path: Path
) -> None:
    quantizer = Counting()
    Bank(tiny, quantizer, root=tmp_path).build(wanted)
    assert quantizer.calls == [("int2-g64", "int4-g64")] * 5


def test_only_calibrated_quantizers_get_statistics_of_their_layer(
    tiny: Model, wanted: Wanted, tmp_path: Path
) -> None:
    quantizer = Calibrated()
    Bank(tiny, quantizer, Calibration(4, 8), root=tmp_path).build(wanted)
    shapes = [tuple(s.gram.shape) for s in quantizer.seen if s is not None]
    assert shapes == [(layer.columns, layer.columns) for layer, fmt in wanted if fmt is INT2]
    assert {s.tokens for s in quantizer.seen if s is not None} == {32}


def test_an_embedding_is_quantized_without_statistics_and_a_head_with_its_own(
    tmp_path: Path,
) -> None:
    untied, quantizer = tiny_family("llama"), Calibrated()
    embedding, head = untied.every_layer[-2:]
    assert (embedding.name, head.name) == ("model.embed_tokens", "lm_head")
    bank = Bank(untied, quantizer, Calibration(4, 8), root=tmp_path)
    bank.build([(embedding, FORMATS["fp8"]), (head, INT4)])
    of_embedding, of_head = quantizer.seen
    assert of_embedding is None
    assert of_head is not None
    assert of_head.tokens == 32
    assert data_bytes(bank.path("lm_head", INT4)) == INT4.layer_bytes(head)


def test_progress_ends_where_it_said_it_would(tiny: Model, wanted: Wanted, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    Bank(tiny, Rounding(), root=tmp_path).build(wanted, lambda *step: seen.append(step))
    assert seen == [("quantizing (rounding)", done, 5) for done in range(6)]


def test_files_can_be_read_by_others(tiny: Model, wanted: Wanted, tmp_path: Path) -> None:
    bank = Bank(tiny, Rounding(), root=tmp_path)
    bank.build(wanted)
    assert {bank.path(layer.name, fmt).stat().st_mode & 0o777 for layer, fmt in wanted} == {0o644}


# ------------------------------------------------------------------------------ done once


def test_building_again_does_nothing(tiny: Model, wanted: Wanted, tmp_path: Path) -> None:
    quantizer = Counting()
    Bank(tiny, quantizer, root=tmp_path).build(wanted)
    before = files(tmp_path)
    Bank(tiny, quantizer, root=tmp_path).build(wanted)
    assert files(tmp_path) == before
    assert len(quantizer.calls) == 5


def in_processes(count: int, work: Callable[[], None]) -> None:
    """Run the work in so many forked processes at once; each must end well."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * count


def test_processes_that_build_one_bank_share_the_work(
    tiny: Model, wanted: Wanted, tmp_path: Path
) -> None:
    def note(call: int, stored: Stored) -> Stored:
        with open(tmp_path / "calls", "a", encoding="utf-8") as calls:
            calls.write(f"{os.getpid()}\n")
        time.sleep(0.05)
        return stored

    def build() -> None:
        Bank(tiny, Counting(note), root=tmp_path / "bank").build(wanted)
        assert len(weights_in(tmp_path / "bank")) == 10

    in_processes(3, build)
    workers = (tmp_path / "calls").read_text().split()
    assert len(workers) == 5
    assert len(set(workers)) > 1


def test_helpers_make_the_bank_that_one_process_makes(
    tiny: Model, wanted: Wanted, tmp_path: Path
) -> None:
    Bank(tiny, Counting(), root=tmp_path / "one").build(wanted)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        Bank(tiny, Counting(), root=tmp_path / "three").build(wanted)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert weights_in(tmp_path / "three") == weights_in(tmp_path / "one")
    for path in (tmp_path / "one").rglob("*.safetensors"):
        other = tmp_path / "three" / path.relative_to(tmp_path / "one")
        assert other.read_bytes() == path.read_bytes()
    assert not multiprocessing.active_children()


def test_what_a_dying_helper_leaves_is_done_by_the_caller(
    tiny: Model, wanted: Wanted, tmp_path: Path
) -> None:
    caller = os.getpid()

    def die_elsewhere(call: int, stored: Stored) -> Stored:
        if os.getpid() != caller:
            os._exit(1)
        time.sleep(0.05)
        return stored

    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        Bank(tiny, Counting(die_elsewhere), root=tmp_path).build(wanted)
    finally:
        torch.set_num_threads(threads)
    assert len(weights_in(tmp_path)) == 10
    assert not unfinished_in(tmp_path)


def test_holdings_count_intact_files_and_their_bytes(
    tiny: Model, wanted: Wanted, tmp_path: Path
) -> None:
    bank = Bank(tiny, Rounding(), root=tmp_path)
    assert bank.holdings(wanted) == {"int2-g64": (0, 5, 0), "int4-g64": (0, 5, 0)}
    bank.build(wanted[:4])
    bank.path(wanted[1][0].name, INT4).write_bytes(b"damaged")
    first, second = wanted[0][0], wanted[2][0]
    assert bank.holdings(wanted) == {
        "int2-g64": (2, 5, INT2.layer_bytes(first) + INT2.layer_bytes(second)),
        "int4-g64": (1, 5, INT4.layer_bytes(second)),
    }


def test_a_kill_in_the_middle_costs_only_the_layer_it_hit(
    tiny: Model, wanted: Wanted, tmp_path: Path
) -> None:
    def die(call: int, stored: Stored) -> Stored:
        if call == 3:
            raise KeyboardInterrupt
        return stored

    with pytest.raises(KeyboardInterrupt):
        Bank(tiny, Counting(die), root=tmp_path).build(wanted)
    finished = {name: files(tmp_path)[name] for name in weights_in(tmp_path)}
    assert len(finished) == 4
    assert not unfinished_in(tmp_path)

    resumed = Counting()
    Bank(tiny, resumed, root=tmp_path).build(wanted)
    assert len(resumed.calls) == 3
    after = files(tmp_path)
    assert {name: after[name] for name in finished} == finished
    assert len(weights_in(tmp_path)) == 10


def test_of_a_layer_only_the_missing_formats_are_made(tiny: Model, tmp_path: Path) -> None:
    quantizer = Counting()
    bank = Bank(tiny, quantizer, root=tmp_path)
    bank.build([(tiny.layers[0], INT2)])
    bank.build([(tiny.layers[0], INT2), (tiny.layers[0], INT4), (tiny.layers[1], INT2)])
    assert quantizer.calls == [("int2-g64",), ("int4-g64",), ("int2-g64",)]


# ------------------------------------------------------------------------------ when it fails


def full_disk_after(count: int, error: Exception) -> Callable[[Mapping[str, Tensor], Path], None]:
    """A `save_file` that writes half of its next file and then fails."""
    from safetensors.torch import save_file

    written = 0

    def save(tensors: Mapping[str, Tensor], path: Path, **more: Any) -> None:
        nonlocal written
        written += 1
        save_file(dict(tensors), path, **more)
        if written > count:
            Path(path).write_bytes(Path(path).read_bytes()[:100])
            raise error

    return save


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device"),
    ],
    ids=["os", "safetensors"],
)
def test_a_disk_that_fills_up_leaves_a_usable_bank(
    monkeypatch: pytest.MonkeyPatch, tiny: Model, wanted: Wanted, tmp_path: Path, error: Exception
) -> None:
    monkeypatch.setattr(tensor_files, "save_file", full_disk_after(3, error))
    with pytest.raises(ResourceError, match=r"No space left.*free some disk space") as caught:
        Bank(tiny, Counting(), root=tmp_path).build(wanted)
    assert "\n" not in str(caught.value)
    assert len(weights_in(tmp_path)) == 3
    assert not unfinished_in(tmp_path)
    for path in tmp_path.rglob("*.safetensors"):
        load_file(path)

    monkeypatch.undo()
    resumed = Counting()
    bank = Bank(tiny, resumed, root=tmp_path)
    bank.build(wanted)
    assert resumed.calls == [("int4-g64",), *[("int2-g64", "int4-g64")] * 3]
    assert len(weights_in(tmp_path)) == 10


def test_a_short_disk_is_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch, tiny: Model, wanted: Wanted, tmp_path: Path
) -> None:
    needed = sum(fmt.layer_bytes(layer) for layer, fmt in wanted)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed))
    quantizer = Calibrated()
    with pytest.raises(ResourceError, match=r"^the weight bank needs about .* of disk"):
        Bank(tiny, quantizer, root=tmp_path).build(wanted)
    assert not quantizer.calls
    assert not files(tmp_path)


def test_what_is_there_already_needs_no_disk(
    monkeypatch: pytest.MonkeyPatch, tiny: Model, wanted: Wanted, tmp_path: Path
) -> None:
    Bank(tiny, Counting(), root=tmp_path).build(wanted)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    Bank(tiny, Counting(), root=tmp_path).build(wanted)


def test_a_bank_folder_that_cannot_be_made_is_one_clear_line(
    tiny: Model, wanted: Wanted, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(MpsearchError):
        Bank(tiny, Counting(), root=tmp_path / "file").build(wanted)


@pytest.mark.parametrize("left", [0, 4, 100, -1], ids=lambda left: f"bytes{left}")
def test_a_truncated_file_is_a_check_error_that_names_it(
    tiny: Model, wanted: Wanted, tmp_path: Path, left: int
) -> None:
    bank = Bank(tiny, Rounding(), root=tmp_path)
    bank.build(wanted)
    path = bank.path(tiny.layers[1].name, INT4)
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(CheckError, match=re.escape(f"'{path}'") + ".*rebuilt") as caught:
        bank.weight(tiny.layers[1].name, INT4)
    assert "\n" not in str(caught.value)
    bank.build(wanted)
    assert bank.weight(tiny.layers[1].name, INT4).shape == (32, 64)


def test_one_flipped_bit_is_found_and_only_that_file_rebuilt(
    tiny: Model, wanted: Wanted, tmp_path: Path
) -> None:
    quantizer = Counting()
    bank = Bank(tiny, quantizer, root=tmp_path)
    bank.build(wanted)
    path = bank.path(tiny.layers[1].name, INT4)
    good = path.read_bytes()
    path.write_bytes(good[:-100] + bytes([good[-100] ^ 1]) + good[-99:])
    with pytest.raises(CheckError, match="damaged"):
        bank.weight(tiny.layers[1].name, INT4)
    quantizer.calls.clear()
    bank.build(wanted)
    assert quantizer.calls == [("int4-g64",)]
    assert path.read_bytes() == good


def test_a_missing_file_is_made_when_first_needed(tiny: Model, tmp_path: Path) -> None:
    bank = Bank(tiny, Counting(), root=tmp_path)
    assert bank.weight(tiny.layers[0].name, INT2).shape == (64, 64)
    assert len(weights_in(tmp_path)) == 1


def test_without_its_inputs_a_calibrated_layer_is_not_made_on_the_way(
    tiny: Model, tmp_path: Path
) -> None:
    with pytest.raises(CheckError, match="cannot be read"):
        Bank(tiny, Calibrated(), root=tmp_path).weight(tiny.layers[0].name, INT2)
    assert not files(tmp_path)


def test_inputs_that_are_nan_name_the_layer(
    monkeypatch: pytest.MonkeyPatch, tiny: Model, wanted: Wanted, tmp_path: Path
) -> None:
    def broken(*_: object) -> dict[str, InputStatistics]:
        gram = torch.eye(64)
        gram[3, 3] = float("nan")
        return {layer.name: InputStatistics(gram, 8) for layer in tiny.layers}

    monkeypatch.setattr(bank_module, "input_statistics", broken)
    with pytest.raises(CheckError, match=rf"inputs of '{tiny.layers[0].name}' .* in 1 of 64"):
        Bank(tiny, Calibrated(), Calibration(2, 4), root=tmp_path).build(wanted)
    assert not weights_in(tmp_path)


def test_input_columns_that_are_never_used_are_counted(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tiny: Model,
    wanted: Wanted,
    tmp_path: Path,
) -> None:
    def dead(*_: object) -> dict[str, InputStatistics]:
        grams = {layer.name: torch.eye(layer.columns) for layer in tiny.layers}
        grams[tiny.layers[2].name][5, 5] = 0
        return {name: InputStatistics(gram, 8) for name, gram in grams.items()}

    monkeypatch.setattr(bank_module, "input_statistics", dead)
    Bank(tiny, Calibrated(), Calibration(2, 4), root=tmp_path).build(wanted)
    assert f"1 of {len(tiny.layers)} layers have input columns" in caplog.text


def shorter(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**stored, "weight_packed": stored["weight_packed"][:, :-1]}


def wider(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**stored, "weight_scale": stored["weight_scale"].float()}


def fewer(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in stored.items() if name != "weight_shape"}


def more(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**stored, "weight_zero_point": torch.zeros(1)}


@pytest.mark.parametrize("spoil", [shorter, wider, fewer, more])
def test_tensors_other_than_promised_are_refused_and_not_written(
    tiny: Model, tmp_path: Path, spoil: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> None:
    quantizer = Counting(lambda call, made: {name: spoil(t) for name, t in made.items()})
    with pytest.raises(CheckError, match=r"quantizer 'counting' made .* int2-g64 stores"):
        Bank(tiny, quantizer, root=tmp_path).build([(tiny.layers[0], INT2)])
    assert not weights_in(tmp_path)
    assert not unfinished_in(tmp_path)


@pytest.mark.parametrize(
    ("fmt", "nearest"), [("int4-g64", "int4-g32"), ("int3-g128-asym", "int3-g32-asym")]
)
def test_groups_that_do_not_divide_the_columns_are_refused_with_the_nearest_that_do(
    tiny: Model, tmp_path: Path, fmt: str, nearest: str
) -> None:
    ragged = Layer("model.layers.0.mlp.down_proj", 64, 96)
    quantizer = Counting()
    with pytest.raises(UsageError, match=f"'{fmt}' cannot hold .* 96 columns; use {nearest},"):
        Bank(tiny, quantizer, root=tmp_path).build([(ragged, FORMATS[fmt])])
    assert not quantizer.calls
    assert not files(tmp_path)


def test_a_format_that_the_quantizer_does_not_make_is_refused(tiny: Model, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="quantizer 'counting' does not make format 'nf4'"):
        Bank(tiny, Counting(), root=tmp_path).build([(tiny.layers[0], FORMATS["nf4"])])


@pytest.mark.parametrize(("rows", "columns"), [(48, 64), (64, 80), (31, 64)])
def test_sides_that_gptq_words_do_not_fill_are_refused_in_one_line(rows: int, columns: int) -> None:
    fmt = FORMATS["gptq4-g32"]
    check_formats(Rounding(), [(Layer("a.b", 96, 64), fmt), (Layer("a.b", rows, columns), BF16)])
    with pytest.raises(UsageError, match=rf"'gptq4-g32' cannot hold .*a.b.*{rows} x {columns}"):
        check_formats(Rounding(), [(Layer("a.b", rows, columns), fmt)])


# ------------------------------------------------------------------------------ decoded weights


def test_decoded_weights_are_kept_within_a_quarter_of_memory(
    monkeypatch: pytest.MonkeyPatch, tiny: Model, tmp_path: Path
) -> None:
    queries = [layer for layer in tiny.layers if layer.name.endswith(("q_proj", "o_proj"))]
    one = tiny.originals[queries[0].name].nbytes
    monkeypatch.setattr(bank_module, "available_memory_bytes", lambda device: 4 * (2 * one) + 3)
    bank = Bank(tiny, Rounding(), root=tmp_path)
    bank.build([(layer, INT4) for layer in queries])
    first, second, third = (layer.name for layer in queries[:3])

    kept = bank.weight(first, INT4)
    other = bank.weight(second, INT4)
    assert bank.weight(first, INT4) is kept  # now the more recent of the two
    bank.weight(third, INT4)
    assert bank.weight(first, INT4) is kept
    assert bank.weight(second, INT4) is not other
    assert torch.equal(bank.weight(second, INT4), other)


def test_however_little_memory_the_newest_weight_is_handed_out(
    monkeypatch: pytest.MonkeyPatch, tiny: Model, wanted: Wanted, tmp_path: Path
) -> None:
    monkeypatch.setattr(bank_module, "available_memory_bytes", lambda device: 0)
    bank = Bank(tiny, Rounding(), root=tmp_path)
    bank.build(wanted)
    for layer, fmt in wanted * 2:
        expected = decode(bank.stored(layer.name, fmt), fmt).to(tiny.dtype)
        assert torch.equal(bank.weight(layer.name, fmt), expected)
    newest = bank.weight(*last(wanted))
    assert bank.weight(*last(wanted)) is newest


def last(wanted: Wanted) -> tuple[str, Format]:
    layer, fmt = wanted[-1]
    return layer.name, fmt


# ------------------------------------------------------------------------------ which bank


@pytest.fixture
def other_model() -> Model:
    tokenizer = build_tokenizer()
    module = tiny_llama(len(tokenizer), seed=9)
    return from_module("other", Path(), module, tokenizer, torch.device("cpu"), torch.float32)


def test_models_quantizers_and_calibrations_do_not_share_a_folder(
    tiny: Model, other_model: Model, tmp_path: Path
) -> None:
    class Newer(Rounding):
        @property
        def settings(self) -> Mapping[str, str]:
            return {"compressed-tensors": "99"}

    banks = [
        Bank(tiny, Rounding(), root=tmp_path),
        Bank(other_model, Rounding(), root=tmp_path),
        Bank(tiny, Newer(), root=tmp_path),
        Bank(tiny, Counting(), root=tmp_path),
        Bank(tiny, Calibrated(), Calibration(seed=0), root=tmp_path),
        Bank(tiny, Calibrated(), Calibration(seed=1), root=tmp_path),
        Bank(tiny, Calibrated(), Calibration(length=7), root=tmp_path),
    ]
    assert len({bank.folder for bank in banks}) == len(banks)


def test_calibration_does_not_matter_to_a_quantizer_that_needs_none(
    tiny: Model, tmp_path: Path
) -> None:
    one, two = (Bank(tiny, Rounding(), Calibration(seed=s), tmp_path) for s in (0, 1))
    assert one.folder == two.folder
    assert "calibration" not in one.settings


def test_files_stay_inside_the_bank_whatever_a_layer_is_called(tiny: Model, tmp_path: Path) -> None:
    bank = Bank(tiny, Rounding(), root=tmp_path)
    for name in ("../../up", "/absolute", "a/b", "..", "nul\0", "weiß"):
        assert bank.path(name, INT2).parent == bank.folder
        assert re.fullmatch(r"[A-Za-z0-9_.-]+", bank.path(name, INT2).name)


def test_banks_lie_under_the_home_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, tiny: Model, tmp_path: Path
) -> None:
    monkeypatch.setenv("MPSEARCH_HOME", str(tmp_path))
    assert (tmp_path / "bank") in Bank(tiny, Rounding()).folder.parents


@pytest.mark.parametrize(
    ("name", "library"), [("rounding", "compressed_tensors"), ("gptq", "gptqmodel")]
)
def test_settings_written_as_json_find_the_same_bank_again(
    tiny: Model, name: str, library: str
) -> None:
    pytest.importorskip(library)
    from mpsearch.quantizers import get_quantizer

    bank = Bank(tiny, get_quantizer(name, "compressed-tensors"), Calibration(3, 17, seed=5))
    found = Bank.of(tiny, json.loads(json.dumps(bank.settings)))
    assert found.folder == bank.folder
    assert found.settings == bank.settings
    assert (found.calibration == bank.calibration) == (name == "gptq")


def test_settings_of_another_version_are_refused_with_both(tiny: Model) -> None:
    old = {**Bank(tiny, Rounding()).settings, "compressed-tensors": "0.1"}
    with pytest.raises(RunError, match=r'"0\.1".*install the same versions') as caught:
        Bank.of(tiny, old)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(
            {"quantizer": "awq", "awq": "1"},
            id="unknown-quantizer",
        ),
        pytest.param(
            {"quantizer": "rounding", "calibration": {"text": "wikitext", "rows": 5}},
            id="unknown-calibration",
        ),
        pytest.param({"quantizer": "rounding"}, id="no-version"),
        pytest.param(
            {"quantizer": "rounding", "compressed-tensors": "0.20.0", "new": 1},
            id="unknown-setting",
        ),
    ],
)
def test_settings_that_this_installation_does_not_know_are_refused(
    tiny: Model, settings: dict[str, object]
) -> None:
    with pytest.raises(RunError):
        Bank.of(tiny, settings)
