"""Where a model's files are, and whether they can be a reference."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from mpsearch.architecture import read_config
from mpsearch.builtin import builtin_folder
from mpsearch.errors import ModelError
from mpsearch.hub import BUILTIN_NAME, from_hub, local_path
from mpsearch.shards import Shards, weight_files

# Files and folders that say what may be done with a model; no name fits two.
LICENCES = ("LICEN[CS]E*", "COPYING*", "NOTICE*", "USE_POLICY*")
# In a config and those within it: where it was, who wrote it, how it is generated from.
_NO_PART_OF_THE_FUNCTION = re.compile(
    "_name_or_path|transformers_version|dtype|torch_dtype|architectures|use_cache|.*_token_id"
)


def locate(name: str) -> Path:
    """The folder of a model, downloading it from the hub if it is neither built in nor local."""
    if name.startswith("builtin:"):
        if name != BUILTIN_NAME:
            raise ModelError(f"no built-in model '{name}'; the one there is: {BUILTIN_NAME}")
        return builtin_folder()
    folder = local_path(name)
    if folder.is_dir():
        return folder
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ModelError(
            f"model '{name}' is neither a folder here nor a hub id (owner/name); check the path"
        )
    return from_hub(name, _download)


def _download(repo: str) -> str:
    import huggingface_hub

    # No pickle is ever fetched.
    wanted = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", *LICENCES]
    return huggingface_hub.snapshot_download(repo, allow_patterns=wanted)


def config_digest(folder: Path) -> str:
    """Hex digest of what a model's `config.json` says of the function that it computes.

    Empty where there is none.
    """
    path = folder / "config.json"
    if not path.exists():
        return ""
    said = _function(read_config(path, str(folder)))
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _function(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    return {
        key: _function(value)
        for key, value in config.items()
        if not _NO_PART_OF_THE_FUNCTION.fullmatch(key)
    }


def check_folder(folder: Path, name: str) -> int:
    """Bytes of the safetensors files, after refusing what cannot be a reference.

    Raises:
        ModelError: no config, weights only as pickle, none at all, a checkpoint that is already
            quantized, or files that are not whole, as `mpsearch.shards.Shards` finds.
    """
    config = read_config(folder / "config.json", name)
    if quantization := config.get("quantization_config"):
        method = (
            quantization.get("quant_method", "unknown method")
            if isinstance(quantization, dict)
            else quantization
        )
        raise ModelError(
            f"model '{name}' is already quantized ({method}); the reference must be unquantized: "
            "pass the model it was made from"
        )
    if not weight_files(folder, name):
        pickles = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
        if pickles:
            raise ModelError(
                f"model '{name}' is stored only as pickle ({pickles[0].name}), which can run code; "
                "convert it with save_pretrained to safetensors"
            )
        raise ModelError(f"model '{name}': '{folder}' holds no .safetensors weights")
    return Shards(folder, name).file_bytes
