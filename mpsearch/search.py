"""The main job: sensitivity, baselines, then an ask/tell loop over an Optuna study.

Which facts see what: solved examples come from the demonstration facts; candidates are proposed
and ranked on search facts; baselines and finalists are scored on validation facts, where the pick
is made; test facts are read once, for the pick, its rival and the reference.
"""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import TrialState

from mpsearch.allocate import greedy, knapsack, uniform
from mpsearch.assignment import Assignment
from mpsearch.bank import Bank, Report, silent
from mpsearch.budget import check_reachable, format_size, parse_size
from mpsearch.calibration import Calibration
from mpsearch.device import require_disk, require_memory
from mpsearch.errors import CheckError, UsageError
from mpsearch.estimates import relation_mean
from mpsearch.evaluate import Bench, all_layers
from mpsearch.facts import Fact, FactSet
from mpsearch.front import pareto_front
from mpsearch.models import Model
from mpsearch.quantizers import get_quantizer
from mpsearch.recall import SHOTS, RecallProxy, known_relations
from mpsearch.run import Run, Score
from mpsearch.samplers import distributions, make_sampler
from mpsearch.sensitivity import Sensitivity, measure_sensitivity
from mpsearch.space import ResolvedSpace, SearchSpace

log = logging.getLogger(__name__)

TRIALS = 150
FACTS = {"search": 300, "validation": 200, "test": 500}
_FINALISTS = 4
_SPREAD = (0.2, 0.4, 0.6, 0.8)  # of the feasible range, for the knapsack's further first points


@dataclass(frozen=True)
class Wish:
    """What a search is asked for, beside the model and the space.

    Attributes:
        budget: stored bytes allowed, as a number or as text such as `96 MiB`.
        trials: proposals after the baselines.
        seconds: stop proposing after this time, even if trials are left; None for no limit.
        quantizer: None for the target's default.
        search_facts: at most this many facts score each candidate.
    """

    budget: str | int
    trials: int = TRIALS
    seconds: float | None = None
    seed: int = 0
    sampler: str = "level-switch"
    quantizer: str | None = None
    search_facts: int = FACTS["search"]

    @property
    def budget_bytes(self) -> int:
        return parse_size(self.budget) if isinstance(self.budget, str) else self.budget


def search(
    model: Model,
    space: ResolvedSpace | SearchSpace,
    *,
    budget: str | int,
    out: str | Path,
    trials: int = TRIALS,
    seconds: float | None = None,
    seed: int = 0,
    sampler: str = "level-switch",
    quantizer: str | None = None,
    search_facts: int = FACTS["search"],
    facts: FactSet | None = None,
    resume: bool = False,
    report: Report = silent,
) -> Run:
    """Search bit-width assignments under a budget of stored bytes; see `Wish` for the arguments.

    Args:
        out: the run folder; must not exist unless `resume`.
        facts: the built-in ones by default.
        resume: continue the run in `out`, which must have been asked the same question.
        report: called with (stage, done, total).
    Returns:
        The finished run.
    Raises:
        InfeasibleError: the budget is below the smallest assignment.
        RunError: `out` exists, or answers another question.
        CheckError: NaN, or a reference that knows nothing.
        ResourceError: memory or disk; what is finished is kept.
        KeyboardInterrupt: all finished trials are kept; resume goes on from there.
    """
    wish = Wish(budget, trials, seconds, seed, sampler, quantizer, search_facts)
    if isinstance(space, SearchSpace):
        space = space.resolve(model)
    return _Search(model, space, wish, facts or FactSet.builtin(), report).run(Path(out), resume)


