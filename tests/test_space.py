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
from mpsearch.space import Rule, SearchSpace
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


KEYS = "version, target, formats, rules, embedding, head, tie"
NO_LIST = "must be a list with at least one entry"


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


# ------------------------------------------------------------------------------------- parsing


def test_a_full_file_is_read_to_the_word() -> None:
    space = parse(
        HEAD
        + "rules: # later rules win\n"
        + "  - match: '*.down_proj'\n"
        + "    formats: [int4-g64]\n"
        + "  - formats: [bf16]\n"
        + "    match: '*.o_proj'\n"
        + "tie:\n"
        + "  - [o_proj, q_proj]\n"
        + "  - [down_proj, gate_proj]\n"
    )
    assert space == SearchSpace(
        TARGETS["compressed-tensors"],
        ("int2-g64", "int4-g64", "bf16"),
        (Rule("*.down_proj", ("int4-g64",), 5), Rule("*.o_proj", ("bf16",), 8)),
        ((("o_proj", "q_proj"), 10), (("down_proj", "gate_proj"), 11)),
        "my.yaml",
    )


@pytest.mark.parametrize("ending", ["", "tie: fused\n", "tie: []\n"])
def test_fused_is_what_a_space_ties_unless_told_more(ending: str) -> None:
    assert parse(HEAD + ending) == parse(HEAD)
    assert parse(HEAD).ties == ()


def test_one_quantized_format_beside_bf16_fits_bitsandbytes() -> None:
    for name in ("nf4", "int8"):
        space = parse(f"version: 1\ntarget: bitsandbytes\nformats: [{name}, bf16]\n")
        assert space.formats == (name, "bf16")


