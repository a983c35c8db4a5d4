"""Fact: one question with one answer. Relation: what all facts of one kind share."""

from __future__ import annotations

import hashlib
import unicodedata
from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import cached_property

PARTITIONS = ("demonstrations", "search", "validation", "test")
_SHARES = (0.10, 0.55, 0.75)  # upper edges of the first three partitions


@dataclass(frozen=True)
class Fact:
    """One question with one answer.

    Attributes:
        template: the prompt with `{}` for the subject; the answer follows after a space.
        aliases: other right answers; never used as distractors.
        paraphrases: templates that ask the same in other words.
    """

    relation: str
    template: str
    subject: str
    answer: str
    aliases: tuple[str, ...] = ()
    paraphrases: tuple[str, ...] = ()

    @property
    def prompt(self) -> str:
        return self.template.replace("{}", self.subject)

    @property
    def accepted(self) -> tuple[str, ...]:
        return (self.answer, *self.aliases)

    @property
    def templates(self) -> tuple[str, ...]:
        """Every way to ask, the main one first."""
        return (self.template, *self.paraphrases)

    def paraphrased(self, number: int) -> Fact:
        """The same fact with the main template and paraphrase `number` (from 1) exchanged.

        Raises:
            IndexError: it has fewer paraphrases.
        """
        templates = list(self.templates)
        templates[0], templates[number] = templates[number], templates[0]
        return replace(self, template=templates[0], paraphrases=tuple(templates[1:]))

    @cached_property
    def partition(self) -> str:
        """Which part of the study may see this fact.

        It depends on the subject alone: adding facts moves none, and all facts about one subject
        stay together.
        """
        place = unit_hash(self.subject.casefold())
        return PARTITIONS[bisect_right(_SHARES, place)]


@dataclass(frozen=True)
class Relation:
    """How the facts of a relation connect to those of others, and where they come from.

    Attributes:
        domain: kind of its subjects, such as `country`; empty where nothing leads to it.
        range: kind of its answers; two hops connect where a range is the next one's domain.
        first_hop: a noun phrase that stands for the answer, such as `the author of {}`.
        second_hop: templates whose `{}` takes such a phrase, the main one first.
    """

    name: str
    source: str = ""
    domain: str = ""
    range: str = ""
    first_hop: str = ""
    second_hop: tuple[str, ...] = ()


def clean(text: str) -> str:
    """Without spaces around it and with composed accents, so that equal texts compare equal."""
    return unicodedata.normalize("NFC", text.strip())


def unit_hash(text: str) -> float:
    """A stable pseudo-random number in [0, 1) for a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
