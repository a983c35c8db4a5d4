"""The recall study: its statistics against hand-made tables, its verdicts on planted truth."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from recall_study import with_examples
from recall_study_findings import FAILS, HOLDS, OPEN, REFERENCE, Answers, Asked, findings
from study_statistics import rank_test, ranks, spearman, stratified_difference

from mpsearch.facts import Fact, FactSet

RELATIONS, FACTS, CHAINS = 12, 40, 400
QUANTIZED = (
    *("bitsandbytes NF4", "bitsandbytes int8", "GPTQ 4-bit", "GPTQ 8-bit"),
    *("rounding 4-bit", "rounding 3-bit", "AWQ 4-bit"),
)


def test_equal_values_share_their_mean_rank() -> None:
    assert ranks([5.0, 1.0, 5.0, 3.0]).tolist() == [2.5, 0.0, 2.5, 1.0]


def test_spearman_by_hand() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 40, 30]) == pytest.approx(0.8)  # 1 - 6 * 2 / 60
    assert spearman([1, 2, 3], [9, 4, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 3], [7, 7, 7]) == 0.0


def test_few_things_are_permuted_in_every_way() -> None:
    x, y = np.array([1.0, 2, 3, 4]), np.array([1.0, 2, 3, 4])
    rho, p = rank_test([(x, y)], np.random.default_rng(0))
    ways = [abs(spearman(x, y[list(order)])) >= 1 for order in permutations(range(4))]
    assert (rho, p) == (pytest.approx(1.0), pytest.approx(np.mean(ways)))


def test_correlated_pairs_are_found_and_unrelated_ones_seldom() -> None:
    generator = np.random.default_rng(1)
    x = generator.random(20)
    rho, p = rank_test([(x, -x), (x, -x + 0.01)], generator)
    assert rho == pytest.approx(-1)
    assert p < 0.001
    few = [rank_test([(generator.random(6), generator.random(6))], generator) for _ in range(300)]
    assert 0.01 < np.mean([p < 0.05 for _, p in few]) < 0.09


def test_noise_of_two_halves_is_no_correlation() -> None:
    """Saturation of one half against loss in the other: the noise of a half is in neither twice."""
    generator = np.random.default_rng(2)
    found = []
    for _ in range(40):
        noise = generator.random((2, 12))
        found.append(rank_test([(noise[0], -noise[1]), (noise[1], -noise[0])], generator)[0])
    assert abs(np.mean(found)) < 0.12
    assert spearman(noise[0], -noise[0]) == pytest.approx(-1)  # what one half alone would say


def test_strata_keep_an_easy_one_from_passing_for_a_difference() -> None:
    # In each stratum the groups are alike; the first group is mostly in the easy stratum.
    values = [1, 1, 1, 1, 0, 0, 0, 0]
    first = [True, True, True, False, True, False, False, False]
    strata = ["easy"] * 4 + ["hard"] * 4
    clusters = [str(i) for i in range(8)]
    alike = stratified_difference(values, first, strata, clusters, np.random.default_rng(0))
    assert (alike.mean, alike.low, alike.high) == (0, 0, 0)
    pooled = stratified_difference(values, first, ["one"] * 8, clusters, np.random.default_rng(0))
    assert pooled.mean == pytest.approx(3 / 4 - 1 / 4)


def test_strata_count_by_the_pairs_they_give() -> None:
    # 1 of 1 against 0 of 1: weight 1/2. 0 of 2 against 0 of 3: weight 6/5. One group alone: none.
    values = [1, 0, 0, 0, 0, 0, 0, 1]
    first = [True, False, True, True, False, False, False, True]
    strata = ["a", "a", "b", "b", "b", "b", "b", "c"]
    found = stratified_difference(values, first, strata, list("stuvwxyz"), np.random.default_rng(0))
    assert found.mean == pytest.approx(0.5 / 1.7)
    with pytest.raises(ValueError, match="both groups"):
        stratified_difference([1.0], [True], ["a"], ["t"], np.random.default_rng(0))


def test_the_interval_over_clusters_covers_and_is_wider_than_over_values() -> None:
    generator = np.random.default_rng(3)
    covered, wider = [], []
    for _ in range(60):
        effect = generator.normal(size=30)
        cluster = np.repeat(np.arange(30), 6)
        first = np.repeat(np.arange(30) < 15, 6)  # a cluster is in one group
        values = effect[cluster] + 0.2 * generator.normal(size=180) + 0.5 * first
        names = [str(c) for c in cluster]
        strata = ["one"] * 180
        over = stratified_difference(values, first, strata, names, generator, draws=300)
        apart = [str(i) for i in range(180)]
        naive = stratified_difference(values, first, strata, apart, generator, draws=300)
        covered.append(over.low <= 0.5 <= over.high)
        wider.append(over.high - over.low > naive.high - naive.low)
    assert np.mean(covered) > 0.82
    assert np.mean(wider) == 1


@dataclass(frozen=True)
class Chain:
    relation: str
    bridge: str


@pytest.fixture(scope="module")
def asked() -> Asked:
    facts = [
        Fact(f"r{relation}", "{} is", f"s{relation}-{number}", "x")
        for relation in range(RELATIONS)
        for number in range(FACTS)
    ]
    return Asked(facts, [Chain(f"pair{i % 4}", f"bridge{i % 80}") for i in range(CHAINS)])


class Planted:
    """A reference that knows 30 % of the first relation to 96 % of the last, and what each model
    forgets of it: a share of the known facts, of known first hops, of known chains.
    """

    def __init__(self, seed: int = 0) -> None:
        self.generator = np.random.default_rng(seed)
        self.saturation = np.repeat(np.linspace(0.3, 0.96, RELATIONS), FACTS)
        self.models = {REFERENCE: self.answers(self.random(self.saturation))}

    def random(self, share: object, size: int = RELATIONS * FACTS) -> Any:
        return self.generator.random(size) < share

    def answers(self, one_hop: Any) -> Answers:
        first, two_hop = self.random(0.7, CHAINS), self.random(0.6, CHAINS)
        return Answers(one_hop, two_hop, two_hop, first, first)

    def add(self, name: str, forgets: Any = 0.0, learns: Any = 0.0, hops: float = 0.0,
            chain_follows: bool = True) -> None:  # fmt: skip
        known = self.models[REFERENCE]
        one_hop = known.one_hop & ~self.random(forgets) | self.random(learns)
        forgotten = self.random(hops, CHAINS)
        lost = forgotten if chain_follows else self.random(hops, CHAINS)
        first, two_hop = known.first & ~forgotten, known.two_hop & ~lost
        self.models[name] = Answers(one_hop, two_hop, two_hop, first, first)

    def verdicts(self, asked: Asked) -> dict[str, str]:
        return {found["finding"]: found["verdict"] for found in findings(self.models, asked, 0)}


def test_planted_truth_holds(asked: Asked) -> None:
    planted = Planted()
    for step, name in enumerate(QUANTIZED):
        kind = 0.0 if "bitsandbytes" in name else 0.4
        unsaturated = kind * 1.6 * (1 - planted.saturation)
        planted.add(name, unsaturated, 0.1 if name == "bitsandbytes int8" else 0, 0.05 * step)
    assert planted.verdicts(asked) == dict.fromkeys(("1a", "1b", "2a", "2b", "3", "4"), HOLDS)


def test_the_opposite_does_not_hold(asked: Asked) -> None:
    planted = Planted()
    for name in QUANTIZED:
        kind = 0.5 if "bitsandbytes" in name else 0.15
        planted.add(name, kind * 1.5 * planted.saturation, 0, 0.3, chain_follows=False)
    verdicts = planted.verdicts(asked)
    assert verdicts.pop("2b") in (OPEN, HOLDS, FAILS)  # all models lose alike
    assert verdicts == {"1a": FAILS, "1b": FAILS, "2a": OPEN, "3": FAILS, "4": FAILS}


def test_nothing_is_found_where_models_only_flip_at_random(asked: Asked) -> None:
    """Flips both ways, as many at each saturation as keep every relation where it is."""
    planted = Planted(1)
    for name in QUANTIZED:
        keeps = planted.saturation
        planted.add(name, 0.1 * (1 - keeps) / keeps, 0.1, 0.2, chain_follows=False)
    verdicts = planted.verdicts(asked)
    assert [verdicts[number] for number in ("1a", "1b", "2a", "3", "4")] == [OPEN] * 5


def test_every_relation_gets_its_examples_and_asks_none_of_them() -> None:
    facts = [Fact(name, "{} is", f"{name}{i}", "x") for name in "ab" for i in range(20)]
    facts += [Fact("large", "{} is", f"large{i}", "x") for i in range(200)]
    before = FactSet(tuple(facts), "made up")
    after = with_examples(before, 5)
    assert {name: len(after.demonstrations(name, 5)) for name in after.relations} == dict.fromkeys(
        after.relations, 5
    )
    assert after.of("large") == before.of("large")  # it had enough
    for old, new in zip(before.facts, after.facts, strict=True):
        assert (old.relation, old.subject, old.answer) == (new.relation, new.subject, new.answer)
        assert new.partition in (old.partition, "demonstrations")
    assert len(after.facts) == 240
