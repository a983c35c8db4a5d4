"""A hand-made run folder: written, opened, read without torch, its damages."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mpsearch.assignment import Assignment
from mpsearch.errors import ResourceError, RunError
from mpsearch.formats import get_format
from mpsearch.layers import Layer, LayerGroup
from mpsearch.points import Score
from mpsearch.run import Run

FIRST, SECOND = "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"
FORMATS = ["int2-g64", "int4-g64", "int8-g64"]
KEPT_BYTES = 1000
# One 64x64 layer: codes, one bf16 scale a row, two int64 of shape.
LAYER_BYTES = {
    "int2-g64": 1024 + 128 + 16,
    "int4-g64": 2048 + 128 + 16,
    "int8-g64": 4096 + 128 + 16,
}
RELATIONS = ["a", "a", "a", "b"]
BANK = {"quantizer": "rounding"}
Row = tuple[str, str, str, list[float]]  # kind, the two formats, loss a fact

ROWS: list[Row] = [
    ("uniform", "int2-g64", "int2-g64", [1.0, 2.0, 3.0, 4.0]),
    ("uniform", "int4-g64", "int4-g64", [0.5, 0.25, 0.75, 1.5]),
    ("uniform", "int8-g64", "int8-g64", [0.0, 0.01, 0.02, 0.03]),
    ("greedy", "int8-g64", "int2-g64", [1.0, 1.0, 1.0, 2.0]),
    ("search", "int2-g64", "int8-g64", [0.1, 0.05, 0.15, 0.2]),
]


def size(row: Row) -> int:
    return KEPT_BYTES + LAYER_BYTES[row[1]] + LAYER_BYTES[row[2]]


def line(
    row: Row,
    partition: str = "validation",
    right: list[bool] | None = None,
    refined: dict[str, Any] | None = None,
) -> str:
    """Of evaluations.jsonl; with the settings of its own bank if the assignment is refined."""
    content: dict[str, Any] = {
        "assignment": {FIRST: row[1], SECOND: row[2]},
        "kind": row[0],
        "partition": partition,
        "loss_per_fact": row[3],
        "kl_nats": 0.5,
        "top1": 0.75,
        "correct": right or [True, True, False, True],
        "seconds": 0.01,
    }
    if refined is not None:
        content["refined"] = refined
    return json.dumps(content) + "\n"


def write_run(folder: Path, rows: list[Row], budget_bytes: int = 7000) -> Run:
    """A run folder written by hand, as a search would leave it."""
    folder.mkdir()
    content: dict[str, Any] = {
        "version": 1,
        "question": {"model": "made-up", "budget_bytes": budget_bytes, "bank": BANK},
        "space": {
            "target": "compressed-tensors",
            "formats": FORMATS,
            "source": "by hand",
            "kept_bytes": KEPT_BYTES,
            "groups": [
                {"layers": [[name, 64, 64]], "options": FORMATS} for name in (FIRST, SECOND)
            ],
        },
        "asked": {"search": RELATIONS, "validation": RELATIONS, "test": RELATIONS},
        "finished": True,
    }
    (folder / "run.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "evaluations.jsonl").write_text("".join(map(line, rows)), encoding="utf-8")
    return Run.open(folder)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return write_run(tmp_path / "run", ROWS)


def test_reading_a_run_and_its_front_imports_neither_torch_nor_optuna(run: Run) -> None:
    code = (
        "import sys; from mpsearch.run import Run; front = Run.open(sys.argv[1]).front(); "
        "print(len(front.points)); "
        "assert not {'torch', 'optuna', 'transformers'} & set(sys.modules), 'heavy import'"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run.folder)],
        capture_output=True,
        text=True,
        cwd=run.folder,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "5"), done.stderr


def test_scores_carry_the_bank_settings_that_an_export_needs(run: Run) -> None:
    assert {json.dumps(BANK)} == {score.assignment.bank for score in run.scores()}


def test_open_refuses_another_version_and_what_is_no_run(run: Run, tmp_path: Path) -> None:
    content = json.loads((run.folder / "run.json").read_text(encoding="utf-8"))
    for other in (2, 0, None, "1"):
        changed = json.dumps({**content, "version": other})
        (run.folder / "run.json").write_text(changed, encoding="utf-8")
        with pytest.raises(RunError, match="another version"):
            Run.open(run.folder)
    (run.folder / "run.json").write_text("[1, 2]", encoding="utf-8")
    with pytest.raises(RunError, match="another version"):
        Run.open(run.folder)
    (run.folder / "run.json").write_text('{"version": 1', encoding="utf-8")
    with pytest.raises(RunError, match="cannot be read"):
        Run.open(run.folder)
    with pytest.raises(RunError, match="not a run folder"):
        Run.open(tmp_path)


def test_what_this_version_does_not_know_is_one_line(run: Run) -> None:
    text = (run.folder / "run.json").read_text(encoding="utf-8")
    for old, new in (('"int8-g64"', '"int9-g64"'), ('"compressed-tensors"', '"other-target"'),
                     ('"groups"', '"grouped"'), ('"layers"', '"modules"')):  # fmt: skip
        assert old in text
        (run.folder / "run.json").write_text(text.replace(old, new), encoding="utf-8")
        with pytest.raises(RunError, match=r"cannot be read by this version of mpsearch") as caught:
            Run.open(run.folder).front()
        assert len(str(caught.value).splitlines()) == 1
    for lacking in ("question", "space"):
        content = {key: value for key, value in json.loads(text).items() if key != lacking}
        (run.folder / "run.json").write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(RunError, match="is damaged: it has no question or no space"):
            Run.open(run.folder)


def test_a_folder_that_cannot_be_locked_is_a_resource_error(run: Run) -> None:
    (run.folder / "lock").mkdir()
    with pytest.raises(ResourceError, match="cannot write in"), run.locked():
        pass


def test_another_question_is_refused_and_named(run: Run) -> None:
    run.check_question(run.question)
    with pytest.raises(RunError, match="budget_bytes was 7000 and is now 8000"):
        run.check_question({**run.question, "budget_bytes": 8000})
    with pytest.raises(RunError, match="was searched by another version of mpsearch"):
        run.check_question({**run.question, "objective": "another"})


# --------------------------------------------------------------------------------- damaged files


def test_a_torn_last_line_is_left_out_and_mend_drops_it(run: Run) -> None:
    evaluations = run.folder / "evaluations.jsonl"
    whole = evaluations.read_bytes()
    run.journal.write_text('{"op": 1}\n{"op"', encoding="utf-8")
    evaluations.write_bytes(whole + line(ROWS[0], "test").encode()[:37])
    assert len(run.scores()) == len(ROWS)
    run.mend()
    assert evaluations.read_bytes() == whole
    assert run.journal.read_text(encoding="utf-8") == '{"op": 1}\n'
    run.mend()
    assert evaluations.read_bytes() == whole


def test_mend_empties_a_file_that_holds_only_a_torn_line(run: Run) -> None:
    (run.folder / "evaluations.jsonl").write_text('{"assig', encoding="utf-8")
    run.mend()
    assert run.scores() == []


OF_NOTHING = json.dumps({**json.loads(line(ROWS[0])), "assignment": 3}).encode()
OF_ANOTHER_FORMAT = line(("search", "int3-g64", "int2-g64", [1.0] * 4)).encode().rstrip()
NO_NUMBERS = json.dumps({**json.loads(line(ROWS[0])), "loss_per_fact": None}).encode()


@pytest.mark.parametrize(
    "damage",
    [
        *(b"{", b"\xff\xfe", b"[1]", b'{"kind": "search"}', b""),
        *(OF_NOTHING, OF_ANOTHER_FORMAT, NO_NUMBERS),
    ],
)
def test_a_damaged_line_in_the_middle_is_named(damage: bytes, run: Run) -> None:
    evaluations = run.folder / "evaluations.jsonl"
    first, second, *rest = evaluations.read_bytes().split(b"\n")
    evaluations.write_bytes(b"\n".join([first, damage, second, *rest]))
    with pytest.raises(RunError, match=r"evaluations\.jsonl', line 2: no evaluation") as caught:
        run.scores()
    assert "--resume" in str(caught.value)
    evaluations.write_bytes(b"\n".join([first, second, *rest]))
    assert len(run.scores()) == len(ROWS)


def a_score(row: Row) -> Score:
    assignment = Assignment.of({FIRST: row[1], SECOND: row[2]})
    return Score(assignment, row[0], "search", tuple(row[3]), 0.5, 0.75, None, 0.01)


def test_what_is_added_is_read_back_exactly(run: Run) -> None:
    score = a_score(("search", "int4-g64", "int8-g64", [0.1, 1 / 3, 2e-17, -0.0]))
    run.add(score)
    back = Run.open(run.folder).scores()[-1]
    assert (back.assignment, back.kind, back.partition) == (score.assignment, "search", "search")
    assert back.loss_per_fact == score.loss_per_fact
    assert back.correct is None


def test_a_full_disk_is_a_resource_error_and_keeps_what_was_finished(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (run.folder / "run.json").read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ResourceError, match="No space left") as caught:
            run.add(a_score(ROWS[4]))
        assert "--resume" in str(caught.value)
        run.content["finished"] = False
        with pytest.raises(ResourceError, match="No space left"):
            run.save()
    assert (run.folder / "run.json").read_bytes() == before
    assert not list(run.folder.glob(".*unfinished"))
    reopened = Run.open(run.folder)
    assert [s.kind for s in reopened.scores()][: len(ROWS)] == [row[0] for row in ROWS]
    assert reopened.front().pareto_ids == run.front().pareto_ids


def test_a_second_holder_of_the_folder_is_refused_until_the_first_lets_go(run: Run) -> None:
    other = Run.open(run.folder)
    refused = pytest.raises(RunError, match="another search is running")
    with run.locked(), refused, other.locked():
        pass
    stale = run.folder / "journal.log.lock"
    stale.write_text("", encoding="utf-8")
    with other.locked():
        assert not stale.exists()


def test_create_refuses_whatever_is_there(run: Run, tmp_path: Path) -> None:
    a_file = tmp_path / "file"
    a_file.write_text("mine", encoding="utf-8")
    for path in (run.folder, a_file):
        with pytest.raises(RunError, match="--resume"):
            Run.create(path, run.question, run.space)
    with pytest.raises(RunError, match=r"cannot create .* choose another -o"):
        Run.create(a_file / "run", run.question, run.space)
    assert a_file.read_text(encoding="utf-8") == "mine"


def test_a_tied_weight_keeps_its_size_when_the_run_is_opened_again(
    run: Run, tmp_path: Path
) -> None:
    tied = LayerGroup((Layer("model.embed_tokens", 71, 64, tied="lm_head"),))
    space = replace(
        run.space,
        groups=(*run.space.groups, tied),
        options={**run.space.options, tied.name: (get_format("fp8"),)},
    )
    back = Run.open(Run.create(tmp_path / "new", run.question, space).folder).space
    assert back.groups == space.groups
    assert back.stored_bytes(back.smallest) == space.stored_bytes(space.smallest)


def test_create_then_open_restores_the_space(run: Run, tmp_path: Path) -> None:
    made = Run.create(tmp_path / "deep" / "new", run.question, run.space)
    back = Run.open(made.folder)
    assert [group.name for group in back.space.groups] == [FIRST, SECOND]
    assert back.space.stored_bytes({FIRST: "int2-g64", SECOND: "int8-g64"}) == size(ROWS[4])
    assert not back.finished
