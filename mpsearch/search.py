"""The main job: sensitivity, baselines, then an ask/tell loop over an Optuna study.

Which facts see what: solved examples come from the demonstration facts; candidates are proposed
and ranked on search facts; baselines and finalists are scored on validation facts, where the pick
is made; test facts are read once, for the pick, its rivals and the reference. Likewise of text:
search paragraphs constrain candidates where that is asked for, and what is scored on validation
facts is reported on held-out paragraphs.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.study import Study
from optuna.trial import TrialState

from mpsearch.allocate import check_damage, feasible, greedy, knapsack, uniform
from mpsearch.asked import (
    MOST_FACTS,
    asked_facts,
    balanced,
    freeze_facts,
    known_facts,
    tokens_asked,
)
from mpsearch.assignment import Assignment
from mpsearch.bank import Bank, Report, check_formats, silent
from mpsearch.calibration import Calibration
from mpsearch.device import require_disk, require_memory
from mpsearch.errors import CheckError, RunError
from mpsearch.evaluate import Bench, all_layers
from mpsearch.facts import FactSet
from mpsearch.forecast import Estimated, Plan, forecast, unsaid
from mpsearch.front import pareto_front
from mpsearch.guard import cut_text
from mpsearch.measures import Sensitivity
from mpsearch.models import Model
from mpsearch.points import Score, rivals
from mpsearch.quantizers import get_quantizer
from mpsearch.recall import SHOTS
from mpsearch.run import Run
from mpsearch.samplers import OVER_TEXT_KL, distributions, make_sampler
from mpsearch.scorer import Scorer
from mpsearch.sensitivity import measure_sensitivity
from mpsearch.space import ResolvedSpace, SearchSpace
from mpsearch.study import open_study, tried
from mpsearch.text import Text
from mpsearch.wish import TRIALS, Wish, check_wish

log = logging.getLogger(__name__)

_FINALISTS = 3
_SPREAD = (0.2, 0.4, 0.6, 0.8)  # of the feasible range, for the knapsack's further first points


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
    search_facts: int = MOST_FACTS["search"],
    calibration: Calibration | None = None,
    facts: FactSet | None = None,
    text: Text | None = None,
    max_text_kl_nats: float | None = None,
    resume: bool = False,
    report: Report = silent,
    estimated: Estimated = unsaid,
) -> Run:
    """Search bit-width assignments under a budget of stored bytes; see `Wish` for the arguments.

    Args:
        out: the run folder; must not exist unless `resume`.
        facts: the built-in ones by default.
        resume: continue the run in `out`, which must have been asked the same question.
        report: called with (stage, done, total).
        estimated: called with the time that it takes, at once and when the bank has been timed.
    Returns:
        The finished run.
    Raises:
        InfeasibleError: the budget is below the smallest assignment.
        RunError: `out` exists, or answers another question.
        CheckError: NaN, or a reference that knows nothing.
        ResourceError: memory or disk; what is finished is kept.
        KeyboardInterrupt: all finished trials are kept; resume goes on from there.
    """
    wish = Wish(
        budget, trials, seconds, seed, sampler, quantizer, search_facts, calibration, text,
        max_text_kl_nats,
    )  # fmt: skip
    if isinstance(space, SearchSpace):
        space = space.resolve(model)
    facts = facts or FactSet.builtin()
    return _Search(model, space, wish, facts, report, estimated).run(Path(out), resume)


class _Search:
    """One call of `search`: the steps in order, each reading what earlier ones froze in the run."""

    def __init__(
        self, model: Model, space: ResolvedSpace, wish: Wish, facts: FactSet, report: Report,
        estimated: Estimated,
    ):  # fmt: skip
        check_wish(space, wish)
        self.model, self.space, self.wish, self.facts = model, space, wish, facts
        self.report, self.estimated = report, estimated
        quantizer = get_quantizer(wish.quantizer, space.target.name)
        check_formats(quantizer, all_layers(space))
        self.text = wish.text or Text.builtin()
        for half in (self.text.search, self.text.held_out):
            cut_text(model.tokenizer, half)  # too short a text is refused here
        self.bank = Bank(model, quantizer, wish.calibration)
        odd = sum(not model.places[layer.name].is_linear for layer in model.layers)
        if odd:
            log.warning(
                "%d of %d layers are stored transposed or are stacked experts, which exports "
                "cannot hold quantized yet: what is found can be studied, not served",
                odd,
                len(model.layers),
            )

    @property
    def question(self) -> dict[str, Any]:
        return {
            "model": self.model.name,
            "awq": bool(self.model.preparation),
            "chat_template": self.model.chat,
            "fingerprint": self.model.fingerprint,
            "target": self.space.target.name,
            "formats": {
                group: [fmt.name for fmt in formats]
                for group, formats in self.space.options.items()
            },
            "facts": self.facts.digest,
            "search_facts": self.wish.search_facts,
            # As in older runs: None for the built-in text, and for no limit.
            "text": self.wish.text and self.wish.text.digest,
            "max_text_kl_nats": self.wish.max_text_kl_nats,
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
            run = Run.create(out, self.question, self.space, self.model.preparation)
        with run.locked():
            run.mend()
            run.content["finished"] = False
            run.save()
            self.report("asking the reference", 0, 1)
            freeze_facts(run, self.model, self.facts, self.wish.search_facts)
            self.report("asking the reference", 1, 1)
            wanted = all_layers(self.space)
            files = [self.bank.path(layer.name, fmt) for layer, fmt in wanted if fmt.quantized]
            self._foretell(run, 0.0 if all(file.exists() for file in files) else None)
            self.bank.build(wanted, self.report, lambda seconds: self._foretell(run, seconds))
            self._took(run, "bank")
            damage = self._sensitivity(run).fisher_nats
            self._took(run, "sensitivity")
            with Bench(self.space, self.bank) as bench:
                work = _Work(self, run, bench)
                work.baselines(damage)
                self._took(run, "baselines")
                work.loop(damage)
                self._took(run, "trials")
                work.finalists()
                self._took(run, "finalists")
                work.test()
                self._took(run, "test")
            run.content["finished"] = True
            run.save()
        return run

    def _foretell(self, run: Run, bank_seconds: float | None) -> None:
        """Say how long the rest takes, and keep it beside what it will have taken."""
        self._since, run.content["took_seconds"] = time.monotonic(), {}
        if (pace := run.content.get("pace")) is None:  # a run of before it was measured
            return
        found = forecast(
            pace["seconds"] / pace["tokens"],
            tokens_asked(run, self.model, self.facts, self.text),
            Plan(len(uniform(self.space)) + 2 + len(_SPREAD), self.wish.trials, 2 * _FINALISTS),
            Counter((score.partition, score.kind == "search") for score in run.scores()),
            bank_seconds,
            self.wish.seconds,
            (run.folder / "sensitivity.json").exists(),
        )
        run.content["forecast_seconds"] = found.by_stage
        run.save()
        self.estimated(found)

    def _took(self, run: Run, stage: str) -> None:
        since, self._since = self._since, time.monotonic()
        run.content["took_seconds"][stage] = self._since - since

    def _check_resources(self, out: Path) -> None:
        weights = sum(group.weights for group in self.space.groups)
        # Originals are loaded already; decoded candidates and gradients come on top.
        require_memory(6 * weights + 1_000_000_000, self.model.device, "the search")
        require_disk(50_000_000, out, "the run folder")

    def _sensitivity(self, run: Run) -> Sensitivity:
        path = run.folder / "sensitivity.json"
        if path.exists():
            try:
                found = Sensitivity.load(path)
                check_damage(self.space, found.fisher_nats)
                return found
            except (RunError, CheckError) as error:
                log.warning("%s; measuring again", error)
        table = measure_sensitivity(
            self.space,
            self.bank,
            self.facts,
            tuple(balanced(asked_facts(run, self.facts, "search"), MOST_FACTS["sensitivity"])),
            seed=self.wish.seed,
            around=False,
            report=self.report,
        )
        table.save(path)
        return table


def sensitivity_of(
    model: Model,
    space: ResolvedSpace,
    facts: FactSet,
    quantizer: str | None,
    seed: int,
    calibration: Calibration | None = None,
    check: bool = False,
    report: Report = silent,
) -> Sensitivity:
    """The table on its own: builds the bank, asks the reference, measures."""
    bank = Bank(model, get_quantizer(quantizer, space.target.name), calibration)
    bank.build(all_layers(space), report)
    known = balanced(known_facts(model, facts, MOST_FACTS["search"])[1], MOST_FACTS["sensitivity"])
    return measure_sensitivity(
        space, bank, facts, tuple(known), seed=seed, check=check, report=report
    )


class _Work:
    """The study of one search: baselines, proposals, finalists, test."""

    def __init__(self, search: _Search, run: Run, bench: Bench):
        self.search, self.run = search, run
        self.scorer = Scorer(search.model, search.facts, search.text, run, bench)
        self.study: Study = open_study(run, search.space)

    def propose(self) -> None:
        """One trial: the sampler's proposal, scored on search facts."""
        trial = self.study.ask(distributions(self.search.space))
        params = trial.params  # a copy at each access
        assignment = Assignment.of({name: params[name] for name in self.search.space.options})
        trial.set_user_attr("kind", "search")
        trial.set_constraint("over_budget_bytes", self._over_budget(assignment))
        try:
            score = self.scorer.score(assignment, "search", "search")
        except CheckError as error:
            trial.set_user_attr("refused", str(error))
            self.study.tell(trial, state=TrialState.FAIL)
            log.warning("assignment %s is refused: %s", assignment.id, error)
            return
        for name, over in self._over_text_kl(score).items():
            trial.set_constraint(name, over)
        self.study.tell(trial, self._values(score))

    def add_baseline(self, assignment: Assignment, kind: str) -> None:
        """A trial for a given assignment, written when it is complete."""
        try:
            score = self.scorer.score(assignment, kind, "search")
        except CheckError as error:
            log.warning("%s assignment %s is left out: %s", kind, assignment.id, error)
            return
        self.study.add_trial(
            optuna.create_trial(
                params=dict(assignment),
                distributions=distributions(self.search.space),
                values=self._values(score),
                user_attrs={"kind": kind},
                constraints={
                    "over_budget_bytes": self._over_budget(assignment),
                    **self._over_text_kl(score),
                },
            )
        )

    def _over_budget(self, assignment: Assignment) -> float:
        """Above zero where Optuna's own samplers must not go."""
        return float(self.search.space.stored_bytes(assignment) - self.search.wish.budget_bytes)

    def _over_text_kl(self, score: Score) -> dict[str, float]:
        """The same of the limit of text KL, empty where there is none."""
        limit = self.search.wish.max_text_kl_nats
        if limit is None or score.text is None:
            return {}
        return {OVER_TEXT_KL: score.text.kl.mean - limit}

    def _values(self, score: Score) -> list[float]:
        stored_bytes = self.search.space.stored_bytes(score.assignment)
        return [self.scorer.loss(score), float(stored_bytes)]

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
        told = tried(self.study, self.search.space)
        for index, (assignment, kind) in enumerate(distinct):
            self.search.report("baselines", index, len(distinct))
            if assignment not in told:
                self.add_baseline(assignment, kind)
        for index, (assignment, kind) in enumerate(distinct):
            self.search.report("baselines on validation facts", index, len(distinct))
            self._score_or_warn(assignment, kind, "validation")
        self.search.report("baselines on validation facts", len(distinct), len(distinct))

    def _score_or_warn(self, assignment: Assignment, kind: str, partition: str) -> None:
        try:
            self.scorer.score(assignment, kind, partition)
        except CheckError as error:
            log.warning("%s assignment %s is left out: %s", kind, assignment.id, error)

    def loop(self, damage: dict[tuple[str, str], float]) -> None:
        """Propose until the trials or the time are used up."""
        wish = self.search.wish
        done = self._proposals()
        # Optuna's own samplers are seeded anew, as they would repeat their first proposals; so
        # only ours goes on after a kill exactly as it would have without.
        ours = wish.sampler == "level-switch"
        seed = wish.seed if ours else wish.seed + done
        self.study.sampler = make_sampler(
            wish.sampler, self.search.space, damage, wish.budget_bytes, seed, wish.max_text_kl_nats
        )
        start = time.monotonic()
        while done < wish.trials:
            if wish.seconds is not None and time.monotonic() - start >= wish.seconds:
                break
            known = tried(self.study, self.search.space)
            if all(found in known for found in feasible(self.search.space, wish.budget_bytes)):
                log.warning("every assignment within the budget has been tried; the search ends")
                break
            self.search.report(f"search, best {self._best()}", done, wish.trials)
            self.propose()
            done += 1
        self.search.report(f"search, best {self._best()}", done, done)

    def _proposals(self) -> int:
        return sum(
            trial.user_attrs.get("kind") == "search"
            and (trial.state == TrialState.COMPLETE or "refused" in trial.user_attrs)
            for trial in self.study.get_trials(deepcopy=False)
        )

    def _ranked(self) -> list[tuple[float, float, Assignment]]:
        """Search-fact (loss, bytes, assignment) of all complete trials that break no limit."""
        budget, names = self.search.wish.budget_bytes, self.search.space.options
        ranked = [
            (t.values[0], t.values[1], Assignment.of({name: t.params[name] for name in names}))
            for t in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            if t.values[1] <= budget and t.constraints.get(OVER_TEXT_KL, 0.0) <= 0
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
            s.assignment
            for s in self.run.scores()
            if s.partition == "search" and s.kind == "search"
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
        """Read the test facts: for the pick, its simple rivals that fit, and the reference."""
        self.scorer.record_reference("validation")
        front = self.run.front()
        if front.pick is None:
            return
        asked = [front.pick, *rivals(front, self.run.budget_bytes)]
        for index, point in enumerate(asked):
            self.search.report("test facts", index, len(asked))
            self.scorer.score(point.assignment, point.kind, "test")
        self.scorer.record_reference("test")
        self.search.report("test facts", len(asked), len(asked))


def _spread_out(entries: Sequence[Assignment], most: int) -> list[Assignment]:
    """At most `most` entries at even distances."""
    if len(entries) <= most:
        return list(entries)
    places = np.linspace(0, len(entries) - 1, most).round().astype(int)
    return [entries[place] for place in dict.fromkeys(int(p) for p in places)]
