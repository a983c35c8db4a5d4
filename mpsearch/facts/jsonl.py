"""Facts as JSON lines, the format of the built-in facts and of users' own.

A relation line says how to ask, a fact line what is right:

    {"relation": "capital", "template": "The capital of {} is",
     "paraphrases": ["The city that is the capital of {} is"], "source": "an atlas"}
    {"relation": "capital", "subject": "France", "answer": "Paris", "aliases": ["Paname"]}

A relation line may also say how its facts make two-hop questions: `domain`, `range`, `first_hop`
and `second_hop` (see `Relation`). A fact line may bring a `template` of its own. Lines are read one
by one, so memory is that of the facts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mpsearch.errors import FactsError
from mpsearch.facts.fact import Fact, Relation, clean

_SURROGATE = re.compile("[\ud800-\udfff]")
_FACT_KEYS = {"relation", "template", "paraphrases", "subject", "answer", "aliases", "source"}
_RELATION_KEYS = {"relation", "template", "paraphrases", "source"} | {
    *("domain", "range", "first_hop", "second_hop")
}
_LISTS = {"aliases", "paraphrases", "second_hop"}

Line = tuple[str, int, str]  # file, number, text


def parse(lines: Iterable[Line]) -> tuple[tuple[Fact, ...], tuple[Relation, ...]]:
    """Facts sorted by relation, and the relations that have a relation line.

    Raises:
        FactsError: with file and line.
    """
    templates: dict[str, tuple[str, ...]] = {}
    relations: dict[str, Relation] = {}
    facts: list[Fact] = []
    first_seen: dict[tuple[str, str], int] = {}
    for where, number, entry in _entries(lines):
        name = entry["relation"]
        own = _templates(where, entry)
        if "subject" not in entry:
            templates[name] = own
            relations[name] = _relation(where, entry)
            continue
        fact = _fact(where, entry, own or templates.get(name, ()))
        key = (name, fact.subject.casefold())
        if key in first_seen:
            raise FactsError(
                f"{where}: '{fact.subject}' stands in relation '{name}' already, line "
                f"{first_seen[key]}; keep one and give other right answers as aliases"
            )
        first_seen[key] = number
        facts.append(fact)
    return tuple(sorted(facts, key=lambda fact: fact.relation)), tuple(relations.values())


def _templates(where: str, entry: Mapping[str, Any]) -> tuple[str, ...]:
    """The templates on a line, the main one first."""
    if "template" not in entry:
        if "paraphrases" in entry:
            raise FactsError(f"{where}: 'paraphrases' without the 'template' that they rephrase")
        return ()
    templates = tuple(
        _slotted(where, t) for t in (entry["template"], *entry.get("paraphrases", ()))
    )
    if len(set(templates)) < len(templates):
        raise FactsError(f"{where}: a paraphrase repeats another template; each must differ")
    return templates


def _slotted(where: str, template: str) -> str:
    if template.count("{}") != 1:
        raise FactsError(f"{where}: template '{template}' needs exactly one {{}} for the subject")
    return template.rstrip()


def _relation(where: str, entry: Mapping[str, Any]) -> Relation:
    first_hop = entry.get("first_hop", "")
    for needed, key in (("range", "first_hop"), ("domain", "second_hop")):
        if key in entry and not entry.get(needed, "").strip():
            raise FactsError(f"{where}: '{key}' needs a '{needed}' to say what it connects to")
    return Relation(
        entry["relation"],
        entry.get("source", ""),
        entry.get("domain", ""),
        entry.get("range", ""),
        first_hop and _slotted(where, first_hop),
        tuple(_slotted(where, template) for template in entry.get("second_hop", ())),
    )


def _fact(where: str, entry: Mapping[str, Any], templates: tuple[str, ...]) -> Fact:
    subject, answer = clean(entry["subject"]), clean(entry.get("answer", ""))
    aliases = tuple(clean(alias) for alias in entry.get("aliases", ()))
    if not subject:
        raise FactsError(f"{where}: the subject is empty")
    if not templates:
        raise FactsError(
            f"{where}: no template for relation '{entry['relation']}' on or above this line"
        )
    if not answer:
        raise FactsError(f"{where}: fact about '{subject}' has no answer")
    if "" in aliases:
        raise FactsError(f"{where}: fact about '{subject}' has an empty alias; drop it")
    if answer in aliases or len(set(aliases)) < len(aliases):
        raise FactsError(
            f"{where}: fact about '{subject}' gives one right answer twice; keep each once"
        )
    return Fact(entry["relation"], templates[0], subject, answer, aliases, templates[1:])


def _entries(lines: Iterable[Line]) -> Iterator[tuple[str, int, dict[str, Any]]]:
    for source, number, line in lines:
        if not line.strip():
            continue
        where = f"{source}, line {number}"
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise FactsError(f"{where}: not JSON: {error}") from None
        except RecursionError:
            raise FactsError(f"{where}: not a fact: nested too deeply") from None
        if "\\ud" in line.lower() and _SURROGATE.search(json.dumps(entry, ensure_ascii=False)):
            raise FactsError(f"{where}: an escaped character is one half of a pair; write both")
        if not isinstance(entry, dict):
            raise FactsError(f"{where}: expected an object with relation, subject and answer")
        known = _FACT_KEYS if "subject" in entry else _RELATION_KEYS
        if not entry.keys() <= known:
            _refuse_keys(where, entry)
        for key, value in entry.items():
            if key in _LISTS:
                if not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
                    raise FactsError(f"{where}: '{key}' must be a list of texts")
            elif not isinstance(value, str):
                raise FactsError(f"{where}: '{key}' must be text, not {type(value).__name__}")
        if not entry.get("relation", "").strip():
            raise FactsError(f"{where}: 'relation' is missing")
        if "subject" not in entry and "template" not in entry:
            raise FactsError(f"{where}: neither a fact ('subject') nor a 'template'")
        yield where, number, entry


def _refuse_keys(where: str, entry: Mapping[str, Any]) -> None:
    line, known = (
        ("a fact", _FACT_KEYS) if "subject" in entry else ("a line without subject", _RELATION_KEYS)
    )
    unknown = min(entry.keys() - known)
    raise FactsError(
        f"{where}: unknown key '{unknown}' in {line}; known: {', '.join(sorted(known))}"
    )
