"""The benchmark of the sensitivity table: which groups and which candidates it takes."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from sensitivity import _candidates, _some
from synthetic import make_space


@pytest.mark.parametrize(("groups", "most", "taken"), [(120, 24, 24), (10, 24, 10), (7, 3, 3)])
def test_groups_are_taken_at_even_distances_up_to_the_last(
    groups: int, most: int, taken: int
) -> None:
    space = make_space(groups)
    few = _some(space, most)
    places = [space.groups.index(group) for group in few.groups]
    gaps = {after - before for before, after in pairwise(places)}
    assert len(places) == taken
    assert places[-1] == groups - 1
    assert max(gaps) - min(gaps) <= 1
    assert set(few.options) == {group.name for group in few.groups}


def test_each_candidate_changes_every_group_so_that_nothing_is_reused() -> None:
    space = make_space(10)
    candidates = _candidates(space, 0)
    assert all(space.allows(candidate) for candidate in candidates)
    assert not set(candidates) & set(_candidates(space, 1))
    for before, after in pairwise(candidates):
        assert all(before[group] != after[group] for group in before)
