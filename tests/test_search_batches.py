"""Proposals in batches: the same front block by block as loaded, and after any kill."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from searches import Search, evaluation_lines, interrupted_at, proposals, result, study_of
from torch import Tensor

import mpsearch.scorer
import mpsearch.stages
from mpsearch.assignment import Assignment
from mpsearch.errors import RunError, UsageError
from mpsearch.estimates import relation_mean
from mpsearch.evaluate import Bench
from mpsearch.models import Model
from mpsearch.run import Run
from mpsearch.skeleton import load_skeleton
from mpsearch.trials import HOPELESS_LOSS
from mpsearch.walk import Held, Walk

AT_ONCE = 3
TRIALS = 7  # two batches and a rest


@pytest.fixture(scope="module")
def batched(ask: Search, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The uninterrupted search of the loaded model that others are compared with."""
    return ask(tmp_path_factory.mktemp("batched") / "run", trials=TRIALS, at_once=AT_ONCE)


@pytest.fixture
def streamed(tiny_folder: Path, tiny: Model) -> Model:
    return load_skeleton(str(tiny_folder), device=tiny.device, dtype=tiny.dtype)


def again(ask: Search, out: Path, **changes: Any) -> Run:
    return ask(out, trials=TRIALS, **{"at_once": AT_ONCE, **changes})


def test_a_batch_is_of_different_proposals_that_know_nothing_of_each_other(batched: Run) -> None:
    proposed = [tuple(sorted(params.items())) for params in proposals(batched)]
    assert len(set(proposed)) == len(proposed) == TRIALS
    trials = [t for t in study_of(batched).trials if t.user_attrs.get("kind") == "search"]
    for first in range(0, TRIALS, AT_ONCE):
        batch = trials[first : first + AT_ONCE]
        assert max(t.datetime_start for t in batch) < min(t.datetime_complete for t in batch)
        if later := trials[first + AT_ONCE :]:
            assert max(t.datetime_complete for t in batch) < later[0].datetime_start


def test_what_is_lowered_is_answer_loss_and_twice_the_prompt_kl(batched: Run) -> None:
    scores = {s.assignment: s for s in batched.scores() if s.partition == "search"}
    relations = batched.relations("search")
    told = [t for t in study_of(batched).trials if t.state == TrialState.COMPLETE]
    assert told
    for trial in told:
        score = scores[Assignment.of(trial.params)]
        lost, prompt_kl = (relation_mean(part, relations).mean
                           for part in (score.loss_per_fact, score.prompt_kl_per_fact))  # fmt: skip
        assert trial.values[0] == pytest.approx(lost + 2 * prompt_kl, abs=1e-12)
        assert prompt_kl > 0


@pytest.mark.parametrize(
    ("owner", "method", "number", "after"),
    [
        (Bench, "evaluate", 20, False),
        (Bench, "evaluate", 24, True),
        (optuna.Study, "ask", 2, True),  # part of a batch was asked for
        (optuna.Study, "ask", 3, False),
        (optuna.Study, "ask", 5, True),
        (optuna.Study, "tell", 1, True),  # part of a batch was told
        (optuna.Study, "tell", 2, True),
        (optuna.Study, "tell", 5, True),
        (Run, "add", 23, True),
    ],
)
def test_a_batch_that_a_kill_broke_off_goes_on_to_the_same_front(
    owner: type, method: str, number: int, after: bool, batched: Run, ask: Search, tmp_path: Path
) -> None:
    expected = result(batched)
    with interrupted_at(owner, method, number, after):
        again(ask, tmp_path / "run")
    resumed = again(ask, tmp_path / "run", resume=True)
    assert result(resumed) == expected
    keys = [(line["partition"], str(line["assignment"])) for line in evaluation_lines(resumed)]
    assert len(set(keys)) == len(keys)


def test_stopped_candidates_of_a_batch_are_told_before_a_new_best(
    ask: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill has them measured again, and then against a best that may not be of their batch."""

    every_other = cycle([None, 0.25])
    monkeypatch.setattr(mpsearch.stages, "_LEAST_RELATIONS", 1)
    monkeypatch.setattr(mpsearch.scorer, "hopeless", lambda *_: next(every_other))
    run = again(ask, tmp_path / "run", at_once=TRIALS)
    trials = [t for t in study_of(run).trials if t.user_attrs["kind"] == "search"]
    in_order = sorted(trials, key=lambda t: t.datetime_complete)
    whole = [t.state == TrialState.COMPLETE for t in in_order]
    assert whole == sorted(whole) and len(set(whole)) == 2


def test_a_run_goes_on_with_the_batches_that_it_was_begun_with(
    batched: Run, ask: Search, tmp_path: Path
) -> None:
    with interrupted_at(Bench, "evaluate", 12):
        again(ask, tmp_path / "run")
    with pytest.raises(RunError, match="scores 3 proposals at once, and 2 are asked for"):
        again(ask, tmp_path / "run", resume=True, at_once=2)
    assert result(again(ask, tmp_path / "run", resume=True, at_once=None)) == result(batched)


def test_none_at_once_is_refused(ask: Search, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="scored at once 0: at least 1"):
        again(ask, tmp_path / "run", at_once=0)


# --------------------------------------------------------------------------- block by block


def test_a_streamed_model_is_searched_to_the_same_front(
    batched: Run, ask: Search, streamed: Model, tmp_path: Path
) -> None:
    run = again(ask, tmp_path / "run", model=streamed)
    assert result(run) == result(batched)
    assert proposals(run) == proposals(batched)
    tables = [(r.folder / "sensitivity.json").read_text(encoding="utf-8") for r in (run, batched)]
    assert tables[0] == tables[1]
    stopped = [[HOPELESS_LOSS in t.user_attrs for t in study_of(r).trials] for r in (run, batched)]
    assert stopped[0] == stopped[1]


def test_candidates_of_a_batch_share_its_walks(
    ask: Search, streamed: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    walks: list[int] = []
    run = Walk.run

    def counted(walk: Walk, candidates: Sequence[Held]) -> Iterator[Iterator[Tensor]]:
        walks.append(len(candidates))
        return run(walk, candidates)

    monkeypatch.setattr(Walk, "run", counted)
    again(ask, tmp_path / "run", model=streamed)
    assert max(walks) == AT_ONCE
    assert sum(count == AT_ONCE for count in walks) >= 4  # baselines twice, and two batches


@pytest.mark.parametrize("number", [8, 21, 34, 44])
def test_a_search_killed_in_the_middle_of_a_walk_goes_on_to_the_same_front(
    number: int, batched: Run, ask: Search, streamed: Model, tmp_path: Path
) -> None:
    with interrupted_at(Walk, "_through", number):
        again(ask, tmp_path / "run", model=streamed)
    assert all(p.untyped_storage().nbytes() <= 4 for p in streamed.module.model.layers.parameters())
    found = again(ask, tmp_path / "run", model=streamed, resume=True)
    assert result(found) == result(batched)


def test_a_run_begun_loaded_is_finished_block_by_block(
    batched: Run, ask: Search, streamed: Model, tmp_path: Path
) -> None:
    with interrupted_at(Bench, "evaluate", 22):
        again(ask, tmp_path / "run")
    assert result(again(ask, tmp_path / "run", model=streamed, resume=True)) == result(batched)
