"""What a model reads when it is asked: the prompt, where its answer starts, chat templates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import build_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    PreTrainedTokenizerFast,
)

from mpsearch.errors import ModelError
from mpsearch.facts import FactSet
from mpsearch.models import Model, load_whole
from mpsearch.recall import ask, encode, prompt

# --------------------------------------------------------------------------------- the text


def test_prompt_shows_solved_examples_of_the_relation_then_the_question(
    tiny_facts: FactSet,
) -> None:
    fact = tiny_facts.part("search", ["shape"])[0]
    *examples, question = prompt(tiny_facts, fact, shots=3).split("\n")
    expected = [f"{f.prompt} {f.answer}" for f in tiny_facts.demonstrations("shape", 3)]
    assert len(examples) == 3
    assert examples == expected
    assert question == fact.prompt
    assert all(fact.subject not in example.split() for example in examples)


def test_prompt_has_as_many_examples_as_there_are(tiny_facts: FactSet) -> None:
    fact = tiny_facts.part("search", ["shape"])[0]
    assert prompt(tiny_facts, fact, shots=0) == fact.prompt
    assert prompt(tiny_facts, fact, shots=99).count("\n") == 4


# -------------------------------------------------------------------- where the answer starts


def character_tokenizer(*merges: tuple[str, str], **kwargs: str) -> PreTrainedTokenizerFast:
    """Single characters, and what the merges make of them across any boundary."""
    characters = "abcdefghijklmnopqrstuvwxyz \n"
    tokens = ["<s>", "</s>", *characters, *("".join(merge) for merge in merges)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocabulary, list(merges))), **kwargs
    )


def pieces(tokenizer: PreTrainedTokenizerFast, tokens: tuple[int, ...]) -> list[str]:
    return tokenizer.convert_ids_to_tokens(list(tokens))


def test_the_answer_starts_at_the_space_before_it() -> None:
    tokenizer = character_tokenizer()
    sequence = encode(tokenizer, "it is", " red")
    assert pieces(tokenizer, sequence.tokens[sequence.start :]) == [" ", "r", "e", "d"]


def test_a_token_over_the_boundary_counts_as_the_answers() -> None:
    tokenizer = character_tokenizer(("s", " "), ("s ", "r"))
    sequence = encode(tokenizer, "it is", " red")
    assert pieces(tokenizer, sequence.tokens) == ["i", "t", " ", "i", "s r", "e", "d"]
    assert pieces(tokenizer, sequence.tokens[sequence.start :]) == ["s r", "e", "d"]


def test_a_merge_inside_the_context_does_not_move_the_start() -> None:
    tokenizer = character_tokenizer(("s", " "), ("i", "s"))
    sequence = encode(tokenizer, "is it", " red")
    assert pieces(tokenizer, sequence.tokens) == ["i", "s ", *"it red"]
    assert pieces(tokenizer, sequence.tokens[sequence.start :]) == list(" red")


def test_a_question_that_merges_whole_with_its_answer_is_tokenized_apart() -> None:
    tokenizer = character_tokenizer(("s", " "), ("s ", "r"))
    sequence = encode(tokenizer, "s", " red")
    assert pieces(tokenizer, sequence.tokens) == list("s red")
    assert sequence.start == 1
    merged = encode(tokenizer, "is", " red")
    assert pieces(tokenizer, merged.tokens) == ["i", "s r", "e", "d"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_tokenizer_that_pads_or_cuts_by_itself_does_neither(side: str) -> None:
    plain = encode(character_tokenizer(), "it is", " red")
    tokenizer = character_tokenizer(pad_token="<s>", padding_side=side, truncation_side=side)
    tokenizer.backend_tokenizer.enable_padding(direction=side, length=32)
    tokenizer.backend_tokenizer.enable_truncation(max_length=4, direction=side)
    assert encode(tokenizer, "it is", " red") == plain


@pytest.mark.parametrize("template", ["<s> $A", "$A </s>", "<s> $A </s>", "<s> <s> $A </s> </s>"])
def test_special_tokens_in_front_stay_and_those_behind_go(template: str) -> None:
    tokenizer = character_tokenizer(bos_token="<s>", eos_token="</s>")
    tokenizer.backend_tokenizer.post_processor = processors.processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    sequence = encode(tokenizer, "it is", " red")
    front = template.count("<s>")
    assert pieces(tokenizer, sequence.tokens) == ["<s>"] * front + list("it is red")
    assert sequence.start == front + len("it is")


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("answer", ["red", "rød", "红色"])
def test_byte_level_tokenizers_are_understood_with_and_without_trimmed_offsets(
    trim: bool, answer: str
) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=trim)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    sequence = encode(tokenizer, "the é", f" {answer}")
    decoded = tokenizer.decode(list(sequence.tokens[sequence.start :]))
    context = tokenizer.decode(list(sequence.tokens[: sequence.start]))
    assert (context.rstrip(), decoded.strip()) == ("the é", answer)
    assert len(sequence.tokens) == len(f"the é {answer}".encode())


def test_metaspace_tokenizers_start_the_answer_at_its_own_token() -> None:
    words = ["<unk>", "▁it", "▁is", "▁red"]
    backend = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    sequence = encode(tokenizer, "it is", " red")
    assert pieces(tokenizer, sequence.tokens) == ["▁it", "▁is", "▁red"]
    assert sequence.start == 2


# ------------------------------------------------------------------------------ chat templates

TEMPLATE = (
    "{% for message in messages %}is {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}of the{% endif %} "
)


def test_through_a_chat_template_the_question_is_a_turn_and_the_answer_its_reply(
    tiny: Model, tiny_facts: FactSet
) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    chatting = replace(tiny, tokenizer=tokenizer, chat=True)
    fact = tiny_facts.part("search")[0]
    plain = ask(tiny, tiny_facts, fact, fact.answer, 2)
    asked = ask(chatting, tiny_facts, fact, fact.answer, 2)
    words = tokenizer.convert_ids_to_tokens(list(asked.tokens))
    question = tiny.tokenizer.convert_ids_to_tokens(list(plain.tokens[: plain.start]))
    assert words == ["is", *question, "of", "the", *fact.answer.split()]
    assert words[asked.start :] == fact.answer.split()


def test_special_tokens_are_the_templates_own(tiny: Model, tiny_facts: FactSet) -> None:
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<pad> $A", special_tokens=[("<pad>", 0)]
    )
    fact = tiny_facts.part("search")[0]
    tokenizer.chat_template = TEMPLATE
    begun = replace(tiny, tokenizer=tokenizer)
    assert ask(begun, tiny_facts, fact, fact.answer, 1).tokens[0] == 0
    assert ask(replace(begun, chat=True), tiny_facts, fact, fact.answer, 1).tokens[0] != 0


def test_a_model_without_a_template_is_refused_in_one_line(tiny_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"no chat template.*leave --chat-template away"):
        load_whole(str(tiny_folder), chat_template=True)
