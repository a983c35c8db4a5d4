"""What a search refuses, and how it goes on where a candidate gives NaN."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_family
from searches import (
    Search,
    interrupted_at,
    proposals,
    result,
    study_of,
)

from mpsearch.assignment import Assignment
from mpsearch.errors import CheckError, InfeasibleError, MpsearchError, RunError, UsageError
from mpsearch.evaluate import Bench, Evaluation
from mpsearch.facts import FactSet
from mpsearch.models import Model, load_whole
from mpsearch.recall import RecallProxy
from mpsearch.run import Run
from mpsearch.search import search
from mpsearch.space import ResolvedSpace, SearchSpace
from mpsearch.wish import Wish, check_wish

BenchEvaluate = Callable[[Bench, Assignment, RecallProxy], Evaluation]


def test_resume_refuses_another_question_and_names_what_changed(
    searched: Run, ask: Search, budget: int, tiny_folder: Path, tiny_facts: FactSet,
    tmp_path: Path,
) -> None:  # fmt: skip
    before = {path.name: path.read_bytes() for path in searched.folder.iterdir()}
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
        ({"facts": FactSet(tiny_facts.facts[:-1], "fewer")}, "facts was"),
    ):
        with pytest.raises(RunError, match="answers another question") as caught:
            ask(searched.folder, resume=True, **changes)
        assert named in str(caught.value)
    assert {path.name: path.read_bytes() for path in searched.folder.iterdir()} == before


def test_more_trials_are_no_other_question(ask: Search, tmp_path: Path, searched: Run) -> None:
    ask(tmp_path / "run", trials=2)
    assert result(ask(tmp_path / "run", resume=True))["search"] == result(searched)["search"]


def test_the_same_weights_at_another_path_are_no_other_question(
    searched: Run, ask: Search, tiny: Model
) -> None:
    expected = result(searched)
    moved = Model(**{**vars(tiny), "name": f"{tiny.name}/"})
    assert result(ask(searched.folder, resume=True, model=moved)) == expected


def test_numbers_of_numpy_are_numbers(ask: Search, budget: int, tmp_path: Path) -> None:
    run = ask(tmp_path / "run", budget=np.int64(budget), seed=np.int64(3), trials=np.int32(1))
    assert Run.open(run.folder).question["seed"] == 3


def test_an_existing_folder_is_refused_unless_resumed(searched: Run, ask: Search) -> None:
    with pytest.raises(RunError, match="--resume"):
        ask(searched.folder)


def test_resuming_what_is_no_run_is_refused(ask: Search, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run folder"):
        ask(tmp_path / "nothing", resume=True)
    assert not (tmp_path / "nothing").exists()


def test_a_second_search_in_the_folder_is_refused_while_one_runs(
    searched: Run, ask: Search
) -> None:
    before = result(searched)
    with searched.locked(), pytest.raises(RunError, match="another search is running"):
        ask(searched.folder, resume=True)
    assert result(searched) == before


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
        ({"budget": 51200.0}, UsageError, r"budget 51200.0: a whole number .* '96 MiB'"),
        ({"seed": 1.5}, UsageError, "seed 1.5: a whole number"),
        ({"seconds": -1.0}, UsageError, "seconds -1.0"),
        ({"seconds": float("nan")}, UsageError, "seconds nan"),
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
    searched: Run, ask: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    baselines = {score.assignment for score in searched.scores() if score.kind != "search"}
    last = next(iter(baselines)).pairs[-1][0]
    uniform3 = {Assignment.of(dict.fromkeys(searched.space.options, "int3-g64"))}

    def broken(assignment: Assignment) -> bool:
        proposed = assignment not in baselines
        return assignment in uniform3 or (proposed and assignment[last] != "int8-g64")

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
        with interrupted_at(Bench, "evaluate", number):
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
    assert not (tmp_path / "run").exists()


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
