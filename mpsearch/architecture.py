"""A causal language model's shape, told by its `config.json` alone: no weights, no torch.

Its layers, embedding, head and kept tensors carry the names, shapes and order that the loaded
model's have (`mpsearch.models`), so a search space resolves against either. The numbers are of the
weights in bf16, whatever the config says of quantization. Of a multimodal config only the text
model counts; what lies beside it (vision towers, projectors) is not in any of these.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from mpsearch.config_fields import Fields
from mpsearch.errors import ModelError
from mpsearch.families import FAMILIES
from mpsearch.family_parts import Expanded, Family, Part
from mpsearch.family_rules import CHUNKED, FULL, LINEAR, SLIDING
from mpsearch.formats import ITEM_BYTES
from mpsearch.hub import BUILTIN_NAME, from_hub, local_path
from mpsearch.layers import Layer

# What its config.json says of its shape, so that nothing is prepared to look at it.
_BUILTIN_CONFIG: Mapping[str, Any] = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
# Experts in all blocks: ten times what the largest models have; beyond it is no model but a slip.
_MOST_LAYERS = 1_000_000
# `_supports_sdpa` is False in transformers (5.23): a softcap, and attention sinks.
_EAGER = ("gemma2", "gpt_oss")


@dataclass(frozen=True)
class Attention:
    """How one block attends, and what it keeps of each token.

    Attributes:
        kind: `full`, `sliding`, `latent` (keys and values are expanded from one small vector a
            token) or `state` (linear attention).
        heads: query heads; of `state`, value heads.
        kv_heads: heads whose keys and values are kept; of `latent` as many as query heads, from
            whose latent all are expanded; of `state`, key heads.
        key_dim: width of a head's key.
        value_dim: width of a head's value.
        window: tokens that a block of `sliding` keeps at most.
        latent_dim: values a token that `latent` keeps: the latent, and the rotated part of the key.
        state_values: values a sequence that `state` keeps, however long it is: the last inputs of
            its convolution and the recurrent state.
    """

    kind: str
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None
    latent_dim: int = 0
    state_values: int = 0


@dataclass(frozen=True)
class Block:
    """One block.

    Attributes:
        inner: width of the feed-forward part that a token passes: the intermediate size, or the
            experts that a token is sent to and the shared ones together.
        experts: to which a token is sent; 0 without experts.
        inner_copies: vectors of that width that are held at once: gate, up and their product; more
            where the activation is written out in steps.
    """

    attention: Attention
    inner: int
    experts: int = 0
    inner_copies: int = 3


@dataclass(frozen=True)
class Architecture:
    """What a config says; it can stand in for a loaded model where only shapes count.

    Attributes:
        family: the `model_type` of the language model.
        hidden: width of the stream between blocks.
        vocabulary: rows of the embedding.
        context: the longest sequence, in tokens, that the config or else its family's default
            states; None if neither does.
        blocks: in order.
        layers: the weight matrices that may be quantized, as `mpsearch.models.Model.layers`.
        embedding: the input embedding.
        head: the output head; None where it is the embedding.
        kept: every stored tensor that is none of `layers`, by name, to its shape.
        idle_parameters: those of the experts that a token is not sent to.
        eager: whether transformers' only attention for it writes out all scores.
    """

    family: str
    hidden: int
    vocabulary: int
    context: int | None
    blocks: tuple[Block, ...]
    layers: tuple[Layer, ...]
    embedding: Layer | None
    head: Layer | None
    kept: Mapping[str, tuple[int, ...]]
    idle_parameters: int = 0
    eager: bool = False

    @property
    def parameters(self) -> int:
        """Weights of `layers` and `kept`; a shared one once, as published counts have it."""
        return sum(layer.weights for layer in self.layers) + sum(map(prod, self.kept.values()))

    @property
    def active_parameters(self) -> int:
        """Parameters that one token passes; the embedding's whole table is among them."""
        return self.parameters - self.idle_parameters

    @property
    def kept_bytes(self) -> int:
        """Bytes of `kept` in bf16. A router's balancing bias, which a checkpoint may hold in
        float32, counts as bf16 too."""
        return ITEM_BYTES["bfloat16"] * sum(map(prod, self.kept.values()))

    @property
    def vector_weights(self) -> int:
        """Weights of the kept norms and biases, which some containers store in float32."""
        return sum(prod(shape) for shape in self.kept.values() if len(shape) == 1)


