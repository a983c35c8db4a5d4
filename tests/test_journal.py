"""A run's study: nobody else's, never damaged further, ended when nothing is left to try."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from searches import interrupted_at

from mpsearch.assignment import Assignment
from mpsearch.errors import RunError
from mpsearch.facts import FactSet
from mpsearch.journal import open_study, tried
from mpsearch.layers import Layer
from mpsearch.models import Model
from mpsearch.points import NONE_SEARCHED
from mpsearch.run import Run
from mpsearch.search import search
from mpsearch.space import ResolvedSpace, SearchSpace
from mpsearch.study import SearchStudy
from mpsearch.trials import KILLED, distributions

Search = Callable[..., Run]


@dataclass(frozen=True)
class Shapes:
    """Layers without a model."""

    layers: tuple[Layer, ...] = tuple(Layer(f"m.{block}.fc", 64, 64) for block in range(3))
    embedding: Layer | None = None
    head: Layer | None = None
    kept_bytes: int = 1000


@pytest.fixture
def space() -> ResolvedSpace:
    return SearchSpace.default().resolve(Shapes())


@pytest.fixture
def run(space: ResolvedSpace, tmp_path: Path) -> Run:
    return Run.create(tmp_path / "run", {}, space)


def other_study(run: Run, name: str = "mpsearch", objectives: int = 2) -> optuna.Study:
    return optuna.create_study(
        study_name=name,
        storage=JournalStorage(JournalFileBackend(str(run.journal))),
        directions=["minimize"] * objectives,
    )


def refused(run: Run, space: ResolvedSpace, match: str) -> None:
    """One line that says what to do, and a journal that lost nothing."""
    before = run.journal.read_bytes()
    with pytest.raises(RunError, match=match) as caught:
        open_study(run, space)
    assert "journal.log" in str(caught.value)
    assert "move it away and continue with --resume" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert run.journal.read_bytes().startswith(before)  # Optuna notes that it was opened


def test_a_study_whose_trials_are_of_another_space_is_refused(
    run: Run, space: ResolvedSpace
) -> None:
    study = other_study(run)
    study.add_trial(
        optuna.create_trial(
            params={"x": 1.0},
            distributions={"x": optuna.distributions.FloatDistribution(0, 2)},
            values=[1.0, 2.0],
        )
    )
    refused(run, space, "holds trial 0 of another search space")


def test_a_study_of_formats_that_the_space_has_not_is_refused(
    run: Run, space: ResolvedSpace
) -> None:
    text = "version: 1\ntarget: compressed-tensors\nformats: [int4-g32]\n"
    other = SearchSpace.parse(text, "other").resolve(Shapes())
    assert set(other.options) == set(space.options)
    other_study(run).add_trial(
        optuna.create_trial(
            params=dict(other.smallest), distributions=distributions(other), values=[1.0, 2.0]
        )
    )
    refused(run, space, "holds trial 0 of another search space")


def test_a_study_of_one_objective_is_refused(run: Run, space: ResolvedSpace) -> None:
    other_study(run, objectives=1)
    refused(run, space, "of a study with other objectives")


@pytest.mark.parametrize("fault", ["not json\n", '{"op_code": 99}\n', "{}\n", "[]\n"])
def test_a_journal_damaged_in_the_middle_is_refused(
    fault: str, run: Run, space: ResolvedSpace
) -> None:
    study = open_study(run, space)
    study.ask(distributions(space))
    lines = run.journal.read_text(encoding="utf-8").splitlines(keepends=True)
    run.journal.write_text("".join([*lines[:3], fault, *lines[3:]]), encoding="utf-8")
    refused(run, space, "cannot be read")


def test_another_study_in_the_journal_is_left_alone(run: Run, space: ResolvedSpace) -> None:
    other_study(run, "someone's", objectives=1)
    assert open_study(run, space).get_trials() == []


def test_what_was_refused_counts_as_tried_and_what_a_kill_cut_does_not(
    run: Run, space: ResolvedSpace
) -> None:
    study = open_study(run, space)
    killed = study.ask(distributions(space))
    bad = study.ask(distributions(space))
    bad.set_user_attr("refused", "NaN")
    study.tell(bad, state=optuna.trial.TrialState.FAIL)
    again = open_study(run, space)
    # What was proposed and not measured is proposed again.
    assert [trial.state.name for trial in again.get_trials()] == ["FAIL", "FAIL", "WAITING"]
    assert dict(again.ask(distributions(space)).params) == dict(killed.params)
    assert tried(again, space) == {Assignment.of(bad.params)} - {Assignment.of(killed.params)}


def test_what_a_kill_left_between_refusal_and_its_state_is_not_proposed_again(
    run: Run, space: ResolvedSpace
) -> None:
    study = open_study(run, space)
    study.ask(distributions(space)).set_user_attr("refused", "NaN")
    again = open_study(run, space)
    assert [trial.state.name for trial in again.get_trials()] == ["FAIL"]
    assert len(tried(again, space)) == 1


def test_a_kill_while_clearing_up_after_a_kill_asks_for_the_proposal_once(
    run: Run, space: ResolvedSpace
) -> None:
    killed = open_study(run, space).ask(distributions(space))
    for method in ("enqueue_trial", "tell"):
        with interrupted_at(optuna.Study, method, 1):
            open_study(run, space)
    trials = open_study(run, space).get_trials()
    assert [trial.state.name for trial in trials] == ["FAIL", "WAITING"]
    assert trials[0].user_attrs == {KILLED: True}
    assert trials[1].system_attrs["fixed_params"] == killed.params


# ------------------------------------------------------------------------ nothing left to try


@pytest.fixture
def ask(tiny: Model, tiny_facts: FactSet, tmp_path: Path) -> Search:
    def asked(space: ResolvedSpace, budget: int, resume: bool = False, **changes: object) -> Run:
        return search(
            tiny, space, budget=budget, search_facts=20, facts=tiny_facts, out=tmp_path / "run",
            resume=resume, **{"trials": 10**6, **changes},
        )  # type: ignore[arg-type]  # fmt: skip

    return asked


@pytest.mark.parametrize("sampler", ["level-switch", "tpe"])
def test_a_budget_with_one_assignment_ends_at_once_and_says_so(
    sampler: str, ask: Search, tiny_space: ResolvedSpace, caplog: pytest.LogCaptureFixture
) -> None:
    run = ask(tiny_space, tiny_space.stored_bytes(tiny_space.smallest), sampler=sampler)
    assert run.finished
    assert [text for text in caplog.messages if "within the budget has been tried" in text]
    front = run.front()
    assert front.pick is not None
    assert front.pick.assignment == tiny_space.smallest
    assert (
        front.verdict
        == f"{NONE_SEARCHED} The {front.pick.kind} allocation {front.pick.id} is recommended."
    )
    assert run.points("test")
    lines = (run.folder / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()
    keys = [(row["partition"], json.dumps(row["assignment"])) for row in map(json.loads, lines)]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("at_once", [1, 5])
def test_a_small_space_is_tried_whole_and_nothing_twice(
    at_once: int, ask: Search, tiny_space: ResolvedSpace
) -> None:
    smallest = tiny_space.stored_bytes(tiny_space.smallest)
    steps = sorted(
        tiny_space.options[group.name][1].stored_bytes(group)
        - tiny_space.options[group.name][0].stored_bytes(group)
        for group in tiny_space.groups
    )
    budget = smallest + steps[1] + steps[0]
    run = ask(tiny_space, budget, at_once=at_once)
    study = open_study(run, tiny_space)
    proposed = [Assignment.of(t.params) for t in study.trials if t.user_attrs["kind"] == "search"]
    assert len(set(proposed)) == len(proposed) > 1
    trials = len(study.trials)
    assert open_study(ask(tiny_space, budget, resume=True), tiny_space).trials[trials:] == []


def test_a_journal_that_was_moved_away_costs_no_evaluation(
    ask: Search, tiny_space: ResolvedSpace, budget: int, tmp_path: Path
) -> None:
    run = ask(tiny_space, budget, trials=3)
    before = (run.folder / "evaluations.jsonl").read_bytes()
    run.journal.write_text("damaged\n" + run.journal.read_text(encoding="utf-8"))
    with pytest.raises(RunError, match=r"cannot be read.*move it away"):
        ask(tiny_space, budget, resume=True, trials=3)
    run.journal.rename(tmp_path / "away")
    assert ask(tiny_space, budget, resume=True, trials=3).finished
    assert (run.folder / "evaluations.jsonl").read_bytes() == before


@pytest.mark.parametrize("gone", ["journal", "line"])
def test_a_proposal_whose_record_is_gone_is_still_a_finalist(
    gone: str, ask: Search, tiny_space: ResolvedSpace, budget: int, tmp_path: Path
) -> None:
    with interrupted_at(SearchStudy, "finalists", 1):
        ask(tiny_space, budget, trials=4)
    run = Run.open(tmp_path / "run")
    if gone == "journal":
        run.journal.unlink()
    else:
        path = run.folder / "evaluations.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        searched = [line for line in lines if json.loads(line)["kind"] == "search"]
        path.write_text("".join(line for line in lines if line not in searched), encoding="utf-8")
    front = ask(tiny_space, budget, resume=True, trials=0).front()
    assert any(point.kind == "search" for point in front.points)
    again = open_study(run, tiny_space).trials
    ask(tiny_space, budget, resume=True, trials=0)
    assert len(open_study(run, tiny_space).trials) == len(again)
