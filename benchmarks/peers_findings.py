"""What the rows of the comparison with peers say about its targets.

Differences and percentages are of answer loss and of recall, each a mean over relations, paired by
fact and by seed. Intervals are 95 %: over facts by a Bayesian bootstrap over subjects
(`mpsearch.bootstrap`), stretched to be unbiased, and where there are several seeds over these too,
by Student's t, as three tell little of their spread. A single seed's are over facts alone. The
relations are fixed. A p-value is of both variances with the degrees of freedom after Welch and
Satterthwaite; Holm's correction is over the rivals of a size. A rival that needs no seed is beside
every seed of ours. The best predictor-only rival is picked on the final facts themselves, which
favours it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import inf, isfinite, sqrt
from statistics import median
from typing import Any

import numpy as np
from mpmath import betainc
from numpy.typing import NDArray

from mpsearch.bootstrap import DRAWS, Interval, subject_weights
from mpsearch.significance import holm

OURS = "mpsearch"
UNSEEDED = ("uniform", "greedy")
PREDICTORS = ("greedy", "greedy-fisher", "knapsack", "auto-round", "modelopt")
EVOLUTION = "evopress-warm"
SEEDS = 3
LEAST_PERCENT = 35.0  # below uniform and below the best predictor-only rival, at the tight sizes
MOST_TOKENS = 0.2  # of what the evolutionary search takes, to reach where it ends

HOLDS, FAILS, OPEN = "holds", "fails", "open"

Scored = Mapping[tuple[str, str, int], NDArray[Any]]  # (size, rival, seed) to (facts,)
Curve = Mapping[str, Any]


class Comparison:
    """Paired comparisons of rivals, all with the same draws.

    Args:
        scored: of every row, on the same facts.
        relations, subjects: `(facts,)` names.
    """

    def __init__(
        self, scored: Scored, relations: Sequence[str], subjects: Sequence[str], seed: int = 0
    ):
        self._scored = scored
        self._generator = np.random.default_rng(seed)
        weights = subject_weights(subjects, self._generator)
        names = np.asarray(relations)
        each = dict.fromkeys(relations)
        self._facts = np.zeros_like(weights)  # (draws, facts); a row sums to 1
        self._once = np.zeros(len(names))  # (facts,), the same without chance
        for name in each:
            mine = names == name
            shares = weights[:, mine] / weights[:, mine].sum(1, keepdims=True)
            self._facts[:, mine] = _stretched(shares) / len(each)
            self._once[mine] = 1 / mine.sum() / len(each)
        self._seeds: dict[int, NDArray[Any]] = {}

    def seeds(self, size: str, rival: str) -> list[int]:
        return sorted(seed for its, name, seed in self._scored if (its, name) == (size, rival))

    def mean(self, size: str, rival: str) -> float:
        """Over all seeds."""
        seeds = self.seeds(size, rival)
        return float(np.mean([self._scored[size, rival, seed] @ self._once for seed in seeds]))

    def pair(self, size: str, rival: str) -> tuple[NDArray[Any], NDArray[Any]] | None:
        """`(seeds, facts)` of a rival and of ours, with the same seeds; None without one."""
        ours, theirs = self.seeds(size, OURS), self.seeds(size, rival)
        if rival in UNSEEDED and theirs:
            pairs = [(theirs[0], seed) for seed in ours]
        else:
            pairs = [(seed, seed) for seed in ours if seed in theirs]
        if not pairs:
            return None
        a = np.array([self._scored[size, rival, seed] for seed, _ in pairs])
        b = np.array([self._scored[size, OURS, seed] for _, seed in pairs])
        return a, b

    def difference(self, rival: NDArray[Any], ours: NDArray[Any]) -> tuple[Interval, float]:
        """How much higher the rival is, and the two-sided p of no difference."""
        apart = rival - ours
        mean, count = self.mean_of(apart), len(apart)
        of_facts = float(self._of_facts(apart).var())
        of_seeds = float((apart @ self._once).var(ddof=1)) / count if count > 1 else 0.0
        return _interval(mean, self._drawn(apart)), _p(mean, of_facts, of_seeds, count - 1)

    def percent_below(self, rival: NDArray[Any], ours: NDArray[Any]) -> Interval:
        """By how much our loss is lower, in percent of the rival's."""
        mean = 100 * (1 - self.mean_of(ours) / self.mean_of(rival))
        return _interval(mean, 100 * (1 - self._drawn(ours) / self._drawn(rival)))

    def mean_of(self, losses: NDArray[Any]) -> float:
        """Over seeds and facts of `(seeds, facts)`."""
        return float(losses.mean(axis=0) @ self._once)

    def _drawn(self, losses: NDArray[Any]) -> NDArray[Any]:
        """`(draws,)` means over seeds and facts."""
        each = losses @ self._once
        seeds = self._of_seeds(len(each)) @ (each - each.mean())
        drawn: NDArray[Any] = self._of_facts(losses) + seeds
        return drawn

    def _of_facts(self, losses: NDArray[Any]) -> NDArray[Any]:
        """`(draws,)` means of these seeds over other facts."""
        return np.asarray((losses.mean(axis=0) * self._facts).sum(1))

    def _of_seeds(self, count: int) -> NDArray[Any]:
        """`(draws, seeds)`: times the seeds' deviations, what other seeds would change.

        Draws of a t distribution of `count - 1` degrees of freedom, scaled to the mean's error.
        """
        if count == 1:
            return np.zeros((DRAWS, 1))
        if count not in self._seeds:
            normal = self._generator.standard_normal((DRAWS, count))
            spread = self._generator.chisquare(count - 1, (DRAWS, 1)) / (count - 1)
            self._seeds[count] = normal / np.sqrt(spread * count * (count - 1))
        return self._seeds[count]


