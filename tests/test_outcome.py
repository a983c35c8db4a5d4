"""The pick on test facts: paired gains by hand, what search facts promised, and honest words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from test_run import ROWS, Row, line, size, write_run
from test_run_front import identity, loss, refine_row

from mpsearch.bootstrap import Interval
from mpsearch.outcome import Outcome, outcome
from mpsearch.run import Run
from mpsearch.tables import show_front

SUBJECTS = ["x", "y", "z", "x"]
PICK = ROWS[4]  # the searched one
TEST: dict[str, list[float]] = {
    "search": [0.1, 0.2, 0.3, 0.4],
    "uniform": [0.6, 0.8, 1.0, 0.9],
    "greedy": [0.1, 0.3, 0.2, 0.4],
}


def read_test_facts(folder: Path, budget_bytes: int = 7000, floor_nats: float = 0.0) -> Run:
    """A finished run; the best uniform within the budget has 4 bits."""
    write_run(folder, ROWS, budget_bytes)
    content = json.loads((folder / "run.json").read_text())
    content["subjects"] = dict.fromkeys(("search", "validation", "test"), SUBJECTS)
    content["reference_test"] = {"recall": 0.75}
    content["reference_validation"] = {"recall": 0.8, "noise_floor_nats": floor_nats}
    (folder / "run.json").write_text(json.dumps(content))
    with open(folder / "evaluations.jsonl", "a", encoding="utf-8") as stream:
        for row in (PICK, ROWS[1], ROWS[3]):  # a pick before its rivals
            asked: Row = (*row[:3], TEST[row[0]])
            stream.write(line(asked, "test", [True, True, False, False]))
            stream.write(line(row, "search"))
    return Run.open(folder)


def found_in(run: Run) -> Outcome:
    found = outcome(run)
    assert found is not None
    return found


def test_gains_are_paired_by_test_fact_beside_what_search_facts_promised(tmp_path: Path) -> None:
    found = found_in(read_test_facts(tmp_path / "run"))
    assert found.id == identity(PICK)
    assert (found.facts, found.reference_recall) == (4, 0.75)
    assert found.recall.mean == pytest.approx((2 / 3 + 0) / 2)
    assert found.answer_loss.mean == pytest.approx((0.2 + 0.4) / 2)
    assert [(gain.kind, gain.id) for gain in found.gains] == [
        ("uniform", identity(ROWS[1])), ("greedy", identity(ROWS[3])),
    ]  # fmt: skip
    uniform, greedy = found.gains
    assert uniform.stored_bytes == size(ROWS[1])
    assert uniform.test.mean == pytest.approx(((0.5 + 0.6 + 0.7) / 3 + 0.5) / 2)
    assert uniform.test.low > 0.4
    assert greedy.test.mean == pytest.approx(0.0)
    assert greedy.test.low < 0 < greedy.test.high
    assert uniform.search_nats == pytest.approx(loss(ROWS[1]) - loss(PICK))


def test_no_gain_is_said_and_gain_is_not_denied(tmp_path: Path) -> None:
    found = found_in(read_test_facts(tmp_path / "run"))
    uniform, greedy = map(str, found.gains)
    assert uniform.startswith(f"uniform {identity(ROWS[1])} +0.550 nats [")
    assert "no significant gain" not in uniform
    assert greedy.endswith("no significant gain")
    assert f"(on search facts {loss(ROWS[3]) - loss(PICK):+.3f})" in greedy
    assert "recalls 33.3% [" in found.verdict and "(reference 75.0%)" in found.verdict
    assert found.verdict.count("Gain over") == 1
    assert json.loads(json.dumps(found.to_json()))["verdict"] == found.verdict


def test_rivals_are_within_the_budget(tmp_path: Path) -> None:
    found = found_in(read_test_facts(tmp_path / "run", budget_bytes=size(ROWS[4])))
    assert all(gain.stored_bytes <= size(ROWS[4]) for gain in found.gains)
    assert "uniform" in {gain.kind for gain in found.gains}


def test_a_refined_pick_is_another_look_at_test_facts_and_gains_over_its_parent(
    tmp_path: Path,
) -> None:
    run = read_test_facts(tmp_path / "run")
    assert found_in(run).looks == 1
    assert "picks have been read" not in found_in(run).verdict
    refined = refine_row(run, PICK, [0.0, -0.05, 0.05, 0.1])
    assert outcome(run) is None  # the pick is another now, and not read
    refine_row(run, PICK, [0.1, 0.1, 0.1, 0.2], "test")
    found = found_in(run)
    assert (found.id, found.looks) == (refined, 2)
    assert "2 picks have been read on these test facts." in found.verdict
    (gain,) = [gain for gain in found.gains if gain.id == identity(PICK)]
    assert (gain.kind, gain.stored_bytes) == ("search", size(PICK))
    assert gain.test.mean == pytest.approx((0.3 / 3 + 0.2) / 2)
    assert gain.search_nats is None  # it was not scored there
    assert not str(gain).endswith("a loss")
    assert str(replace(gain, test=Interval(-0.3, -0.5, -0.1))).endswith("-0.100], a loss")


def test_a_better_pick_of_more_trials_is_another_look(tmp_path: Path) -> None:
    run = read_test_facts(tmp_path / "run")
    better: Row = ("search", "int4-g64", "int2-g64", [0.0, -0.1, 0.0, 0.1])
    with open(run.folder / "evaluations.jsonl", "a", encoding="utf-8") as stream:
        stream.writelines(line(better, part) for part in ("validation", "test"))
    found = found_in(run)
    assert (found.id, found.looks) == (identity(better), 2)
    assert "2 picks have been read on these test facts." in found.verdict


def test_the_first_pick_that_is_read_may_be_a_refined_one(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ROWS)
    content = json.loads((run.folder / "run.json").read_text())
    content["subjects"] = {"test": SUBJECTS}
    content["reference_test"] = {"recall": 0.75}
    (run.folder / "run.json").write_text(json.dumps(content))
    refine_row(run, PICK, [0.0, -0.05, 0.05, 0.1])
    refine_row(run, PICK, [0.1, 0.1, 0.1, 0.2], "test")
    with open(run.folder / "evaluations.jsonl", "a", encoding="utf-8") as stream:
        stream.writelines(line(row, "test") for row in (ROWS[1], ROWS[3], PICK))
    assert found_in(Run.open(run.folder)).looks == 1


def test_there_is_no_outcome_before_test_facts_are_read(tmp_path: Path) -> None:
    assert outcome(write_run(tmp_path / "run", ROWS)) is None


def test_the_front_marks_what_is_below_the_noise_floor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = read_test_facts(tmp_path / "run", floor_nats=0.03)
    show_front(run, run.front())
    out = capsys.readouterr().out
    marked = [text for text in out.splitlines() if "~" in text]
    # 8 bits lose 0.02 nats; what the pick gains is more.
    assert [identity(ROWS[2]) in text for text in marked] == [True, False]
    assert marked[-1].startswith("Noise floor")
    assert found_in(run).verdict in out
