"""Does it fit? The uniform formats on a device, the longest contexts, the cards, the ways out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from mpsearch.allocate import uniform
from mpsearch.budget import KV_BITS, DeviceBudget, Runtime
from mpsearch.devices import Device, catalogue
from mpsearch.errors import InfeasibleError, UsageError
from mpsearch.formats import FORMATS
from mpsearch.sizes import format_size
from mpsearch.space import ResolvedSpace

_WAYS = 3  # that are named where nothing fits


@dataclass(frozen=True)
class UniformFit:
    """All layers in one format, on a device.

    Attributes:
        weights_bytes: resident, kept weights included.
        spare_bytes: what is left then; negative where it does not fit.
        context: the longest at the same batch; 0 where none fits.
        served: whether the runtime's usual kernels take the format.
    """

    format: str
    bits_per_weight: float
    weights_bytes: int
    spare_bytes: int
    context: int
    served: bool

    @property
    def fits(self) -> bool:
        return self.spare_bytes >= 0


def resident_bytes(space: ResolvedSpace, stored_bytes: int, runtime: Runtime) -> int:
    """What weights that store so many bytes take in a runtime's memory.

    Runtimes keep codes and scales as they are stored, but for those that unpack a container:
    there every searched weight takes two bytes, in any format.
    """
    return space.kept_bytes + 2 * space.weights if unpacks(space, runtime) else stored_bytes


def unpacks(space: ResolvedSpace, runtime: Runtime) -> bool:
    """Whether the runtime keeps the space's weights in bf16, in whatever format they are stored."""
    return space.target.container in runtime.unpacks


def uniform_fits(space: ResolvedSpace, budget: DeviceBudget) -> list[UniformFit]:
    """Of every format that all groups allow, the smallest first."""
    found = []
    for name, assignment in uniform(space).items():
        weights_bytes = resident_bytes(space, space.stored_bytes(assignment), budget.runtime)
        found.append(
            UniformFit(
                name,
                space.bits_per_weight(assignment),
                weights_bytes,
                budget.left_bytes - weights_bytes,
                budget.largest_context(weights_bytes),
                budget.runtime.serves(FORMATS[name]),
            )
        )
    return found


def kept_parts(space: ResolvedSpace, budget: DeviceBudget) -> dict[str, int]:
    """Bytes of what the space keeps in bf16: the embedding, the head, and all else.

    A head that is tied to the embedding is counted with it.
    """
    architecture = budget.architecture
    parts = {
        what: 0 if layer is None or layer.name in space.options else 2 * layer.weights
        for what, layer in (("embedding", architecture.embedding), ("head", architecture.head))
    }
    return {**parts, "other": space.kept_bytes - sum(parts.values())}


def unserved(space: ResolvedSpace, budget: DeviceBudget) -> list[str]:
    """Formats of the space that the runtime's usual kernels do not take."""
    runtime, architecture = budget.runtime, budget.architecture
    strange = [name for name in space.space.formats if not runtime.serves(FORMATS[name])]
    for what, layer in (("embedding", architecture.embedding), ("head", architecture.head)):
        if layer is not None and not runtime.tables:
            options = space.options.get(layer.name, ())
            strange += [f"{fmt.name} of the {what}" for fmt in options if fmt.quantized]
    return strange


def bits_allowed(space: ResolvedSpace, budget: DeviceBudget) -> float:
    """Stored bits a searched weight, scales included, for which there is room; at least 0."""
    return max(0.0, 8 * (budget.left_bytes - space.kept_bytes) / space.weights)


def smallest_devices(budget: DeviceBudget, weights_bytes: int, most: int = 5) -> list[Device]:
    """The smallest of the catalogue that run it and hold weights and workload, in its order."""
    able = (d for d in catalogue() if budget.runtime.unified or not d.unified)
    return [d for d in able if weights_bytes <= _on(budget, d).left_bytes][:most]


def search_budget_bytes(space: ResolvedSpace, budget: DeviceBudget) -> int:
    """Stored bytes that a search may spend on a device.

    Raises:
        InfeasibleError: the smallest assignment does not fit, with the ways out.
        UsageError: the runtime unpacks all weights, so that every assignment takes the same.
    """
    if unpacks(space, budget.runtime):
        raise UsageError(
            f"{budget.runtime.name} unpacks {space.target.container}, so that all assignments take "
            "the same memory and none is worth a search; give --budget, or another --runtime"
        )
    check_fits(space, budget)
    return budget.left_bytes


def check_fits(space: ResolvedSpace, budget: DeviceBudget) -> None:
    """Raise `InfeasibleError`, with the ways out, where the smallest assignment does not fit."""
    if _smallest_bytes(space, budget) > budget.left_bytes:
        raise InfeasibleError(shortfall(space, budget))


def _smallest_bytes(space: ResolvedSpace, budget: DeviceBudget) -> int:
    return resident_bytes(space, space.stored_bytes(space.smallest), budget.runtime)


