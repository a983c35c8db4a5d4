"""The model of a run, prepared as it was searched."""

from __future__ import annotations

from dataclasses import replace

from mpsearch.awq import fold
from mpsearch.errors import RunError
from mpsearch.model_files import config_digest
from mpsearch.models import Model
from mpsearch.opening import load_model
from mpsearch.run import Run


def searched_model(run: Run, memory_limit_bytes: int | None = None, job: str = "refine") -> Model:
    """Load the model that a run searched, with what was folded into it.

    Args:
        memory_limit_bytes, job: as `load_model` takes them.
    Raises:
        ModelError: it cannot be had any more.
        RunError: its weights have changed.
        ResourceError: as `load_model`.
    """
    asked = run.question
    chat_template = asked.get("chat_template", False)
    model = load_model(run.model_path, chat_template, memory_limit_bytes, job)
    model = replace(model, name=asked["model"])
    if run.preparation:
        model = fold(model, run.preparation)
    check_model(run, model)
    return model


def check_model(run: Run, model: Model) -> None:
    """Raise `RunError` unless it is the model that a run searched."""
    asked = run.question
    same_weights = model.fingerprint == asked["fingerprint"]
    # Older runs do not know it.
    same_config = asked.get("config") in (None, config_digest(model.folder))
    if not (same_weights and same_config):
        changed = "its config.json has" if same_weights else "its weights have"
        raise RunError(
            f"'{asked['model']}' is not the model that '{run.folder}' searched: {changed} changed; "
            "search again"
        )
