"""The comparison with peers: sizes, facts, and the whole on the tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import fact_lines

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import peers
from peers_choices import MIDWAY, Peers, budgets, inverted
from peers_facts import SearchFacts, untouched
from peers_findings import OURS

from mpsearch.allocate import greedy, uniform
from mpsearch.estimates import relation_mean
from mpsearch.evaluate import Bench
from mpsearch.facts import Fact, FactSet
from mpsearch.measures import Sensitivity
from mpsearch.models import Model
from mpsearch.recall import RecallProxy
from mpsearch.run import Run
from mpsearch.space import ResolvedSpace


def test_the_sizes_are_the_uniform_ones_and_between(tiny_space: ResolvedSpace) -> None:
    low, middle, high, more = budgets(tiny_space).values()
    uniforms = uniform(tiny_space)
    assert (low, high) == tuple(
        tiny_space.stored_bytes(uniforms[name]) for name in ("int3-g64", "int4-g64")
    )
    assert middle == (low + high) // 2
    kept = tiny_space.kept_bytes
    assert (more - kept) / (high - kept) == pytest.approx(1.25, abs=1e-4)


def test_losses_and_tokens_are_those_of_the_proxy(
    tiny_bench: Bench, tiny: Model, tiny_space: ResolvedSpace, tiny_facts: FactSet
) -> None:
    facts = [f for name in tiny_facts.relations for f in tiny_facts.part("search", {name})]
    search_facts = SearchFacts(tiny_bench, tiny_facts, facts)
    proxy = RecallProxy(tiny, tiny_facts, facts, contrast=False, prompts=True)
    assert search_facts.tokens == search_facts.cost(None) == proxy.tokens
    assignment = tiny_space.smallest
    lowered = tiny_bench.evaluate(assignment, proxy).objective_per_fact
    expected = relation_mean(lowered, proxy.relations).mean
    assert search_facts.loss(assignment, None) == pytest.approx(expected, abs=1e-5)
    some = (0, 3, 30)
    of_some = relation_mean(lowered[list(some)], [proxy.relations[number] for number in some])
    assert search_facts.loss(assignment, some) == pytest.approx(
        of_some.mean, abs=1e-3
    )  # bf16, packed otherwise
    assert 0 < search_facts.cost(some) < proxy.tokens


def test_the_inverted_table_gives_the_most_damage_to_the_least_sensitive() -> None:
    table = {(group, fmt): value * factor for group, value in zip("abc", (1, 5, 3), strict=True)
             for fmt, factor in (("int2", 2.0), ("int4", 1.0))}  # fmt: skip
    mirrored = inverted(table)
    assert [mirrored[group, "int4"] for group in "abc"] == [5, 1, 3]
    assert mirrored.keys() == table.keys()


def test_relations_and_subjects_that_the_search_facts_hold_are_no_final_facts() -> None:
    facts = FactSet((Fact("capital", "{} is", "France", "Paris"),), "mine")
    lre = FactSet(
        (
            Fact("country capital city", "{} is", "Peru", "Lima"),  # asks what capital asks
            Fact("new", "{} is", "FRANCE", "x"),
            Fact("new", "{} is", "The Gambia", "y"),
        ),
        "theirs",
    )
    assert [fact.subject for fact in untouched(lre, facts).facts] == ["The Gambia"]


# ------------------------------------------------------------------- the whole, on the tiny model


@pytest.fixture
def command(tiny_folder: Path, tmp_path: Path) -> list[str]:
    """All but the rivals; two relations are searched, the third is final, of other subjects."""
    lines = fact_lines()
    first = [line for line in lines if line["relation"] != "place"]
    second = [line for line in lines if line["relation"] == "place"]
    searched = [f"s{number}" for number in range(24)]
    (tmp_path / "facts.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in first
                if line.get("subject", searched[0]) in searched)
    )  # fmt: skip
    (tmp_path / "lre.jsonl").write_text("".join(json.dumps(line) + "\n" for line in second))
    return [
        "--model", str(tiny_folder), "--facts", str(tmp_path / "facts.jsonl"),
        "--lre", str(tmp_path / "lre.jsonl"), "--evaluations", "24", "--seeds", "0",
        "--search-facts", "20", "--runs", str(tmp_path / "runs"),
        "--out", str(tmp_path / "peers.json"), "--figure", str(tmp_path / "peers.png"),
    ]  # fmt: skip


def test_the_benchmark_runs_in_parts_and_says_what_it_found(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, left_as_found: None,
) -> None:  # fmt: skip
    monkeypatch.setattr("peers_facts._LEAST_FACTS", 5)
    monkeypatch.setattr("peers_facts.SEEN_FACTS", 3)
    asked = [*command, "--sizes", MIDWAY, "--rivals"]
    peers.main([*asked, "uniform", "knapsack", "evopress-warm", "--minutes", "0"])
    assert "the time is over" in capsys.readouterr().err
    peers.main([*asked, "uniform", "knapsack", "evopress-warm"])
    before = json.loads((tmp_path / "peers.json").read_text())
    peers.main([*asked, "uniform", OURS])
    out = capsys.readouterr().out
    result = json.loads((tmp_path / "peers.json").read_text())
    assert result["rows"][:3] == before["rows"]
    rows = {row["rival"]: row for row in result["rows"]}
    assert list(rows) == ["uniform", "knapsack", "evopress-warm", OURS]
    assert (
        max(row["stored_bytes"] for row in rows.values())
        <= (result["conditions"]["budgets_bytes"][MIDWAY])
    )
    assert rows["knapsack"]["evaluations"] == 0
    assert 66 < rows["evopress-warm"]["evaluations"] <= 72  # three times as many at the midpoint
    assert 12 < rows[OURS]["evaluations"] <= 24  # baselines and validation facts included
    assert result["conditions"]["lre_relations"] == ["place"]
    curve = {c["rival"]: c for c in result["curves"]}["evopress-warm"]
    losses = [loss for _, loss in curve["points"]]
    assert losses == sorted(losses, reverse=True)
    run = Run.open(tmp_path / "runs" / MIDWAY / f"{OURS}-0")
    fitting = [relation_mean(score.objective_per_fact, run.relations("search")).mean
               for score in run.scores() if score.partition == "search"
               and run.space.stored_bytes(score.assignment) <= run.budget_bytes]  # fmt: skip
    ours = {c["rival"]: c for c in result["curves"]}[OURS]
    assert [loss for _, loss in ours["points"]] == list(
        dict.fromkeys(np.minimum.accumulate(fitting))  # nothing over the budget counts
    )
    (against,) = result["findings"]["sizes"]
    assert against["answer_loss_nats"]["uniform"] == pytest.approx(rows["uniform"]["answer_loss"])
    assert [line.split(" | ")[0] for line in out.splitlines() if line.startswith("| uniform")]
    assert (tmp_path / "peers.png").stat().st_size > 1000


def test_a_row_is_not_mixed_with_those_of_another_question(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left_as_found: None
) -> None:
    monkeypatch.setattr("peers_facts._LEAST_FACTS", 5)
    monkeypatch.setattr("peers_facts.SEEN_FACTS", 3)
    peers.main([*command, "--sizes", MIDWAY, "--rivals", "uniform"])
    with pytest.raises(Exception, match="another 'evaluations'"):
        peers.main([*command, "--rivals", "uniform", "--evaluations", "25"])


def test_a_missing_environment_leaves_the_packages_out(
    tiny_bench: Bench, tiny_facts: FactSet, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "rival_environment", None)
    facts = tiny_facts.facts[:4]
    asked = peers.Asked(facts, facts, 4)
    compared = Peers(tiny_bench, tiny_facts, tiny_facts, asked, 1, tmp_path)
    assert compared.choice("auto-round", MIDWAY, 0) is None
    assert compared.choice("modelopt", MIDWAY, 0) is None
    assert capsys.readouterr().err.count("are left out") == 1


def test_the_two_greedy_rivals_read_different_columns_of_the_seeds_table(
    tiny_bench: Bench, tiny_facts: FactSet, tmp_path: Path
) -> None:
    facts = tiny_facts.part("search")[:8]
    compared = Peers(tiny_bench, tiny_facts, tiny_facts, peers.Asked(facts, facts, 8), 1, tmp_path)
    chosen = {name: compared.choice(name, MIDWAY, 0) for name in ("greedy", "greedy-fisher")}
    table = Sensitivity.load(tmp_path / "sensitivity-0.json")
    squared = {key: error**2 for key, error in table.weight_error.items()}
    for name, damage in (("greedy", squared), ("greedy-fisher", table.fisher_nats)):
        choice = chosen[name]
        assert choice is not None
        expected = greedy(tiny_bench.space, damage, compared.budgets[MIDWAY])
        assert choice.assignment == expected
    assert len({choice.assignment for choice in chosen.values() if choice}) == 2
