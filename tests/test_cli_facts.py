"""`mpsearch facts`: what a set holds, on which stream, and how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mpsearch import cli
from mpsearch.facts import PARTITIONS, FactSet


def facts(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main(["facts", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my facts.jsonl"
    lines = ['{"relation": "capital", "template": "The capital of {} is"}']
    lines += [
        json.dumps({"relation": "capital", "subject": f"land {n}", "answer": f"town {n % 40}"})
        for n in range(200)
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_a_file_is_described_and_the_next_command_searches_it(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = facts(capsys, file)
    assert code == 0
    assert f"{file}: 200 one-hop facts, 0 two-hop questions" in out
    row = next(line.split() for line in out.splitlines() if "one-hop  " in line)
    counts = [str(len(FactSet.load(file).part(name))) for name in PARTITIONS]
    assert row == ["capital", "one-hop", "200", *counts, "1", "40", "0", "7,", "at", "most", "7",
                   "12.5"]  # fmt: skip
    assert err.splitlines()[0].startswith(f"read {file} in ")
    assert err.splitlines()[-1] == (
        f"next: mpsearch search builtin:smollm2-135m --budget SIZE --facts '{file}' -o runs/NAME"
    )


def test_the_built_in_facts_are_described_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = facts(capsys, "--json")
    told = json.loads(out)
    assert code == 0
    assert told["one_hop"] >= 3000
    assert told["two_hop"] >= 600
    assert sum(row["facts"] for row in told["relations"]) == told["one_hop"] + told["two_hop"]
    assert " --facts " not in err.splitlines()[-1]


def test_what_a_user_should_look_at_is_said_on_standard_error(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text("\n".join(file.read_text().splitlines()[:4]), encoding="utf-8")
    code, out, err = facts(capsys, file)
    assert code == 0
    assert "look at this: relation 'capital' has " in err
    assert "look at this" not in out
    assert json.loads(facts(capsys, file, "--json")[1])["warnings"]


def test_a_bad_file_is_one_line_and_exit_code_2(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with file.open("a", encoding="utf-8") as stream:
        stream.write('\n{"relation": "capital", "subject": "France", "answer": ""}\n')
    code, out, err = facts(capsys, file)
    assert (code, out) == (2, "")
    assert err == f"mpsearch: {file}, line 202: fact about 'France' has no answer\n"


def test_describing_facts_needs_no_torch(file: Path) -> None:
    code = (
        "import sys; from mpsearch import cli; cli.main(['facts', sys.argv[1]]);"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])},
    )
    assert done.returncode == 0
