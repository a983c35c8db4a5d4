"""Ask a checkpoint some facts in a process of its own: `python -m mpsearch.served`.

Reads a request as JSON on standard input, and writes what the checkpoint answered, or the error, as
JSON to the file that the request names. Nothing of the process that made the checkpoint is here.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from mpsearch.asked import balanced
from mpsearch.console import quiet_libraries
from mpsearch.errors import MpsearchError, RunError
from mpsearch.export import tensor_bytes
from mpsearch.export.own_loader import load_as_served
from mpsearch.facts import Fact, FactSet
from mpsearch.model_files import config_digest
from mpsearch.opening import load_model
from mpsearch.recall import RecallProxy


def main() -> None:
    quiet_libraries()
    request = json.load(sys.stdin)
    try:
        answers = ask(request)
    except MpsearchError as error:
        answers = {"error": str(error), "kind": type(error).__name__}
    Path(request["out"]).write_text(json.dumps(answers), encoding="utf-8")


def ask(request: dict[str, Any]) -> dict[str, Any]:
    """Load a checkpoint and ask it.

    Args:
        request: `model`; `own`, whether its own library answers, instead of the model as a
            reference is loaded; `facts`, a file or None; `keys`, (relation, subject) of each fact
            to ask, or `partition` and `most`; `shots`, `chat_template`.
    Returns:
        Values a fact, beside the facts themselves, the seconds it took, and who loaded it.
    Raises:
        MpsearchError: what loading or asking it raised.
    """
    fact_set = FactSet.load(request["facts"]) if request["facts"] else FactSet.builtin()
    facts = _wanted(fact_set, request)
    began = time.perf_counter()
    if request["own"]:
        model, loader = load_as_served(request["model"], request["chat_template"])
    else:
        model = load_model(request["model"], request["chat_template"], job="ask")
        loader = "reference"
    loaded = time.perf_counter()
    proxy = RecallProxy(model, fact_set, facts, contrast=True, shots=request["shots"])
    scores = proxy.reference
    assert scores.correct is not None  # distractors were asked
    return {
        "loader": loader,
        "fingerprint": model.fingerprint,
        "config": config_digest(model.folder),
        "stored_bytes": tensor_bytes(Path(request["model"])) if request["own"] else None,
        "facts": fact_set.digest,
        "dtype": str(model.dtype),
        "device": model.device.type,
        "relations": [fact.relation for fact in facts],
        "subjects": [fact.subject for fact in facts],
        "correct": scores.correct.tolist(),
        "log_prob_nats": scores.log_prob.tolist(),
        "tokens": proxy.digest,
        "load_seconds": loaded - began,
        "ask_seconds": time.perf_counter() - loaded,
    }


def _wanted(fact_set: FactSet, request: dict[str, Any]) -> list[Fact]:
    if request["keys"] is None:
        return balanced(fact_set.part(request["partition"]), request["most"])
    by_key = {(fact.relation, fact.subject): fact for fact in fact_set.facts}
    keys = [(relation, subject) for relation, subject in request["keys"]]
    if lost := [key for key in keys if key not in by_key]:
        raise RunError(
            f"facts '{fact_set.source}' lack {lost[0][1]} of '{lost[0][0]}' and "
            f"{len(lost) - 1} more that were asked; pass the file that was searched with --facts"
        )
    return [by_key[key] for key in keys]


if __name__ == "__main__":
    main()
