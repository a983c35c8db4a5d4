"""Device memory: caches that transformers allocates, and the rules that every term keeps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV3Config,
    DynamicCache,
    Gemma3TextConfig,
    LlamaConfig,
    StaticCache,
)

from mpsearch.architecture import Architecture, Attention, Block, read_architecture
from mpsearch.budget import (
    GIB,
    KV_BITS,
    RUNTIMES,
    DeviceBudget,
    Workload,
    activation_bytes,
    find_runtime,
    kv_cache_bytes,
    mask_bytes,
    scores_bytes,
    terms_line,
)
from mpsearch.errors import UsageError
from mpsearch.layers import Layer
from mpsearch.targets import TARGETS

SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "vocab_size": 50,
    "max_position_embeddings": 64, "num_attention_heads": 4,
}  # fmt: skip
WINDOW = 8
CONFIGS = {
    "multi-head": LlamaConfig(num_key_value_heads=4, **SMALL),
    "grouped queries": LlamaConfig(num_key_value_heads=2, **SMALL),
    "multi-query": LlamaConfig(num_key_value_heads=1, **SMALL),
    "latent": DeepseekV3Config(
        num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=12, qk_rope_head_dim=4,
        qk_nope_head_dim=8, v_head_dim=6, first_k_dense_replace=3, n_group=1, topk_group=1,
        n_routed_experts=4, moe_intermediate_size=16, num_experts_per_tok=2, **SMALL,
    ),
}  # fmt: skip
SLIDING = Gemma3TextConfig(
    num_key_value_heads=2, head_dim=8, sliding_window=WINDOW,
    layer_types=["sliding_attention", "full_attention", "sliding_attention"], **SMALL,
)  # fmt: skip


def llama(**changes: Any) -> Architecture:
    return read_architecture(LlamaConfig(**{**SMALL, **changes}).to_dict(), "a test")


def allocated_bytes(config: Any, cache: Any, length: int, batch: int) -> int:
    """Of the keys and values that a forward leaves in a cache."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        model(torch.ones(batch, length, dtype=torch.int64), past_key_values=cache)
    return sum(t.numel() * t.element_size() for layer in cache.layers
               for t in (layer.keys, layer.values))  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("length", "batch"), [(1, 1), (13, 1), (20, 3)])
def test_the_kv_cache_is_the_one_that_transformers_allocates(
    name: str, length: int, batch: int
) -> None:
    config = CONFIGS[name]
    architecture = read_architecture(config.to_dict(), name)
    found = kv_cache_bytes(architecture, RUNTIMES["transformers"], Workload(length, batch, "bf16"))
    assert found == allocated_bytes(config, DynamicCache(config=config), length, batch)


@pytest.mark.parametrize("length", [5, WINDOW, 20])
def test_a_sliding_window_keeps_the_window_at_most(length: int) -> None:
    architecture = read_architecture(SLIDING.to_dict(), "a test")
    found = kv_cache_bytes(architecture, RUNTIMES["transformers"], Workload(length, 2, "bf16"))
    static = StaticCache(config=SLIDING, max_cache_len=length)
    assert found == allocated_bytes(SLIDING, static, length, 2)
    # A growing cache drops a token earlier than a static one: never above, by one token at most.
    growing = allocated_bytes(SLIDING, DynamicCache(config=SLIDING), length, 2)
    token = 2 * 2 * 8 * 2 * 2 * 2  # sliding blocks, heads, dimension, keys and values, batch, bytes
    assert found - (token if length >= WINDOW else 0) == growing


def test_a_window_also_keeps_the_piece_of_a_prompt_that_is_read() -> None:
    architecture = read_architecture(SLIDING.to_dict(), "a test")
    runtime = replace(RUNTIMES["transformers"], prefill_tokens=4)
    whole = kv_cache_bytes(architecture, RUNTIMES["transformers"], Workload(64, 1, "bf16"))
    pieces = kv_cache_bytes(architecture, runtime, Workload(64, 1, "bf16"))
    assert pieces - whole == 2 * 4 * 2 * 8 * 2 * 2  # blocks, tokens, heads, dimension, two, bytes


def test_a_state_has_one_size_at_any_length() -> None:
    attention = Attention("state", 4, 2, 8, 8, state_values=1000)
    architecture = replace(llama(), blocks=(Block(attention, 64),))
    sizes = {
        kv_cache_bytes(architecture, RUNTIMES["vllm"], Workload(length, 2, kv))
        for length in (1, 10_000)
        for kv in ("bf16", "fp8")
    }
    assert sizes == {2 * 1000 * 4}


@pytest.mark.parametrize(("kv", "bits"), [("fp16", 16), ("fp32", 32), ("q8_0", 8.5), ("q4_0", 4.5)])
def test_the_dtype_of_the_cache_sets_its_bits(kv: str, bits: float) -> None:
    values = 3 * 256 * 2 * 2 * 8  # blocks, tokens, heads, keys and values, dimension
    architecture = llama(num_key_value_heads=2)
    found = kv_cache_bytes(architecture, RUNTIMES["llama.cpp"], Workload(200, 1, kv))
    assert found == values * bits / 8