class _Search:
    """One call of `search`: the steps in order, each reading what earlier ones froze in the run."""

    def __init__(
        self, model: Model, space: ResolvedSpace, wish: Wish, facts: FactSet, report: Report
    ):
        check_wish(space, wish)
        self.model, self.space, self.wish, self.facts, self.report = (
            model, space, wish, facts, report,
        )  # fmt: skip
        quantizer = get_quantizer(wish.quantizer, space.target.name)
        self.bank = Bank(model, quantizer, Calibration(seed=wish.seed))

    @property
    def question(self) -> dict[str, Any]:
        return {
            "model": self.model.name,
            "fingerprint": self.model.fingerprint,
            "target": self.space.target.name,
            "formats": {
                group: [fmt.name for fmt in formats] for group, formats in self.space.options.items()
            },
            "facts": self.facts.digest,
            "search_facts": self.wish.search_facts,
            "shots": SHOTS,
            "budget_bytes": self.wish.budget_bytes,
            "seed": self.wish.seed,
            "sampler": self.wish.sampler,
            "bank": self.bank.settings,
            "dtype": str(self.model.dtype),
        }

    def run(self, out: Path, resume: bool) -> Run:
        if resume:
            run = Run.open(out)
            run.check_question(self.question)
        else:
            self._check_resources(out)
            run = Run.create(out, self.question, self.space)
        with run.locked():
            run.mend()
            run.content["finished"] = False
            run.save()
            self.bank.build(all_layers(self.space), self.report)
            self._freeze_facts(run)
            damage = self._sensitivity(run).fisher_nats
            with Bench(self.space, self.bank) as bench:
                work = _Work(self, run, bench)
                work.baselines(damage)
                work.loop(damage)
                work.finalists()
                work.test()
            run.content["finished"] = True
            run.save()
        return run

    def _check_resources(self, out: Path) -> None:
        weights = sum(group.weights for group in self.space.groups)
        # Originals are loaded already; decoded candidates and gradients come on top.
        require_memory(6 * weights + 1_000_000_000, self.model.device, "the search")
        require_disk(50_000_000, out, "the run folder")

    def _freeze_facts(self, run: Run) -> None:
        """Decide on search facts which relations and facts count as known, once."""
        if "asked" in run.content:
            return
        self.report("asking the reference", 0, 1)
        relations, known = known_facts(self.model, self.facts, self.wish.search_facts)
        asked = {"search": known}
        for partition in ("validation", "test"):
            asked[partition] = _balanced(self.facts.part(partition, relations), FACTS[partition])
            if len(asked[partition]) < 2:
                raise UsageError(
                    f"facts '{self.facts.source}': {len(asked[partition])} of the known relations' "
                    f"facts fall into the {partition} partition, at least 2 are needed; add facts"
                )
        run.content["asked"] = {name: [f.relation for f in facts] for name, facts in asked.items()}
        run.content["subjects"] = {
            name: [fact.subject for fact in facts] for name, facts in asked.items()
        }
        unknown = [name for name in self.facts.relations if name not in relations]
        run.content["unknown_relations"] = unknown
        run.save()
        self.report("asking the reference", 1, 1)

    def asked(self, run: Run, partition: str) -> tuple[Fact, ...]:
        by_key = {(fact.relation, fact.subject): fact for fact in self.facts.facts}
        keys = zip(run.relations(partition), run.content["subjects"][partition], strict=True)
        return tuple(by_key[key] for key in keys)

    def _sensitivity(self, run: Run) -> Sensitivity:
        path = run.folder / "sensitivity.json"
        if path.exists():
            return Sensitivity.from_json(json.loads(path.read_text(encoding="utf-8")))
        table = measure_sensitivity(
            self.space,
            self.bank,
            self.facts,
            self.asked(run, "search"),
            seed=self.wish.seed,
            report=self.report,
        )
        table.save(path)
        return table


