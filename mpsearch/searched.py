"""The model of a run, prepared as it was searched."""

from __future__ import annotations

from mpsearch.awq import fold
from mpsearch.errors import RunError
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
    model = load_model(asked["model"], asked.get("chat_template", False), memory_limit_bytes, job)
    if run.preparation:
        model = fold(model, run.preparation)
    check_model(run, model)
    return model


def check_model(run: Run, model: Model) -> None:
    """Raise `RunError` unless it is the model that a run searched."""
    if model.fingerprint != run.question["fingerprint"]:
        raise RunError(
            f"'{run.question['model']}' is not the model that '{run.folder}' searched: its weights "
            "have changed; search again"
        )