FAULTS = {
    "unknown key": (HEAD + "formts: []\n", "4: unknown key 'formts'; did you mean 'formats'?"),
    "unknown key near nothing": (HEAD + "z: 1\n", f"4: unknown key 'z'; known: {KEYS}"),
    "duplicate key": (HEAD + "\ntarget: x\n", "5: duplicate key 'target'; keep one"),
    "unknown format": (
        formats("[bf16, int4g64]"),
        "3: no format 'int4g64'; did you mean 'int4-g64'?",
    ),
    "unknown format below": (
        formats("\n- bf16\n#\n- nf5"),
        "6: no format 'nf5'; did you mean 'nf4'?",
    ),
    "format of another container": (
        formats("[int2-g64, nf4]"),
        "3: format 'nf4' cannot be stored in a compressed-tensors checkpoint; keep one "
        "container a space",
    ),
    "packed format in bitsandbytes": (
        "formats: [int4-g64]\nversion: 1\ntarget: bitsandbytes\n",
        "1: format 'int4-g64' cannot be stored in a bitsandbytes checkpoint; keep one "
        "container a space",
    ),
    "two quantized formats in bitsandbytes": (
        "version: 1\ntarget: bitsandbytes\nformats: [nf4, bf16, int8]\n",
        "3: one bitsandbytes checkpoint holds one quantized format, and this space has nf4 "
        "and int8; keep one, beside bf16",
    ),
    "unknown target": (
        HEAD.replace("compressed-tensors", "compresed_tensors"),
        "2: no target 'compresed_tensors'; did you mean 'compressed-tensors'?",
    ),
    "no version": (HEAD.replace("version: 1\n", ""), "1: key 'version' is missing"),
    "no target": ("# c\nversion: 1\nformats: [bf16]\n", "2: key 'target' is missing"),
    "no formats": ("version: 1\ntarget: bitsandbytes\n", "1: key 'formats' is missing"),
    "wrong version": ("# c\n" + version("2"), "2: version '2' is not known; use 1"),
    "version of words": (version("true"), "1: version 'true' is not known; use 1"),
    "version a list": (version("[1]"), "1: 'version' must be a plain word"),
    "formats not a list": (formats("bf16"), f"3: 'formats' {NO_LIST}"),
    "formats empty": (formats("[]"), f"3: 'formats' {NO_LIST}"),
    "format not a word": (formats("[[bf16]]"), "3: a format must be a plain word"),
    "a format twice": (formats("[bf16, bf16]"), "3: format 'bf16' stands twice; keep one"),
    "not a mapping": ("- int4-g64\n", f"1: expected keys ({KEYS})"),
    "a key that is no word": ("? [a]\n: 1\n", "1: a key must be a plain word"),
    "rules not a list": (HEAD + "rules: {match: '*'}\n", f"4: 'rules' {NO_LIST}"),
    "rule not a mapping": (rule("bf16"), "5: expected keys (match, formats)"),
    "rule without match": (rule("formats: [bf16]"), "5: a rule needs 'match' and 'formats'"),
    "rule without formats": (rule("match: '*'"), "5: a rule needs 'match' and 'formats'"),
    "unknown key in a rule": (
        rule("match: '*'", "format: [bf16]"),
        "6: unknown key 'format'; did you mean 'formats'?",
    ),
    "duplicate key in a rule": (
        rule("match: '*'", "match: 'a'", "formats: [bf16]"),
        "6: duplicate key 'match'; keep one",
    ),
    "unknown format in a rule": (
        rule("match: '*'", "formats: [bf15]"),
        "6: no format 'bf15'; did you mean 'bf16'?",
    ),
    "rule formats outside formats": (
        rule("match: '*'", "formats: [int8-g64, bf16, int3-g64]"),
        "6: rule allows int3-g64, int8-g64, which 'formats' above does not list",
    ),
    "embedding not a list": (HEAD + "embedding: fp8\n", f"4: 'embedding' {NO_LIST}"),
    "embedding packed": (
        HEAD + "embedding: [fp8, int4-g64]\n",
        "4: format 'int4-g64' cannot be the embedding's in a compressed-tensors checkpoint; use "
        "int8-g64-unpacked, int8-channel-unpacked, fp8, bf16",
    ),
    "embedding where the target has none": (
        "version: 1\ntarget: gptq\nformats: [gptq4-g64]\nembedding: [bf16]\n",
        "4: a gptq checkpoint keeps the embedding in bf16; leave 'embedding' out",
    ),
    "head where the target has none": (
        "version: 1\ntarget: vllm\nformats: [int4-g64]\nhead: [int4-g64]\n",
        "4: a vllm checkpoint keeps the head in bf16; leave 'head' out",
    ),
    "head that is the embedding": (
        HEAD + "head: [int4-g64]\n",
        "4: the model's output head is its embedding; rename 'head' to 'embedding'",
    ),
    "head that is an embedding which the target keeps": (
        "version: 1\ntarget: gptq\nformats: [gptq4-g64]\nhead: [gptq8-g64]\n",
        "4: the model's output head is its embedding; a gptq checkpoint keeps that in bf16, leave "
        "'head' out",
    ),
    "pattern of the embedding": (
        rule("match: '*embed_tokens'", "formats: [bf16]"),
        "5: pattern '*embed_tokens' matches no layer: 'model.embed_tokens' gets formats by the key "
        "'embedding' alone",
    ),
    "pattern of the head that is the embedding": (
        rule("match: lm_head", "formats: [bf16]"),
        "5: pattern 'lm_head' matches no layer: 'model.embed_tokens' gets formats by the key "
        "'embedding' alone",
    ),
    "tie another word": (
        HEAD + "tie: all\n",
        "4: 'tie' is either the word fused or a list of lists of names",
    ),
    "tie a flat list": (HEAD + "tie: [q_proj, k_proj]\n", f"4: a tie {NO_LIST}"),
    "tie with an empty list": (HEAD + "tie:\n- [q_proj, o_proj]\n- []\n", f"6: a tie {NO_LIST}"),
    "tie of no words": (HEAD + "tie:\n- [[q_proj]]\n", "5: a tied name must be a plain word"),
    "two documents": (HEAD + "---\na: 1\n", "4: not YAML: but found another document"),
    "tie that matches nothing": (
        HEAD + "tie:\n- [q_proj, o_proj]\n- [gate_proj, dwn_proj]\n",
        "6: tie 'dwn_proj' matches no layer; did you mean 'down_proj'?",
    ),
    "pattern that matches nothing": (
        rule("match: model.layers.0.mlp.dwn_proj", "formats: [bf16]"),
        "5: pattern 'model.layers.0.mlp.dwn_proj' matches no layer; did you mean "
        "'model.layers.0.mlp.down_proj'?",
    ),
    "tied layers without a common format": (
        rule("match: '*.q_proj'", "formats: [bf16]")
        + "- match: '*.1.*.k_proj'\n  formats: [int2-g64]\n",
        "7: the layers of 'model.layers.1.self_attn.q_proj+k_proj+v_proj' share one format, "
        "and these rules leave none in common; give them the same formats",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_line_with_file_line_and_nearest_word(name: str) -> None:
    text, message = FAULTS[name]
    assert fault(text) == f"my.yaml, line {message}"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (HEAD + "\ttie: fused\n", 4),
        (HEAD + "tie: *nothing\n\n", 4),
        (HEAD + "tie: fused: more\n\n", 4),
        (HEAD + "tie: 'fused\n", 5),  # what is left open is noticed where the file ends
        (HEAD + "tie: [fused\n", 5),
    ],
)
def test_what_is_not_yaml_is_refused_with_its_line(text: str, line: int) -> None:
    assert fault(text).startswith(f"my.yaml, line {line}: not YAML: ")


