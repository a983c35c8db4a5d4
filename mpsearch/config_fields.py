"""Reading the fields of a model's `config.json`: named, defaulted and checked, one line a fault."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mpsearch.errors import ModelError

MOST = 10**9


@dataclass(frozen=True)
class Fields:
    """The config of one causal language model, read as transformers (5.23) reads it.

    A field that is absent has its family's default; one that is null has none.

    Attributes:
        config: the parsed `config.json`, or the text model's part of it.
        source: what the user calls the model, for messages.
        family: the config's `model_type`.
        names: of a field, the spellings that this family uses for it, the usual one first; nothing
            for a field that the family does not read. Other fields are spelled as here.
        defaults: what a field is where the config leaves it out.
    """

    config: Mapping[str, Any]
    source: str
    family: str
    names: Mapping[str, tuple[str, ...]]
    defaults: Mapping[str, Any]

    def fault(self, message: str) -> ModelError:
        return ModelError(f"model '{self.source}': {message}")

    def spelled(self, field: str) -> str:
        """The field's name in this config."""
        names = self.names.get(field, (field,))
        return next((name for name in names if name in self.config), (*names, field)[0])

    def require(self, *fields: str) -> None:
        """Refuse a config without these.

        Raises:
            ModelError: one line that names all that are missing.
        """
        missing = [
            name
            for field in fields
            if (name := self.spelled(field)) not in self.config and field not in self.defaults
        ]
        if missing:
            raise self.fault(
                f"its config.json lacks {', '.join(missing)}, which a '{self.family}' model has; "
                "get it again"
            )

    def value(self, field: str) -> Any:
        """The field, whatever it holds; its default where it is absent."""
        name = self.spelled(field)
        if name in self.config and self.names.get(field) != ():
            return self.config[name]
        return self.defaults.get(field)

    def size_or_none(self, field: str, least: int = 1) -> int | None:
        """A whole number from `least` to `MOST`, or None where there is none.

        Raises:
            ModelError: it is something else.
        """
        value = self.value(field)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MOST:
            raise self.fault(
                f"{self.spelled(field)} is {value!r} in its config.json; it must be a whole number "
                f"from {least} to {MOST:,}"
            )
        return value

    def size(self, field: str, least: int = 1) -> int:
        """As `size_or_none`, of a field that has to be there."""
        value = self.size_or_none(field, least)
        if value is None:
            absent = "null" if self.spelled(field) in self.config else "absent"
            raise self.fault(
                f"{self.spelled(field)} is {absent} in its config.json; a '{self.family}' model "
                "needs a whole number"
            )
        return value

    def flag(self, field: str) -> bool:
        """Whether a switch is on; null and absent without a default are off."""
        value = self.value(field)
        if value not in (True, False, None):
            raise self.fault(
                f"{self.spelled(field)} is {value!r} in its config.json; it must be true or false"
            )
        return bool(value)

    def indices(self, field: str) -> list[int] | None:
        """A list of whole numbers from 0, such as block indices; None where there is none."""
        value = self.value(field)
        if value is None:
            return None
        if not isinstance(value, list) or not all(type(i) is int and i >= 0 for i in value):
            raise self.fault(
                f"{self.spelled(field)} is {value!r} in its config.json; it must be a list of "
                "whole numbers"
            )
        return value

    def of_each_block(self, field: str, blocks: int) -> list[Any] | None:
        """A list with an entry for every block; None where there is none.

        Raises:
            ModelError: it is no list, or one of another length.
        """
        value = self.value(field)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != blocks:
            held = f"{len(value)} entries" if isinstance(value, list) else repr(value)
            raise self.fault(
                f"{self.spelled(field)} holds {held} in its config.json, and "
                f"{self.spelled('num_hidden_layers')} is {blocks}; it must have one a block"
            )
        return value

    def window(self) -> int | None:
        """Tokens that a sliding window spans; None where windows are off."""
        if "use_sliding_window" in self.defaults and not self.flag("use_sliding_window"):
            return None
        return self.size_or_none("sliding_window")
