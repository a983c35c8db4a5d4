"""Assignments that need no measurement beyond a damage table: uniform, greedy, exact knapsack.

A damage table maps `(group name, format name)` to a predicted loss; the prediction for an
assignment is the sum over groups. That sum is where all three stop: what an assignment really
costs is measured by the search.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from heapq import heapify, heappop, heappush
from math import gcd, isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpsearch.assignment import Assignment
from mpsearch.errors import CheckError, InfeasibleError
from mpsearch.formats import FORMATS, Format
from mpsearch.space import ResolvedSpace

Damage = Mapping[tuple[str, str], float]


def check_damage(space: ResolvedSpace, damage: Damage, what: str = "damage") -> None:
    """Raise `CheckError` unless every (group, format) of the space has a finite number."""
    for group, formats in space.options.items():
        for fmt in formats:
            if (value := damage.get((group, fmt.name))) is None or not isfinite(value):
                found = "missing" if value is None else value
                raise CheckError(
                    f"the {what} of '{group}' in {fmt.name} is {found}, where a number is needed"
                )


def uniform(space: ResolvedSpace) -> dict[str, Assignment]:
    """One assignment for each format of the space, by its name.

    A group whose rules exclude the format gets its largest allowed one of no more bits and bytes,
    or else its smallest.
    """
    assignments = {}
    for name in space.space.formats:
        chosen = {}
        for group in space.groups:
            options = space.options[group.name]
            most = FORMATS[name].bits, FORMATS[name].stored_bytes(group)
            # Bits first: packed codes of a tied embedding would be stored twice, above bf16.
            below = [fmt for fmt in options if (fmt.bits, fmt.stored_bytes(group)) <= most]
            chosen[group.name] = (below[-1] if below else options[0]).name
        assignments[name] = Assignment.of(chosen)
    return assignments


def greedy(space: ResolvedSpace, damage: Damage, budget_bytes: int) -> Assignment:
    """Start from the formats of least damage; give up the bytes that cost least, until it fits.

    A step of a group goes to whichever smaller format costs least damage per byte, so that one
    which hurts more than a smaller one is passed over. Of equals the largest is taken.

    Raises:
        InfeasibleError: the smallest formats do not fit either.
        CheckError: a damage is missing, NaN or infinite.
    """
    check_damage(space, damage)
    options = [space.options[group.name] for group in space.groups]
    sizes = [
        [fmt.stored_bytes(group) for fmt in formats]
        for group, formats in zip(space.groups, options, strict=True)
    ]
    hurts = [
        [damage[group.name, fmt.name] for fmt in formats]
        for group, formats in zip(space.groups, options, strict=True)
    ]
    level = [max(range(len(of)), key=lambda at: (-of[at], at)) for of in hurts]
    total = space.kept_bytes + sum(of[at] for of, at in zip(sizes, level, strict=True))

    def steps_from(index: int) -> list[tuple[float, int, int]]:
        """Damage per byte of the group's best step down, the group, the level; none at the end."""
        size, hurt, here = sizes[index], hurts[index], level[index]
        rates = [
            ((hurt[low] - hurt[here]) / (size[here] - size[low]), index, -low)
            for low in range(here)
            if size[low] < size[here]
        ]
        return [min(rates)] if rates else []

    steps = [step for index in range(len(level)) for step in steps_from(index)]
    heapify(steps)
    while total > budget_bytes:
        if not steps:
            raise InfeasibleError(f"no assignment of this space fits {budget_bytes:,} bytes")
        _, cheapest, low = heappop(steps)
        total -= sizes[cheapest][level[cheapest]] - sizes[cheapest][-low]
        level[cheapest] = -low
        for step in steps_from(cheapest):
            heappush(steps, step)
    return Assignment.of(
        {
            group.name: formats[index].name
            for group, formats, index in zip(space.groups, options, level, strict=True)
        }
    )