def _stretched(shares: NDArray[Any]) -> NDArray[Any]:
    """Dirichlet shares `(draws, n)`, spread so that a mean's variance is unbiased."""
    count = shares.shape[1]
    return 1 / count + (shares - 1 / count) * sqrt((count + 1) / max(count - 1, 1))


def _p(mean: float, of_facts: float, of_seeds: float, freedom: int) -> float:
    """Two-sided, of a mean that is zero.

    Args:
        of_facts, of_seeds: its variances.
        freedom: degrees of it that the second has; the first has plenty.
    Sources: Student (1908); Welch (1947) and Satterthwaite (1946).
    """
    variance = of_facts + of_seeds
    if not variance:
        return float(mean == 0)
    plenty = 1e6
    degrees = plenty
    if of_seeds:
        degrees = min(plenty, freedom * (variance / of_seeds) ** 2)
    share = degrees / (degrees + mean**2 / variance)
    return float(betainc(degrees / 2, 0.5, 0, share, regularized=True))


def _interval(mean: float, drawn: NDArray[Any]) -> Interval:
    low, high = np.percentile(drawn, (2.5, 97.5))
    return Interval(mean, float(low), float(high))


def findings(
    losses: Scored,
    correct: Scored,
    relations: Sequence[str],
    subjects: Sequence[str],
    curves: Sequence[Curve],
    sizes: Sequence[str],
    tight: Sequence[str],
    rivals: Sequence[str],
) -> dict[str, Any]:
    """As JSON: `sizes` (ours against every rival), `tokens` of target 2, and the `targets`.

    Args:
        losses: in nats.
        correct: whether the fact is recalled.
        curves: see `curve`.
        sizes, rivals: all that the whole comparison has; a target stays open while some of them, or
            some seeds, are missing and nothing has refuted it.
        tight: the sizes at which ours must be far lower.
    """
    comparison = Comparison(losses, relations, subjects)
    points = {key: 100.0 * right for key, right in correct.items()}
    recall = Comparison(points, relations, subjects)
    of_sizes = [_of_size(comparison, recall, size, rivals) for size in sizes
                if comparison.seeds(size, OURS)]  # fmt: skip
    tokens = [found for size in sizes if (found := tokens_to_reach(size, curves))]
    missing = [
        (size, name)
        for size in sizes
        for name in rivals
        if len(comparison.seeds(size, name)) < (1 if name in UNSEEDED else SEEDS)
    ]
    return {
        "sizes": of_sizes,
        "tokens": tokens,
        "targets": _targets(of_sizes, tokens, tight, complete=not missing),
        "missing": [f"{size}: {name}" for size, name in missing],
    }


def _of_size(
    comparison: Comparison, recall: Comparison, size: str, rivals: Sequence[str]
) -> dict[str, Any]:
    """Ours against every rival at one size; `recall_points` are how many percent more we recall."""
    means = {name: comparison.mean(size, name) for name in rivals if comparison.seeds(size, name)}
    compared: list[dict[str, Any]] = []
    for name in means:
        if name == OURS or (pair := comparison.pair(size, name)) is None:
            continue
        difference, p = comparison.difference(*pair)
        theirs, ours = recall.pair(size, name) or pair
        more, recall_p = recall.difference(ours, theirs)
        compared.append({
            "rival": name,
            "seeds": len(pair[0]),
            "difference_nats": asdict(difference),
            "seed_stddev_nats": _seed_stddev(comparison, *pair),
            "percent_below": asdict(comparison.percent_below(*pair)),
            "p": p,
            "recall_points": asdict(more),
            "recall_p": recall_p,
        })  # fmt: skip
    for name in ("p", "recall_p"):
        for row, p in zip(compared, holm([row[name] for row in compared]), strict=True):
            row[f"{name}_holm"] = p
    predictors = [name for name in PREDICTORS if name in means]
    return {
        "size": size,
        "answer_loss_nats": means,
        "lowest": min(means, key=lambda name: (means[name], name != OURS)),
        "best_predictor": min(predictors, key=means.__getitem__, default=None),
        "against": compared,
    }