def shortfall(space: ResolvedSpace, budget: DeviceBudget) -> str:
    """One line: what is missing, which terms take how much, and the cheapest ways out."""
    smallest = _smallest_bytes(space, budget)
    missing = smallest - budget.left_bytes
    sizes = [("weights", smallest)] + [(term.name, term.size_bytes) for term in budget.terms]
    largest = sorted((part for part in sizes if part[1]), key=lambda part: -part[1])
    named = ", ".join(f"{name.replace('_', ' ')} {format_size(size)}" for name, size in largest)
    ways = list(_ways(space, budget, smallest))[:_WAYS]
    return (
        f"{budget.device} has {format_size(budget.memory_bytes)} and the smallest assignment needs "
        f"{format_size(missing)} more: {named}. Ways out: "
        + ("; ".join(ways) if ways else "none in the catalogue; use a smaller model")
    )


def _ways(space: ResolvedSpace, budget: DeviceBudget, smallest: int) -> Iterator[str]:
    """What makes it fit, from what costs least to what costs most; then what helps."""
    workload, missing = budget.workload, smallest - budget.left_bytes
    savings = list(_savings(space, budget))
    enough = {way for way, saved in savings if saved >= missing}
    yield from (f"{way} (saves {format_size(s)})" for way, s in savings if way in enough)
    if (context := budget.largest_context(smallest)) >= 1:
        yield f"--context {context}"
    if workload.batch > 1 and (batch := budget.largest_batch(smallest)) >= 1:
        yield f"--batch {batch}"
    if smaller := _smaller_format(space, budget, missing):
        name, saved = smaller
        yield f"allow {name} in the space (saves {format_size(saved)})"
    for device in smallest_devices(budget, smallest, most=1):
        yield f"the next card: {device.name}, {format_size(device.usable_bytes)}"
    for way, saved in savings:
        if way not in enough:
            yield f"{way} helps (saves {format_size(saved)})"


def _savings(space: ResolvedSpace, budget: DeviceBudget) -> Iterator[tuple[str, int]]:
    """What costs little, and the bytes that it saves."""
    asked = KV_BITS[budget.workload.kv]
    for kv in sorted(budget.runtime.kv, key=lambda name: -KV_BITS[name]):
        if KV_BITS[kv] < asked:
            other = replace(budget, workload=replace(budget.workload, kv=kv))
            yield f"--kv {kv}", other.left_bytes - budget.left_bytes
    if saved := _embedding_saves(space, budget):
        yield f"quantize the embedding to {saved[0]}", saved[1]


def _embedding_saves(space: ResolvedSpace, budget: DeviceBudget) -> tuple[str, int] | None:
    """The smallest format that the target takes for an embedding that the space keeps."""
    layer = budget.architecture.embedding
    runtime = budget.runtime
    if layer is None or layer.name in space.options or unpacks(space, runtime):
        return None
    if not runtime.tables:
        return None
    formats = space.target.embedding_formats
    quantized = [f for f in formats if f.quantized and f.fits(layer) and runtime.serves(f)]
    best = min(quantized, key=lambda fmt: fmt.layer_bytes(layer), default=None)
    return None if best is None else (best.name, 2 * layer.weights - best.layer_bytes(layer))


def _smaller_format(
    space: ResolvedSpace, budget: DeviceBudget, missing_bytes: int
) -> tuple[str, int] | None:
    """The largest uniform format of the target, not in the space, that frees enough bytes."""
    if unpacks(space, budget.runtime):
        return None
    listed = {fmt.name for formats in space.options.values() for fmt in formats}
    layers = [layer for group in space.groups for layer in group.layers]
    smallest_bytes = space.stored_bytes(space.smallest)
    sizes = {}
    for fmt in space.target.formats:
        known = fmt.name in listed or not budget.runtime.serves(fmt)
        if fmt.quantized and not known and all(map(fmt.fits, layers)):
            size = space.kept_bytes + sum(map(fmt.stored_bytes, space.groups))
            sizes[fmt.name] = smallest_bytes - size
    enough = {name: saved for name, saved in sizes.items() if saved >= missing_bytes}
    return min(enough.items(), key=lambda item: item[1], default=None)


def _on(budget: DeviceBudget, device: Device) -> DeviceBudget:
    return replace(budget, device=device.name, memory_bytes=device.usable_bytes)


def fit_json(space: ResolvedSpace, budget: DeviceBudget, pick_bytes: int | None) -> dict[str, Any]:
    """Everything that `mpsearch fit` says, bytes by name.

    Args:
        pick_bytes: stored bytes of a run's pick, if it is about a run.
    """
    architecture = budget.architecture
    has_device, flat = budget.memory_bytes > 0, unpacks(space, budget.runtime)
    content: dict[str, Any] = {
        "family": architecture.family,
        "parameters": architecture.parameters,
        "active_parameters": architecture.active_parameters,
        **budget.to_json(),
        "kept_bytes": space.kept_bytes,
        **{f"kept_{what}_bytes": size for what, size in kept_parts(space, budget).items()},
        "searched_weights": space.weights,
        "bits_per_weight": bits_allowed(space, budget) if has_device and not flat else None,
        "formats": [{**asdict(row), "fits": row.fits} for row in uniform_fits(space, budget)],
    }
    if pick_bytes is not None:
        weights_bytes = resident_bytes(space, pick_bytes, budget.runtime)
        content["pick"] = {
            "weights_bytes": weights_bytes,
            "context": budget.largest_context(weights_bytes) if has_device else None,
            "devices": [device.name for device in smallest_devices(budget, weights_bytes)],
        }
    return content
