"""A limit of text KL: measured of every trial, never broken by what is recommended, resumable."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from cli_cases import Cli, one_line

from mpsearch.assignment import Assignment
from mpsearch.bank import Bank
from mpsearch.errors import RunError, UsageError
from mpsearch.evaluate import Bench
from mpsearch.facts import FactSet
from mpsearch.fluency import TextScores
from mpsearch.guard import TextGuard
from mpsearch.models import Model
from mpsearch.quantizers.rounding import Rounding
from mpsearch.run import Run
from mpsearch.search import search
from mpsearch.space import ResolvedSpace
from mpsearch.text import Text
from mpsearch.trials import OVER_TEXT_KL

TRIALS = 8
Search = Callable[..., Run]


def written(paragraphs: int) -> tuple[str, ...]:
    """Sentences of the tiny model's words, which it has not seen in this order."""
    return tuple(
        f"the color of s{n} is red and the place of s{n + 1} is north of s{n + 2}"
        for n in range(paragraphs)
    )


TEXT = Text(written(12), "by hand")


@pytest.fixture(scope="module")
def ask(tiny: Model, tiny_space: ResolvedSpace, tiny_facts: FactSet, budget: int) -> Search:
    """The search that most tests ask for; keywords change the question."""

    def asked(out: Path, **changes: Any) -> Run:
        question = {
            "budget": budget, "trials": TRIALS, "search_facts": 30, "facts": tiny_facts,
            "text": TEXT,
        }  # fmt: skip
        return search(tiny, tiny_space, out=out, **{**question, **changes})

    return asked


@pytest.fixture(scope="module")
def free(ask: Search, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list[int]]:
    """A search without a limit, and how many paragraphs each read of text had."""
    read: list[int] = []
    score = TextGuard.score

    def counted(guard: TextGuard, *held: Any) -> TextScores:
        scores = score(guard, *held)
        read.append(len(scores.tokens))
        return scores

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextGuard, "score", counted)
        return ask(tmp_path_factory.mktemp("free") / "run"), read


@pytest.fixture(scope="module")
def text_kl(tiny: Model, tiny_space: ResolvedSpace) -> Callable[[Assignment, str], TextScores]:
    """What an assignment says of one half of the text, measured apart from any search."""
    guards = {half: TextGuard(tiny, getattr(TEXT, half)) for half in ("search", "held_out")}
    bank = Bank(tiny, Rounding())

    def measured(assignment: Assignment, half: str) -> TextScores:
        with Bench(tiny_space, bank) as bench:
            bench.put(assignment)
            return guards[half].score()

    return measured


@pytest.fixture(scope="module")
def limit(free: tuple[Run, list[int]], text_kl: Any, budget: int) -> float:
    """Between what the simple points within the budget say, so that some break it."""
    kl = sorted(
        text_kl(point.assignment, "search").kl.mean
        for point in free[0].points()
        if point.stored_bytes <= budget and point.kind != "search"
    )
    assert kl[0] < 0.7 * kl[-1]
    return float(np.sqrt(kl[0] * kl[-1]))


