"""How a config's fields give a family's heads, windows, expert blocks and further sizes.

The rules are those of transformers' `configuration_*.py` and `modeling_*.py` (5.23). A rule of
kinds says of each block what transformers calls its layer type, where the config lists none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mpsearch.config_fields import Fields

Sizes = Mapping[str, int]


def _head_dim(fields: Fields, hidden: int, heads: int) -> int:
    stated = fields.size_or_none("head_dim")
    if stated is None and hidden % heads:
        raise fields.fault(
            f"{fields.spelled('hidden_size')} is {hidden} in its config.json, no multiple of "
            f"{fields.spelled('num_attention_heads')}, which is {heads}, and no head_dim is given"
        )
    return stated or hidden // heads


def grouped(fields: Fields, hidden: int, heads: int) -> tuple[int, int, int]:
    """Key-value heads, width of a key, width of a value, where each key has several queries."""
    kv_heads = fields.size_or_none("num_key_value_heads") or heads
    if heads % kv_heads:
        raise fields.fault(
            f"{fields.spelled('num_attention_heads')} is {heads} in its config.json, no multiple "
            f"of {fields.spelled('num_key_value_heads')}, which is {kv_heads}"
        )
    head_dim = _head_dim(fields, hidden, heads)
    return kv_heads, head_dim, head_dim


def multi_query(fields: Fields, hidden: int, heads: int) -> tuple[int, int, int]:
    head_dim = _head_dim(fields, hidden, heads)
    return 1 if fields.flag("multi_query") else heads, head_dim, head_dim


def falcon_heads(fields: Fields, hidden: int, heads: int) -> tuple[int, int, int]:
    rule = grouped if fields.flag("new_decoder_architecture") else multi_query
    return rule(fields, hidden, heads)


def latent_heads(fields: Fields, hidden: int, heads: int) -> tuple[int, int, int]:
    key_dim = fields.size("qk_nope_head_dim") + fields.size("qk_rope_head_dim")
    return heads, key_dim, fields.size("v_head_dim")


FULL, SLIDING = "full_attention", "sliding_attention"
CHUNKED, LINEAR = "chunked_attention", "linear_attention"


def all_full(fields: Fields, blocks: int) -> list[str]:
    return [FULL] * blocks


def all_windows(fields: Fields, blocks: int) -> list[str]:
    return [SLIDING if fields.window() else FULL] * blocks


def last_of(field: str, other: str) -> Callable[[Fields, int], list[str]]:
    """Full attention in the last block of every so many, the field's number; another kind else."""

    def kinds(fields: Fields, blocks: int) -> list[str]:
        every = fields.size(field)
        return [other if (i + 1) % every else FULL for i in range(blocks)]

    return kinds


def windows_above(fields: Fields, blocks: int) -> list[str]:
    if fields.window() is None:
        return [FULL] * blocks
    below = fields.size("max_window_layers", least=0)
    return [SLIDING if i >= below else FULL for i in range(blocks)]


def every_other_window_below(fields: Fields, blocks: int) -> list[str]:
    if fields.window() is None:
        return [FULL] * blocks
    below = fields.size("max_window_layers", least=0)
    return [SLIDING if i % 2 == 0 and i < below else FULL for i in range(blocks)]


def where_positions_rotate(local: str) -> Callable[[Fields, int], list[str]]:
    """SmolLM3 has windows where positions do not rotate, Llama 4 chunks where they do."""

    def kinds(fields: Fields, blocks: int) -> list[str]:
        every = fields.size("no_rope_layer_interval")
        rotate = fields.value("no_rope_layers") and fields.of_each_block("no_rope_layers", blocks)
        rotate = rotate or [(i + 1) % every != 0 for i in range(blocks)]
        if local == SLIDING and fields.window() is None:
            return [FULL] * blocks
        return [local if bool(turns) == (local == CHUNKED) else FULL for turns in rotate]

    return kinds


def no_block(fields: Fields, blocks: int) -> list[bool]:
    return [False] * blocks


def every_block(fields: Fields, blocks: int) -> list[bool]:
    return [True] * blocks


def after_dense(fields: Fields, blocks: int) -> list[bool]:
    dense = fields.size("first_k_dense_replace", least=0)
    return [i >= dense for i in range(blocks)]


def sparse_steps(fields: Fields, blocks: int) -> list[bool]:
    step, dense = fields.size("decoder_sparse_step"), fields.indices("mlp_only_layers") or []
    return [i not in dense and (i + 1) % step == 0 for i in range(blocks)]


