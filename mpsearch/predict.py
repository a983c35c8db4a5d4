"""The loss of an assignment before it is measured, and how far off such a prediction was.

Around a centre, an assignment whose loss has been measured, the loss of another is modelled as

    loss(x) = loss(centre) + sum over groups where they differ of change(group, level of x)

A change's prior comes from two tables. One is of slopes: what going to that level changes to first
order, by a backward pass with the centre's weights in place. The other is of curvature: two
formats' errors of a weight are as good as independent, so going from one to the other moves the
weight by both, and costs both of their damages. The trials fix a factor for each table, then
correct each change. Without slopes, the prior is the difference of the two damages.

Damage alone is measured at the unquantized model, where the loss has no slope; at 2 and 3 bits it
has one, and a predictor that stays at the unquantized model errs most where memory is tight.

Sources: ridge regression; a draw from a Gaussian process by Matheron's rule (Wilson et al.,
arXiv:2002.09309).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpsearch.measures import spearman

_NEAR = 1.5  # trials up to this much above the centre's loss, as a share of it, teach the model
_REACH = 3.0  # and by this share of all that they change: bad surprises teach most
_MOST_TRIALS = 300  # those that are predicted to differ least from the centre
_LEAST_NATS = 0.1  # the scale of losses where they are near zero or below it
# Factors of slopes and curvature before any trial, and their standard deviations.
_FACTORS, _FACTORS_DOUBT = np.array([0.7, 1.6]), np.array([0.2, 0.8])
_LEAST_FACTOR = 0.1  # never negative: more damage is no gain
# Standard deviation of a group's change, as a share of its second-order and first-order parts.
_OF_CURVATURE, _OF_SLOPE = 0.2, 0.12
_OF_DAMAGE = 0.7  # without slopes
_MISFIT = 0.02  # of the additive model, as a share of the centre's loss
_INTERACTION = 0.05  # more of it, as a share of all changes' sum
_SINGLE = 0.25  # and as much again where factors are sought
_MISFIT_OF_DAMAGE = 0.03  # without slopes, where it has to learn fast


@dataclass(frozen=True, eq=False)
class Centre:
    """An assignment whose loss has been measured, and the slopes there.

    Attributes:
        levels: `(groups,)`, the format of each group as a number, smallest first.
        loss_nats: measured.
        slopes_nats: `(groups, levels)` first-order change of going there; zero at the centre's own
            level. None where it was not measured.
    """

    levels: NDArray[Any]
    loss_nats: float
    slopes_nats: NDArray[Any] | None = None


def curvature(damage_nats: NDArray[Any], levels: NDArray[Any]) -> NDArray[Any]:
    """`(groups, levels)` of the damages of the format in place and of another, zero for staying."""
    groups = np.arange(len(levels))
    both = np.abs(damage_nats) + np.abs(damage_nats[groups, levels])[:, None]
    both[groups, levels] = 0.0
    return np.asarray(both)


class Predictor:
    """Predicts losses near a centre from a damage table, slopes and trials.

    Args:
        centre: where predictions are exact.
        damage_nats: `(groups, levels)`, at the unquantized model.
        levels: `(trials, groups)` of what has been measured.
        losses_nats: `(trials,)`.
    """

    def __init__(
        self,
        centre: Centre,
        damage_nats: NDArray[Any],
        levels: NDArray[Any],
        losses_nats: NDArray[Any],
    ):
        self.centre = centre
        self._groups = np.arange(len(centre.levels))
        here = damage_nats[self._groups, centre.levels][:, None]
        scale = max(abs(centre.loss_nats), _LEAST_NATS)
        differs = levels != centre.levels
        both = curvature(damage_nats, centre.levels)
        slopes = centre.slopes_nats
        known = np.abs(damage_nats) if slopes is None else np.abs(slopes) + both
        sizes = self._sums(known, levels)  # of all that a trial changes
        changes = losses_nats - centre.loss_nats
        limit = _NEAR * scale + (0.0 if slopes is None else _REACH * sizes)
        near = differs.any(1) & (changes <= limit)
        levels, changes, sizes = levels[near], changes[near], sizes[near]
        self._mean: NDArray[Any]
        self._spread: NDArray[Any]
        if slopes is None:
            # The damage of one measure predicts others, too: it may be of any scale.
            losses = changes + centre.loss_nats
            ratio = np.median(losses / np.maximum(sizes, 1e-12)) if len(losses) else 1.0
            factor = max(float(ratio), _LEAST_FACTOR)
            self._mean = factor * (damage_nats - here)
            self._spread = _OF_DAMAGE * factor * np.hypot(damage_nats, here)
            self._spread[self._groups, centre.levels] = 0.0
            noise = np.full_like(sizes, _MISFIT_OF_DAMAGE * scale)
        else:
            noise = _MISFIT * scale + _INTERACTION * sizes
            sums = np.stack([self._sums(slopes, levels), self._sums(both, levels)], axis=1)
            # What is wrong with single changes must not be taken for an error of the factors.
            found = _ridge(sums, changes, noise + _SINGLE * sizes, _FACTORS, _FACTORS_DOUBT)
            factors = np.maximum(found, _LEAST_FACTOR)
            self._mean = factors[0] * slopes + factors[1] * both
            self._spread = _OF_SLOPE * np.abs(factors[0] * slopes)
            self._spread += _OF_CURVATURE * factors[1] * both
        nearest = np.argsort(sizes, kind="stable")[:_MOST_TRIALS]
        self._levels: NDArray[Any] = levels[nearest]
        self._changes: NDArray[Any] = changes[nearest]
        self._noise: NDArray[Any] = noise[nearest]
        self._gram = self._covariance()

    def table(self, rng: np.random.Generator | None = None) -> NDArray[Any]:
        """`(groups, levels)` changes from the centre in nats: the posterior's mean, or a draw.

        A draw is one of the prior, corrected by the residuals that it leaves on the trials.
        """
        table: NDArray[Any] = np.array(self._mean)
        noise: NDArray[Any] = np.zeros(len(self._levels))
        if rng is not None:
            table += self._spread * rng.standard_normal(table.shape)
            noise = self._noise * rng.standard_normal(len(noise))
        if len(self._levels):
            observed = self._sums(table, self._levels) + noise
            pull = np.linalg.solve(self._gram, self._changes - observed)
            variance = self._spread**2
            for levels, weight in zip(self._levels, pull, strict=True):
                table[self._groups, levels] += variance[self._groups, levels] * weight
        return table

    def loss_nats(self, levels: NDArray[Any]) -> float:
        """The expected loss of an assignment, `(groups,)` levels."""
        change = self.table()[self._groups, levels].sum()
        return self.centre.loss_nats + float(change)

    def _sums(self, table: NDArray[Any], levels: NDArray[Any]) -> NDArray[Any]:
        """`(trials,)` sum over groups of a `(groups, levels)` table."""
        return np.asarray(table[self._groups, levels].sum(-1))

    def _covariance(self) -> NDArray[Any]:
        """`(trials, trials)`: two share the doubt of the changes that both make."""
        variance = self._spread**2
        gram = np.diag(self._noise**2)
        for trial, levels in enumerate(self._levels):
            agree = self._levels == levels
            gram[trial] += (agree * variance[self._groups, levels]).sum(1)
        return gram


def _ridge(
    features: NDArray[Any],
    values: NDArray[Any],
    noise: NDArray[Any],
    prior: NDArray[Any],
    doubt: NDArray[Any],
) -> NDArray[Any]:
    """Coefficients of `values` on `(n, k)` features, drawn to the prior by their doubt."""
    weighted = features / noise[:, None]
    precision = np.diag(doubt**-2.0)
    return np.asarray(
        np.linalg.solve(
            weighted.T @ weighted + precision, weighted.T @ (values / noise) + precision @ prior
        )
    )


@dataclass(frozen=True)
class Foresight:
    """How well trials were predicted, each from those before it.

    Attributes:
        trials: how many.
        error_nats: root mean square error of the corrected prediction.
        spearman: rank correlation of prediction and measurement; None where one is constant.
        table_error_nats, table_spearman: of the damage table's own sum.
    """

    trials: int
    error_nats: float
    spearman: float | None
    table_error_nats: float
    table_spearman: float | None

    def __str__(self) -> str:
        def ranked(rho: float | None) -> str:
            return "" if rho is None else f", rank correlation {rho:.2f}"

        return (
            f"The predictor, on {self.trials} trials before they were measured, erred by "
            f"{self.error_nats:.3f} nats{ranked(self.spearman)}; the damage table's sum by "
            f"{self.table_error_nats:.3f}{ranked(self.table_spearman)}."
        )


def foresight(rows: Sequence[tuple[float, float, float]]) -> Foresight | None:
    """Of (corrected prediction, table's sum, measured loss) a trial; None below three."""
    if len(rows) < 3:
        return None
    predicted, table, measured = np.array(rows).T

    def error(values: NDArray[Any]) -> float:
        return float(np.sqrt(((values - measured) ** 2).mean()))

    return Foresight(
        len(rows),
        error(predicted),
        spearman(predicted.tolist(), measured.tolist()),
        error(table),
        spearman(table.tolist(), measured.tolist()),
    )
