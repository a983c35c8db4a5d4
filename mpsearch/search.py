"""The main job: sensitivity, baselines, then an ask/tell loop over an Optuna study.

Which facts see what: solved examples come from the demonstration facts; candidates are proposed
and ranked on search facts; baselines and finalists are scored on validation facts, where the pick
is made; test facts are read once, for the pick, its rivals and the reference. Likewise of text:
search paragraphs constrain candidates where that is asked for, and what is scored on validation
facts is reported on held-out paragraphs.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mpsearch.allocate import check_damage, uniform
from mpsearch.asked import (
    MOST_FACTS,
    asked_facts,
    balanced,
    freeze_facts,
    known_facts,
    tokens_asked,
)
from mpsearch.bank import Bank, Report, silent
from mpsearch.budget import DeviceBudget
from mpsearch.calibration import Calibration
from mpsearch.device import require_disk
from mpsearch.errors import CheckError, RunError, UsageError
from mpsearch.evaluate import Bench, all_layers
from mpsearch.facts import FactSet
from mpsearch.footprint import JOBS
from mpsearch.forecast import Estimated, Needed, Needs, Plan, forecast, unsaid
from mpsearch.guard import cut_text
from mpsearch.hub import local_path
from mpsearch.journal import open_study, proposed
from mpsearch.measures import Sensitivity
from mpsearch.model_files import config_digest
from mpsearch.models import Model
from mpsearch.opening import needs_of
from mpsearch.points import OBJECTIVE
from mpsearch.quantizers import floats_a_weight, get_quantizer
from mpsearch.recall import SHOTS
from mpsearch.run import Run
from mpsearch.scorer import Scorer
from mpsearch.sensitivity import measure_sensitivity
from mpsearch.space import ResolvedSpace, SearchSpace
from mpsearch.study import FINALISTS, TRIAL_COST, SearchStudy, most_bytes, spread_bytes
from mpsearch.text import Text
from mpsearch.wanted import check_formats
from mpsearch.wish import AT_ONCE, Wish, check_seed, check_wish

log = logging.getLogger(__name__)


def search(
    model: Model,
    space: ResolvedSpace | SearchSpace,
    *,
    budget: str | int,
    out: str | Path,
    trials: int | None = None,
    seconds: float | None = None,
    seed: int = 0,
    sampler: str = "level-switch",
    quantizer: str | None = None,
    search_facts: int = MOST_FACTS["search"],
    calibration: Calibration | None = None,
    facts: FactSet | None = None,
    text: Text | None = None,
    max_text_kl_nats: float | None = None,
    at_once: int | None = None,
    device_budget: DeviceBudget | None = None,
    resume: bool = False,
    report: Report = silent,
    needed: Needed = unsaid,
    estimated: Estimated = unsaid,
) -> Run:
    """Search bit-width assignments under a budget of stored bytes; see `Wish` for the arguments.

    Args:
        out: the run folder; must not exist unless `resume`.
        facts: the built-in ones by default.
        device_budget: what the budget follows from, kept in the run.
        resume: continue the run in `out`, which must have been asked the same question.
        report: called with (stage, done, total).
        needed: called with what it takes beside time, before anything is done.
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
        max_text_kl_nats, at_once,
    )  # fmt: skip
    if isinstance(space, SearchSpace):
        space = space.resolve(model)
    facts = facts or FactSet.builtin()
    work = _Search(model, space, wish, facts, report, estimated)
    return work.run(Path(out), resume, device_budget, needed)


