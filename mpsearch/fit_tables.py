"""What `mpsearch fit` prints: the terms with bars, the formats that fit, and the cards."""

from __future__ import annotations

from mpsearch.budget import DeviceBudget, Term
from mpsearch.console import emit, table
from mpsearch.fit import (
    bits_allowed,
    kept_parts,
    resident_bytes,
    smallest_devices,
    uniform_fits,
    unpacks,
    unserved,
)
from mpsearch.sizes import format_size
from mpsearch.space import ResolvedSpace

_BAR = 24  # characters of the whole memory


def show_fit(space: ResolvedSpace, budget: DeviceBudget, pick_bytes: int | None) -> None:
    """The terms and what is left; then what fits there.

    Args:
        pick_bytes: stored bytes of a run's pick.
    """
    architecture, workload = budget.architecture, budget.workload
    emit(
        f"{architecture.family}, {architecture.parameters:,} parameters, on {budget.device} "
        f"({format_size(budget.memory_bytes)}), served by {budget.runtime.name}"
    )
    show_terms(budget)
    _show_formats(space, budget)
    if unpacks(space, budget.runtime):
        container = space.target.container
        emit(f"{budget.runtime.name} unpacks {container}: in memory every weight is bf16")
    elif budget.left_bytes > space.kept_bytes:
        bits = bits_allowed(space, budget)
        room = f"{bits:.2f} bits a weight, scales included" if bits < 16 else "bf16 throughout"
        parts = ", ".join(
            f"{what} {format_size(size)}"
            for what, size in kept_parts(space, budget).items()
            if size
        )
        emit(
            f"{format_size(space.kept_bytes)} of weights stay in bf16 ({parts}); for the others "
            f"there is room for {room}"
        )
    if pick_bytes is not None:
        weights_bytes = resident_bytes(space, pick_bytes, budget.runtime)
        context = budget.largest_context(weights_bytes)
        emit(
            f"the run's pick takes {format_size(weights_bytes)}: "
            + (f"up to {context:,} tokens of context" if context else "it does not fit")
            + f" at batch {workload.batch}"
        )


def show_terms(budget: DeviceBudget) -> None:
    """A row a term, its share of the memory as a bar."""
    terms = (*budget.terms, Term("left for weights", budget.left_bytes, ""))
    table(
        ["of the memory", "size", "", "which is"],
        [
            [
                term.name.replace("_", " "),
                format_size(term.size_bytes),
                _bar(term.size_bytes, budget.memory_bytes),
                term.why,
            ]
            for term in terms
        ],
        left=4,
    )


def _bar(size_bytes: int, of_bytes: int) -> str:
    return "█" * min(_BAR, round(_BAR * max(size_bytes, 0) / max(of_bytes, 1)))


def _show_formats(space: ResolvedSpace, budget: DeviceBudget) -> None:
    """Every uniform format: whether it fits, what is left over, and the longest context."""
    found = uniform_fits(space, budget)
    rows = [
        [
            row.format,
            f"{row.bits_per_weight:.2f}",
            format_size(row.weights_bytes),
            "yes" if row.fits else "no",
            format_size(row.spare_bytes),
            f"{row.context:,}" if row.context else "none",
        ]
        for row in found
    ]
    table(["uniform", "bits", "weights", "fits", "to spare", "longest context"], rows)
    if strange := unserved(space, budget):
        emit(
            f"{budget.runtime.name}'s usual kernels do not take {', '.join(strange)}: try before "
            "you rely on them"
        )


def show_devices(space: ResolvedSpace, budget: DeviceBudget, pick_bytes: int | None) -> None:
    """Without a device: the smallest cards for every uniform format, and for a run's pick."""
    sizes = [(row.format, row.weights_bytes) for row in uniform_fits(space, budget)]
    if pick_bytes is not None:
        sizes.insert(0, ("the pick", resident_bytes(space, pick_bytes, budget.runtime)))
    rows = []
    for name, weights_bytes in sizes:
        cards = smallest_devices(budget, weights_bytes, most=3)
        rows.append([
            name, format_size(weights_bytes),
            ", ".join(card.name for card in cards) or "none in the catalogue",
        ])  # fmt: skip
    workload = budget.workload
    table(
        [f"at {workload.context:,} tokens x {workload.batch}", "weights", "smallest cards"],
        rows,
        left=3,
    )
