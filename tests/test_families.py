"""Families: what the config alone tells is what transformers builds, for every family known."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.cache_utils import DynamicCache

from mpsearch.architecture import Architecture, Attention, read_architecture
from mpsearch.families import FAMILIES
from mpsearch.layers import Layer
from mpsearch.places import Place, find_embedding, find_head, find_places

Config = dict[str, Any]
TOKENS = 5

_WORDS = {"vocab_size": 71, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
_BASE = {
    **_WORDS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_GROUPED = {**_BASE, "num_key_value_heads": 2}
_GPT2 = {**_WORDS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
_MOE = {
    **_GROUPED,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
_SHARED = {**_MOE, "shared_expert_intermediate_size": 40}
_LATENT = {
    **_BASE,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "moe_intermediate_size": 24,
    "kv_lora_rank": 28,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_group": 1,
    "topk_group": 1,
}
_STATES = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}
_EVERY_BIAS = {"attention_bias": True, "mlp_bias": True}
_SLIDING = {"use_sliding_window": True, "sliding_window": 16}
_KINDS = ["full_attention", "sliding_attention", "full_attention"]

# Every family, with each switch that changes its shape on and off.
CONFIGS: dict[str, tuple[str, Config]] = {
    "llama": ("llama", _GROUPED),
    "llama, all heads": ("llama", {**_BASE, **_EVERY_BIAS, "tie_word_embeddings": True}),
    "llama, wide heads": ("llama", {**_GROUPED, "head_dim": 20, "num_key_value_heads": 1}),
    "mistral": ("mistral", {**_GROUPED, "sliding_window": 16}),
    "mistral, no window": ("mistral", {**_GROUPED, "sliding_window": None, "head_dim": 20}),
    "qwen2": ("qwen2", _GROUPED),
    "qwen2, windows": ("qwen2", {**_GROUPED, **_SLIDING, "max_window_layers": 1}),
    "qwen3": ("qwen3", {**_GROUPED, "head_dim": 20, "tie_word_embeddings": True}),
    "qwen3, listed": ("qwen3", {**_GROUPED, **_SLIDING, "head_dim": 20, "layer_types": _KINDS}),
    "gemma": ("gemma", {**_GROUPED, "head_dim": 20}),
    "gemma2": ("gemma2", {**_GROUPED, "head_dim": 20, "sliding_window": 16}),
    "gemma2, untied": ("gemma2", {**_GROUPED, "head_dim": 20, "tie_word_embeddings": False}),
    "gemma3": ("gemma3_text", {**_GROUPED, "head_dim": 20, "sliding_window_pattern": 3}),
    "gemma3, listed": ("gemma3_text", {**_GROUPED, "head_dim": 20, "layer_types": _KINDS}),
    "phi3": ("phi3", _GROUPED),
    "phi3, windows": ("phi3", {**_BASE, "sliding_window": 16}),
    "olmo2": ("olmo2", {**_GROUPED, "attention_bias": True}),
    "granite": ("granite", {**_GROUPED, **_EVERY_BIAS}),
    "smollm3": ("smollm3", {**_GROUPED, **_EVERY_BIAS}),
    "smollm3, windows": ("smollm3", {**_GROUPED, **_SLIDING, "no_rope_layers": [1, 0, 1]}),
    "stablelm": ("stablelm", _GROUPED),
    "stablelm, parallel": (
        "stablelm",
        {**_GROUPED, "use_qkv_bias": True, "use_parallel_residual": True},
    ),
    "cohere": ("cohere", _GROUPED),
    "cohere, norms": ("cohere", {**_GROUPED, "use_qk_norm": True, "attention_bias": True}),
    "phi": ("phi", _GROUPED),
    "phi, norms": ("phi", {**_BASE, "qk_layernorm": True, "tie_word_embeddings": True}),
    "mixtral": ("mixtral", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("qwen2_moe", {**_SHARED, "decoder_sparse_step": 2}),
    "qwen2_moe, windows": (
        "qwen2_moe",
        {**_SHARED, **_SLIDING, "max_window_layers": 2, "qkv_bias": False},
    ),
    "qwen3_moe": ("qwen3_moe", {**_MOE, "head_dim": 20, "mlp_only_layers": [1]}),
    "qwen3_moe, windows": ("qwen3_moe", {**_MOE, **_SLIDING, "attention_bias": True}),
    "deepseek_v2": (
        "deepseek_v2",
        {**_LATENT, **_EVERY_BIAS, "q_lora_rank": None, "first_k_dense_replace": 1},
    ),
    "deepseek_v2, all sparse": ("deepseek_v2", {**_LATENT, "q_lora_rank": 20}),
    "deepseek_v3": (
        "deepseek_v3",
        {**_LATENT, "q_lora_rank": 20, "first_k_dense_replace": 1, "attention_bias": True},
    ),
    "gpt_oss": (
        "gpt_oss",
        {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    ),
    "llama4": (
        "llama4_text",
        {
            **_GROUPED,
            "head_dim": 16,
            "num_local_experts": 4,
            "intermediate_size_mlp": 80,
            "interleave_moe_layer_step": 2,
            "no_rope_layers": [1, 0, 1],
        },
    ),
    "qwen3_next": (
        "qwen3_next",
        {**_SHARED, **_STATES, "head_dim": 16, "full_attention_interval": 3},
    ),
    "gpt2": ("gpt2", _GPT2),
    "gpt2, narrow": ("gpt2", {**_GPT2, "n_inner": 80, "tie_word_embeddings": False}),
    "gpt_bigcode": ("gpt_bigcode", _GPT2),
    "gpt_bigcode, all heads": ("gpt_bigcode", {**_GPT2, "multi_query": False}),
    "gpt_neox": ("gpt_neox", _BASE),
    "gpt_neox, no bias": ("gpt_neox", {**_BASE, "attention_bias": False}),
    "opt": ("opt", {**_BASE, "ffn_dim": 96}),
    "opt, narrow words": (
        "opt",
        {**_BASE, "ffn_dim": 96, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    ),
    "opt, bare": (
        "opt",
        {**_BASE, "ffn_dim": 96, "enable_bias": False, "layer_norm_elementwise_affine": False},
    ),
    "falcon": ("falcon", _BASE),
    "falcon, grouped": (
        "falcon",
        {**_BASE, "new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 96},
    ),
    "falcon, in turn": (
        "falcon",
        {**_BASE, "multi_query": False, "parallel_attn": False, "bias": True, "alibi": True},
    ),
}
# As published configs may: only what has no default; on the meta device sizes do not matter.
_LEAN = {**_WORDS, "hidden_size": 256, "num_hidden_layers": 7, "num_attention_heads": 64}
_LEAN_SIZES: dict[str, Config] = {
    "gpt2": {**_GPT2, "n_layer": 7},
    "gpt_bigcode": {**_GPT2, "n_layer": 7},
    "opt": {**_LEAN, "ffn_dim": 96, "max_position_embeddings": 128},
    "falcon": _LEAN,
    "qwen2_moe": {**_SHARED, **_LEAN},
    "qwen3_moe": {**_MOE, **_LEAN},
    "qwen3_next": {**_SHARED, **_LEAN},
    "deepseek_v2": {**_LATENT, **_LEAN},
    "deepseek_v3": {**_LATENT, **_LEAN},
    "gpt_oss": {**_LEAN, "intermediate_size": 96, "num_local_experts": 4},
    "llama4_text": {
        **_LEAN,
        "intermediate_size": 96,
        "intermediate_size_mlp": 80,
        "num_local_experts": 4,
    },
}
_NEVER_LEFT_OUT = {"num_key_value_heads", "head_dim", "max_position_embeddings"}
LEAN: dict[str, tuple[str, Config]] = {
    f"{family}, lean": (
        family,
        {
            key: value
            for key, value in _LEAN_SIZES.get(family, {**_LEAN, "intermediate_size": 96}).items()
            if key not in _NEVER_LEFT_OUT or family == "opt"
        },
    )
    for family in FAMILIES
}
EVERY = {**CONFIGS, **LEAN}

every = pytest.mark.parametrize("case", EVERY)
built_whole = pytest.mark.parametrize("case", CONFIGS)


@cache
def on_meta(case: str) -> Any:
    family, config = EVERY[case]
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **config))


@cache
def told(case: str) -> Architecture:
    family, config = EVERY[case]
    return read_architecture({"model_type": family, **config}, case)


def layers(places: dict[str, Place]) -> list[Layer]:
    return [Layer(name, *place.original.shape, tied=place.tied) for name, place in places.items()]


def kept(module: Any) -> dict[str, tuple[int, ...]]:
    """As `mpsearch.models.from_module` keeps it; on the meta device all pointers are alike."""
    seen = {id(place.parameter) for place in find_places(module).values()}
    found = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tuple(tensor.shape)
    return found


def test_every_family_is_built() -> None:
    assert {family for family, _ in CONFIGS.values()} == set(FAMILIES)


@every
def test_layers_are_the_models_own_in_its_order(case: str) -> None:
    assert list(told(case).layers) == layers(find_places(on_meta(case)))


@every
def test_embedding_and_head_are_the_models_own(case: str) -> None:
    module = on_meta(case)
    assert [told(case).embedding] == layers(find_embedding(module))
    assert [layer for layer in [told(case).head] if layer] == layers(find_head(module))


@every
def test_what_is_kept_is_the_rest_of_the_state_dict(case: str) -> None:
    assert dict(told(case).kept) == kept(on_meta(case))


@every
def test_parameters_are_all_there_are_once(case: str) -> None:
    module = on_meta(case)
    in_module = sum(parameter.numel() for parameter in module.parameters())
    stored = sum(buffer.numel() for name, buffer in module.named_buffers()
                 if name in module.state_dict())  # fmt: skip
    assert told(case).parameters == in_module + stored


@every
def test_windows_are_those_of_transformers_cache(case: str) -> None:
    architecture = told(case)
    cached = DynamicCache(config=on_meta(case).config).layers
    windows = [getattr(layer, "sliding_window", None) for layer in cached]
    assert [block.attention.window for block in architecture.blocks] == windows
    assert all(
        (block.attention.kind == "sliding") == (window is not None)
        for block, window in zip(architecture.blocks, windows, strict=True)
    )


def values_cached(layer: Any) -> int:
    """Values that a layer of transformers' cache holds."""
    if hasattr(layer, "recurrent_states"):
        held = (*layer.conv_states.values(), *layer.recurrent_states.values())
        return sum(state.numel() for state in held if state is not None)
    return int(layer.keys.numel() + layer.values.numel())


