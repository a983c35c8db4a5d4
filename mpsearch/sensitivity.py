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

Weight and output errors, the geometry around each group, and for checking the measured KL of each
group alone, stand beside it in the table.

Source: the Fisher approximation of KL, with sampled labels (Kunstner et al., arXiv:1905.12558).
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import closing
from statistics import median

import torch
from torch import Tensor

from mpsearch.backward import SLICE, Sample, gradients, products
from mpsearch.bank import Bank, Report, silent
from mpsearch.device import available_memory_bytes, return_freed_memory
from mpsearch.errors import CheckError
from mpsearch.evaluate import Bench
from mpsearch.facts import Fact, FactSet
from mpsearch.forward import Pass, PreparedRow
from mpsearch.geometry import Readings, geometry, gram_bytes, read_by_block, read_inputs
from mpsearch.layers import LayerGroup
from mpsearch.measures import Sensitivity
from mpsearch.models import Model
from mpsearch.perturb import perturb_one
from mpsearch.quantizers import InputStatistics
from mpsearch.recall import SHOTS, ask
from mpsearch.sizes import format_size
from mpsearch.space import ResolvedSpace

log = logging.getLogger(__name__)

_ROW_NODES = 128  # smaller rows than for scoring: each gives one independent sample a draw
_SAMPLES = 64  # independent ones, unless asked for others
_MOST_MEMORY = 1 / 8  # of what is available, for gradients that are held together
_BACKWARD = 3  # forward passes that a draw takes about, with the products of all formats


def measure_sensitivity(
    space: ResolvedSpace,
    bank: Bank,
    fact_set: FactSet,
    facts: tuple[Fact, ...],
    *,
    seed: int = 0,
    samples: int = _SAMPLES,
    around: bool = True,
    check: bool = False,
    report: Report = silent,
) -> Sensitivity:
    """The whole table: KL-Fisher, errors of weights and outputs, the geometry of each group.

    Output error and geometry need a Gram matrix for every layer's inputs; where memory does not
    hold them, they are left out, which is logged.

    Args:
        space: its groups and formats.
        bank: built for them; its model must hold the reference weights.
        facts: usually those of the search partition that the reference knows.
        seed: of sampled answers.
        samples: independent ones at least, over all rows and draws.
        around: whether to measure output error and geometry, which no allocation needs.
        check: whether to measure the KL of each group alone in each format, too.
    Raises:
        CheckError: a gradient, an input or a measure is NaN or infinite.
    """
    model = bank.model
    sequences = [ask(model, fact_set, fact, fact.answer, SHOTS) for fact in facts]
    work = Pass(model, sequences, max_nodes=_ROW_NODES)
    draws = _draws(len(work.rows), samples)
    layer_errors, output_error, of_groups = _errors_and_geometry(space, bank, work, around, report)
    weight_error = {key: sum(of_layers.values()) ** 0.5 for key, of_layers in layer_errors.items()}
    fisher, reached = _fisher(space, bank, work, seed, draws, report)
    return_freed_memory(model.device)  # that gradients took
    damage = _with_unreached(fisher, layer_errors, reached, space)
    perturbed: dict[tuple[str, str], float] = {}
    if check:
        with Bench(space, bank) as bench:
            perturbed = perturb_one(bench, Pass(model, sequences), report)
    provenance = {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "bank": bank.settings,
        "formats": list(space.space.formats),
        "facts": {"source": fact_set.source, "digest": fact_set.digest, "used": len(facts)},
        "shots": SHOTS,
        "draws": draws,
        "unreached": [
            layer.name
            for group in space.groups
            for layer in group.layers
            if layer.name not in reached
        ],
        "seed": seed,
        "dtype": str(model.dtype),
    }
    return Sensitivity(damage, weight_error, provenance, output_error, perturbed, **of_groups)