def read_architecture(config: Mapping[str, Any], source: str) -> Architecture:
    """The architecture that a config describes.

    Args:
        config: the parsed `config.json`; of a multimodal one its `text_config` is read.
        source: what the user calls the model, for messages.
    Raises:
        ModelError: an unknown family, or a field that is missing, no size, or contradicts another.
    """
    fields, trunk, head_name = _open(config, source)
    family = FAMILIES[fields.family]
    fields.require(
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"),
        *(("intermediate_size",) if family.feed_forward else ()),
    )
    sizes = _sizes(family, fields)
    _refuse_absurd(fields, sizes)
    attentions = _attentions(family, fields, sizes)
    sorts = list(zip(attentions, family.sparse(fields, sizes["blocks"]), strict=True))
    # Blocks are alike but for these two, so each sort is expanded once.
    blocks = {sort: _block(fields, sizes, *sort) for sort in dict.fromkeys(sorts)}
    parts = {sort: Expanded.of(_block_parts(family, *sort), fields, sizes) for sort in blocks}
    placed = [
        (f"{trunk}.", Expanded.of(family.beside, fields, sizes)),
        *((f"{trunk}.{family.blocks}.{i}.", parts[sort]) for i, sort in enumerate(sorts)),
    ]

    tied = fields.flag("tie_word_embeddings")
    table = (sizes["vocabulary"], sizes["word"])
    embedding = Layer(f"{trunk}.{family.embedding}", *table, tied=head_name if tied else "")
    head = None if tied else Layer(head_name, *table)
    kept: dict[str, tuple[int, ...]] = {f"{embedding.name}.weight": table}
    for prefix, expanded in placed:
        kept.update(expanded.kept_under(prefix))
    if head:
        kept[f"{head_name}.weight"] = table
    if family.head_bias:
        kept[f"{head_name}.bias"] = table[:1]
    return Architecture(
        family=fields.family,
        hidden=sizes["hidden"],
        vocabulary=sizes["vocabulary"],
        context=fields.size_or_none("max_position_embeddings"),
        blocks=tuple(blocks[sort] for sort in sorts),
        layers=tuple(
            layer for prefix, expanded in placed for layer in expanded.layers_under(prefix)
        ),
        embedding=embedding,
        head=head,
        kept=kept,
        idle_parameters=sum(expanded.idle for _, expanded in placed),
        eager=fields.family in _EAGER,
    )


def _refuse_absurd(fields: Fields, sizes: Mapping[str, int]) -> None:
    count, experts = sizes["blocks"], sizes.get("experts")
    if count * (experts or 1) > _MOST_LAYERS:
        of_experts = f" and {fields.spelled('num_experts')} {experts}" if experts else ""
        raise fields.fault(
            f"{fields.spelled('num_hidden_layers')} is {count}{of_experts} in its config.json; "
            f"they may make {_MOST_LAYERS:,} at most"
        )


def _open(config: Mapping[str, Any], source: str) -> tuple[Fields, str, str]:
    """The fields of the language model, the path of its trunk, and its head's."""
    text = config.get("text_config")
    wrapper = str(config.get("model_type", "")) if isinstance(text, Mapping) else ""
    if isinstance(text, Mapping):
        outer = {key: config[key] for key in ("tie_word_embeddings",) if key in config}
        config = {**text, **outer}
    name = config.get("model_type")
    if name is None:
        raise ModelError(
            f"model '{source}': its config.json lacks model_type, which names its family; get it "
            "again"
        )
    if not isinstance(name, str) or name not in FAMILIES:
        raise ModelError(
            f"model '{source}': model_type is {name!r} in its config.json, whose architecture is "
            f"not known here; known: {', '.join(sorted(FAMILIES))}"
        )
    family = FAMILIES[name]
    fields = Fields(config, source, name, family.names, family.defaults)
    if not wrapper:
        return fields, family.trunk, "lm_head"
    # A wrapper holds the trunk itself as its language model, but Llama 4's the model with its head.
    if wrapper == "llama4":
        return fields, f"language_model.{family.trunk}", "language_model.lm_head"
    below = family.trunk.partition(".")[2]
    return fields, "model.language_model" + (f".{below}" if below else ""), "lm_head"


def _sizes(family: Family, fields: Fields) -> dict[str, int]:
    """The numbers of all sizes that the family's parts name."""
    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    kv_heads, key_dim, value_dim = family.heads(fields, hidden, heads)
    inner = fields.size_or_none("intermediate_size")
    if inner is None:
        # Where null is the default it stands for four times the stream's width.
        may_lack = "intermediate_size" in family.defaults or not family.feed_forward
        inner = 4 * hidden if may_lack else fields.size("intermediate_size")
    sizes = {
        "one": 1,
        "blocks": fields.size("num_hidden_layers"),
        "vocabulary": fields.size("vocab_size"),
        "hidden": hidden,
        "word": hidden,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": key_dim,
        "value_dim": value_dim,
        "queries": heads * key_dim,
        "keys": kv_heads * key_dim,
        "values": kv_heads * value_dim,
        "attended": heads * value_dim,
        "qkv": heads * key_dim + kv_heads * (key_dim + value_dim),
        "inner": inner,
        "gate_and_up": 2 * inner,
    }
    return sizes | family.more(fields, sizes)


