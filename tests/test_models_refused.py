"""Loading: what is refused and how, from a folder and from the hub."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors.torch import load_file
from test_models import edit_config, edit_weights, shard, wrapped
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
)

from mpsearch.errors import CheckError, ModelError, MpsearchError, ResourceError
from mpsearch.models import Model, load_whole

Edit = Callable[[Path], object]


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model's folder, to be spoilt."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def refusal(name: str | Path, kind: type[MpsearchError] = ModelError) -> str:
    """The message of the error that loading gives, which must be one line."""
    with pytest.raises(kind) as caught:
        load_whole(str(name))
    assert caught.type is kind
    message = str(caught.value)
    assert "\n" not in message
    assert 20 < len(message) < 700
    return message


# ------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("name", ["./missing", "/no/such/folder", "~/no-such", "a/b/c", "word"])
def test_a_folder_that_does_not_exist(name: str) -> None:
    assert f"'{name}' is neither a folder here nor a hub id" in refusal(name)


def test_a_file_in_place_of_a_folder(folder: Path) -> None:
    assert "neither a folder" in refusal(folder / "config.json")


def test_a_folder_without_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "has no config.json" in refusal(folder)


def test_a_config_that_is_not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    assert "config.json cannot be read" in refusal(folder)


def test_a_model_type_that_nobody_knows(folder: Path) -> None:
    edit_config(folder, model_type="nonesuch")
    assert "does not load" in refusal(folder)


def test_weights_stored_only_as_pickle(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert "stored only as pickle (pytorch_model.bin)" in refusal(folder)


def test_no_weights_at_all(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "holds no .safetensors weights" in refusal(folder)


def test_a_model_that_is_quantized_already(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "already quantized (gptq)" in refusal(folder)


def test_a_shard_that_is_missing(tiny_folder: Path, tmp_path: Path) -> None:
    sharded = shard(tmp_path / "sharded", tiny_folder)
    gone = sorted(sharded.glob("*.safetensors"))[1]
    gone.unlink()
    assert f"shard {gone.name} is missing" in refusal(sharded)


def test_a_shard_outside_the_folder_is_not_looked_at(tiny_folder: Path, tmp_path: Path) -> None:
    sharded = shard(tmp_path / "sharded", tiny_folder)
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = dict.fromkeys(content["weight_map"], "../../elsewhere.safetensors")
    index.write_text(json.dumps(content))
    assert "names '../../elsewhere.safetensors', which lies outside its folder" in refusal(sharded)


def test_a_shard_that_is_pickle_is_not_read(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharded = shard(tmp_path / "sharded", tiny_folder)
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    torch.save(load_file(tiny_folder / "model.safetensors"), sharded / "weights.bin")
    content["weight_map"] = dict.fromkeys(content["weight_map"], "weights.bin")
    index.write_text(json.dumps(content))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("pickle was read"))
    assert "names 'weights.bin', which is no safetensors file" in refusal(sharded)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_weight_that_is_not_finite_is_named(folder: Path, name: str, bad: float) -> None:
    edit_weights(folder, lambda weights: weights[name].view(-1)[3:5].fill_(bad))
    message = refusal(folder, CheckError)
    assert f"'{name}' holds 2 NaN or infinite" in message


def test_a_float32_weight_beyond_bf16_is_named(folder: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    edit_weights(folder, lambda weights: weights.update({name: torch.full((128, 64), 3.4e38)}))
    assert f"'{name}' holds 8192" in refusal(folder, CheckError)


def test_a_tensor_of_another_shape(folder: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    edit_weights(folder, lambda weights: weights.update({name: torch.zeros(3, 3)}))
    assert "does not load" in refusal(folder)


def test_a_folder_without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert "does not load" in refusal(folder)


def test_a_model_without_linear_layers() -> None:
    module = GPT2LMHeadModel(GPT2Config(vocab_size=71, n_embd=8, n_layer=0, n_head=1))
    with pytest.raises(ModelError, match="no linear layers"):
        wrapped(module)


def test_an_unknown_builtin_is_refused_with_the_one_there_is() -> None:
    assert "the one there is: builtin:smollm2-135m" in refusal("builtin:gpt5")


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-2000])


def point_elsewhere(folder: Path) -> None:
    """As git leaves a large file when git-lfs is not installed."""
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (folder / "model.safetensors").write_text(text)


def list_as_config(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def indivisible_heads(folder: Path) -> None:
    edit_config(folder, hidden_size=63)


def broken_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{")


def empty_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{}")


@pytest.mark.parametrize(
    "spoil",
    [truncate, point_elsewhere, list_as_config, indivisible_heads, broken_index, empty_index],
)
def test_a_damaged_folder(folder: Path, spoil: Edit) -> None:
    spoil(folder)
    refusal(folder)


def test_a_checkpoint_that_lacks_a_weight(folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edit_weights(folder, lambda weights: weights.pop(name))
    with pytest.raises(MpsearchError, match=name):
        load_whole(str(folder))


# ------------------------------------------------------------------------------ from the hub


def response() -> Any:
    return SimpleNamespace(headers={}, request=None, status_code=403)


def raising(error: Exception) -> Callable[..., str]:
    def snapshot_download(*args: Any, **kwargs: Any) -> str:
        raise error

    return snapshot_download


def test_a_hub_id_while_offline_is_refused_and_says_what_to_do() -> None:
    message = refusal("someone/something")
    assert "the hub cannot be reached" in message
    assert "builtin:smollm2-135m" in message


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (GatedRepoError("403\nGated.", response=response()), "is gated: accept its terms"),
        (RepositoryNotFoundError("404\nNo.", response=response()), "does not exist on the hub"),
        (HfHubHTTPError("500\nBroken.", response=response()), "cannot be reached"),
        (LocalEntryNotFoundError("not\ncached"), "cannot be reached"),
        (ConnectionError("no\nroute"), "cannot be reached"),
    ],
    ids=["gated", "not-found", "server", "not-cached", "network"],
)
def test_what_the_hub_says_becomes_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", raising(error))
    message = refusal("someone/something")
    assert "'someone/something'" in message
    assert words in message


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_cache_that_cannot_be_written_is_not_blamed_on_the_hub(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    error = OSError(number, os.strerror(number))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", raising(error))
    with pytest.raises(ResourceError, match=f"cannot be written .{os.strerror(number)}.; free"):
        load_whole("someone/something")


def test_an_impossible_hub_id_is_refused() -> None:
    assert "nor a valid hub id" in refusal("some one/some thing")


def test_a_hub_model_is_loaded_without_ever_fetching_pickle(
    monkeypatch: pytest.MonkeyPatch, tiny_folder: Path, tiny: Model
) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(repo: str, **kwargs: Any) -> str:
        asked.update(kwargs, repo=repo)
        return str(tiny_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    found = load_whole("someone/something")
    assert (found.name, found.fingerprint) == ("someone/something", tiny.fingerprint)
    assert asked["repo"] == "someone/something"
    unwanted = ("pytorch_model.bin", "model.pt", "model.pth", "model.pkl", "modeling.py", "a.ckpt")
    assert not [n for n in unwanted for p in asked["allow_patterns"] if Path(n).match(p)]
    needed = ("model-00001-of-00002.safetensors", "config.json", "tokenizer.json")
    assert all(any(Path(n).match(p) for p in asked["allow_patterns"]) for n in needed)
