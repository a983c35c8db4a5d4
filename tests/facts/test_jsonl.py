"""Facts files: read to the word, faults by line, in a fixed number of steps a line."""

from __future__ import annotations

import cProfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_fact_set import RELATION, line, loaded

from mpsearch.errors import FactsError
from mpsearch.facts import Fact, FactSet, jsonl
from mpsearch.facts.describe import describe


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "facts.jsonl"


def fault(path: Path, text: str) -> str:
    with pytest.raises(FactsError) as caught:
        loaded(path, text)
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert len(message.splitlines()) == 1, message
    return message


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
