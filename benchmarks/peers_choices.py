"""What each rival contributes at a size, and what that cost; see `peers.py` for the protocol."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
from optuna import Study
from peers_facts import Asked, Final, Referee, SearchFacts, tokens_of
from peers_findings import OURS, curve
from result_file import commit
from rival_searches import Grid, Levels, Loss, Trail, bayesian_or_genetic, evolutionary

import mpsearch as mps
from mpsearch.allocate import Damage, greedy, knapsack, uniform
from mpsearch.asked import asked_facts, balanced
from mpsearch.assignment import Assignment
from mpsearch.bank import Report, silent
from mpsearch.console import say
from mpsearch.errors import MpsearchError, RunError
from mpsearch.estimates import relation_mean
from mpsearch.evaluate import Bench
from mpsearch.facts import FactSet
from mpsearch.journal import assignment_of, open_study
from mpsearch.run import Run
from mpsearch.space import ResolvedSpace
from mpsearch.study import FINALISTS
from mpsearch.trials import SLOPES

MIDWAY = "midway"
SIZES = ("uniform 3-bit", MIDWAY, "uniform 4-bit", "uniform 4-bit + 25 %")
TIGHT = SIZES[:2]
PACKAGES = ("auto-round", "modelopt")
_SENSITIVITY_FACTS = 150  # as in a search
_MOST_TRIALS = 2  # for each evaluation: one that is stopped early costs less than one
_EVOLUTION_AT_MIDWAY = 3  # times the evaluations


@dataclass(frozen=True)
class Choice:
    """What a rival contributes and what it cost.

    Attributes:
        curve: see `peers_findings.curve`; empty without a search.
    """

    assignment: Assignment
    fact_tokens: int = 0
    seconds: float = 0.0
    curve: Sequence[tuple[int, float]] = ()


class _LastTrial(Exception):  # noqa: N818 - no fault
    """Our search has used up its tokens after so many trials."""

    def __init__(self, done: int):
        self.done = done


class Peers:
    """One comparison: what all rivals share, and the choice of each.

    Args:
        bench: of the bank that all share; it holds the reference weights now.
        facts, final: that the search facts and the final facts are of.
        evaluations: of each search.
        folder: of everything that is kept.
        check_time: called between evaluations; may raise `OutOfTime`.
        tell: progress of our search; may raise it too.
    """

    def __init__(
        self,
        bench: Bench,
        facts: FactSet,
        final: FactSet,
        asked: Asked,
        evaluations: int,
        folder: Path,
        check_time: Callable[[], None] = lambda: None,
        tell: Report = silent,
    ):
        self.bench, self.space, self.model = bench, bench.space, bench.bank.model
        self.facts, self.final, self.asked = facts, final, asked
        self.evaluations, self.folder = evaluations, folder
        self._check_time, self._tell = check_time, tell
        self.budgets = budgets(self.space)
        self._tables: dict[int, mps.Sensitivity] = {}
        self._packages: dict[int, Mapping[str, Mapping[str, Assignment]]] = {}
        self._referee = Referee(folder, bench, final, asked.final, self.grid(MIDWAY).code)

    @cached_property
    def search_facts(self) -> SearchFacts:
        self.bench.restore()
        return SearchFacts(self.bench, self.facts, self.asked.search)

    @property
    def _search_tokens(self) -> int:
        """Of an evaluation."""
        return tokens_of(self.model, self.facts, self.asked.search, contrast=False)

    @property
    def conditions(self) -> dict[str, Any]:
        """What all rows must have in common."""
        return {
            "model": self.model.name,
            "fingerprint": self.model.fingerprint,
            "dtype": str(self.model.dtype),
            "bank": self.bench.bank.settings,
            "formats": list(self.space.space.formats),
            "budgets_bytes": self.budgets,
            "evaluations": self.evaluations,
            "facts": self.facts.digest,
            "search_facts": len(self.asked.search),
            "search_tokens": self._search_tokens,
            "lre": self.final.digest,
            "lre_relations": list(dict.fromkeys(fact.relation for fact in self.asked.final)),
            "final_facts": len(self.asked.final),
            "asked": hashlib.sha256(repr(self.asked).encode()).hexdigest(),
        }

    def grid(self, size: str) -> Grid:
        return Grid(self.space, self.budgets[size])

    # ----------------------------------------------------------------------------- rows

    def row(self, size: str, rival: str, seed: int, choice: Choice) -> dict[str, Any]:
        """As JSON, scored on the final facts; `levels` is the assignment, a digit a group."""
        stored_bytes = self.space.stored_bytes(choice.assignment)
        if stored_bytes > self.budgets[size]:
            raise RunError(f"{rival} takes {stored_bytes:,} bytes at '{size}', over its budget")
        self._check_time()
        found = self._referee.score(choice.assignment)
        relations = [fact.relation for fact in self.asked.final]
        loss = relation_mean(found.loss_nats, relations)
        return {
            "size": size,
            "rival": rival,
            "seed": seed,
            "stored_bytes": stored_bytes,
            "answer_loss": loss.mean,
            "stderr": loss.stderr,
            "kl": found.text_kl_nats,
            "recall": relation_mean(found.correct, relations).mean,
            "evaluations": round(choice.fact_tokens / self._search_tokens, 2),
            "fact_tokens": choice.fact_tokens,
            "seconds": round(choice.seconds, 1),
            "levels": self.grid(size).code(choice.assignment),
            "commit": commit(),
            "device": self.model.device.type,
        }

    def finals(self, rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, int], Final]:
        """Of every row, measured again where the folder lacks it."""
        found = {}
        for row in rows:
            assignment = self.grid(row["size"]).assignment([int(digit) for digit in row["levels"]])
            key = row["size"], row["rival"], row["seed"]
            found[key] = self._referee.score(assignment)
        return found

    # -------------------------------------------------------------------------- choices

    def choice(self, rival: str, size: str, seed: int) -> Choice | None:
        """What a rival contributes; None, with a line, where it is not to be had.

        Raises:
            OutOfTime: what is done is kept, and the same call goes on from there.
        """
        if rival == OURS:
            return self._ours(size, seed)
        if rival in PACKAGES:
            return self._package(rival, size, seed)
        name, _, warm = rival.partition("-")
        if name in ("evopress", "nsga2", "tpe"):
            return self._search(name, size, seed, bool(warm))
        return Choice(self._simple(rival, size, seed))

    def _simple(self, name: str, size: str, seed: int) -> Assignment:
        """The allocations that ask no fact."""
        grid, budget_bytes = self.grid(size), self.budgets[size]
        if name == "uniform":
            return self._uniform(size)
        if name == "random":
            return grid.assignment(grid.filled(grid.smallest, np.random.default_rng([seed, 0])))
        table = self._table(seed)
        if name == "greedy":
            squared = {key: error**2 for key, error in table.weight_error.items()}
            return greedy(self.space, squared, budget_bytes)
        if name == "greedy-fisher":
            return greedy(self.space, table.fisher_nats, budget_bytes)
        damage = table.fisher_nats if name == "knapsack" else inverted(table.fisher_nats)
        return knapsack(self.space, damage, [budget_bytes])[0]

    def _uniform(self, size: str) -> Assignment:
        """The largest that fits."""
        sized = {a: self.space.stored_bytes(a) for a in uniform(self.space).values()}
        return max((a for a in sized if sized[a] <= self.budgets[size]), key=sized.__getitem__)

    def _table(self, seed: int) -> mps.Sensitivity:
        if seed not in self._tables:
            path = self.folder / f"sensitivity-{seed}.json"
            if not path.exists():
                self.bench.restore()
                some = tuple(balanced(self.asked.search, _SENSITIVITY_FACTS))
                mps.measure_sensitivity(
                    self.space, self.bench.bank, self.facts, some,
                    seed=seed, around=False, report=self._tell,
                ).save(path)  # fmt: skip
            self._tables[seed] = mps.Sensitivity.load(path)
        return self._tables[seed]

    def _package(self, package: str, size: str, seed: int) -> Choice | None:
        """A real package's, if its environment can be had."""
        if seed not in self._packages:
            self._packages[seed] = {}
            self.bench.restore()
            try:
                from rival_environment import RESULTS, package_assignments

                self._packages[seed] = package_assignments(
                    self.space, self.model, self.budgets, seed, RESULTS
                )
            except (ImportError, MpsearchError) as error:
                say(f"{' and '.join(PACKAGES)} are left out: {error}")
        found = self._packages[seed].get(package, {}).get(size)
        return None if found is None else Choice(found)

    def _search(self, name: str, size: str, seed: int, warm: bool) -> Choice:
        """A rival's search, as far as its trail has got and then on."""
        grid, facts = self.grid(size), self.search_facts
        times = _EVOLUTION_AT_MIDWAY if name == "evopress" and size == MIDWAY else 1
        evaluations = times * self.evaluations
        path = self._place(size, f"{name}{'-warm' if warm else ''}-{seed}.jsonl")
        trail = Trail(path, grid, facts, evaluations, self._check_time)
        starts: list[Levels] = []
        if warm:
            simple = (self._simple("knapsack", size, seed), self._uniform(size))
            starts = [grid.levels(assignment) for assignment in simple]

        def search(loss: Loss) -> None:
            if name == "evopress":
                start = starts[0] if warm else None
                evolutionary(grid, loss, facts.relations, seed, start)
            else:
                bayesian_or_genetic(name, grid, loss, seed, starts, evaluations)

        trail.follow(search)
        full = [(line["fact_tokens"], line["loss"]) for line in trail.lines
                if line["facts"] == len(facts) and line["loss"] is not None]  # fmt: skip
        best = grid.assignment(trail.best())
        return Choice(best, trail.fact_tokens, trail.seconds, curve(full))

    def _ours(self, size: str, seed: int) -> Choice:
        folder, budget_bytes = self._place(size, f"{OURS}-{seed}"), self.budgets[size]
        folder.parent.mkdir(parents=True, exist_ok=True)
        self.bench.restore()

        def search(trials: int, tell: Report) -> Run:
            return mps.search(
                self.model,
                self.space,
                budget=budget_bytes,
                out=folder,
                trials=trials,
                seed=seed,
                quantizer=self.bench.bank.quantizer.name,
                search_facts=self.asked.most,
                facts=self.facts,
                resume=folder.exists(),
                report=tell,
            )

        def until_spent(stage: str, done: int, total: int) -> None:
            self._tell(stage, done, total)
            if stage.startswith("search") and done < total and self._is_spent(Run.open(folder)):
                raise _LastTrial(done)

        try:
            run = search(_MOST_TRIALS * self.evaluations, until_spent)
        except _LastTrial as last:
            run = search(last.done, self._tell)
        if asked_facts(run, self.facts, "search") != self.asked.search:
            raise RunError(f"'{folder}' asks other search facts than the rivals; remove it")
        spent = fact_tokens(run, self.space, self.model, self.facts)
        fitting = [(tokens, loss) for tokens, loss, size in spent if size <= budget_bytes]
        seconds = sum(score.seconds for score in run.scores() if score.partition != "test")
        best = run.front().best(budget_bytes).assignment
        return Choice(best, spent[-1][0], seconds, curve(fitting[:-1]))

    def _is_spent(self, run: Run) -> bool:
        """Whether another proposal of ours could leave too little for the validation facts."""
        slopes = _slopes(open_study(run, self.space))
        facts = asked_facts(run, self.facts, "validation")
        ahead = (
            self._search_tokens
            + max((held["fact_tokens"] for held in slopes), default=0)
            + 2 * FINALISTS * tokens_of(self.model, self.facts, facts, contrast=True)
        )
        spent, _, _ = fact_tokens(run, self.space, self.model, self.facts)[-1]
        return spent + ahead > self.evaluations * self._search_tokens

    def _place(self, size: str, name: str) -> Path:
        return self.folder / size.replace(" %", "").replace(" ", "-") / name


