"""What vLLM is compared with, written by the libraries of the main environment.

    python tests_vllm/prepare.py FOLDER

FOLDER gets `export/`, the built-in model with every format that vLLM takes on a CPU, mixed by
layer; `questions.json`, facts with what that export answers once transformers has loaded it, in
the arithmetic that a search scores it in and in float32; and `formats.json`, what a config.json
says of each format of the target.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import mpsearch as mps
from mpsearch.asked import balanced
from mpsearch.assignment import Assignment
from mpsearch.codecs import compression, quantization_args
from mpsearch.export.reload import load_any
from mpsearch.facts import FactSet
from mpsearch.forward import Pass, TokenSequence
from mpsearch.models import Model
from mpsearch.recall import ask, prompt
from mpsearch.space import ResolvedSpace, SearchSpace
from mpsearch.targets import TARGETS

# Groups of 128 divide the columns of down_proj alone.
SPACE = """\
version: 1
target: vllm
formats: [int4-channel, int4-g128, int4-g64, int4-g32, bf16]
rules:
  - {match: "*", formats: [int4-channel, int4-g64, int4-g32, bf16]}
  - {match: "*.down_proj", formats: [int4-channel, int4-g128, int4-g32, bf16]}
"""
FACTS = 200
SHOTS, DISTRACTORS = 2, 3  # fewer than a search asks with: the server reads every option whole


def mixed(space: ResolvedSpace) -> Assignment:
    """Every format at every place of a block: each starts at another one, and takes turns."""
    turns: dict[str, int] = {}
    chosen = {}
    for group in space.groups:
        turn = turns.setdefault(group.kind, len(turns))
        options = space.options[group.name]
        chosen[group.name] = options[turn % len(options)].name
        turns[group.kind] += 1
    return Assignment.of(chosen)


def asked(model: Model) -> list[dict[str, Any]]:
    """Facts after solved examples of their relation; options are the answer and distractors."""
    facts, questions = FactSet.builtin(), []
    for fact in balanced(facts.part("test"), FACTS):
        answers = (fact.answer, *facts.distractors(fact, DISTRACTORS))
        context = prompt(facts, fact, SHOTS)
        options = []
        for answer in answers:
            sequence = ask(model, facts, fact, answer, SHOTS)
            text = f"{context} {answer}"
            options.append({"text": text, "tokens": sequence.tokens, "start": sequence.start})
        questions.append({"relation": fact.relation, "subject": fact.subject, "options": options})
    return questions


def answered(model: Model, options: list[dict[str, Any]]) -> list[float]:
    """Log-probability of every option in nats."""
    sequences = [TokenSequence(option["tokens"], option["start"]) for option in options]
    log_probs: list[float] = Pass(model, sequences).run().tolist()
    return log_probs


def main(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model = mps.load_model("builtin:smollm2-135m")
    space = SearchSpace.parse(SPACE, "prepare.py").resolve(model)
    mps.export(model, mixed(space), to="vllm", out=folder / "export", space=space)

    questions = asked(model)
    options = [option for question in questions for option in question["options"]]
    loaded = load_any(str(folder / "export"))  # by transformers
    for arithmetic in ("scored", "exact"):
        if arithmetic == "exact":
            loaded.module.float()
        for option, log_prob in zip(options, answered(loaded, options), strict=True):
            option[arithmetic] = log_prob
    (folder / "questions.json").write_text(json.dumps(questions))

    named = {
        fmt.name: {
            "weights": quantization_args(fmt).model_dump(mode="json", exclude_none=True),
            "format": compression(fmt),
        }
        for fmt in TARGETS["vllm"].formats
        if fmt.quantized
    }
    (folder / "formats.json").write_text(json.dumps(named, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
