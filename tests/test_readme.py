"""Every command and every line of Python in the README works, on a small model."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from mpsearch.cli import main
from mpsearch.facts import FactSet
from mpsearch.served import ask
from mpsearch.space import SearchSpace

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Uniform 4-bit of the tiny model is between its extremes: a budget that both searches can meet.
SMALL = {"103MiB": "70KiB", "103 MiB": "70 KiB"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    return re.findall(r"^\$ (mpsearch .*)$", README, re.MULTILINE)


def test_every_command_of_the_readme_runs_in_its_order(
    tiny_folder: Path,
    facts_file: Path,
    connected_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("gptqmodel", reason="the README's search uses the gptq extra")
    monkeypatch.setattr(import_module("mpsearch.verify"), "ask_fresh", ask)  # without processes
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    found = commands()
    assert len(found) >= 8
    for command in found:
        words = shlex.split(command.replace("builtin:smollm2-135m", str(tiny_folder)))[1:]
        # This process has loaded more than the one that the README speaks of.
        words = ["64GiB" if word == "1000MiB" else word for word in words]
        words = [SMALL.get(word, word) for word in words]
        if words[0] in ("search", "sensitivity", "recall", "compare", "verify", "refine"):
            words += ["--facts", str(connected_file if "--two-hop" in words else facts_file)]
        if words[0] == "search":
            words += ["--trials", "3"]
        assert main(words) == 0, command
    assert (tmp_path / "tradeoff.png").exists()
    assert (tmp_path / "exports/smollm2/model.safetensors").exists()


def test_the_python_of_the_readme_runs(
    tiny_folder: Path, facts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = [block for block in blocks("python") if "mpsearch" in block]
    assert len([line for line in code.splitlines() if line.strip()]) == 7
    for readme, small in {
        "builtin:smollm2-135m": str(tiny_folder),
        "search_spaces": str(ROOT / "search_spaces"),
        "trials=150": "trials=3",
        **SMALL,
    }.items():
        assert readme in code or readme == "103MiB"
        code = code.replace(readme, small)
    monkeypatch.setattr(FactSet, "builtin", classmethod(lambda cls: cls.load(facts_file)))
    monkeypatch.setattr(import_module("mpsearch.verify"), "ask_fresh", ask)  # that knows of it
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "exports/smollm2-mixed/config.json").exists()


def test_the_facts_and_the_space_of_the_readme_are_valid(tmp_path: Path) -> None:
    (facts,) = blocks("json")
    path = tmp_path / "facts.jsonl"
    path.write_text(facts, encoding="utf-8")
    assert [fact.answer for fact in FactSet.load(path).facts] == ["Paris"]
    (space,) = blocks("yaml")
    assert len(SearchSpace.parse(space, "README.md").rules) == 1


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_figures_and_documents_that_are_named_are_in_the_repository() -> None:
    documents = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    named = [
        document.parent / link
        for document in documents
        for link in re.findall(r"\]\(([^):]+)\)", document.read_text(encoding="utf-8"))
    ]
    figures = {path.name: path for path in named if path.suffix == ".png"}
    assert figures.keys() == {"tradeoff.png", "peers.png", "recall_study.png"}
    assert all(figure.stat().st_size > 10_000 for figure in figures.values())
    assert all(path.exists() for path in named)


def test_the_reload_example_answers_with_transformers_alone(
    tiny_folder: Path, tmp_path: Path
) -> None:
    import mpsearch as mps

    model = mps.load_model(str(tiny_folder))
    space = mps.SearchSpace.default().resolve(model)
    mps.export(model, space.largest, out=tmp_path / "export")
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples/reload.py"), str(tmp_path / "export")],
        capture_output=True,
        text=True,
        check=True,
    )
    # int8-g64: 8 bits, a bf16 scale for 64 weights, 16 bytes of shape for each small layer.
    assert re.search(r"at 8\.2\d bits a weight", done.stdout)
    assert done.stdout.count(" -> ") == 3