def llama4_experts(fields: Fields, blocks: int) -> list[bool]:
    step, listed = fields.size("interleave_moe_layer_step"), fields.indices("moe_layers")
    return [(i + 1) % step == 0 if listed is None else i in listed for i in range(blocks)]


def no_more(fields: Fields, sizes: Sizes) -> dict[str, int]:
    return {}


def mixture(width: str, shared: str = "") -> Callable[[Fields, Sizes], dict[str, int]]:
    """Experts of the field's width, and a shared one of another field's."""

    def more(fields: Fields, sizes: Sizes) -> dict[str, int]:
        experts, chosen = fields.size("num_experts"), fields.size("num_experts_per_tok")
        if chosen > experts:
            raise fields.fault(
                f"num_experts_per_tok is {chosen} in its config.json, more than "
                f"{fields.spelled('num_experts')}, which is {experts}"
            )
        return {
            "experts": experts,
            "chosen": chosen,
            "expert_inner": fields.size(width),
            "shared_inner": fields.size(shared) if shared else 0,
        }

    return more


def deepseek(fields: Fields, sizes: Sizes) -> dict[str, int]:
    found = mixture("moe_intermediate_size")(fields, sizes)
    rank, latent = fields.size_or_none("q_lora_rank") or 0, fields.size("kv_lora_rank")
    return found | {
        "shared_inner": found["expert_inner"] * fields.size("n_shared_experts"),
        "direct_queries": 0 if rank else sizes["queries"],
        "query_rank": rank,
        "latent": latent,
        "latent_and_rotated": latent + fields.size("qk_rope_head_dim"),
        "expanded": sizes["heads"] * (fields.size("qk_nope_head_dim") + sizes["value_dim"]),
    }


def llama4(fields: Fields, sizes: Sizes) -> dict[str, int]:
    found = mixture("intermediate_size", "intermediate_size")(fields, sizes)
    return found | {"inner": fields.size("intermediate_size_mlp")}


def qwen3_next(fields: Fields, sizes: Sizes) -> dict[str, int]:
    found = mixture("moe_intermediate_size", "shared_expert_intermediate_size")(fields, sizes)
    value_heads, value_dim = (
        fields.size("linear_num_value_heads"),
        fields.size("linear_value_head_dim"),
    )
    keys = fields.size("linear_num_key_heads") * fields.size("linear_key_head_dim")
    values = value_heads * value_dim
    return found | {
        "queries_and_gates": 2 * sizes["queries"],
        "state_heads": value_heads,
        "state_key_heads": fields.size("linear_num_key_heads"),
        "state_key_dim": fields.size("linear_key_head_dim"),
        "state_value_dim": value_dim,
        "state_outputs": values,
        "convolved": 2 * keys + values,
        "kernel": fields.size("linear_conv_kernel_dim"),
        "state_inputs": 2 * keys + 2 * values,
        "state_rates": 2 * value_heads,
    }


def positions(fields: Fields, sizes: Sizes) -> dict[str, int]:
    return {"positions": fields.size("max_position_embeddings")}


def opt(fields: Fields, sizes: Sizes) -> dict[str, int]:
    hidden, word = sizes["hidden"], fields.size_or_none("word_embed_proj_dim") or sizes["hidden"]
    normed = hidden if fields.flag("layer_norm_elementwise_affine") else 0
    last = fields.flag("do_layer_norm_before") and not fields.flag("_remove_final_layer_norm")
    return {
        "positions": fields.size("max_position_embeddings") + 2,  # two for padding
        "word": word,
        "projected": word if word != hidden else 0,
        "normed": normed,
        "last_normed": normed if last else 0,
    }


def falcon(fields: Fields, sizes: Sizes) -> dict[str, int]:
    norms = fields.size_or_none("num_ln_in_parallel_attn")
    if norms is None and fields.flag("new_decoder_architecture"):
        norms = 2
    parallel, hidden = fields.flag("parallel_attn"), sizes["hidden"]
    two = parallel and norms == 2
    return {
        "one_norm": 0 if two else hidden,
        "two_norms": hidden if two else 0,
        "norm_between": 0 if parallel else hidden,
    }


def if_flag(flag: str, size: str) -> Callable[[Fields, Sizes], dict[str, int]]:
    """A size named like the flag, 0 where it is off."""
    return lambda fields, sizes: {flag: sizes[size] if fields.flag(flag) else 0}


def stablelm(fields: Fields, sizes: Sizes) -> dict[str, int]:
    if fields.flag("qk_layernorm"):
        raise fields.fault("'stablelm' with qk_layernorm is not known; use another model")
    return {"norm_between": 0 if fields.flag("use_parallel_residual") else sizes["hidden"]}
