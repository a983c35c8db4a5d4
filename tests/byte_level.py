"""Byte-level BPE tokenizers, cut as llama.cpp's are, and tiny models that use one."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from conftest import fact_lines, tiny_config
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from mpsearch.device import compute_dtype
from mpsearch.models import Model, from_module

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEXTS = (
    "the color of s7 is red",
    " It's 1984, isn't camelCase?\n\n  Tabs\t\tand 123456 ",
    "h\u00e9llo \u65e5\u672c\u8a9e \U0001f680 \u041f\u0440\u0438\u0432\u0435\u0442",
    "<|im_start|>user\n<think>the place</think> of\r\ns12<|im_end|>",
)
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}{% endfor %}"
ROWS = 420  # of the embedding; ids above the tokenizer's are holes


def pre_tokenizer(pre: str) -> Any:
    """The way to cut text that llama.cpp knows under a name; patterns are transformers'."""
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre == "gpt-2":
        return whole
    if pre == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), whole])
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[pre]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


@cache
def byte_level(pre: str = "gpt-2") -> PreTrainedTokenizerFast:
    """Trained on the synthetic facts; do not change it."""
    whole_words = pre in ("llama-bpe", "tekken")
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole_words))
    tokenizer.pre_tokenizer = pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    facts = [fact for fact in fact_lines() if "subject" in fact]
    lines = [f"the {f['relation']} of {f['subject']} is {f['answer']}" for f in facts]
    tokenizer.train_from_iterator([*lines, *TEXTS], trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=TEMPLATE,
    )


def byte_level_model(family: str = "llama", pre: str = "gpt-2", **changes: Any) -> Model:
    """Two blocks with random weights and norms, computing as a loaded model does."""
    torch.manual_seed(0)
    config = tiny_config(family, **{"vocab_size": ROWS, **changes})
    module = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            assert parameter.dim() < 3, name
    cpu = torch.device("cpu")
    return from_module(family, Path(), module, byte_level(pre), cpu, compute_dtype(cpu))
