"""Two-hop questions: which chains exist, what they record, and that no bridge is searched twice."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import pytest

from mpsearch.facts import PARTITIONS, Fact, FactSet
from mpsearch.facts.two_hop import FEWEST, TwoHopFact, compose

HEADS = [
    {
        "relation": "city",
        "template": "The country of {} is",
        "range": "country",
        "first_hop": "the country of the city {}",
    },
    {
        "relation": "capital",
        "template": "The capital of the country {} is",
        "domain": "country",
        "second_hop": ["The capital of {} is", "The seat of {} is"],
    },
    {"relation": "god", "template": "{} is the god of", "domain": "god", "second_hop": ["{} is"]},
]


@pytest.fixture(scope="module")
def builtin() -> FactSet:
    return FactSet.builtin()


@pytest.fixture(scope="module")
def chains(builtin: FactSet) -> FactSet:
    return compose(builtin)


def named(kind: str, partition: str, count: int) -> list[str]:
    """Names that fall into a partition."""
    names = inside((f"{kind} {number}" for number in range(10_000)), partition)
    return list(islice(names, count))


def inside(names: Iterable[str], partition: str) -> Iterator[str]:
    return (name for name in names if Fact("r", "{}", name, "a").partition == partition)


def load(path: Path, cities: dict[str, object], capitals: dict[str, object]) -> FactSet:
    lines: list[dict[str, object]] = list(HEADS)
    for relation, facts in (("city", cities), ("capital", capitals)):
        for subject, answers in facts.items():
            answer, *aliases = answers if isinstance(answers, list) else [answers]
            fact = {"relation": relation, "subject": subject, "answer": answer}
            lines.append({**fact, "aliases": aliases})
    path.write_text("".join(json.dumps(item) + "\n" for item in lines), encoding="utf-8")
    return FactSet.load(path)


def enough(extra: dict[str, object]) -> tuple[dict[str, object], dict[str, object]]:
    """Cities and capitals that make a relation of chains, and some cities more."""
    countries, cities = named("land", "search", FEWEST), named("town", "search", FEWEST)
    return (
        {**dict(zip(cities, countries, strict=True)), **extra},
        {country: f"seat of {country[5:]}" for country in countries},
    )


def by_subject(facts: FactSet) -> dict[str, TwoHopFact]:
    return {f.subject: f for f in compose(facts).facts if isinstance(f, TwoHopFact)}


# ----------------------------------------------------------------------------------- composition


def test_a_chain_asks_over_a_bridge_that_it_does_not_name(tmp_path: Path) -> None:
    cities, capitals = enough({})
    facts = load(tmp_path / "f.jsonl", cities, capitals)
    two = compose(facts)
    assert two.relations == ("city/capital",)
    assert len(two.facts) == FEWEST
    city, country = next(iter(cities.items()))
    chain = by_subject(facts)[city]
    assert chain.prompt == f"The capital of the country of the city {city} is"
    assert chain.paraphrases == ("The seat of the country of the city {} is",)
    assert chain.answer == capitals[str(country)]
    assert chain.bridge == country
    assert country not in chain.prompt


def test_each_hop_is_a_fact_of_its_own_that_can_be_asked(tmp_path: Path) -> None:
    facts = load(tmp_path / "f.jsonl", *enough({}))
    for chain in by_subject(facts).values():
        assert chain.first in facts.of("city")
        assert chain.second in facts.of("capital")
        assert chain.first.subject == chain.subject
        assert chain.second.subject in chain.first.accepted
        assert chain.second.answer == chain.answer


def test_an_alias_leads_to_the_bridge(tmp_path: Path) -> None:
    cities, capitals = enough({})
    bridge = next(iter(capitals))
    city = named("village", "search", 1)[0]
    facts = load(tmp_path / "f.jsonl", {**cities, city: ["a nickname", bridge.upper()]}, capitals)
    assert by_subject(facts)[city].bridge == bridge


def test_what_another_name_of_the_bridge_leads_to_is_no_wrong_answer(tmp_path: Path) -> None:
    cities, capitals = enough({})
    one, other = list(capitals)[:2]
    city = named("village", "search", 1)[0]
    facts = load(tmp_path / "f.jsonl", {**cities, city: [one, other]}, capitals)
    chain = by_subject(facts)[city]
    assert chain.bridge == one
    assert chain.accepted == (capitals[one], capitals[other])
    assert capitals[other] not in compose(facts).distractors(chain, 999)


def test_a_question_that_gives_its_answer_away_is_not_asked(tmp_path: Path) -> None:
    cities, capitals = enough({})
    bridge, seat = next(iter(capitals.items()))
    telling = next(inside((f"{seat} suburb {n}" for n in range(999)), "search"))
    facts = load(tmp_path / "f.jsonl", {**cities, telling: bridge}, capitals)
    assert telling not in by_subject(facts)


def test_only_a_range_that_is_the_domain_connects(tmp_path: Path) -> None:
    """Turkey the country is not the bird, nor Mercury the metal the god."""
    cities, capitals = enough({})
    path = tmp_path / "f.jsonl"
    load(path, cities, capitals)
    with path.open("a", encoding="utf-8") as stream:
        for country in capitals:
            god = {"relation": "god", "subject": country, "answer": f"the rule of {country}"}
            stream.write(json.dumps(god) + "\n")
    assert compose(FactSet.load(path)).relations == ("city/capital",)


def test_a_pair_of_few_chains_is_left_out(tmp_path: Path) -> None:
    cities, capitals = enough({})
    few = dict(list(cities.items())[:-1])
    assert compose(load(tmp_path / "f.jsonl", few, capitals)).facts == ()


# ------------------------------------------------------------------------------------ partitions


@pytest.mark.parametrize("subject", PARTITIONS)
@pytest.mark.parametrize("bridge", PARTITIONS)
def test_a_chain_exists_only_within_a_partition(tmp_path: Path, subject: str, bridge: str) -> None:
    city, country = named("hamlet", subject, 1)[0], named("realm", bridge, 1)[0]
    cities, capitals = enough({city: country})
    facts = load(tmp_path / "f.jsonl", cities, {**capitals, country: "Seatown"})
    chain = by_subject(facts).get(city)
    if bridge == "demonstrations":  # shown, never scored: the bridge alone decides
        assert chain is not None
        assert chain.partition == "demonstrations"
    elif subject == bridge:
        assert chain is not None
        assert chain.partition == bridge
    else:
        assert chain is None


def test_no_entity_of_a_scored_chain_is_scored_in_another_partition(chains: FactSet) -> None:
    partitions: dict[str, set[str]] = defaultdict(set)
    for chain in chains.facts:
        assert isinstance(chain, TwoHopFact)
        if chain.partition != "demonstrations":
            for entity in (chain.subject, chain.bridge):
                partitions[entity.casefold()].add(chain.partition)
    assert {entity for entity, found in partitions.items() if len(found) > 1} == set()


def test_no_bridge_of_a_demonstration_is_scored(chains: FactSet) -> None:
    shown, scored = set(), set()
    for chain in chains.facts:
        assert isinstance(chain, TwoHopFact)
        (shown if chain.partition == "demonstrations" else scored).add(chain.bridge.casefold())
    assert shown & scored == set()


def test_adding_facts_moves_no_chain(tmp_path: Path) -> None:
    cities, capitals = enough({})
    before = by_subject(load(tmp_path / "before.jsonl", cities, capitals))
    more = dict(zip(named("new", "search", 9), capitals, strict=False))
    after = by_subject(load(tmp_path / "after.jsonl", {**more, **cities}, capitals))
    assert len(after) == len(before) + 9
    assert {name: after[name] for name in before} == before


# --------------------------------------------------------------------------------- built-in chains


def test_there_are_enough_two_hop_questions(chains: FactSet) -> None:
    assert sum(chain.partition != "demonstrations" for chain in chains.facts) >= 600
    assert all(len(chains.part(name)) >= 60 for name in PARTITIONS)
    assert len(chains.relations) >= 8


def test_every_two_hop_relation_has_demonstrations(chains: FactSet) -> None:
    for relation in chains.relations:
        assert len(chains.demonstrations(relation, 4)) >= 3, relation


def test_every_chain_reads_well_and_records_its_hops(chains: FactSet, builtin: FactSet) -> None:
    known = set(builtin.facts)
    for chain in chains.facts:
        assert isinstance(chain, TwoHopFact)
        assert {chain.first, chain.second} <= known
        assert chain.relation == f"{chain.first.relation}/{chain.second.relation}"
        assert len(set(chain.templates)) == 4
        for template in chain.templates:
            assert template.count("{}") == 1
            assert " the the " not in template
            assert "country the country" not in template


def test_no_right_answer_is_among_the_distractors_of_a_chain(chains: FactSet) -> None:
    for chain in chains.part("test"):
        right = {answer.casefold() for answer in chain.accepted}
        wrong = [answer.casefold() for answer in chains.distractors(chain)]
        assert wrong
        assert right.isdisjoint(wrong), chain


def test_a_question_of_one_hop_and_one_of_two_have_different_digests(
    chains: FactSet, builtin: FactSet
) -> None:
    assert chains.digest == compose(FactSet.builtin()).digest
    assert chains.digest != builtin.digest
    assert chains.source == "built-in, two hops"
