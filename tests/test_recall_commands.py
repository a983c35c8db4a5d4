"""`mpsearch recall` and `mpsearch compare`: data, talk, and one line where something is wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from math import exp, log
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tokenizer

import mpsearch as mps
from mpsearch import cli, opening, recall
from mpsearch.assignment import Assignment
from mpsearch.export.reload import load_any
from mpsearch.facts import Fact, FactSet
from mpsearch.models import Model
from mpsearch.space import ResolvedSpace

Capture = pytest.CaptureFixture[str]


def call(capsys: Capture, *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def call_json(capsys: Capture, *arguments: object) -> dict[str, Any]:
    code, out, err = call(capsys, *arguments, "--json")
    assert code == 0, err
    content: dict[str, Any] = json.loads(out)
    return content


@pytest.fixture(scope="module")
def int2(tiny: Model, tiny_space: ResolvedSpace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export at two bits, which forgets."""
    assignment = Assignment.of({group.name: "int2-g64" for group in tiny_space.groups})
    return mps.export(tiny, assignment, out=tmp_path_factory.mktemp("exports") / "int2")


def test_recall_of_a_model(tiny_folder: Path, facts_file: Path, capsys: Capture) -> None:
    code, out, err = call(capsys, "recall", tiny_folder, "--facts", facts_file)
    assert code == 0
    rows = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert {"color", "place", "shape", "mean"} <= set(rows)
    assert "3 of 3 relations beat chance" in out
    assert "Noise floor" in out
    assert err.splitlines()[0] == f"loading {tiny_folder}"
    assert err.splitlines()[-1] == f"next: mpsearch compare {tiny_folder} EXPORT"

    told = call_json(capsys, "recall", tiny_folder, "--facts", facts_file)
    assert (told["partition"], told["shots"], told["facts"]) == ("test", 4, 51)
    assert [row["relation"] for row in told["relations"]] == ["color", "place", "shape"]
    assert told["recall"]["mean"] > 0.95
    assert told["chance"] == pytest.approx((1 / 6 + 1 / 5 + 1 / 4) / 3)
    for row in told["relations"]:
        assert row["recall"]["low"] < row["recall"]["mean"] <= row["recall"]["high"]
        assert row["beats_chance"] is True
    assert told["noise"]["facts"] == 51
    assert (told["text"]["source"], told["text"]["paragraphs"]) == ("built-in", 16)
    assert told["seconds"] > 0


def test_recall_in_other_partitions_and_without_examples(
    tiny_folder: Path,
    facts_file: Path,
    tiny_facts: FactSet,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[str, int]] = []

    def prompt(fact_set: FactSet, fact: Fact, shots: int, reverse_examples: bool) -> str:
        asked.append((fact.subject, shots))
        return fact.prompt

    monkeypatch.setattr(recall, "prompt", prompt)
    question = ("recall", tiny_folder, "--facts", facts_file)
    told = call_json(capsys, *question, "--partition", "validation", "--shots", 0)
    assert (told["partition"], told["shots"]) == ("validation", 0)
    facts = tiny_facts.part("validation")
    assert told["facts"] == len(facts)
    assert set(asked) == {(fact.subject, 0) for fact in facts}


def test_compare_names_what_an_export_forgot(
    tiny_folder: Path, facts_file: Path, int2: Path, capsys: Capture
) -> None:
    question = ("compare", tiny_folder, int2, "--facts", facts_file)
    told = call_json(capsys, *question)
    overall = told["overall"]
    assert overall["forgotten"] > 3
    assert overall["p"] < 0.05
    assert overall["answer_loss"]["low"] > 0
    assert not told["below_noise"]
    assert sum(row["forgotten"] for row in told["relations"].values()) == overall["forgotten"]
    assert len(told["flips"]) == overall["forgotten"] + overall["gained"]
    before = call_json(capsys, "recall", tiny_folder, "--facts", facts_file)
    after = call_json(capsys, "recall", int2, "--facts", facts_file)
    right = [round(sum(r["recall"]["mean"] * r["facts"] for r in t["relations"]))
             for t in (before, after)]  # fmt: skip
    assert right[0] - right[1] == overall["forgotten"] - overall["gained"]

    code, out, err = call(capsys, *question)
    assert code == 0
    for flip in told["flips"]:
        assert any(
            {flip["relation"], flip["subject"], flip["answer"]} <= set(line.split())
            for line in out.splitlines()
        )
    assert told["verdict"] in out
    assert err.splitlines()[-1] == f"next: mpsearch recall {int2}"
    assert "Decompressing" not in err and "Applying" not in err  # the loader's own bars