def values_told(attention: Attention) -> int:
    if attention.kind == "state":
        return attention.state_values
    if attention.kind == "latent":
        return TOKENS * attention.latent_dim
    return TOKENS * attention.kv_heads * (attention.key_dim + attention.value_dim)


@built_whole
def test_each_block_keeps_of_a_text_what_a_real_pass_keeps(case: str) -> None:
    family, config = CONFIGS[case]
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **config)).eval()
    cached = DynamicCache(config=module.config)
    with torch.no_grad():
        module(torch.arange(1, 1 + TOKENS)[None], past_key_values=cached, use_cache=True)
    told_values = [values_told(block.attention) for block in told(case).blocks]
    # transformers (5.23) alone repeats a grouped Falcon's keys and values for every query head.
    times = 2 if case == "falcon, grouped" else 1
    assert [values_cached(layer) for layer in cached.layers] == [times * n for n in told_values]


@built_whole
def test_heads_are_as_wide_as_the_matrices_that_make_and_read_them(case: str) -> None:
    """What leaves the heads is what the output projection reads; queries are as wide as keys."""
    architecture = told(case)
    shapes = {layer.name: layer for layer in architecture.layers}
    for number, block in enumerate(architecture.blocks):
        attention = block.attention
        own = {name: layer for name, layer in shapes.items() if f".{number}." in name}
        out = next(
            layer
            for name, layer in own.items()
            if name.endswith(("o_proj", "attn.c_proj", "out_proj", ".dense"))
        )
        assert out.columns == attention.heads * attention.value_dim
        for name, layer in own.items():
            if name.endswith(("self_attn.q_proj", "q_b_proj")):
                gates = 2 if architecture.family == "qwen3_next" else 1
                assert layer.rows == gates * attention.heads * attention.key_dim
            if name.endswith("self_attn.k_proj"):
                assert layer.rows == attention.kv_heads * attention.key_dim
            if name.endswith("self_attn.v_proj"):
                assert layer.rows == attention.kv_heads * attention.value_dim