def test_a_control_character_is_refused() -> None:
    assert fault("version: \x07\n").startswith("my.yaml")


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n"])
def test_an_empty_file_is_refused_with_where_to_start(text: str) -> None:
    assert fault(text) == "my.yaml: the file is empty; start from search_spaces/"


def test_a_mistyped_pattern_is_answered_in_a_line_that_can_be_read() -> None:
    found = fault(rule("match: '*.dwn_proj'", "formats: [bf16]"), llama_like(30))
    assert found.startswith("my.yaml, line 5: pattern '*.dwn_proj' matches no layer")
    assert "down_proj" in found
    assert len(found) < 400, f"{len(found)} characters: it lists every layer of the model"


def test_a_tie_of_names_that_are_never_siblings_is_refused() -> None:
    assert fault(HEAD + "tie:\n- [o_proj, down_proj]\n").startswith("my.yaml, line 5: tie")


@pytest.mark.parametrize(
    "text",
    [
        formats('["bf\\n16"]'),
        version("|\n  1\n"),
        '"a\\nb": 1\n',
        rule('match: "a\\nb"', "formats: [bf16]"),
    ],
    ids=["format", "version", "key", "pattern"],
)
def test_a_word_that_holds_a_line_break_does_not_break_the_line(text: str) -> None:
    assert fault(text).startswith("my.yaml, line ")


words = st.sampled_from(
    ["version", "target", "formats", "rules", "tie", "match", "fused", "1", "bf16", "nf4", "*", "x"]
)
nodes = st.recursive(
    words,
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda parts: f"[{', '.join(parts)}]")
        | st.dictionaries(words, inner, max_size=5).map(
            lambda parts: f"{{{', '.join(f'{key!r}: {value}' for key, value in parts.items())}}}"
        )
    ),
    max_leaves=12,
)


@given(nodes | st.text(max_size=30))
@settings(deadline=None, max_examples=200)
def test_no_text_breaks_the_parser_in_another_way(text: str) -> None:
    try:
        parse(text)
    except SpaceError as error:
        assert str(error).startswith("my.yaml")


def test_a_fault_of_a_loaded_file_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("version: 1\ntarget: x\nformats: [bf16]\n", encoding="utf-8")
    with pytest.raises(SpaceError) as caught:
        SearchSpace.load(path)
    assert str(caught.value).startswith(f"{path}, line 2: no target 'x'")


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin1.yaml").write_bytes("formats: [ä]".encode("latin-1"))
    for name, reason in (
        ("missing.yaml", "No such file or directory"),
        ("", "Is a directory"),
        ("latin1.yaml", "not UTF-8 text"),
    ):
        with pytest.raises(SpaceError) as caught:
            SearchSpace.load(tmp_path / name)
        assert str(caught.value) == f"space file '{tmp_path / name}': {reason}"


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


@pytest.mark.parametrize("key", ["embedding", "head"])
def test_a_key_for_what_the_model_has_not_is_one_line(key: str) -> None:
    bare = replace(TWO_BLOCKS, embedding=None, head=None)
    message = fault(HEAD + f"{key}: [fp8]\n", bare)
    assert message.startswith("my.yaml, line 4: the model has no plain ")
    assert message.endswith(f"; leave '{key}' out")