def test_compare_a_model_with_itself_finds_nothing(
    tiny_folder: Path, facts_file: Path, capsys: Capture
) -> None:
    question = ("compare", tiny_folder, tiny_folder, "--facts", facts_file)
    told = call_json(capsys, *question)
    assert told["flips"] == []
    assert told["below_noise"] is True
    assert told["overall"]["p"] == 1.0
    assert "is not beyond noise" in told["verdict"]
    _, out, _ = call(capsys, *question)
    assert "~0.000 [0.000, 0.000]" in out
    assert told["text"]["kl_nats"] == {"mean": 0.0, "stderr": 0.0}
    assert told["text"]["log_perplexity_change_nats"]["mean"] == 0.0
    assert "KL 0.000 [0.000, 0.000] nats a token" in out
    assert "Flipped" not in out


def test_displaced_facts_are_told_from_forgotten_ones(
    tiny_folder: Path, facts_file: Path, int2: Path, capsys: Capture
) -> None:
    question = ("compare", tiny_folder, int2, "--facts", facts_file, "--shots", 2, "--displaced")
    told = call_json(capsys, *question)
    displaced = told["displaced"]
    forgotten = [(flip["relation"], flip["subject"]) for flip in told["flips"] if flip["forgotten"]]
    listed = [(fact["relation"], fact["subject"]) for fact in displaced["facts"]]
    assert sorted(listed) == sorted(forgotten)
    # These facts have no paraphrases, and their relations four examples.
    assert [way["way"] for way in displaced["ways"]] == [
        "more examples", "the surest prompt", "any other prompt",
    ]  # fmt: skip
    assert displaced["kept"] == told["overall"]["kept"]
    assert displaced["missed"] == told["overall"]["never"]
    null = displaced["null"]
    assert null["missed"] == told["overall"]["facts"] - displaced["kept"] - len(listed)
    assert (null["gained"], null["forgotten"]) == (told["overall"]["gained"], len(listed))
    assert null["null_forgotten"] < len(listed) / 2  # the model knows its facts in any order

    code, out, err = call(capsys, *question)
    assert code == 0
    assert displaced["verdict"] in out
    assert "asking in other ways: 1/1" in err


def test_two_hop_questions_are_asked(
    tiny_folder: Path, facts_file: Path, connected_file: Path, capsys: Capture
) -> None:
    question = (
        "recall",
        tiny_folder,
        "--facts",
        connected_file,
        "--partition",
        "search",
        "--two-hop",
    )
    told = call_json(capsys, *question)
    assert told["two_hop"] is True
    assert [row["relation"] for row in told["relations"]] == ["shape/place"]
    hops = [(row["first"], row["second"]) for row in told["hops"]]
    assert hops == [(True, True), (True, False), (False, True), (False, False)]
    facts = [row["facts"] for row in told["hops"]]
    assert sum(facts) == told["facts"] > 10
    assert facts[1] + facts[3] <= 2 < facts[2]  # the model was taught the second hop only
    _, out, _ = call(capsys, *question)
    assert "known       known" in out and "a failure to compose" in out

    code, out, err = call(capsys, "recall", tiny_folder, "--facts", facts_file, "--two-hop")
    assert (code, out) == (2, "")
    assert "give no two-hop questions" in err.splitlines()[-1]


@torch.no_grad()
def plainly(folder: Path, paragraphs: tuple[str, ...]) -> list[torch.Tensor]:
    """Log-probabilities of each paragraph's next tokens, by transformers alone."""
    module = load_any(str(folder)).module
    tokens = [build_tokenizer()(p, return_tensors="pt")["input_ids"] for p in paragraphs]
    return [module(t).logits[0, :-1].double().log_softmax(-1) for t in tokens]


