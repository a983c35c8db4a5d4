"""Facts: the built-in ones, the loader's faults by line, partitions by subject, distractors."""

from __future__ import annotations

import cProfile
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpsearch.errors import FactsError
from mpsearch.facts import PARTITIONS, Fact, FactSet, jsonl
from mpsearch.facts.describe import describe

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
        "line 2: unknown key 'anwser' in a fact; known: aliases, answer, paraphrases, relation, "
        "source, subject, template",
    ),
    "an answer without subject": (
        '{"relation": "capital", "template": "{} is", "answer": "Paris"}\n',
        "line 1: unknown key 'answer' in a line without subject; known: domain, first_hop, ",
    ),
    "hops on a fact": (RELATION + line(domain="country"), "line 2: unknown key 'domain' in a fact"),
    "paraphrases alone": (
        RELATION + line(paraphrases=["{} is"]),
        "line 2: 'paraphrases' without the 'template' that they rephrase",
    ),
    "a paraphrase without a place": (
        '{"relation": "r", "template": "{} is", "paraphrases": ["it is"]}\n',
        "line 1: template 'it is' needs exactly one {} for the subject",
    ),
    "a paraphrase twice": (
        '{"relation": "r", "template": "{} is", "paraphrases": ["{} is "]}\n',
        "line 1: a paraphrase repeats another template; each must differ",
    ),
    "a first hop to nowhere": (
        '{"relation": "r", "template": "{} is", "first_hop": "the r of {}"}\n',
        "line 1: 'first_hop' needs a 'range' to say what it connects to",
    ),
    "a second hop from nowhere": (
        '{"relation": "r", "template": "{} is", "second_hop": ["The r of {} is"]}\n',
        "line 1: 'second_hop' needs a 'domain' to say what it connects to",
    ),
    "a hop without a place": (
        '{"relation": "r", "template": "{} is", "range": "r", "first_hop": "the r"}\n',
        "line 1: template 'the r' needs exactly one {} for the subject",
    ),
    "empty alias": (
        RELATION + line(aliases=["Paname", " "]),
        "line 2: fact about 'France' has an empty alias; drop it",
    ),
    "the answer as an alias": (
        RELATION + line(aliases=["Paris "]),
        "line 2: fact about 'France' gives one right answer twice; keep each once",
    ),
    "an alias twice": (
        RELATION + line(aliases=["Paname", "Paname"]),
        "line 2: fact about 'France' gives one right answer twice; keep each once",
    ),
    "nested without end": (RELATION + "[" * 100_000 + "\n", "line 2: not "),
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
}


def test_a_byte_order_mark_is_read_over(path: Path) -> None:
    assert loaded(path, "\ufeff" + RELATION + line()) == loaded(path, RELATION + line())


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le"])
def test_another_encoding_is_one_clear_line(path: Path, encoding: str) -> None:
    path.write_bytes((RELATION + line().replace("Paris", "Orléans")).encode(encoding))
    with pytest.raises(FactsError) as caught:
        FactSet.load(path)
    message = str(caught.value)
    assert message.startswith(f"facts file '{path}'") or message.startswith(f"{path}, line 1: ")
    assert len(message.splitlines()) == 1


def test_accents_are_composed_so_that_equal_texts_compare_equal(path: Path) -> None:
    apart = line("Cote d'Ivoire", "Bogota\u0301", aliases=["e\u0301t\u0065"])
    fact = loaded(path, RELATION + apart).facts[0]
    assert (fact.answer, fact.aliases) == ("Bogot\xe1", ("\xe9te",))


def test_lines_are_read_one_by_one(path: Path) -> None:
    """A fault is met before what follows is read, so memory is not that of the file."""
    read = []

    def lines() -> Iterator[tuple[str, int, str]]:
        for number, text in enumerate([RELATION, line(), "{oops", line("Spain")], start=1):
            read.append(number)
            yield "file", number, text

    with pytest.raises(FactsError, match="file, line 3: not JSON"):
        jsonl.parse(lines())
    assert read == [1, 2, 3]


def test_reading_takes_a_fixed_number_of_steps_a_line(path: Path) -> None:
    def steps(facts: int) -> int:
        text = RELATION + "".join(line(f"country {n}", f"city {n % 50}") for n in range(facts))
        path.write_text(text, encoding="utf-8")
        profile = cProfile.Profile()
        profile.runcall(lambda: describe(FactSet.load(path)))
        return sum(entry.callcount for entry in profile.getstats())

    few, many, more = steps(100), steps(1100), steps(2100)
    assert more - many == pytest.approx(many - few, rel=0.02)


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
        (path, f"facts file '{path}' is not UTF-8 text; save it as UTF-8"),
    ):
        with pytest.raises(FactsError) as caught:
            FactSet.load(file)
        assert str(caught.value) == message
