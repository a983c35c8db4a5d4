"""The bank: exactly the promised tensors on disk, made once, decoded within bounds."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
from banks import INT2, INT4, Calibrated, Counting, files, weights_in
from conftest import tiny_family
from safetensors.torch import load_file

from mpsearch import bank as bank_module
from mpsearch.bank import Bank
from mpsearch.calibration import Calibration
from mpsearch.codecs import decode
from mpsearch.errors import CheckError
from mpsearch.evaluate import all_layers, quantized_layers
from mpsearch.formats import BF16, FORMATS, Format
from mpsearch.models import Model
from mpsearch.quantizers.rounding import Rounding
from mpsearch.space import ResolvedSpace
from mpsearch.wanted import Wanted, holdings


def data_bytes(path: Path) -> int:
    """Bytes of a safetensors file after its header, read without the library."""
    content = path.read_bytes()
    return len(content) - 8 - struct.unpack("<Q", content[:8])[0]


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
    of_head, of_embedding = quantizer.seen
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


def test_building_again_does_nothing(tiny: Model, wanted: Wanted, tmp_path: Path) -> None:
    quantizer = Counting()
    Bank(tiny, quantizer, root=tmp_path).build(wanted)
    before = files(tmp_path)
    Bank(tiny, quantizer, root=tmp_path).build(wanted)
    assert files(tmp_path) == before
    assert len(quantizer.calls) == 5


def test_holdings_count_intact_files_and_their_bytes(
    tiny: Model, wanted: Wanted, tmp_path: Path
) -> None:
    bank = Bank(tiny, Rounding(), root=tmp_path)
    assert bank.missing([*wanted, (tiny.layers[0], BF16)]) == wanted
    assert holdings(wanted, wanted) == {"int2-g64": (0, 5, 0), "int4-g64": (0, 5, 0)}
    bank.build(wanted[:4])
    bank.path(wanted[1][0].name, INT4).write_bytes(b"damaged")
    first, second = wanted[0][0], wanted[2][0]
    assert bank.missing(wanted) == [wanted[1], *wanted[4:]]
    assert holdings(wanted, bank.missing(wanted)) == {
        "int2-g64": (2, 5, INT2.layer_bytes(first) + INT2.layer_bytes(second)),
        "int4-g64": (1, 5, INT4.layer_bytes(second)),
    }


def test_of_a_layer_only_the_missing_formats_are_made(tiny: Model, tmp_path: Path) -> None:
    quantizer = Counting()
    bank = Bank(tiny, quantizer, root=tmp_path)
    bank.build([(tiny.layers[0], INT2)])
    bank.build([(tiny.layers[0], INT2), (tiny.layers[0], INT4), (tiny.layers[1], INT2)])
    assert quantizer.calls == [("int2-g64",), ("int4-g64",), ("int2-g64",)]


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
