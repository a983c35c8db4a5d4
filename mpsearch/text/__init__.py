"""Running text on which candidates show what they kept beside facts: built in, or a file's.

A text is paragraphs, split at blank lines. Every other one, the first included, is search text: it
may constrain a search, so what a search says of it flatters. The others are held out: no search
reads them before its candidates are chosen, and every figure that is shown is of them.

The built-in text was written for this project and stays as it is, as figures depend on it.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path

from mpsearch.errors import UsageError

LEAST_PARAGRAPHS = 4  # two in each half, below which there is no standard error


@dataclass(frozen=True)
class Text:
    """Paragraphs in the order of the text.

    Attributes:
        source: the file, as named by the user, or `built-in`.
    """

    paragraphs: tuple[str, ...]
    source: str

    @classmethod
    def builtin(cls) -> Text:
        """English prose of several registers, 32 paragraphs."""
        file = resources.files("mpsearch.text") / "english.txt"
        return cls(_split(file.read_text(encoding="utf-8")), "built-in")

    @classmethod
    def load(cls, path: str | Path) -> Text:
        """A UTF-8 text file. Raises `UsageError` if it is none, or has too few paragraphs."""
        try:
            text = Path(path).read_text(encoding="utf-8-sig")  # with or without a byte order mark
        except UnicodeDecodeError:
            raise UsageError(f"text '{path}' is not UTF-8; save it as UTF-8") from None
        except OSError as error:
            raise UsageError(f"text '{path}' cannot be read: {error.strerror}") from None
        paragraphs = _split(text)
        if len(paragraphs) < LEAST_PARAGRAPHS:
            raise UsageError(
                f"text '{path}' has {len(paragraphs)} paragraphs, and {LEAST_PARAGRAPHS} are "
                "needed; give a longer text, with blank lines between its paragraphs"
            )
        return cls(paragraphs, str(path))

    @property
    def search(self) -> tuple[str, ...]:
        """The paragraphs that may constrain a search."""
        return self.paragraphs[::2]

    @property
    def held_out(self) -> tuple[str, ...]:
        """The paragraphs that are reported."""
        return self.paragraphs[1::2]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the paragraphs."""
        return hashlib.sha256("\n\n".join(self.paragraphs).encode()).hexdigest()


def _split(text: str) -> tuple[str, ...]:
    paragraphs = (part.strip() for part in re.split(r"\n\s*\n", text))
    return tuple(paragraph for paragraph in paragraphs if paragraph)
