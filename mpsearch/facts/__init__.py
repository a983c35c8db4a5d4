"""Facts: what the model is asked, read from JSON lines, and split by subject.

A file holds two kinds of line. A relation line names a prompt, a fact line an answer:

    {"relation": "capital", "template": "The capital of {} is"}
    {"relation": "capital", "subject": "France", "answer": "Paris", "aliases": ["Paname"]}

The built-in facts are such files too, one a relation, beside this module.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from mpsearch.errors import FactsError

PARTITIONS = ("demonstrations", "search", "validation", "test")
_SHARES = (0.10, 0.55, 0.75)  # upper edges of the first three partitions
DISTRACTORS = 7


@dataclass(frozen=True)
class Fact:
    """One question with one answer.

    Attributes:
        template: the prompt with `{}` for the subject; the answer follows after a space.
        aliases: other right answers; never used as distractors.
    """

    relation: str
    template: str
    subject: str
    answer: str
    aliases: tuple[str, ...] = ()

    @property
    def prompt(self) -> str:
        return self.template.replace("{}", self.subject)

    @property
    def accepted(self) -> tuple[str, ...]:
        return (self.answer, *self.aliases)

    @property
    def partition(self) -> str:
        """Which part of the study may see this fact.

        It depends on the subject alone: adding facts moves none, and all facts about one subject
        stay together.
        """
        place = _unit_hash(self.subject.casefold())
        return PARTITIONS[sum(place >= edge for edge in _SHARES)]


@dataclass(frozen=True)
class FactSet:
    """Facts sorted by relation, with distractors drawn from the whole set."""

    facts: tuple[Fact, ...]
    source: str

    @classmethod
    def builtin(cls) -> FactSet:
        folder = resources.files("mpsearch.facts") / "builtin"
        files = sorted(
            (entry for entry in folder.iterdir() if entry.name.endswith(".jsonl")),
            key=lambda entry: entry.name,
        )
        lines = (
            (f"built-in {entry.name}", number, line)
            for entry in files
            for number, line in enumerate(entry.read_text(encoding="utf-8").splitlines(), start=1)
        )
        return cls(_parse(lines), "built-in")

    @classmethod
    def load(cls, path: str | Path) -> FactSet:
        """Read a JSONL file of facts.

        Raises:
            FactsError: with file and line: unreadable, malformed, empty, or a fact that cannot be
                asked.
        """
        try:
            with open(path, encoding="utf-8") as stream:
                numbered = ((str(path), n, line) for n, line in enumerate(stream, start=1))
                facts = _parse(numbered)
        except UnicodeDecodeError:
            raise FactsError(f"facts file '{path}' is not UTF-8 text; save it as UTF-8") from None
        except OSError as error:
            raise FactsError(f"facts file '{path}': {error.strerror}") from None
        if not facts:
            raise FactsError(
                f"facts file '{path}' holds no facts; each is a line such as "
                '{"relation": "capital", "template": "The capital of {} is", '
                '"subject": "France", "answer": "Paris"}'
            )
        return cls(facts, str(path))

    @property
    def relations(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(fact.relation for fact in self.facts))

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(repr(self.facts).encode()).hexdigest()

    def part(self, partition: str, relations: Iterable[str] | None = None) -> tuple[Fact, ...]:
        """Facts of one partition, optionally of some relations only."""
        wanted = set(self.relations if relations is None else relations)
        return tuple(f for f in self.facts if f.partition == partition and f.relation in wanted)

    def demonstrations(self, relation: str, shots: int) -> tuple[Fact, ...]:
        """Up to `shots` solved examples of a relation, in an order that depends on subjects."""
        pool = self.part("demonstrations", [relation])
        return tuple(sorted(pool, key=lambda fact: _unit_hash(fact.subject))[:shots])

    @cached_property
    def _answers(self) -> dict[str, tuple[str, ...]]:
        answers: dict[str, dict[str, None]] = {}
        for fact in self.facts:
            answers.setdefault(fact.relation, {})[fact.answer] = None
        return {relation: tuple(found) for relation, found in answers.items()}

    def distractors(self, fact: Fact, count: int = DISTRACTORS) -> tuple[str, ...]:
        """Wrong answers of the same relation; the same ones each time for a fact.

        Raises:
            FactsError: the relation has no other answer.
        """
        accepted = {answer.casefold() for answer in fact.accepted}
        wrong = [a for a in self._answers[fact.relation] if a.casefold() not in accepted]
        if not wrong:
            raise FactsError(
                f"{self.source}: relation '{fact.relation}' has only the answer '{fact.answer}'; "
                "a relation needs at least two different answers"
            )
        wrong.sort(key=lambda answer: _unit_hash(f"{fact.relation}|{fact.subject}|{answer}"))
        return tuple(wrong[:count])


def _unit_hash(text: str) -> float:
    """A stable pseudo-random number in [0, 1) for a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


_KEYS = {"relation", "template", "subject", "answer", "aliases", "source"}


def _parse(lines: Iterable[tuple[str, int, str]]) -> tuple[Fact, ...]:
    templates: dict[str, str] = {}
    facts: list[Fact] = []
    first_seen: dict[tuple[str, str], int] = {}
    for source, number, entry in _entries(lines):
        where = f"{source}, line {number}"
        relation, template = entry["relation"], entry.get("template")
        if template is not None and template.count("{}") != 1:
            raise FactsError(
                f"{where}: template '{template}' needs exactly one {{}} for the subject"
            )
        if "subject" not in entry:
            if template is None:
                raise FactsError(f"{where}: neither a fact ('subject') nor a 'template'")
            templates[relation] = template
            continue
        if not entry["subject"].strip():
            raise FactsError(f"{where}: the subject is empty")
        template = template or templates.get(relation)
        if template is None:
            raise FactsError(
                f"{where}: no template for relation '{relation}' on or above this line"
            )
        if not entry.get("answer", "").strip():
            raise FactsError(f"{where}: fact about '{entry['subject']}' has no answer")
        fact = Fact(
            relation,
            template.rstrip(),
            entry["subject"].strip(),
            entry["answer"].strip(),
            tuple(alias.strip() for alias in entry.get("aliases", ())),
        )
        key = (relation, fact.subject.casefold())
        if key in first_seen:
            raise FactsError(
                f"{where}: '{fact.subject}' stands in relation '{relation}' already, line "
                f"{first_seen[key]}; keep one and give other right answers as aliases"
            )
        first_seen[key] = number
        facts.append(fact)
    return tuple(sorted(facts, key=lambda fact: fact.relation))


def _entries(lines: Iterable[tuple[str, int, str]]) -> Iterator[tuple[str, int, dict[str, Any]]]:
    for source, number, line in lines:
        if not line.strip():
            continue
        where = f"{source}, line {number}"
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise FactsError(f"{where}: not JSON: {error}") from None
        if not isinstance(entry, dict):
            raise FactsError(f"{where}: expected an object with relation, subject and answer")
        if unknown := sorted(set(entry) - _KEYS):
            raise FactsError(
                f"{where}: unknown key '{unknown[0]}'; known: {', '.join(sorted(_KEYS))}"
            )
        for key, value in entry.items():
            strings: Sequence[Any] = (
                value if key == "aliases" and isinstance(value, list) else [value]
            )
            if not all(isinstance(item, str) for item in strings):
                raise FactsError(f"{where}: '{key}' must be text, not {type(value).__name__}")
        if isinstance(entry.get("aliases"), str):
            raise FactsError(f"{where}: 'aliases' must be a list of texts")
        if not entry.get("relation", "").strip():
            raise FactsError(f"{where}: 'relation' is missing")
        yield source, number, entry
