"""Displaced or forgotten: planted mixtures are found, and luck is not taken for knowledge."""

from __future__ import annotations

import json

import numpy as np
import pytest
from numpy.typing import NDArray

from mpsearch.displaced import EXAMPLES, Displacement, displacement
from mpsearch.facts import Fact
from mpsearch.scores import FactScores

RELATIONS = ("color", "place", "shape", "taste")
EACH = 150
FACTS = [
    Fact(relation, f"the {relation} of {{}} is", f"{relation} {n}", f"answer {n}")
    for relation in RELATIONS
    for n in range(EACH)
]
COUNT = len(FACTS)
OF = np.array([fact.relation for fact in FACTS])


def scores(right: NDArray[np.bool_], lead: float = 1.0) -> FactScores:
    margin = np.where(right, 1.0, -1.0)
    return FactScores(margin, np.zeros(COUNT), right, margin, np.full(COUNT, lead))


def told(
    was: NDArray[np.bool_],
    now: NDArray[np.bool_],
    reordered: NDArray[np.bool_] | None = None,
    **otherwise: NDArray[np.bool_],
) -> Displacement:
    named = {name.replace("_", " "): scores(right) for name, right in otherwise.items()}
    return displacement(
        scores(was),
        scores(now),
        named,
        None if reordered is None else scores(reordered),
        FACTS,
        np.random.default_rng(0),
    )


def mixture(seed: int, known: float, luck: float = 0.2, survives: float = 0.9) -> Displacement:
    """A third of the facts missed, a third forgotten of which a share is known, a third kept."""
    generator = np.random.default_rng(seed)
    third = generator.permutation(COUNT) % 3
    knows = (third == 2) | ((third == 1) & (generator.random(COUNT) < known))
    back = generator.random(COUNT) < np.where(knows, survives, luck)
    return told(third > 0, third == 2, more_examples=back)


@pytest.mark.parametrize("known", [0.0, 0.4, 1.0])
def test_a_planted_share_of_displaced_facts_is_found(known: float) -> None:
    estimates, covered = [], 0
    for seed in range(40):
        found = mixture(seed, known).ways[-1].displaced
        assert found is not None
        estimates.append(found.mean)
        covered += found.low <= known <= found.high
    assert np.mean(estimates) == pytest.approx(known, abs=0.04)  # clipped at 0 and 1
    assert covered >= 34  # of 40, where 38 are meant


def test_luck_alone_displaces_nothing() -> None:
    """Rates that are equal exactly."""
    was = np.arange(COUNT) % 3 > 0
    now = np.arange(COUNT) % 3 == 2
    back = now | (np.arange(COUNT) // 3 % 2 == 0)  # every second one of all others
    rescue = told(was, now, more_examples=back).ways[-1]
    assert rescue.forgotten is not None and rescue.missed is not None
    assert rescue.displaced is not None and rescue.kept is not None
    assert (rescue.forgotten.mean, rescue.missed.mean, rescue.kept.mean) == pytest.approx(
        (0.5, 0.5, 1.0)
    )
    assert rescue.displaced.mean == pytest.approx(0.0, abs=1e-12)


def test_groups_are_weighted_to_the_relations_of_the_forgotten_facts() -> None:
    """Facts are forgotten in one relation, where luck is frequent; elsewhere it does not matter."""
    was = np.tile(np.arange(EACH) % 2 == 0, len(RELATIONS))
    now = was & (OF != "color")
    now[:EACH:10] = was[:EACH:10]  # some colors are kept
    lucky = (OF == "color") & ~was & (np.tile(np.arange(EACH) // 2 % 3 == 0, len(RELATIONS)))
    rescue = told(was, now, more_examples=now | lucky).ways[-1]
    assert rescue.missed is not None and rescue.forgotten is not None
    assert rescue.missed.mean == pytest.approx(25 / 75)  # over all relations 25 of 300
    assert rescue.missed.low < 25 / 75 < rescue.missed.high
    assert rescue.forgotten.mean == 0.0


def test_a_fact_is_listed_with_the_ways_by_which_it_came_back() -> None:
    was, now = np.ones(COUNT, dtype=bool), np.ones(COUNT, dtype=bool)
    now[:3] = False
    first, second, more = now.copy(), now.copy(), now.copy()
    first[0], second[1], more[1] = True, True, True
    found = told(was, now, paraphrase_1=first, paraphrase_2=second, more_examples=more)
    assert [fact.subject for fact in found.facts] == ["color 0", "color 1", "color 2"]
    assert [fact.back_by for fact in found.facts] == [
        ("any paraphrase",), ("any paraphrase", EXAMPLES), (),
    ]  # fmt: skip
    assert [way.way for way in found.ways] == [
        "any paraphrase", EXAMPLES, "the surest prompt", "any other prompt",
    ]  # fmt: skip
    assert [way.forgotten and round(way.forgotten.mean * 3) for way in found.ways] == [2, 1, 0, 2]
    assert all(way.missed is None and way.displaced is None for way in found.ways)
    assert "no facts to tell how many do so by chance" in found.verdict


def test_the_surest_prompt_is_chosen_without_looking_at_the_answer() -> None:
    was, now = np.ones(COUNT, dtype=bool), np.ones(COUNT, dtype=bool)
    now[:4] = False
    right, wrong = now.copy(), now.copy()
    right[:4] = True
    for sure_right, expected in ((True, 4), (False, 0)):
        found = displacement(
            scores(was),
            scores(now, lead=1.0),
            {
                "paraphrase 1": scores(right, lead=3.0 if sure_right else 2.0),
                "paraphrase 2": scores(wrong, lead=2.0 if sure_right else 3.0),
            },
            None,
            FACTS,
            np.random.default_rng(0),
        )
        surest = next(way for way in found.ways if way.way == "the surest prompt")
        assert surest.forgotten is not None
        assert surest.forgotten.mean * 4 == pytest.approx(expected)


def test_gains_are_set_against_those_of_reordered_examples() -> None:
    was = np.arange(COUNT) >= 100
    now, reordered = was.copy(), was.copy()
    now[:30], reordered[25:45] = True, True
    reordered[200:207] = False
    found = told(was, now, reordered)
    null = found.null
    assert null is not None
    assert (null.missed, null.gained, null.null_gained) == (100, 30, 20)
    assert (null.forgotten, null.null_forgotten) == (0, 7)
    assert null.p == pytest.approx(0.1539, abs=1e-4)  # binomial: 25 against 15
    assert "so this is no more than luck" in found.verdict
    now[:100] = True
    assert "so this is more than luck" in told(was, now, reordered).verdict


def test_nothing_forgotten_and_no_other_prompts_are_said() -> None:
    right = np.ones(COUNT, dtype=bool)
    assert told(right, right, more_examples=right).verdict == "Nothing was forgotten."
    assert "no paraphrase and no further examples" in told(right, ~right).verdict


def test_displacement_is_json() -> None:
    content = json.loads(json.dumps(mixture(0, 0.5).to_json()))
    assert {"missed", "kept", "ways", "facts", "null", "verdict"} == set(content)
    assert content["ways"][0]["displaced"]["low"] < content["ways"][0]["displaced"]["high"]


def test_scores_without_distractors_are_refused() -> None:
    plain = FactScores(np.zeros(COUNT), np.zeros(COUNT), np.zeros(COUNT), None)
    with pytest.raises(ValueError, match="distractors"):
        displacement(plain, plain, {}, None, FACTS, np.random.default_rng(0))
