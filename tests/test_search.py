"""A search on the tiny model: baselines, resume after any kill, refused questions, honest facts."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from conftest import tiny_family
from optuna.trial import TrialState

import mpsearch.scorer
import mpsearch.stages
from mpsearch.allocate import greedy, knapsack, uniform
from mpsearch.assignment import Assignment
from mpsearch.errors import CheckError, InfeasibleError, MpsearchError, RunError, UsageError
from mpsearch.evaluate import Bench, Evaluation
from mpsearch.facts import FactSet
from mpsearch.measures import Sensitivity
from mpsearch.models import Model, load_whole
from mpsearch.points import SIMPLE_KINDS, Point
from mpsearch.recall import RecallProxy
from mpsearch.run import Run
from mpsearch.samplers import HOPELESS_LOSS
from mpsearch.search import search
from mpsearch.space import ResolvedSpace, SearchSpace
from mpsearch.wish import Wish, check_wish

TRIALS = 6
FACTS = 30
Search = Callable[..., Run]
BenchEvaluate = Callable[[Bench, Assignment, RecallProxy], Evaluation]


@pytest.fixture(scope="module")
def ask(tiny: Model, tiny_space: ResolvedSpace, tiny_facts: FactSet, budget: int) -> Search:
    """The search that most tests ask for; keywords change the question."""

    def asked(out: Path, model: Model = tiny, space: Any = tiny_space, **changes: Any) -> Run:
        question = {
            "budget": budget, "trials": TRIALS, "search_facts": FACTS, "facts": tiny_facts,
        }  # fmt: skip
        return search(model, space, out=out, **{**question, **changes})

    return asked


@pytest.fixture(scope="module")
def calls() -> Counter[Assignment]:
    """How often the uninterrupted search evaluated each assignment."""
    return Counter()


@pytest.fixture(scope="module")
def whole(ask: Search, calls: Counter[Assignment], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The uninterrupted search that resumed ones are compared with."""
    with pytest.MonkeyPatch.context() as patch:
        evaluate = Bench.evaluate

        def counted(bench: Bench, assignment: Assignment, proxy: RecallProxy) -> Evaluation:
            calls[assignment] += 1
            return evaluate(bench, assignment, proxy)

        patch.setattr(Bench, "evaluate", counted)
        return ask(tmp_path_factory.mktemp("whole") / "run")


def result(run: Run) -> dict[str, Any]:
    """Everything that a resumed search must reproduce exactly."""
    front = run.front()

    def figures(point: Point) -> tuple[Any, ...]:
        return (point.id, point.kind, point.stored_bytes, point.score.loss_per_fact, point.recall)

    return {
        "points": [figures(point) for point in front.points],
        "front": front.pareto_ids,
        "pick": front.pick and front.pick.id,
        "verdict": front.verdict,
        "test": [figures(point) for point in run.points("test")],
        "search": sorted(
            (s.assignment.id, s.loss_per_fact) for s in run.scores() if s.partition == "search"
        ),
    }


def study_of(run: Run) -> optuna.Study:
    backend = optuna.storages.journal.JournalFileBackend(str(run.journal))
    return optuna.load_study(study_name="mpsearch", storage=optuna.storages.JournalStorage(backend))


def proposals(run: Run) -> list[dict[str, str]]:
    return [t.params for t in study_of(run).trials if t.user_attrs.get("kind") == "search"]


