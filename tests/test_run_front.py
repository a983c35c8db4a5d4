"""The front of a hand-made run: its points, paired differences, the pick and the verdict."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from math import sqrt
from pathlib import Path

import pytest
from test_run import FIRST, FORMATS, KEPT_BYTES, ROWS, SECOND, Row, a_score, line, size, write_run

from mpsearch.assignment import Assignment
from mpsearch.errors import RunError
from mpsearch.points import Point, rivals
from mpsearch.run import Run


def loss(row: Row) -> float:
    """Mean within a relation, then over relations."""
    return (sum(row[3][:3]) / 3 + row[3][3]) / 2


def identity(row: Row) -> str:
    return Assignment.of({FIRST: row[1], SECOND: row[2]}).id


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return write_run(tmp_path / "run", ROWS)


def by_kind(run: Run) -> dict[tuple[str, ...], Point]:
    return {tuple(point.assignment.values()): point for point in run.front().points}


def test_points_are_sorted_by_size_and_have_sizes_to_the_byte(run: Run) -> None:
    points = run.points()
    expected = sorted(ROWS, key=lambda row: (size(row), loss(row)))
    assert [point.id for point in points] == [identity(row) for row in expected]
    assert [point.stored_bytes for point in points] == [size(row) for row in expected]
    searched = 2 * 64 * 64
    for point in points:
        assert point.bits_per_weight == 8 * (point.stored_bytes - KEPT_BYTES) / searched


def test_answer_loss_is_a_mean_over_relations_of_means_within(run: Run) -> None:
    points = {point.id: point for point in run.points()}
    for row in ROWS:
        assert points[identity(row)].answer_loss.mean == pytest.approx(loss(row), abs=1e-12)
        recall = points[identity(row)].recall.mean
        assert recall == pytest.approx((2 / 3 + 1) / 2, abs=1e-12)


def test_the_front_is_what_brute_force_finds(run: Run) -> None:
    at = {identity(row): (size(row), loss(row)) for row in ROWS}
    expected = {
        one
        for one, (own_size, own_loss) in at.items()
        if not any(
            other_size <= own_size and other_loss <= own_loss and other != one
            for other, (other_size, other_loss) in at.items()
        )
    }
    assert run.front().pareto_ids == expected
    assert identity(ROWS[3]) not in expected  # the greedy row is dominated on purpose


def test_against_uniform_is_the_paired_difference_to_the_best_uniform_of_at_most_the_size(
    run: Run,
) -> None:
    point = by_kind(run)["int2-g64", "int8-g64"]
    rival = ROWS[1][3]  # int4 everywhere: smaller, and better than int2
    differences = [a - b for a, b in zip(ROWS[4][3], rival, strict=True)]
    within = differences[:3]
    mean = (sum(within) / 3 + differences[3]) / 2
    variance = sum((d - sum(within) / 3) ** 2 for d in within) / 2
    # The relation with one fact borrows the other's variance.
    stderr = sqrt(variance / 3 + variance) / 2
    assert point.against_uniform is not None
    assert point.against_uniform.mean == pytest.approx(mean, abs=1e-12)
    assert point.against_uniform.stderr == pytest.approx(stderr, abs=1e-12)


def test_the_rival_is_chosen_by_the_same_loss_that_the_table_shows(tmp_path: Path) -> None:
    # By plain mean over facts int2 wins (0.75 < 0.9), by relation int4 does (1.5 > 0.6).
    rows: list[Row] = [
        ("uniform", "int2-g64", "int2-g64", [0.0, 0.0, 0.0, 3.0]),
        ("uniform", "int4-g64", "int4-g64", [1.2, 1.2, 1.2, 0.0]),
        ("search", "int2-g64", "int8-g64", [0.0, 0.0, 0.0, 0.0]),
    ]
    point = by_kind(write_run(tmp_path / "run", rows))["int2-g64", "int8-g64"]
    assert point.against_uniform is not None
    assert point.against_uniform.mean == pytest.approx(-0.6, abs=1e-12)


def test_the_smallest_uniform_has_no_rival(run: Run) -> None:
    assert by_kind(run)["int2-g64", "int2-g64"].against_uniform is None


def test_a_search_that_wins_beyond_noise_is_picked_and_the_verdict_says_by_how_much(
    run: Run,
) -> None:
    front = run.front()
    assert front.pick is not None
    assert front.pick.id == identity(ROWS[4])
    gain = loss(ROWS[1]) - loss(ROWS[4])
    assert front.verdict.startswith("The search beats the best simple allocation (uniform")
    assert f"{gain:+.3f}" in front.verdict


def test_a_search_that_wins_within_noise_leaves_the_simple_allocation_as_pick(
    tmp_path: Path,
) -> None:
    noisy: Row = ("search", "int2-g64", "int8-g64", [-2.0, 2.5, 0.0, 1.0])
    front = write_run(tmp_path / "run", [*ROWS[:4], noisy]).front()
    assert loss(noisy) < loss(ROWS[1])  # it is lower, only not surely so
    assert front.pick is not None
    assert front.pick.id == identity(ROWS[1])
    assert front.verdict.startswith("No significant gain at this budget: the search did not beat")
    assert identity(ROWS[1]) in front.verdict


def test_nothing_above_the_budget_is_picked(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ROWS, budget_bytes=size(ROWS[0]))
    pick = run.front().pick
    assert pick is not None
    assert pick.id == identity(ROWS[0])


def test_a_run_without_a_point_in_its_budget_has_no_pick(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ROWS, budget_bytes=1)
    assert run.front().pick is None
    with pytest.raises(RunError, match="no point within its budget"):
        run.find("best")


def test_the_verdict_does_not_deny_a_searched_point_that_alone_fits(tmp_path: Path) -> None:
    rows = [ROWS[2], ROWS[4]]  # the only simple point is larger than the budget
    front = write_run(tmp_path / "run", rows, budget_bytes=7000).front()
    assert front.pick is not None
    assert front.pick.id == identity(ROWS[4])
    assert front.verdict == "Only searched points fit."


def test_best_takes_the_least_loss_within_a_size_or_names_the_smallest(run: Run) -> None:
    front = run.front()
    assert front.best(max_bytes=size(ROWS[1])).id == identity(ROWS[1])
    assert front.best(max_bytes="1 MiB").id == identity(ROWS[2])
    with pytest.raises(RunError, match=f"{size(ROWS[0]):,}"):
        front.best(max_bytes=10)


def test_find_takes_best_an_id_and_an_unambiguous_beginning(run: Run) -> None:
    pick = run.front().pick
    assert pick is not None
    assert run.find("best").id == pick.id
    for point in run.points():
        assert run.find(point.id).id == point.id
        assert run.find(point.id[:6]).id == point.id


def test_find_refuses_an_ambiguous_and_an_unknown_beginning_and_lists_what_there_is(
    tmp_path: Path,
) -> None:
    rows: list[Row] = [("search", a, b, [0.0] * 4) for a, b in product(FORMATS, FORMATS)]
    run = write_run(tmp_path / "run", rows)
    ids = [identity(row) for row in rows]
    first = next(i[0] for i in ids if sum(other[0] == i[0] for other in ids) > 1)
    with pytest.raises(RunError, match=f"'{first}' is ambiguous") as caught:
        run.find(first)
    assert all(i in str(caught.value) for i in ids)
    with pytest.raises(RunError, match="'nothing' is not in this run") as caught:
        run.find("nothing")
    assert all(i in str(caught.value) for i in ids)


def test_a_run_without_validated_points_says_that_nothing_is_scored(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [])
    with pytest.raises(RunError, match="no scored point yet"):
        run.front()


# ----------------------------------------------------------------------------- refined points

OWN = {"quantizer": "gptq", "in_order": "abc"}


def refine_row(run: Run, row: Row, losses: list[float], partition: str = "validation") -> str:
    """The id of a refined twin of a row, which is added to the run."""
    with open(run.folder / "evaluations.jsonl", "a", encoding="utf-8") as stream:
        stream.write(line(("refined", *row[1:3], losses), partition, refined=OWN))
    bank = json.dumps(OWN, sort_keys=True)
    return Assignment.of({FIRST: row[1], SECOND: row[2]}, bank, refined=True).id


def test_a_refined_point_stands_behind_its_parent_whatever_they_lose(run: Run) -> None:
    worse = refine_row(run, ROWS[1], [9.0, 9.0, 9.0, 9.0])
    better = refine_row(run, ROWS[4], [0.0, 0.0, 0.0, 0.1])
    points = run.points()
    ids = [point.id for point in points]
    for refined, row in ((worse, ROWS[1]), (better, ROWS[4])):
        point = points[ids.index(refined)]
        assert ids[ids.index(refined) - 1] == identity(row) == point.parent
        assert (point.kind, point.stored_bytes) == ("refined", size(row))
    change = points[ids.index(better)].against_parent
    assert change is not None
    assert change.mean == pytest.approx((-0.3 / 3 - 0.1) / 2)
    assert json.loads(points[ids.index(better)].assignment.bank) == OWN
    assert all(point.against_parent is None for point in points if not point.parent)


def test_a_refined_point_is_picked_only_if_it_beats_the_pick_beyond_noise(run: Run) -> None:
    before = run.front()
    noisy = refine_row(run, ROWS[4], [-2.0, 2.0, 0.1, 0.1])
    front = run.front()
    assert front.pick is not None and front.pick.id == identity(ROWS[4])
    assert front.verdict.startswith(before.verdict)
    assert f"The refined {noisy} does not beat it beyond noise (" in front.verdict


def test_a_refined_point_that_wins_is_the_pick_and_its_parent_a_rival(run: Run) -> None:
    refined = refine_row(run, ROWS[4], [0.0, -0.05, 0.05, 0.1])
    front = run.front()
    assert front.pick is not None and front.pick.id == refined
    assert run.find("best").id == refined
    assert "beats it (+0.100 +- " in front.verdict and "recommended instead" in front.verdict
    found = rivals(front, run.budget_bytes, {})
    assert [point.id for point in found].count(identity(ROWS[4])) == 1
    assert refined not in {point.id for point in found}
    assert identity(ROWS[4]) not in front.pareto_ids


@pytest.mark.parametrize("searched", [True, False])
def test_a_kind_that_allocates_as_another_does_is_not_replaced_by_a_smaller_one_of_its(
    searched: bool, tmp_path: Path
) -> None:
    alike: Row = ("greedy", "int8-g64", "int2-g64", [0.3, 0.3, 0.3, 0.3])
    smaller: Row = ("knapsack", "int4-g64", "int2-g64", [1.0, 1.0, 1.0, 1.0])
    rows = [ROWS[0], ROWS[1], alike, smaller, *([ROWS[4]] if searched else [])]
    run = write_run(tmp_path / "run", rows)
    front = run.front()
    assert front.pick is not None
    assert front.pick.id == identity(ROWS[4] if searched else alike)
    at_budget = dict.fromkeys(("greedy", "knapsack"), identity(alike))
    found = [point.id for point in rivals(front, run.budget_bytes, at_budget)]
    assert found == [identity(ROWS[1]), *([identity(alike)] if searched else [])]
    assert identity(smaller) in {p.id for p in rivals(front, run.budget_bytes, {})}


@pytest.mark.parametrize(("searched", "picked"), [(0.2, False), (0.0, True)])
def test_a_refined_point_that_loses_more_on_search_facts_is_not_recommended(
    searched: float, picked: bool, run: Run
) -> None:
    with open(run.folder / "evaluations.jsonl", "a", encoding="utf-8") as stream:
        stream.write(line((*ROWS[4][:3], [0.1, 0.1, 0.1, 0.1]), "search"))
    refine_row(run, ROWS[4], [searched] * 4, "search")
    refined = refine_row(run, ROWS[4], [0.0, -0.05, 0.05, 0.1])
    front = run.front()
    assert front.pick is not None
    assert front.pick.id == (refined if picked else identity(ROWS[4]))
    point = run.find(refined)
    assert point.worse_on_search is not picked
    assert point.against_parent_on_search is not None
    assert point.against_parent_on_search.mean == pytest.approx(searched - 0.1)
    assert f"({searched - 0.1:+.3f} +- 0.000 by search fact)" in point.gain
    said = "not on search facts: there it loses more than what it refines, so it is not recommended"
    assert (said in front.verdict) is not picked


def test_a_refined_point_of_least_loss_that_is_not_recommended_is_explained_beside_others(
    run: Run,
) -> None:
    with open(run.folder / "evaluations.jsonl", "a", encoding="utf-8") as stream:
        stream.write(line((*ROWS[4][:3], [0.1] * 4), "search"))
    refine_row(run, ROWS[4], [0.2] * 4, "search")
    refused = refine_row(run, ROWS[4], [0.0, -0.05, 0.05, 0.1])
    refine_row(run, ROWS[1], [0.5, 0.25, 0.75, 1.5])  # no worse on search facts, and no winner
    front = run.front()
    assert front.pick is not None and front.pick.id == identity(ROWS[4])
    assert f"The refined {refused} beats it (+0.100 +- " in front.verdict
    assert front.verdict.endswith("so it is not recommended.")


def test_a_refined_point_above_the_budget_is_no_pick(run: Run) -> None:
    refine_row(run, ROWS[2], [-1.0, -1.0, -1.0, -1.0])
    front = run.front()
    assert front.pick is not None and front.pick.id == identity(ROWS[4])
    assert "refined" not in front.verdict.lower()


def test_what_refining_gained_is_said_with_its_noise(run: Run) -> None:
    sure = refine_row(run, ROWS[4], [0.0, -0.05, 0.05, 0.1])
    text = run.find(sure).gain
    assert text == (
        f"{sure} refines {identity(ROWS[4])} by gptq in order: answer loss -0.100 +- 0.000 nats, "
        "paired by validation fact."
    )
    noisy = refine_row(run, ROWS[0], [0.0, 3.0, 3.0, 4.1])
    assert run.find(noisy).gain.endswith("no significant change.")
    assert run.find(identity(ROWS[0])).gain == ""


def test_a_refined_score_comes_back_as_it_was_added(run: Run) -> None:
    bank = json.dumps(OWN, sort_keys=True)
    assignment = Assignment.of({FIRST: "int2-g64", SECOND: "int4-g64"}, bank, refined=True)
    run.add(replace(a_score(ROWS[0]), assignment=assignment, kind="refined"))
    found = run.scores()[-1]
    assert (found.assignment, found.assignment.bank) == (assignment, bank)
    assert found.assignment.refined
    assert not any(score.assignment.refined for score in run.scores()[:-1])
