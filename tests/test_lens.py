"""The logit lens: equal to a plain computation from hidden states, exact where blocks agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAMILIES, build_tokenizer, tiny_config, tiny_family, tiny_llama
from test_bank_streamed import FAMILIES as STREAMED
from test_skeleton import CPU, loaded, saved
from torch import nn
from transformers import AutoModelForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from mpsearch.errors import CheckError
from mpsearch.facts import FactSet
from mpsearch.forward import Pass, TokenSequence
from mpsearch.lens import read_blocks, read_facts
from mpsearch.models import Model, from_module
from mpsearch.recall import RecallProxy
from mpsearch.skeleton import load_skeleton

# Float32 sums in another order. A wrong block, norm or token changes readings by tenths.
ROUNDING = 1e-4
SEQUENCES = [
    TokenSequence((5, 9, 3, 7, 11, 13), 3),
    TokenSequence((5, 9, 3, 8), 3),
    TokenSequence((5, 9, 3, 7, 2), 4),  # read where the first one is
    TokenSequence((6, 1, 2), 1),
]
SCALES = {
    "gemma3_text": {"head_dim": 16, "final_logit_softcapping": 5.0, "sliding_window": 64},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 3.0},
}
NORMS = {"gpt2": "ln_f", "gpt_neox": "final_layer_norm"}


def wrapped(module: Any, name: str = "tiny") -> Model:
    return from_module(
        name, Path(), module, build_tokenizer(), torch.device("cpu"), torch.float32
    )  # fmt: skip


def deep(blocks: int = 4, seed: int = 0) -> Model:
    """A tiny Llama with more blocks than two."""
    torch.manual_seed(seed)
    config = tiny_config("llama", num_hidden_layers=blocks, tie_word_embeddings=True)
    return wrapped(AutoModelForCausalLM.from_config(config))


def family(name: str) -> Model:
    if name in FAMILIES:
        return tiny_family(name)
    torch.manual_seed(0)
    if name == "llava":
        vision = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64}
        vision |= {"num_hidden_layers": 1, "num_attention_heads": 2}
        vision |= {"image_size": 16, "patch_size": 8}
        config = LlavaConfig(text_config=tiny_config("llama"), vision_config=vision)
        return wrapped(LlavaForConditionalGeneration(config))
    return wrapped(AutoModelForCausalLM.from_config(tiny_config(name, **SCALES[name])))


@torch.no_grad()
def plain(model: Model, name: str, sequence: TokenSequence) -> list[float]:
    """The readings of one sequence alone, from transformers' own hidden states."""
    module = model.module
    output = module(torch.tensor([sequence.tokens]), output_hidden_states=True)
    decoder = module.get_decoder()
    norm = getattr(decoder, NORMS.get(name, "norm"))
    *states, last = output.hidden_states[1:]  # the last one is normed already
    answer = torch.tensor(sequence.tokens[sequence.start :])[:, None]
    found = []
    for hidden in (*(norm(state) for state in states), last):
        logits = module.get_output_embeddings()(hidden)[0]
        text = module.config.get_text_config(decoder=True)
        if cap := getattr(text, "final_logit_softcapping", None):
            logits = torch.tanh(logits / cap) * cap
        logits = logits * getattr(text, "logit_scale", 1.0) / getattr(text, "logits_scaling", 1.0)
        steps = logits.log_softmax(-1)[sequence.start - 1 : -1]
        found.append(float(steps.gather(1, answer).sum()))
    return found