def fact_tokens(
    run: Run, space: ResolvedSpace, model: mps.Model, facts: FactSet
) -> list[tuple[int, float, int]]:
    """What a run had spent after each trial: unique tokens of facts, what it lowers, its size.

    Slopes are part of the next trial. The last entry, of no loss, adds the validation facts, by
    which the point is chosen; test facts choose nothing and are left out.
    """
    study = open_study(run, space)
    slopes = _slopes(study)
    spent, total, finished = [], 0, 0
    for trial in study.get_trials(deepcopy=False):
        if "fact_tokens" not in trial.user_attrs:
            continue
        total += sum(held["fact_tokens"] for held in slopes if held["after"] == finished)
        total += trial.user_attrs["fact_tokens"]
        finished += 1
        assignment = assignment_of(trial.params, space)
        loss = trial.values[0] if trial.values else inf
        spent.append((total, loss, space.stored_bytes(assignment)))
    asked = asked_facts(run, facts, "validation")
    scores = sum(score.partition == "validation" for score in run.scores())
    return [*spent, (total + scores * tokens_of(model, facts, asked, contrast=True), inf, 0)]


def _slopes(study: Study) -> list[dict[str, Any]]:
    return [held for name, held in study.user_attrs.items() if name.startswith(SLOPES)]


def budgets(space: ResolvedSpace) -> dict[str, int]:
    """Stored bytes of each size."""
    sized = {name: space.stored_bytes(a) for name, a in uniform(space).items()}
    low, high = sized["int3-g64"], sized["int4-g64"]
    more = space.kept_bytes + (high - space.kept_bytes) * 5 // 4
    return dict(zip(SIZES, (low, (low + high) // 2, high, more), strict=True))


def inverted(damage: Damage) -> dict[tuple[str, str], float]:
    """The table with groups exchanged: the one that suffers most for the one that does least.

    Groups are ranked by their mean damage; all must have the same formats.
    """
    rows: dict[str, dict[str, float]] = {}
    for (group, fmt), value in damage.items():
        rows.setdefault(group, {})[fmt] = value
    ranked = sorted(rows, key=lambda group: sum(rows[group].values()) / len(rows[group]))
    mirrored = zip(ranked, reversed(ranked), strict=True)
    return {(group, fmt): value for group, other in mirrored for fmt, value in rows[other].items()}
