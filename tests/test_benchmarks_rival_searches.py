"""Searches after others' algorithms: they keep the budget, count tokens and resume exactly."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from peers_choices import MIDWAY, budgets
from peers_facts import SearchFacts
from rival_searches import (
    Grid,
    Levels,
    OutOfTime,
    Trail,
    _draw_facts,
    bayesian_or_genetic,
    evolutionary,
)

from mpsearch.assignment import Assignment
from mpsearch.errors import RunError
from mpsearch.evaluate import Bench
from mpsearch.facts import FactSet
from mpsearch.formats import FORMATS
from mpsearch.space import ResolvedSpace

EVALUATIONS = 30


@pytest.fixture
def search_facts(tiny_bench: Bench, tiny_facts: FactSet) -> SearchFacts:
    facts = [f for name in tiny_facts.relations for f in tiny_facts.part("search", {name})]
    return SearchFacts(tiny_bench, tiny_facts, facts)


@pytest.fixture
def grid(tiny_space: ResolvedSpace) -> Grid:
    return Grid(tiny_space, budgets(tiny_space)[MIDWAY])


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