@pytest.fixture(scope="module")
def limited(ask: Search, limit: float, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return ask(tmp_path_factory.mktemp("limited") / "run", max_text_kl_nats=limit)


def trials_of(run: Run) -> list[optuna.trial.FrozenTrial]:
    backend = optuna.storages.journal.JournalFileBackend(str(run.journal))
    storage = optuna.storages.JournalStorage(backend)
    return optuna.load_study(study_name="mpsearch", storage=storage).trials


def result(run: Run) -> Any:
    front = run.front()
    figures = [(p.id, p.kind, p.answer_loss, p.text, p.over_text_kl) for p in front.points]
    return figures, front.pareto_ids, front.pick and front.pick.id, front.verdict


# ------------------------------------------------------------------------------ without a limit


def test_only_points_scored_on_validation_facts_read_text_and_all_of_them_do(
    free: tuple[Run, list[int]], text_kl: Any
) -> None:
    run, read = free
    for score in run.scores():
        assert (score.text is not None) == (score.partition == "validation")
    # The reference, and once each point; never the search text.
    assert read == [len(TEXT.held_out)] * (1 + len(run.points()))
    for point in run.points():
        assert point.text == text_kl(point.assignment, "held_out")
        assert not point.over_text_kl
    assert not any(OVER_TEXT_KL in trial.constraints for trial in trials_of(run))
    about = run.content["reference_text"]
    assert (about["source"], about["paragraphs"]) == ("by hand", 6)
    assert about["perplexity"] > 1


def test_more_bits_say_more_of_what_the_reference_says(free: tuple[Run, list[int]]) -> None:
    uniforms = [p for p in free[0].points() if p.kind == "uniform"]
    kl = [p.text.kl.mean for p in uniforms if p.text]
    assert len(kl) == 4
    assert kl == sorted(kl, reverse=True)


# --------------------------------------------------------------------------------- with a limit


def test_every_trial_is_measured_on_search_text_and_told_to_the_study(
    limited: Run, limit: float, text_kl: Any
) -> None:
    trials = trials_of(limited)
    assert sum(t.user_attrs["kind"] == "search" for t in trials) == TRIALS
    for trial in trials:
        found = text_kl(Assignment.of(trial.params), "search")
        assert trial.constraints[OVER_TEXT_KL] == found.kl.mean - limit
    for score in limited.scores():
        half = {"search": "search", "validation": "held_out"}.get(score.partition)
        assert score.text == (half and text_kl(score.assignment, half))


def test_what_breaks_the_limit_is_shown_and_never_recommended(
    limited: Run, limit: float, text_kl: Any, budget: int
) -> None:
    front = limited.front()
    over = {p.id for p in front.points if text_kl(p.assignment, "search").kl.mean > limit}
    assert over
    assert {p.id for p in front.points if p.over_text_kl} == over
    assert not front.pareto_ids & over
    assert front.pick is not None
    assert front.pick.id not in over
    for point in front.points:
        assert front.best(max_bytes=max(point.stored_bytes, budget)).id not in over
        assert not (point.kind == "search" and point.over_text_kl)  # no finalist either


def test_a_pick_that_breaks_a_tighter_limit_is_no_pick(
    ask: Search, free: tuple[Run, list[int]], text_kl: Any, tmp_path: Path
) -> None:
    pick = free[0].front().pick
    assert pick is not None
    kl = text_kl(pick.assignment, "search").kl.mean
    front = ask(tmp_path / "run", trials=2, max_text_kl_nats=kl * 0.999).front()
    assert front.pick is None or front.pick.id != pick.id


@pytest.mark.parametrize("sampler", ["nsga2", "tpe"])
def test_optunas_samplers_are_told_of_the_limit_too(
    sampler: str, ask: Search, limit: float, text_kl: Any, tmp_path: Path
) -> None:
    run = ask(tmp_path / "run", sampler=sampler, trials=4, max_text_kl_nats=limit)
    for trial in trials_of(run):
        assert set(trial.constraints) == {"over_budget_bytes", OVER_TEXT_KL}
    pick = run.front().pick
    assert pick is not None
    assert text_kl(pick.assignment, "search").kl.mean <= limit


def test_a_limit_that_nothing_keeps_is_said_in_the_verdict(
    ask: Search, text_kl: Any, budget: int, tmp_path: Path
) -> None:
    run = ask(tmp_path / "run", max_text_kl_nats=1e-9)
    front = run.front()
    assert front.pick is None
    assert front.pareto_ids == frozenset()
    assert not any(point.kind == "search" for point in front.points)
    within = [a for a in {s.assignment for s in run.scores() if s.partition == "search"}
              if run.space.stored_bytes(a) <= budget]  # fmt: skip
    least = min(text_kl(a, "search").kl.mean for a in within)
    assert front.verdict.startswith(
        "No assignment within the budget keeps text KL to 1e-09 nats a token: the nearest of "
        f"{len(within)}, "
    )
    assert f"reaches {least:.3f}; raise --max-text-kl or --budget." in front.verdict
    for failing in (lambda: run.find("best"), lambda: front.best(max_bytes=10**9)):
        with pytest.raises(RunError, match="No assignment within the budget keeps text KL"):
            failing()
    assert run.finished
    assert "test" not in {score.partition for score in run.scores()}
    assert run.content["reference_validation"]["recall"] > 0.5


# ------------------------------------------------------------------------------------ resuming


@pytest.mark.parametrize("number", [6, 28])
def test_an_interrupted_search_with_a_limit_resumes_to_the_same_front(
    number: int,
    limited: Run,
    limit: float,
    ask: Search,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    evaluate, calls = Bench.evaluate, 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            raise KeyboardInterrupt
        return evaluate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Bench, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ask(tmp_path / "run", max_text_kl_nats=limit)
    resumed = ask(tmp_path / "run", resume=True, max_text_kl_nats=limit)
    assert result(resumed) == result(limited)


def test_resume_refuses_another_limit_and_another_text(
    limited: Run, limit: float, free: tuple[Run, list[int]], ask: Search
) -> None:
    other = Text(written(11), "another")
    for run, changes, named in (
        (limited, {}, f"max_text_kl_nats was {limit} and is now null"),
        (limited, {"max_text_kl_nats": limit / 2}, f"is now {limit / 2}"),
        (free[0], {"max_text_kl_nats": 0.5}, "max_text_kl_nats was null and is now 0.5"),
        (free[0], {"text": other}, "text was"),
        (free[0], {"text": None}, "text was"),
    ):
        with pytest.raises(RunError, match="answers another question") as caught:
            ask(run.folder, resume=True, **changes)
        assert named in str(caught.value)


def test_a_run_of_before_text_was_read_opens_and_goes_on(
    ask: Search, mpsearch: Cli, tmp_path: Path
) -> None:
    run = ask(tmp_path / "run", trials=2, text=None)
    content = {k: v for k, v in run.content.items() if k != "reference_text"}
    content["question"] = {
        k: v for k, v in run.question.items() if k not in ("text", "max_text_kl_nats")
    }
    (run.folder / "run.json").write_text(json.dumps(content), encoding="utf-8")
    lines = [json.loads(line) for line in (run.folder / "evaluations.jsonl").open()]
    for line in lines:
        del line["text"]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run.folder / "evaluations.jsonl").write_text(text, encoding="utf-8")

    old = Run.open(run.folder)
    assert old.max_text_kl_nats is None
    assert [p.text for p in old.points()] == [None] * len(run.points())
    told = json.loads(mpsearch("front", run.folder, "--json").out)
    assert {point["text_kl_nats"] for point in told["points"]} == {None}
    assert told["reference_text"] is None
    out = mpsearch("front", run.folder).out
    assert "text KL" in out
    assert f" {run.points()[0].id}" in out or run.points()[0].id in out
    with pytest.raises(RunError, match="max_text_kl_nats was null and is now 1"):
        ask(run.folder, resume=True, text=None, max_text_kl_nats=1.0)
    assert ask(run.folder, resume=True, trials=4, text=None).finished


# ------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize("nats", ["nan", "-0.1", "inf"])
def test_a_limit_that_makes_no_sense_is_refused_before_the_model_is_loaded(
    nats: str, mpsearch: Cli, tmp_path: Path
) -> None:
    outcome = mpsearch(
        "search",
        "no/such/model",
        "--budget",
        "57KiB",
        f"--max-text-kl={nats}",
        "-o",
        tmp_path / "r",
    )
    one_line(outcome, 2, f"max text KL {float(nats)}", "0 or more")
    assert "loading" not in outcome.err


def test_a_limit_from_python_is_refused_before_anything_is_written(
    ask: Search, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="max text KL -1"):
        ask(tmp_path / "run", max_text_kl_nats=-1)
    with pytest.raises(UsageError, match="give a longer text"):
        ask(tmp_path / "run", text=Text(("red",) * 8, "short"))
    assert not (tmp_path / "run").exists()


def test_the_table_and_the_data_show_text_and_the_limit(
    limited: Run, limit: float, mpsearch: Cli
) -> None:
    outcome = mpsearch("front", limited.folder)
    rows = {line.split()[0]: line for line in outcome.out.splitlines() if line.strip()}
    for point in limited.points():
        assert point.text is not None
        shown = f"{point.text.kl.mean:.3f} ± {point.text.kl.stderr:.3f}"
        assert shown in rows[point.id]
        assert f"{point.text.perplexity:.2f}" in rows[point.id]
        assert ("over text KL" in rows[point.id]) == point.over_text_kl
    reference = limited.content["reference_text"]["perplexity"]
    assert rows["reference"].split()[-2:] == ["0.000", f"{reference:.2f}"]
    assert f"limited to {limit:g} nats a token" in outcome.out

    told = json.loads(mpsearch("front", limited.folder, "--json").out)
    assert told["max_text_kl_nats"] == limit
    assert told["reference_text"]["perplexity"] == reference
    for row, point in zip(told["points"], limited.points(), strict=True):
        assert point.text is not None
        assert row["text_kl_nats"] == {"mean": point.text.kl.mean, "stderr": point.text.kl.stderr}
        assert row["perplexity"] == point.text.perplexity
        assert row["over_text_kl"] == point.over_text_kl
    shown = mpsearch("show", limited.folder, "best").out
    assert "held-out text: KL" in shown


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "a text.txt"
    path.write_text("\n\n".join(TEXT.paragraphs), encoding="utf-8")
    return path


def test_a_search_that_finds_nothing_ends_with_3_after_its_table(
    question: list[str], text_file: Path, mpsearch: Cli, tmp_path: Path
) -> None:
    asked = [*question, "--trials", 2, "--text", text_file, "--max-text-kl", "0"]
    outcome = mpsearch(*asked, "-o", tmp_path / "run")
    assert outcome.code == 3
    assert outcome.talk[-1].startswith("mpsearch: No assignment within the budget keeps text KL")
    assert "uniform" in outcome.out
    assert outcome.talk[-1].removeprefix("mpsearch: ") in outcome.out
    assert "Traceback" not in outcome.err


def test_the_printed_command_goes_on_with_the_same_text_and_limit(
    question: list[str], text_file: Path, mpsearch: Cli, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import shlex

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    run = tmp_path / "run"
    asked = [*question, "--trials", 2, "--text", text_file, "--max-text-kl", "100"]
    with monkeypatch.context() as patch:
        patch.setattr(Bench, "evaluate", interrupted)
        outcome = mpsearch(*asked, "-o", run)
    one_line(outcome, 130, f"--text '{text_file}'", "--max-text-kl 100.0")
    arguments = shlex.split(outcome.said[-1].partition("continue with: mpsearch ")[2])
    assert mpsearch(*arguments).code == 0
    content = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert content["question"]["max_text_kl_nats"] == 100
    assert content["question"]["text"] == TEXT.digest
    assert content["reference_text"]["source"] == str(text_file)