def _attentions(family: Family, fields: Fields, sizes: Mapping[str, int]) -> list[Attention]:
    """How each block attends, blocks that attend alike sharing one object."""
    count = sizes["blocks"]
    kinds = fields.of_each_block("layer_types", count) or family.kinds(fields, count)
    known = (FULL, SLIDING, CHUNKED, *((LINEAR,) if family.state else ()))
    if wrong := next((kind for kind in kinds if kind not in known), None):
        raise fields.fault(
            f"layer_types holds {wrong!r} in its config.json, which a block of "
            f"'{fields.family}' cannot be; known: {', '.join(known)}"
        )
    made = {kind: _attention(kind, family, fields, sizes) for kind in dict.fromkeys(kinds)}
    return [made[kind] for kind in kinds]


def _attention(kind: str, family: Family, fields: Fields, sizes: Mapping[str, int]) -> Attention:
    heads = (sizes["heads"], sizes["kv_heads"], sizes["head_dim"], sizes["value_dim"])
    if kind == LINEAR:
        values, keys = sizes["state_heads"], sizes["state_key_heads"]
        key_dim, value_dim = sizes["state_key_dim"], sizes["state_value_dim"]
        state = sizes["convolved"] * sizes["kernel"] + values * key_dim * value_dim
        return Attention("state", values, keys, key_dim, value_dim, state_values=state)
    if kind == FULL and family.latent:
        return Attention("latent", *heads, latent_dim=sizes["latent_and_rotated"])
    if kind == FULL:
        return Attention("full", *heads)
    window = fields.window() if kind == SLIDING else fields.size_or_none("attention_chunk_size")
    if window is None:
        raise fields.fault(
            f"layer_types holds '{kind}' in its config.json, whose "
            f"{'sliding_window' if kind == SLIDING else 'attention_chunk_size'} is null or off"
        )
    return Attention("sliding", *heads, window=window)


def _block_parts(family: Family, attention: Attention, sparse: bool) -> tuple[Part, ...]:
    attends = family.state if attention.kind == "state" else family.attention
    return (*attends, *(family.experts if sparse else family.feed_forward), *family.norms)


def _block(fields: Fields, sizes: Mapping[str, int], attention: Attention, sparse: bool) -> Block:
    # transformers' NewGELUActivation: a power, a product, a sum, a tangent, each a tensor.
    in_steps = "gelu_new" in (
        fields.config.get(key) for key in ("activation_function", "hidden_act")
    )
    copies = 5 if in_steps else 3
    if not sparse:
        return Block(attention, sizes["inner"], 0, copies)
    inner = sizes["chosen"] * sizes["expert_inner"] + sizes["shared_inner"]
    return Block(attention, inner, sizes["chosen"], copies)


def load_config(name: str) -> dict[str, Any]:
    """The parsed `config.json` of a model; of a hub id nothing else is fetched.

    Args:
        name: a folder that holds one, the path of a JSON file, the built-in model or a hub id.
    Raises:
        ModelError: it cannot be had, or is no JSON object.
    """
    if name.startswith("builtin:"):
        if name != BUILTIN_NAME:
            raise ModelError(f"no built-in model '{name}'; the one there is: {BUILTIN_NAME}")
        return dict(_BUILTIN_CONFIG)
    path = local_path(name)
    if path.is_dir():
        path = path / "config.json"
    elif not path.is_file():
        if path.suffix == ".json" or name.startswith((".", "/", "~")) or name.count("/") != 1:
            raise ModelError(
                f"model '{name}' is neither a folder here, nor a .json file, nor a hub id "
                "(owner/name); check the path"
            )
        path = from_hub(name, _fetch_config)
    return read_config(path, name)


def read_config(path: Path, name: str) -> dict[str, Any]:
    """The JSON object in a model's config file.

    Args:
        name: what the user calls the model, for messages.
    Raises:
        ModelError: it is missing, cannot be read, or holds something else.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"model '{name}': '{path.parent}' has no config.json; pass the folder that "
            "save_pretrained or the hub wrote"
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"model '{name}': {path.name} cannot be read ({error})") from None
    if not isinstance(config, dict):
        raise ModelError(f"model '{name}': {path.name} holds no object; get it again")
    return config


def _fetch_config(repo: str) -> str:
    import huggingface_hub

    return huggingface_hub.hf_hub_download(repo, "config.json")
