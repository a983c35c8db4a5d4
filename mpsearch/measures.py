"""The table of sensitivities: what was measured of each group, alone and in each format.

A measure is of a (group, format) or of a group whatever its format. Which of them agree is what
rank correlations say.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from mpsearch.errors import CheckError, RunError
from mpsearch.files import write_atomically
from mpsearch.formats import FORMATS

Pair = tuple[str, str]
OF_PAIRS: Mapping[str, str] = {
    "fisher_nats": "predicted KL (nats)",
    "weight_error": "relative weight error",
    "output_error": "relative output error",
    "perturb_nats": "measured KL (nats)",
}
OF_GROUPS: Mapping[str, str] = {
    "outlier_ratio": "largest over median input channel",
    "effective_rank": "effective rank of the inputs",
    "drift": "1 - cosine over the block",
}
MEASURES: Mapping[str, str] = {**OF_PAIRS, **OF_GROUPS}
_LEAST_BITS = 3  # rank correlations are also given without the formats below, which saturate


@dataclass(frozen=True)
class Correlation:
    """How alike two measures rank what both have.

    Attributes:
        over: `all` pairs, those of `3 bits and more`, or the groups in a format of that name.
        pairs: how many values each has.
        spearman: None where one of them is the same everywhere.
    """

    a: str
    b: str
    over: str
    pairs: int
    spearman: float | None


@dataclass(frozen=True)
class Sensitivity:
    """Damage of each (group, format), with everything that produced it.

    Attributes:
        fisher_nats: predicted KL a fact if this group alone has this format.
        weight_error: relative Frobenius error of the group's weights.
        provenance: model fingerprint, facts, formats, quantizer, seeds.
        output_error: relative Frobenius error of the group's outputs on the facts' tokens.
        perturb_nats: measured KL a fact if this group alone has this format; empty if not asked.
        outlier_ratio: of a group: root mean square of its largest input channel over the median's.
        effective_rank: of a group: how many directions its inputs use.
        drift: of a group: one minus the cosine between its block's input and output.
    """

    fisher_nats: dict[Pair, float]
    weight_error: dict[Pair, float]
    provenance: dict[str, Any]
    output_error: dict[Pair, float] = field(default_factory=dict)
    perturb_nats: dict[Pair, float] = field(default_factory=dict)
    outlier_ratio: dict[str, float] = field(default_factory=dict)
    effective_rank: dict[str, float] = field(default_factory=dict)
    drift: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise `CheckError` for a value that is NaN or infinite."""
        for measure in MEASURES:
            for key, value in getattr(self, measure).items():
                if not isfinite(value):
                    what = " in ".join([key] if isinstance(key, str) else key)
                    raise CheckError(f"the {measure} of {what} is {value}")

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of the measures that it holds."""
        return tuple(name for name in MEASURES if getattr(self, name))

    @property
    def formats(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(fmt for _, fmt in self.fisher_nats))

    @property
    def middle_format(self) -> str:
        """The one in which measures of pairs are shown where there is room for one a group."""
        by_bits = sorted(self.formats, key=lambda name: FORMATS[name].bits)
        return by_bits[len(by_bits) // 2]

    def of_groups(self, measure: str, fmt: str | None = None) -> dict[str, float]:
        """One value a group: a measure of pairs in that format, by default the middle one."""
        values = getattr(self, measure)
        if measure in OF_GROUPS:
            return dict(values)
        fmt = fmt or self.middle_format
        return {group: value for (group, its), value in values.items() if its == fmt}

    def correlations(self) -> list[Correlation]:
        """Spearman's between any two measures: over all pairs, without low bits, by format.

        Unquantized formats, in which every group has zero, do not count.
        """
        bits = {name: FORMATS[name].bits for name in self.formats if FORMATS[name].quantized}
        ranges = {"all": tuple(bits)}
        ranges[f"{_LEAST_BITS} bits and more"] = tuple(f for f in bits if bits[f] >= _LEAST_BITS)
        found = []
        for a, b in combinations(self.measures, 2):
            if b in OF_PAIRS:
                for over, formats in ranges.items():
                    of_a, of_b = (
                        {pair: v for pair, v in getattr(self, name).items() if pair[1] in formats}
                        for name in (a, b)
                    )
                    found.append(_correlation(a, b, over, of_a, of_b))
            for fmt in bits if a in OF_PAIRS else ["groups"]:
                of_a, of_b = self.of_groups(a, fmt), self.of_groups(b, fmt)
                found.append(_correlation(a, b, fmt, of_a, of_b))
        return found

    def to_json(self) -> dict[str, Any]:
        rows = [
            {"group": group, "format": fmt}
            | {name: getattr(self, name)[group, fmt] for name in self.measures if name in OF_PAIRS}
            for group, fmt in self.fisher_nats
        ]
        groups = [
            {"group": group}
            | {
                name: getattr(self, name)[group]
                for name in self.measures
                if group in getattr(self, name)
            }
            for group in dict.fromkeys(group for group, _ in self.fisher_nats)
        ]
        correlations = [vars(correlation) for correlation in self.correlations()]
        return {
            "provenance": self.provenance,
            "rows": rows,
            "groups": groups,
            "rank_correlations": correlations,
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Sensitivity:
        """Raises `CheckError` if a value is NaN or infinite, `LookupError` if it is no table."""
        rows, groups = content["rows"], content.get("groups", [])
        held = {"fisher_nats", "weight_error", *(name for name in OF_PAIRS if name in rows[0])}
        of_pairs: dict[str, Any] = {
            name: {(row["group"], row["format"]): row[name] for row in rows} for name in held
        }
        of_groups: dict[str, Any] = {
            name: {row["group"]: row[name] for row in groups if name in row} for name in OF_GROUPS
        }
        return cls(**of_pairs, **of_groups, provenance=content["provenance"])

    def save(self, path: Path) -> None:
        """Write it as JSON, whole or not at all."""
        write_atomically(path, json.dumps(self.to_json(), indent=1))

    @classmethod
    def load(cls, path: Path) -> Sensitivity:
        """Read what `save` wrote.

        Raises:
            RunError: it is not there, or damaged.
        """
        try:
            return cls.from_json(json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            reason = str(error.strerror)
        except CheckError as error:
            reason = str(error)
        except (ValueError, LookupError, TypeError):
            reason = "it is cut short or no table of sensitivities"
        raise RunError(f"'{path}' cannot be used: {reason}")


def _correlation(
    a: str, b: str, over: str, of_a: Mapping[Any, float], of_b: Mapping[Any, float]
) -> Correlation:
    both = [key for key in of_a if key in of_b]
    rho = spearman([of_a[key] for key in both], [of_b[key] for key in both])
    return Correlation(a, b, over, len(both), rho)


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's rank correlation, equal values sharing their mean rank; None if one is constant.

    Source: Spearman (1904), as Pearson's correlation of the ranks.
    """
    ranks_a, ranks_b = _ranks(a), _ranks(b)
    if len(a) < 2 or not ranks_a.std() or not ranks_b.std():
        return None
    return float(np.corrcoef(ranks_a, ranks_b)[0, 1])


def _ranks(values: Sequence[float]) -> Any:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]
