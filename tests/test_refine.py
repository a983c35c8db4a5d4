"""Refining a point of a run: a candidate beside it, scored once, exported as it was scored."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mpsearch as mps
import mpsearch.points
from mpsearch.assignment import Assignment
from mpsearch.bank import Bank
from mpsearch.calibration import Calibration
from mpsearch.errors import InfeasibleError, RunError, UsageError
from mpsearch.estimates import paired_difference
from mpsearch.evaluate import Bench, quantized_layers
from mpsearch.export.reload import load_any
from mpsearch.facts import FactSet
from mpsearch.models import Model, load_whole
from mpsearch.outcome import outcome
from mpsearch.points import Point
from mpsearch.quantizers.gptq import Gptq
from mpsearch.recall import RecallProxy
from mpsearch.refine import check_refinable, refine
from mpsearch.run import Run
from mpsearch.scorer import Scorer, asked_facts
from mpsearch.search import search
from mpsearch.space import ResolvedSpace
from mpsearch.text import Text

RECIPE = Calibration(sequences=8, length=32)
Refine = Callable[..., Point]


def searched(
    model: Model, space: ResolvedSpace, facts: FactSet, budget: int, out: Path, **changes: Any
) -> Run:
    question = {"budget": budget, "trials": 4, "search_facts": 30, "facts": facts}
    return search(model, space, out=out, **{**question, **changes})


@pytest.fixture(scope="module")
def gptq_run(
    tiny: Model, tiny_space: ResolvedSpace, tiny_facts: FactSet, budget: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:  # fmt: skip
    out = tmp_path_factory.mktemp("gptq") / "run"
    chosen = {"quantizer": "gptq", "calibration": RECIPE}
    return searched(tiny, tiny_space, tiny_facts, budget, out, **chosen)


@pytest.fixture
def run(gptq_run: Run, tmp_path: Path) -> Run:
    """A copy that a test may refine in; the bank is shared."""
    shutil.copytree(gptq_run.folder, tmp_path / "run")
    return Run.open(tmp_path / "run")


@pytest.fixture
def refined_in(tiny: Model, tiny_facts: FactSet) -> Refine:
    def call(run: Run, wanted: str, model: Model = tiny, **given: Any) -> Point:
        return refine(model, run, run.find(wanted), **{"facts": tiny_facts, **given})

    return call


def point_of(run: Run, *kinds: str) -> Point:
    """A quantized point of one of the kinds that is not the pick."""
    front = run.front()
    return next(p for p in front.points if p.kind in kinds and p.id != getattr(front.pick, "id", 0))


def lines(run: Run, partition: str) -> list[dict[str, Any]]:
    text = (run.folder / "evaluations.jsonl").read_text(encoding="utf-8")
    return [line for line in map(json.loads, text.splitlines()) if line["partition"] == partition]


@pytest.mark.parametrize("kind", ["uniform", "knapsack"])
def test_a_refined_point_stands_beside_its_parent_with_equal_bytes_and_its_gain(
    kind: str, run: Run, refined_in: Refine
) -> None:
    parent = point_of(run, kind)
    refined = refined_in(run, parent.id)
    points = run.front().points
    (place,) = [place for place, point in enumerate(points) if point.id == refined.id]
    assert points[place - 1].id == refined.parent == parent.id != refined.id
    assert (refined.kind, refined.stored_bytes) == ("refined", parent.stored_bytes)
    assert dict(refined.assignment) == dict(parent.assignment)
    assert refined.assignment != parent.assignment
    assert refined.assignment.parent == parent.assignment
    relations = run.relations("validation")
    losses = [point.score.loss_per_fact for point in (refined, parent)]
    assert losses[0] != losses[1]
    assert refined.against_parent == paired_difference(*losses, relations)
    assert refined.to_json()["parent"] == parent.id
    assert parent.to_json()["parent"] is None
    assert f"{refined.id} refines {parent.id} by gptq in order" in refined.gain
    assert run.find(parent.id).id == parent.id
    assert run.find(refined.id[:6]).id == refined.id
    kept = [point for point in points if not point.parent]
    assert kept == sorted(kept, key=lambda p: (p.stored_bytes, p.answer_loss.mean))


def test_a_second_call_quantizes_and_scores_nothing(
    run: Run, refined_in: Refine, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = point_of(run, "greedy", "knapsack")
    first = refined_in(run, parent.id)
    before = (run.folder / "evaluations.jsonl").read_bytes()

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("done before")

    monkeypatch.setattr(Gptq, "quantize", never)
    monkeypatch.setattr(Bench, "evaluate", never)
    again = refined_in(run, parent.id)
    assert again.score.loss_per_fact == first.score.loss_per_fact
    assert (run.folder / "evaluations.jsonl").read_bytes() == before


def test_it_is_scored_with_its_own_codes_on_the_facts_of_the_run(
    tiny: Model, tiny_facts: FactSet, run: Run, refined_in: Refine
) -> None:
    refined = refined_in(run, point_of(run, "uniform").id)
    bank = Bank.of(tiny, json.loads(refined.assignment.bank))
    formats = run.space.layer_formats(refined.assignment)
    facts = asked_facts(run, tiny_facts, "validation")
    proxy = RecallProxy(tiny, tiny_facts, facts, contrast=True)
    try:
        for layer, fmt in formats.items():
            tiny.places[layer].put(bank.weight(layer, fmt))
        scores = proxy.score()
    finally:
        tiny.restore()
    loss = proxy.reference.log_prob - scores.log_prob
    assert refined.score.loss_per_fact == pytest.approx(tuple(loss), abs=1e-4)
    assert [s.kind for s in run.scores() if s.assignment == refined.assignment] == ["refined"] * 2
    assert [len(s.loss_per_fact) for s in run.scores() if s.assignment == refined.assignment] == [
        len(run.relations("search")), len(run.relations("validation")),
    ]  # fmt: skip


def test_an_interrupted_refinement_goes_on_to_the_same_figures(
    run: Run, refined_in: Refine, tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = point_of(run, "greedy", "knapsack", "search")
    twin = Run.open(shutil.copytree(run.folder, tmp_path / "twin"))
    expected = refined_in(twin, parent.id, calibration=Calibration(8, 32, seed=1))
    quantize, calls = Gptq.quantize, 0

    def killed(self: Gptq, *given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return quantize(self, *given)

    # Of its own home, so that nothing is there yet but the shared bank.
    monkeypatch.setenv("MPSEARCH_HOME", str(tmp_path / "home"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Gptq, "quantize", killed)
        refined_in(run, parent.id, calibration=Calibration(8, 32, seed=1))
    assert len(run.front().points) == len(twin.front().points) - 1
    score = Scorer.score

    def refused(scorer: Scorer, assignment: Assignment, kind: str, partition: str) -> Any:
        if partition == "validation":
            raise KeyboardInterrupt
        return score(scorer, assignment, kind, partition)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Scorer, "score", refused)
        refined_in(run, parent.id, calibration=Calibration(8, 32, seed=1))
    assert len([line for line in lines(run, "search") if "refined" in line]) == 1
    with open(run.folder / "evaluations.jsonl", "ab") as stream:
        stream.write(b'{"torn by a ki')
    found = refined_in(run, parent.id, calibration=Calibration(8, 32, seed=1))
    assert found.id == expected.id
    assert found.score.loss_per_fact == expected.score.loss_per_fact
    assert torch.equal(tiny.places[tiny.layers[0].name].weight, tiny.originals[tiny.layers[0].name])


def test_an_export_holds_the_codes_that_were_scored(
    tiny: Model, tiny_facts: FactSet, run: Run, refined_in: Refine, tmp_path: Path
) -> None:
    refined = refined_in(run, point_of(run, "uniform").id)
    out = mps.export(tiny, refined.assignment, out=tmp_path / "export", space=run.space)
    about = json.loads((out / "mpsearch.json").read_text(encoding="utf-8"))
    assert about["assignment_id"] == refined.id
    assert about["bank"] == json.loads(refined.assignment.bank)
    loaded = load_any(str(out))
    facts = asked_facts(run, tiny_facts, "validation")
    proxy = RecallProxy(tiny, tiny_facts, facts, contrast=True)
    parent = run.find(refined.parent).assignment
    with Bench(run.space, Bank.of(tiny, run.question["bank"])) as bench:
        bench.put(parent)
        weights = {layer.name: tiny.places[layer.name].weight for layer in tiny.layers}
        scored = bench.evaluate(refined.assignment, proxy)
        for layer in tiny.layers:
            assert torch.equal(loaded.places[layer.name].weight, tiny.places[layer.name].weight)
        assert any(
            not torch.equal(loaded.places[name].weight, other) for name, other in weights.items()
        )
    reloaded = RecallProxy(loaded, tiny_facts, facts, contrast=True, against=proxy.first)
    assert (reloaded.reference.log_prob == scored.scores.log_prob).all()
    assert refined.score.loss_per_fact == pytest.approx(tuple(scored.loss_per_fact), abs=1e-6)


def test_an_export_whose_bank_is_gone_makes_the_same_codes_again(
    tiny: Model, run: Run, refined_in: Refine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    refined = refined_in(run, point_of(run, "uniform").id)
    first = mps.export(tiny, refined.assignment, out=tmp_path / "first", space=run.space)
    monkeypatch.setenv("MPSEARCH_HOME", str(tmp_path / "elsewhere"))
    again = mps.export(tiny, refined.assignment, out=tmp_path / "again", space=run.space)
    lost, *_ = (tmp_path / "elsewhere").rglob("*.int*.safetensors")
    lost.unlink()
    with caplog.at_level("WARNING"):
        third = mps.export(tiny, refined.assignment, out=tmp_path / "third", run=run)
    assert "1 layers that" in caplog.text and "no longer in the weight bank" in caplog.text
    name = "model.safetensors"
    for other in (again, third):
        assert (first / name).read_bytes() == (other / name).read_bytes()


# ------------------------------------------------------------------------------- test facts


def prefer(monkeypatch: pytest.MonkeyPatch, better: bool) -> None:
    """Let a refined point beat others beyond noise, or not."""
    difference = paired_difference

    def found(a: Any, b: Any, relations: Any) -> Any:
        estimate = difference(a, b, relations)
        return type(estimate)(1.0 if better else -1.0, 0.1)

    monkeypatch.setattr(mpsearch.points, "paired_difference", found)
    monkeypatch.setattr(Point, "worse_on_search", False)


def test_test_facts_are_read_once_more_for_a_refined_pick_and_that_is_said(
    run: Run, refined_in: Refine, monkeypatch: pytest.MonkeyPatch
) -> None:
    pick, asked = run.front().pick, len(lines(run, "test"))
    assert pick is not None
    found = outcome(run)
    assert found is not None and found.looks == 1 and "picks have been" not in found.verdict
    prefer(monkeypatch, better=True)
    before = run.front().pick
    assert before is not None
    refined = refined_in(run, before.id)
    front = run.front()
    assert front.pick is not None and front.pick.id == refined.id
    assert f"The refined {refined.id} beats it" in front.verdict
    found = outcome(run)
    assert found is not None
    assert (found.id, found.looks) == (refined.id, 2)
    assert "2 picks have been read on these test facts" in found.verdict
    assert before.id in {gain.id for gain in found.gains}
    read = len(lines(run, "test"))
    assert read > asked
    refined_in(run, before.id)
    assert len(lines(run, "test")) == read


def test_test_facts_stay_unread_for_a_refined_point_that_is_not_the_pick(
    run: Run, refined_in: Refine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefer(monkeypatch, better=False)
    front, before = run.front(), lines(run, "test")
    assert front.pick is not None
    refined = refined_in(run, front.pick.id)
    after = run.front()
    assert after.pick is not None and after.pick.id == front.pick.id
    assert after.verdict == front.verdict + (
        f" The refined {refined.id} does not beat it beyond noise (-1.000 +- 0.100 nats on "
        "validation facts)."
    )
    assert lines(run, "test") == before


def test_an_unfinished_search_reads_test_facts_itself_for_a_refined_pick(
    tiny: Model, tiny_space: ResolvedSpace, tiny_facts: FactSet, budget: int, run: Run,
    refined_in: Refine, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    kept = [line for line in run.folder.joinpath("evaluations.jsonl").read_text().splitlines()
            if json.loads(line)["partition"] != "test"]  # fmt: skip
    (run.folder / "evaluations.jsonl").write_text("\n".join(kept) + "\n")
    run.content["finished"] = False
    del run.content["reference_test"]
    run.save()
    prefer(monkeypatch, better=True)
    pick = run.front().pick
    assert pick is not None
    refined = refined_in(run, pick.id)
    assert lines(run, "test") == []
    chosen = {"quantizer": "gptq", "calibration": RECIPE, "resume": True}
    resumed = searched(tiny, tiny_space, tiny_facts, budget, run.folder, **chosen)
    front, found = resumed.front(), outcome(resumed)
    assert front.pick is not None and front.pick.id == refined.id
    assert found is not None and (found.id, found.looks) == (refined.id, 1)
    assert lines(run, "test")[0]["refined"] == json.loads(refined.assignment.bank)


# ------------------------------------------------------------------------------- other runs


def test_a_run_of_rounding_is_refined_by_gptq_and_its_own_calibration(
    tiny: Model, tiny_space: ResolvedSpace, tiny_facts: FactSet, budget: int, tmp_path: Path,
    refined_in: Refine,
) -> None:  # fmt: skip
    run = searched(tiny, tiny_space, tiny_facts, budget, tmp_path / "run")
    refined = refined_in(run, point_of(run, "uniform").id, calibration=RECIPE)
    settings = json.loads(refined.assignment.bank)
    assert settings["quantizer"] == "gptq"
    assert settings["calibration"] == dict(RECIPE.settings)
    assert run.question["bank"]["quantizer"] == "rounding"
    assert "by gptq in order" in refined.gain


def test_a_run_with_awqs_scales_is_refined_with_them(
    tiny_folder: Path, tiny_space: ResolvedSpace, tiny_facts: FactSet, budget: int, tmp_path: Path,
    refined_in: Refine,
) -> None:  # fmt: skip
    from mpsearch import awq
    from mpsearch.searched import searched_model

    found = awq.prepare(load_whole(str(tiny_folder)), RECIPE).preparation
    exponents = [i % 3 - 1 for i in range(64)]
    scales = {norm: {**folding, "exponents": exponents} for norm, folding in found.items()}
    model = awq.fold(load_whole(str(tiny_folder)), scales)
    chosen = {"quantizer": "gptq", "calibration": RECIPE}
    run = searched(model, tiny_space, tiny_facts, budget, tmp_path / "run", **chosen)
    again = searched_model(run)
    refined = refined_in(run, point_of(run, "uniform").id, again)
    out = mps.export(again, refined.assignment, out=tmp_path / "export", space=run.space)
    loaded = load_any(str(out))
    bank = Bank.of(again, json.loads(refined.assignment.bank))
    for layer, fmt in quantized_layers(run.space, refined.assignment):
        weight = bank.weight(layer.name, fmt)
        assert torch.equal(loaded.places[layer.name].weight, weight)
    with pytest.raises(RunError, match="is not the model that"):
        refined_in(run, refined.parent, load_whole(str(tiny_folder)))


def test_another_calibration_gives_another_candidate(run: Run, refined_in: Refine) -> None:
    parent = point_of(run, "uniform")
    first = refined_in(run, parent.id)
    second = refined_in(run, parent.id, calibration=Calibration(8, 32, seed=9))
    assert first.id != second.id
    assert [p.parent for p in run.front().points].count(parent.id) == 2


# ------------------------------------------------------------------------------- refusals


def test_what_cannot_be_refined_says_why_in_one_line(
    run: Run, refined_in: Refine, tiny_facts: FactSet
) -> None:
    parent = point_of(run, "uniform")
    refined = refined_in(run, parent.id)
    with pytest.raises(RunError, match=f"{refined.id} is refined already, from {parent.id}"):
        refined_in(run, refined.id)
    with pytest.raises(UsageError, match=r"the facts are not those .* --facts FILE"):
        refined_in(run, parent.id, facts=FactSet.builtin())
    with pytest.raises(UsageError, match=r"the text are not those .* --text FILE"):
        refined_in(run, parent.id, text=Text.builtin())
    with run.locked(), pytest.raises(RunError, match="another search is running"):
        check_refinable(run, parent, tiny_facts)


def test_a_point_without_quantized_layers_is_refused(run: Run, tiny_facts: FactSet) -> None:
    bare = Assignment.of(dict.fromkeys(run.space.options, "bf16"))
    point = point_of(run, "uniform")
    plain = Point(**{**vars(point), "id": bare.id, "assignment": bare})
    with pytest.raises(InfeasibleError, match="is bf16: there is nothing to quantize again"):
        check_refinable(run, plain, tiny_facts)


def test_formats_that_nothing_calibrated_makes_are_refused(run: Run, tiny_facts: FactSet) -> None:
    pytest.importorskip("bitsandbytes")
    run.content["space"]["target"] = "bitsandbytes"
    run.content["question"]["bank"]["quantizer"] = "bitsandbytes"
    with pytest.raises(UsageError, match="no quantizer of bitsandbytes formats does"):
        check_refinable(run, run.find("best"), tiny_facts)


def test_another_model_or_another_arithmetic_is_refused(run: Run, refined_in: Refine) -> None:
    parent = point_of(run, "uniform")
    run.content["question"]["dtype"] = "torch.float16"
    with pytest.raises(RunError, match=r"with dtype torch\.float16, and this model is loaded"):
        refined_in(run, parent.id)
    run.content["question"]["fingerprint"] = "0" * 64
    with pytest.raises(RunError, match="its weights have changed"):
        refined_in(run, parent.id)
