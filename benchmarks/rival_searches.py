"""The searches that rivals run: evolution after EvoPress, and Optuna's NSGA-II and TPE.

A search is a function that proposes levels, is told losses, and goes on until a `Trail` stops it.
It is a pure function of its seed and of what it is told. So a trail that keeps every measurement
resumes any search exactly: the search runs again and is told what it was told before.

Sources: EvoPress (arXiv:2410.14649) and its published code for quantization, github.com/IST-DASLab;
optuna.org.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from peers_facts import SearchFacts, whole_lines

from mpsearch.assignment import Assignment
from mpsearch.errors import RunError
from mpsearch.space import ResolvedSpace
from mpsearch.trials import distributions

Levels = tuple[int, ...]  # of each group, 0 for its smallest format
Some = tuple[int, ...] | None  # numbers of facts, None for all
Loss = Callable[[Levels, Some], float]

_OFFSPRING = 128
# How many survive a stage, and the share of the facts that it asks.
_STAGES = ((16, 1 / 64), (4, 1 / 8), (1, 1.0))
_INITIAL = (16, 1 / 8)  # random starts where no uniform assignment has the size, and their facts
_MOST_CHANGES = 10  # of levels in a child
_LEAST_GIVEN = 0.8  # of the bytes that a child gives up must be spent
_TRIES = 2000
_POPULATION = 20  # Optuna's first trials
_PROPOSALS = 8  # for each evaluation, repeats included, which cost nothing


class OutOfTime(Exception):  # noqa: N818 - no fault
    """The time that the user gave is over; what is done is kept."""


class Spent(Exception):  # noqa: N818 - no fault
    """A search has used up its tokens."""


class Grid:
    """Assignments of a space as levels, and moves that keep a budget of stored bytes."""

    def __init__(self, space: ResolvedSpace, budget_bytes: int):
        self.space, self.budget_bytes = space, budget_bytes
        self._names = [group.name for group in space.groups]
        self.formats = [[fmt.name for fmt in space.options[name]] for name in self._names]
        self._bytes = [
            [fmt.stored_bytes(group) for fmt in space.options[group.name]] for group in space.groups
        ]

    @property
    def smallest(self) -> Levels:
        return (0,) * len(self._names)

    def assignment(self, levels: Sequence[int]) -> Assignment:
        chosen = zip(self._names, self.formats, levels, strict=True)
        return Assignment.of({name: formats[level] for name, formats, level in chosen})

    def levels(self, assignment: Assignment) -> Levels:
        named = zip(self._names, self.formats, strict=True)
        return tuple(formats.index(assignment[name]) for name, formats in named)

    def code(self, assignment: Assignment) -> str:
        """A digit a group."""
        return "".join(map(str, self.levels(assignment)))

    def size(self, levels: Sequence[int]) -> int:
        sizes = zip(self._bytes, levels, strict=True)
        return self.space.kept_bytes + sum(of_group[level] for of_group, level in sizes)

    def movable(self, levels: Sequence[int], direction: int) -> list[int]:
        """Groups that have a level above (+1) or below (-1)."""
        tops = (len(formats) - 1 for formats in self.formats)
        return [
            group
            for group, (level, top) in enumerate(zip(levels, tops, strict=True))
            if 0 <= level + direction <= top
        ]

    def step_bytes(self, levels: Sequence[int], group: int, direction: int) -> int:
        """What moving a group by a level changes."""
        sizes = self._bytes[group]
        return sizes[levels[group] + direction] - sizes[levels[group]]

    def filled(self, levels: Levels, rng: np.random.Generator) -> Levels:
        """Random groups raised by a level, one after another, until nothing more fits."""
        found, room = list(levels), self.budget_bytes - self.size(levels)
        while fitting := [
            group for group in self.movable(found, +1) if self.step_bytes(found, group, +1) <= room
        ]:
            group = int(rng.choice(fitting))
            room -= self.step_bytes(found, group, +1)
            found[group] += 1
        return tuple(found)

    def lowered(self, levels: Levels, rng: np.random.Generator) -> Levels:
        """Random groups lowered by a level, one after another, until it fits."""
        found = list(levels)
        while self.size(found) > self.budget_bytes:
            found[int(rng.choice(self.movable(found, -1)))] -= 1
        return tuple(found)


class Trail:
    """Every measurement of one search, in a file, from which it goes on.

    Args:
        path: a line a measurement: `levels`, how many `facts`, `fact_tokens` so far, `loss` in
            nats (null for infinite), `seconds`.
        evaluations: the tokens that may be spent, in units of asking all facts.
        check_time: called before each measurement; raises `OutOfTime`.
    """

    def __init__(
        self,
        path: Path,
        grid: Grid,
        facts: SearchFacts,
        evaluations: int,
        check_time: Callable[[], None] = lambda: None,
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.lines = whole_lines(path)
        self._path, self._grid, self._facts, self._check_time = path, grid, facts, check_time
        self._limit = evaluations * facts.tokens
        self._replayed = 0
        self._full: dict[Levels, float] = {}

    @property
    def fact_tokens(self) -> int:
        return int(self.lines[self._replayed - 1]["fact_tokens"]) if self._replayed else 0

    @property
    def seconds(self) -> float:
        return float(sum(line["seconds"] for line in self.lines))

    def follow(self, search: Callable[[Loss], None]) -> None:
        """Run a search until it ends or its tokens are spent."""
        try:
            search(self.loss)
        except Spent:
            return

    def loss(self, levels: Levels, some: Some) -> float:
        """Measure, or read what was measured; the same levels on all facts cost nothing again.

        Raises:
            Spent: it would cost more tokens than are left.
            RunError: the file is another search's.
        """
        if some is None and levels in self._full:
            return self._full[levels]
        cost, before = self._facts.cost(some), self.fact_tokens
        if before + cost > self._limit:
            raise Spent
        code = "".join(map(str, levels))
        asked = {"levels": code, "facts": len(self._facts if some is None else some),
                 "fact_tokens": before + cost}  # fmt: skip
        if self._replayed == len(self.lines):
            self._check_time()
            start = time.perf_counter()
            loss = self._facts.loss(self._grid.assignment(levels), some)
            seconds = round(time.perf_counter() - start, 3)
            measured = {**asked, "loss": loss if np.isfinite(loss) else None, "seconds": seconds}
            with open(self._path, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(measured) + "\n")
            self.lines.append(measured)
        line: dict[str, Any] = self.lines[self._replayed]
        if {key: line[key] for key in asked} != asked:
            raise RunError(
                f"'{self._path}', line {self._replayed + 1}: another search wrote it; use another "
                "--runs, or remove it"
            )
        self._replayed += 1
        found = float("inf") if line["loss"] is None else float(line["loss"])
        if some is None:
            self._full[levels] = found
        return found

    def best(self) -> Levels:
        """The lowest loss on all facts, and of equals the smallest."""
        if not self._full:
            raise RunError(f"'{self._path}' holds no measurement on all facts; give more tokens")
        return min(self._full, key=lambda levels: (self._full[levels], self._grid.size(levels)))


def evolutionary(
    grid: Grid, loss: Loss, relations: Sequence[str], seed: int, start: Levels | None
) -> None:
    """(1 + lambda) evolution by level switches, with stages of selection on growing data.

    As in its code, among groups of any size: a child raises one to three random groups (the smaller
    of two draws) by a level, then lowers random groups until it fits; one that changes too much or
    gives up too many bytes is drawn again. All children of a stage are asked the same facts, drawn
    anew each time; in the last stage the parent is among them. Without a start: the uniform
    assignment of just that size, else the best of some that begin at the next larger uniform and
    are lowered at random.

    128 children, of which 16, 4 and 1 survive, and the shares of facts 1/64, 1/8 and 1 are the
    published ones, so a generation takes about ten evaluations: 200 are 20 generations, where 150
    of longer text are published. The last stage asks all facts, so the parent's loss is known and
    costs nothing. Facts are drawn relation by relation, as solved examples are shared within one.
    What it minimises is what all searches here do; published is KL on text.

    Args:
        relations: of each fact.
    """
    rng = np.random.default_rng([seed, 1])
    parent = start
    if parent is None:
        parent = _uniform_start(grid)
    if parent is None:
        many, share = _INITIAL
        ceiling = tuple(_next_uniform(grid))
        starts = [grid.lowered(ceiling, rng) for _ in range(many)]
        some = _draw_facts(relations, share, rng)
        parent = min(starts, key=lambda levels: loss(levels, some))
    best = loss(parent, None)
    while children := _children(grid, parent, rng):
        for survivors, share in _STAGES[:-1]:
            some = _draw_facts(relations, share, rng)
            losses = {child: loss(child, some) for child in children}
            children = sorted(children, key=losses.__getitem__)[:survivors]
        for child in children:
            if (found := loss(child, None)) < best:
                parent, best = child, found


def _uniform_start(grid: Grid) -> Levels | None:
    """The levels that are the same everywhere and fill the budget exactly."""
    depth = max(len(formats) for formats in grid.formats)
    for level in range(depth):
        same = tuple(min(level, len(formats) - 1) for formats in grid.formats)
        if grid.size(same) == grid.budget_bytes:
            return same
    return None


def _next_uniform(grid: Grid) -> Levels:
    """The smallest that does not fit, or else the largest there is."""
    depth = max(len(formats) for formats in grid.formats)
    same = grid.smallest
    for level in range(depth):
        same = tuple(min(level, len(formats) - 1) for formats in grid.formats)
        if grid.size(same) > grid.budget_bytes:
            return same
    return same


def _children(grid: Grid, parent: Levels, rng: np.random.Generator) -> list[Levels]:
    """Distinct children within the budget; fewer where the space has no more."""
    found: dict[Levels, None] = {}
    for _ in range(_TRIES):
        child = _child(grid, parent, rng)
        if child is not None and child != parent:
            found[child] = None
        if len(found) == _OFFSPRING:
            break
    return list(found)


def _child(grid: Grid, parent: Levels, rng: np.random.Generator) -> Levels | None:
    levels = list(parent)
    raises = int(min(rng.integers(1, 4, size=2)))
    added = given = 0
    for _ in range(raises):
        if not (higher := grid.movable(levels, +1)):
            return None
        group = int(rng.choice(higher))
        added += grid.step_bytes(levels, group, +1)
        levels[group] += 1
    size, changes = grid.size(levels), raises
    while size > grid.budget_bytes:
        if changes == _MOST_CHANGES or not (lower := grid.movable(levels, -1)):
            return None
        group = int(rng.choice(lower))
        step = grid.step_bytes(levels, group, -1)
        levels[group] -= 1
        size, given, changes = size + step, given - step, changes + 1
    return None if added < _LEAST_GIVEN * given else tuple(levels)


def _draw_facts(relations: Sequence[str], share: float, rng: np.random.Generator) -> Some:
    """A share of the facts: random ones of one random relation, then of the next, until full."""
    of: dict[str, list[int]] = {}
    for number in map(int, rng.permutation(len(relations))):
        of.setdefault(relations[number], []).append(number)
    order = [list(of)[place] for place in rng.permutation(len(of))]
    count = max(1, round(share * len(relations)))
    return tuple(sorted([number for relation in order for number in of[relation]][:count]))


def bayesian_or_genetic(
    name: str, grid: Grid, loss: Loss, seed: int, starts: Sequence[Levels], evaluations: int
) -> None:
    """Optuna's `nsga2` or `tpe`: the least loss at one budget, which favours both over a front.

    A proposal that is too large stands for one that fits: its random groups are lowered until it
    does, others raised to fill the budget, always the same for the same proposal. The first trials
    are the starts and children of the first one, by the moves of `evolutionary`; without a start,
    random assignments that fill the budget.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler: optuna.samplers.BaseSampler
    if name == "nsga2":
        sampler = optuna.samplers.NSGAIISampler(population_size=_POPULATION, seed=seed)
    else:
        sampler = optuna.samplers.TPESampler(n_startup_trials=_POPULATION, seed=seed)
    study = optuna.create_study(direction="minimize", sampler=sampler)
    rng = np.random.default_rng([seed, 2])
    first = [*starts, *(_children(grid, starts[0], rng) if starts else ())][:_POPULATION]
    first += [grid.filled(grid.smallest, rng) for _ in range(_POPULATION - len(first))]
    for levels in first:
        study.enqueue_trial(dict(grid.assignment(levels)))
    choices = distributions(grid.space)
    for _ in range(_PROPOSALS * evaluations):
        trial = study.ask(choices)
        params: dict[str, Any] = trial.params
        levels = grid.levels(Assignment.of(params))
        if grid.size(levels) > grid.budget_bytes:
            of_these = np.random.default_rng([seed, 3, *levels])
            levels = grid.filled(grid.lowered(levels, of_these), of_these)
        study.tell(trial, loss(levels, None))
