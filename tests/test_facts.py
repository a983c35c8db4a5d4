"""Facts: the built-in ones, the loader's faults by line, partitions by subject, distractors."""

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


def fault(path: Path, text: str) -> str:
    with pytest.raises(FactsError) as caught:
        loaded(path, text)
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert len(message.splitlines()) == 1, message
    return message


# --------------------------------------------------------------------------------- built-in facts


def test_there_are_enough_built_in_facts(builtin: FactSet) -> None:
    assert len(builtin.facts) >= 600
    assert len(builtin.relations) >= 8
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
        assert lines[0].get("source"), entry.name


def test_loading_twice_gives_the_same_facts_and_digest(builtin: FactSet) -> None:
    again = FactSet.builtin()
    assert again == builtin
    assert again.digest == builtin.digest


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


# ------------------------------------------------------------------------------------------ loading


def test_a_fact_is_read_to_the_word(path: Path) -> None:
    text = (
        RELATION
        + "\n"
        + line("France", "Paris", aliases=["Paname"], source="atlas")
        + line(" Köln ", " nowhere ", template="{}, capital of ")
    )
    facts = loaded(path, text)
    assert facts.source == str(path)
    assert facts.facts == (
        Fact("capital", "The capital of {} is", "France", "Paris", ("Paname",)),
        Fact("capital", "{}, capital of", "Köln", "nowhere"),
    )
    assert facts.facts[0].prompt == "The capital of France is"
    assert facts.facts[0].accepted == ("Paris", "Paname")


def test_a_later_relation_line_changes_the_template_of_what_follows(path: Path) -> None:
    later = '{"relation": "capital", "template": "{} has the capital"}\n'
    facts = loaded(path, RELATION + line("France") + later + line("Spain"))
    assert [fact.prompt for fact in facts.facts] == [
        "The capital of France is",
        "Spain has the capital",
    ]


def test_a_subject_with_braces_is_put_in_as_it_is(path: Path) -> None:
    assert loaded(path, RELATION + line("{x} {0}")).facts[0].prompt == "The capital of {x} {0} is"


def test_the_digest_follows_the_content(path: Path) -> None:
    one = loaded(path, RELATION + line("France", "Paris"))
    same = loaded(path, "\n" + RELATION + line("France", "Paris", source="atlas"))
    other = loaded(path, RELATION + line("France", "Lyon"))
    assert one.digest == same.digest
    assert one.digest != other.digest


FAULTS = {
    "not JSON": (RELATION + "{oops\n", "line 2: not JSON: "),
    "not an object": ("[1]\n", "line 1: expected an object with relation, subject and answer"),
    "no answer": (
        RELATION + '{"relation": "capital", "subject": "France"}\n',
        "line 2: fact about 'France' has no answer",
    ),
    "blank answer": (
        RELATION + "\n" + line("France", "  "),
        "line 3: fact about 'France' has no answer",
    ),
    "unknown key": (
        RELATION + line(anwser="x"),
        "line 2: unknown key 'anwser'; known: aliases, answer, relation, source, subject, template",
    ),
    "no template": (
        line(),
        "line 1: no template for relation 'capital' on or above this line",
    ),
    "template below": (
        line() + RELATION,
        "line 1: no template for relation 'capital' on or above this line",
    ),
    "template of another relation": (
        RELATION + line(relation="currency"),
        "line 2: no template for relation 'currency' on or above this line",
    ),
    "template without a place": (
        RELATION.replace("{}", "France"),
        "line 1: template 'The capital of France is' needs exactly one {} for the subject",
    ),
    "template with two places": (
        RELATION + line(template="{} and {}"),
        "line 2: template '{} and {}' needs exactly one {} for the subject",
    ),
    "neither fact nor relation": (
        '{"relation": "capital"}\n',
        "line 1: neither a fact ('subject') nor a 'template'",
    ),
    "no relation": ('{"template": "{} is"}\n', "line 1: 'relation' is missing"),
    "blank relation": ('{"relation": " ", "template": "{}"}\n', "line 1: 'relation' is missing"),
    "duplicate": (
        RELATION + line("France") + "\n" + line("FRANCE", "Lyon"),
        "line 4: 'FRANCE' stands in relation 'capital' already, line 2; keep one and give other "
        "right answers as aliases",
    ),
    "aliases one text": (
        RELATION + line(aliases="Paname"),
        "line 2: 'aliases' must be a list of texts",
    ),
    "aliases not texts": (RELATION + line(aliases=["a", 1]), "line 2: 'aliases' must be "),
    "aliases an object": (RELATION + line(aliases={"a": "b"}), "line 2: 'aliases' must be "),
    "aliases null": (RELATION + line(aliases=None), "line 2: 'aliases' must be "),
    "answer a number": (
        RELATION + line("x", 7),  # type: ignore[arg-type]
        "line 2: 'answer' must be text, not int",
    ),
    "subject null": (
        RELATION + line(None),  # type: ignore[arg-type]
        "line 2: 'subject' must be text, not NoneType",
    ),
    "blank subject": (RELATION + line("  "), "line 2: "),
    "byte order mark": ("\ufeff" + RELATION, "line 1: not JSON: "),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_line_with_file_and_line(path: Path, name: str) -> None:
    text, message = FAULTS[name]
    assert fault(path, text).startswith(f"{path}, {message}")


@pytest.mark.parametrize("text", ["", "\n \n", RELATION])
def test_a_file_without_facts_is_refused_with_an_example(path: Path, text: str) -> None:
    found = fault(path, text)
    assert found.startswith(f"facts file '{path}' holds no facts; each is a line such as ")
    assert len(loaded(path, found.split("such as ")[1]).facts) == 1  # and the example is right


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, path: Path) -> None:
    path.write_bytes(RELATION.encode() + b'{"relation": "capital", "subject": "\xe4"}\n')
    for file, message in (
        (tmp_path / "none", f"facts file '{tmp_path / 'none'}': No such file or directory"),
        (tmp_path, f"facts file '{tmp_path}': Is a directory"),
        (path, f"facts file '{path}' is not UTF-8 text; save it as UTF-8"),
    ):
        with pytest.raises(FactsError) as caught:
            FactSet.load(file)
        assert str(caught.value) == message
