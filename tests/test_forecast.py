"""The forecast of a search: its arithmetic by hand, what is left on resume, what a run keeps."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from mpsearch.asked import MOST_FACTS, asked_facts, freeze_facts, tokens_asked
from mpsearch.evaluate import all_layers
from mpsearch.facts import FactSet
from mpsearch.forecast import Forecast, Needs, Plan, Tokens, forecast
from mpsearch.guard import TextGuard
from mpsearch.models import Model
from mpsearch.recall import RecallProxy
from mpsearch.run import Run
from mpsearch.search import search
from mpsearch.space import ResolvedSpace
from mpsearch.study import FINALISTS, TRIAL_COST
from mpsearch.text import Text

TOKENS = Tokens(search=100, validation=200, test=400, sensitivity=5000)
PLAN = Plan(baselines=10, searched=4, trials=150, finalists=6)


def foretold(**changes: Any) -> Forecast:
    asked: dict[str, Any] = {"scored": {}, "bank": 7.0, "limit": None, **changes}
    return forecast(0.5, TOKENS, PLAN, **asked)


def test_a_forecast_by_hand() -> None:
    found = foretold()
    assert found.by_stage == {
        "bank": 7.0,
        "sensitivity": 2500.0,
        "baselines": 5 * 50.0 + 11 * 100.0,  # and the reference, once a partition
        "trials": 150 * 50.0,
        "finalists": 6 * 100.0,
        "test": 0.8 * 100.0 + (4 + 1.8) * 200.0,
    }
    assert found.total == sum(found.by_stage.values())
    assert (found.trials, found.trial) == (150, 50.0)
    assert found.after_trials(25.0) == (found.finalists + found.test) / 2


def test_where_the_time_is_used_up_nothing_more_is_proposed() -> None:
    found = foretold(limit=-3.0)
    assert (found.trials, found.limit) == (0, 0.0)
    assert found.finalists > 0


def test_what_a_search_needs_is_one_line() -> None:
    loaded = Needs(False, "3.00 GiB is available", 2 * 2**30, 0, 0)
    streamed = Needs(True, "loaded whole it takes 9.00 GiB", 2**30, 5 * 2**20, 2**20)
    assert [str(loaded), str(streamed)] == [
        "run loaded whole (3.00 GiB is available): about 2.00 GiB of memory at the peak",
        "run block by block (loaded whole it takes 9.00 GiB): about 1.00 GiB of memory at the "
        "peak, 5.00 MiB of disk for the bank, 1.00 MiB of memory or disk for hidden states",
    ]


def test_a_proposal_may_take_more_than_an_evaluation() -> None:
    plan = Plan(baselines=10, searched=4, trials=150, finalists=6, trial_cost=1.2)
    found = forecast(0.5, TOKENS, plan, {}, 7.0, None)
    assert found.trial == pytest.approx(60.0)
    assert found.by_stage["trials"] == pytest.approx(150 * 60.0)
    assert found.by_stage["baselines"] == foretold().by_stage["baselines"]


def test_a_bank_that_is_not_timed_is_left_out_of_the_sum() -> None:
    assert foretold(bank=None).total == foretold(bank=0.0).total
    assert "bank" not in foretold(bank=None).by_stage


@pytest.mark.parametrize(("limit", "trials"), [(1e9, 150), (600.0, 12), (1.0, 0)])
def test_a_limit_of_time_says_how_many_trials_it_gives(limit: float, trials: int) -> None:
    assert foretold(limit=limit).trials == trials


def test_what_is_scored_already_costs_nothing_again() -> None:
    whole = foretold()
    some = foretold(scored={("search", False): 2}, sensitivity_known=True)
    assert some.sensitivity == 0
    assert some.baselines == whole.baselines - 2 * 50
    assert some.trials == 150
    validating = foretold(scored={("search", False): 8, ("validation", False): 1})
    assert validating.baselines == 10 * 100
    proposing = {("search", False): 8, ("validation", False): 8, ("search", True): 20}
    more = foretold(scored=proposing)
    assert (more.baselines, more.trials, more.finalists) == (0, 130, whole.finalists)
    chosen = proposing | {("search", True): 170, ("validation", True): 2}
    assert foretold(scored=chosen).finalists == 4 * 100
    assert foretold(scored=chosen).trials == 0
    ended = chosen | {("test", True): 1}
    assert foretold(scored=ended, bank=0.0, sensitivity_known=True).total == 0
    assert foretold(scored=ended | {("search", True): 140}).finalists == 4 * 100


def test_tokens_are_counted_before_anything_is_asked(
    tiny: Model, tiny_facts: FactSet, tiny_space: ResolvedSpace, tmp_path: Path
) -> None:
    run = Run.create(tmp_path / "run", {}, tiny_space)
    freeze_facts(run, tiny, tiny_facts, 30)
    text = Text.builtin()
    found = tokens_asked(run, tiny, tiny_facts, text)
    searched = asked_facts(run, tiny_facts, "search")
    assert found.search == RecallProxy(tiny, tiny_facts, searched, contrast=False).tokens
    of_test = RecallProxy(
        tiny, tiny_facts, asked_facts(run, tiny_facts, "test"), contrast=True
    ).tokens
    assert found.test == pytest.approx(of_test, rel=0.3)
    per_fact = found.test / len(run.relations("test"))
    read = found.validation - per_fact * len(run.relations("validation"))
    assert read == pytest.approx(TextGuard(tiny, text.held_out)._pass.tokens, rel=0.2)
    run.content["question"] = {"max_text_kl_nats": 0.1}
    limited = tokens_asked(run, tiny, tiny_facts, text)
    assert limited == replace(found, search=limited.search)
    assert limited.search > found.search + 500
    assert len(searched) <= MOST_FACTS["sensitivity"]


def test_a_search_foretells_and_keeps_what_it_took(
    tiny: Model, tiny_facts: FactSet, tiny_space: ResolvedSpace, budget: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("MPSEARCH_HOME", str(tmp_path / "home"))  # where no bank is
    said: list[Forecast] = []
    needs: list[Needs] = []

    def ask(resume: bool) -> dict[str, Any]:
        said.clear()
        needs.clear()
        search(
            tiny, tiny_space, budget=budget, out=tmp_path / "run", trials=4, search_facts=20,
            facts=tiny_facts, resume=resume, needed=needs.append, estimated=said.append,
        )  # fmt: skip
        content = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
        assert content["forecast_seconds"] == said[-1].by_stage
        return dict(content)

    content = ask(resume=False)
    (needed,) = needs
    assert content["needs"] == asdict(needed)
    assert not needed.streamed
    assert needed.disk_bytes == sum(
        fmt.layer_bytes(layer) for layer, fmt in all_layers(tiny_space) if fmt.quantized
    )
    first, timed = said
    assert (first.bank, first.trials) == (None, 4)
    assert timed.bank is not None and timed.bank > 0
    assert replace(timed, bank=None) == first
    simple = Counter(s.partition for s in Run.open(tmp_path / "run").scores() if s.kind != "search")
    assert 0 < simple["search"] < simple["validation"]
    alike = 10 - simple["validation"]  # allocations of two rules, which fit and are asked once
    of_search = (simple["search"] + alike + 1) * first.trial / TRIAL_COST
    of_validation = 11 * first.finalists / (2 * FINALISTS)
    assert first.baselines == pytest.approx(of_search + of_validation)
    took = content["took_seconds"]
    assert list(took) == list(content["forecast_seconds"])
    assert all(seconds > 0 for seconds in took.values())
    assert took["baselines"] > took["finalists"]

    again = ask(resume=True)
    (left,) = said
    assert needs == [replace(needed, disk_bytes=0, why=needs[0].why)]
    assert (left.bank, left.sensitivity, left.baselines, left.trials) == (0, 0, 0, 0)
    assert sum(again["took_seconds"].values()) < sum(took.values())


def test_a_run_of_before_the_pace_was_measured_is_resumed_without_a_forecast(
    tiny: Model, tiny_facts: FactSet, tiny_space: ResolvedSpace, budget: int, tmp_path: Path
) -> None:
    def ask(resume: bool, said: list[Forecast]) -> Run:
        return search(
            tiny, tiny_space, budget=budget, out=tmp_path / "run", trials=0, search_facts=20,
            facts=tiny_facts, resume=resume, estimated=said.append,
        )  # fmt: skip

    run, said = ask(False, []), list[Forecast]()
    del run.content["pace"]
    run.save()
    assert ask(True, said).finished
    assert said == []