def _errors_and_geometry(
    space: ResolvedSpace, bank: Bank, work: Pass, around: bool, report: Report
) -> tuple[
    dict[tuple[str, str], dict[str, float]],
    dict[tuple[str, str], float],
    dict[str, dict[str, float]],
]:
    """Squared errors of each (group, format)'s layers, its output error, and the geometry.

    Of a streamed model block by block. The Gram matrices are gone when this returns, before
    gradients need the memory.
    """
    model = bank.model
    layer_errors: dict[tuple[str, str], dict[str, float]] = {}
    output_error: dict[tuple[str, str], float] = {}
    of_groups: dict[str, dict[str, float]] = {}
    around = around and _grams_fit(space, model)
    if model.streamed:
        parts = read_by_block(work, report, around)
        report = silent  # they say how far it is
    else:
        parts = _whole(work, report, around)
    with closing(parts) as readings_of:
        for names, readings in readings_of:
            groups = [group for group in space.groups if group.layers[0].name in names]
            inputs = readings.inputs if around else None
            errors, outputs = _layer_errors(space, groups, bank, inputs, report)
            layer_errors.update(errors)
            output_error.update(outputs)
            if around:
                for measure, values in geometry(groups, readings, report).items():
                    of_groups.setdefault(measure, {}).update(values)
            del readings, inputs  # before those of the next block
            if model.streamed:
                bank.forget()  # no other block needs these weights
    return layer_errors, output_error, of_groups


def _whole(
    work: Pass, report: Report, around: bool
) -> Generator[tuple[Set[str], Readings], None, None]:
    """What `read_by_block` gives, of a loaded model at once."""
    names = {layer.name for layer in work.model.every_layer}
    yield names, read_inputs(work, report) if around else Readings({}, {})


def _grams_fit(space: ResolvedSpace, model: Model) -> bool:
    """Whether half of the memory holds the Gram matrices that are there at once."""
    at_once: dict[int | None, list[LayerGroup]] = {}
    for group in space.groups:
        at_once.setdefault(group.depth if model.streamed else None, []).append(group)
    needed = max(map(gram_bytes, at_once.values()))
    if needed <= (available := available_memory_bytes(model.device)) // 2:
        return True
    log.warning(
        "output error and geometry are left out: the inputs' Gram matrices need %s, and %s of "
        "memory is available",
        format_size(needed),
        format_size(available),
    )
    return False


