"""How much each group's quantization hurts: a table of (group, format).

KL-Fisher: for a small change of the weights, the KL from the reference is half the mean square of
the directional derivative of a sampled answer's log-probability. With answers `y` drawn from the
reference itself,

    damage(group, format) = 1/2 E_y [ <d log p(y) / dW, W_quantized - W>^2 ]

per fact, summed over the answer's tokens, in nats. One backward pass gives the gradients of all
layers and serves every format.

Facts share a pass, so their gradients arrive summed. The expectation of the square of the sum is
the sum of the squares: a sampled answer's gradient has mean zero, so cross terms vanish.

Source: the Fisher approximation of KL, with sampled labels (Kunstner et al., arXiv:1905.12558).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpsearch.bank import Bank, Report, silent
from mpsearch.errors import CheckError
from mpsearch.facts import Fact, FactSet
from mpsearch.files import write_atomically
from mpsearch.forward import Pass, PreparedRow
from mpsearch.layers import LayerGroup
from mpsearch.recall import SHOTS, encode, prompt
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
    weight_error = _weight_errors(space, bank, report)
    squared = dict.fromkeys(weight_error, 0.0)
    generator = torch.Generator().manual_seed(seed)
    sequences = [encode(model.tokenizer, prompt(fact_set, f, SHOTS), f.answer) for f in facts]
    work = Pass(model, sequences, max_nodes=_ROW_NODES)
    draws = -(-_SAMPLES // len(work.rows))
    layers = [layer.name for group in space.groups for layer in group.layers]
    weights = [model.linear(name).weight for name in layers]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        for index, row in enumerate(work.rows):
            report("sensitivity", index, len(work.rows))
            samples = _sampled_sums(work, row, draws, generator)
            for first in range(0, draws, _AT_ONCE):
                drawn = [
                    torch.autograd.grad(log_prob, weights, retain_graph=True)
                    for log_prob in samples[first : first + _AT_ONCE]
                ]
                gradients = dict(zip(layers, zip(*drawn, strict=True), strict=True))
                _add_squares(squared, space, bank, gradients)
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    report("sensitivity", len(work.rows), len(work.rows))
    damage = {key: value / (2 * draws * len(facts)) for key, value in squared.items()}
    if not all(value < float("inf") for value in damage.values()):
        broken = next(key for key, value in damage.items() if not value < float("inf"))
        raise CheckError(
            f"the gradient of '{broken[0]}' is NaN or infinite; cannot score {broken[1]}"
        )
    provenance = {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "bank": bank.settings,
        "formats": list(space.space.formats),
        "facts": {"source": fact_set.source, "digest": fact_set.digest, "used": len(facts)},
        "shots": SHOTS,
        "draws": draws,
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


def _weight_errors(
    space: ResolvedSpace, bank: Bank, report: Report
) -> dict[tuple[str, str], float]:
    """Relative Frobenius error of each group in each of its formats."""
    relative: dict[tuple[str, str], float] = {}
    for index, group in enumerate(space.groups):
        report("decoding", index, len(space.groups))
        errors, norm = torch.zeros(len(space.options[group.name]), dtype=torch.float64), 0.0
        for layer in group.layers:
            errors += _errors(group, layer.name, space, bank).square().sum(1).double().cpu()
            norm += float(bank.model.originals[layer.name].float().square().sum())
        for fmt, error in zip(space.options[group.name], errors, strict=True):
            relative[group.name, fmt.name] = (float(error) / norm) ** 0.5 if norm else 0.0
    report("decoding", len(space.groups), len(space.groups))
    return relative
