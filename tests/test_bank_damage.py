"""A bank after a kill, a full disk or damage: what is whole is kept, the rest is made again."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from banks import INT4, Calibrated, Counting, Stored, files, unfinished_in, weights_in
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mpsearch import tensor_files
from mpsearch.bank import Bank
from mpsearch.errors import CheckError, MpsearchError, ResourceError
from mpsearch.models import Model
from mpsearch.quantizers.rounding import Rounding
from mpsearch.wanted import Wanted


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
