"""Architecture from a config: published counts, spaces, refusals, where configs come from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from conftest import tiny_family
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)

from mpsearch.architecture import load_config, read_architecture
from mpsearch.builtin import builtin_folder
from mpsearch.errors import ModelError
from mpsearch.families import FAMILIES
from mpsearch.hub import BUILTIN_NAME
from mpsearch.models import Model, load_whole
from mpsearch.space import SearchSpace

Config = dict[str, Any]

# Configs by hand from the models' own; every count carries its source.
PUBLISHED: dict[str, dict[str, Any]] = json.loads(
    Path(__file__).with_name("published_models.json").read_text(encoding="utf-8")
)
DEEPSEEK = "deepseek-ai/DeepSeek-V3"

BOTH_ENDS = """\
version: 1
target: compressed-tensors
formats: [int4-g64, int8-g64]
embedding: [int8-channel-unpacked, bf16]
"""


def tiny(**changes: Any) -> Config:
    """A llama config; a change to None leaves its field out."""
    config: Config = {
        "model_type": "llama",
        "vocab_size": 71,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        **changes,
    }
    return {key: value for key, value in config.items() if value is not None}


def refusal(config: Any) -> str:
    with pytest.raises(ModelError) as caught:
        read_architecture(config, "some/model")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("model 'some/model': ")
    return message


# ------------------------------------------------------------------------------ published models


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_many_as_published(name: str) -> None:
    assert PUBLISHED[name]["source"]
    found = read_architecture(PUBLISHED[name]["config"], name).parameters
    assert found == pytest.approx(PUBLISHED[name]["parameters"], rel=1e-3)


@pytest.mark.parametrize(
    "name", [name for name, entry in PUBLISHED.items() if "active_parameters" in entry]
)
def test_a_token_passes_as_many_as_published(name: str) -> None:
    found = read_architecture(PUBLISHED[name]["config"], name)
    assert found.active_parameters == pytest.approx(PUBLISHED[name]["active_parameters"], rel=0.02)


@pytest.mark.parametrize(
    "name", [name for name, entry in PUBLISHED.items() if "active_without_embedding" in entry]
)
def test_a_token_passes_as_many_as_published_without_the_table(name: str) -> None:
    found = read_architecture(PUBLISHED[name]["config"], name)
    assert found.embedding
    active = found.active_parameters - found.embedding.weights
    assert active == pytest.approx(PUBLISHED[name]["active_without_embedding"], rel=0.02)


def test_without_experts_a_token_passes_all() -> None:
    found = read_architecture(PUBLISHED["meta-llama/Llama-2-7b-hf"]["config"], "llama")
    assert found.active_parameters == found.parameters


def test_deepseek_v3_keeps_a_latent_of_576_values_a_token() -> None:
    found = read_architecture(PUBLISHED[DEEPSEEK]["config"], DEEPSEEK)
    kept = {block.attention.latent_dim for block in found.blocks}
    assert kept == {576}  # arXiv:2412.19437, section 4.2: 512 and 64
    assert sum(".experts." in layer.name for layer in found.layers) == 44_544
    assert [block.inner for block in found.blocks] == [18_432] * 3 + [9 * 2048] * 58


def test_gemma_2_alternates_windows_and_gpt_oss_does() -> None:
    for name, window in (("google/gemma-2-9b", 4096), ("openai/gpt-oss-20b", 128)):
        blocks = read_architecture(PUBLISHED[name]["config"], name).blocks
        windows = [block.attention.window for block in blocks]
        assert windows == [window, None] * (len(blocks) // 2)


def test_blocks_that_are_alike_are_one_object() -> None:
    found = read_architecture(PUBLISHED[DEEPSEEK]["config"], DEEPSEEK)
    assert len({id(block) for block in found.blocks}) == 2


# ------------------------------------------------------------------------------ spaces


def same_space(space: SearchSpace, model: Model, config: Config) -> None:
    """The space bound to the loaded model and to its architecture decides the same."""
    loaded = space.resolve(model)
    told = space.resolve(read_architecture(config, "told"))
    assert told.groups == loaded.groups
    assert told.options == loaded.options
    assert told.kept_bytes == loaded.kept_bytes
    assert read_architecture(config, "told").vector_weights == model.vector_weights
    for assignment in (loaded.smallest, loaded.largest):
        assert told.stored_bytes(assignment) == loaded.stored_bytes(assignment)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "qwen2_moe"])
def test_a_space_resolves_as_on_the_loaded_model(family: str) -> None:
    model = tiny_family(family)
    same_space(SearchSpace.default(), model, model.module.config.to_dict())


def test_a_space_of_a_tied_embedding_resolves_as_on_the_loaded_model() -> None:
    model = tiny_family("qwen2")
    space = SearchSpace.parse(BOTH_ENDS, "ends")
    same_space(space, model, model.module.config.to_dict())


def test_a_space_of_a_head_resolves_as_on_the_loaded_model() -> None:
    model = tiny_family("qwen3", tie_word_embeddings=False)
    space = SearchSpace.parse(BOTH_ENDS + "head: [int4-g64, bf16]\n", "ends")
    same_space(space, model, model.module.config.to_dict())


def test_the_built_in_models_space_resolves_as_on_the_loaded_one() -> None:
    model = load_whole(BUILTIN_NAME)
    told = read_architecture(load_config(BUILTIN_NAME), BUILTIN_NAME)
    assert told.layers == model.layers
    assert (told.embedding, told.head) == (model.embedding, model.head)
    assert told.kept == {name: tuple(tensor.shape) for name, tensor in model.kept.items()}
    same_space(SearchSpace.default(), model, load_config(BUILTIN_NAME))


# ------------------------------------------------------------------------------ refusals


def test_an_unknown_family_is_refused_with_those_known() -> None:
    message = refusal(tiny(model_type="mamba"))
    assert "model_type is 'mamba'" in message
    assert all(family in message for family in FAMILIES)


def test_a_config_without_a_family_is_refused() -> None:
    assert "lacks model_type" in refusal(tiny(model_type=None))


def test_all_missing_fields_are_named_as_the_family_spells_them() -> None:
    message = refusal(tiny(hidden_size=None, intermediate_size=None, vocab_size=None))
    assert "lacks hidden_size, vocab_size, intermediate_size" in message
    assert "lacks n_embd, n_layer, n_head, vocab_size" in refusal({"model_type": "gpt2"})
    assert "ffn_dim" in refusal({"model_type": "opt"})


@pytest.mark.parametrize("value", [0, -4096, 4096.0, "4096", True, 10**12, [64]])
@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "vocab_size"])
def test_a_size_that_is_none_is_refused_with_its_field_and_value(field: str, value: Any) -> None:
    message = refusal(tiny(**{field: value}))
    assert f"{field} is {value!r}" in message
    assert "whole number from 1" in message


MIXTURE = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2,
           "moe_intermediate_size": 24}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_attention_heads": 6}, ("hidden_size is 64", "num_attention_heads", "is 6")),
        ({"num_key_value_heads": 3}, ("num_attention_heads is 4", "num_key_value_heads", "is 3")),
        ({"num_key_value_heads": 8}, ("num_key_value_heads", "is 8")),
        ({"num_key_value_heads": 0}, ("num_key_value_heads is 0",)),
        ({"head_dim": -8}, ("head_dim is -8",)),
        ({"layer_types": ["full_attention"] * 2}, ("layer_types holds 2", "num_hidden_layers")),
        ({"layer_types": "full_attention"}, ("layer_types holds 'full_attention'",)),
        ({"layer_types": ["full_attention", "conv", "conv"]}, ("layer_types", "'conv'")),
        ({"layer_types": ["sliding_attention"] * 3}, ("sliding_attention", "sliding_window")),
        ({"layer_types": ["linear_attention"] * 3}, ("'linear_attention'",)),
        ({"attention_bias": "yes"}, ("attention_bias is 'yes'", "true or false")),
        ({"tie_word_embeddings": 3}, ("tie_word_embeddings is 3",)),
        ({"num_hidden_layers": 10_000_000}, ("num_hidden_layers is 10000000",)),
        ({"max_position_embeddings": 0}, ("max_position_embeddings is 0",)),
        ({"model_type": "mistral", "sliding_window": 0}, ("sliding_window is 0",)),
        ({**MIXTURE, "num_experts_per_tok": 5}, ("num_experts_per_tok is 5", "num_experts")),
        ({**MIXTURE, "mlp_only_layers": [-1]}, ("mlp_only_layers is [-1]",)),
        ({**MIXTURE, "decoder_sparse_step": 0}, ("decoder_sparse_step is 0",)),
        ({**MIXTURE, "num_experts": None}, ("num_experts is absent",)),
        ({"model_type": "deepseek_v3", "n_routed_experts": 4}, ("qk_nope_head_dim is absent",)),
    ],
    ids=str,
)
def test_what_contradicts_or_is_nothing_is_named(changes: Config, words: tuple[str, ...]) -> None:
    message = refusal(tiny(**changes))
    assert all(word in message for word in words), message


def test_a_null_size_is_refused_and_a_null_option_is_none() -> None:
    assert "vocab_size is null" in refusal({**tiny(), "vocab_size": None})
    every_head = read_architecture({**tiny(), "num_key_value_heads": None}, "m").blocks[0]
    assert every_head.attention.kv_heads == 4


def test_a_head_width_makes_up_for_a_width_that_heads_do_not_divide() -> None:
    found = read_architecture(tiny(num_attention_heads=6, head_dim=16), "m")
    assert found.blocks[0].attention.key_dim == 16


def test_a_context_that_is_not_stated_is_none() -> None:
    assert read_architecture(tiny(), "m").context is None
    assert read_architecture(tiny(max_position_embeddings=8192), "m").context == 8192


# ------------------------------------------------------------------------------ multimodal


def test_of_a_multimodal_config_the_text_model_counts() -> None:
    config = {"model_type": "llava", "text_config": tiny(), "vision_config": {"hidden_size": 9}}
    found, text = read_architecture(config, "m"), read_architecture(tiny(), "m")
    assert (found.family, found.parameters) == ("llama", text.parameters)
    assert found.layers[0].name == "model.language_model.layers.0.self_attn.q_proj"
    assert text.layers[0].name == "model.layers.0.self_attn.q_proj"


def test_the_outer_config_says_whether_the_head_is_tied() -> None:
    config = {"model_type": "llava", "text_config": tiny(), "tie_word_embeddings": True}
    found = read_architecture(config, "m")
    assert found.head is None
    assert found.embedding is not None
    assert found.embedding.tied == "lm_head"


# ------------------------------------------------------------------------------ configs


def test_a_folder_and_a_file_hold_a_config(tiny_folder: Path) -> None:
    found = load_config(str(tiny_folder))
    assert found["hidden_size"] == 64
    assert load_config(str(tiny_folder / "config.json")) == found


def test_the_built_in_config_is_the_real_ones_shape() -> None:
    real = json.loads((builtin_folder() / "config.json").read_text(encoding="utf-8"))
    told = load_config(BUILTIN_NAME)
    assert told == {key: real[key] for key in told}
    found, expected = read_architecture(told, "m"), read_architecture(real, "m")
    assert found == expected


def no_config(name: str) -> str:
    with pytest.raises(ModelError) as caught:
        load_config(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_holds_no_config_is_refused(tmp_path: Path) -> None:
    assert "has no config.json" in no_config(str(tmp_path))
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    assert "cannot be read" in no_config(str(tmp_path))
    (tmp_path / "config.json").write_text("[1]", encoding="utf-8")
    assert "holds no object" in no_config(str(tmp_path / "config.json"))
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    assert "cannot be read" in no_config(str(tmp_path))
    for nowhere in ("nowhere", "./no/where", "some/config.json", "a/b/c"):
        assert "check the path" in no_config(nowhere)
    assert "no built-in model" in no_config("builtin:other")


def raising(error: Exception) -> Callable[..., str]:
    def hf_hub_download(*args: Any, **kwargs: Any) -> str:
        raise error

    return hf_hub_download


RESPONSE: Any = SimpleNamespace(headers={}, request=None, status_code=403)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (GatedRepoError("403\nGated.", response=RESPONSE), "is gated: accept its terms"),
        (RepositoryNotFoundError("404\nNo.", response=RESPONSE), "does not exist on the hub"),
        (RemoteEntryNotFoundError("404\nNo.", response=RESPONSE), "no config.json on the hub"),
        (HfHubHTTPError("500\nBroken.", response=RESPONSE), "cannot be reached"),
        (LocalEntryNotFoundError("not\ncached"), "cannot be reached"),
        (ConnectionError("no\nroute"), "cannot be reached"),
    ],
    ids=["gated", "not-found", "no-config", "server", "not-cached", "network"],
)
def test_what_the_hub_says_becomes_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", raising(error))
    message = no_config("someone/something")
    assert "'someone/something'" in message
    assert words in message


def test_of_a_hub_id_only_the_config_is_fetched(
    monkeypatch: pytest.MonkeyPatch, tiny_folder: Path
) -> None:
    asked = []

    def hf_hub_download(repo: str, name: str) -> str:
        asked.append((repo, name))
        return str(tiny_folder / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    assert load_config("someone/something") == load_config(str(tiny_folder))
    assert asked == [("someone/something", "config.json")]


def test_an_uncached_hub_id_while_offline_is_refused() -> None:
    assert "the hub cannot be reached" in no_config("someone/something")
    assert "nor a valid hub id" in no_config("some one/some thing")


# ------------------------------------------------------------------------------ light


def test_telling_a_large_model_loads_no_torch(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(PUBLISHED[DEEPSEEK]["config"]), encoding="utf-8"
    )
    code = f"""
import sys
from mpsearch.architecture import load_config, read_architecture
from mpsearch.space import SearchSpace
for name in ({str(tmp_path)!r}, {BUILTIN_NAME!r}):
    space = SearchSpace.default().resolve(read_architecture(load_config(name), name))
    assert space.stored_bytes(space.smallest) > 0
print(*sorted({{"torch", "transformers", "optuna", "huggingface_hub"}} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert done.stdout.split() == []
