"""Running text: paragraphs, two halves that share nothing, and one line where a file is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpsearch.errors import UsageError
from mpsearch.text import Text


def test_the_built_in_text_is_long_enough_and_says_nothing_twice() -> None:
    text = Text.builtin()
    assert len(text.paragraphs) == len(set(text.paragraphs)) == 32
    words = [len(paragraph.split()) for paragraph in text.paragraphs]
    assert 1500 <= sum(words) <= 2000
    assert 40 <= min(words) <= max(words) <= 80
    assert not any("\n" in paragraph for paragraph in text.paragraphs)
    sizes = [sum(len(p.split()) for p in half) for half in (text.search, text.held_out)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)


def test_the_built_in_text_stays_as_it_is() -> None:
    digest = "80c55225b36d1f7521113dcf562086fd2d42e7f8c97cb322641f005fea3ebb0d"
    assert Text.builtin().digest == digest


def test_paragraphs_alternate_between_the_halves(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("\ufeff\n one\r\ntwo \n \t\n\nthree\n\nfour\n\n\nfünf".encode())
    text = Text.load(path)
    assert text.source == str(path)
    assert text.paragraphs == ("one\ntwo", "three", "four", "fünf")
    assert text.search == ("one\ntwo", "four")
    assert text.held_out == ("three", "fünf")


def test_the_digest_is_of_the_paragraphs_and_of_nothing_else(tmp_path: Path) -> None:
    def digest(content: str) -> str:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.txt"
        path.write_text(content, encoding="utf-8")
        return Text.load(path).digest

    assert digest("a\n\nb\n\nc\n\nd") == digest("a\n\n\nb\n \nc\n\nd\n")
    assert digest("a\n\nb\n\nc\n\nd") != digest("a\n\nb\n\nd\n\nc")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read: No such file"),
        (b"", "has 0 paragraphs, and 4 are needed"),
        (b" \n\n \n", "has 0 paragraphs"),
        (b"a\n\nb\n\nc\n", "has 3 paragraphs"),
        (b"a\n\nb\n\nc\n\n\xff", "is not UTF-8"),
    ],
)
def test_what_is_no_text_is_one_line(content: bytes | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        Text.load(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        Text.load(tmp_path)
