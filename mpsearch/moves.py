"""Moves from one assignment to another that keep a budget of bytes.

An assignment is an array of levels, one a group: its format's number, smallest first. A switch
raises a few groups by a level, lowers others until it fits, and spends what is left; a crossing
takes each group's level from one of two assignments, and is fitted likewise. Children of the best
assignments are made of both.

Source: level switch mutation, EvoPress (arXiv:2410.14649).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpsearch.space import ResolvedSpace

_RAISED = (0.25, 0.25, 0.25, 0.25)  # chances of raising one to four groups
_ANY = 0.25  # chance that a group is chosen blindly
_KEEN = 0.055  # share of the groups among which the others are chosen
_CHILDREN = 64
_ATTEMPTS = 200
_CROSSED = 0.15  # share of children with two parents
_ELITE = 0.6  # chance that the best parent is taken, then the next, and so on


Rates = dict[int, NDArray[Any]]


class Moves:
    """The moves of a space.

    Attributes:
        names: of the groups.
        formats: names of each group's formats, smallest first.
        top: `(groups,)` largest level.
        groups: `(groups,)` their numbers.
        stored_bytes: `(groups, levels)`, padded to the right with the last level.
    """

    def __init__(self, space: ResolvedSpace):
        self.names = [group.name for group in space.groups]
        self.formats = [[fmt.name for fmt in space.options[name]] for name in self.names]
        self.top = np.array([len(formats) - 1 for formats in self.formats])
        self.groups = np.arange(len(self.names))
        self.stored_bytes = np.array(
            [
                [space.options[group.name][level].stored_bytes(group) for level in padded]
                for group, padded in zip(space.groups, self._padded(), strict=True)
            ]
        )
        self._kept_bytes = space.kept_bytes
        # What going a level up or down changes, `(groups, levels)` of bytes.
        self._step_bytes = {step: self._step(self.stored_bytes, step) for step in (+1, -1)}

    def _padded(self) -> list[list[int]]:
        depth = range(int(self.top.max()) + 1)
        return [[min(level, int(top)) for level in depth] for top in self.top]

    def table(self, of_pairs: Any) -> NDArray[Any]:
        """`(groups, levels)` of a mapping from (group, format) to a number."""
        return np.array(
            [
                [of_pairs[name, formats[level]] for level in padded]
                for name, formats, padded in zip(
                    self.names, self.formats, self._padded(), strict=True
                )
            ]
        )

    def of_pairs(self, table: NDArray[Any]) -> dict[tuple[str, str], float]:
        """By (group, format), what `table` was made of."""
        return {
            (name, fmt): float(value)
            for name, formats, row in zip(self.names, self.formats, table, strict=True)
            for fmt, value in zip(formats, row, strict=False)  # the row may be padded
        }

    def size(self, levels: NDArray[Any]) -> int:
        """Stored bytes, kept weights included."""
        return self._kept_bytes + int(self.stored_bytes[self.groups, levels].sum())

    def rates(self, changes: NDArray[Any]) -> Rates:
        """For a step up and a step down, `(groups, levels)` of predicted gain a byte.

        Args:
            changes: `(groups, levels)` predicted loss; only differences within a group matter.
        """
        return {
            step: -self._step(changes, step) / np.maximum(np.abs(step_bytes), 1)
            for step, step_bytes in self._step_bytes.items()
        }

    def switch(
        self, rng: np.random.Generator, parent: NDArray[Any], limit: int, rates: Rates
    ) -> NDArray[Any]:
        """Raise a few groups, lower others until it fits, then spend what is left.

        Args:
            limit: stored bytes.
        Returns:
            Within the limit, unless the smallest assignment is not.
        """
        levels = parent.copy()
        moved = np.zeros(len(levels), dtype=bool)
        for _ in range(int(rng.choice(len(_RAISED), p=_RAISED)) + 1):
            if (group := self._pick(rng, levels, +1, ~moved, rates)) is not None:
                levels[group] += 1
                moved[group] = True
        return self._fit(rng, levels, parent, moved, limit, rates)

    def cross(
        self,
        rng: np.random.Generator,
        parents: tuple[NDArray[Any], NDArray[Any]],
        limit: int,
        rates: Rates,
    ) -> NDArray[Any]:
        """Each group's level from either parent, then fitted as in `switch`."""
        one, other = parents
        levels = np.where(rng.random(len(one)) < 0.5, one, other)
        return self._fit(rng, levels, levels, np.zeros(len(levels), dtype=bool), limit, rates)

    def children(
        self,
        rng: np.random.Generator,
        parents: Sequence[NDArray[Any]],
        limit: int,
        changes: NDArray[Any],
        seen: set[bytes],
    ) -> Iterator[NDArray[Any]]:
        """At most 64 distinct ones of one or two parents, by switches and crossings.

        Args:
            parents: best first.
            limit: stored bytes.
            changes: `(groups, levels)` predicted loss, as of `rates`.
            seen: the bytes of assignments that are passed over.
        """

        def parent() -> NDArray[Any]:
            return parents[min(int(rng.geometric(_ELITE)) - 1, len(parents) - 1)]

        rates, found = self.rates(changes), set()
        for _ in range(_ATTEMPTS):
            if rng.random() < _CROSSED:
                child = self.cross(rng, (parent(), parent()), limit, rates)
            else:
                child = self.switch(rng, parent(), limit, rates)
            if (key := child.tobytes()) not in seen and key not in found:
                found.add(key)
                yield child
            if len(found) == _CHILDREN:
                return

    def _step(self, table: NDArray[Any], step: int) -> NDArray[Any]:
        other = np.clip(np.arange(table.shape[1]) + step, 0, self.top[:, None])
        return np.asarray(np.take_along_axis(table, other, axis=1) - table)

    def _fit(
        self,
        rng: np.random.Generator,
        levels: NDArray[Any],
        floor: NDArray[Any],
        moved: NDArray[Any],
        limit: int,
        rates: Rates,
    ) -> NDArray[Any]:
        """Lower groups that have not been raised until it fits; raise those not below `floor`."""
        levels = levels.copy()
        size = self.size(levels)
        while size > limit:
            group = self._pick(rng, levels, -1, ~moved, rates)
            if group is None:  # nothing else can go lower: give back a raise
                group = self._pick(rng, levels, -1, np.ones_like(moved), rates)
            if group is None:
                break
            size += int(self._step_bytes[-1][group, levels[group]])
            levels[group] -= 1
        while True:
            steps = self._step_bytes[+1][self.groups, levels]
            room = (size + steps <= limit) & (levels >= floor)
            if (group := self._pick(rng, levels, +1, room, rates)) is None:
                return levels
            size += int(self._step_bytes[+1][group, levels[group]])
            levels[group] += 1

    def _pick(
        self,
        rng: np.random.Generator,
        levels: NDArray[Any],
        step: int,
        allowed: NDArray[Any],
        rates: Rates,
    ) -> int | None:
        """A group that can move; now and then any, else likelier the better its predicted trade.

        Trades are ranked by gain a byte when raising, by loss a byte when lowering.
        """
        there = levels + step
        movable = np.flatnonzero(allowed & (there >= 0) & (there <= self.top))
        if not movable.size:
            return None
        if rng.random() < _ANY:
            return int(rng.choice(movable))
        rate = rates[step][movable, levels[movable]]
        rank = int(rng.exponential(max(_KEEN * len(movable), 1.0)))
        return int(movable[np.argsort(-rate, kind="stable")[min(rank, len(movable) - 1)]])
