"""Slopes: how the objective changes to first order when one group takes another format.

One backward pass over the facts, with a candidate in place, gives the gradient of what a search
lowers (`scores.objective`) with respect to every weight. Along the way from the weight in place to
that of another format it is the slope of that change, so one pass serves all groups and all
formats. It costs as much as three evaluations: a backward pass computes twice what a forward pass
does.

The damage table is taken at the unquantized model, where the loss has no slope in the mean. Far
from it, where candidates are, slopes tell what the table cannot: which of the errors made so far
hurt together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing

from torch import Tensor

from mpsearch.assignment import Assignment
from mpsearch.backward import products
from mpsearch.errors import CheckError
from mpsearch.evaluate import Bench
from mpsearch.recall import RecallProxy

EVALUATIONS = 3  # that a measurement of slopes costs


def measure_slopes(
    bench: Bench, assignment: Assignment, proxies: Sequence[RecallProxy]
) -> dict[tuple[str, str], float]:
    """First-order change of the objective from an assignment, in nats, by (group, format).

    Zero for the formats that the assignment has.

    Args:
        bench: the assignment stays in place.
        proxies: whose facts together make it, prompts read; no relation in more than one of them.
    Raises:
        CheckError: a slope is NaN or infinite.
    """
    bench.put(assignment)
    bank, groups = bench.bank, bench.space.groups
    layers = [layer.name for group in groups for layer in group.layers]
    relations = len({relation for proxy in proxies for relation in proxy.relations})
    # Of the mean over relations of the means within them, along each format's weights.
    along = {(group.name, f.name): 0.0 for group in groups for f in bench.space.options[group.name]}
    for proxy in proxies:
        weights = [1 / (relations * proxy.relations.count(name)) for name in proxy.relations]
        with closing(proxy.objective_gradients(layers, weights, bench.held)) as parts:
            for gradients in parts:
                _add_along(along, bench, gradients)
                if bank.model.streamed:
                    bank.forget()  # no other part of the model needs these weights
    slopes = {
        (group, name): value - along[group, assignment[group]]
        for (group, name), value in along.items()
    }
    if not all(abs(value) < float("inf") for value in slopes.values()):
        raise CheckError(f"the slopes at assignment {assignment.id} are NaN or infinite")
    return slopes


def _add_along(
    along: dict[tuple[str, str], float], bench: Bench, gradients: Mapping[str, Tensor]
) -> None:
    """Add the products of some layers' gradients and their weights in each format."""
    for group in bench.space.groups:
        for name in (layer.name for layer in group.layers if layer.name in gradients):
            for fmt in bench.space.options[group.name]:
                weight = bench.bank.weight(name, fmt)
                along[group.name, fmt.name] += float(products([gradients[name]], weight))