def test_activations_are_of_the_widest_block() -> None:
    wide = llama(intermediate_size=512)
    assert activation_bytes(wide, 2) == 2 * (4 * 32 + 3 * 512)
    heads = llama(intermediate_size=1, head_dim=64, num_key_value_heads=2)
    assert activation_bytes(heads, 4) == 4 * (4 * 32 + 3 * 4 * 64 + 2 * 64)


def test_experts_and_an_activation_in_steps_hold_more() -> None:
    plain = llama()
    (block, *_) = plain.blocks
    sent = replace(plain, blocks=(replace(block, experts=2),))
    assert activation_bytes(sent, 1) == 4 * 32 + 3 * 64 + 3 * 2 * 32
    steps = llama(hidden_act="gelu_new")
    assert activation_bytes(steps, 1) - activation_bytes(plain, 1) == 2 * 64


def test_masks_are_of_windows_and_of_padding() -> None:
    windows = read_architecture(SLIDING.to_dict(), "a test")
    assert mask_bytes(windows, Workload(100, 3, "bf16")) == 2 * 3 * 100**2
    assert mask_bytes(llama(), Workload(100, 3, "bf16")) == 3 * 100**2
    assert mask_bytes(llama(), Workload(100, 1, "bf16")) == 0
    for name, runtime in RUNTIMES.items():
        budget = DeviceBudget(windows, "a card", GIB, runtime, Workload(9, 1, runtime.kv[0]))
        assert (budget["mask"] > 0) == (name in ("transformers", "gptqmodel"))


def test_scores_are_of_families_without_a_fused_kernel() -> None:
    eager = replace(llama(), eager=True)
    assert scores_bytes(llama(), Workload(100, 3, "bf16"), 2) == 0
    assert scores_bytes(eager, Workload(100, 3, "bf16"), 2) == 10 * 4 * 3 * 100**2
    assert scores_bytes(eager, Workload(100, 3, "bf16"), 4) == 8 * 4 * 3 * 100**2
    for name, runtime in RUNTIMES.items():
        budget = DeviceBudget(eager, "a card", GIB, runtime, Workload(9, 1, runtime.kv[0]))
        assert (budget["scores"] > 0) == (name in ("transformers", "gptqmodel"))


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "gemma3_text", "llama", "deepseek_v3"])
def test_a_family_is_eager_where_transformers_has_no_other_attention(name: str) -> None:
    config = AutoConfig.for_model(name)
    with torch.device("meta"):
        for key, value in (("num_hidden_layers", 2), ("vocab_size", 50)):
            setattr(config, key, value)
        config.layer_types = None if not hasattr(config, "layer_types") else config.layer_types[:2]
        model = AutoModelForCausalLM.from_config(config)
    eager = model.config._attn_implementation == "eager"
    published = {"model_type": name, **config.to_dict()}
    assert read_architecture(published, name).eager == eager


def test_the_terms_of_an_8b_model_on_a_12_gib_card() -> None:
    architecture = read_architecture(
        {
            "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
            "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8, "max_position_embeddings": 131072,
            "tie_word_embeddings": False,
        },
        "Llama 3.1 8B",
    )  # fmt: skip
    budget = DeviceBudget(
        architecture, "a card", 12 * GIB, RUNTIMES["vllm"], Workload(8192, 1, "bf16")
    )
    assert budget["kv_cache"] == GIB  # 128 KiB a token
    assert budget["activation"] == 2048 * 2 * (4 * 4096 + 3 * 14336)
    assert budget["logits"] == 256 * 128256 * 10  # sequences that vLLM makes room for
    assert budget["workspace"] == 0
    assert budget["runtime"] == GIB
    assert budget["unused"] == pytest.approx(0.1 * 12 * GIB, abs=1)
    assert budget.left_bytes == 12 * GIB - sum(term.size_bytes for term in budget.terms)
    content = budget.to_json()
    assert content["kv_cache_bytes"] == GIB
    assert terms_line(content).startswith(
        "a card, 12.00 GiB, vllm, 8,192 tokens x 1: kv cache 1.00 GiB, activation 232.00 MiB"
    )


def test_a_reserve_above_what_the_runtime_leaves_alone_counts_instead() -> None:
    budget = DeviceBudget(
        llama(), "a card", 10 * GIB, RUNTIMES["vllm"], Workload(8, 1, "bf16"), 2 * GIB
    )
    assert budget["unused"] == 2 * GIB


def test_a_workspace_is_the_largest_weight_in_bf16() -> None:
    workload = Workload(8, 1, "bf16")
    budget = DeviceBudget(llama(), "a card", GIB, RUNTIMES["gptqmodel"], workload)
    assert budget["workspace"] == 32 * 64 * 2


# ------------------------------------------------------------------------------ every term


workloads = st.tuples(
    st.integers(1, 300_000), st.integers(1, 64), st.sampled_from(sorted(RUNTIMES))
)


