"""Fact sets: partitions by subject, paraphrases, distractors."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpsearch.errors import FactsError
from mpsearch.facts import PARTITIONS, Fact, FactSet

RELATION = '{"relation": "capital", "template": "The capital of {} is"}\n'
SHARES = {"demonstrations": 0.10, "search": 0.45, "validation": 0.20, "test": 0.25}


@pytest.fixture(scope="module")
def builtin() -> FactSet:
    return FactSet.builtin()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "facts.jsonl"


def line(subject: str = "France", answer: str = "Paris", **more: object) -> str:
    fact = {"relation": "capital", "subject": subject, "answer": answer, **more}
    return json.dumps(fact) + "\n"


def loaded(path: Path, text: str) -> FactSet:
    path.write_text(text, encoding="utf-8")
    return FactSet.load(path)


# ------------------------------------------------------------------------------------- partitions


def test_the_shares_of_the_partitions_are_10_45_20_25(builtin: FactSet) -> None:
    counts = Counter(fact.partition for fact in builtin.facts)
    assert set(counts) == set(PARTITIONS)
    for name, share in SHARES.items():
        assert counts[name] / len(builtin.facts) == pytest.approx(share, abs=0.025)


def test_many_subjects_come_still_nearer_to_the_shares() -> None:
    facts = [Fact("r", "{} is", f"subject {number}", "a") for number in range(20_000)]
    counts = Counter(fact.partition for fact in facts)
    for name, share in SHARES.items():
        assert counts[name] / len(facts) == pytest.approx(share, abs=0.01)


def test_parts_hold_every_fact_once(builtin: FactSet) -> None:
    parts = [fact for name in PARTITIONS for fact in builtin.part(name)]
    assert Counter(parts) == Counter(builtin.facts)


def test_a_subject_is_in_one_partition_across_all_relations(builtin: FactSet) -> None:
    partitions: dict[str, set[str]] = {}
    relations: dict[str, set[str]] = {}
    for fact in builtin.facts:
        partitions.setdefault(fact.subject.casefold(), set()).add(fact.partition)
        relations.setdefault(fact.subject.casefold(), set()).add(fact.relation)
    assert max(len(found) for found in relations.values()) > 1  # some subject stands in several
    assert [subject for subject, found in partitions.items() if len(found) > 1] == []


@given(st.text(min_size=1))
@settings(deadline=None, max_examples=100)
def test_the_partition_depends_on_the_subject_alone(subject: str) -> None:
    place = int(hashlib.sha256(subject.casefold().encode()).hexdigest()[:16], 16) / 2**64
    expected = PARTITIONS[(place >= 0.10) + (place >= 0.55) + (place >= 0.75)]
    for fact in (
        Fact("capital", "The capital of {} is", subject, "Paris"),
        Fact("color", "{} is", subject, "red", ("blue",)),
        Fact("color", "{} is", subject.casefold(), "red"),
    ):
        assert fact.partition == expected


def test_the_split_is_pinned_so_that_old_runs_stay_comparable() -> None:
    pinned = {
        "France": "search",
        "Germany": "validation",
        "Italy": "validation",
        "Spain": "search",
        "Peru": "test",
        "Chile": "test",
    }
    assert {name: Fact("r", "{}", name, "a").partition for name in pinned} == pinned


def test_adding_facts_moves_none(path: Path) -> None:
    few = "".join(line(f"country {n}", f"city {n}") for n in range(30))
    many = "".join(line(f"country {n}", f"city {n}") for n in range(60, -1, -1))
    before = {fact.subject: fact.partition for fact in loaded(path, RELATION + few).facts}
    after = {fact.subject: fact.partition for fact in loaded(path, RELATION + many).facts}
    assert len(after) == 61
    assert {subject: after[subject] for subject in before} == before


def test_a_part_of_some_relations_holds_those_only(builtin: FactSet) -> None:
    part = builtin.part("test", ["capital", "currency"])
    assert {fact.relation for fact in part} == {"capital", "currency"}
    assert part == tuple(
        fact
        for fact in builtin.facts
        if fact.partition == "test" and fact.relation in ("capital", "currency")
    )


def test_demonstrations_come_from_their_partition_in_one_order(builtin: FactSet) -> None:
    four = builtin.demonstrations("capital", 4)
    assert len(four) == 4
    assert builtin.demonstrations("capital", 2) == four[:2]
    assert set(builtin.demonstrations("capital", 999)) == set(
        builtin.part("demonstrations", ["capital"])
    )
    backwards = FactSet(tuple(reversed(builtin.facts)), "backwards")
    assert backwards.demonstrations("capital", 4) == four


# -------------------------------------------------------------------------------------- paraphrases


PARAPHRASED = (
    '{"relation": "capital", "template": "The capital of {} is", "paraphrases": '
    '["The capital city of {} is ", "{} has the capital"]}\n'
)


def test_a_paraphrase_asks_the_same_fact_in_other_words(path: Path) -> None:
    facts = loaded(path, PARAPHRASED + line() + line("Spain", "Madrid", template="{} rules from"))
    france, spain = facts.facts
    assert france.templates == (
        *("The capital of {} is", "The capital city of {} is", "{} has the capital"),
    )
    assert spain.templates == ("{} rules from",)
    assert [france.paraphrased(number).prompt for number in (0, 1, 2)] == [
        *("The capital of France is", "The capital city of France is", "France has the capital"),
    ]
    assert set(france.paraphrased(2).templates) == set(france.templates)
    with pytest.raises(IndexError):
        spain.paraphrased(1)


def test_a_paraphrased_set_asks_a_fact_without_the_paraphrase_as_before(path: Path) -> None:
    facts = loaded(path, PARAPHRASED + line() + line("Spain", "Madrid", template="{} rules from"))
    second = facts.paraphrased(2)
    assert {fact.prompt for fact in second.facts} == {"France has the capital", "Spain rules from"}
    assert second.facts[0].partition == facts.facts[0].partition
    assert second.source == f"{path}, paraphrase 2"


def test_a_paraphrased_set_shows_its_demonstrations_in_the_same_words(builtin: FactSet) -> None:
    main, other = builtin.demonstrations("capital", 4), builtin.paraphrased(1)
    shown = other.demonstrations("capital", 4)
    assert [fact.subject for fact in shown] == [fact.subject for fact in main]
    assert {fact.template for fact in shown} == {main[0].paraphrases[0]}
    assert other.distractors(shown[0]) == builtin.distractors(main[0])


def test_the_digest_is_that_of_what_a_search_asks(path: Path) -> None:
    plain = loaded(path, RELATION + line())
    assert loaded(path, PARAPHRASED + line()).digest == plain.digest
    assert loaded(path, PARAPHRASED + line()).paraphrased(1).digest != plain.digest
    for changed in (line(answer="Lyon"), line("Gaul"), line(aliases=["Paname"])):
        assert loaded(path, RELATION + changed).digest != plain.digest


# -------------------------------------------------------------------------------------- distractors


def test_distractors_are_the_same_each_time_and_differ_between_facts(builtin: FactSet) -> None:
    again = FactSet.builtin()
    facts = builtin.part("search", ["capital"])
    assert all(builtin.distractors(fact) == again.distractors(fact) for fact in facts)
    assert len({builtin.distractors(fact) for fact in facts}) > len(facts) / 2


def test_distractors_are_answers_of_the_same_relation(builtin: FactSet) -> None:
    for relation in builtin.relations:
        answers = {fact.answer for fact in builtin.facts if fact.relation == relation}
        for fact in builtin.part("validation", [relation]):
            assert set(builtin.distractors(fact, 999)) <= answers
            assert builtin.distractors(fact, 3) == builtin.distractors(fact, 999)[:3]


def test_distractors_do_not_depend_on_the_order_of_the_file(path: Path) -> None:
    lines = [line(f"country {n}", f"city {n % 12}") for n in range(20)]
    forward = loaded(path, RELATION + "".join(lines))
    backward = loaded(path, RELATION + "".join(reversed(lines)))
    for fact in forward.facts:
        assert forward.distractors(fact) == backward.distractors(fact)


def test_an_alias_is_never_a_distractor_in_any_case(path: Path) -> None:
    text = RELATION + line("France", "Paris", aliases=["LUTETIA", "Paname"])
    text += line("Gaul", "Lutetia") + line("Parisii", "paris") + line("Spain", "Madrid")
    facts = loaded(path, text)
    assert facts.distractors(facts.facts[0]) == ("Madrid",)


def test_an_alias_is_no_distractor_though_written_with_spaces_around(path: Path) -> None:
    text = RELATION + line("France", " Paris ", aliases=[" Lutetia "])
    text += line("Gaul", "Lutetia") + line("Spain", "Madrid")
    facts = loaded(path, text)
    assert facts.distractors(facts.facts[0]) == ("Madrid",)


def test_a_relation_of_one_answer_cannot_be_asked(path: Path) -> None:
    facts = loaded(path, RELATION + line("France", "Paris") + line("Gaul", "paris"))
    with pytest.raises(FactsError) as caught:
        facts.distractors(facts.facts[0])
    assert str(caught.value) == (
        f"{path}: relation 'capital' has only the answer 'Paris'; a relation needs at least two "
        "different answers"
    )
