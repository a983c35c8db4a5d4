"""How much each group's quantization hurts: a table of (group, format).

KL-Fisher: for a small change of the weights, the KL from the reference is half the mean square of
the directional derivative of a sampled answer's log-probability. With answers `y` drawn from the
reference itself,

    damage(group, format) = 1/2 E_y [ <d log p(y) / dW, W_quantized - W>^2 ]

per fact, summed over the answer's tokens, in nats. One backward pass gives the gradients of all
layers and serves every format.

Facts share a pass, so their gradients arrive summed. The expectation of the square of the sum is
the sum of the squares: a sampled answer's gradient has mean zero, so cross terms vanish.

A layer whose gradients are all exactly zero is an expert that no fact reached. That the facts do
not need it is no reason to ruin it: its damage comes from its weight error, at the rate (damage
over squared relative error) of its group's other layers, else at the median rate of the reached
groups of its kind, else of all groups, in that format.

Source: the Fisher approximation of KL, with sampled labels (Kunstner et al., arXiv:1905.12558).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from mpsearch.bank import Bank, Report, silent
from mpsearch.errors import CheckError
from mpsearch.facts import Fact, FactSet
from mpsearch.files import write_atomically
from mpsearch.forward import Pass, PreparedRow
from mpsearch.layers import LayerGroup
from mpsearch.recall import SHOTS, ask
from mpsearch.space import ResolvedSpace

_ROW_NODES = 128  # smaller rows than for scoring: each gives one independent sample a draw
_SAMPLES = 64  # independent samples at least, over all rows and draws
_AT_ONCE = 4  # gradients of the whole model that are held together


@dataclass(frozen=True)
class Sensitivity:
    """Damage of each (group, format), with everything that produced it.

    Attributes:
        fisher_nats: predicted KL a fact if this group alone has this format.
        weight_error: relative Frobenius error of the group's weights.
        provenance: model fingerprint, facts, formats, quantizer, seeds.
    """

    fisher_nats: dict[tuple[str, str], float]
    weight_error: dict[tuple[str, str], float]
    provenance: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        rows = [
            {"group": group, "format": fmt, "fisher_nats": damage,
             "weight_error": self.weight_error[group, fmt]}
            for (group, fmt), damage in self.fisher_nats.items()
        ]  # fmt: skip
        return {"provenance": self.provenance, "rows": rows}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Sensitivity:
        rows = {(row["group"], row["format"]): row for row in content["rows"]}
        return cls(
            {key: row["fisher_nats"] for key, row in rows.items()},
            {key: row["weight_error"] for key, row in rows.items()},
            content["provenance"],
        )

    def save(self, path: Path) -> None:
        """Write it as JSON, whole or not at all."""
        write_atomically(path, json.dumps(self.to_json(), indent=1))


def measure_sensitivity(
    space: ResolvedSpace,
    bank: Bank,
    fact_set: FactSet,
    facts: tuple[Fact, ...],
    *,
    seed: int = 0,
    report: Report = silent,
) -> Sensitivity:
    """The whole table by KL-Fisher and by weight error.

    Args:
        space: its groups and formats.
        bank: built for them; its model must hold the reference weights.
        facts: usually those of the search partition that the reference knows.
        seed: of sampled answers.
    Raises:
        CheckError: a gradient is NaN or infinite.
    """
    model = bank.model
    layer_errors = _layer_errors(space, bank, report)
    weight_error = {key: sum(of_layers.values()) ** 0.5 for key, of_layers in layer_errors.items()}
    squared = dict.fromkeys(weight_error, 0.0)
    reached: set[str] = set()
    generator = torch.Generator().manual_seed(seed)
    sequences = [ask(model, fact_set, fact, fact.answer, SHOTS) for fact in facts]
    work = Pass(model, sequences, max_nodes=_ROW_NODES)
    draws = -(-_SAMPLES // len(work.rows))
    places = {
        layer.name: model.places[layer.name] for group in space.groups for layer in group.layers
    }
    parameters = list(dict.fromkeys(place.parameter for place in places.values()))
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        for index, row in enumerate(work.rows):
            report("sensitivity", index, len(work.rows))
            samples = _sampled_sums(work, row, draws, generator)
            for first in range(0, draws, _AT_ONCE):
                drawn = [
                    torch.autograd.grad(
                        # An expert in a module of its own that no token enters is not used.
                        log_prob, parameters, retain_graph=True, allow_unused=True,
                        materialize_grads=True,
                    )
                    for log_prob in samples[first : first + _AT_ONCE]
                ]  # fmt: skip
                of_parameter = dict(zip(parameters, zip(*drawn, strict=True), strict=True))
                gradients = {
                    name: [place.part(gradient) for gradient in of_parameter[place.parameter]]
                    for name, place in places.items()
                }
                reached.update(
                    name for name in places.keys() - reached if any(map(torch.any, gradients[name]))
                )
                _add_squares(squared, space, bank, gradients)
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
    report("sensitivity", len(work.rows), len(work.rows))
    damage = {key: value / (2 * draws * len(facts)) for key, value in squared.items()}
    if not all(value < float("inf") for value in damage.values()):
        broken = next(key for key, value in damage.items() if not value < float("inf"))
        raise CheckError(
            f"the gradient of '{broken[0]}' is NaN or infinite; cannot score {broken[1]}"
        )
    damage = _with_unreached(damage, layer_errors, reached, space)
    provenance = {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "bank": bank.settings,
        "formats": list(space.space.formats),
        "facts": {"source": fact_set.source, "digest": fact_set.digest, "used": len(facts)},
        "shots": SHOTS,
        "draws": draws,
        "unreached": [name for name in places if name not in reached],
        "seed": seed,
        "dtype": str(model.dtype),
    }
    return Sensitivity(damage, weight_error, provenance)


def _errors(group: LayerGroup, layer: str, space: ResolvedSpace, bank: Bank) -> Tensor:
    """`(formats, weights)` float32: `W_quantized - W` of one layer in each of its formats."""
    decoded = [bank.weight(layer, fmt) for fmt in space.options[group.name]]
    return (torch.stack(decoded) - bank.model.originals[layer]).float().flatten(1)


def _sampled_sums(
    work: Pass, row: PreparedRow, draws: int, generator: torch.Generator
) -> list[Tensor]:
    """For each draw, the log-probability of answers sampled for all of the row's facts, summed.

    Each answer token is drawn from the reference given the true answer's tokens before it, and
    counts once for each fact that reads it.
    """
    with torch.enable_grad():
        log_probs = work.logits(row).log_softmax(-1)
    chances = log_probs.detach().exp().cpu()
    places = torch.tensor([place for span, _ in row.spans for place in span])
    sums = []
    for _ in range(draws):
        tokens = torch.multinomial(chances[places], 1, generator=generator)[:, 0]
        sums.append(log_probs[places.to(log_probs.device), tokens.to(log_probs.device)].sum())
    return sums


def _add_squares(
    squared: dict[tuple[str, str], float],
    space: ResolvedSpace,
    bank: Bank,
    gradients: Mapping[str, Sequence[Tensor]],
) -> None:
    """Add each (group, format)'s squared directional derivatives, one a draw."""
    for group in space.groups:
        of_layers = []
        for layer in group.layers:
            drawn = torch.stack([g.float().flatten() for g in gradients[layer.name]])
            of_layers.append(_errors(group, layer.name, space, bank) @ drawn.T)
        derivatives = torch.stack(of_layers).sum(0)  # (formats, draws)
        for fmt, row in zip(space.options[group.name], derivatives, strict=True):
            squared[group.name, fmt.name] += float(row.double().square().sum())