@pytest.mark.parametrize("name", [*FAMILIES, *SCALES, "llava"])
def test_readings_equal_a_plain_computation_from_hidden_states(name: str) -> None:
    model = family(name)
    found = read_blocks(model, SEQUENCES)
    expected = np.array([plain(model, name, sequence) for sequence in SEQUENCES])
    assert found.shape == (4, 2)
    np.testing.assert_allclose(found, expected, atol=ROUNDING, rtol=0)
    assert np.abs(found[:, 0] - found[:, 1]).min() > 10 * ROUNDING  # blocks differ


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gemma3_text", "llava"])
def test_the_last_block_gives_the_models_own_log_probabilities(name: str) -> None:
    model = family(name)
    np.testing.assert_allclose(
        read_blocks(model, SEQUENCES)[:, -1], Pass(model, SEQUENCES).run(), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("name", STREAMED)
def test_a_streamed_model_is_read_to_the_bit_as_a_loaded_one(tmp_path: Path, name: str) -> None:
    kind, dtype, changes = STREAMED[name]
    folder = saved(tmp_path, kind, **changes)  # type: ignore[arg-type]
    whole, streamed = loaded(folder, dtype), load_skeleton(str(folder), device=CPU, dtype=dtype)
    expected = read_blocks(whole, SEQUENCES)
    np.testing.assert_array_equal(read_blocks(streamed, SEQUENCES), expected)
    assert np.abs(expected[:, 0] - expected[:, 1]).min() > 0


def test_facts_are_asked_as_the_proxy_asks_them(tiny: Model, tiny_facts: FactSet) -> None:
    facts = tiny_facts.part("test")
    for shots in (4, 1):
        proxy = RecallProxy(tiny, tiny_facts, facts, contrast=False, shots=shots)
        found = read_facts(tiny, tiny_facts, facts, shots)
        np.testing.assert_allclose(found[:, -1], proxy.reference.log_prob, atol=1e-6, rtol=0)


def test_the_model_is_left_as_it_was() -> None:
    model = deep()
    before = Pass(model, SEQUENCES).run()
    read_blocks(model, SEQUENCES)
    assert torch.equal(Pass(model, SEQUENCES).run(), before)
    for block in model.module.model.layers:
        assert "forward" not in vars(block)
        assert not block._forward_hooks


@pytest.mark.parametrize("broken", range(4))
def test_blocks_before_a_broken_one_read_the_same_to_the_bit(broken: int) -> None:
    """Behind it nothing is added, so all of the loss is there from the broken block on."""
    model = deep()
    for block in model.module.model.layers[broken + 1 :]:
        block.self_attn.o_proj.weight.data.zero_()
        block.mlp.down_proj.weight.data.zero_()
    reference = read_blocks(model, SEQUENCES)
    noise = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    model.places[f"model.layers.{broken}.mlp.down_proj"].put(noise)
    shortfall = reference - read_blocks(model, SEQUENCES)
    assert (shortfall[:, :broken] == 0).all()
    assert (np.abs(shortfall[:, broken:]) > 0.1).all()
    for later in range(broken + 1, 4):
        np.testing.assert_allclose(shortfall[:, later], shortfall[:, broken], atol=1e-5)


def test_a_model_that_does_more_behind_its_blocks_is_refused() -> None:
    """The decoder adds the first block's output to the last's: a way past the last block."""
    module = tiny_llama(71)
    first: list[Any] = []
    module.model.layers[0].register_forward_hook(lambda _m, _i, output: first.append(output))
    module.model.norm.register_forward_pre_hook(lambda _m, inputs: (inputs[0] + first.pop(),))
    model = wrapped(module, "sidestep")
    with pytest.raises(CheckError, match=r"'sidestep' \(LlamaForCausalLM\) does more .* nats off"):
        read_blocks(model, SEQUENCES)


def test_a_model_whose_blocks_are_in_no_list_is_refused() -> None:
    module = tiny_llama(71)
    module.model.layers = nn.Sequential(*module.model.layers)
    with pytest.raises(CheckError, match=r"'tiny' \(LlamaForCausalLM\) keeps its blocks in no"):
        read_blocks(wrapped(module), SEQUENCES)


def test_a_list_of_other_modules_is_not_taken_for_the_blocks() -> None:
    model = deep()
    expected = read_blocks(model, SEQUENCES)
    decoder = model.module.model
    decoder._modules = {"others": nn.ModuleList([nn.Linear(4, 4)] * 2), **decoder._modules}
    np.testing.assert_array_equal(read_blocks(model, SEQUENCES), expected)


def test_a_model_that_does_not_run_all_its_blocks_once_is_refused() -> None:
    model = deep(3)
    model.module.config.num_hidden_layers = 2
    with pytest.raises(CheckError, match="runs its 3 blocks 2 times in a pass"):
        read_blocks(model, SEQUENCES)


def test_broken_weights_are_said_and_not_read() -> None:
    model = deep()
    model.places["model.layers.2.mlp.down_proj"].put(torch.full((64, 128), torch.nan))
    with pytest.raises(CheckError, match="8 of 16 log-probabilities read from its blocks are NaN"):
        read_blocks(model, SEQUENCES)
