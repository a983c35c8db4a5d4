"""The model of a run, prepared as it was searched."""

from __future__ import annotations

from mpsearch.awq import fold
from mpsearch.errors import RunError
from mpsearch.models import Model, load_model
from mpsearch.run import Run


def searched_model(run: Run) -> Model:
    """Load the model that a run searched, with what was folded into it.

    Raises:
        ModelError: it cannot be had any more.
        RunError: its weights have changed.
    """
    model = load_model(run.question["model"], run.question.get("chat_template", False))
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
