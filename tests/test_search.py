"""A search on the tiny model: baselines, honest facts, slopes, what it says of itself."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from optuna.trial import TrialState
from searches import (
    SEARCH_FACTS,
    SEARCH_TRIALS,
    Search,
    evaluation_lines,
    proposals,
    result,
    study_of,
)

import mpsearch.scorer
import mpsearch.stages
import mpsearch.wish
from mpsearch.allocate import greedy, knapsack, uniform
from mpsearch.assignment import Assignment
from mpsearch.errors import CheckError
from mpsearch.evaluate import Bench, Evaluation
from mpsearch.facts import FactSet
from mpsearch.forecast import Forecast
from mpsearch.measures import Sensitivity
from mpsearch.models import Model
from mpsearch.points import NONE_SEARCHED, SIMPLE_KINDS
from mpsearch.recall import RecallProxy
from mpsearch.run import Run
from mpsearch.slopes import measure_slopes
from mpsearch.space import ResolvedSpace
from mpsearch.study import SearchStudy
from mpsearch.trials import HOPELESS_LOSS


def test_every_simple_allocation_is_a_row(
    searched: Run, ask: Search, tiny_space: ResolvedSpace, budget: int, tmp_path: Path
) -> None:
    path = searched.folder / "sensitivity.json"
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
    assert Counter(p.kind for p in searched.points())["search"] >= 1


def test_search_facts_are_asked_of_the_simple_allocations_that_fit(searched: Run) -> None:
    def sizes(partition: str) -> set[int]:
        return {
            searched.space.stored_bytes(score.assignment)
            for score in searched.scores()
            if score.partition == partition and score.kind in SIMPLE_KINDS
        }

    assert sizes("search") == {n for n in sizes("validation") if n <= searched.budget_bytes}
    assert max(sizes("validation")) > searched.budget_bytes


def test_every_searched_proposal_fits_the_budget_and_is_asked_once(
    searched: Run, tiny_space: ResolvedSpace, budget: int
) -> None:
    proposed = proposals(searched)
    assert len(proposed) == SEARCH_TRIALS
    assert max(tiny_space.stored_bytes(p) for p in proposed) <= budget
    assert len({Assignment.of(p) for p in proposed}) == SEARCH_TRIALS


def test_nothing_is_evaluated_twice(
    searched: Run, calls: Counter[Assignment], ask: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = evaluation_lines(searched)
    keys = [(line["partition"], Assignment.of(line["assignment"])) for line in lines]
    assert len(set(keys)) == len(keys) == calls.total()

    def forbidden(*_: Any) -> Evaluation:
        raise AssertionError("a finished search has nothing left to evaluate")

    before = result(searched)
    monkeypatch.setattr(Bench, "evaluate", forbidden)
    assert result(ask(searched.folder, resume=True)) == before
    assert evaluation_lines(searched) == lines


def test_the_pick_fits_and_is_not_worse_than_the_best_simple_point(
    searched: Run, budget: int
) -> None:
    front = searched.front()
    assert front.pick is not None
    assert front.pick.stored_bytes <= budget
    fitting = [p for p in front.points if p.kind in SIMPLE_KINDS and p.stored_bytes <= budget]
    assert front.pick.answer_loss.mean <= min(p.answer_loss.mean for p in fitting)
    assert searched.finished


def test_the_model_holds_its_reference_weights_afterwards(searched: Run, tiny: Model) -> None:
    for layer, original in tiny.originals.items():
        assert tiny.places[layer].weight.data_ptr() == original.data_ptr()
        assert not tiny.places[layer].parameter.requires_grad


def test_each_partition_sees_its_own_facts(searched: Run, tiny_facts: FactSet) -> None:
    partition_of = {fact.subject: fact.partition for fact in tiny_facts.facts}
    subjects = searched.content["subjects"]
    assert set(subjects) == {"search", "validation", "test"}
    for partition, asked in subjects.items():
        assert asked
        assert {partition_of[subject] for subject in asked} == {partition}
        assert len(asked) == len(searched.relations(partition))
    assert len(subjects["search"]) <= SEARCH_FACTS
    for line in evaluation_lines(searched):
        assert len(line["loss_per_fact"]) == len(subjects[line["partition"]])


def test_test_facts_are_read_last_and_only_for_the_pick_and_its_rivals(searched: Run) -> None:
    front = searched.front()
    assert front.pick is not None
    fitting = [p for p in front.points if p.stored_bytes <= searched.budget_bytes]
    rivals = {
        min((p for p in fitting if p.kind == kind), key=lambda p: p.answer_loss.mean).id
        for kind in ("uniform", "greedy", "knapsack")
        if any(p.kind == kind for p in fitting)
    }
    assert len(rivals) > 1
    partitions = [line["partition"] for line in evaluation_lines(searched)]
    read = [
        Assignment.of(line["assignment"]).id
        for line in evaluation_lines(searched)
        if line["partition"] == "test"
    ]
    assert sorted(read) == sorted({front.pick.id, *rivals})
    assert "test" not in partitions[: -len(read)]
    for partition in ("validation", "test"):
        reference = searched.content[f"reference_{partition}"]
        assert reference["recall"] > reference["chance"] > 0


def test_validation_facts_are_read_for_baselines_and_a_few_finalists_only(searched: Run) -> None:
    lines = evaluation_lines(searched)
    validated = [line for line in lines if line["partition"] == "validation"]
    finalists = [
        Assignment.of(line["assignment"]).id for line in validated if line["kind"] == "search"
    ]
    proposed = {Assignment.of(p).id for p in proposals(searched)}
    assert 1 <= len(finalists) <= 8
    assert set(finalists) <= proposed
    assert [p.id for p in searched.front().points if p.kind == "search"]


def test_another_seed_searches_elsewhere(searched: Run, ask: Search, tmp_path: Path) -> None:
    other = ask(tmp_path / "run", seed=1)
    assert proposals(other) != proposals(searched)


def test_with_no_trials_the_simple_allocations_stand(ask: Search, tmp_path: Path) -> None:
    run = ask(tmp_path / "run", trials=0)
    front = run.front()
    assert front.pick is not None
    assert front.pick.kind in SIMPLE_KINDS
    assert (
        front.verdict
        == f"{NONE_SEARCHED} The {front.pick.kind} allocation {front.pick.id} is recommended."
    )
    assert not any(point.kind == "search" for point in front.points)


def test_a_run_keeps_what_greedy_and_the_knapsack_allocate_at_the_budget(searched: Run) -> None:
    damage = Sensitivity.load(searched.folder / "sensitivity.json").fisher_nats
    budget = searched.budget_bytes
    assert searched.at_budget == {
        "greedy": greedy(searched.space, damage, budget).id,
        "knapsack": knapsack(searched.space, damage, [budget])[0].id,
    }


def test_a_time_limit_ends_the_proposals_and_not_the_report(ask: Search, tmp_path: Path) -> None:
    run = ask(tmp_path / "run", trials=10**6, seconds=0.05)
    assert run.finished
    assert len(proposals(run)) < 50
    assert run.points("test")


def test_a_limit_of_time_alone_takes_the_place_of_a_number_of_trials(
    ask: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mpsearch.wish, "TRIALS", 1)
    assert len(proposals(ask(tmp_path / "by count", trials=None))) == 1
    said: list[tuple[str, int, int]] = []
    run = ask(
        tmp_path / "by time", trials=None, seconds=2.0, report=lambda *told: said.append(told)
    )
    assert len(proposals(run)) > 1
    expected = [total for stage, _, total in said if stage.startswith("search")]
    assert expected[-1] == len(proposals(run))
    assert max(expected) < 10**6


@pytest.mark.parametrize("sampler", ["nsga2", "tpe"])
def test_optunas_samplers_search_too_and_are_told_what_is_over_the_budget(
    sampler: str, ask: Search, tmp_path: Path
) -> None:
    run = ask(tmp_path / "run", sampler=sampler)
    assert len(proposals(run)) == SEARCH_TRIALS
    assert run.front().pick is not None
    for trial in study_of(run).trials:
        over_budget = run.space.stored_bytes(trial.params) - run.budget_bytes
        assert list(trial.constraints.values()) == [over_budget]


def test_candidates_that_cannot_win_are_stopped_after_a_part_of_the_relations(
    ask: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mpsearch.stages, "_LEAST_RELATIONS", 1)
    monkeypatch.setattr(mpsearch.scorer, "hopeless", lambda *_: 0.25)
    run = ask(tmp_path / "run")
    trials = [t for t in study_of(run).trials if t.user_attrs["kind"] == "search"]
    assert len(trials) == SEARCH_TRIALS
    assert {t.state for t in trials} == {TrialState.PRUNED}
    told = [t for t in study_of(run).trials if t.state == TrialState.COMPLETE]
    size = run.space.stored_bytes
    for trial in trials:
        fitting = [t.values[0] for t in told if t.values[1] <= size(Assignment.of(trial.params))]
        assert trial.user_attrs[HOPELESS_LOSS] == min(fitting) + 0.25
        assert 0 < trial.user_attrs["fact_tokens"] < max(t.user_attrs["fact_tokens"] for t in told)
    assert {s.kind for s in run.scores() if s.partition == "search"} == {*SIMPLE_KINDS}
    assert run.front().verdict.startswith(NONE_SEARCHED)
    forecasts: list[Forecast] = []
    ask(tmp_path / "run", resume=True, estimated=forecasts.append)
    assert {(found.trials, found.finalists, found.test) for found in forecasts} == {(0, 0.0, 0.0)}


def test_finalists_are_different_though_a_sampler_repeats_itself(
    searched: Run, ask: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finalists = SearchStudy.finalists

    def repeated(work: SearchStudy) -> None:
        every = work.study.get_trials
        monkeypatch.setattr(work.study, "get_trials", lambda **asked: 2 * every(**asked))
        finalists(work)

    monkeypatch.setattr(SearchStudy, "finalists", repeated)
    run = ask(tmp_path / "run")
    assert result(run)["points"] == result(searched)["points"]


def test_a_proposal_that_repeats_a_simple_allocation_takes_no_finalists_place(
    ask: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = SearchStudy.loop

    def repeating(work: SearchStudy, *given: Any) -> None:
        fitting = [t for t in work.study.trials if t.values[1] <= work.wish.budget_bytes]
        work.study.enqueue_trial(fitting[0].params)
        loop(work, *given)

    monkeypatch.setattr(SearchStudy, "loop", repeating)
    said: list[tuple[str, int, int]] = []
    run = ask(tmp_path / "run", trials=1, sampler="tpe", report=lambda *told: said.append(told))
    assert len(proposals(run)) == 1
    assert ("finalists on validation facts", 0, 0) in said


def test_what_another_process_left_in_the_run_is_kept(
    ask: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(tmp_path / "run", trials=2)
    check = Run.check_question

    def meanwhile(run: Run, question: dict[str, Any]) -> None:
        check(run, question)
        other = Run.open(run.folder)
        other.content["noted"] = "by another process"
        other.save()

    monkeypatch.setattr(Run, "check_question", meanwhile)
    assert ask(tmp_path / "run", trials=2, resume=True).content["noted"] == "by another process"


def test_facts_asked_in_stages_give_the_losses_of_facts_asked_at_once(
    searched: Run, ask: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mpsearch.stages, "_LEAST_RELATIONS", 1)
    monkeypatch.setattr(mpsearch.scorer, "hopeless", lambda *_: None)
    staged = ask(tmp_path / "run", trials=0)
    at_once = {s.assignment: s for s in searched.scores() if s.partition == "search"}
    for score in staged.scores():
        if score.partition == "search":
            same = at_once[score.assignment]
            assert score.loss_per_fact == pytest.approx(same.loss_per_fact, abs=0.05)
            assert score.kl_nats == pytest.approx(same.kl_nats, abs=0.05)


def test_a_search_measures_slopes_and_says_how_well_it_foresaw(searched: Run) -> None:
    slopes = {k: v for k, v in study_of(searched).user_attrs.items() if k.startswith("slopes ")}
    assert slopes
    tokens = max(t.user_attrs["fact_tokens"] for t in study_of(searched).trials)
    assert all(held["fact_tokens"] == 3 * tokens for held in slopes.values())
    foreseen = searched.content["foresight"]
    assert foreseen["trials"] >= 3
    assert foreseen["error_nats"] >= 0


def _a_stage_a_relation(relations: Sequence[str]) -> list[NDArray[Any]]:
    """From the last relation to the first, so that stages are not in the order of facts."""
    names = np.array(relations)
    return [np.flatnonzero(names == name) for name in reversed(dict.fromkeys(relations))]


def test_a_candidate_is_compared_on_all_facts_that_it_has_been_asked(
    ask: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[NDArray[Any], tuple[str, ...]]] = []

    def in_the_second_stage(
        losses: NDArray[Any], best: NDArray[Any], relations: Sequence[str], total: int
    ) -> float | None:
        assert total == 3 and len(losses) == len(best) == len(relations)
        assert list(losses) != list(best)
        seen.append((best, tuple(relations)))
        return None if len(set(relations)) == 1 else 0.25

    monkeypatch.setattr(mpsearch.scorer, "stages", _a_stage_a_relation)
    monkeypatch.setattr(mpsearch.scorer, "hopeless", in_the_second_stage)
    run = ask(tmp_path / "run", trials=2)
    names = np.array(run.relations("search"))
    known = {s.assignment: s.objective_per_fact for s in run.scores() if s.partition == "search"}
    assert [len(set(relations)) for _, relations in seen] == [1, 2, 1, 2]
    for best, relations in seen:
        places = np.concatenate(_a_stage_a_relation(names)[: len(set(relations))])
        assert relations == tuple(names[places])
        assert any(list(best) == list(losses[places]) for losses in known.values())
    trials = study_of(run).trials
    whole = max(t.user_attrs["fact_tokens"] for t in trials)
    stopped = [t.user_attrs["fact_tokens"] for t in trials if HOPELESS_LOSS in t.user_attrs]
    assert len(stopped) == 2 and all(whole / 2 < tokens < whole for tokens in stopped)


def test_slopes_are_of_half_of_the_relations_and_then_of_the_other_half(
    ask: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, list[set[str]]] = {}

    def recorded(
        bench: Bench, assignment: Assignment, proxies: Sequence[RecallProxy]
    ) -> dict[tuple[str, str], float]:
        relations = {name for proxy in proxies for name in proxy.relations}
        asked.setdefault(assignment.id, []).append(relations)
        return measure_slopes(bench, assignment, proxies)

    monkeypatch.setattr(mpsearch.scorer, "stages", _a_stage_a_relation)
    monkeypatch.setattr(mpsearch.scorer, "measure_slopes", recorded)
    monkeypatch.setattr(mpsearch.scorer, "hopeless", lambda *_: 0.25)  # the best stays
    run = ask(tmp_path / "run", trials=20)
    third, second, first = dict.fromkeys(run.relations("search"))
    ((one, other),) = asked.values()
    assert sorted(map(len, (one, other))) == [1, 2]
    assert one | other == {first, second, third}
    slopes = {k: v for k, v in study_of(run).user_attrs.items() if k.startswith("slopes ")}
    simple = len(study_of(run).trials) - 20
    assert [held["after"] for held in slopes.values()] == [simple, simple + 6]


def test_a_search_goes_on_without_slopes_that_are_no_numbers(
    ask: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise CheckError("the slopes at assignment x are NaN or infinite")

    monkeypatch.setattr(mpsearch.scorer, "measure_slopes", broken)
    assert len(proposals(ask(tmp_path / "run"))) == SEARCH_TRIALS
    assert "goes on without them" in caplog.text


def test_progress_counts_every_stage_to_its_end(ask: Search, tmp_path: Path) -> None:
    last: dict[str, tuple[int, int]] = {}

    def report(stage: str, done: int, total: int) -> None:
        assert 0 <= done <= total
        last[stage.split(",")[0]] = (done, total)

    ask(tmp_path / "run", report=report)
    assert last["search"] == (SEARCH_TRIALS, SEARCH_TRIALS)
    assert {"sensitivity", "finalists on validation facts", "test facts"} <= set(last)
    assert all(done == total for stage, (done, total) in last.items() if stage != "baselines")
