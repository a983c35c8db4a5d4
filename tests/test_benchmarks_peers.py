"""The comparison with peers: searches that keep the budget and resume, tokens that add up, and
findings on made-up rows.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import fact_lines

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import peers
from peers_choices import MIDWAY, SIZES, TIGHT, Peers, budgets, inverted
from peers_facts import SearchFacts, untouched
from peers_findings import FAILS, HOLDS, OPEN, OURS, Comparison, findings, tokens_to_reach
from peers_report import table
from rival_searches import (
    Grid,
    Levels,
    OutOfTime,
    Trail,
    _draw_facts,
    bayesian_or_genetic,
    evolutionary,
)

from mpsearch.allocate import uniform
from mpsearch.assignment import Assignment
from mpsearch.bank import Bank
from mpsearch.errors import RunError
from mpsearch.estimates import relation_mean
from mpsearch.evaluate import Bench, all_layers
from mpsearch.facts import Fact, FactSet
from mpsearch.formats import FORMATS
from mpsearch.models import Model
from mpsearch.quantizers import get_quantizer
from mpsearch.recall import RecallProxy
from mpsearch.run import Run
from mpsearch.space import ResolvedSpace

EVALUATIONS = 30


@pytest.fixture
def bench(tiny: Model, tiny_space: ResolvedSpace) -> Iterator[Bench]:
    bank = Bank(tiny, get_quantizer("rounding", tiny_space.target.name))
    bank.build(all_layers(tiny_space))
    with Bench(tiny_space, bank) as bench:
        yield bench


@pytest.fixture
def search_facts(bench: Bench, tiny_facts: FactSet) -> SearchFacts:
    facts = [f for name in tiny_facts.relations for f in tiny_facts.part("search", {name})]
    return SearchFacts(bench, tiny_facts, facts)


@pytest.fixture
def grid(tiny_space: ResolvedSpace) -> Grid:
    return Grid(tiny_space, budgets(tiny_space)[MIDWAY])


def test_the_sizes_are_the_uniform_ones_and_between(tiny_space: ResolvedSpace) -> None:
    low, middle, high, more = budgets(tiny_space).values()
    uniforms = uniform(tiny_space)
    assert (low, high) == tuple(
        tiny_space.stored_bytes(uniforms[name]) for name in ("int3-g64", "int4-g64")
    )
    assert middle == (low + high) // 2
    kept = tiny_space.kept_bytes
    assert (more - kept) / (high - kept) == pytest.approx(1.25, abs=1e-4)


def test_losses_and_tokens_are_those_of_the_proxy(
    bench: Bench, tiny: Model, tiny_facts: FactSet, grid: Grid, search_facts: SearchFacts
) -> None:
    facts = [f for name in tiny_facts.relations for f in tiny_facts.part("search", {name})]
    proxy = RecallProxy(tiny, tiny_facts, facts, contrast=False, prompts=True)
    assert search_facts.tokens == search_facts.cost(None) == proxy.tokens
    assignment = grid.assignment(grid.smallest)
    lowered = bench.evaluate(assignment, proxy).objective_per_fact
    expected = relation_mean(lowered, proxy.relations).mean
    assert search_facts.loss(assignment, None) == pytest.approx(expected, abs=1e-5)
    some = (0, 3, 30)
    of_some = relation_mean(lowered[list(some)], [proxy.relations[number] for number in some])
    assert search_facts.loss(assignment, some) == pytest.approx(
        of_some.mean, abs=1e-3
    )  # bf16, packed otherwise
    assert 0 < search_facts.cost(some) < proxy.tokens


def evolve(trail: Trail, grid: Grid, facts: SearchFacts, start: Levels | None) -> None:
    trail.follow(lambda loss: evolutionary(grid, loss, facts.relations, 0, start))


def breed(trail: Trail, grid: Grid, name: str) -> None:
    trail.follow(lambda loss: bayesian_or_genetic(name, grid, loss, 0, [], EVALUATIONS))


class Cut:
    """Lets so many measurements through, then says that the time is over."""

    def __init__(self, measurements: int):
        self.left = measurements

    def __call__(self) -> None:
        if not self.left:
            raise OutOfTime
        self.left -= 1


@pytest.mark.parametrize("name", ["cold", "warm", "nsga2", "tpe"])
def test_a_search_keeps_its_budget_counts_its_tokens_and_resumes_exactly(
    name: str, tmp_path: Path, grid: Grid, search_facts: SearchFacts
) -> None:
    def follow(trail: Trail) -> None:
        if name in ("cold", "warm"):
            start = grid.filled(grid.smallest, np.random.default_rng(5)) if name == "warm" else None
            evolve(trail, grid, search_facts, start)
        else:
            breed(trail, grid, name)

    whole = Trail(tmp_path / "whole.jsonl", grid, search_facts, EVALUATIONS)
    follow(whole)
    limit = EVALUATIONS * search_facts.tokens
    assert limit / 2 < whole.fact_tokens <= limit
    sizes = [grid.size([int(digit) for digit in line["levels"]]) for line in whole.lines]
    assert max(sizes) <= grid.budget_bytes
    assert grid.size(whole.best()) <= grid.budget_bytes
    full = [line for line in whole.lines if line["facts"] == len(search_facts)]
    assert min(line["loss"] for line in full) == whole.loss(whole.best(), None)
    assert len({line["levels"] for line in full}) == len(full)  # a repeat costs nothing
    steps = np.diff([0, *(line["fact_tokens"] for line in whole.lines)])
    assert {step for step, line in zip(steps, whole.lines, strict=True) if line in full} == {
        search_facts.tokens
    }
    assert all(0 < step < search_facts.tokens
               for step, line in zip(steps, whole.lines, strict=True) if line not in full
               )  # fmt: skip

    path = tmp_path / "cut.jsonl"
    for _ in range(3):
        cut = Trail(path, grid, search_facts, EVALUATIONS, Cut(len(whole.lines) // 4))
        with pytest.raises(OutOfTime):
            follow(cut)
    with open(path, "a", encoding="utf-8") as stream:
        stream.write('{"levels": "01')  # what a kill leaves
    resumed = Trail(path, grid, search_facts, EVALUATIONS)
    before = len(resumed.lines)
    assert before == len(whole.lines) // 4 * 3
    follow(resumed)
    without_seconds = [{**line, "seconds": 0} for line in resumed.lines]
    assert without_seconds == [{**line, "seconds": 0} for line in whole.lines]
    assert resumed.best() == whole.best()


class Planted:
    """Stands in for the search facts: what counts is the last group, and a little the first."""

    tokens = 64
    relations = [f"r{number % 8}" for number in range(64)]  # noqa: RUF012

    def __len__(self) -> int:
        return len(self.relations)

    def cost(self, some: tuple[int, ...] | None) -> int:
        return self.tokens if some is None else len(some)

    def loss(self, assignment: Assignment, some: tuple[int, ...] | None) -> float:
        first, *_, last = (FORMATS[name].bits for name in assignment.values())
        return 10.0 - last - first / 10


def test_evolution_begins_at_the_uniform_of_its_size_and_finds_planted_truth(
    tmp_path: Path, tiny_space: ResolvedSpace
) -> None:
    grid = Grid(tiny_space, budgets(tiny_space)["uniform 3-bit"])
    planted: Any = Planted()
    trail = Trail(tmp_path / "trail.jsonl", grid, planted, EVALUATIONS)
    evolve(trail, grid, planted, None)
    assert trail.lines[0]["levels"] == "1" * len(tiny_space.groups)
    assert trail.best()[-1] == 3
    assert [line["facts"] for line in trail.lines[1 : 1 + 128 + 16]] == [1] * 128 + [8] * 16
    best = trail.lines[0]  # children are of the best so far
    for line in trail.lines[1:]:
        if line["facts"] == 64 and line["loss"] < best["loss"]:
            best = line
        elif line["facts"] == 1:
            raised = [int(a) - int(b) for a, b in zip(line["levels"], best["levels"], strict=True)]
            assert sum(step for step in raised if step > 0) <= 3


@pytest.mark.parametrize("name", ["nsga2", "tpe"])
def test_what_is_too_large_stands_for_the_same_that_fits_and_warm_starts_have_neighbours(
    name: str, tmp_path: Path, grid: Grid
) -> None:
    planted: Any = Planted()
    start = grid.filled(grid.smallest, np.random.default_rng(5))
    trail = Trail(tmp_path / "trail.jsonl", grid, planted, 60)
    trail.follow(lambda loss: bayesian_or_genetic(name, grid, loss, 0, [start], 60))
    asked = [[int(digit) for digit in line["levels"]] for line in trail.lines]
    assert asked[0] == list(start) and len(asked) == 60  # nothing was spent on what is too large
    assert max(map(grid.size, asked)) <= grid.budget_bytes
    for levels in asked[1:20]:
        raised = [b - a for a, b in zip(start, levels, strict=True) if b > a]
        assert levels != list(start) and sum(raised) <= 3
    assert trail.best()[-1] == 3


def test_the_facts_of_a_stage_are_random_ones_of_a_random_relation() -> None:
    relations = [f"r{number % 4}" for number in range(40)]
    draws = {_draw_facts(relations, 0.1, np.random.default_rng(seed)) for seed in range(60)}
    assert len(draws) > 40
    for some in draws:
        assert some is not None and len(some) == 4
        assert len({relations[number] for number in some}) == 1


def test_a_trail_of_another_search_is_refused(tmp_path: Path, grid: Grid) -> None:
    planted: Any = Planted()
    path = tmp_path / "trail.jsonl"
    evolve(Trail(path, grid, planted, 2), grid, planted, grid.smallest)
    with pytest.raises(RunError, match="line 1: another search wrote it"):
        breed(Trail(path, grid, planted, 2), grid, "nsga2")


def test_random_moves_fill_the_budget(grid: Grid) -> None:
    for seed in range(5):
        levels = grid.filled(grid.smallest, np.random.default_rng(seed))
        room = grid.budget_bytes - grid.size(levels)
        steps = [grid.step_bytes(levels, group, +1) for group in grid.movable(levels, +1)]
        assert 0 <= room < min(steps)
        assert grid.levels(grid.assignment(levels)) == levels


def test_the_inverted_table_gives_the_most_damage_to_the_least_sensitive() -> None:
    table = {(group, fmt): value * factor for group, value in zip("abc", (1, 5, 3), strict=True)
             for fmt, factor in (("int2", 2.0), ("int4", 1.0))}  # fmt: skip
    mirrored = inverted(table)
    assert [mirrored[group, "int4"] for group in "abc"] == [5, 1, 3]
    assert mirrored.keys() == table.keys()


def test_relations_and_subjects_that_the_search_facts_hold_are_no_final_facts() -> None:
    facts = FactSet((Fact("capital", "{} is", "France", "Paris"),), "mine")
    lre = FactSet(
        (
            Fact("country capital city", "{} is", "Peru", "Lima"),  # asks what capital asks
            Fact("new", "{} is", "FRANCE", "x"),
            Fact("new", "{} is", "The Gambia", "y"),
        ),
        "theirs",
    )
    assert [fact.subject for fact in untouched(lre, facts).facts] == ["The Gambia"]


# ------------------------------------------------------------------------------- findings

RELATIONS = [f"r{number % 8}" for number in range(320)]
SUBJECTS = [f"s{number}" for number in range(320)]
RIVALS = ("uniform", "knapsack", "evopress-warm", OURS)


def made_up(means: dict[str, float], noise: float = 0.3) -> dict[tuple[str, str, int], Any]:
    """Losses at all sizes: what a fact shares among rivals, and what it does not."""
    generator = np.random.default_rng(0)
    shared = generator.normal(0, 1, 320)
    return {
        (size, rival, seed): mean + shared + noise * generator.normal(size=320)
        for size in SIZES
        for rival, mean in means.items()
        for seed in ([0] if rival == "uniform" else range(3))
    }


def curves(ours: list[tuple[int, float]]) -> list[dict[str, Any]]:
    theirs = [(100, 3.0), (5000, 1.0)]
    return [
        {"size": size, "rival": rival, "seed": seed, "points": points, "fact_tokens": 10_000}
        for size in SIZES
        for seed in range(3)
        for rival, points in ((OURS, ours), ("evopress-warm", theirs))
    ]


def found(means: dict[str, float], ours: list[tuple[int, float]], **changes: Any) -> dict[str, Any]:
    losses = {key: value for key, value in made_up(means).items()
              if key not in changes.get("without", ())}  # fmt: skip
    correct = {key: value < 1 for key, value in losses.items()}
    return findings(losses, correct, RELATIONS, SUBJECTS, curves(ours), SIZES, TIGHT, RIVALS)


def test_planted_truth_holds_and_its_opposite_fails() -> None:
    means = {"uniform": 3.0, "knapsack": 2.0, "evopress-warm": 1.2, OURS: 1.0}
    good = found(means, [(100, 3.0), (1000, 0.9)])
    assert [target["verdict"] for target in good["targets"]] == [HOLDS] * 4
    first = good["sizes"][0]
    assert (first["lowest"], first["best_predictor"]) == (OURS, "knapsack")
    against = {row["rival"]: row for row in first["against"]}
    assert against["uniform"]["percent_below"]["mean"] == pytest.approx(67, abs=3)
    assert against["knapsack"]["difference_nats"]["mean"] == pytest.approx(1, abs=0.1)
    assert (against["uniform"]["seeds"], against["knapsack"]["seeds"]) == (3, 3)
    more = against["uniform"]["recall_points"]  # a loss of 1 is the mean of ours
    assert more["low"] > 30 and against["uniform"]["recall_p_holm"] < 0.05

    bad = found({**means, "knapsack": 0.9, OURS: 1.1}, [(100, 3.0), (3000, 0.9)])
    assert [target["verdict"] for target in bad["targets"]] == [FAILS] * 4
    against = {row["rival"]: row for row in bad["sizes"][0]["against"]}
    assert against["knapsack"]["p_holm"] < 0.05
    assert against["knapsack"]["difference_nats"]["high"] < 0


def test_what_is_not_measured_leaves_a_target_open() -> None:
    means = {"uniform": 3.0, "knapsack": 2.0, "evopress-warm": 1.2, OURS: 1.0}
    without = [(SIZES[3], "evopress-warm", 2)]
    part = found(means, [(100, 3.0), (1000, 0.9)], without=without)
    assert {target["verdict"] for target in part["targets"]} == {OPEN}
    assert part["missing"] == [f"{SIZES[3]}: evopress-warm"]


def test_the_intervals_are_over_seeds_and_facts() -> None:
    """Of 200 made-up studies with spread between seeds, about 95 % cover the true difference."""
    generator = np.random.default_rng(1)
    covered, over_facts_alone = [], []
    comparison = Comparison({}, RELATIONS, SUBJECTS)
    for _ in range(200):
        spread = generator.normal(0, 0.1, (2, 3, 1))
        losses = spread + generator.normal(0, 1, (2, 3, 320)) + np.array([0.5, 0])[:, None, None]
        interval, _ = comparison.difference(*losses)
        covered.append(interval.low <= 0.5 <= interval.high)
        one, _ = comparison.difference(*losses.mean(1, keepdims=True))
        over_facts_alone.append(one.low <= 0.5 <= one.high)
    assert 0.92 < np.mean(covered) <= 1
    assert np.mean(over_facts_alone) < np.mean(covered)


def test_the_same_assignment_is_no_difference() -> None:
    losses = np.random.default_rng(0).normal(size=(1, 320))
    interval, p = Comparison({}, RELATIONS, SUBJECTS).difference(losses, losses)
    assert (interval.mean, interval.low, interval.high, p) == (0, 0, 0, 1)
    same = {(SIZES[0], name, 0): losses[0] for name in ("uniform", OURS)}
    right = {key: value < 0 for key, value in same.items()}
    (size,) = findings(same, right, RELATIONS, SUBJECTS, [], SIZES, TIGHT, RIVALS)["sizes"]
    assert size["lowest"] == OURS


def test_tokens_to_reach_by_hand() -> None:
    made = curves([(1000, 2.0), (1500, 1.0), (2000, 0.5)])
    assert tokens_to_reach(MIDWAY, made) == {
        "size": MIDWAY, "ratios": {"0": 0.15, "1": 0.15, "2": 0.15}, "median": 0.15
    }  # fmt: skip
    never = {"size": MIDWAY, "rival": OURS, "seed": 0, "points": [(9, 1.1)], "fact_tokens": 9}
    made = [c for c in made if (c["rival"], c["seed"]) != (OURS, 0)] + [never]
    assert tokens_to_reach(MIDWAY, made)["ratios"] == {"0": None, "1": 0.15, "2": 0.15}
    assert tokens_to_reach(MIDWAY, [never]) is None


def test_the_table_marks_the_lowest_and_what_differs() -> None:
    def row(rival: str, seed: int, loss: float) -> dict[str, Any]:
        cost = 200.0 if rival == OURS else 0.0
        return {"size": MIDWAY, "rival": rival, "seed": seed, "answer_loss": loss, "recall": 0.5,
                "evaluations": cost}  # fmt: skip

    rows = [row("uniform", 0, 3.0), row("knapsack", 0, 1.2), row(OURS, 0, 0.9), row(OURS, 1, 1.1)]
    against = [
        {"rival": "uniform", "p_holm": 0.01, "difference_nats": {"mean": 2.0}},
        {"rival": "knapsack", "p_holm": 0.2, "difference_nats": {"mean": 0.2}},
    ]
    lines = table(rows, [{"size": MIDWAY, "against": against}], {MIDWAY: 105_769_760})
    assert lines == [
        "| answer loss (nats) and recall (%) | midway, 105.8 MB | seeds | evaluations |",
        "|---|---|---|---|",
        "| mpsearch | **1.00** (50) | 2 | 200 |",
        "| knapsack | 1.20 (50) | 1 | 0 |",
        "| uniform | 3.00* (50) | 1 | 0 |",
    ]


# ------------------------------------------------------------------- the whole, on the tiny model


@pytest.fixture
def command(tiny_folder: Path, tmp_path: Path) -> list[str]:
    """All but the rivals; two relations are searched, the third is final, of other subjects."""
    lines = fact_lines()
    first = [line for line in lines if line["relation"] != "place"]
    second = [line for line in lines if line["relation"] == "place"]
    searched = [f"s{number}" for number in range(24)]
    (tmp_path / "facts.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in first
                if line.get("subject", searched[0]) in searched)
    )  # fmt: skip
    (tmp_path / "lre.jsonl").write_text("".join(json.dumps(line) + "\n" for line in second))
    return [
        "--model", str(tiny_folder), "--facts", str(tmp_path / "facts.jsonl"),
        "--lre", str(tmp_path / "lre.jsonl"), "--evaluations", "12", "--seeds", "0",
        "--search-facts", "20", "--runs", str(tmp_path / "runs"),
        "--out", str(tmp_path / "peers.json"), "--figure", str(tmp_path / "peers.png"),
    ]  # fmt: skip


def test_the_benchmark_runs_in_parts_and_says_what_it_found(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, left_as_found: None,
) -> None:  # fmt: skip
    monkeypatch.setattr("peers_facts._LEAST_FACTS", 5)
    monkeypatch.setattr("peers_facts.SEEN_FACTS", 3)
    asked = [*command, "--sizes", MIDWAY, "--rivals"]
    peers.main([*asked, "uniform", "knapsack", "evopress-warm", "--minutes", "0"])
    assert "the time is over" in capsys.readouterr().err
    peers.main([*asked, "uniform", "knapsack", "evopress-warm"])
    before = json.loads((tmp_path / "peers.json").read_text())
    peers.main([*asked, "uniform", OURS])
    out = capsys.readouterr().out
    result = json.loads((tmp_path / "peers.json").read_text())
    assert result["rows"][:3] == before["rows"]
    rows = {row["rival"]: row for row in result["rows"]}
    assert list(rows) == ["uniform", "knapsack", "evopress-warm", OURS]
    assert (
        max(row["stored_bytes"] for row in rows.values())
        <= (result["conditions"]["budgets_bytes"][MIDWAY])
    )
    assert rows["knapsack"]["evaluations"] == 0
    assert 30 < rows["evopress-warm"]["evaluations"] <= 36  # three times as many at the midpoint
    # Ours pays for 10 trials, its baselines and its validation facts.
    tokens = result["conditions"]["search_tokens"]
    assert rows[OURS]["fact_tokens"] > 15 * tokens
    assert result["conditions"]["lre_relations"] == ["place"]
    curve = {c["rival"]: c for c in result["curves"]}["evopress-warm"]
    losses = [loss for _, loss in curve["points"]]
    assert losses == sorted(losses, reverse=True)
    run = Run.open(tmp_path / "runs" / MIDWAY / f"{OURS}-0")
    fitting = [relation_mean(score.objective_per_fact, run.relations("search")).mean
               for score in run.scores() if score.partition == "search"
               and run.space.stored_bytes(score.assignment) <= run.budget_bytes]  # fmt: skip
    ours = {c["rival"]: c for c in result["curves"]}[OURS]
    assert [loss for _, loss in ours["points"]] == list(
        dict.fromkeys(np.minimum.accumulate(fitting))  # nothing over the budget counts
    )
    (against,) = result["findings"]["sizes"]
    assert against["answer_loss_nats"]["uniform"] == pytest.approx(rows["uniform"]["answer_loss"])
    assert [line.split(" | ")[0] for line in out.splitlines() if line.startswith("| uniform")]
    assert (tmp_path / "peers.png").stat().st_size > 1000


def test_a_row_is_not_mixed_with_those_of_another_question(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left_as_found: None
) -> None:
    monkeypatch.setattr("peers_facts._LEAST_FACTS", 5)
    monkeypatch.setattr("peers_facts.SEEN_FACTS", 3)
    peers.main([*command, "--sizes", MIDWAY, "--rivals", "uniform"])
    with pytest.raises(Exception, match="another 'evaluations'"):
        peers.main([*command, "--rivals", "uniform", "--evaluations", "13"])


def test_a_missing_environment_leaves_the_packages_out(
    bench: Bench, tiny_facts: FactSet, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "rival_environment", None)
    facts = tiny_facts.facts[:4]
    asked = peers.Asked(facts, facts, 4)
    compared = Peers(bench, tiny_facts, tiny_facts, asked, 1, tmp_path)
    assert compared.choice("auto-round", MIDWAY, 0) is None
    assert compared.choice("modelopt", MIDWAY, 0) is None
    assert capsys.readouterr().err.count("are left out") == 1