def test_fluency_is_that_of_a_plain_pass_of_the_held_out_paragraphs(
    tiny_folder: Path, facts_file: Path, int2: Path, tmp_path: Path, capsys: Capture
) -> None:
    paragraphs = tuple(f"the color of s{n} is red the place of s{n + 3} is" for n in range(8))
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(paragraphs), encoding="utf-8")
    question = ("--facts", facts_file, "--text", path)
    told = call_json(capsys, "compare", tiny_folder, int2, *question)["text"]

    before, after = (plainly(folder, paragraphs[1::2]) for folder in (tiny_folder, int2))
    came = [torch.tensor(build_tokenizer()(p)["input_ids"])[1:, None] for p in paragraphs[1::2]]
    tokens = sum(map(len, came))
    perplexity = [
        exp(-sum(float(lp.gather(-1, c).sum()) for lp, c in zip(said, came, strict=True)) / tokens)
        for said in (before, after)
    ]
    kl = sum(float((p.exp() * (p - q)).sum()) for p, q in zip(before, after, strict=True))
    assert (told["source"], told["paragraphs"], told["tokens"]) == (str(path), 4, tokens)
    # Packed or not, sums differ in their last digits; perplexity is an exponential, and where the
    # machine has bf16 arithmetic those digits are few.
    assert told["reference_perplexity"] == pytest.approx(perplexity[0], rel=5e-3)
    assert told["perplexity"] == pytest.approx(perplexity[1], rel=5e-3)
    assert told["kl_nats"]["mean"] == pytest.approx(kl / tokens, rel=5e-3)
    change = told["log_perplexity_change_nats"]
    assert change["mean"] == pytest.approx(log(perplexity[1] / perplexity[0]), abs=5e-3)
    assert change["stderr"] > 0

    alone = call_json(capsys, "recall", int2, *question)["text"]
    assert alone["perplexity"] == told["perplexity"]
    assert (alone["source"], alone["tokens"]) == (str(path), tokens)
    out = call(capsys, "recall", int2, *question)[1]
    assert f"4 paragraphs, {tokens} tokens): perplexity {alone['perplexity']:.2f} [" in out
    out = call(capsys, "compare", tiny_folder, int2, *question)[1]
    assert f"): KL {told['kl_nats']['mean']:.3f} [" in out
    assert f"perplexity {told['reference_perplexity']:.2f} -> {told['perplexity']:.2f}, " in out
    assert f"log-perplexity {change['mean']:+.3f} [" in out


def test_depth_says_after_which_block_answers_are_lost(
    tiny_folder: Path, facts_file: Path, int2: Path, capsys: Capture
) -> None:
    question = ("compare", tiny_folder, int2, "--facts", facts_file, "--depth")
    told = call_json(capsys, *question)
    depth = told["depth"]
    assert len(depth["blocks"]) == 2
    last = depth["blocks"][-1]["shortfall"]
    assert last == pytest.approx(told["overall"]["answer_loss"], abs=1e-4)
    assert depth["half_from"] in (0, 1)
    forgotten = [(flip["relation"], flip["subject"]) for flip in told["flips"] if flip["forgotten"]]
    assert sorted((fact["relation"], fact["subject"]) for fact in depth["forgotten"]) == sorted(
        forgotten
    )
    assert sum(block["forgotten"] for block in depth["blocks"]) == sum(
        fact["block"] is not None for fact in depth["forgotten"]
    )

    code, out, err = call(capsys, *question)
    assert code == 0
    rows = [line.split() for line in out[out.index("reference log-prob") :].splitlines()]
    for number, block in enumerate(depth["blocks"]):
        row = next(row for row in rows if row[:1] == [str(number)])
        assert row[1] == f"{block['reference_log_prob']:.3f}"
        assert row[2] == f"{block['candidate_log_prob']:.3f}"
        assert row[3] == f"{block['shortfall']['mean']:.3f}"
    assert out.splitlines()[-1] == depth["verdict"]
    assert err.splitlines()[-1] == f"next: mpsearch recall {int2}"


def test_depth_is_told_only_where_it_is_asked_for(
    tiny_folder: Path, facts_file: Path, capsys: Capture
) -> None:
    question = ("compare", tiny_folder, tiny_folder, "--facts", facts_file)
    assert "depth" not in call_json(capsys, *question)
    depth = call_json(capsys, *question, "--depth")["depth"]
    assert depth["half_from"] is None
    assert all(block["shortfall"]["mean"] == 0 for block in depth["blocks"])


def test_wrong_usage_is_one_line(
    tiny_folder: Path, facts_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text(
        '{"relation": "color", "template": "the color of {} is", "subject": "s3", "answer": "red"}'
    )
    for arguments, words in (
        ((tiny_folder, "--facts", few), "is in the test partition"),
        ((tiny_folder, "--facts", facts_file, "--shots", "-1"), "shots -1"),
        ((tiny_folder, "--facts", facts_file, "--text", few), "1 paragraphs, and 4 are needed"),
        ((tmp_path / "nothing", "--facts", facts_file), "neither a folder here nor a hub id"),
    ):
        code, out, err = call(capsys, "recall", *arguments)
        assert (code, out) == (2, "")
        assert err.splitlines()[-1].startswith("mpsearch: ")
        assert words in err.splitlines()[-1]


def test_a_reference_that_is_run_block_by_block_reads_the_same_blocks(
    tiny_folder: Path,
    facts_file: Path,
    int2: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    question = ("compare", tiny_folder, int2, "--facts", facts_file, "--depth")
    loaded = call_json(capsys, *question)
    choose, streamed = opening.choose, []

    def streams(name: str, *asked: Any) -> opening.Choice:
        streamed.append(name)
        return replace(choose(name, *asked), streamed=True)

    monkeypatch.setattr(opening, "choose", streams)
    told = call_json(capsys, *question)
    assert streamed == [str(tiny_folder)]
    assert told["depth"] == loaded["depth"]
    assert told["flips"] == loaded["flips"]