def evaluation_lines(run: Run) -> list[dict[str, Any]]:
    text = (run.folder / "evaluations.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


# --------------------------------------------------------------------------- what it delivers


def test_every_simple_allocation_is_a_row(
    whole: Run, ask: Search, tiny_space: ResolvedSpace, budget: int, tmp_path: Path
) -> None:
    path = whole.folder / "sensitivity.json"
    damage = Sensitivity.from_json(json.loads(path.read_text(encoding="utf-8"))).fisher_nats
    uniforms = set(uniform(tiny_space).values())

    def others(limit: int) -> set[Assignment]:
        return {greedy(tiny_space, damage, limit), *knapsack(tiny_space, damage, [limit])}

    # Of three different rules, so that each has to be there on its own account.
    limit = next(n for n in range(budget, 0, -100) if len(uniforms | others(n)) == 6)
    rows = {p.assignment: p.kind for p in ask(tmp_path / "run", budget=limit, trials=0).points()}
    for assignment in uniforms | others(limit):
        assert rows[assignment] in SIMPLE_KINDS
    kinds = Counter(rows.values())
    assert kinds["uniform"] == len(tiny_space.space.formats)
    assert kinds["greedy"] == 1
    assert kinds["search"] == 0
    assert Counter(p.kind for p in whole.points())["search"] >= 1


def test_every_searched_proposal_fits_the_budget_and_is_asked_once(
    whole: Run, tiny_space: ResolvedSpace, budget: int
) -> None:
    proposed = proposals(whole)
    assert len(proposed) == TRIALS
    assert max(tiny_space.stored_bytes(p) for p in proposed) <= budget
    assert len({Assignment.of(p) for p in proposed}) == TRIALS


def test_nothing_is_evaluated_twice(
    whole: Run, calls: Counter[Assignment], ask: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = evaluation_lines(whole)
    keys = [(line["partition"], Assignment.of(line["assignment"])) for line in lines]
    assert len(set(keys)) == len(keys) == calls.total()

    def forbidden(*_: Any) -> Evaluation:
        raise AssertionError("a finished search has nothing left to evaluate")

    before = result(whole)
    monkeypatch.setattr(Bench, "evaluate", forbidden)
    assert result(ask(whole.folder, resume=True)) == before
    assert evaluation_lines(whole) == lines


def test_the_pick_fits_and_is_not_worse_than_the_best_simple_point(whole: Run, budget: int) -> None:
    front = whole.front()
    assert front.pick is not None
    assert front.pick.stored_bytes <= budget
    fitting = [p for p in front.points if p.kind in SIMPLE_KINDS and p.stored_bytes <= budget]
    assert front.pick.answer_loss.mean <= min(p.answer_loss.mean for p in fitting)
    assert whole.finished


def test_the_model_holds_its_reference_weights_afterwards(whole: Run, tiny: Model) -> None:
    for layer, original in tiny.originals.items():
        assert tiny.places[layer].weight.data_ptr() == original.data_ptr()
        assert not tiny.places[layer].parameter.requires_grad


def test_each_partition_sees_its_own_facts(whole: Run, tiny_facts: FactSet) -> None:
    partition_of = {fact.subject: fact.partition for fact in tiny_facts.facts}
    subjects = whole.content["subjects"]
    assert set(subjects) == {"search", "validation", "test"}
    for partition, asked in subjects.items():
        assert asked
        assert {partition_of[subject] for subject in asked} == {partition}
        assert len(asked) == len(whole.relations(partition))
    assert len(subjects["search"]) <= FACTS
    for line in evaluation_lines(whole):
        assert len(line["loss_per_fact"]) == len(subjects[line["partition"]])


def test_test_facts_are_read_last_and_only_for_the_pick_and_its_rivals(whole: Run) -> None:
    front = whole.front()
    assert front.pick is not None
    fitting = [p for p in front.points if p.stored_bytes <= whole.budget_bytes]
    rivals = {
        min((p for p in fitting if p.kind == kind), key=lambda p: p.answer_loss.mean).id
        for kind in ("uniform", "greedy", "knapsack")
        if any(p.kind == kind for p in fitting)
    }
    assert len(rivals) > 1
    partitions = [line["partition"] for line in evaluation_lines(whole)]
    read = [
        Assignment.of(line["assignment"]).id
        for line in evaluation_lines(whole)
        if line["partition"] == "test"
    ]
    assert sorted(read) == sorted({front.pick.id, *rivals})
    assert "test" not in partitions[: -len(read)]
    for partition in ("validation", "test"):
        reference = whole.content[f"reference_{partition}"]
        assert reference["recall"] > reference["chance"] > 0


def test_validation_facts_are_read_for_baselines_and_a_few_finalists_only(whole: Run) -> None:
    lines = evaluation_lines(whole)
    validated = [line for line in lines if line["partition"] == "validation"]
    searched = [
        Assignment.of(line["assignment"]).id for line in validated if line["kind"] == "search"
    ]
    proposed = {Assignment.of(p).id for p in proposals(whole)}
    assert 1 <= len(searched) <= 8
    assert set(searched) <= proposed
    assert [p.id for p in whole.front().points if p.kind == "search"]


def test_another_seed_searches_elsewhere(whole: Run, ask: Search, tmp_path: Path) -> None:
    other = ask(tmp_path / "run", seed=1)
    assert proposals(other) != proposals(whole)


def test_with_no_trials_the_simple_allocations_stand(ask: Search, tmp_path: Path) -> None:
    run = ask(tmp_path / "run", trials=0)
    front = run.front()
    assert front.pick is not None
    assert front.pick.kind in SIMPLE_KINDS
    assert "the simple allocations stand" in front.verdict
    assert not any(point.kind == "search" for point in front.points)


def test_a_time_limit_ends_the_proposals_and_not_the_report(ask: Search, tmp_path: Path) -> None:
    run = ask(tmp_path / "run", trials=10**6, seconds=0.05)
    assert run.finished
    assert len(proposals(run)) < 50
    assert run.points("test")


@pytest.mark.parametrize("sampler", ["nsga2", "tpe"])
def test_optunas_samplers_search_too_and_are_told_what_is_over_the_budget(
    sampler: str, ask: Search, tmp_path: Path
) -> None:
    run = ask(tmp_path / "run", sampler=sampler)
    assert len(proposals(run)) == TRIALS
    assert run.front().pick is not None
    for trial in study_of(run).trials:
        over_budget = run.space.stored_bytes(trial.params) - run.budget_bytes
        assert list(trial.constraints.values()) == [over_budget]


def test_candidates_that_cannot_win_are_stopped_after_half_of_the_relations(
    ask: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mpsearch.stages, "_LEAST_RELATIONS", 2)
    monkeypatch.setattr(mpsearch.scorer, "hopeless", lambda losses, best, relations: 0.25)
    run = ask(tmp_path / "run")
    trials = [t for t in study_of(run).trials if t.user_attrs["kind"] == "search"]
    assert len(trials) == TRIALS
    assert {t.state for t in trials} == {TrialState.PRUNED}
    told = [t for t in study_of(run).trials if t.state == TrialState.COMPLETE]
    size = run.space.stored_bytes
    for trial in trials:
        fitting = [t.values[0] for t in told if t.values[1] <= size(Assignment.of(trial.params))]
        assert trial.user_attrs[HOPELESS_LOSS] == min(fitting) + 0.25
        assert 0 < trial.user_attrs["fact_tokens"] < max(t.user_attrs["fact_tokens"] for t in told)
    assert {s.kind for s in run.scores() if s.partition == "search"} == {*SIMPLE_KINDS}
    assert "simple allocations stand" in run.front().verdict


def test_facts_asked_in_halves_give_the_losses_of_facts_asked_at_once(
    whole: Run, ask: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mpsearch.stages, "_LEAST_RELATIONS", 2)
    monkeypatch.setattr(mpsearch.scorer, "hopeless", lambda losses, best, relations: None)
    halved = ask(tmp_path / "run", trials=0)
    at_once = {s.assignment: s for s in whole.scores() if s.partition == "search"}
    for score in halved.scores():
        if score.partition == "search":
            same = at_once[score.assignment]
            assert score.loss_per_fact == pytest.approx(same.loss_per_fact, abs=0.05)
            assert score.kl_nats == pytest.approx(same.kl_nats, abs=0.05)


def test_a_search_measures_slopes_and_says_how_well_it_foresaw(whole: Run) -> None:
    slopes = {k: v for k, v in study_of(whole).user_attrs.items() if k.startswith("slopes ")}
    assert slopes
    tokens = max(t.user_attrs["fact_tokens"] for t in study_of(whole).trials)
    assert all(held["fact_tokens"] == 3 * tokens for held in slopes.values())
    foreseen = whole.content["foresight"]
    assert foreseen["trials"] >= 3
    assert foreseen["error_nats"] >= 0


def test_a_search_goes_on_without_slopes_that_are_no_numbers(
    ask: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise CheckError("the slopes at assignment x are NaN or infinite")

    monkeypatch.setattr(mpsearch.scorer, "measure_slopes", broken)
    assert len(proposals(ask(tmp_path / "run"))) == TRIALS
    assert "goes on without them" in caplog.text


def test_progress_counts_every_stage_to_its_end(ask: Search, tmp_path: Path) -> None:
    last: dict[str, tuple[int, int]] = {}

    def report(stage: str, done: int, total: int) -> None:
        assert 0 <= done <= total
        last[stage.split(",")[0]] = (done, total)

    ask(tmp_path / "run", report=report)
    assert last["search"] == (TRIALS, TRIALS)
    assert {"sensitivity", "finalists on validation facts", "test facts"} <= set(last)
    assert all(done == total for stage, (done, total) in last.items() if stage != "baselines")


# ------------------------------------------------------------------ promise 5: nothing is lost


def interrupt_at(
    monkeypatch: pytest.MonkeyPatch, owner: type, method: str, number: int, after: bool = False
) -> None:
    """Ctrl-C in the given call of a method, before or after it does its work."""
    original = getattr(owner, method)
    seen = 0

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen != number:
            return original(*args, **kwargs)
        if after:
            original(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, method, interrupted)


@pytest.mark.parametrize("part", [0.0, 0.2, 0.45, 0.62, 0.8, 1.0])
def test_a_search_interrupted_in_an_evaluation_resumes_to_the_same_front(
    part: float,
    whole: Run,
    calls: Counter[Assignment],
    ask: Search,
    tiny: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = result(whole)
    with monkeypatch.context() as patch:
        interrupt_at(patch, Bench, "evaluate", 1 + round(part * (calls.total() - 1)))
        with pytest.raises(KeyboardInterrupt):
            ask(tmp_path / "run")
    for layer, original in tiny.originals.items():
        assert tiny.places[layer].weight.data_ptr() == original.data_ptr()
    assert not Run.open(tmp_path / "run").finished
    assert result(ask(tmp_path / "run", resume=True)) == expected


@pytest.mark.parametrize(
    ("owner", "method", "number", "after"),
    [
        (Run, "add", 3, True),  # a baseline is stored, the study was not told
        (optuna.Study, "add_trial", 4, True),
        (optuna.Study, "ask", 3, True),  # a trial was begun, without its kind
        (optuna.Trial, "set_user_attr", 3, True),
        (Run, "add", 23, True),  # a proposal is stored, the study was not told
        (optuna.Study, "tell", 3, True),
        (Run, "save", 5, False),
    ],
)
def test_a_search_interrupted_between_its_two_files_resumes_to_the_same_front(
    owner: type,
    method: str,
    number: int,
    after: bool,
    whole: Run,
    ask: Search,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = result(whole)
    with monkeypatch.context() as patch:
        interrupt_at(patch, owner, method, number, after)
        with pytest.raises(KeyboardInterrupt):
            ask(tmp_path / "run")
    resumed = ask(tmp_path / "run", resume=True)
    assert result(resumed) == expected
    assert [p for p in proposals(whole) if p not in proposals(resumed)] == []


def test_a_search_interrupted_three_times_resumes_to_the_same_front(
    whole: Run, ask: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for attempt, number in enumerate((3, 4, 10)):
        with monkeypatch.context() as patch:
            interrupt_at(patch, Bench, "evaluate", number)
            with pytest.raises(KeyboardInterrupt):
                ask(tmp_path / "run", resume=attempt > 0)
    assert result(ask(tmp_path / "run", resume=True)) == result(whole)


def _copy_cut(whole: Run, out: Path, journal_lines: int, torn: bytes) -> None:
    """The folder as a kill left it after so many journal lines: with the evaluations of all
    trials told by then and of the one in flight, and both files torn.
    """
    out.mkdir()
    content = {k: v for k, v in whole.content.items() if not k.startswith("reference")}
    (out / "run.json").write_text(json.dumps({**content, "finished": False}), encoding="utf-8")
    sensitivity = (whole.folder / "sensitivity.json").read_bytes()
    (out / "sensitivity.json").write_bytes(sensitivity)
    journal = whole.journal.read_bytes().splitlines(keepends=True)[:journal_lines]
    (out / "journal.log").write_bytes(b"".join(journal) + torn)
    told = sum(b'"values":[' in entry or b'"values": [' in entry for entry in journal)
    evaluations = (whole.folder / "evaluations.jsonl").read_bytes().splitlines(keepends=True)
    kept, asked = [], 0
    for entry in evaluations:
        if json.loads(entry)["partition"] == "search":
            asked += 1
            if asked <= told:
                kept.append(entry)
    (out / "evaluations.jsonl").write_bytes(b"".join(kept) + evaluations[len(kept)][:50])


@pytest.mark.parametrize("part", [0.02, 0.1, 0.31, 0.5, 0.77, 0.9, 0.97])
def test_a_journal_cut_anywhere_with_torn_last_lines_resumes_to_the_same_front(
    part: float, whole: Run, ask: Search, tmp_path: Path
) -> None:
    expected = result(whole)
    lines = len(whole.journal.read_bytes().splitlines())
    torn = b'{"op_code":6,"worker_id":"'
    _copy_cut(whole, tmp_path / "run", int(part * lines), torn)
    resumed = ask(tmp_path / "run", resume=True)
    assert result(resumed) == expected
    assert torn + b"{" not in resumed.journal.read_bytes()
    assert all(json.loads(line) for line in resumed.journal.read_text().splitlines())
    assert evaluation_lines(resumed)


def test_a_sensitivity_table_that_a_kill_cut_short_is_measured_again(
    whole: Run, ask: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_at(patch, Bench, "evaluate", 1)
        with pytest.raises(KeyboardInterrupt):
            ask(tmp_path / "run")
    table = tmp_path / "run" / "sensitivity.json"
    table.write_bytes(table.read_bytes()[:100])
    assert result(ask(tmp_path / "run", resume=True)) == result(whole)


def test_a_killed_command_line_search_resumes_to_the_front_of_an_uninterrupted_one(
    tiny_folder: Path, tiny_facts: FactSet, facts_file: Path, budget: int, ask: Search,
    tmp_path: Path,
) -> None:  # fmt: skip
    killed, trials = tmp_path / "killed", 40
    process = subprocess.Popen(
        [
            sys.executable, "-m", "mpsearch.cli", "search", str(tiny_folder), "--facts",
            str(facts_file), "--budget", f"{budget}B", "--trials", str(trials), "-o", str(killed),
        ],
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )  # fmt: skip
    watchdog = threading.Timer(90, process.kill)
    watchdog.start()
    assert process.stderr is not None
    talk = []
    for line in process.stderr:
        talk.append(line)
        if line.startswith("search,"):
            threading.Timer(0.2, process.send_signal, [signal.SIGKILL]).start()
    watchdog.cancel()
    assert process.wait() == -signal.SIGKILL, "".join(talk)
    left = Run.open(killed)
    assert not left.finished
    before = len(left.scores())
    changes = {"trials": trials, "search_facts": Wish.search_facts}
    resumed = ask(killed, resume=True, **changes)
    assert len(resumed.scores()) > before > 0
    assert result(resumed) == result(ask(tmp_path / "whole", **changes))


# --------------------------------------------------------------------------------- refusals


def test_resume_refuses_another_question_and_names_what_changed(
    whole: Run, ask: Search, budget: int, tiny_folder: Path, tiny_space: ResolvedSpace,
    tmp_path: Path,
) -> None:  # fmt: skip
    before = {path.name: path.read_bytes() for path in whole.folder.iterdir()}
    other = load_whole(str(tiny_folder))
    with torch.no_grad():
        other.module.model.norm.weight[0] += 1
    changed = tmp_path / "changed"
    other.module.to(torch.bfloat16).save_pretrained(changed)
    other.tokenizer.save_pretrained(changed)
    moved = load_whole(str(changed))
    retrained = Model(**{**vars(moved), "name": str(tiny_folder)})
    for changes, named in (
        ({"budget": budget + 1}, f"budget_bytes was {budget} and is now {budget + 1}"),
        ({"seed": 3}, "seed was 0 and is now 3"),
        ({"sampler": "tpe"}, 'sampler was "level-switch" and is now "tpe"'),
        ({"search_facts": 12}, "search_facts was 30 and is now 12"),
        ({"model": moved}, "model was"),
        ({"model": retrained}, "fingerprint was"),
        ({"facts": FactSet(whole_facts(ask)[:-1], "fewer")}, "facts was"),
    ):
        with pytest.raises(RunError, match="answers another question") as caught:
            ask(whole.folder, resume=True, **changes)
        assert named in str(caught.value)
    assert {path.name: path.read_bytes() for path in whole.folder.iterdir()} == before


def whole_facts(ask: Search) -> tuple[Any, ...]:
    assert ask.__closure__ is not None
    found = [cell.cell_contents for cell in ask.__closure__]
    return next(content.facts for content in found if isinstance(content, FactSet))


def test_more_trials_are_no_other_question(ask: Search, tmp_path: Path, whole: Run) -> None:
    ask(tmp_path / "run", trials=2)
    assert result(ask(tmp_path / "run", resume=True))["search"] == result(whole)["search"]


def test_an_existing_folder_is_refused_unless_resumed(whole: Run, ask: Search) -> None:
    with pytest.raises(RunError, match="--resume"):
        ask(whole.folder)


def test_resuming_what_is_no_run_is_refused(ask: Search, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run folder"):
        ask(tmp_path / "nothing", resume=True)
    assert not (tmp_path / "nothing").exists()


def test_a_second_search_in_the_folder_is_refused_while_one_runs(whole: Run, ask: Search) -> None:
    before = result(whole)
    with whole.locked(), pytest.raises(RunError, match="another search is running"):
        ask(whole.folder, resume=True)
    assert result(whole) == before


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"budget": 100}, InfeasibleError, "below the smallest reachable size"),
        ({"trials": -1}, UsageError, "trials -1"),
        ({"search_facts": 1}, UsageError, "search facts 1"),
        ({"sampler": "tpee"}, UsageError, "did you mean 'tpe'"),
        ({"quantizer": "roundin"}, UsageError, "rounding"),
        ({"seed": -1}, UsageError, "seed -1"),
        ({"budget": "12"}, UsageError, "has no unit"),
    ],
)
def test_an_impossible_wish_is_refused_before_anything_is_written(
    changes: dict[str, Any],
    error: type[MpsearchError],
    named: str,
    ask: Search,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forbidden(*_: Any) -> Evaluation:
        raise AssertionError("it evaluated before refusing")

    monkeypatch.setattr(Bench, "evaluate", forbidden)
    with pytest.raises(error, match=named):
        ask(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_a_budget_that_is_too_small_names_the_range_and_a_way_that_works(
    tiny_space: ResolvedSpace,
) -> None:
    smallest = tiny_space.stored_bytes(tiny_space.smallest)
    check_wish(tiny_space, Wish(smallest))
    with pytest.raises(InfeasibleError) as caught:
        check_wish(tiny_space, Wish(smallest - 1))
    message = str(caught.value)
    assert f"{smallest:,} bytes" in message
    assert "to 83.97 KiB" in message
    way = message.rpartition("at least ")[2].split(" or ")[0]
    check_wish(tiny_space, Wish(way))


# ---------------------------------------------------------------------------- broken candidates


def _break(monkeypatch: pytest.MonkeyPatch, broken: Callable[[Assignment], bool]) -> list[str]:
    """Give some candidates NaN weights; returns the ids that were asked, as they come."""
    evaluate: BenchEvaluate = Bench.evaluate
    asked: list[str] = []

    def evaluate_or_break(bench: Bench, assignment: Assignment, proxy: RecallProxy) -> Evaluation:
        if broken(assignment):
            asked.append(assignment.id)
            bench.put(assignment)
            layer = bench.space.groups[0].layers[0].name
            place = bench.bank.model.places[layer]
            bench._in_place[layer] = "broken"  # so that the next candidate replaces it
            place.put(torch.full_like(place.weight, float("nan")))
            proxy.score()
            raise AssertionError("NaN weights were scored")
        return evaluate(bench, assignment, proxy)

    monkeypatch.setattr(Bench, "evaluate", evaluate_or_break)
    return asked


def test_nan_candidates_are_failed_trials_and_the_search_goes_on(
    whole: Run, ask: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    baselines = {
        Assignment.of(t.params) for t in study_of(whole).trials if t.user_attrs["kind"] != "search"
    }
    last = next(iter(baselines)).pairs[-1][0]
    uniform3 = {Assignment.of(dict.fromkeys(whole.space.options, "int3-g64"))}

    def broken(assignment: Assignment) -> bool:
        searched = assignment not in baselines
        return assignment in uniform3 or (searched and assignment[last] != "int8-g64")

    with monkeypatch.context() as patch:
        asked = _break(patch, broken)
        run = ask(tmp_path / "run", trials=10)
        counts = Counter(asked)
        assert max(counts[a] for a in counts if a not in {u.id for u in uniform3}) == 1
        # A refusal is remembered: resuming a finished search asks no refused proposal again.
        asked.clear()
        ask(tmp_path / "run", trials=10, resume=True)
        assert set(asked) <= {u.id for u in uniform3}
    states = Counter(t.state.name for t in study_of(run).trials)
    assert states["FAIL"] >= 2
    assert set(states) == {"FAIL", "COMPLETE"}
    assert len(proposals(run)) == 10
    for trial in study_of(run).trials:
        refused = broken(Assignment.of(trial.params))
        assert (trial.state.name == "FAIL") == refused == ("refused" in trial.user_attrs)
        assert not (refused and trial.values)
    assert not any(broken(score.assignment) for score in run.scores())
    assert "NaN" not in (run.folder / "evaluations.jsonl").read_text(encoding="utf-8")
    front = run.front()
    assert front.pick is not None
    assert not any(broken(point.assignment) for point in front.points)


def test_an_interrupted_search_with_nan_candidates_resumes_to_the_same_front(
    ask: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(assignment: Assignment) -> bool:
        return len({*assignment.values()}) > 1 and int(assignment.id, 16) % 2 == 0

    _break(monkeypatch, broken)
    expected = result(ask(tmp_path / "whole"))
    for number in (9, 12):
        with monkeypatch.context() as patch:
            interrupt_at(patch, Bench, "evaluate", number)
            with pytest.raises(KeyboardInterrupt):
                ask(tmp_path / f"cut{number}")
        assert result(ask(tmp_path / f"cut{number}", resume=True)) == expected


def test_a_reference_that_knows_nothing_is_a_failed_check(
    ask: Search, tiny_facts: FactSet, tmp_path: Path
) -> None:
    facts = tuple(f for f in tiny_facts.facts if f.relation == "color")
    answers = [fact.answer for fact in facts]
    shuffled = tuple(
        type(fact)(fact.relation, fact.template, fact.subject, answers[(i * 7 + 5) % len(answers)])
        for i, fact in enumerate(facts)
    )
    with pytest.raises(CheckError, match="no relation better than chance"):
        ask(tmp_path / "run", facts=FactSet(shuffled, "shuffled answers"))


def test_what_cannot_be_exported_is_said_before_the_search(
    tiny_facts: FactSet, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with pytest.raises(CheckError):  # random weights know nothing
        search(
            tiny_family("gpt2"),
            SearchSpace.default(),
            budget="1MiB",
            out=tmp_path / "run",
            facts=tiny_facts,
        )
    assert "8 of 8 layers are stored transposed or are stacked experts" in caplog.text
