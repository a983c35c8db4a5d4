"""The bootstrap: means by hand, and intervals that cover as often as they say."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest

from mpsearch.bootstrap import Interval, subject_bootstrap, subject_weights

SIMULATIONS = 800
SUBJECTS = 40


def facts_of_subjects() -> tuple[list[str], list[str]]:
    """Relations and subjects of facts: each relation has some of the subjects, at least ten."""
    pairs = [
        (relation, f"s{n}")
        for relation, every in (("color", 1), ("shape", 2), ("place", 4))
        for n in range(0, SUBJECTS, every)
    ]
    return [relation for relation, _ in pairs], [subject for _, subject in pairs]


RELATIONS, NAMES = facts_of_subjects()


def interval(values: np.ndarray, seed: int = 0, draws: int = 2000) -> Interval:
    return subject_bootstrap(values, RELATIONS, NAMES, np.random.default_rng(seed), draws)[0]


def test_means_are_within_relations_then_over_them() -> None:
    overall, within = subject_bootstrap(
        [1, 2, 3, 8, 12], ["a"] * 3 + ["b"] * 2, list("xyzxy"), np.random.default_rng(0)
    )
    assert (within["a"].mean, within["b"].mean) == (2, 10)
    assert overall.mean == 6
    assert overall.low < 6 < overall.high


def test_the_spread_is_the_standard_error_where_subjects_are_facts() -> None:
    generator = np.random.default_rng(1)
    values = generator.normal(size=12)
    names = [str(n) for n in range(12)]
    found, _ = subject_bootstrap(values, ["a"] * 12, names, generator, draws=20_000)
    expected = values.std(ddof=1) / sqrt(12)
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(expected, rel=0.05)


def test_many_relations_of_one_fact_are_not_certain() -> None:
    """Where there is nothing to find, an interval excludes zero no oftener than it says."""
    generator = np.random.default_rng(4)
    for relations in ([f"r{n}" for n in range(160)],
                      [f"r{max(n - 80, 0) // 2}" for n in range(240)]):  # fmt: skip
        relations = [f"{name} {n}" if n < 80 else name for n, name in enumerate(relations)]
        names = [str(n) for n in range(len(relations))]
        excluded = []
        for _ in range(100):
            values = generator.normal(size=len(relations))
            found, within = subject_bootstrap(values, relations, names, generator, draws=300)
            excluded.append(found.excludes_zero)
            assert found.mean == pytest.approx(np.mean([i.mean for i in within.values()]))
        assert np.mean(excluded) < 0.12


def test_facts_of_one_subject_move_together() -> None:
    """What a subject adds to two relations alike widens their mean, and cancels if opposite."""
    effect = np.random.default_rng(2).normal(size=SUBJECTS)
    relations, names = ["a"] * SUBJECTS + ["b"] * SUBJECTS, [f"s{n}" for n in range(SUBJECTS)] * 2
    alone = [f"{name} {i}" for i, name in enumerate(names)]
    widths = []
    for values, subjects in (
        ([*effect, *effect], names), ([*effect, *effect], alone), ([*effect, *-effect], names),
    ):  # fmt: skip
        found, _ = subject_bootstrap(values, relations, subjects, np.random.default_rng(3))
        widths.append(found.high - found.low)
    assert widths[0] == pytest.approx(widths[1] * sqrt(2), rel=0.1)
    assert widths[2] < 1e-9


def test_every_relation_stays_however_few_its_facts() -> None:
    names = [f"s{n}" for n in range(500)]
    overall, within = subject_bootstrap(
        np.arange(500.0), ["many"] * 499 + ["one"], names, np.random.default_rng(4)
    )
    assert within["one"] == Interval(499.0, 499.0, 499.0)
    assert np.isfinite([overall.low, overall.high]).all()


def test_the_same_generator_gives_the_same_interval() -> None:
    values = np.random.default_rng(5).normal(size=len(NAMES))
    assert interval(values, seed=1) == interval(values, seed=1)
    assert interval(values, seed=1) != interval(values, seed=2)


@pytest.mark.parametrize(("relations", "subjects"), [(["a"], ["s", "t"]), (["a", "b"], ["s"])])
def test_names_that_do_not_fit_the_values_are_refused(
    relations: list[str], subjects: list[str]
) -> None:
    with pytest.raises(ValueError, match=r"^2 values for"):
        subject_bootstrap([1, 2], relations, subjects, np.random.default_rng(0))


@pytest.mark.parametrize("kind", ["loss", "recall"])
def test_the_95_percent_interval_covers_about_95_percent(kind: str) -> None:
    """Facts share their subject's effect. Within three binomial errors and what few facts cost."""
    generator = np.random.default_rng(6)
    place = np.array([int(name[1:]) for name in NAMES])
    center = np.array([{"color": 0.4, "shape": 0.1, "place": -0.2}[name] for name in RELATIONS])
    effects = generator.normal(size=(SIMULATIONS, SUBJECTS))
    own = generator.normal(size=(SIMULATIONS, len(NAMES)))
    draws = center + (effects[:, place] + own) / sqrt(2)
    truth = np.mean([0.4, 0.1, -0.2])
    if kind == "recall":
        draws = draws > 0
        far = np.random.default_rng(7).normal([0.4, 0.1, -0.2], size=(200_000, 3))
        truth = (far > 0).mean()
    found = [interval(values.astype(float), seed, 400) for seed, values in enumerate(draws)]
    covered = np.mean([one.low <= truth <= one.high for one in found])
    error = sqrt(0.95 * 0.05 / SIMULATIONS)
    assert 0.95 - 3 * error - 0.01 <= covered <= 0.95 + 3 * error
    narrow = [(o.mean + (o.low - o.mean) * 0.65, o.mean + (o.high - o.mean) * 0.65) for o in found]
    at_80 = np.mean([low <= truth <= high for low, high in narrow])
    assert at_80 < 0.95 - 3 * error - 0.01  # an 80 % interval would be noticed


def test_a_difference_that_is_not_there_is_found_5_times_in_100() -> None:
    generator = np.random.default_rng(8)
    a, b = generator.normal(size=(2, SIMULATIONS, len(NAMES)))
    shared = generator.normal(scale=10, size=(SIMULATIONS, len(NAMES)))
    differences = (a + shared) - (b + shared)
    found = [interval(values, seed, 400).excludes_zero for seed, values in enumerate(differences)]
    error = sqrt(0.95 * 0.05 / SIMULATIONS)
    assert abs(np.mean(found) - 0.05) <= 3 * error + 0.01


def test_a_subject_has_one_weight_a_draw_of_mean_one() -> None:
    weights = subject_weights(["x", "y", "x"], np.random.default_rng(0), draws=20_000)
    assert weights.shape == (20_000, 3)
    assert (weights[:, 0] == weights[:, 2]).all()
    assert (weights[:, 0] != weights[:, 1]).any()
    assert weights.mean(0) == pytest.approx(1, abs=0.03)
