"""A limit of text KL: most proposals keep it, and facts are still won."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from synthetic import (
    ask,
    conflict,
    explore,
    explore_limited,
    middle,
    new_study,
    random_feasible,
)

import mpsearch.moves
import mpsearch.samplers
from mpsearch.assignment import Assignment
from mpsearch.moves import Moves
from mpsearch.samplers import LevelSwitchSampler


def test_a_limit_of_text_kl_is_kept_by_most_proposals_and_facts_are_still_won() -> None:
    space, damage, loss, text = conflict()
    budget = middle(space)
    free = explore(new_study(LevelSwitchSampler(space, damage, budget, 0)), space, loss, 24)
    limit = float(np.median([text(a) for a in free])) / 3
    sampler = LevelSwitchSampler(space, damage, budget, 0, max_text_kl_nats=limit)
    proposals = explore_limited(new_study(sampler), space, loss, text, limit, 24)
    late = slice(8, None)
    keeping = [a for a in proposals[late] if text(a) <= limit]
    assert len(keeping) >= 10
    assert len(keeping) > 2 * sum(text(a) <= limit for a in free[late])
    feasible = [a for a in random_feasible(space, budget, 0, 200) if text(a) <= limit]
    assert min(map(loss, keeping)) < min(map(loss, feasible))
    assert max(map(space.stored_bytes, proposals)) <= budget


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_parents_keep_the_limit_or_are_the_nearest_to_it(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    space, damage, loss, text = conflict()
    budget = middle(space)
    first = random_feasible(space, budget, 0, 12)
    limit = float(np.quantile([text(a) for a in first], share)) - 1e-9
    sampler = LevelSwitchSampler(space, damage, budget, 0, max_text_kl_nats=limit)
    study = new_study(sampler)
    for assignment in first:
        study.enqueue_trial(dict(assignment))
    explore_limited(study, space, loss, text, limit, len(first))
    keeping = {a for a in first if text(a) <= limit}
    assert bool(keeping) == bool(share)
    parents: set[Assignment] = set()
    switch = Moves.switch

    def watched(self: Moves, rng: Any, parent: Any, limit: int, rates: Any) -> Any:
        formats = zip(self.names, self.formats, parent, strict=True)
        parents.add(Assignment.of({name: its[level] for name, its, level in formats}))
        return switch(self, rng, parent, limit, rates)

    monkeypatch.setattr(Moves, "switch", watched)
    monkeypatch.setattr(mpsearch.samplers, "_LOOSE", 0.0)
    ask(study, space)
    assert parents
    if keeping:
        assert parents <= keeping
    else:
        assert min(first, key=text) in parents
        monkeypatch.setattr(mpsearch.moves, "_ELITE", 1.0)
        parents.clear()
        ask(study, space)
        assert parents == {min(first, key=text)}


def test_a_limit_that_every_trial_keeps_by_far_rules_out_nothing() -> None:
    space, damage, loss, text = conflict()
    sampler = LevelSwitchSampler(space, damage, middle(space), 0, max_text_kl_nats=1e9)
    proposals = explore_limited(new_study(sampler), space, loss, text, 1e9, 20)
    chance = random_feasible(space, middle(space), 0, 20)
    assert min(map(loss, proposals)) < 0.6 * min(map(loss, chance))
