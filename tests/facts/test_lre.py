"""The loader of the LRE data set as published: a folder of JSON files, one a relation."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from mpsearch.errors import FactsError
from mpsearch.facts import Fact, FactSet


def relation(**changed: Any) -> dict[str, Any]:
    content = {
        "name": "color of thing",
        "prompt_templates": ["The color of {} is", "{} is"],
        "prompt_templates_zs": ["What color is {}? It is", "{} is"],
        "properties": {"relation_type": "factual", "symmetric": False},
        "samples": [
            {"subject": "grass", "object": "green"},
            {"subject": "the sky", "object": "blue"},
        ],
    }
    return {**content, **changed}


def write(folder: Path, content: Any, name: str = "color.json") -> FactSet:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return FactSet.load(folder)


def test_a_folder_is_read_to_the_word(tmp_path: Path) -> None:
    facts = write(tmp_path, relation())
    others = ("{} is", "What color is {}? It is")
    assert facts.source == str(tmp_path)
    assert facts.facts == (
        Fact("color of thing", "The color of {} is", "grass", "green", (), others),
        Fact("color of thing", "The color of {} is", "the sky", "blue", (), others),
    )


def test_folders_below_are_read_too_and_relations_are_sorted(tmp_path: Path) -> None:
    write(tmp_path / "z", relation(name="b"))
    write(tmp_path / "a", relation(name="c"), "c.json")
    assert FactSet.load(tmp_path).relations == ("b", "c")


def test_several_objects_are_right_and_repetitions_are_one_fact_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    samples = [("grass", "green"), ("Grass", "Green"), ("grass", "brown"), ("sky", "blue")]
    with caplog.at_level(logging.WARNING, "mpsearch"):
        facts = write(tmp_path, relation(samples=[{"subject": s, "object": o} for s, o in samples]))
    assert [(f.subject, f.answer, f.aliases) for f in facts.facts] == [
        ("grass", "green", ("brown",)),
        ("sky", "blue", ()),
    ]
    assert "1 samples repeat another" in caplog.text
    assert "1 subjects have several objects" in caplog.text


def test_a_clean_folder_is_read_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, relation())
    assert caplog.text == ""


FAULTS: dict[str, tuple[Any, str]] = {
    "a list": ([], "not a relation in the LRE format (TypeError: "),
    "no name": ({"samples": []}, "not a relation in the LRE format (KeyError: 'name')"),
    "empty object": (
        relation(samples=[{"subject": "grass", "object": " "}]),
        "not a relation in the LRE format (ValueError: ' ' is not a text)",
    ),
    "object a number": (
        relation(samples=[{"subject": "grass", "object": 7}]),
        "not a relation in the LRE format (ValueError: 7 is not a text)",
    ),
    "half a character": (
        relation(samples=[{"subject": "gr\ud800ss", "object": "green"}]),
        "not a relation in the LRE format (UnicodeEncodeError: ",
    ),
    "no object": (
        relation(samples=[{"subject": "grass"}]),
        "not a relation in the LRE format (KeyError: 'object')",
    ),
    "no samples": (relation(samples=[]), "has 3 templates and 0 samples"),
    "no templates": (
        relation(prompt_templates=[], prompt_templates_zs=[]),
        "has 0 templates and 2 samples",
    ),
    "a template without a place": (
        relation(prompt_templates=["The color is"]),
        "template 'The color is' needs exactly one {} for the subject",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_line_with_the_file(tmp_path: Path, name: str) -> None:
    content, message = FAULTS[name]
    with pytest.raises(FactsError) as caught:
        write(tmp_path, content)
    assert str(caught.value).startswith(f"{tmp_path / 'color.json'}: {message}")
    assert len(str(caught.value).splitlines()) == 1


def test_a_relation_in_two_files_is_refused(tmp_path: Path) -> None:
    write(tmp_path, relation(), "a.json")
    with pytest.raises(FactsError, match=r"b\.json: relation 'color of thing' stands in .*a\.json"):
        write(tmp_path, relation(), "b.json")


def test_a_folder_without_json_and_a_file_in_latin_1_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FactsError, match=r"holds no \.json files"):
        FactSet.load(tmp_path)
    (tmp_path / "a.json").write_bytes('{"name": "é"}'.encode("latin-1"))
    with pytest.raises(FactsError, match="is not UTF-8 text; save it as UTF-8"):
        FactSet.load(tmp_path)
