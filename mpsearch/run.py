"""The run folder: the question, the study, and every evaluation, each safe against a kill.

    run.json            the question and what was frozen while answering it
    sensitivity.json    the damage table
    journal.log         the Optuna study
    evaluations.jsonl   one line an evaluation, per-fact values included

Reading a run needs neither torch nor the model.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from math import inf
from pathlib import Path
from typing import Any

from mpsearch import space_json
from mpsearch.assignment import Assignment
from mpsearch.budget import terms_line
from mpsearch.errors import ResourceError, RunError, exhausted
from mpsearch.estimates import Estimate, paired_difference, relation_mean
from mpsearch.files import published, write_atomically
from mpsearch.fluency import TextScores
from mpsearch.front import pareto_front
from mpsearch.points import (
    NONE_FITS,
    NONE_SEARCHED,
    ParetoFront,
    Point,
    Score,
    coordinates,
    recommend,
    unmet,
)
from mpsearch.space import ResolvedSpace

VERSION = 1
_NOT_YET = (
    "No searched point is among these yet: they are scored on validation facts when the search "
    "ends; continue it with --resume, and with --trials 0 it ends at once."
)
_UNASKED = ("objective", "shots")  # of a question, and no user's choice


class Run:
    """A run folder. `create` starts one, `open` reads one."""

    def __init__(self, folder: Path, content: dict[str, Any]):
        self.folder = folder
        self.content = content

    @classmethod
    def create(
        cls,
        folder: Path,
        question: dict[str, Any],
        space: ResolvedSpace,
        preparation: Mapping[str, Any] | None = None,
    ) -> Run:
        """Write a new run folder.

        Args:
            preparation: of the model, by which an export prepares it again.
        Raises:
            RunError: something exists at that path, or no folder can be made there.
            ResourceError: the disk is full.
        """
        if folder.exists():
            raise RunError(f"'{folder}' exists; continue it with --resume, or choose another -o")
        run = cls(
            folder, {"version": VERSION, "question": question, "space": space_json.to_json(space)}
        )
        try:
            with published(folder) as unfinished:
                write_atomically(unfinished / "run.json", run._text)
                if preparation:
                    write_atomically(unfinished / "preparation.json", json.dumps(preparation))
        except OSError as error:
            if reason := exhausted(error):
                raise ResourceError(f"cannot create '{folder}': {reason}") from None
            raise RunError(
                f"cannot create '{folder}': {error.strerror}; choose another -o"
            ) from None
        return run

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """Read a run folder. Raises `RunError` if it is none."""
        path = Path(folder)
        try:
            content = json.loads((path / "run.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RunError(f"'{folder}' is not a run folder: it has no run.json") from None
        except (OSError, ValueError) as error:
            raise RunError(f"'{path / 'run.json'}' cannot be read: {error}") from None
        version = content.get("version") if isinstance(content, dict) else None
        if version != VERSION:
            raise RunError(
                f"'{folder}' was written by another version of mpsearch (its format is {version}, "
                f"this one reads {VERSION}); use that one, or choose another -o"
            )
        if not all(isinstance(content.get(key), dict) for key in ("question", "space")):
            raise RunError(f"'{path / 'run.json'}' is damaged: it has no question or no space")
        return cls(path, content)

    def save(self) -> None:
        """Write run.json atomically."""
        write_atomically(self.folder / "run.json", self._text)

    @property
    def _text(self) -> str:
        return json.dumps(self.content, indent=1)

    def check_question(self, question: dict[str, Any]) -> None:
        """Raise `RunError`, naming what changed, unless the question is the one of this run."""
        asked = self.content["question"]
        changed = [key for key in question if question[key] != asked.get(key)]
        if "fingerprint" not in changed:  # the same weights, however their path is spelled
            changed = [key for key in changed if key != "model"]
        if changed:
            key = changed[0]
            if key in _UNASKED:
                raise RunError(
                    f"'{self.folder}' was searched by another version of mpsearch (its {key} is "
                    f"{_short(asked.get(key))}, this one's {_short(question[key])}); use that one, "
                    "or choose another -o"
                )
            raise RunError(
                f"'{self.folder}' answers another question: {key} was {_short(asked.get(key))} and "
                f"is now {_short(question[key])}; ask as before, or choose another -o"
            )

    @property
    def question(self) -> dict[str, Any]:
        question: dict[str, Any] = self.content["question"]
        return question

    @property
    def preparation(self) -> dict[str, Any]:
        """What was folded into the model that was searched; empty if it was as loaded.

        Raises:
            RunError: the file is damaged.
        """
        path = self.folder / "preparation.json"
        if not path.exists():
            return {}
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise RunError(f"'{path}' cannot be read ({error}); search again") from None

    @property
    def model_path(self) -> str:
        """Where its model is: the folder, if it was one and still is there, or else its name."""
        folder = self.content.get("model_folder")
        return folder if folder and Path(folder).is_dir() else str(self.question["model"])

    @property
    def budget_bytes(self) -> int:
        return int(self.question["budget_bytes"])

    @property
    def budget_line(self) -> str:
        """What the budget follows from, in one line; empty where it was stated in bytes."""
        device = self.content.get("device_budget")
        return "" if device is None else terms_line(device)

    @property
    def max_text_kl_nats(self) -> float | None:
        """The limit of KL on search text, a token; None, as in older runs, for no limit."""
        limit: float | None = self.question.get("max_text_kl_nats")
        return limit

    @property
    def at_budget(self) -> dict[str, str]:
        """Kind of simple allocation to the id of the one at the budget; empty in older runs."""
        return dict(self.content.get("at_budget", {}))

    @property
    def proposing_seconds(self) -> float:
        """What proposals have taken so far; 0 in older runs."""
        return float(self.content.get("proposing_seconds", 0.0))

    @property
    def finished(self) -> bool:
        return bool(self.content.get("finished"))

    @cached_property
    def space(self) -> ResolvedSpace:
        try:
            return space_json.from_json(self.content["space"])
        except (LookupError, TypeError, ValueError) as error:
            raise RunError(
                f"the search space of '{self.folder}' cannot be read by this version of mpsearch "
                f"({error!r}); use the one that wrote it, or search again"
            ) from None

    @property
    def journal(self) -> Path:
        return self.folder / "journal.log"

    # ---------------------------------------------------------------------- evaluations

    @property
    def _evaluations(self) -> Path:
        return self.folder / "evaluations.jsonl"

    def add(self, score: Score) -> None:
        """Append an evaluation. Raises `ResourceError` when the disk is full."""
        line = {**asdict(score), "assignment": dict(score.assignment)}
        if score.assignment.refined:
            line["refined"] = json.loads(score.assignment.bank)
        try:
            with open(self._evaluations, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(line, separators=(",", ":")) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise ResourceError(
                f"cannot write '{self._evaluations}': {error.strerror}; free some disk space and "
                "continue with --resume, what is finished is kept"
            ) from None

    def scores(self) -> list[Score]:
        """All finished evaluations, in order; a line that a kill cut short is left out.

        Raises:
            RunError: another line is damaged.
        """
        path, found = self._evaluations, []
        bank = json.dumps(self.question.get("bank"), sort_keys=True)
        whole = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        for number, line in enumerate(whole, start=1):
            try:
                score = _score(json.loads(line), bank)
                if not self.space.allows(score.assignment) and score.kind != "reference":
                    raise ValueError
            except (LookupError, TypeError, ValueError, AttributeError):
                raise RunError(
                    f"'{path}', line {number}: no evaluation, the file is damaged; remove that "
                    "line, and go on with 'mpsearch search --resume'"
                ) from None
            found.append(score)
        return found

    def mend(self) -> None:
        """Drop the torn ends that a kill left in the journal and in the evaluations."""
        for path in (self.journal, self._evaluations):
            if path.exists():
                text = path.read_bytes()
                if text and not text.endswith(b"\n"):
                    os.truncate(path, text.rfind(b"\n") + 1)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder against a second search.

        Raises:
            RunError: one is running.
            ResourceError: the folder cannot be written.
        """
        import fcntl

        try:
            stream = open(self.folder / "lock", "w", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise ResourceError(f"cannot write in '{self.folder}': {error.strerror}") from None
        with stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise RunError(
                    f"another search is running in '{self.folder}'; wait for it"
                ) from None
            # Nobody else is here, so the study's own lock can only be a dead process's.
            for stale in self.folder.glob("journal.log.lock*"):
                stale.unlink(missing_ok=True)
            yield

    # ------------------------------------------------------------------------- results

    def relations(self, partition: str) -> list[str]:
        """The relation of each fact asked in a partition, in the order of per-fact values."""
        relations: list[str] = self.content["asked"][partition]
        return relations

    def points(self, partition: str = "validation") -> tuple[Point, ...]:
        """Every assignment scored on a partition with distractors, by size, then loss.

        Refined ones follow the one that they come from.
        """
        relations = self.content.get("asked", {}).get(partition, [])
        every = self.scores()
        scores = {
            score.assignment: score
            for score in every
            if score.partition == partition and score.kind != "reference"
        }
        limit = self.max_text_kl_nats
        text_kl = {
            score.assignment: score.text.kl.mean
            for score in every
            if score.partition == "search" and score.text is not None
        }
        on_search = {score.assignment: score for score in every if score.partition == "search"}
        sized = {a: self.space.stored_bytes(a) for a in scores}
        uniforms = [a for a, score in scores.items() if score.kind == "uniform"]

        def against_parent(
            of: Mapping[Assignment, Score], assignment: Assignment, names: Sequence[str]
        ) -> Estimate | None:
            own, parent = of.get(assignment), of.get(assignment.parent)
            if not assignment.refined or own is None or parent is None:
                return None
            return paired_difference(own.loss_per_fact, parent.loss_per_fact, names)

        def point(score: Score) -> Point:
            loss = relation_mean(score.loss_per_fact, relations)
            fitting = [a for a in uniforms if sized[a] <= sized[score.assignment]]
            rival = min(
                fitting,
                key=lambda a: relation_mean(scores[a].loss_per_fact, relations).mean,
                default=None,
            )
            against = None
            if rival is not None and rival != score.assignment:
                against = paired_difference(
                    score.loss_per_fact, scores[rival].loss_per_fact, relations
                )
            return Point(
                score.assignment.id,
                score.kind,
                score.assignment,
                sized[score.assignment],
                self.space.bits_per_weight(score.assignment),
                loss,
                relation_mean(score.correct or (), relations),
                score.kl_nats,
                against,
                score,
                limit is not None and text_kl.get(score.assignment, inf) > limit,
                against_parent(scores, score.assignment, relations),
                against_parent(on_search, score.assignment, self.relations("search")),
            )

        found = {assignment: point(score) for assignment, score in scores.items()}

        def place(point: Point) -> tuple[object, ...]:
            origin = found.get(point.assignment.parent, point)
            return (*coordinates(origin), origin.id, point is not origin, coordinates(point))

        return tuple(sorted(found.values(), key=place))

    def front(self) -> ParetoFront:
        """The validation table with its front, the pick and the verdict.

        Raises:
            RunError: nothing has been scored on validation facts yet.
        """
        points = self.points()
        if not points:
            raise RunError(
                f"'{self.folder}' has no scored point yet; continue it: mpsearch search "
                f"{shlex.quote(self.question['model'])} --budget {self.budget_bytes}B --resume "
                f"-o {shlex.quote(str(self.folder))}, with any other options that it had"
            )
        allowed = [point for point in points if not point.over_text_kl]
        pareto = frozenset(point.id for point in pareto_front(allowed, coordinates))
        pick, verdict = recommend(allowed, self.relations("validation"), self.budget_bytes)
        if pick is None and self.max_text_kl_nats is not None:
            verdict = unmet(self._within_budget(), self.max_text_kl_nats)
        elif not self.finished and not any(point.kind == "search" for point in points):
            verdict = verdict.replace(NONE_SEARCHED, _NOT_YET).replace(NONE_FITS, _NOT_YET)
        return ParetoFront(points, pareto, pick, verdict)

    def _within_budget(self) -> list[Score]:
        """Scores on search facts."""
        return [
            score
            for score in self.scores()
            if score.partition == "search"
            and self.space.stored_bytes(score.assignment) <= self.budget_bytes
        ]

    def find(self, wanted: str) -> Point:
        """A validated point by id, an unambiguous beginning of it, or `best`."""
        front = self.front()
        if wanted == "best":
            if front.pick is None:
                why = "" if self.max_text_kl_nats is None else f". {front.verdict}"
                raise RunError(f"'{self.folder}' has no point within its budget{why}")
            return front.pick
        found = [point for point in front.points if point.id.startswith(wanted)]
        if len(found) != 1:
            known = ", ".join(f"{point.id} ({point.kind})" for point in front.points)
            fault = "is ambiguous" if found else "is not in this run"
            raise RunError(f"point '{wanted}' {fault}; there are: best, {known}")
        return found[0]


def _score(line: dict[str, Any], bank: str) -> Score:
    """A line of evaluations.jsonl.

    `text` and `prompt_kl_per_fact` are missing in older runs; those of refined assignments have the
    settings of their bank as `refined`.
    """
    correct, refined = line["correct"], "refined" in line
    if refined:
        bank = json.dumps(line["refined"], sort_keys=True)
    return Score(
        Assignment.of(line["assignment"], bank, refined),
        line["kind"],
        line["partition"],
        tuple(line["loss_per_fact"]),
        line["kl_nats"],
        line["top1"],
        None if correct is None else tuple(correct),
        line["seconds"],
        TextScores.of(line.get("text")),
        tuple(line.get("prompt_kl_per_fact", ())),
    )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
