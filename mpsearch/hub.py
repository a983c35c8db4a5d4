"""Names of models that are no folder: the built-in one, and those on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mpsearch.errors import ModelError

BUILTIN_NAME = "builtin:smollm2-135m"


def from_hub(repo: str, fetch: Callable[[str], str]) -> Path:
    """Where a fetched file or folder of a hub id is.

    Args:
        repo: `owner/name`.
        fetch: `repo` to the path, by huggingface_hub; from its cache where that has it.
    Raises:
        ModelError: no such model, no such file in it, or neither the hub nor the cache has it.
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
        reason = " ".join(str(error).split())[:160]
        raise ModelError(
            f"model '{repo}': the hub cannot be reached and it is not cached ({reason}); download "
            f"it elsewhere and pass its folder, or use {BUILTIN_NAME}"
        ) from None