def known_facts(
    model: Model, facts: FactSet, most: int
) -> tuple[tuple[str, ...], list[Fact]]:
    """Relations that the reference knows, and at most `most` search facts that it gets right.

    Raises:
        CheckError: it knows no relation.
        UsageError: no fact falls into the search partition.
    """
    candidates = _balanced(facts.part("search"), most * 3 // 2)
    if not candidates:
        raise UsageError(f"facts '{facts.source}': none is in the search partition; add facts")
    gate = RecallProxy(model, facts, candidates, contrast=True)
    relations = known_relations(gate)
    correct = gate.reference.correct
    right = [] if correct is None else [f for f, ok in zip(gate.facts, correct, strict=True) if ok]
    return relations, _balanced([f for f in right if f.relation in relations], most)


def sensitivity_of(
    model: Model,
    space: ResolvedSpace,
    facts: FactSet,
    quantizer: str | None,
    seed: int,
    report: Report = silent,
) -> Sensitivity:
    """The damage table on its own: builds the bank, asks the reference, measures."""
    bank = Bank(model, get_quantizer(quantizer, space.target.name), Calibration(seed=seed))
    bank.build(all_layers(space), report)
    known = known_facts(model, facts, FACTS["search"])[1]
    return measure_sensitivity(space, bank, facts, tuple(known), seed=seed, report=report)


def check_wish(space: ResolvedSpace, wish: Wish) -> None:
    """Refuse in an instant what cannot be done.

    Raises:
        InfeasibleError: a budget below the smallest assignment.
        UsageError: a number that makes no sense.
    """
    if wish.trials < 0 or wish.search_facts < 2:
        raise UsageError(
            f"trials {wish.trials} and search facts {wish.search_facts}: at least 0 and 2 are needed"
        )
    smallest, largest = space.stored_bytes(space.smallest), space.stored_bytes(space.largest)
    kept = format_size(space.kept_bytes)
    check_reachable(
        wish.budget_bytes,
        smallest,
        largest,
        f"{kept} of it are weights that are never quantized here; raise the budget to at least "
        f"{smallest / 2**20 + 0.01:.2f}MiB or allow smaller formats",
    )
    if wish.budget_bytes >= largest:
        log.warning(
            "budget %s holds even the largest formats of this space (%s): nothing needs to be "
            "given up; searching anyway",
            format_size(wish.budget_bytes),
            format_size(largest),
        )


class _Work:
    """The evaluations of one search: a study, proxies built when first needed, and a cache."""

    def __init__(self, search: _Search, run: Run, bench: Bench):
        self.search, self.run, self.bench = search, run, bench
        self._proxies: dict[str, RecallProxy] = {}
        self._cache = {(s.partition, s.assignment): s for s in run.scores()}
        storage = JournalStorage(JournalFileBackend(str(run.journal)))
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.study: Study = optuna.create_study(
            study_name="mpsearch",
            storage=storage,
            directions=["minimize", "minimize"],
            load_if_exists=True,
        )
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self.study.tell(trial.number, state=TrialState.FAIL)  # a killed process left it

    def score(self, assignment: Assignment, kind: str, partition: str) -> Score:
        """An evaluation, from the cache where it has been made before."""
        if (found := self._cache.get((partition, assignment))) is not None:
            return found
        evaluation = self._evaluate(assignment, partition)
        score = Score(
            assignment,
            kind,
            partition,
            tuple(float(loss) for loss in evaluation.loss_per_fact),
            evaluation.kl.mean,
            evaluation.top1.mean,
            None
            if evaluation.scores.correct is None
            else tuple(bool(right) for right in evaluation.scores.correct),
            evaluation.seconds,
        )
        self.run.add(score)
        self._cache[partition, assignment] = score
        return score

    def _evaluate(self, assignment: Assignment, partition: str) -> Any:
        if partition not in self._proxies:
            self.bench.restore()
            self._proxies[partition] = RecallProxy(
                self.search.model,
                self.search.facts,
                self.search.asked(self.run, partition),
                contrast=partition != "search",
            )
        return self.bench.evaluate(assignment, self._proxies[partition])

    def trial(self, kind: str, fixed: Assignment | None = None) -> None:
        """One trial of the study, proposed by its sampler unless fixed."""
        if fixed is not None:
            self.study.enqueue_trial(dict(fixed))
        trial = self.study.ask(distributions(self.search.space))
        assignment = Assignment.of({name: trial.params[name] for name in self.search.space.options})
        stored_bytes = self.search.space.stored_bytes(assignment)
        trial.set_user_attr("kind", kind)
        trial.set_user_attr("stored_bytes", stored_bytes)
        try:
            score = self.score(assignment, kind, "search")
        except CheckError as error:
            trial.set_user_attr("refused", str(error))
            self.study.tell(trial, state=TrialState.FAIL)
            log.warning("assignment %s is refused: %s", assignment.id, error)
            return
        relations = self.run.relations("search")
        loss = _mean_over_relations(score.loss_per_fact, relations)
        self.study.tell(trial, [loss, float(stored_bytes)])

    def baselines(self, damage: dict[tuple[str, str], float]) -> None:
        """Every simple allocation: scored on search facts for the study, on validation facts for
        the table. A few more knapsack points at other sizes give the search a front to start from.
        """
        space, budget = self.search.space, self.search.wish.budget_bytes
        floor = space.stored_bytes(space.smallest)
        ceiling = space.stored_bytes(space.largest)
        chosen = [("uniform", assignment) for assignment in uniform(space).values()]
        chosen.append(("greedy", greedy(space, damage, budget)))
        sizes = [budget, *(int(floor + (ceiling - floor) * part) for part in _SPREAD)]
        chosen += [("knapsack", assignment) for assignment in knapsack(space, damage, sizes)]
        distinct = list({assignment: kind for kind, assignment in reversed(chosen)}.items())[::-1]
        told = self._told()
        for index, (assignment, kind) in enumerate(distinct):
            self.search.report("baselines", index, len(distinct))
            if assignment not in told:
                self.trial(kind, assignment)
        for index, (assignment, kind) in enumerate(distinct):
            self.search.report("baselines on validation facts", index, len(distinct))
            self._score_or_warn(assignment, kind, "validation")
        self.search.report("baselines on validation facts", len(distinct), len(distinct))

    def _told(self) -> set[Assignment]:
        names = self.search.space.options
        return {
            Assignment.of({name: trial.params[name] for name in names})
            for trial in self.study.get_trials(deepcopy=False)
            if trial.state == TrialState.COMPLETE or "refused" in trial.user_attrs
        }

    def _score_or_warn(self, assignment: Assignment, kind: str, partition: str) -> None:
        try:
            self.score(assignment, kind, partition)
        except CheckError as error:
            log.warning("%s assignment %s is left out: %s", kind, assignment.id, error)

    def loop(self, damage: dict[tuple[str, str], float]) -> None:
        """Propose until the trials or the time are used up."""
        wish = self.search.wish
        done = self._proposals()
        # Optuna's own samplers are seeded anew, as they would repeat their first proposals.
        ours = wish.sampler == "level-switch"
        seed = wish.seed if ours else wish.seed + done
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self.study.sampler = make_sampler(
                wish.sampler, self.search.space, damage, wish.budget_bytes, seed
            )
        start = time.monotonic()
        while done < wish.trials:
            if wish.seconds is not None and time.monotonic() - start >= wish.seconds:
                break
            self.search.report(f"search, best {self._best()}", done, wish.trials)
            self.trial("search")
            done += 1
        self.search.report(f"search, best {self._best()}", done, done)

    def _proposals(self) -> int:
        return sum(
            trial.user_attrs.get("kind") == "search"
            and (trial.state == TrialState.COMPLETE or "refused" in trial.user_attrs)
            for trial in self.study.get_trials(deepcopy=False)
        )

    def _ranked(self) -> list[tuple[float, float, Assignment]]:
        """Search-fact (loss, bytes, assignment) of all complete trials within the budget."""
        budget, names = self.search.wish.budget_bytes, self.search.space.options
        ranked = [
            (t.values[0], t.values[1], Assignment.of({name: t.params[name] for name in names}))
            for t in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            if t.values[1] <= budget
        ]
        return sorted(ranked, key=lambda entry: entry[:2])

    def _best(self) -> str:
        ranked = self._ranked()
        return f"{ranked[0][0]:.3f} nats lost" if ranked else "none yet"

    def finalists(self) -> None:
        """Score the searched points worth it on validation facts: the best few within the budget,
        and the searched part of the front below it.
        """
        searched = {
            s.assignment for s in self.run.scores() if s.partition == "search" and s.kind == "search"
        }
        ranked = self._ranked()
        front = pareto_front(ranked, lambda entry: (entry[1], entry[0]))
        best = [a for _, _, a in ranked if a in searched][:_FINALISTS]
        others = [a for _, _, a in front if a in searched and a not in best]
        chosen = best + _spread_out(others, _FINALISTS)
        for index, assignment in enumerate(chosen):
            self.search.report("finalists on validation facts", index, len(chosen))
            self._score_or_warn(assignment, "search", "validation")
        self.search.report("finalists on validation facts", len(chosen), len(chosen))

    def test(self) -> None:
        """Read the test facts: for the pick, the best uniform that fits, and the reference."""
        front = self.run.front()
        if front.pick is None:
            return
        rivals = [
            point
            for point in front.points
            if point.kind == "uniform" and point.stored_bytes <= front.pick.stored_bytes
        ]
        rival = min(rivals, key=lambda point: point.answer_loss.mean, default=None)
        for point in (front.pick, rival):
            if point is not None:
                self.search.report("test facts", 0, 1)
                self.score(point.assignment, point.kind, "test")
        for partition in ("validation", "test"):
            self._reference(partition)
        self.search.report("test facts", 1, 1)

    def _reference(self, partition: str) -> None:
        """Record the reference's own recall beside the candidates'."""
        key = f"reference_{partition}"
        if key in self.run.content or partition not in self._proxies:
            return
        proxy = self._proxies[partition]
        correct = proxy.reference.correct
        self.run.content[key] = {
            "recall": _mean_over_relations(
                correct if correct is not None else (), proxy.relations
            ),
            "top1": _mean_over_relations(proxy.reference.top1, proxy.relations),
            "chance": proxy.chance,
        }
        self.run.save()


def _mean_over_relations(values: Iterable[float], relations: Sequence[str]) -> float:
    return relation_mean(np.asarray(list(values), dtype=float), relations).mean


def _balanced(facts: Sequence[Fact], most: int) -> list[Fact]:
    """At most `most` facts, taken in turn from the relations, grouped by relation."""
    queues: dict[str, list[Fact]] = {}
    for fact in facts:
        queues.setdefault(fact.relation, []).append(fact)
    taken: dict[str, int] = dict.fromkeys(queues, 0)
    left = most
    while left > 0 and any(taken[r] < len(queue) for r, queue in queues.items()):
        for relation, queue in queues.items():
            if left > 0 and taken[relation] < len(queue):
                taken[relation] += 1
                left -= 1
    return [fact for relation, queue in queues.items() for fact in queue[: taken[relation]]]


def _spread_out(entries: Sequence[Assignment], most: int) -> list[Assignment]:
    """At most `most` entries at even distances."""
    if len(entries) <= most:
        return list(entries)
    places = np.linspace(0, len(entries) - 1, most).round().astype(int)
    return [entries[place] for place in dict.fromkeys(int(p) for p in places)]
