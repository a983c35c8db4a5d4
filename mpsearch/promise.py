"""What a run measured of a point, fact by fact: what an export of it is held to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any

import numpy as np

from mpsearch.bootstrap import Interval, relation_interval
from mpsearch.points import Point
from mpsearch.run import Run


@dataclass(frozen=True)
class Answers:
    """What one model said about the facts.

    Attributes:
        correct: whether the answer ranks first among its distractors.
        log_prob_nats: of the answer; None in runs of before it was kept.
    """

    correct: tuple[bool, ...]
    log_prob_nats: tuple[float, ...] | None

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Answers:
        """From JSON."""
        log_prob = content["log_prob_nats"]
        return cls(tuple(content["correct"]), None if log_prob is None else tuple(log_prob))


@dataclass(frozen=True)
class Promise:
    """Answers of a point on the facts that its run asked, with 95 % intervals over subjects.

    Attributes:
        partition: `test`, or `validation` for a point that was not read on test facts.
        facts: digest of the facts' file; see `FactSet.digest`.
        shots: solved examples before each question.
        chat_template: whether they were asked through the model's.
        dtype: of the arithmetic.
        device: whose it was, as `cpu` or `cuda`; None in older runs.
        tokens: digest of the token ids that were asked; None in older runs.
        relations, subjects: of each fact.
        candidate: what the point answered.
        reference: what the unquantized model did; None in older runs.
        recall, answer_loss: of the point, the loss in nats.
    """

    partition: str
    facts: str
    shots: int
    chat_template: bool
    dtype: str
    device: str | None
    tokens: str | None
    relations: tuple[str, ...]
    subjects: tuple[str, ...]
    candidate: Answers
    reference: Answers | None
    recall: Interval
    answer_loss: Interval

    @property
    def forgotten(self) -> int | None:
        """Facts that the reference answers and the point does not."""
        return self._flips(self.reference, self.candidate)

    @property
    def gained(self) -> int | None:
        """Facts that the point answers and the reference does not."""
        return self._flips(self.candidate, self.reference)

    @staticmethod
    def _flips(right: Answers | None, wrong: Answers | None) -> int | None:
        if right is None or wrong is None:
            return None
        return sum(a and not b for a, b in zip(right.correct, wrong.correct, strict=True))

    def interval(self, values: Sequence[float] | Sequence[bool]) -> Interval:
        """Of other values of the same facts."""
        return relation_interval(values, self.relations, self.subjects)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Promise:
        """From JSON. Raises `KeyError`, `TypeError` or `ValueError` where it is none."""
        reference = content["reference"]
        made = cls(
            **{key: content[key] for key in ("partition", "facts", "shots", "chat_template")},
            **{key: content[key] for key in ("dtype", "tokens")},
            device=content.get("device"),
            relations=tuple(content["relations"]),
            subjects=tuple(content["subjects"]),
            candidate=Answers.of(content["candidate"]),
            reference=None if reference is None else Answers.of(reference),
            recall=Interval(**content["recall"]),
            answer_loss=Interval(**content["answer_loss"]),
        )
        made._check()
        return made

    def _check(self) -> None:
        """Raise `ValueError` or `TypeError` unless there is a value a fact, and it is one."""
        facts, both = len(self.relations), (self.candidate, self.reference)
        nats = [a.log_prob_nats for a in both if a is not None and a.log_prob_nats is not None]
        per_fact = [self.subjects, *(a.correct for a in both if a is not None), *nats]
        if not facts or any(len(values) != facts for values in per_fact):
            raise ValueError(f"{facts} facts and {[len(values) for values in per_fact]} values")
        for values in (astuple(self.recall), astuple(self.answer_loss), *nats):
            if not all(map(math.isfinite, values)):
                raise ValueError("a value is NaN or infinite")


def promise(run: Run, point: Point) -> Promise:
    """What a run measured of a point, on test facts if they were read for it."""
    scores = {s.partition: s for s in run.scores() if s.assignment == point.assignment}
    partition = "test" if "test" in scores else "validation"
    score = scores[partition]
    assert score.correct is not None  # both partitions are asked with distractors
    about = run.content.get(f"reference_{partition}", {})
    reference, log_prob = None, None
    if "correct" in about:
        reference = Answers.of(about)
        log_prob = tuple(np.subtract(about["log_prob_nats"], score.loss_per_fact).tolist())
    relations, subjects = run.relations(partition), run.content["subjects"][partition]
    return Promise(
        partition,
        run.question["facts"],
        run.question["shots"],
        run.question["chat_template"],
        run.question["dtype"],
        about.get("device"),
        about.get("tokens"),
        tuple(relations),
        tuple(subjects),
        Answers(score.correct, log_prob),
        reference,
        relation_interval(score.correct, relations, subjects),
        relation_interval(score.loss_per_fact, relations, subjects),
    )