def _layer_errors(
    space: ResolvedSpace, bank: Bank, report: Report
) -> dict[tuple[str, str], dict[str, float]]:
    """For each (group, format) and each layer, its squared error over the group's squared norm."""
    shares: dict[tuple[str, str], dict[str, float]] = {}
    for index, group in enumerate(space.groups):
        report("decoding", index, len(space.groups))
        errors = {
            layer.name: _errors(group, layer.name, space, bank).square().sum(1).double().tolist()
            for layer in group.layers
        }
        norm = sum(float(bank.model.originals[name].float().square().sum()) for name in errors)
        for number, fmt in enumerate(space.options[group.name]):
            shares[group.name, fmt.name] = {
                name: of_formats[number] / norm if norm else 0.0
                for name, of_formats in errors.items()
            }
    report("decoding", len(space.groups), len(space.groups))
    return shares


def _with_unreached(
    damage: Mapping[tuple[str, str], float],
    errors: Mapping[tuple[str, str], Mapping[str, float]],
    reached: Collection[str],
    space: ResolvedSpace,
) -> dict[tuple[str, str], float]:
    """The damage with that of layers without gradients added; see the module's docstring.

    Args:
        errors: as `_layer_errors` gives them.
        reached: names of the layers with gradients.
    """
    kind_of = {group.name: group.kind for group in space.groups}
    seen = {
        key: sum(error for name, error in of_layers.items() if name in reached)
        for key, of_layers in errors.items()
    }
    rates = {key: damage[key] / seen[key] for key in damage if seen[key] and damage[key]}

    def rate(group: str, fmt: str) -> float:
        alike = [
            value
            for (other, its), value in rates.items()
            if its == fmt and kind_of[other] == kind_of[group]
        ]
        of_format = [value for (_, its), value in rates.items() if its == fmt]
        return rates.get((group, fmt)) or median(alike or of_format or [1.0])

    unseen = {
        key: sum(error for name, error in of_layers.items() if name not in reached)
        for key, of_layers in errors.items()
    }
    return {key: damage[key] + unseen[key] * rate(*key) for key in damage}
