"""Targets: what one checkpoint can hold, and what its runtimes fuse."""

from __future__ import annotations

import pytest

from mpsearch.formats import BF16, FORMATS
from mpsearch.layers import Layer, group_layers
from mpsearch.targets import TARGETS


@pytest.mark.parametrize(
    ("target", "formats"),
    [
        ("compressed-tensors", {"int2-g64", "int3-g64", "int4-g64", "int8-g64", "bf16"}),
        (
            "gptq",
            {f"gptq{bits}-g{size}" for bits in (2, 3, 4, 8) for size in (32, 64, 128)} | {"bf16"},
        ),
        ("bitsandbytes", {"nf4", "int8", "bf16"}),
    ],
)
def test_each_target_holds_its_formats(target: str, formats: set[str]) -> None:
    assert {fmt.name for fmt in TARGETS[target].formats} == formats


def test_there_are_three_targets_by_their_names() -> None:
    assert {name: target.name for name, target in TARGETS.items()} == {
        "compressed-tensors": "compressed-tensors",
        "gptq": "gptq",
        "bitsandbytes": "bitsandbytes",
    }


@pytest.mark.parametrize("name", [name for name, fmt in FORMATS.items() if fmt.quantized])
def test_a_quantized_format_belongs_to_the_one_target_it_names(name: str) -> None:
    holders = [target.name for target in TARGETS.values() if FORMATS[name] in target.formats]
    assert holders == [FORMATS[name].container]


def test_every_target_holds_unquantized_weights() -> None:
    assert all(BF16 in target.formats for target in TARGETS.values())


def test_all_but_bitsandbytes_mix_quantized_formats() -> None:
    assert {name: target.mixes for name, target in TARGETS.items()} == {
        "compressed-tensors": True,
        "gptq": True,
        "bitsandbytes": False,
    }


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
def test_runtimes_fuse_query_key_value_and_gate_up(target: object) -> None:
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    layers = [Layer(f"m.0.{name}", 2, 2) for name in names]
    assert [group.name for group in group_layers(layers, target.fused)] == [  # type: ignore[attr-defined]
        "m.0.q_proj+k_proj+v_proj",
        "m.0.o_proj",
        "m.0.gate_proj+up_proj",
        "m.0.down_proj",
    ]


def test_the_table_of_targets_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        del TARGETS["bitsandbytes"]  # type: ignore[attr-defined]
