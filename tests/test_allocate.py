"""Allocation: the knapsack against exhaustive search, greedy by hand, planted fragile groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import gcd
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpsearch import allocate
from mpsearch.allocate import feasible, greedy, knapsack, uniform
from mpsearch.assignment import Assignment
from mpsearch.errors import CheckError, InfeasibleError
from mpsearch.layers import Layer
from mpsearch.space import ResolvedSpace, SearchSpace

Damage = dict[tuple[str, str], float]
PACKED = ("int2-g64", "int3-g64", "int4-g64", "int8-g64")
KEPT_BYTES = 1000


@dataclass(frozen=True)
class Standin:
    """As much of a model as a space looks at."""

    layers: Sequence[Layer]
    kept_bytes: int = KEPT_BYTES


def space_of(shapes: Sequence[tuple[int, int]], formats: Sequence[str] = PACKED) -> ResolvedSpace:
    layers = [Layer(f"m.{block}.fc", *shape) for block, shape in enumerate(shapes)]
    text = f"version: 1\ntarget: compressed-tensors\nformats: [{', '.join(formats)}]\n"
    return SearchSpace.parse(text, "my.yaml").resolve(Standin(layers))


def total(damage: Mapping[tuple[str, str], float], assignment: Assignment) -> float:
    return sum(damage[pair] for pair in assignment.items())


def every_assignment(space: ResolvedSpace) -> list[Assignment]:
    return [
        Assignment.of(dict(zip(space.options, (fmt.name for fmt in chosen), strict=True)))
        for chosen in product(*space.options.values())
    ]


def least_damage(space: ResolvedSpace, damage: Damage, budget_bytes: int) -> float:
    """Exhaustive search."""
    return min(
        total(damage, assignment)
        for assignment in every_assignment(space)
        if space.stored_bytes(assignment) <= budget_bytes
    )


def falling_damage(space: ResolvedSpace, weight: Mapping[str, float]) -> Damage:
    """Fewer bits hurt more, each group by its own weight."""
    return {
        (name, fmt.name): weight[name] * 4.0**-fmt.bits
        for name, formats in space.options.items()
        for fmt in formats
    }


shapes = st.lists(
    st.tuples(st.integers(1, 40), st.sampled_from([1, 33, 64, 96, 200])), min_size=1, max_size=4
)
some_formats = st.lists(
    st.sampled_from([*PACKED, "int3-g32", "int4-g32", "int4-g128", "bf16"]),
    unique=True,
    min_size=2,
    max_size=5,
)


@st.composite
def problems(draw: st.DrawFn) -> tuple[ResolvedSpace, Damage]:
    """A small space and a damage table in whole numbers, in no order of bits."""
    space = space_of(draw(shapes), draw(some_formats))
    return space, {
        (name, fmt.name): float(draw(st.integers(-5, 30)))
        for name, formats in space.options.items()
        for fmt in formats
    }


def budgets_of(space: ResolvedSpace, shares: Sequence[float]) -> list[int]:
    low, high = space.stored_bytes(space.smallest), space.stored_bytes(space.largest)
    return [int(low + share * (high - low)) for share in shares]


# ------------------------------------------------------------------------------------- knapsack


@given(problems(), st.lists(st.floats(0, 1.2), min_size=1, max_size=3))
@settings(deadline=None, max_examples=100)
def test_the_knapsack_finds_what_exhaustive_search_finds(
    problem: tuple[ResolvedSpace, Damage], shares: list[float]
) -> None:
    space, damage = problem
    budgets = budgets_of(space, shares)
    for budget, found in zip(budgets, knapsack(space, damage, budgets), strict=True):
        assert space.allows(found)
        assert space.stored_bytes(found) <= budget
        assert total(damage, found) == least_damage(space, damage, budget)


@given(problems(), st.lists(st.floats(0, 1.2), min_size=1, max_size=4))
@settings(deadline=None, max_examples=100)
def test_several_budgets_in_one_call_equal_single_calls(
    problem: tuple[ResolvedSpace, Damage], shares: list[float]
) -> None:
    space, damage = problem
    budgets = budgets_of(space, shares)
    together = knapsack(space, damage, budgets)
    assert together == [knapsack(space, damage, [budget])[0] for budget in budgets]


@pytest.mark.parametrize("most_cells", [2, 3, 5, 8, 13, 21])
def test_a_coarser_table_still_fits_and_loses_no_more_than_the_rounding(
    monkeypatch: pytest.MonkeyPatch, most_cells: int
) -> None:
    space = space_of([(5, 65), (7, 96), (3, 200), (11, 64)])
    weight = dict(zip(space.options, (3.0, 1.0, 4.0, 2.0), strict=True))
    damage = falling_damage(space, weight)
    floor = space.stored_bytes(space.smallest)
    steps = [
        fmt.stored_bytes(group) - space.options[group.name][0].stored_bytes(group)
        for group in space.groups
        for fmt in space.options[group.name]
    ]
    monkeypatch.setattr(allocate, "_MOST_CELLS", most_cells)
    for budget in budgets_of(space, [share / 20 for share in range(21)]):
        (found,) = knapsack(space, damage, [budget])
        assert space.stored_bytes(found) <= budget
        # Each group rounds up by less than a unit, and the budget rounds down by less than one.
        unit = (budget - floor) // most_cells + gcd(*steps)
        slack = (len(space.groups) + 1) * unit
        assert total(damage, found) <= least_damage(space, damage, max(budget - slack, floor))


def test_a_coarser_table_with_room_for_everything_takes_the_best_of_each_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    space = space_of([(5, 65), (7, 96), (3, 200)])
    damage = falling_damage(space, dict.fromkeys(space.options, 1.0))
    budget = 2 * space.stored_bytes(space.largest)
    assert knapsack(space, damage, [budget]) == [space.largest]
    monkeypatch.setattr(allocate, "_MOST_CELLS", 20)
    assert knapsack(space, damage, [budget]) == [space.largest]


def test_a_budget_of_the_smallest_assignment_buys_it_and_one_byte_less_is_infeasible() -> None:
    space = space_of([(4, 64), (8, 128)])
    damage = falling_damage(space, {"m.0.fc": 1.0, "m.1.fc": 2.0})
    smallest = space.stored_bytes(space.smallest)
    assert knapsack(space, damage, [smallest]) == [space.smallest]
    with pytest.raises(InfeasibleError, match=f"^the smallest assignment takes {smallest:,} bytes"):
        knapsack(space, damage, [10 * smallest, smallest - 1])


def test_one_format_leaves_one_assignment() -> None:
    space = space_of([(4, 64), (8, 128)], ["int4-g64"])
    damage = falling_damage(space, {"m.0.fc": 1.0, "m.1.fc": 2.0})
    budgets = [space.stored_bytes(space.smallest), 10**9]
    assert knapsack(space, damage, budgets) == [space.smallest, space.smallest]


def test_no_budgets_give_no_assignments() -> None:
    space = space_of([(4, 64)])
    assert knapsack(space, falling_damage(space, {"m.0.fc": 1.0}), []) == []


def test_a_knapsack_by_hand() -> None:
    # int2 -> int4 of a group takes 4 * 4 * 4 = 64 bytes more; there is room for one step.
    space = space_of([(4, 64), (4, 64)], ["int2-g64", "int4-g64"])
    damage = {
        ("m.0.fc", "int2-g64"): 3.0,
        ("m.0.fc", "int4-g64"): 1.0,
        ("m.1.fc", "int2-g64"): 9.0,
        ("m.1.fc", "int4-g64"): 8.0,
    }
    smallest = space.stored_bytes(space.smallest)
    assert smallest == KEPT_BYTES + 2 * (4 * 16 + 4 * 2 + 16)
    none, one, both = knapsack(space, damage, [smallest + 63, smallest + 64, smallest + 128])
    assert dict(none) == {"m.0.fc": "int2-g64", "m.1.fc": "int2-g64"}
    assert dict(one) == {"m.0.fc": "int4-g64", "m.1.fc": "int2-g64"}
    assert dict(both) == {"m.0.fc": "int4-g64", "m.1.fc": "int4-g64"}


@pytest.mark.parametrize("fragile", range(6))
def test_a_planted_fragile_group_gets_the_most_bits(fragile: int) -> None:
    space = space_of([(8, 64)] * 6)
    weight = {name: 100.0 if i == fragile else 1.0 for i, name in enumerate(space.options)}
    damage = falling_damage(space, weight)
    (budget,) = budgets_of(space, [0.2])
    for found in (knapsack(space, damage, [budget])[0], greedy(space, damage, budget)):
        bits = [int(found[name][3]) for name in space.options]
        assert bits[fragile] == max(bits)
        assert bits.count(max(bits)) == 1


def test_inverted_damage_loses() -> None:
    space = space_of([(8, 64), (16, 64), (8, 128), (24, 64)])
    names = list(space.options)
    damage = falling_damage(space, dict(zip(names, (1.0, 50.0, 5.0, 20.0), strict=True)))
    inverted = falling_damage(space, dict(zip(names, (50.0, 1.0, 20.0, 5.0), strict=True)))
    budgets = budgets_of(space, [0.2, 0.4, 0.6])
    right, wrong = knapsack(space, damage, budgets), knapsack(space, inverted, budgets)
    for a, b in zip(right, wrong, strict=True):
        assert total(damage, a) < total(damage, b)


def test_a_model_sized_knapsack_is_exact_in_bytes_and_falls_with_the_budget() -> None:
    space = space_of([(576, 576), (192, 576), (1536, 576), (576, 1536)] * 8)
    weights = {name: 1.0 + (7 * i % 11) for i, name in enumerate(space.options)}
    damage = falling_damage(space, weights)
    budgets = budgets_of(space, [0.1, 0.3, 0.5, 0.7, 0.9])
    found = knapsack(space, damage, budgets)
    losses = [total(damage, assignment) for assignment in found]
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == len(losses)
    for budget, assignment in zip(budgets, found, strict=True):
        assert space.stored_bytes(assignment) <= budget
        assert total(damage, assignment) <= total(damage, greedy(space, damage, budget))


# --------------------------------------------------------------------------------------- greedy


@given(problems(), st.floats(0, 1.2))
@settings(deadline=None, max_examples=100)
def test_greedy_fits_and_never_beats_the_knapsack(
    problem: tuple[ResolvedSpace, Damage], share: float
) -> None:
    space, damage = problem
    (budget,) = budgets_of(space, [share])
    found = greedy(space, damage, budget)
    assert space.allows(found)
    assert space.stored_bytes(found) <= budget
    assert total(damage, found) >= total(damage, knapsack(space, damage, [budget])[0])


def test_greedy_gives_up_the_cheapest_bytes_first() -> None:
    # A step down saves 64 bytes of the small group and 256 of the large one.
    space = space_of([(4, 64), (16, 64)], ["int2-g64", "int4-g64"])
    damage = {
        ("m.0.fc", "int2-g64"): 1.0,  # 1/64 a byte
        ("m.0.fc", "int4-g64"): 0.0,
        ("m.1.fc", "int2-g64"): 3.0,  # 3/256 a byte: more damage, but cheaper
        ("m.1.fc", "int4-g64"): 0.0,
    }
    largest = space.stored_bytes(space.largest)
    assert greedy(space, damage, largest) == space.largest
    assert dict(greedy(space, damage, largest - 1)) == {
        "m.0.fc": "int4-g64",
        "m.1.fc": "int2-g64",
    }
    assert greedy(space, damage, largest - 64 - 256) == space.smallest


def test_greedy_refuses_what_the_smallest_formats_exceed() -> None:
    space = space_of([(4, 64)])
    smallest = space.stored_bytes(space.smallest)
    with pytest.raises(
        InfeasibleError, match=f"^no assignment of this space fits {smallest - 1:,} "
    ):
        greedy(space, falling_damage(space, {"m.0.fc": 1.0}), smallest - 1)


SIZES = ("int3-g128", "int3-g64", "int3-g32", "int4-g128", "int4-g64", "int4-g32")


def test_greedy_passes_over_a_larger_format_that_hurts_more() -> None:
    space = space_of([(64, 128), (64, 128)], SIZES)
    hurts = dict(zip(SIZES, (8.0, 4.0, 2.0, 3.0, 1.0, 1.5), strict=True))
    for formats in space.options.values():
        assert [fmt.name for fmt in formats] == list(SIZES)  # smallest first
    damage = {(name, fmt): hurt for name in space.options for fmt, hurt in hurts.items()}
    found = {
        fmt
        for budget in budgets_of(space, [share / 40 for share in range(41)])
        for fmt in greedy(space, damage, budget).values()
    }
    # int4-g32 and int4-g128 hurt more than a smaller format.
    assert found == {"int3-g128", "int3-g64", "int3-g32", "int4-g64"}


def test_greedy_goes_past_a_step_that_hurts_much_to_one_that_hurts_little_more() -> None:
    space = space_of([(64, 64), (64, 64)], ["int2-g64", "int3-g64", "int4-g64"])
    hurts = {"m.0.fc": (3.0, 2.9, 0.0), "m.1.fc": (9.0, 2.0, 0.0)}
    damage = {
        (name, fmt): hurt
        for name, three in hurts.items()
        for fmt, hurt in zip(("int2-g64", "int3-g64", "int4-g64"), three, strict=True)
    }
    largest = space.stored_bytes(space.largest)
    step = (largest - space.stored_bytes(space.smallest)) // 4
    found = greedy(space, damage, largest - 2 * step)
    assert total(damage, found) == 3.0  # and 4.9 by one step of each
    assert total(damage, found) == least_damage(space, damage, largest - 2 * step)


@given(problems(), st.floats(0, 1.2))
@settings(deadline=None, max_examples=100)
def test_greedy_takes_no_format_that_a_smaller_one_beats(
    problem: tuple[ResolvedSpace, Damage], share: float
) -> None:
    space, damage = problem
    (budget,) = budgets_of(space, [share])
    sizes = {
        (g.name, f.name): f.stored_bytes(g) for g in space.groups for f in space.options[g.name]
    }
    for name, fmt in greedy(space, damage, budget).items():
        beaten = [
            other.name
            for other in space.options[name]
            if sizes[name, other.name] < sizes[name, fmt]
            and damage[name, other.name] < damage[name, fmt]
        ]
        assert beaten == []


@given(problems(), st.floats(-0.1, 1.2))
@settings(deadline=None, max_examples=100)
def test_what_is_feasible_is_listed_whole_and_once(
    problem: tuple[ResolvedSpace, Damage], share: float
) -> None:
    space, _ = problem
    (budget,) = budgets_of(space, [share])
    found = list(feasible(space, budget))
    assert len(set(found)) == len(found)
    assert set(found) == {a for a in every_assignment(space) if space.stored_bytes(a) <= budget}


# -------------------------------------------------------------------------------------- uniform


def test_uniform_gives_every_group_the_same_format() -> None:
    space = space_of([(4, 64), (8, 128)])
    found = uniform(space)
    assert list(found) == list(PACKED)
    for name, assignment in found.items():
        assert dict(assignment) == {"m.0.fc": name, "m.1.fc": name}
    sizes = [space.stored_bytes(assignment) for assignment in found.values()]
    assert sizes == sorted(sizes)


def test_where_rules_exclude_the_format_uniform_goes_down_or_else_to_the_smallest() -> None:
    text = (
        "version: 1\ntarget: compressed-tensors\nformats: [int2-g64, int3-g64, int4-g64, bf16]\n"
        "rules:\n- match: '*.0.fc'\n  formats: [int3-g64, bf16]\n"
    )
    layers = [Layer("m.0.fc", 8, 64), Layer("m.1.fc", 8, 64)]
    space = SearchSpace.parse(text, "my.yaml").resolve(Standin(layers))
    assert {name: tuple(found.values()) for name, found in uniform(space).items()} == {
        "int2-g64": ("int3-g64", "int2-g64"),
        "int3-g64": ("int3-g64", "int3-g64"),
        "int4-g64": ("int3-g64", "int4-g64"),
        "bf16": ("bf16", "bf16"),
    }
    assert all(space.allows(found) for found in uniform(space).values())


# ------------------------------------------------------------------------------ odd tables


@pytest.mark.parametrize("allocate_with", [greedy, lambda s, d, b: knapsack(s, d, [b])])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
def test_a_damage_that_is_no_number_is_named(allocate_with: Any, bad: float | None) -> None:
    space = space_of([(64, 64), (64, 128)])
    damage = falling_damage(space, {"m.0.fc": 1.0, "m.1.fc": 2.0})
    key = ("m.1.fc", "int3-g64")
    damage = {pair: value for pair, value in damage.items() if pair != key}
    if bad is not None:
        damage[key] = bad
    what = "missing" if bad is None else str(bad)
    with pytest.raises(CheckError, match=rf"damage of 'm\.1\.fc' in int3-g64 is {what}"):
        allocate_with(space, damage, space.stored_bytes(space.largest))


@pytest.mark.parametrize("value", [0.0, 1.0, -2.0])
@pytest.mark.parametrize("groups", [2, 7])
def test_equal_damage_everywhere_still_fits(groups: int, value: float) -> None:
    space = space_of([(64, 64 * (1 + number % 3)) for number in range(groups)])
    damage = {(name, fmt.name): value for name, formats in space.options.items() for fmt in formats}
    floor, ceiling = space.stored_bytes(space.smallest), space.stored_bytes(space.largest)
    for budget in (floor, (floor + ceiling) // 2, ceiling):
        for chosen in (greedy(space, damage, budget), *knapsack(space, damage, [budget])):
            assert space.allows(chosen)
            assert space.stored_bytes(chosen) <= budget


def test_a_thousand_groups_of_odd_sizes_need_little_memory_and_lose_little(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The table shrinks as groups multiply; a tenth of the size here, as it takes a tenth."""
    monkeypatch.setattr(allocate, "_MOST_CHOICES", 24_000_000)
    space = space_of([(500 + 37 * number % 3500, 64 * (8 + number % 52)) for number in range(1000)])
    weight = {name: 1.0 + number % 17 for number, name in enumerate(space.options)}
    damage = falling_damage(space, weight)
    floor, ceiling = space.stored_bytes(space.smallest), space.stored_bytes(space.largest)
    budget = (floor + ceiling) // 2
    made: list[int] = []
    zeros = allocate.np.zeros

    def noted(shape: Any, *args: Any, **kwargs: Any) -> Any:
        made.append(shape if isinstance(shape, int) else shape[0] * shape[1])
        return zeros(shape, *args, **kwargs)

    monkeypatch.setattr(allocate.np, "zeros", noted)
    chosen = knapsack(space, damage, [budget])[0]
    assert max(made) <= 24_000_000 + 1000
    assert space.stored_bytes(chosen) <= budget
    assert space.stored_bytes(chosen) > budget - (ceiling - floor) // 20
    assert total(damage, chosen) <= total(damage, greedy(space, damage, budget)) * 1.05


def test_greedy_takes_the_same_steps_as_looking_at_every_group_each_time() -> None:
    space = space_of([(8 * (1 + number % 5), 64 * (1 + number % 3)) for number in range(12)])
    damage = falling_damage(space, {name: 1.0 + n % 4 for n, name in enumerate(space.options)})
    groups = {group.name: group for group in space.groups}
    for part in (0.1, 0.35, 0.8):
        floor, ceiling = space.stored_bytes(space.smallest), space.stored_bytes(space.largest)
        budget = int(floor + part * (ceiling - floor))
        level = {name: len(formats) - 1 for name, formats in space.options.items()}

        def rate(name: str, level: dict[str, int] = level) -> float:
            high, low = (space.options[name][level[name] - down] for down in (0, 1))
            saved = high.stored_bytes(groups[name]) - low.stored_bytes(groups[name])
            return (damage[name, low.name] - damage[name, high.name]) / saved

        def plan(level: dict[str, int] = level) -> Assignment:
            return Assignment.of({name: space.options[name][at].name for name, at in level.items()})

        while space.stored_bytes(plan()) > budget:
            level[min((name for name in level if level[name]), key=rate)] -= 1
        assert greedy(space, damage, budget) == plan()
