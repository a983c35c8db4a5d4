"""A search space as a file: what it says, and every fault a line."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_space import HEAD, fault, formats, llama_like, parse, rule, version

from mpsearch.errors import SpaceError
from mpsearch.space import Rule, SearchSpace
from mpsearch.targets import TARGETS

KEYS = "version, target, formats, rules, embedding, head, tie"
NO_LIST = "must be a list with at least one entry"


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
