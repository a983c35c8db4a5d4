"""What fits on a device: uniform formats, contexts, cards, and the ways out where nothing does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from mpsearch.allocate import uniform
from mpsearch.architecture import Architecture, load_config, read_architecture
from mpsearch.budget import GIB, RUNTIMES, DeviceBudget, Workload
from mpsearch.devices import catalogue
from mpsearch.errors import InfeasibleError, UsageError
from mpsearch.export import export
from mpsearch.fit import (
    bits_allowed,
    fit_json,
    kept_parts,
    resident_bytes,
    search_budget_bytes,
    shortfall,
    smallest_devices,
    uniform_fits,
    unserved,
)
from mpsearch.models import Model
from mpsearch.sizes import format_size
from mpsearch.space import ResolvedSpace, SearchSpace
from mpsearch.space_json import from_json, to_json

EIGHT_B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 131072, "tie_word_embeddings": False,
}  # fmt: skip
TIGHT = """
version: 1
target: compressed-tensors
formats: [int4-g128, int8-g128]
"""


def architecture(**changes: Any) -> Architecture:
    return read_architecture({**EIGHT_B, **changes}, "Llama 3.1 8B")


def budget(
    memory_bytes: int, context: int = 8192, batch: int = 1, runtime: str = "vllm"
) -> DeviceBudget:
    found = RUNTIMES[runtime]
    return DeviceBudget(
        architecture(), "a card", memory_bytes, found, Workload(context, batch, found.kv[0])
    )


def space(text: str = TIGHT) -> ResolvedSpace:
    return SearchSpace.parse(text, "a test").resolve(architecture())


def test_uniform_formats_fit_up_to_what_is_left() -> None:
    eleven = budget(11 * GIB)
    rows = {row.format: row for row in uniform_fits(space(), eleven)}
    # 6.979e9 weights at 4 bits and a scale of 16 for 128, and two tables of 525e6 in bf16.
    assert rows["int4-g128"].weights_bytes == pytest.approx(6.979e9 * 4.125 / 8 + 2.101e9, rel=1e-3)
    assert rows["int4-g128"].bits_per_weight == pytest.approx(4.125, rel=1e-5)
    assert rows["int4-g128"].fits
    assert not rows["int8-g128"].fits
    for row in rows.values():
        assert row.spare_bytes == eleven.left_bytes - row.weights_bytes
    assert rows["int4-g128"].context > 8192
    assert 0 < rows["int8-g128"].context < 8192
    assert not any(row.context for row in uniform_fits(space(), budget(5 * GIB)))


def test_the_bits_that_there_is_room_for_are_those_of_what_is_left() -> None:
    eleven, resolved = budget(11 * GIB), space()
    bits = bits_allowed(resolved, eleven)
    assert 4.125 < bits < 8.125
    room = resolved.kept_bytes + bits * resolved.weights / 8
    assert room == pytest.approx(eleven.left_bytes)
    assert bits_allowed(resolved, budget(2 * GIB)) == 0


def test_kept_weights_are_the_embedding_the_head_and_the_rest() -> None:
    twelve = budget(12 * GIB)
    table_bytes = 128256 * 4096 * 2
    norms_bytes = 65 * 4096 * 2
    assert kept_parts(space(), twelve) == {
        "embedding": table_bytes, "head": table_bytes, "other": norms_bytes,
    }  # fmt: skip
    given = space(TIGHT + "embedding: [int8-channel-unpacked]\nhead: [int8-g128]\n")
    assert kept_parts(given, twelve) == {"embedding": 0, "head": 0, "other": norms_bytes}


def test_transformers_unpacks_so_that_every_format_takes_bf16() -> None:
    resolved = space()
    rows = uniform_fits(resolved, budget(24 * GIB, runtime="transformers"))
    assert {row.weights_bytes for row in rows} == {architecture().parameters * 2}
    stored = resolved.stored_bytes(resolved.smallest)
    assert resident_bytes(resolved, stored, RUNTIMES["vllm"]) == stored


def test_weights_take_what_a_real_export_stores(
    tiny: Model, tiny_folder: Path, tmp_path: Path
) -> None:
    told = read_architecture(load_config(str(tiny_folder)), "tiny")
    resolved = SearchSpace.default().resolve(told)
    for name, assignment in uniform(resolved).items():
        out = export(tiny, assignment, out=tmp_path / name)
        with safe_open(out / "model.safetensors", "pt") as file:
            stored = sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118
        size_bytes = resolved.stored_bytes(assignment)
        assert resident_bytes(resolved, size_bytes, RUNTIMES["vllm"]) == stored


def test_the_smallest_cards_hold_the_weights_and_smaller_ones_do_not() -> None:
    weights_bytes = 5 * GIB
    found = smallest_devices(budget(0), weights_bytes, most=2)
    assert len(found) == 2
    held = [
        replace(budget(0), memory_bytes=device.usable_bytes).left_bytes >= weights_bytes
        for device in catalogue()
    ]
    assert held == sorted(held)  # the catalogue is in the order of usable memory
    able = [d for d, holds in zip(catalogue(), held, strict=True) if holds and not d.unified]
    assert found == able[:2]
    assert smallest_devices(budget(0), 10**13) == []


def test_a_search_may_spend_what_is_left() -> None:
    assert search_budget_bytes(space(), budget(12 * GIB)) == budget(12 * GIB).left_bytes


def test_no_search_is_worth_it_where_weights_are_unpacked() -> None:
    with pytest.raises(UsageError, match="all assignments take the same memory"):
        search_budget_bytes(space(), budget(40 * GIB, runtime="transformers"))
    message = shortfall(space(), budget(12 * GIB, runtime="transformers"))
    assert "more: weights 14.96 GiB" in message
    assert "quantize the embedding" not in message and "allow " not in message


def test_a_smaller_format_is_one_that_the_runtime_takes() -> None:
    asked = budget(6 * GIB, context=64)
    assert "allow int" not in shortfall(space(), asked)  # 3 bits and fewer would be enough
    able = replace(asked, runtime=replace(asked.runtime, bits=(2, 3, 4, 8)))
    assert "allow int2" in shortfall(space(), able)


def test_a_shortfall_names_the_terms_and_the_three_cheapest_ways_out() -> None:
    resolved = space()
    with pytest.raises(InfeasibleError) as caught:
        search_budget_bytes(resolved, budget(8 * GIB, context=16384, batch=1))
    message = str(caught.value)
    assert message == shortfall(resolved, budget(8 * GIB, context=16384, batch=1))
    assert message.startswith("a card has 8.00 GiB and the smallest assignment needs ")
    named = message.partition(" more: ")[2].partition(". Ways out: ")[0].split(", ")
    assert [part.rsplit(" ", 2)[0] for part in named] == [
        "weights", "kv cache", "runtime", "unused", "logits", "activation",
    ]  # fmt: skip
    ways = message.partition("Ways out: ")[2].split("; ")
    assert len(ways) == 3


def test_what_helps_but_not_enough_is_named_as_that() -> None:
    message = shortfall(space(), budget(6 * GIB, context=32768))
    ways = missing(message)
    assert len(ways) == 2
    assert "--kv fp8 helps (saves 2.00 GiB)" in ways
    alone = replace(budget(6 * GIB, context=32768), workload=Workload(32768, 1, "fp8"))
    assert space().stored_bytes(space().smallest) > alone.left_bytes


def test_no_card_is_named_that_the_runtime_does_not_run_on() -> None:
    for runtime, unified in (("vllm", False), ("transformers", True)):
        found = smallest_devices(budget(0, runtime=runtime), 2**20, most=500)
        assert any(device.unified for device in found) == unified


def missing(message: str) -> list[str]:
    return message.partition("Ways out: ")[2].split("; ")


def test_every_way_out_is_one() -> None:
    """Each is applied, and the smallest assignment fits then."""
    resolved = space()
    asked = budget(8 * GIB, context=2700, batch=2)
    ways = missing(shortfall(resolved, asked))
    smallest = resolved.stored_bytes(resolved.smallest)
    assert smallest > asked.left_bytes
    assert [way.split(" ")[0] for way in ways] == ["--kv", "--context", "--batch"]
    for way in ways:
        flag, value = way.split(" ")[:2]
        key = flag.removeprefix("--")
        changed: Any = {key: value if key == "kv" else int(value)}
        eased = replace(asked, workload=replace(asked.workload, **changed))
        assert smallest <= eased.left_bytes, way


def test_the_embedding_is_a_way_out_where_the_runtime_takes_it_quantized() -> None:
    gguf = "version: 1\ntarget: gguf\nformats: [q4_0, q8_0]\n"
    asked = budget(7 * GIB + GIB // 4, context=2700, runtime="llama.cpp")
    ways = missing(shortfall(space(gguf), asked))
    way = next(way for way in ways if way.startswith("quantize the embedding to "))
    given = space(gguf + f"embedding: [{way.split(' ')[4]}]\n")
    smaller = space(gguf).stored_bytes(space(gguf).smallest) - given.stored_bytes(given.smallest)
    assert f"saves {format_size(smaller)}" in way
    for memory_bytes in (5 * GIB, 6 * GIB, 8 * GIB):
        assert "embedding" not in shortfall(space(), budget(memory_bytes, context=2700))


@pytest.mark.parametrize("of_a_run", [False, True])
def test_formats_of_tables_that_a_runtime_leaves_alone_are_named(of_a_run: bool) -> None:
    given = space(TIGHT + "embedding: [int8-g64-unpacked]\nhead: [int4-g128, bf16]\n")
    if of_a_run:
        given = from_json(to_json(given))
    assert unserved(given, budget(GIB)) == [
        "int8-g64-unpacked of the embedding", "int4-g128 of the head",
    ]  # fmt: skip
    assert unserved(given, budget(GIB, runtime="transformers")) == []


def test_a_smaller_format_and_the_next_card_are_ways_out() -> None:
    resolved = space()
    asked = budget(6 * GIB, context=64)  # not even without context
    ways = missing(shortfall(resolved, asked))
    assert asked.largest_context(resolved.stored_bytes(resolved.smallest)) == 0
    assert not any(way.startswith(("--context", "--batch")) for way in ways)
    card = next(way for way in ways if way.startswith("the next card: "))
    name = card.removeprefix("the next card: ").rpartition(", ")[0]
    device = next(device for device in catalogue() if device.name == name)
    on_it = replace(asked, memory_bytes=device.usable_bytes)
    assert resolved.stored_bytes(resolved.smallest) <= on_it.left_bytes
    allowed = [way for way in ways if way.startswith("allow ")]
    for way in allowed:
        fmt = way.split(" ")[1]
        text = TIGHT.replace("[int4-g128", f"[{fmt}, int4-g128")
        assert space(text).stored_bytes(space(text).smallest) <= asked.left_bytes


def test_json_holds_every_term_and_the_formats() -> None:
    content = fit_json(space(), budget(12 * GIB), None)
    assert content["parameters"] == 8_030_261_248
    assert content["kv_cache_bytes"] == GIB
    for term in ("activation", "logits", "workspace", "runtime", "unused", "left"):
        assert isinstance(content[f"{term}_bytes"], int)
    assert [row["format"] for row in content["formats"]] == ["int4-g128", "int8-g128"]
    assert "pick" not in content
    without = fit_json(space(), budget(0), 5 * GIB)
    assert without["bits_per_weight"] is None
    assert not any(row["fits"] for row in without["formats"])
    assert without["pick"]["context"] is None
    names = [device.name for device in smallest_devices(budget(0), 5 * GIB)]
    assert without["pick"]["devices"] == names


def test_the_pick_of_a_run_has_its_longest_context() -> None:
    content = fit_json(space(), budget(12 * GIB), 6 * GIB)
    assert content["pick"]["weights_bytes"] == 6 * GIB
    assert content["pick"]["context"] == budget(12 * GIB).largest_context(6 * GIB) > 0


def test_the_built_in_model_is_sized_by_its_config_alone() -> None:
    found = read_architecture(load_config("builtin:smollm2-135m"), "builtin")
    assert found.parameters == 134_515_008
