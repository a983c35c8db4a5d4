"""A tokenizer in a GGUF file: read back it gives the same ids, and what would not is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from byte_level import ROWS, SPECIAL, TEMPLATE, TEXTS, byte_level
from conftest import build_tokenizer
from gguf import GGUFReader, GGUFWriter, TokenType
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mpsearch.errors import UsageError
from mpsearch.export.gguf_tokenizer import tokenizer_fields

WAYS = ("gpt-2", "smollm", "llama-bpe", "qwen2", "tekken")


def written(tokenizer: Any, folder: Path) -> Path:
    """A GGUF file that holds a tokenizer and no tensors."""
    writer = GGUFWriter(folder / "model.gguf", "llama")
    tokenizer_fields(tokenizer, ROWS).add_to(writer)
    writer.add_vocab_size(ROWS)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return folder / "model.gguf"


def changed(**parts: Any) -> PreTrainedTokenizerFast:
    """The tokenizer with parts of its tokenizer.json replaced."""
    content = json.loads(byte_level().backend_tokenizer.to_str())
    content["model"] |= parts.pop("model", {})
    content |= parts
    backend = Tokenizer.from_str(json.dumps(content))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")


def state(part: Any) -> Any:
    return json.loads(part.__getstate__())


@pytest.mark.parametrize("pre", WAYS)
def test_the_way_to_cut_text_is_found(pre: str) -> None:
    assert tokenizer_fields(byte_level(pre), ROWS).pre == pre


# transformers (5.23) knows nothing of 'smollm' and cuts as GPT-2 does; digits are apart there.
@pytest.mark.parametrize("pre", [pre for pre in WAYS if pre != "smollm"])
def test_transformers_reads_the_same_ids_from_the_file_alone(pre: str, tmp_path: Path) -> None:
    tokenizer = byte_level(pre)
    written(tokenizer, tmp_path)
    read = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    lengths = set()
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert read(text)["input_ids"] == ids
        assert read.decode(ids) == tokenizer.decode(ids)
        lengths.add(len(ids))
    assert len(lengths) > 1
    for name in ("bos", "eos", "unk"):
        assert getattr(read, f"{name}_token_id") == getattr(tokenizer, f"{name}_token_id")
    assert read.chat_template == TEMPLATE


def test_the_ways_to_cut_text_differ_on_the_texts_of_these_tests() -> None:
    cut = {
        pre: tuple(
            tuple(word for word, _ in byte_level(pre).backend_tokenizer.pre_tokenizer
                  .pre_tokenize_str(text))
            for text in TEXTS
        )
        for pre in WAYS
    }  # fmt: skip
    assert len(set(cut.values())) == len(WAYS)


def test_every_id_has_a_token_of_its_kind() -> None:
    tokenizer = byte_level()
    fields = tokenizer_fields(tokenizer, ROWS)
    assert len(fields.tokens) == len(fields.types) == ROWS
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    for number, (token, kind) in enumerate(zip(fields.tokens, fields.types, strict=True)):
        if number not in by_id:
            assert (token, kind) == (f"[PAD{number}]", TokenType.UNUSED)
        elif token in SPECIAL:
            assert kind == TokenType.CONTROL
        else:
            assert kind == (TokenType.USER_DEFINED if token == "<think>" else TokenType.NORMAL)
        assert by_id.get(number, token) == token
    assert TokenType.UNUSED in fields.types and TokenType.USER_DEFINED in fields.types
    assert fields.special == {"bos": 1, "eos": 2, "unk": 0}
    assert (fields.add_bos, fields.add_eos) == (False, False)
    first, second = fields.merges[0].split(" ")
    assert first + second in fields.tokens


@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, True), (True, True)])
def test_tokens_that_every_text_gets_are_stated(bos: bool, eos: bool, tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(byte_level())
    single = ["<|im_start|>"] * bos + ["$A"] + ["<|im_end|>"] * eos
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join(single), special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    fields = tokenizer_fields(tokenizer, ROWS)
    assert (fields.add_bos, fields.add_eos) == (bos, eos)
    written(tokenizer, tmp_path)
    read = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert read(TEXTS[0])["input_ids"] == tokenizer(TEXTS[0])["input_ids"]


def test_named_chat_templates_stand_beside_the_usual_one(tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(byte_level())
    tokenizer.chat_template = {"default": TEMPLATE, "tool_use": "{{ tools }}"}
    fields = GGUFReader(written(tokenizer, tmp_path)).fields
    assert fields["tokenizer.chat_template"].contents() == TEMPLATE
    assert fields["tokenizer.chat_template.tool_use"].contents() == "{{ tools }}"
    tokenizer.chat_template = None
    (tmp_path / "none").mkdir()
    assert "tokenizer.chat_template" not in GGUFReader(written(tokenizer, tmp_path / "none")).fields


PREFIXED = state(pre_tokenizers.ByteLevel(add_prefix_space=True))
SPACES = state(pre_tokenizers.Split(" ", behavior="isolated"))
SPLIT = {"type": "Sequence", "pretokenizers": [
    SPACES, state(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
]}  # fmt: skip
DIGITS = {"type": "Sequence", "pretokenizers": [
    state(pre_tokenizers.Digits(individual_digits=False)),
    state(pre_tokenizers.ByteLevel(add_prefix_space=False)),
]}  # fmt: skip


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"pre_tokenizer": PREFIXED}, "cuts or normalizes text in a way of its own"),
        ({"pre_tokenizer": SPLIT}, "cuts or normalizes text in a way of its own"),
        ({"pre_tokenizer": DIGITS}, "cuts or normalizes text in a way of its own"),
        ({"normalizer": state(normalizers.Lowercase())}, "cuts or normalizes text in a way"),
        ({"pre_tokenizer": None}, "is no byte-level BPE"),
        ({"model": {"byte_fallback": True}}, "is no byte-level BPE"),
        ({"model": {"ignore_merges": True}}, "as 'gpt-2' does but has ignore_merges True"),
    ],
)
def test_what_llama_cpp_would_cut_otherwise_is_refused(parts: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        tokenizer_fields(changed(**parts), ROWS)
    assert str(caught.value).endswith("gpt-2, smollm, llama-bpe, qwen2, tekken do")
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_is_no_bpe_is_refused() -> None:
    with pytest.raises(UsageError, match=r"is no byte-level BPE \(WordLevel, WhitespaceSplit"):
        tokenizer_fields(build_tokenizer(), ROWS)


def test_more_tokens_than_rows_are_refused() -> None:
    with pytest.raises(UsageError, match="where the embedding has 100 rows"):
        tokenizer_fields(byte_level(), 100)


def test_a_token_that_takes_the_blank_before_it_is_refused() -> None:
    tokenizer = copy.deepcopy(byte_level())
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True)])
    with pytest.raises(UsageError, match="has a token '<mask>' with lstrip"):
        tokenizer_fields(tokenizer, ROWS)


def test_other_additions_than_bos_and_eos_are_refused() -> None:
    tokenizer = copy.deepcopy(byte_level())
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    with pytest.raises(UsageError, match="more than bos and eos"):
        tokenizer_fields(tokenizer, ROWS)
