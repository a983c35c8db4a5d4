"""Banks that are built, quantizers that note what they are asked for, and what lies in a folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from mpsearch.bank import Bank
from mpsearch.evaluate import all_layers
from mpsearch.formats import FORMATS, Format
from mpsearch.models import Model
from mpsearch.quantizers import InputStatistics
from mpsearch.quantizers.rounding import Rounding
from mpsearch.space import ResolvedSpace

INT2, INT4 = FORMATS["int2-g64"], FORMATS["int4-g64"]
Stored = dict[str, dict[str, Tensor]]


class Counting(Rounding):
    """Rounding that notes its calls and may change or refuse them."""

    name = "counting"

    def __init__(self, change: Callable[[int, Stored], Stored] = lambda call, stored: stored):
        self.calls: list[tuple[str, ...]] = []
        self.change = change

    def quantize(
        self, weight: Tensor, formats: Sequence[Format], statistics: InputStatistics | None
    ) -> Stored:
        self.calls.append(tuple(fmt.name for fmt in formats))
        return self.change(len(self.calls), super().quantize(weight, formats, statistics))


class Calibrated(Counting):
    """Notes the statistics that it is given."""

    name = "calibrated"
    calibrated = True

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[InputStatistics | None] = []

    def quantize(
        self, weight: Tensor, formats: Sequence[Format], statistics: InputStatistics | None
    ) -> Stored:
        self.seen.append(statistics)
        return super().quantize(weight, formats, statistics)


def built(model: Model, quantizer: Rounding, space: ResolvedSpace, root: Path) -> Bank:
    bank = Bank(model, quantizer, root=root)
    bank.build(all_layers(space))
    return bank


def files(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Inode, time and size of everything below, hidden files too."""
    return {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns, path.stat().st_size)
        for path in folder.rglob("*")
        if path.is_file()
    }


def weights_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.safetensors"))


def unfinished_in(folder: Path) -> list[str]:
    expected = (*weights_in(folder), "settings.json", ".claims")
    found = [name for name in files(folder) if name not in expected]
    return [name for name in found if not (name.startswith("text-") and name.endswith(".tokens"))]
