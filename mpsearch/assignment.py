"""An assignment: which format each group gets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True, eq=False)
class Assignment(Mapping[str, str]):
    """Group name to format name, in model order; frozen, hashable, written as a JSON object.

    Attributes:
        pairs: the mapping's items.
        bank: settings, as JSON, of the weight bank that it was scored with, so that an export
            ships those very codes; no part of its identity, and empty if it was not scored.
        refined: whether that bank's codes were made for this assignment alone, which makes it
            another candidate than the same formats with codes that other assignments share: the
            bank is part of its identity then.
    """

    pairs: tuple[tuple[str, str], ...]
    bank: str = ""
    refined: bool = False

    @classmethod
    def of(cls, formats: Mapping[str, str], bank: str = "", refined: bool = False) -> Assignment:
        return cls(tuple(formats.items()), bank, refined)

    @property
    def parent(self) -> Assignment:
        """The same formats with codes that other assignments share; itself if it is not refined."""
        return Assignment(self.pairs) if self.refined else self

    @cached_property
    def _formats(self) -> dict[str, str]:
        return dict(self.pairs)

    def __getitem__(self, group: str) -> str:
        return self._formats[group]

    def __iter__(self) -> Iterator[str]:
        return iter(self._formats)

    def __len__(self) -> int:
        return len(self.pairs)

    def __hash__(self) -> int:
        return hash(self.pairs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Assignment) and self._identity == other._identity

    @property
    def _identity(self) -> tuple[object, ...]:
        return (self.pairs, self.bank) if self.refined else self.pairs

    @cached_property
    def id(self) -> str:
        """Eight hex digits of a digest of the content: the same in every run and on resume."""
        return hashlib.sha256(json.dumps(self._identity).encode()).hexdigest()[:8]