def _draws(rows: int, samples: int = _SAMPLES) -> int:
    return -(-samples // rows)


def forward_tokens(tokens: float) -> float:
    """What KL-Fisher costs about, in tokens of a forward pass, on facts of so many tokens."""
    return tokens * (1 + _BACKWARD * _draws(max(1, int(tokens / (0.8 * _ROW_NODES)))))


def _fisher(
    space: ResolvedSpace, bank: Bank, work: Pass, seed: int, draws: int, report: Report
) -> tuple[dict[tuple[str, str], float], set[str]]:
    """Damage of each (group, format) by KL-Fisher, and the names of the layers with gradients."""
    found = _Derivatives(space, bank, len(work.rows) * draws)
    generator = torch.Generator().manual_seed(seed)
    derived = gradients(
        work,
        {},
        [layer.name for group in space.groups for layer in group.layers],
        lambda row, logits: _sampled_sums(logits, row, draws, generator),
        most=draws,
        report=lambda done, total: report("sensitivity", done, total),
    )
    with closing(derived) as parts:
        for part in parts:
            for batch in _batches(part, bank.model.device):
                found.add([(row * draws + draw, of_layers) for row, draw, of_layers in batch])
            if bank.model.streamed:
                bank.forget()  # no other part needs these weights
    damage = {key: value / (2 * draws * work.count) for key, value in found.squared.items()}
    if not all(value < float("inf") for value in damage.values()):
        broken = next(key for key, value in damage.items() if not value < float("inf"))
        raise CheckError(
            f"the gradient of '{broken[0]}' is NaN or infinite; cannot score {broken[1]}"
        )
    return damage, found.reached


def _sampled_sums(
    logits: Tensor, row: PreparedRow, draws: int, generator: torch.Generator
) -> list[Tensor]:
    """For each draw, the log-probability of answers sampled for all of the row's facts, summed.

    Each answer token is drawn from the reference given the true answer's tokens before it, and
    counts once for each fact that reads it.
    """
    log_probs = logits.log_softmax(-1)
    chances = log_probs.detach().exp().cpu()[row.places.cpu()]
    sums = []
    for _ in range(draws):
        tokens = torch.multinomial(chances, 1, generator=generator)[:, 0]
        sums.append(log_probs[row.places, tokens.to(log_probs.device)].sum())
    return sums


def _batches(samples: Iterable[Sample], device: torch.device) -> Iterator[list[Sample]]:
    """As many as their share of memory holds, for all of which a weight is decoded once."""
    batch: list[Sample] = []
    for sample in samples:
        batch.append(sample)
        size_bytes = sum(gradient.nbytes for gradient in sample[2].values())
        if len(batch) == 1:
            most_bytes = available_memory_bytes(device) * _MOST_MEMORY
        if (len(batch) + 1) * size_bytes > most_bytes:
            yield batch
            batch = []
    if batch:
        yield batch


class _Derivatives:
    """Log-probabilities of samples, derived along each (group, format)'s change of the weights.

    Args:
        space, bank: as of `measure_sensitivity`.
        samples: how many there will be.
    Attributes:
        reached: names of the layers whose gradients were not all zero so far.
    """

    def __init__(self, space: ResolvedSpace, bank: Bank, samples: int):
        self._space, self._bank = space, bank
        self._along = {
            (group, fmt.name): torch.zeros(samples)
            for group, formats in space.options.items()
            for fmt in formats
        }
        self.reached: set[str] = set()

    @property
    def squared(self) -> dict[tuple[str, str], float]:
        """Of each (group, format) the squares, summed over samples."""
        return {key: float(along.double().square().sum()) for key, along in self._along.items()}

    def add(self, samples: Sequence[tuple[int, Mapping[str, Tensor]]]) -> None:
        """Add what some layers contribute to some samples.

        Along the difference of two weights a derivative is the difference of that along either,
        which needs no copy of any weight.

        Args:
            samples: the index of each, and its gradients of the same layers, which hold their
                reference weights.
        """
        indices = [index for index, _ in samples]
        for group in self._space.groups:
            for name in (layer.name for layer in group.layers if layer.name in samples[0][1]):
                original = self._bank.model.places[name].weight
                drawn = [of_layers[name] for _, of_layers in samples]
                if original.numel() <= SLICE:  # cast once for all formats
                    drawn = [gradient.float() for gradient in drawn]
                if name not in self.reached and any(map(torch.any, drawn)):
                    self.reached.add(name)
                at_original = products(drawn, original)
                for fmt in self._space.options[group.name]:
                    along = torch.zeros_like(at_original)
                    if fmt.quantized:
                        along = products(drawn, self._bank.weight(name, fmt)) - at_original
                    self._along[group.name, fmt.name][indices] += along.cpu()


def _layer_errors(
    space: ResolvedSpace,
    groups: Sequence[LayerGroup],
    bank: Bank,
    inputs: Mapping[str, InputStatistics] | None,
    report: Report,
) -> tuple[dict[tuple[str, str], dict[str, float]], dict[tuple[str, str], float]]:
    """Errors of the weights and, if the inputs are given, of what comes out.

    Args:
        groups: those asked for, whose layers hold their reference weights.
    Returns:
        For each (group, format) and each layer its squared error over the group's squared norm,
        and for each (group, format) the relative error of its outputs, with `E` the weights' error
        and `G` the Gram matrix of the inputs

            sqrt(sum over layers of tr(E G E^T) / sum over layers of tr(W G W^T))

        An embedding, which looks rows up, takes each row as often as any other.
    """
    shares: dict[tuple[str, str], dict[str, float]] = {}
    output_error: dict[tuple[str, str], float] = {}
    for index, group in enumerate(groups):
        report("decoding", index, len(groups))
        formats = [fmt.name for fmt in space.options[group.name]]
        squares: dict[str, list[float]] = {}  # of each layer's errors, and of its own weights
        outputs = [0.0] * (len(formats) + 1)
        for layer in group.layers:
            original = bank.model.places[layer.name].weight.float()
            weights = (bank.weight(layer.name, fmt).float() if fmt.quantized else original
                       for fmt in space.options[group.name])  # fmt: skip
            errors = (weight - original for weight in weights)
            gram = inputs[layer.name].gram if inputs and layer.name in inputs else None
            squares[layer.name] = []
            for number, tensor in enumerate((*errors, original)):
                square = float(tensor.square().sum())
                squares[layer.name].append(square)
                outputs[number] += square if gram is None else float((tensor @ gram * tensor).sum())
        norm = sum(of_layer[-1] for of_layer in squares.values())
        for number, fmt in enumerate(formats):
            shares[group.name, fmt] = {
                name: of_layer[number] / norm if norm else 0.0 for name, of_layer in squares.items()
            }
            if inputs is not None:
                ratio = outputs[number] / outputs[-1] if outputs[-1] else 0.0
                output_error[group.name, fmt] = max(ratio, 0.0) ** 0.5
    report("decoding", len(groups), len(groups))
    return shares, output_error


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
