"""The model families whose architecture a config alone tells, as a table; after transformers 5.23.

Multi-token prediction, which some checkpoints add, is no part of a model here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from mpsearch import family_rules as rules
from mpsearch.family_parts import (
    Experts,
    Family,
    Kept,
    Matrix,
    Part,
    fused,
    gated,
    norms,
    plain,
    router,
    separate,
)

_TWO_NORMS = norms("input_layernorm", "post_attention_layernorm")
_FOUR_NORMS = (*_TWO_NORMS, *norms("pre_feedforward_layernorm", "post_feedforward_layernorm"))
_HEAD_NORMS = norms("self_attn.q_norm", "self_attn.k_norm", size="head_dim")
_ONLY_GROUPED: Mapping[str, tuple[str, ...]] = {"num_key_value_heads": (), "head_dim": ()}
_LATENT: tuple[Part, ...] = (
    Matrix("self_attn.q_proj", "direct_queries", "hidden"),
    Matrix("self_attn.q_a_proj", "query_rank", "hidden", "attention_bias"),
    *norms("self_attn.q_a_layernorm", size="query_rank"),
    Matrix("self_attn.q_b_proj", "queries", "query_rank"),
    Matrix("self_attn.kv_a_proj_with_mqa", "latent_and_rotated", "hidden", "attention_bias"),
    *norms("self_attn.kv_a_layernorm", size="latent"),
    Matrix("self_attn.kv_b_proj", "expanded", "latent"),
    Matrix("self_attn.o_proj", "hidden", "attended", "attention_bias"),
)
_SHARED_EXPERT: tuple[Part, ...] = (
    Experts("mlp.experts"),
    router("mlp.gate"),
    *gated("mlp.shared_expert", "shared_inner"),
    Kept("mlp.shared_expert_gate.weight", ("one", "hidden")),
)
_DELTA_NET: tuple[Part, ...] = (
    Kept("linear_attn.dt_bias", ("state_heads",)),
    Kept("linear_attn.A_log", ("state_heads",)),
    Kept("linear_attn.conv1d.weight", ("convolved", "one", "kernel")),
    Matrix("linear_attn.in_proj_qkvz", "state_inputs", "hidden"),
    Matrix("linear_attn.in_proj_ba", "state_rates", "hidden"),
    *norms("linear_attn.norm", size="state_value_dim"),
    Matrix("linear_attn.out_proj", "hidden", "state_outputs"),
)
_WINDOWS_OFF = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
_GPT2_NAMES = {
    **_ONLY_GROUPED,
    "hidden_size": ("n_embd", "hidden_size"),
    "max_position_embeddings": ("n_positions", "max_position_embeddings"),
    "num_attention_heads": ("n_head", "num_attention_heads"),
    "num_hidden_layers": ("n_layer", "num_hidden_layers"),
    "intermediate_size": ("n_inner",),
}
_EXPERT_NAMES = {"num_experts": ("num_experts", "num_local_experts")}
_LOCAL_EXPERT_NAMES = {"num_experts": ("num_local_experts", "num_experts")}
_ROUTED_NAMES = {"num_experts": ("n_routed_experts", "num_local_experts", "num_experts")}
_SPARSE_STEPS = {"decoder_sparse_step": 1, "mlp_only_layers": None}
_ALTERNATE = {"sliding_window_pattern": 2}
_TIED = {"tie_word_embeddings": True}

_llama = Family(separate("attention_bias"), gated(bias="mlp_bias"), _TWO_NORMS)
_gemma = Family(
    separate("attention_bias"),
    gated(),
    _TWO_NORMS,
    defaults={**_TIED, "head_dim": 256, "num_key_value_heads": 16},
)
_gemma2 = replace(
    _gemma,
    norms=_FOUR_NORMS,
    # Not a field of its config, but what its pattern always is.
    names={"sliding_window_pattern": ()},
    defaults={**_gemma.defaults, "num_key_value_heads": 4, **_ALTERNATE, "sliding_window": 4096},
    kinds=rules.last_of("sliding_window_pattern", rules.SLIDING),
)
_qwen2 = Family(
    separate(True, out_bias=False),
    gated(),
    _TWO_NORMS,
    defaults={**_WINDOWS_OFF, "num_key_value_heads": 32},
    kinds=rules.windows_above,
)
_qwen3 = replace(
    _qwen2,
    attention=(*separate("attention_bias"), *_HEAD_NORMS),
    defaults={**_qwen2.defaults, "head_dim": 128},
)
_deepseek_v3 = Family(
    _LATENT,
    gated(),
    _TWO_NORMS,
    experts=(
        Experts("mlp.experts"),
        router("mlp.gate"),
        Kept("mlp.gate.e_score_correction_bias", ("experts",)),
        *gated("mlp.shared_experts", "shared_inner"),
    ),
    latent=True,
    names=_ROUTED_NAMES,
    defaults={"q_lora_rank": 1536, "first_k_dense_replace": 3},
    heads=rules.latent_heads,
    sparse=rules.after_dense,
    more=rules.deepseek,
)
_gpt2 = Family(
    fused("attn", "c_attn", "c_proj"),
    plain("mlp.c_fc", "mlp.c_proj"),
    norms("ln_1", "ln_2", bias=True),
    trunk="transformer",
    blocks="h",
    embedding="wte",
    beside=(Kept("wpe.weight", ("positions", "hidden")), *norms("ln_f", bias=True)),
    names=_GPT2_NAMES,
    defaults={**_TIED, "intermediate_size": None},
    more=rules.positions,
)

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": _llama,
        "mistral": Family(
            separate(),
            gated(),
            _TWO_NORMS,
            defaults={"num_key_value_heads": 8, "sliding_window": 4096},
            kinds=rules.all_windows,
        ),
        "qwen2": _qwen2,
        "qwen3": _qwen3,
        "gemma": _gemma,
        "gemma2": _gemma2,
        "gemma3_text": replace(
            _gemma2,
            attention=(*_gemma2.attention, *_HEAD_NORMS),
            names={},
            # Published configs leave these to the defaults.
            defaults={
                **_gemma2.defaults,
                "sliding_window_pattern": 6,
                "vocab_size": 262_208,
                "num_attention_heads": 8,
                "max_position_embeddings": 131_072,
            },
        ),
        "phi3": Family(
            (
                Matrix("self_attn.o_proj", "hidden", "attended"),
                Matrix("self_attn.qkv_proj", "qkv", "hidden"),
            ),
            (
                Matrix("mlp.gate_up_proj", "gate_and_up", "hidden"),
                Matrix("mlp.down_proj", "hidden", "inner"),
            ),
            _TWO_NORMS,
            kinds=rules.all_windows,
        ),
        "olmo2": Family(
            (
                *separate("attention_bias"),
                *norms("self_attn.q_norm", size="queries"),
                *norms("self_attn.k_norm", size="keys"),
            ),
            gated(),
            norms("post_attention_layernorm", "post_feedforward_layernorm"),
        ),
        "granite": _llama,
        "smollm3": replace(
            _llama,
            defaults={
                **_TIED,
                "num_key_value_heads": 4,
                "use_sliding_window": False,
                "no_rope_layer_interval": 4,
            },
            kinds=rules.where_positions_rotate(rules.SLIDING),
        ),
        "stablelm": Family(
            separate("use_qkv_bias", out_bias=False),
            gated(),
            (
                *norms("input_layernorm", bias=True),
                *norms("post_attention_layernorm", bias=True, size="norm_between"),
            ),
            beside=norms("norm", bias=True),
            names={"head_dim": ()},
            defaults={"num_key_value_heads": 32},
            more=rules.stablelm,
        ),
        "cohere": Family(
            (
                *separate("attention_bias"),
                Kept("self_attn.q_norm.weight", ("heads", "use_qk_norm")),
                Kept("self_attn.k_norm.weight", ("kv_heads", "use_qk_norm")),
            ),
            gated(),
            norms("input_layernorm"),
            defaults=_TIED,
            more=rules.if_flag("use_qk_norm", "head_dim"),
        ),
        "phi": Family(
            (
                *separate(True, out="dense"),
                *norms(
                    "self_attn.q_layernorm", "self_attn.k_layernorm", bias=True, size="qk_layernorm"
                ),
            ),
            plain("mlp.fc1", "mlp.fc2"),
            norms("input_layernorm", bias=True),
            beside=norms("final_layernorm", bias=True),
            head_bias=True,
            more=rules.if_flag("qk_layernorm", "head_dim"),
        ),
        "mixtral": Family(
            separate(),
            (),
            _TWO_NORMS,
            experts=(router("mlp.gate"), Experts("mlp.experts")),
            names=_LOCAL_EXPERT_NAMES,
            defaults={"num_key_value_heads": 8, "num_experts": 8, "num_experts_per_tok": 2},
            kinds=rules.all_windows,
            sparse=rules.every_block,
            more=rules.mixture("intermediate_size"),
        ),
        "qwen2_moe": Family(
            separate("qkv_bias", out_bias=False),
            gated(),
            _TWO_NORMS,
            experts=_SHARED_EXPERT,
            names=_EXPERT_NAMES,
            defaults={**_WINDOWS_OFF, **_SPARSE_STEPS, "qkv_bias": True, "num_key_value_heads": 16},
            kinds=rules.every_other_window_below,
            sparse=rules.sparse_steps,
            more=rules.mixture("moe_intermediate_size", "shared_expert_intermediate_size"),
        ),
        "qwen3_moe": Family(
            _qwen3.attention,
            gated(),
            _TWO_NORMS,
            experts=(Experts("mlp.experts"), router("mlp.gate")),
            names=_EXPERT_NAMES,
            defaults={**_WINDOWS_OFF, **_SPARSE_STEPS, "num_key_value_heads": 4},
            kinds=rules.all_windows,
            sparse=rules.sparse_steps,
            more=rules.mixture("moe_intermediate_size"),
        ),
        "deepseek_v2": replace(
            _deepseek_v3,
            feed_forward=gated(bias="mlp_bias"),
            experts=(
                Experts("mlp.experts"),
                router("mlp.gate"),
                *gated("mlp.shared_experts", "shared_inner", "mlp_bias"),
            ),
            defaults={"q_lora_rank": 1536, "first_k_dense_replace": 0},
        ),
        "deepseek_v3": _deepseek_v3,
        "gpt_oss": Family(
            (*separate("attention_bias"), Kept("self_attn.sinks", ("heads",))),
            (),
            _TWO_NORMS,
            experts=(
                router("mlp.router"),
                Kept("mlp.router.bias", ("experts",)),
                Experts("mlp.experts", bias=True),
            ),
            names={**_LOCAL_EXPERT_NAMES, "sliding_window_pattern": ()},
            defaults={
                "attention_bias": True,
                "head_dim": 64,
                "num_key_value_heads": 8,
                "num_experts_per_tok": 4,
                **_ALTERNATE,
                "sliding_window": 128,
            },
            kinds=rules.last_of("sliding_window_pattern", rules.SLIDING),
            sparse=rules.every_block,
            more=rules.mixture("intermediate_size"),
        ),
        "llama4_text": Family(
            separate("attention_bias"),
            gated("feed_forward"),
            _TWO_NORMS,
            experts=(
                Experts("feed_forward.experts", opaque=True),
                router("feed_forward.router"),
                *gated("feed_forward.shared_expert", "shared_inner"),
            ),
            names=_LOCAL_EXPERT_NAMES,
            defaults={
                "head_dim": 128,
                "num_key_value_heads": 8,
                "num_experts_per_tok": 1,
                "interleave_moe_layer_step": 1,
                "no_rope_layer_interval": 4,
                "attention_chunk_size": 8192,
            },
            kinds=rules.where_positions_rotate(rules.CHUNKED),
            sparse=rules.llama4_experts,
            more=rules.llama4,
        ),
        "qwen3_next": Family(
            (*separate("attention_bias", queries="queries_and_gates"), *_HEAD_NORMS),
            gated(),
            _TWO_NORMS,
            experts=_SHARED_EXPERT,
            state=_DELTA_NET,
            names=_EXPERT_NAMES,
            defaults={
                **_SPARSE_STEPS,
                "head_dim": 256,
                "num_key_value_heads": 2,
                "full_attention_interval": 4,
                "linear_conv_kernel_dim": 4,
                "linear_key_head_dim": 128,
                "linear_value_head_dim": 128,
                "linear_num_key_heads": 16,
                "linear_num_value_heads": 32,
            },
            kinds=rules.last_of("full_attention_interval", rules.LINEAR),
            sparse=rules.sparse_steps,
            more=rules.qwen3_next,
        ),
        "gpt2": _gpt2,
        "gpt_bigcode": replace(
            _gpt2,
            defaults={**_gpt2.defaults, "multi_query": True},
            heads=rules.multi_query,
        ),
        "gpt_neox": Family(
            fused("attention", "query_key_value", "dense", "attention_bias"),
            plain("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
            norms("input_layernorm", "post_attention_layernorm", bias=True),
            trunk="gpt_neox",
            embedding="embed_in",
            beside=norms("final_layer_norm", bias=True),
            names=_ONLY_GROUPED,
            defaults={"attention_bias": True},
        ),
        "opt": Family(
            (
                Matrix("self_attn.k_proj", "hidden", "hidden", "enable_bias"),
                Matrix("self_attn.v_proj", "hidden", "hidden", "enable_bias"),
                Matrix("self_attn.q_proj", "hidden", "hidden", "enable_bias"),
                Matrix("self_attn.out_proj", "hidden", "hidden", "enable_bias"),
            ),
            plain("fc1", "fc2", "enable_bias"),
            norms("self_attn_layer_norm", "final_layer_norm", bias=True, size="normed"),
            trunk="model.decoder",
            beside=(
                Kept("embed_positions.weight", ("positions", "hidden")),
                Matrix("project_out", "projected", "hidden"),
                Matrix("project_in", "hidden", "projected"),
                *norms("final_layer_norm", bias=True, size="last_normed"),
            ),
            names={**_ONLY_GROUPED, "intermediate_size": ("ffn_dim",)},
            defaults={
                **_TIED,
                "enable_bias": True,
                "do_layer_norm_before": True,
                "layer_norm_elementwise_affine": True,
            },
            more=rules.opt,
        ),
        "falcon": Family(
            fused("self_attention", "query_key_value", "dense", "bias"),
            plain("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "bias"),
            (
                *norms("input_layernorm", bias=True, size="one_norm"),
                *norms("ln_attn", "ln_mlp", bias=True, size="two_norms"),
                *norms("post_attention_layernorm", bias=True, size="norm_between"),
            ),
            trunk="transformer",
            blocks="h",
            embedding="word_embeddings",
            beside=norms("ln_f", bias=True),
            names={
                "hidden_size": ("hidden_size", "n_embed"),
                "num_key_value_heads": ("num_kv_heads",),
                "head_dim": (),
                "intermediate_size": ("ffn_hidden_size",),
            },
            defaults={
                **_TIED,
                "intermediate_size": None,
                "multi_query": True,
                "parallel_attn": True,
            },
            heads=rules.falcon_heads,
            more=rules.falcon,
        ),
    }
)
