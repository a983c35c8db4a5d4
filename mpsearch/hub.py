"""Names of models that are no folder: the built-in one, and those on the Hugging Face hub."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

from mpsearch.errors import ModelError, ResourceError

BUILTIN_NAME = "builtin:smollm2-135m"
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


def local_path(name: str) -> Path:
    """The path that a model's name would be. Raises `ModelError` for a home that is nobody's."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        user = name.partition("/")[0]
        raise ModelError(f"model '{name}': there is no user '{user[1:]}'; check the path") from None


def from_hub(repo: str, fetch: Callable[[str], str]) -> Path:
    """Where a fetched file or folder of a hub id is.

    Args:
        repo: `owner/name`.
        fetch: `repo` to the path, by huggingface_hub; from its cache where that has it.
    Raises:
        ModelError: no such model, no such file in it, or neither the hub nor the cache has it.
        ResourceError: what was fetched cannot be written.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(fetch(repo))
    except HFValidationError:
        raise ModelError(f"model '{repo}' is neither a folder here nor a valid hub id") from None
    except GatedRepoError:
        raise ModelError(
            f"model '{repo}' is gated: accept its terms on its hub page, then 'hf auth login' "
            "or set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"model '{repo}' does not exist on the hub, or is private; check the name, or log in "
            "with 'hf auth login'"
        ) from None
    except RemoteEntryNotFoundError:
        raise ModelError(
            f"model '{repo}' has no config.json on the hub; use one that transformers loads"
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        if error.errno in _UNWRITABLE:
            raise ResourceError(
                f"model '{repo}': the hub's cache cannot be written ({error.strerror}); free some "
                "disk space, or set HF_HOME to a folder that can be written"
            ) from None
        reason = " ".join(str(error).split())[:160]
        raise ModelError(
            f"model '{repo}': the hub cannot be reached and it is not cached ({reason}); download "
            f"it elsewhere and pass its folder, or use {BUILTIN_NAME}"
        ) from None
