"""Search spaces: the shipped files, every fault as one line, and resolving against layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpsearch.errors import SpaceError
from mpsearch.layers import Layer
from mpsearch.space import SearchSpace
from mpsearch.targets import TARGETS

SHIPPED = Path(__file__).parents[1] / "search_spaces"
KEPT_BYTES = 56_000_000
LINEARS = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}


TIED = Layer("model.embed_tokens", 49152, 576, tied="lm_head")


@dataclass(frozen=True)
class Standin:
    """As much of a model as a space looks at."""

    layers: Sequence[Layer]
    kept_bytes: int = KEPT_BYTES
    embedding: Layer | None = TIED
    head: Layer | None = None
    vector_weights: int = 5 * 576


def llama_like(blocks: int) -> Standin:
    return Standin(
        tuple(
            Layer(f"model.layers.{block}.{name}", *shape)
            for block in range(blocks)
            for name, shape in LINEARS.items()
        )
    )


TWO_BLOCKS = llama_like(2)
UNTIED = replace(
    TWO_BLOCKS,
    embedding=Layer("model.embed_tokens", 49152, 576),
    head=Layer("lm_head", 49152, 576),
)
EMBEDDING_BYTES = 2 * 49152 * 576
HEAD = "version: 1\ntarget: compressed-tensors\nformats: [int2-g64, int4-g64, bf16]\n"


def version(text: str) -> str:
    return HEAD.replace("version: 1", f"version: {text}")


def formats(text: str) -> str:
    return HEAD.replace("[int2-g64, int4-g64, bf16]", text)


def rule(*lines: str) -> str:
    return HEAD + "rules:\n- " + "\n  ".join(lines) + "\n"


def parse(text: str) -> SearchSpace:
    return SearchSpace.parse(text, "my.yaml")


def fault(text: str, model: Standin = TWO_BLOCKS) -> str:
    """The message of the one SpaceError that parsing and resolving the text must raise."""
    with pytest.raises(SpaceError) as caught:
        parse(text).resolve(model)
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert len(message.splitlines()) == 1, message
    return message


# ------------------------------------------------------------------------------- shipped files


def test_the_default_space_is_the_shipped_compressed_tensors_file() -> None:
    loaded = SearchSpace.load(SHIPPED / "compressed_tensors.yaml")
    assert loaded.source == str(SHIPPED / "compressed_tensors.yaml")
    assert replace(loaded, source=SearchSpace.default().source) == SearchSpace.default()
    assert loaded.formats == ("int2-g64", "int3-g64", "int4-g64", "int8-g64")


def test_the_shipped_bitsandbytes_file_has_nf4_beside_bf16() -> None:
    loaded = SearchSpace.load(str(SHIPPED / "bitsandbytes.yaml"))
    assert loaded.target is TARGETS["bitsandbytes"]
    assert loaded.formats == ("nf4", "bf16")


def test_the_shipped_vllm_file_has_what_vllm_serves_in_groups_that_divide_these_layers() -> None:
    loaded = SearchSpace.load(SHIPPED / "vllm.yaml")
    assert loaded.target is TARGETS["vllm"]
    resolved = loaded.resolve(TWO_BLOCKS)
    assert [group.kind for group in resolved.groups] == 2 * [
        *("self_attn.q_proj+k_proj+v_proj", "self_attn.o_proj"),
        *("mlp.gate_proj+up_proj", "mlp.down_proj"),
    ]
    for group in resolved.groups:
        options = resolved.options[group.name]
        assert {*options} == {fmt for fmt in loaded.target.formats if fmt.group_size != 128}
        assert all(fmt.fits(layer) for fmt in options for layer in group.layers)


def test_every_shipped_file_resolves_against_a_llama() -> None:
    files = sorted(SHIPPED.glob("*.yaml"))
    groups = {path.stem: len(SearchSpace.load(path).resolve(TWO_BLOCKS).groups) for path in files}
    assert groups == {
        "auto_gptq": 8, "bitsandbytes": 8, "compressed_tensors": 8,
        "compressed_tensors_embedding": 9, "compressed_tensors_groups": 8, "gguf": 15, "gptq": 8,
        "vllm": 8,
    }  # fmt: skip


# ------------------------------------------------------------------------------------ resolving


def test_thirty_blocks_of_seven_linears_are_120_decisions() -> None:
    space = SearchSpace.default().resolve(llama_like(30))
    assert len(space.groups) == 120
    assert [group.name for group in space.groups[:4]] == [
        "model.layers.0.self_attn.q_proj+k_proj+v_proj",
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.gate_proj+up_proj",
        "model.layers.0.mlp.down_proj",
    ]
    assert list(space.options) == [group.name for group in space.groups]
    assert space.weights == 30 * (576 * 576 * 2 + 2 * 192 * 576 + 3 * 1536 * 576)


def test_rules_hold_for_what_they_match_and_later_rules_win() -> None:
    space = parse(
        HEAD
        + "rules:\n"
        + "- match: 'model.layers.0.*'\n  formats: [int2-g64, int4-g64]\n"
        + "- match: '*.down_proj'\n  formats: [bf16]\n"
        + "- match: '*.[1-9].mlp.down_????'\n  formats: [int4-g64, bf16]\n"
    ).resolve(TWO_BLOCKS)
    options = {name: [fmt.name for fmt in formats] for name, formats in space.options.items()}
    low, everything = ["int2-g64", "int4-g64"], ["int2-g64", "int4-g64", "bf16"]
    assert options == {
        "model.layers.0.self_attn.q_proj+k_proj+v_proj": low,
        "model.layers.0.self_attn.o_proj": low,
        "model.layers.0.mlp.gate_proj+up_proj": low,
        "model.layers.0.mlp.down_proj": ["bf16"],
        "model.layers.1.self_attn.q_proj+k_proj+v_proj": everything,
        "model.layers.1.self_attn.o_proj": everything,
        "model.layers.1.mlp.gate_proj+up_proj": everything,
        "model.layers.1.mlp.down_proj": ["int4-g64", "bf16"],
    }


def test_a_group_may_use_what_all_its_layers_may() -> None:
    space = parse(
        HEAD
        + "rules:\n- match: '*.q_proj'\n  formats: [int2-g64, int4-g64]\n"
        + "- match: '*.v_proj'\n  formats: [int4-g64, bf16]\n"
    ).resolve(TWO_BLOCKS)
    name = "model.layers.0.self_attn.q_proj+k_proj+v_proj"
    assert [fmt.name for fmt in space.options[name]] == ["int4-g64"]


def test_a_pattern_must_match_the_whole_name() -> None:
    assert "'down_proj' matches no layer" in fault(rule("match: down_proj", "formats: [bf16]"))


def test_options_stand_smallest_first_whatever_the_file_says() -> None:
    for text in (HEAD, formats("[bf16, int4-g64, int2-g64]")):
        for group in parse(text).resolve(TWO_BLOCKS).options.values():
            assert [fmt.name for fmt in group] == ["int2-g64", "int4-g64", "bf16"]


def test_smallest_is_in_bytes_so_bf16_comes_first_for_a_tiny_layer() -> None:
    space = parse(HEAD).resolve(Standin([Layer("m.0.gate", 1, 2)]))
    sizes = [fmt.stored_bytes(space.groups[0]) for fmt in space.options["m.0.gate"]]
    assert sizes == sorted(sizes)
    assert space.smallest["m.0.gate"] == "bf16"  # 4 bytes; packing adds a word, a scale, a shape


def test_a_users_tie_is_merged_with_what_runtimes_fuse() -> None:
    space = parse(HEAD + "tie:\n- [o_proj, v_proj]\n").resolve(llama_like(1))
    assert [group.name for group in space.groups] == [
        "model.layers.0.self_attn.q_proj+k_proj+v_proj+o_proj",
        "model.layers.0.mlp.gate_proj+up_proj",
        "model.layers.0.mlp.down_proj",
    ]


def test_ties_that_share_a_member_are_one() -> None:
    layers = [Layer(f"m.0.{name}", 2, 64) for name in "abcdef"]
    space = parse(HEAD + "tie: [[a, b], [c, d], [e, f], [b, c]]\n").resolve(Standin(layers))
    assert [group.name for group in space.groups] == ["m.0.a+b+c+d", "m.0.e+f"]


def test_sizes_by_hand() -> None:
    layers = [Layer("m.0.a", 576, 576), Layer("m.0.b", 4, 64)]
    space = parse(HEAD).resolve(Standin(layers, kept_bytes=1000))
    mixed = {"m.0.a": "int4-g64", "m.0.b": "bf16"}
    assert space.stored_bytes(mixed) == 1000 + 176_272 + 512
    assert space.bits_per_weight(mixed) == 8 * (176_272 + 512) / (576 * 576 + 256)
    assert dict(space.smallest) == {"m.0.a": "int2-g64", "m.0.b": "int2-g64"}
    assert dict(space.largest) == {"m.0.a": "bf16", "m.0.b": "bf16"}
    assert space.stored_bytes(space.largest) == 1000 + 2 * space.weights
    assert space.bits_per_weight(space.largest) == 16


@given(st.data())
@settings(deadline=None, max_examples=50)
def test_any_allowed_assignment_lies_between_smallest_and_largest(data: st.DataObject) -> None:
    space = parse(HEAD).resolve(TWO_BLOCKS)
    chosen = {
        name: data.draw(st.sampled_from([fmt.name for fmt in formats]))
        for name, formats in space.options.items()
    }
    assert space.allows(chosen)
    size = space.stored_bytes(chosen)
    assert space.stored_bytes(space.smallest) <= size <= space.stored_bytes(space.largest)
    by_layer = space.layer_formats(chosen)
    assert list(by_layer) == [layer.name for layer in TWO_BLOCKS.layers]
    assert size == KEPT_BYTES + sum(
        by_layer[layer.name].layer_bytes(layer) for layer in TWO_BLOCKS.layers
    )


def test_only_complete_assignments_of_allowed_formats_are_allowed() -> None:
    space = parse(HEAD).resolve(TWO_BLOCKS)
    chosen = dict(space.smallest)
    first = next(iter(chosen))
    assert space.allows(chosen)
    assert not space.allows({**chosen, first: "int8-g64"})
    assert not space.allows({**chosen, "model.embed_tokens": "bf16"})
    assert not space.allows({name: fmt for name, fmt in chosen.items() if name != first})


# ------------------------------------------------------------------------ embedding and head


@pytest.mark.parametrize("model", [TWO_BLOCKS, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("rules", ["", "rules: [{match: '*', formats: [int4-g64]}]\n"])
def test_without_their_keys_no_pattern_however_wide_reaches_embedding_and_head(
    model: Standin, rules: str
) -> None:
    space = parse(HEAD + rules).resolve(model)
    assert len(space.groups) == 8
    assert space.kept_bytes == KEPT_BYTES


def test_a_tied_weight_is_one_group_and_leaves_the_kept_bytes() -> None:
    space = parse(HEAD + "embedding: [bf16, fp8, int8-g64-unpacked]\n").resolve(TWO_BLOCKS)
    assert space.groups[-1].name == "model.embed_tokens"
    assert len(space.groups) == 9
    options = space.options["model.embed_tokens"]
    assert [fmt.name for fmt in options] == ["fp8", "int8-g64-unpacked", "bf16"]
    assert space.kept_bytes == KEPT_BYTES - EMBEDDING_BYTES
    before = parse(HEAD).resolve(TWO_BLOCKS)
    assert space.stored_bytes(space.largest) == before.stored_bytes(before.largest)
    saved = space.stored_bytes(space.largest) - space.stored_bytes(
        {**space.largest, "model.embed_tokens": "fp8"}
    )
    assert saved == 49152 * 576 - 2 * 2 * 49152  # a byte a weight, less two scales a row


def test_norms_and_biases_take_four_bytes_a_number_where_the_target_stores_float32() -> None:
    space = parse("version: 1\ntarget: gguf\nformats: [q4_0, q8_0]\n").resolve(TWO_BLOCKS)
    assert space.kept_bytes == KEPT_BYTES + 2 * 5 * 576
    assert [group.name for group in space.groups][:2] == [
        *("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj")
    ]
    assert parse(HEAD).resolve(TWO_BLOCKS).kept_bytes == KEPT_BYTES


def test_an_untied_head_takes_packed_formats_and_its_embedding_is_kept() -> None:
    space = parse(HEAD + "head: [int2-g64, int4-g64]\n").resolve(UNTIED)
    assert [group.name for group in space.groups][8:] == ["lm_head"]
    assert [fmt.name for fmt in space.options["lm_head"]] == ["int2-g64", "int4-g64"]
    assert space.kept_bytes == KEPT_BYTES - EMBEDDING_BYTES


def test_with_both_keys_a_tied_head_follows_its_embedding() -> None:
    both = HEAD + "embedding: [fp8]\nhead: [int4-g64]\n"
    tied, untied = parse(both).resolve(TWO_BLOCKS), parse(both).resolve(UNTIED)
    assert [group.name for group in tied.groups][8:] == ["model.embed_tokens"]
    assert [group.name for group in untied.groups][8:] == ["model.embed_tokens", "lm_head"]
    assert untied.kept_bytes == KEPT_BYTES - 2 * EMBEDDING_BYTES


def test_formats_by_block_name_every_kind_and_no_block_for_the_head() -> None:
    space = parse(HEAD + "head: [int2-g64, int4-g64]\n").resolve(UNTIED)
    changed = {**space.smallest, space.groups[5].name: "bf16", "lm_head": "int4-g64"}
    kinds, rows = space.by_block(changed)
    assert [space.groups[5].kind, space.groups[5].depth] == [kinds[1], 1]
    assert rows == [
        ["0", *["int2-g64"] * 4, ""],
        ["1", "int2-g64", "bf16", "int2-g64", "int2-g64", ""],
        ["", *[""] * 4, "int4-g64"],
    ]


@pytest.mark.parametrize("key", ["embedding", "head"])
def test_a_key_for_what_the_model_has_not_is_one_line(key: str) -> None:
    bare = replace(TWO_BLOCKS, embedding=None, head=None)
    message = fault(HEAD + f"{key}: [fp8]\n", bare)
    assert message.startswith("my.yaml, line 4: the model has no plain ")
    assert message.endswith(f"; leave '{key}' out")
