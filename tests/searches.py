"""What the tests of searches ask of a run, and how they break one off."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import optuna
import pytest

from mpsearch.points import Point
from mpsearch.run import Run

SEARCH_TRIALS = 6
SEARCH_FACTS = 30
Search = Callable[..., Run]


def result(run: Run) -> dict[str, Any]:
    """Everything that a resumed search must reproduce exactly."""
    front = run.front()

    def figures(point: Point) -> tuple[Any, ...]:
        return (point.id, point.kind, point.stored_bytes, point.score.loss_per_fact, point.recall)

    return {
        "points": [figures(point) for point in front.points],
        "front": front.pareto_ids,
        "pick": front.pick and front.pick.id,
        "verdict": front.verdict,
        "test": [figures(point) for point in run.points("test")],
        "search": sorted(
            (s.assignment.id, s.loss_per_fact) for s in run.scores() if s.partition == "search"
        ),
    }


def study_of(run: Run) -> optuna.Study:
    backend = optuna.storages.journal.JournalFileBackend(str(run.journal))
    return optuna.load_study(study_name="mpsearch", storage=optuna.storages.JournalStorage(backend))


def proposals(run: Run) -> list[dict[str, str]]:
    return [t.params for t in study_of(run).trials if t.user_attrs.get("kind") == "search"]


def evaluation_lines(run: Run) -> list[dict[str, Any]]:
    text = (run.folder / "evaluations.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@contextmanager
def interrupted_at(owner: type, method: str, number: int, after: bool = False) -> Iterator[None]:
    """Ctrl-C in the given call of a method, before or after it does its work; it must end this."""
    original = getattr(owner, method)
    seen = 0

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen != number:
            return original(*args, **kwargs)
        if after:
            original(*args, **kwargs)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, method, interrupted)
        yield