def _seed_stddev(comparison: Comparison, rival: NDArray[Any], ours: NDArray[Any]) -> float | None:
    """Of the difference, between seeds; None for a single one."""
    each = [comparison.mean_of(apart[None]) for apart in rival - ours]
    return float(np.std(each, ddof=1)) if len(each) > 1 else None


def curve(measured: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """`(fact tokens so far, lowest search loss so far)` wherever that loss falls.

    Args:
        measured: `(fact tokens so far, search loss)` of assignments within the budget, in order.
    """
    found: list[tuple[int, float]] = []
    for tokens, loss in measured:
        if not found or loss < found[-1][1]:
            found.append((tokens, loss))
    return found


def tokens_to_reach(size: str, curves: Sequence[Curve]) -> dict[str, Any] | None:
    """What share of the evolutionary search's tokens ours takes to reach its loss, by seed.

    Args:
        curves: of `size`, `rival`, `seed`, `points` as `curve` gives them, and `fact_tokens` that
            were spent in all.
    Returns:
        `ratios` by seed, null where ours never reached it, and their median, in which that counts
        as infinite (null if it is); None without a seed that has both.
    """
    here = {(c["rival"], c["seed"]): c for c in curves if c["size"] == size and c["points"]}
    ratios: dict[str, float] = {}
    for (rival, seed), theirs in sorted(here.items()):
        if rival == EVOLUTION and (ours := here.get((OURS, seed))):
            goal = theirs["points"][-1][1]
            reached = [tokens for tokens, loss in ours["points"] if loss <= goal]
            ratios[str(seed)] = reached[0] / theirs["fact_tokens"] if reached else inf
    if not ratios:
        return None
    middle = median(ratios.values())
    return {
        "size": size,
        "ratios": {seed: _finite(ratio) for seed, ratio in ratios.items()},
        "median": _finite(middle),
    }


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None


def _targets(
    of_sizes: Sequence[Mapping[str, Any]],
    tokens: Sequence[Mapping[str, Any]],
    tight: Sequence[str],
    complete: bool,
) -> list[dict[str, str]]:
    def verdict(refuted: bool, done: bool = complete) -> str:
        return FAILS if refuted else HOLDS if done and of_sizes else OPEN

    lower = [found["size"] for found in of_sizes if found["lowest"] != OURS]
    better = [f"{row['rival']} at {found['size']}" for found in of_sizes
              for row in found["against"]
              if row["p_holm"] < 0.05 and row["difference_nats"]["mean"] < 0]  # fmt: skip
    far, said = [], []
    for found in of_sizes:
        if found["size"] not in tight:
            continue
        against = {row["rival"]: row["percent_below"] for row in found["against"]}
        for name in {"uniform": 0, found["best_predictor"]: 0}:
            if name in against:
                below = against[name]
                said.append("{size}, {name}: {mean:.0f} % lower [{low:.0f}, {high:.0f}]".format(
                    size=found["size"], name=name, **below))  # fmt: skip
                far.append(below["mean"] >= LEAST_PERCENT and below["low"] > 0)
    medians = [found["median"] for found in tokens]
    slow = [middle is None or middle > MOST_TOKENS for middle in medians]
    reach = ", ".join(
        f"{found['size']} {'never' if found['median'] is None else format(found['median'], '.2f')}"
        f" (of {len(found['ratios'])} seeds)"
        for found in tokens
    )
    return [
        {
            "target": "1: answer loss lowest at every size",
            "verdict": verdict(bool(lower)),
            "said": f"not at {', '.join(lower)}" if lower else "lowest wherever measured",
        },
        {
            "target": f"1: at least {LEAST_PERCENT:.0f} % below uniform and below the best "
            "predictor-only rival at the tight sizes, with intervals that exclude zero",
            "verdict": verdict(not all(far)),
            "said": "; ".join(said),
        },
        {
            "target": "1: nobody significantly better anywhere",
            "verdict": verdict(bool(better)),
            "said": ", ".join(better) or "nobody wherever measured",
        },
        {
            "target": f"2: at most {MOST_TOKENS} of the evolutionary search's fact tokens to reach "
            "its search loss from the same start, median of seeds",
            "verdict": verdict(any(slow), bool(slow) and complete),
            "said": reach,
        },
    ]
