"""The built-in facts: enough, clean, spelled alike, agreeing, with templates that stay."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict

import pytest

from mpsearch.facts import PARTITIONS, FactSet
from mpsearch.facts.describe import describe


@pytest.fixture(scope="module")
def builtin() -> FactSet:
    return FactSet.builtin()


def test_there_are_enough_built_in_facts(builtin: FactSet) -> None:
    assert len(builtin.facts) >= 3000
    assert len(builtin.relations) >= 20
    assert builtin.source == "built-in"


def test_every_relation_has_demonstrations_and_facts_to_ask(builtin: FactSet) -> None:
    for relation in builtin.relations:
        counts = {name: len(builtin.part(name, [relation])) for name in PARTITIONS}
        fewest = 2 if relation == "god_domain" else 4  # a prompt shows four where there are four
        assert counts["demonstrations"] >= fewest, relation
        assert min(counts.values()) >= 2, relation


def test_no_subject_stands_twice_in_a_relation(builtin: FactSet) -> None:
    seen = Counter((fact.relation, fact.subject.casefold()) for fact in builtin.facts)
    assert [key for key, count in seen.items() if count > 1] == []


def test_facts_of_a_relation_stand_together_in_sorted_order(builtin: FactSet) -> None:
    relations = [fact.relation for fact in builtin.facts]
    assert relations == sorted(relations)
    assert builtin.relations == tuple(sorted(set(relations)))


def test_every_text_is_clean(builtin: FactSet) -> None:
    for fact in builtin.facts:
        for text in (fact.relation, fact.template, fact.subject, *fact.accepted):
            assert text, fact
            assert text == text.strip(), fact
            assert text.isprintable(), fact
        assert fact.template.count("{}") == 1
        assert fact.prompt.count(fact.subject) >= 1
        assert "{}" not in fact.prompt


def test_no_right_answer_is_among_the_distractors(builtin: FactSet) -> None:
    for fact in builtin.facts:
        right = {answer.casefold() for answer in fact.accepted}
        wrong = [answer.casefold() for answer in builtin.distractors(fact)]
        assert right.isdisjoint(wrong), fact
        assert len(wrong) == len(set(wrong)), fact
        assert 5 <= len(wrong) <= 7, fact


def test_every_built_in_file_has_one_relation_named_after_it_and_its_source() -> None:
    from importlib import resources

    folder = resources.files("mpsearch.facts") / "builtin"
    files = [entry for entry in folder.iterdir() if entry.name.endswith(".jsonl")]
    assert files
    for entry in files:
        lines = [json.loads(text) for text in entry.read_text(encoding="utf-8").splitlines()]
        assert {item["relation"] for item in lines} == {entry.name.removesuffix(".jsonl")}
        assert len(lines[0]["source"]) > 20, entry.name


def test_every_fact_can_be_asked_in_four_ways(builtin: FactSet) -> None:
    for fact in builtin.facts:
        assert len(set(fact.templates)) == 4, fact.relation
        for template in fact.templates:
            assert template.count("{}") == 1
            assert template == template.strip()
            assert template.isprintable()
            assert template[0].isupper()


def test_the_main_templates_stay_what_was_measured(builtin: FactSet) -> None:
    later = {"airport_city", "atomic_number", "country_code", "currency_code"}
    templates = dict.fromkeys(f.template for f in builtin.facts if f.relation not in later)
    assert len(templates) == 25
    digest = hashlib.sha256("\n".join(templates).encode()).hexdigest()
    assert digest.startswith("512b67f71ac4de06")


def test_countries_are_spelled_the_same_everywhere(builtin: FactSet) -> None:
    """Every answer that is a country leads to one, by spelling or alias: to a second hop."""
    countries = {
        fact.subject.casefold()
        for about in builtin.about
        if about.domain == "country"
        for fact in builtin.of(about.name)
    }
    lost = {
        fact.answer
        for about in builtin.about
        if about.range == "country"
        for fact in builtin.of(about.name)
        if not any(answer.casefold() in countries for answer in fact.accepted)
    }
    # No relation asks about Georgia, which is a state of the US too, and about Taiwan.
    assert lost == {"Georgia", "Taiwan"}


def test_a_subject_is_spelled_the_same_in_every_relation(builtin: FactSet) -> None:
    spellings: dict[str, set[str]] = defaultdict(set)
    for fact in builtin.facts:
        plain = "".join(letter for letter in fact.subject.casefold() if letter.isalnum())
        spellings[plain.removeprefix("the")].add(fact.subject)
    differ = {tuple(sorted(found)) for found in spellings.values() if len(found) > 1}
    # different things: the animal, the bird and the part of the eye
    assert differ == {("Turkey", "turkey"), ("The Raven", "raven"), ("Iris", "iris")}


def test_relations_about_the_same_thing_agree(builtin: FactSet) -> None:
    capital_of = {fact.answer: fact.subject for fact in builtin.of("capital")}
    for fact in builtin.of("city_country"):
        assert fact.subject not in capital_of or capital_of[fact.subject] in fact.accepted, fact
    symbols = {fact.subject for fact in builtin.of("element_symbol")}
    assert symbols <= {fact.subject for fact in builtin.of("atomic_number")}
    currencies: dict[str, set[str]] = defaultdict(set)  # a code is one currency
    for fact in builtin.of("currency_code"):
        currencies[fact.answer] |= {
            named.answer for named in builtin.of("currency") if named.subject == fact.subject
        }
    assert {code for code, names in currencies.items() if len(names) > 1} == set()


def test_the_file_names_no_question_twice(builtin: FactSet) -> None:
    description = describe(builtin)
    assert description.repeated == description.contradicting == ()


def test_loading_twice_gives_the_same_facts_and_digest(builtin: FactSet) -> None:
    again = FactSet.builtin()
    assert again == builtin
    assert again.digest == builtin.digest
