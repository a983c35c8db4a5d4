"""A byte-level BPE tokenizer as the metadata of a GGUF file.

llama.cpp has its own code for each way to cut text into words before merging, and finds it by a
name. So a tokenizer is written only if it cuts as one of those does, and is refused otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gguf import GGUFWriter, TokenType

from mpsearch.errors import UsageError

# By llama.cpp's name; source: `llama_vocab::impl::load` and `llm_tokenizer_bpe`.
_SPLITS = {
    "llama-bpe": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "tekken": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
# For these llama.cpp takes a word that is a token as it is, whatever the merges make of it.
_WHOLE_WORDS = ("llama-bpe", "tekken")


@dataclass(frozen=True)
class TokenizerFields:
    """What a GGUF file says of its tokenizer.

    Attributes:
        pre: llama.cpp's name for how text is cut before merging.
        tokens: by id, as many as the embedding has rows.
        types: likewise.
        merges: two tokens with a blank between them, in order of rank.
        special: `bos`, `eos`, `unk` or `pad` to its id.
        add_bos, add_eos: whether every text gets one.
        chat_templates: by name, as text; nothing here runs one.
    """

    pre: str
    tokens: tuple[str, ...]
    types: tuple[TokenType, ...]
    merges: tuple[str, ...]
    special: Mapping[str, int]
    add_bos: bool
    add_eos: bool
    chat_templates: Mapping[str, str]

    def add_to(self, writer: GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        for name, number in self.special.items():
            getattr(writer, f"add_{name}_token_id")(number)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.chat_templates:
            writer.add_chat_template(
                [{"name": name, "template": text} for name, text in self.chat_templates.items()]
            )


def tokenizer_fields(tokenizer: Any, rows: int) -> TokenizerFields:
    """The fields of a fast tokenizer of transformers.

    Args:
        rows: of the embedding; ids without a token get one that nothing makes.
    Raises:
        UsageError: llama.cpp has no tokenizer that gives the same ids.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    bpe = backend["model"]
    pre = _pre_tokenizer(backend)
    if bpe["ignore_merges"] is not (pre in _WHOLE_WORDS):
        raise _fault(f"cuts text as '{pre}' does but has ignore_merges {bpe['ignore_merges']}")
    for added in backend["added_tokens"]:
        if strips := [key for key in ("lstrip", "rstrip", "single_word") if added[key]]:
            raise _fault(f"has a token {added['content']!r} with {strips[0]}")
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    if max(by_id) >= rows:
        raise _fault(f"has a token of id {max(by_id)} where the embedding has {rows} rows")
    kinds = {
        added["id"]: TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        for added in backend["added_tokens"]
    }
    add_bos, add_eos = _additions(tokenizer)
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    templates = tokenizer.chat_template or {}
    return TokenizerFields(
        pre=pre,
        tokens=tuple(by_id.get(number, f"[PAD{number}]") for number in range(rows)),
        types=tuple(
            kinds.get(number, TokenType.NORMAL) if number in by_id else TokenType.UNUSED
            for number in range(rows)
        ),
        merges=tuple(
            merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]
        ),
        special={name: number for name, number in ids.items() if number is not None},
        add_bos=add_bos,
        add_eos=add_eos,
        chat_templates={"default": templates} if isinstance(templates, str) else templates,
    )


def _pre_tokenizer(backend: Mapping[str, Any]) -> str:
    """llama.cpp's name for the way in which a byte-level BPE cuts text."""
    bpe, pre = backend["model"], backend["pre_tokenizer"] or {}
    *before, last = pre.get("pretokenizers", [pre])
    odd = [
        key
        for key in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "dropout")
        if bpe.get(key)
    ]
    if bpe["type"] != "BPE" or last.get("type") != "ByteLevel" or odd:
        raise _fault(f"is no byte-level BPE ({bpe['type']}, {last.get('type')} pre-tokenizer)")
    normalizer = (backend["normalizer"] or {}).get("type", "NFC")  # which llama.cpp leaves out
    found = "" if last["add_prefix_space"] or normalizer != "NFC" else _name(before, last)
    if not found:
        raise _fault("cuts or normalizes text in a way of its own")
    return found


def _name(before: Sequence[Mapping[str, Any]], last: Mapping[str, Any]) -> str:
    if not before and last["use_regex"]:
        return "gpt-2"
    if len(before) != 1:
        return ""
    (first,) = before
    if first["type"] == "Digits" and first["individual_digits"] and last["use_regex"]:
        return "smollm"
    if first["type"] != "Split" or last["use_regex"] or first["invert"]:
        return ""
    pattern = first["pattern"].get("Regex") if first["behavior"] == "Isolated" else None
    return next((name for name, split in _SPLITS.items() if split == pattern), "")


def _additions(tokenizer: Any) -> tuple[bool, bool]:
    """Whether every text gets a token at its beginning, and one at its end."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for bos in (False, True):
        for eos in (False, True):
            before = [tokenizer.bos_token_id] if bos else []
            if whole == [*before, *plain, *([tokenizer.eos_token_id] if eos else [])]:
                return bos, eos
    raise _fault(f"makes {whole} of {plain}, and more than bos and eos")


def _fault(what: str) -> UsageError:
    return UsageError(
        f"the tokenizer {what}, which llama.cpp would read as other tokens; written to GGUF are "
        f"byte-level BPEs that cut text as {', '.join(('gpt-2', 'smollm', *_SPLITS))} do"
    )