def feasible(space: ResolvedSpace, budget_bytes: int) -> Iterator[Assignment]:
    """Every assignment within the budget, from the smallest formats on, the last group first."""
    options = [space.options[group.name] for group in space.groups]
    sizes = [
        [fmt.stored_bytes(group) for fmt in formats]
        for group, formats in zip(space.groups, options, strict=True)
    ]
    level = [0] * len(options)
    size = space.stored_bytes(space.smallest)
    while size <= budget_bytes:
        yield Assignment.of(
            {
                group.name: formats[at].name
                for group, formats, at in zip(space.groups, options, level, strict=True)
            }
        )
        # Count up, as an odometer does; a group whose next format does not fit starts again.
        for index in reversed(range(len(level))):
            at, of = level[index], sizes[index]
            if at + 1 < len(of) and size - of[at] + of[at + 1] <= budget_bytes:
                level[index] += 1
                size += of[at + 1] - of[at]
                break
            level[index] = 0
            size -= of[at] - of[0]
        else:
            return


_MOST_CELLS = 2_000_000
_MOST_CHOICES = 240_000_000  # groups times cells, a byte each


def knapsack(
    space: ResolvedSpace, damage: Damage, budgets_bytes: Sequence[int]
) -> list[Assignment]:
    """The least total damage within each budget, by dynamic programming over bytes.

    One table serves all budgets. Its unit is the greatest common divisor of all byte steps, which
    makes it exact; where that gives over two million cells for the largest budget (fewer for more
    than 120 groups), steps are rounded up to a coarser unit, so that the result still fits and is
    optimal up to the rounding.

    Args:
        damage: for every group and each of its formats; finite.
        budgets_bytes: total stored bytes allowed, kept weights included.
    Raises:
        InfeasibleError: a budget below the smallest assignment.
        CheckError: a damage is missing, NaN or infinite.
    Source: multiple-choice knapsack, Kellerer, Pferschy and Pisinger (2004), chapter 11.
    """
    check_damage(space, damage)
    floor = space.stored_bytes(space.smallest)
    room = max(budgets_bytes, default=floor) - floor
    if min(budgets_bytes, default=floor) < floor:
        raise InfeasibleError(f"the smallest assignment takes {floor:,} bytes")
    options = [space.options[group.name] for group in space.groups]
    steps = [
        [fmt.stored_bytes(group) - formats[0].stored_bytes(group) for fmt in formats]
        for group, formats in zip(space.groups, options, strict=True)
    ]
    unit = max(reduce(gcd, (step for group_steps in steps for step in group_steps), 0), 1)
    useful = min(room, sum(max(group_steps) for group_steps in steps))
    most = min(_MOST_CELLS, _MOST_CHOICES // len(options)) if options else _MOST_CELLS
    unit *= max(1, -(-useful // (unit * most)))
    # Rounded up, all the largest formats together may need a little more than they take.
    cells = min(room // unit, sum(-(-max(group_steps) // unit) for group_steps in steps)) + 1

    least = np.zeros(cells)  # least damage of the groups so far within each number of units
    choices = np.zeros((len(options), cells), dtype=np.int8)
    for index, (group, formats) in enumerate(zip(space.groups, options, strict=True)):
        candidates = np.full((len(formats), cells), np.inf)
        for option, fmt in enumerate(formats):
            shift = -(-steps[index][option] // unit)
            if shift < cells:
                candidates[option, shift:] = least[: cells - shift] + damage[group.name, fmt.name]
        choices[index] = candidates.argmin(axis=0)
        least = candidates.min(axis=0)

    return [
        _walk_back(space, options, steps, choices, unit, (budget - floor) // unit)
        for budget in budgets_bytes
    ]


def _walk_back(
    space: ResolvedSpace,
    options: Sequence[Sequence[Format]],
    steps: Sequence[Sequence[int]],
    choices: NDArray[Any],
    unit: int,
    cell: int,
) -> Assignment:
    cell = min(cell, choices.shape[1] - 1)
    chosen: dict[str, str] = {}
    for index in reversed(range(len(options))):
        option = int(choices[index, cell])
        chosen[space.groups[index].name] = options[index][option].name
        cell -= -(-steps[index][option] // unit)
    return Assignment.of({group.name: chosen[group.name] for group in space.groups})