def feed_forward_width(module: Any, number: int) -> int:
    """Columns that the last matrices of a block's feed-forward part read for a real token."""
    seen = 0
    for name, child in module.named_modules():
        if f".{number}." not in name or "attn" in name or "attention" in name:
            continue
        last = name.rpartition(".")[2] in {"down_proj", "c_proj", "dense_4h_to_h", "fc2"}
        if last and isinstance(child, nn.Module) and hasattr(child, "weight"):
            columns = child.weight.shape[0 if type(child).__name__ == "Conv1D" else 1]
            seen += int(columns)
        if hasattr(child, "down_proj") and isinstance(child.down_proj, nn.Parameter):
            hidden = module.config.hidden_size
            width = next(size for size in child.down_proj.shape[1:] if size != hidden)
            seen += int(width) * module.config.num_experts_per_tok
    return seen


@built_whole
def test_the_feed_forward_part_is_as_wide_as_what_a_token_passes(case: str) -> None:
    module = on_meta(case)
    widths = [feed_forward_width(module, number) for number in range(len(told(case).blocks))]
    assert [block.inner for block in told(case).blocks] == widths


def test_a_multimodal_config_tells_its_text_model() -> None:
    text = {"model_type": "gemma3_text", **CONFIGS["gemma3"][1]}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
    config = {"model_type": "gemma3", "text_config": text, "vision_config": vision}
    inner = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        module = AutoModelForImageTextToText.from_config(AutoConfig.for_model("gemma3", **inner))
    found = read_architecture(config, "gemma3")
    assert list(found.layers) == layers(find_places(module))
    assert [found.embedding] == layers(find_embedding(module))
    of_text = {name: shape for name, shape in kept(module).items() if "language_model" in name}
    assert dict(found.kept) == of_text
