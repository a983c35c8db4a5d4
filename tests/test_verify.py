"""Verify: an export passes, every way to break it is found and named, and answers decide."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_cases import Cli, one_line
from conftest import build_tokenizer, tiny_llama
from safetensors.torch import load_file, save_file

from mpsearch import cli
from mpsearch.bootstrap import Interval
from mpsearch.errors import ResourceError, RunError, UsageError
from mpsearch.manifest import NAME, read_manifest, write_manifest
from mpsearch.promise import Answers, Promise, promise
from mpsearch.run import Run
from mpsearch.served import ask
from mpsearch.verify import Verification, verify

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def made(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of the pick; copy it to change it."""
    out = tmp_path_factory.mktemp("made") / "export"
    assert cli.main(["export", str(whole), "best", "-o", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def poor(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of all layers in two bits, which has forgotten something."""
    out = tmp_path_factory.mktemp("poor") / "export"
    smallest = min(Run.open(whole).front().points, key=lambda point: point.stored_bytes)
    assert cli.main(["export", str(whole), smallest.id, "-o", str(out)]) == 0
    return out


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask in this process, which saves seconds; two tests do without."""
    monkeypatch.setattr(sys.modules["mpsearch.verify"], "ask_fresh", ask)


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def sealed(folder: Path) -> None:
    """Give a changed folder a manifest that agrees with it, as who means harm would."""
    about = read_manifest(folder)
    write_manifest(folder, {k: v for k, v in about.items() if k not in ("files", "digest")})


def failed(found: Verification) -> list[str]:
    return [check.name for check in found.checks if not check.passed]


def test_an_export_answers_in_a_fresh_process_as_its_run_promised(
    made: Path, whole: Path, facts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whoever stands in a downloaded folder does not run what lies there.
    (tmp_path / "torch.py").write_text("raise SystemExit('this was run')")
    monkeypatch.chdir(tmp_path)
    run = Run.open(whole)
    promised = promise(run, run.find("best"))
    assert promised.partition == "test"
    found = verify(made, facts=str(facts_file))
    assert found.passed, found.reasons
    assert [check.name for check in found.checks] == [
        *("files", "loads", "bytes", "tokens", "answers", "recall", "promised loss")
    ]
    assert found.loader is not None and found.loader.startswith("transformers ")
    assert found.agreeing == found.facts == len(run.relations("test"))
    assert found.recall == promised.recall
    # What the run measured in its own process is measured again, to the last bit.
    assert found.answer_loss is not None
    assert found.answer_loss.mean == pytest.approx(promised.answer_loss.mean, abs=1e-9)
    assert (found.forgotten, found.gained) == (promised.forgotten, promised.gained)


def test_a_promise_survives_its_file(whole: Path) -> None:
    run = Run.open(whole)
    for point in run.front().points:
        made = promise(run, point)
        assert Promise.of(json.loads(json.dumps(made.to_json()))) == made
        assert made.reference is not None
        right = sum(made.reference.correct)
        assert made.forgotten is not None and made.gained is not None
        assert sum(made.candidate.correct) == right - made.forgotten + made.gained


def test_a_point_that_was_not_read_on_test_facts_promises_validation_facts(whole: Path) -> None:
    run = Run.open(whole)
    tested = {score.assignment for score in run.scores() if score.partition == "test"}
    others = [p for p in run.front().points if p.assignment not in tested]
    made = promise(run, others[0])
    assert made.partition == "validation"
    assert made.recall.mean == pytest.approx(others[0].recall.mean)


def flip_a_byte(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-5] ^= 64
    (folder / WEIGHTS).write_bytes(content)


def other_tokenizer(folder: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["of is"])
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (flip_a_byte, "'model.safetensors' was changed"),
        (lambda f: (f / WEIGHTS).unlink(), "'model.safetensors' is missing"),
        (lambda f: (f / "README.md").write_text("95 % recall"), "'README.md' has 11 bytes"),
        (other_tokenizer, "'tokenizer.json' has"),
        (
            lambda f: shutil.copy(f / WEIGHTS, f / "more.safetensors"),
            "'more.safetensors' was added",
        ),
        (lambda f: (f / "modeling.py").write_text("evil()"), "'modeling.py' was added"),
    ],
)
def test_a_changed_folder_is_not_even_loaded(
    copy: Path, damage: Callable[[Path], object], named: str, mpsearch: Cli
) -> None:
    damage(copy)
    outcome = mpsearch("verify", copy)
    assert outcome.code == 4
    assert "FAILED" in outcome.out and "loads" not in outcome.out
    assert named in outcome.talk[-1] and outcome.talk[-1].startswith("mpsearch: ")


def edited(folder: Path, change: Callable[[dict[str, Any]], object], seal: bool = False) -> None:
    content = json.loads((folder / NAME).read_text())
    change(content)
    (folder / NAME).write_text(json.dumps(content))
    if seal:
        sealed(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda about: about.update(promise=None),
        lambda about: about["promise"].pop("recall"),
        lambda about: about["promise"].update(relations=[]),
    ],
)
def test_a_promise_that_was_taken_out_is_an_edited_manifest(
    copy: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    edited(copy, change)
    found = verify(copy)
    assert "files" in failed(found) and "mpsearch.json was edited" in found.reasons


@pytest.mark.parametrize(
    "change",
    [
        lambda promised: promised.pop("recall"),
        lambda promised: promised["candidate"]["correct"].pop(),
        lambda promised: promised["reference"]["log_prob_nats"].pop(),
        lambda promised: promised["recall"].update(low="0"),
        lambda promised: promised["answer_loss"].update(mean=float("nan")),
        lambda promised: promised.update(relations=[], subjects=[]),
        lambda promised: [promised.update(relations=[], subjects=[], reference=None),
                          promised["candidate"].update(correct=[], log_prob_nats=None)],
    ],
)  # fmt: skip
def test_a_promise_that_is_none_fails_though_the_digest_fits(
    copy: Path, facts_file: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    edited(copy, lambda about: change(about["promise"]), seal=True)
    found = verify(copy, facts=str(facts_file))
    assert failed(found) == ["promise"]


def test_a_loss_that_nothing_can_tell_is_refused_before_anything_is_asked(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sys.modules["mpsearch.verify"], "ask_fresh", lambda request: pytest.fail("it was asked")
    )
    edited(copy, lambda about: about["promise"].update(reference=None), seal=True)
    with pytest.raises(RunError, match="say --reference MODEL to measure the answer loss"):
        verify(copy, max_loss_nats=1.0)
    edited(copy, lambda about: about.update(promise=None), seal=True)
    with pytest.raises(RunError, match="say --reference MODEL to measure the answer loss"):
        verify(copy, max_loss_nats=1.0)


@pytest.mark.usefixtures("here")
def test_facts_of_the_same_names_that_ask_otherwise_are_not_blamed_on_the_checkpoint(
    made: Path, facts_file: Path, tmp_path: Path
) -> None:
    reworded = tmp_path / "facts.jsonl"
    reworded.write_text(facts_file.read_text().replace('"template": "the ', '"template": "of '))
    with pytest.raises(RunError, match="are not those that were searched with"):
        verify(made, facts=str(reworded))


def with_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.usefixtures("here")
def test_weights_that_answer_otherwise_are_found_by_their_answers(
    copy: Path, facts_file: Path
) -> None:
    def another_base_model(tensors: dict[str, torch.Tensor]) -> None:
        other = tiny_llama(len(build_tokenizer()), seed=5).state_dict()
        for name, tensor in tensors.items():
            if name in other:
                tensors[name] = other[name].to(tensor.dtype)

    with_weights(copy, another_base_model)
    sealed(copy)
    found = verify(copy, facts=str(facts_file))
    assert "answers" in failed(found)
    assert any("are answered as promised" in reason for reason in found.reasons)


@pytest.mark.usefixtures("here")
def test_another_points_weights_are_not_taken_for_this_ones(
    poor: Path, made: Path, facts_file: Path, tmp_path: Path
) -> None:
    """Better ones than were promised, even."""
    copy = Path(shutil.copytree(poor, tmp_path / "swapped"))
    for name in (WEIGHTS, "config.json"):
        shutil.copy(made / name, copy / name)
    sealed(copy)
    found = verify(copy, facts=str(facts_file))
    assert {"bytes", "promised loss"} <= set(failed(found))


@pytest.mark.parametrize(
    ("wrong", "facts", "share", "passes"),
    [
        *((0, 5, 0.99, True), (1, 5, 0.99, True), (2, 5, 0.99, False), (3, 300, 0.99, True)),
        *((4, 300, 0.99, False), (4, 300, 0.95, True), (16, 300, 0.95, False)),
    ],
)
def test_few_answers_may_turn_even_where_recall_was_certain(
    wrong: int, facts: int, share: float, passes: bool
) -> None:
    names = [f"s{i}" for i in range(facts)]
    told = Answers((True,) * facts, (0.0,) * facts)
    sure, none = Interval(1.0, 1.0, 1.0), Interval(0.0, 0.0, 0.0)
    asked = {
        "facts": "",
        "shots": 4,
        "chat_template": False,
        "dtype": "",
        "tokens": "t",
        "device": "cpu",
    }
    promised = Promise(
        "test", **asked, relations=("r",) * facts, subjects=tuple(names), candidate=told,
        reference=told, recall=sure, answer_loss=none,
    )  # fmt: skip
    answered = {
        "relations": ["r"] * facts, "subjects": names, "tokens": "t", "loader": "l",
        "correct": [i >= wrong for i in range(facts)], "log_prob_nats": [0.0] * facts,
        "load_seconds": 0.0, "ask_seconds": 0.0, "dtype": "torch.float16", "device": "cpu",
    }  # fmt: skip
    compare = sys.modules["mpsearch.verify"]._compare
    found = compare(Path("x"), [], answered, promised, share, told, None)
    assert found.passed is passes, found.reasons


@pytest.mark.parametrize(
    ("target", "fmt", "dtype", "device", "share"),
    [
        ("compressed-tensors", "int4-g64", "torch.bfloat16", "cpu", 0.99),
        ("compressed-tensors", "int4-g64", "torch.bfloat16", "cuda", 0.96),
        ("gptq", "gptq4-g64", "torch.float16", "cpu", 0.96),
        ("bitsandbytes", "nf4", "torch.bfloat16", "cpu", 0.99),
        ("bitsandbytes", "int8", "torch.bfloat16", "cpu", 0.95),
        ("dequantized", "int8", "torch.bfloat16", "cpu", 0.99),
    ],
)
def test_more_answers_may_turn_where_the_arithmetic_is_another(
    made: Path, target: str, fmt: str, dtype: str, device: str, share: float
) -> None:
    written = Promise.of(read_manifest(made)["promise"])
    assert written.device == "cpu"
    promised = replace(written, dtype="torch.bfloat16")
    about = {"target": target, "assignment": {"a": "bf16", "b": fmt}}
    enough = sys.modules["mpsearch.verify"]._enough
    assert enough(about, promised, {"dtype": dtype, "device": device}) == share
    of_old = replace(promised, device=None)  # nobody knows on which
    assert enough(about, of_old, {"dtype": promised.dtype, "device": "cuda"}) in (0.99, 0.95)


@pytest.mark.usefixtures("here")
def test_a_tokenizer_that_reads_the_facts_otherwise_is_found_by_its_tokens(
    copy: Path, facts_file: Path
) -> None:
    path = copy / "tokenizer.json"
    content = json.loads(path.read_text())
    words = content["model"]["vocab"]
    words["red"], words["green"] = words["green"], words["red"]
    path.write_text(json.dumps(content))
    sealed(copy)
    found = verify(copy, facts=str(facts_file))
    assert "tokens" in failed(found)
    assert "the tokenizer reads the facts as other tokens than the run's did" in found.reasons


@pytest.mark.usefixtures("here")
def test_what_does_not_load_fails_with_the_reason(copy: Path, facts_file: Path) -> None:
    with_weights(copy, lambda tensors: tensors.pop("model.norm.weight"))
    (copy / "config.json").write_text("{}")
    sealed(copy)
    found = verify(copy, facts=str(facts_file))
    assert failed(found) == ["loads"]


def test_a_build_can_gate_on_the_answer_loss(poor: Path, facts_file: Path, mpsearch: Cli) -> None:
    outcome = mpsearch("verify", poor, "--facts", facts_file, "--max-loss", "0.0", "--json")
    assert outcome.code == 4, outcome.err
    found: dict[str, Any] = json.loads(outcome.out)
    assert found["passed"] is False and found["answer_loss"]["mean"] > 0
    failing = [check["name"] for check in found["checks"] if not check["passed"]]
    assert failing == ["loss"]
    assert "0 are allowed" in outcome.talk[-1]


@pytest.mark.usefixtures("here")
def test_the_reference_has_to_be_the_model_it_was_made_from(
    made: Path, tiny_folder: Path, facts_file: Path, tmp_path: Path
) -> None:
    right = verify(made, facts=str(facts_file), reference=str(tiny_folder))
    assert right.passed, right.reasons
    other = tmp_path / "other"
    tiny_llama(len(build_tokenizer()), seed=3).to(torch.bfloat16).save_pretrained(other)
    build_tokenizer().save_pretrained(other)
    wrong = verify(made, facts=str(facts_file), reference=str(other))
    assert failed(wrong) == ["reference"]
    assert "not the model it was made from" in wrong.reasons[0]
    turned = Path(shutil.copytree(tiny_folder, tmp_path / "turned"))
    config = json.loads((turned / "config.json").read_text(encoding="utf-8"))
    config["rope_parameters"]["rope_theta"] = 500.0
    (turned / "config.json").write_text(json.dumps(config), encoding="utf-8")
    wrong = verify(made, facts=str(facts_file), reference=str(turned))
    assert failed(wrong) == ["reference"]


@pytest.mark.usefixtures("here")
def test_the_reference_of_folded_weights_has_to_answer_as_it_did(
    copy: Path, tiny_folder: Path, facts_file: Path, tmp_path: Path
) -> None:
    # AWQ's scales are folded in, so the digest of its weights is another in any case.
    edited(copy, lambda about: about.update(awq=True, base_fingerprint="0" * 64), seal=True)
    right = verify(copy, facts=str(facts_file), reference=str(tiny_folder))
    assert right.passed, right.reasons
    other = tmp_path / "other"
    tiny_llama(len(build_tokenizer()), seed=3).to(torch.bfloat16).save_pretrained(other)
    build_tokenizer().save_pretrained(other)
    wrong = verify(copy, facts=str(facts_file), reference=str(other), max_loss_nats=1.0)
    assert failed(wrong) == ["reference"]
    assert "facts as the model it was made from" in wrong.reasons[0]


@pytest.mark.parametrize("last", ["MemoryError", "torch.OutOfMemoryError: CUDA out of memory."])
def test_memory_that_runs_out_is_not_blamed_on_the_checkpoint(
    copy: Path, facts_file: Path, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    monkeypatch.setattr(sys.modules["mpsearch.verify"], "_SERVED", f"raise SystemExit('{last}')")
    with pytest.raises(ResourceError, match="ran out of memory"):
        verify(copy, facts=str(facts_file))


@pytest.mark.usefixtures("here")
def test_another_checkpoint_is_checked_against_a_reference(
    poor: Path, tiny_folder: Path, facts_file: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(poor, tmp_path / "foreign"))
    (copy / NAME).unlink()
    given = {"facts": str(facts_file), "reference": str(tiny_folder)}
    found = verify(copy, **given, max_loss_nats=50.0)
    assert found.passed and found.answer_loss is not None
    assert found.promised_recall is None and found.agreeing is None
    assert not verify(copy, **given, max_loss_nats=0.0).passed
    with pytest.raises(UsageError, match="promises nothing that could be checked"):
        verify(copy, **given)
    with pytest.raises(RunError, match="--reference MODEL and --max-loss"):
        verify(copy)


@pytest.mark.usefixtures("here")
def test_other_facts_than_were_searched_with_are_refused(made: Path, mpsearch: Cli) -> None:
    one_line(mpsearch("verify", made), 2, "pass the file that was searched with --facts")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["verify", "FOLDER/none"], "is no folder"),
        (["verify", "FOLDER", "--max-loss", "nan"], "max loss nan"),
        (["verify", "FOLDER", "--max-loss", "-1"], "max loss -1"),
        (["verify", "FOLDER"], "is no export of mpsearch"),
    ],
)
def test_bad_input_is_one_line(given: list[str], words: str, tmp_path: Path, mpsearch: Cli) -> None:
    one_line(mpsearch(*(word.replace("FOLDER", str(tmp_path)) for word in given)), 2, words)
