"""FactSet: facts from a file, by partition, with demonstrations and distractors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path

from mpsearch.errors import FactsError
from mpsearch.facts import jsonl, lre
from mpsearch.facts.fact import Fact, Relation, unit_hash

DISTRACTORS = 7


@dataclass(frozen=True)
class FactSet:
    """Facts sorted by relation, with distractors drawn from the whole set.

    Attributes:
        facts: one-hop facts, or the two-hop questions that `two_hop.compose` makes of them.
        source: the file, as named by the user.
        about: sources and connections of the relations, where the file gives them.
    """

    facts: tuple[Fact, ...]
    source: str
    about: tuple[Relation, ...] = ()

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
        facts, about = jsonl.parse(lines)
        return cls(facts, "built-in", about)

    @classmethod
    def load(cls, path: str | Path) -> FactSet:
        """Read a JSONL file of facts, or a folder of relations in the LRE format.

        Raises:
            FactsError: with file and line: unreadable, malformed, empty, or a fact that cannot be
                asked.
        """
        if Path(path).is_dir():
            return cls(lre.read_folder(Path(path)), str(path))
        try:
            with open(path, encoding="utf-8-sig") as stream:  # with or without a byte order mark
                lines = ((str(path), n, line) for n, line in enumerate(stream, start=1))
                facts, about = jsonl.parse(lines)
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
        return cls(facts, str(path), about)

    @cached_property
    def relations(self) -> tuple[str, ...]:
        return tuple(self._by_relation)

    @cached_property
    def digest(self) -> str:
        """What a search depends on: every fact's partition, main question and right answers.

        Paraphrases and sources are left out: no search asks them.
        """
        asked = [
            (f.partition, f.relation, f.template, f.subject, f.answer, f.aliases)
            for f in self.facts
        ]
        return hashlib.sha256(repr(asked).encode()).hexdigest()

    def of(self, relation: str) -> tuple[Fact, ...]:
        """All facts of one relation."""
        return tuple(self._by_relation.get(relation, ()))

    def part(self, partition: str, relations: Iterable[str] | None = None) -> tuple[Fact, ...]:
        """Facts of one partition, optionally of some relations only."""
        wanted = set(self.relations if relations is None else relations)
        return tuple(f for f in self.facts if f.relation in wanted and f.partition == partition)

    def paraphrased(self, number: int) -> FactSet:
        """The same facts asked by paraphrase `number` (from 1); those without it as before."""
        facts = (f.paraphrased(number) if len(f.paraphrases) >= number else f for f in self.facts)
        return FactSet(tuple(facts), f"{self.source}, paraphrase {number}", self.about)

    def demonstrations(self, relation: str, shots: int) -> tuple[Fact, ...]:
        """Up to `shots` solved examples of a relation, in an order that depends on subjects."""
        return self._demonstrations[relation][:shots]

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
        wrong.sort(key=lambda answer: unit_hash(f"{fact.relation}|{fact.subject}|{answer}"))
        return tuple(wrong[:count])

    @cached_property
    def _by_relation(self) -> dict[str, list[Fact]]:
        found: dict[str, list[Fact]] = {}
        for fact in self.facts:
            found.setdefault(fact.relation, []).append(fact)
        return found

    @cached_property
    def _demonstrations(self) -> dict[str, tuple[Fact, ...]]:
        return {
            relation: tuple(
                sorted(
                    (fact for fact in facts if fact.partition == "demonstrations"),
                    key=lambda fact: unit_hash(fact.subject),
                )
            )
            for relation, facts in self._by_relation.items()
        }

    @cached_property
    def _answers(self) -> dict[str, tuple[str, ...]]:
        return {
            relation: tuple(dict.fromkeys(fact.answer for fact in facts))
            for relation, facts in self._by_relation.items()
        }