class _Search:
    """One call of `search`: the steps in order, each reading what earlier ones froze in the run."""

    def __init__(
        self, model: Model, space: ResolvedSpace, wish: Wish, facts: FactSet, report: Report,
        estimated: Estimated,
    ):  # fmt: skip
        check_wish(space, wish)
        self.model, self.space, self.wish, self.facts = model, space, wish, facts
        self.report, self.estimated = report, estimated
        quantizer = get_quantizer(wish.quantizer, space.target.container)
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
            "config": config_digest(self.model.folder),
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
            "objective": OBJECTIVE,
            "budget_bytes": self.wish.budget_bytes,
            "seed": self.wish.seed,
            "sampler": self.wish.sampler,
            "bank": self.bank.settings,
            "dtype": str(self.model.dtype),
        }

    def run(
        self, out: Path, resume: bool, device_budget: DeviceBudget | None, needed: Needed
    ) -> Run:
        if resume:
            run = Run.open(out)
            run.check_question(self.question)
            needs = self._needs(out)
            at_once = run.content.get("at_once", 1)
            if self.wish.at_once not in (None, at_once):
                raise RunError(
                    f"'{out}' scores {at_once} proposals at once, and {self.wish.at_once} are "
                    "asked for; continue as it was begun"
                )
        else:
            needs = self._needs(out)
            run = Run.create(out, self.question, self.space, self.model.preparation)
            at_once = self.wish.at_once or (AT_ONCE if self.model.streamed else 1)
            run.content["at_once"] = at_once
            if local_path(self.model.name).is_dir():
                run.content["model_folder"] = str(self.model.folder.resolve())
        with run.locked():
            if resume:  # as whoever held the folder until now has left it
                run.content = Run.open(out).content
            run.mend()
            run.content["finished"] = False
            if device_budget is not None:
                run.content["device_budget"] = device_budget.to_json()
            run.content["needs"] = asdict(needs)
            run.save()
            needed(needs)
            self.report("asking the reference", 0, 1)
            try:
                freeze_facts(run, self.model, self.facts, self.wish.search_facts)
            except (CheckError, UsageError):
                if not resume:  # it holds nothing yet, and the next attempt asks otherwise
                    shutil.rmtree(out)
                raise
            self.report("asking the reference", 1, 1)
            wanted = all_layers(self.space)
            files = [self.bank.path(layer.name, fmt) for layer, fmt in wanted if fmt.quantized]
            self._foretell(run, 0.0 if all(file.exists() for file in files) else None)
            self.bank.build(wanted, self.report, lambda seconds: self._foretell(run, seconds))
            self._took(run, "bank")
            damage = self._sensitivity(run).fisher_nats
            self._took(run, "sensitivity")
            with Bench(self.space, self.bank) as bench:
                scorer = Scorer(self.model, self.facts, self.text, run, bench)
                work = SearchStudy(self.space, self.wish, run, scorer, self.report, at_once)
                work.baselines(damage)
                self._took(run, "baselines")
                work.loop(damage, self._foretold_trials)
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
        self._foretold_trials = 0
        if (pace := run.content.get("pace")) is None:  # a run of before it was measured
            return
        scored = Counter(
            (score.partition, score.kind == "search")
            for score in run.scores()
            if not score.assignment.refined
        )
        # Those that were stopped early have no score.
        scored["search", True] = proposed(open_study(run, self.space))
        found = forecast(
            pace["seconds"] / pace["tokens"],
            tokens_asked(run, self.model, self.facts, self.text),
            self._plan,
            scored,
            bank_seconds,
            None if self.wish.seconds is None else self.wish.seconds - run.proposing_seconds,
            (run.folder / "sensitivity.json").exists(),
        )
        self._foretold_trials = found.trials
        run.content["forecast_seconds"] = found.by_stage
        run.save()
        self.estimated(found)

    @property
    def _plan(self) -> Plan:
        sizes = [self.space.stored_bytes(assignment) for assignment in uniform(self.space).values()]
        sizes += 2 * [self.wish.budget_bytes] + spread_bytes(self.space)  # greedy and knapsack
        searched = sum(size <= most_bytes(self.wish) for size in sizes)
        cost = TRIAL_COST if self.wish.sampler == "level-switch" else 1.0
        return Plan(len(sizes), searched, self.wish.most_trials, 2 * FINALISTS, cost)

    def _took(self, run: Run, stage: str) -> None:
        since, self._since = self._since, time.monotonic()
        run.content["took_seconds"][stage] = self._since - since

    def _needs(self, out: Path) -> Needs:
        """What it takes beside time, after refusing what memory and disk do not hold."""
        wanted = [(layer, fmt) for layer, fmt in all_layers(self.space) if fmt.quantized]
        lacking = [
            (layer, fmt) for layer, fmt in wanted if not self.bank.path(layer.name, fmt).exists()
        ]
        disk_bytes = sum(fmt.layer_bytes(layer) for layer, fmt in lacking)
        tables = (self.model.embedding, self.model.head)
        job = replace(
            JOBS["search"],
            calibrated=self.bank.quantizer.calibrated and bool(lacking),
            tables=any(layer in tables for layer, _ in wanted),
            floats=floats_a_weight(self.bank.quantizer),
        )
        needs = needs_of(self.model, job, "the search", disk_bytes)
        require_disk(50_000_000, out, "the run folder")
        require_disk(int(disk_bytes * 1.1), self.bank.folder, "the weight bank")
        return needs

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
    """The table on its own: builds the bank, asks the reference, measures.

    Raises:
        UsageError: a seed out of range.
    """
    check_seed(seed)
    bank = Bank(model, get_quantizer(quantizer, space.target.container), calibration)
    bank.build(all_layers(space), report)
    known = balanced(known_facts(model, facts, MOST_FACTS["search"])[1], MOST_FACTS["sensitivity"])
    return measure_sensitivity(
        space, bank, facts, tuple(known), seed=seed, check=check, report=report
    )
