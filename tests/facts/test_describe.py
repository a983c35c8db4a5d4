"""What a set of facts is said to hold, and which faults a user is pointed to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mpsearch.facts import Fact, FactSet
from mpsearch.facts.describe import describe


def facts(answers: list[str], relation: str = "r", **more: object) -> tuple[Fact, ...]:
    return tuple(
        Fact(relation, "The r of {} is", f"subject {n}", answer, **more)  # type: ignore[arg-type]
        for n, answer in enumerate(answers)
    )


def test_a_relation_is_described_in_figures() -> None:
    made = facts([f"a{n % 10}" for n in range(200)], paraphrases=("{} has the r",))
    description = describe(FactSet(made, "made"))
    (row,) = description.relations
    assert (description.one_hop, description.two_hop, description.source) == (200, 0, "made")
    assert (row.relation, row.kind, row.facts, row.answers, row.templates) == (
        *("r", "one-hop", 200, 10, 2),
    )
    assert sum(row.partitions.values()) == 200
    assert row.partitions["search"] == len(FactSet(made, "").part("search"))
    assert row.answer_characters == (2.0, 2)
    assert row.several_answers == 0
    assert description.warnings == ()


@pytest.mark.parametrize("answers", [2, 5, 8, 30])
@pytest.mark.parametrize("aliases", [(), ("A1",)])
def test_chance_is_that_of_the_answers_that_are_asked(
    answers: int, aliases: tuple[str, ...]
) -> None:
    made = facts([f"a{n % answers}" for n in range(60)], aliases=aliases)
    fact_set = FactSet(made, "made")
    if aliases and answers == 2:
        fact_set = FactSet(made[1::2] + facts(["a0", "a2"], aliases=()), "made")
    (row,) = describe(fact_set).relations
    expected = [1 / (1 + len(fact_set.distractors(fact))) for fact in fact_set.facts]
    assert row.chance == pytest.approx(sum(expected) / len(expected))


def test_the_built_in_facts_are_counted_by_kind() -> None:
    builtin = FactSet.builtin()
    description = describe(builtin)
    kinds = {kind: [r for r in description.relations if r.kind == kind] for kind in
             ("one-hop", "two-hop")}  # fmt: skip
    assert sum(row.facts for row in kinds["one-hop"]) == description.one_hop == len(builtin.facts)
    assert sum(row.facts for row in kinds["two-hop"]) == description.two_hop
    assert all(row.templates == 4 for row in description.relations)
    assert all(row.source for row in kinds["one-hop"])
    assert all(row.chance == pytest.approx(1 / 8) for row in kinds["one-hop"] if row.answers > 20)
    content = json.loads(json.dumps(description.to_json()))
    assert set(content) >= {"one_hop", "two_hop", "relations", "warnings"}
    assert set(content["relations"][0]) >= {"relation", "kind", "facts", "partitions", "chance"}


def test_a_small_relation_is_pointed_out() -> None:
    made = (Fact("r", "{} is", "France", "Paris"), Fact("r", "{} is", "Spain", "Madrid"))
    warnings = "\n".join(describe(FactSet(made, "made")).warnings)
    assert "relation 'r' has 0 demonstrations, prompts show 4 where they can" in warnings
    assert "has 0 facts in the validation partition" in warnings
    assert "one answer only" not in warnings


def test_a_relation_of_one_answer_is_pointed_out() -> None:
    warnings = describe(FactSet(facts(["a"] * 99), "made")).warnings
    assert warnings == (
        "relation 'r' has one answer only; facts need wrong answers to be told from",
    )


def test_the_same_question_twice_is_pointed_out_if_its_answers_differ() -> None:
    many = [f"a{n}" for n in range(99)]
    twice = facts(many[:60], "s") + facts(many, "r")
    description = describe(FactSet(twice, "made"))
    assert len(description.repeated) == 60
    assert description.contradicting == ()
    changed = facts(["b", *many[1:60]], "s") + facts(many, "r")
    description = describe(FactSet(changed, "made"))
    assert description.contradicting == ("The r of subject 0 is",)
    assert "'The r of subject 0 is' is asked twice with different answers" in description.warnings
    assert len(description.repeated) == 59


def test_an_alias_that_is_another_answer_is_pointed_out_once_a_relation() -> None:
    many = facts([f"a{n % 9}" for n in range(99)])
    mixed = Fact("r", "{} is", "Gaul", "a0", ("A1", "a2", "a3", "a4", "a0b"))
    (warning,) = describe(FactSet((*many, mixed), "made")).warnings
    assert warning.startswith(
        "relation 'r': some facts give as an alias what is another's answer: "
        "'A1' ('a0'), 'a2' ('a0'), 'a3' ('a0') and 1 more; "
    )


def test_describing_a_file_of_hops_counts_both_kinds(tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    heads = [
        {"relation": "a", "template": "{} is", "range": "x", "first_hop": "the a of {}"},
        {"relation": "b", "template": "{} has", "domain": "x", "second_hop": ["The b of {} is"]},
    ]
    made = [{"relation": "a", "subject": f"s{n}", "answer": f"x{n % 50}"} for n in range(900)]
    made += [{"relation": "b", "subject": f"x{n}", "answer": f"y{n}"} for n in range(50)]
    path.write_text("".join(json.dumps(line) + "\n" for line in heads + made), encoding="utf-8")
    description = describe(FactSet.load(path))
    assert [row.kind for row in description.relations] == ["one-hop", "one-hop", "two-hop"]
    assert description.one_hop == 950
    assert description.two_hop == description.relations[2].facts > 100
    assert description.relations[2].relation == "a/b"
