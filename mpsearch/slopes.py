"""Slopes: how the answer loss changes to first order when one group takes another format.

One backward pass over the facts, with a candidate in place, gives the gradient of the loss with
respect to every weight. Along the way from the weight in place to that of another format it is the
slope of that change, so one pass serves all groups and all formats. It costs as much as three
evaluations: a backward pass computes twice what a forward pass does.

The damage table is taken at the unquantized model, where the loss has no slope in the mean. Far
from it, where candidates are, slopes tell what the table cannot: which of the errors made so far
hurt together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mpsearch.assignment import Assignment
from mpsearch.errors import CheckError
from mpsearch.evaluate import Bench
from mpsearch.recall import RecallProxy

EVALUATIONS = 3  # that a measurement of slopes costs


def measure_slopes(
    bench: Bench, assignment: Assignment, proxies: Sequence[RecallProxy]
) -> dict[tuple[str, str], float]:
    """First-order change of answer loss from an assignment, in nats, of every (group, format).

    Zero for the formats that the assignment has.

    Args:
        bench: the assignment stays in place.
        proxies: whose facts together make the loss; no relation in more than one of them.
    Raises:
        CheckError: a slope is NaN or infinite.
    """
    bench.put(assignment)
    model = bench.bank.model
    groups = bench.space.groups
    places = {layer.name: model.places[layer.name] for group in groups for layer in group.layers}
    parameters = list(dict.fromkeys(place.parameter for place in places.values()))
    gradients = _gradients(proxies, parameters)
    slopes = {}
    for group in groups:
        options = [fmt.name for fmt in bench.space.options[group.name]]
        along = dict.fromkeys(options, 0.0)
        for layer in group.layers:
            place = places[layer.name]
            gradient = place.part(gradients[place.parameter]).flatten()
            for fmt in bench.space.options[group.name]:
                weight = bench.bank.weight(layer.name, fmt).float().flatten()
                along[fmt.name] += float(gradient @ weight)
        for name in options:
            slopes[group.name, name] = along[name] - along[assignment[group.name]]
    if not all(abs(value) < float("inf") for value in slopes.values()):
        raise CheckError(f"the slopes at assignment {assignment.id} are NaN or infinite")
    return slopes


def _gradients(
    proxies: Sequence[RecallProxy], parameters: Sequence[torch.nn.Parameter]
) -> dict[torch.nn.Parameter, Tensor]:
    """Of the mean over relations of the means within them."""
    relations = len({relation for proxy in proxies for relation in proxy.relations})
    totals: list[Tensor] = []
    for proxy in proxies:
        weights = [1 / (relations * proxy.relations.count(name)) for name in proxy.relations]
        found = proxy.loss_gradients(parameters, weights)
        totals = [a + b for a, b in zip(totals, found, strict=True)] if totals else found
    return dict(zip(parameters, totals, strict=True))