@settings(deadline=None, max_examples=100)
@given(workloads, st.integers(0, 5000), st.integers(0, 8))
def test_no_term_falls_when_context_or_batch_grow(
    workload: tuple[int, int, str], longer: int, more: int
) -> None:
    context, batch, name = workload
    runtime = RUNTIMES[name]

    def budget(context: int, batch: int) -> DeviceBudget:
        return DeviceBudget(
            llama(), "a card", GIB, runtime, Workload(context, batch, runtime.kv[0])
        )

    small, large = budget(context, batch), budget(context + longer, batch + more)
    for term in small.terms:
        assert term.size_bytes <= large[term.name], term.name
    assert small.left_bytes == GIB - sum(term.size_bytes for term in small.terms)


@settings(deadline=None, max_examples=50)
@given(workloads)
def test_a_cache_of_fewer_bits_takes_fewer_bytes(workload: tuple[int, int, str]) -> None:
    context, batch, name = workload
    sizes = [
        (KV_BITS[kv], kv_cache_bytes(llama(), RUNTIMES[name], Workload(context, batch, kv)))
        for kv in RUNTIMES[name].kv
    ]
    assert sorted(sizes) == sorted(sizes, key=lambda found: (found[1], found[0]))


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(sorted(RUNTIMES)), st.integers(1, 4), st.integers(0, 40 * 2**20),
    st.sampled_from([None, 100, 50_000]),
)  # fmt: skip
def test_the_largest_context_and_batch_fit_and_one_more_does_not(
    name: str, batch: int, weights_bytes: int, most: int | None
) -> None:
    runtime = RUNTIMES[name]
    architecture = replace(llama(), context=most)
    budget = DeviceBudget(
        architecture, "a card", 2 * GIB, runtime, Workload(7, batch, runtime.kv[0])
    )

    def left(**changes: int) -> int:
        return replace(budget, workload=replace(budget.workload, **changes)).left_bytes

    for what, found in (
        ("context", budget.largest_context(weights_bytes)),
        ("batch", budget.largest_batch(weights_bytes)),
    ):
        assert found >= 1
        assert left(**{what: found}) >= weights_bytes
        if not (what == "context" and found == most):
            assert left(**{what: found + 1}) < weights_bytes


def test_nothing_fits_beside_weights_that_fill_the_device() -> None:
    budget = DeviceBudget(llama(), "a card", GIB, RUNTIMES["vllm"], Workload(7, 1, "bf16"))
    assert budget.largest_context(GIB) == 0
    assert budget.largest_batch(GIB) == 0


# ------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("context", "batch", "kv", "message"),
    [
        (0, 1, "bf16", "context 0 makes no sense; give 1 to 1,000,000,000"),
        (-5, 1, "bf16", "context -5 makes no sense; give 1 to 1,000,000,000"),
        (10**10, 1, "bf16", "context 10,000,000,000 makes no sense; give 1 to 1,000,000,000"),
        (1, 0, "bf16", "batch 0 makes no sense; give 1 to 1,000,000,000"),
        (1, 1, "bf15", "no KV dtype 'bf15'; did you mean 'bf16'?"),
    ],
)
def test_a_workload_of_nonsense_is_refused(context: int, batch: int, kv: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Workload(context, batch, kv)
    assert str(caught.value) == message


def test_a_cache_that_the_runtime_does_not_keep_is_refused() -> None:
    with pytest.raises(UsageError) as caught:
        DeviceBudget(llama(), "a card", GIB, RUNTIMES["vllm"], Workload(7, 1, "q8_0"))
    assert str(caught.value) == "vllm keeps no KV cache in q8_0; use bf16, fp16, fp8"


def test_runtimes_are_found_by_target_and_name() -> None:
    assert find_runtime("compressed-tensors").name == "vllm"
    assert find_runtime("compressed-tensors", "transformers").name == "transformers"
    assert find_runtime("gptq").name == "gptqmodel"
    assert find_runtime("gguf").name == "llama.cpp"
    assert find_runtime("gguf", "transformers").name == "transformers"
    assert find_runtime("bitsandbytes").name == "transformers"
    assert all(RUNTIMES["llama.cpp"].serves(fmt) for fmt in TARGETS["gguf"].formats)
    with pytest.raises(UsageError, match="no runtime 'vlm'; did you mean 'vllm'"):
        find_runtime("gptq", "vlm")
    with pytest.raises(UsageError) as caught:
        find_runtime("gptq", "vllm")
    assert str(caught.value) == (
        "vllm loads no gptq checkpoint; use gptqmodel, or a space with the target "
        "compressed-tensors"
    )


def test_a_layer_may_be_of_any_shape() -> None:
    architecture = replace(llama(), layers=(Layer("a", 7, 9), Layer("b", 3, 5)))
    budget = DeviceBudget(architecture, "", GIB, RUNTIMES["gptqmodel"], Workload(1, 1, "bf16"))
    assert budget["workspace"] == 7 * 9 * 2
