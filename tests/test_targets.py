"""Targets: what one checkpoint can hold, and what its runtimes fuse."""

from __future__ import annotations

import pytest
from conftest import tiny_family

from mpsearch.formats import BF16, FORMATS
from mpsearch.layers import Layer, group_layers
from mpsearch.space import SearchSpace
from mpsearch.targets import TARGETS


@pytest.mark.parametrize(
    ("target", "formats"),
    [
        (
            "compressed-tensors",
            {
                *(
                    f"int{bits}-{groups}{zero}"
                    for bits in (2, 3, 4, 5, 6, 8)
                    for groups in ("g32", "g64", "g128", "channel")
                    for zero in ("", "-asym")
                ),
                *("int8-g64-unpacked", "int8-channel-unpacked", "fp8", "bf16"),
            },
        ),
        (
            "gptq",
            {f"gptq{bits}-g{size}" for bits in (2, 3, 4, 8) for size in (32, 64, 128)} | {"bf16"},
        ),
        ("bitsandbytes", {"nf4", "nf4-dq", "fp4", "fp4-dq", "int8", "bf16"}),
        (
            "vllm",
            {f"int{bits}-{groups}" for bits in (4, 8) for groups in ("g32", "g64", "g128")}
            | {"int4-channel", "int8-channel", "bf16"},
        ),
        ("auto-gptq", {"gptq4-g32", "gptq4-g64", "gptq4-g128"}),
        ("gguf", {"q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "bf16"}),
    ],
)
def test_each_target_holds_its_formats(target: str, formats: set[str]) -> None:
    assert {fmt.name for fmt in TARGETS[target].formats} == formats


def test_targets_by_their_names_and_containers() -> None:
    assert {name: (target.name, target.container) for name, target in TARGETS.items()} == {
        "compressed-tensors": ("compressed-tensors", "compressed-tensors"),
        "vllm": ("vllm", "compressed-tensors"),
        "gptq": ("gptq", "gptq"),
        "auto-gptq": ("auto-gptq", "gptq"),
        "bitsandbytes": ("bitsandbytes", "bitsandbytes"),
        "gguf": ("gguf", "gguf"),
    }


@pytest.mark.parametrize("name", [name for name, fmt in FORMATS.items() if fmt.quantized])
def test_a_quantized_format_is_held_by_targets_of_its_container_alone(name: str) -> None:
    holders = {target.container for target in TARGETS.values() if FORMATS[name] in target.formats}
    assert holders == {FORMATS[name].container}


def test_all_but_auto_gptq_hold_unquantized_weights_beside_others() -> None:
    assert [n for n, target in TARGETS.items() if BF16 not in target.formats] == ["auto-gptq"]


def test_which_mix_quantized_formats() -> None:
    assert [name for name, target in TARGETS.items() if target.mixes] == [
        *("compressed-tensors", "vllm", "gptq", "gguf"),
    ]


@pytest.mark.parametrize(
    ("target", "formats", "wrong"),
    [
        ("vllm", ["int4-g64", "int8-g64", "bf16"], {}),
        ("vllm", ["int4-g64", "int3-g64", "int2-g64"], {"b": "is int3-g64", "c": "is int2-g64"}),
        ("compressed-tensors", ["int4-g64", "int3-g64", "bf16"], {}),
        ("compressed-tensors", ["nf4", "int3-g64", "bf16"], {"a": "is nf4"}),
        ("auto-gptq", ["gptq4-g64", "gptq4-g64", "gptq4-g64"], {}),
        ("auto-gptq", ["gptq4-g64", "bf16", "gptq4-g64"], {"b": "is bf16"}),
        (
            "auto-gptq",
            ["gptq4-g64", "gptq4-g32", "gptq4-g64"],
            {"b": "is gptq4-g32 where others are gptq4-g64"},
        ),
        ("bitsandbytes", ["nf4", "int8", "nf4"], {"b": "is int8 where others are nf4"}),
        ("bitsandbytes", ["nf4", "bf16", "nf4"], {}),
    ],
)
def test_what_a_target_cannot_hold_is_named(
    target: str, formats: list[str], wrong: dict[str, str]
) -> None:
    layers = dict(zip("abc", map(FORMATS.__getitem__, formats), strict=True))
    assert TARGETS[target].misfits(layers) == wrong


def test_an_embedding_and_a_head_are_held_in_fewer_formats() -> None:
    layers = {"a": FORMATS["int4-g64"], "e": FORMATS["int8-g64-unpacked"], "h": BF16}
    assert not TARGETS["compressed-tensors"].misfits(layers, embedding="e", head="h")
    assert TARGETS["vllm"].misfits(layers, embedding="e", head="h") == {"e": "is int8-g64-unpacked"}
    quantized = {"a": FORMATS["int4-g64"], "h": FORMATS["int4-g64"]}
    assert not TARGETS["vllm"].misfits(quantized)
    assert TARGETS["vllm"].misfits(quantized, head="h") == {"h": "is int4-g64"}


def test_heads_and_embeddings_get_what_a_loader_was_seen_to_take() -> None:
    """What tests/export reloads, and no more."""
    unpacked = {"int8-g64-unpacked", "int8-channel-unpacked", "fp8", "bf16"}
    held = {
        name: (
            {fmt.name for fmt in target.head_formats},
            {fmt.name for fmt in target.embedding_formats},
        )
        for name, target in TARGETS.items()
    }
    assert held == {
        "compressed-tensors": (
            {fmt.name for fmt in TARGETS["compressed-tensors"].formats},
            unpacked,
        ),
        "gptq": ({fmt.name for fmt in TARGETS["gptq"].formats}, set()),
        "vllm": (set(), set()),
        "auto-gptq": (set(), set()),
        "bitsandbytes": ({fmt.name for fmt in TARGETS["bitsandbytes"].formats}, set()),
        "gguf": ({fmt.name for fmt in TARGETS["gguf"].formats},) * 2,
    }


@pytest.mark.parametrize(
    "target",
    [target for target in TARGETS.values() if target.container != "gguf"],
    ids=lambda target: target.name,
)
def test_runtimes_fuse_query_key_value_and_gate_up(target: object) -> None:
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    layers = [Layer(f"m.0.{name}", 2, 2) for name in names]
    assert [group.name for group in group_layers(layers, target.fused)] == [  # type: ignore[attr-defined]
        "m.0.q_proj+k_proj+v_proj",
        "m.0.o_proj",
        "m.0.gate_proj+up_proj",
        "m.0.down_proj",
    ]


def test_llama_cpp_fuses_nothing_and_wants_norms_in_float32() -> None:
    assert TARGETS["gguf"].fused == ()
    assert [name for name, target in TARGETS.items() if target.float32_vectors] == ["gguf"]


def test_the_table_of_targets_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        del TARGETS["bitsandbytes"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
def test_runtimes_run_the_experts_of_a_block_as_one(target: object) -> None:
    assert target.fuses_experts  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("family", "groups"),
    [
        ("phi3", ["self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj"]),
        ("gpt2", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
        (
            "gpt_neox",
            [
                *("attention.query_key_value", "attention.dense"),
                *("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
            ],
        ),
        ("mixtral", ["self_attn.q_proj+k_proj+v_proj", "self_attn.o_proj", "mlp.experts"]),
        (
            "qwen2_moe",
            [
                *("self_attn.q_proj+k_proj+v_proj", "self_attn.o_proj", "mlp.experts"),
                *("mlp.shared_expert.gate_proj+up_proj", "mlp.shared_expert.down_proj"),
            ],
        ),
        *(
            (
                family,
                [
                    *("self_attn.q_proj+k_proj+v_proj", "self_attn.o_proj"),
                    *("mlp.gate_proj+up_proj", "mlp.down_proj"),
                ],
            )
            for family in ("llama", "mistral", "qwen2", "qwen3", "gemma")
        ),
    ],
)
def test_groups_of_a_block_by_family(family: str, groups: list[str]) -> None:
    resolved = SearchSpace.default().resolve(tiny_family(family))
    assert [group.kind for group in resolved.groups] == groups * 2
