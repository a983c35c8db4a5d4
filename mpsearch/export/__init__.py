"""Exports: one file a target, reached through one function."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from mpsearch.assignment import Assignment
from mpsearch.bank import Bank
from mpsearch.device import require_disk
from mpsearch.errors import InfeasibleError, RunError, UsageError
from mpsearch.evaluate import quantized_layers
from mpsearch.export.card import model_card
from mpsearch.export.compressed_tensors import write_compressed_tensors
from mpsearch.export.gptq import write_gptq
from mpsearch.files import published
from mpsearch.formats import Format, nearest
from mpsearch.models import Model
from mpsearch.quantizers import get_quantizer
from mpsearch.space import ResolvedSpace, SearchSpace
from mpsearch.targets import TARGETS

# By container.
WRITERS = {"compressed-tensors": write_compressed_tensors, "gptq": write_gptq}
EXPORT_TARGETS = tuple(name for name, target in TARGETS.items() if target.container in WRITERS)


def export(
    model: Model,
    assignment: Assignment,
    *,
    to: str = "compressed-tensors",
    out: str | Path,
    space: ResolvedSpace | None = None,
    budget_line: str = "",
) -> Path:
    """Write an assignment as a checkpoint that other libraries load.

    Codes and scales come from the bank that the assignment was scored with; nothing is quantized
    again. The folder appears when it is whole.

    Args:
        model: the one that was searched, holding its reference weights.
        assignment: from a run's point; one made by hand gets the target's default quantizer.
        to: the target.
        out: must not exist.
        space: the groups that the assignment names; by default those that `to` ties.
        budget_line: for the model card: what the budget follows from (`Run.budget_line`).
    Returns:
        The folder.
    Raises:
        UsageError: an unknown target, or one that cannot hold a layer's format.
        RunError: `out` exists, or the assignment is for another model.
        ResourceError: the disk is too small.
    """
    out = Path(out)
    if to not in EXPORT_TARGETS:
        raise UsageError(f"no export target '{to}'{nearest(to, EXPORT_TARGETS)}")
    if out.exists():
        raise RunError(f"'{out}' exists; choose another -o")
    space = space or SearchSpace.default().resolve(model)
    names = {group.name for group in space.groups}
    if set(assignment) != names:
        odd = sorted(set(assignment) ^ names)[0]
        raise RunError(f"the assignment does not fit this model: group '{odd}' is in one only")
    formats = space.layer_formats(assignment)
    _check_target(model, formats, to)
    if not any(fmt.quantized for fmt in formats.values()):
        raise InfeasibleError("every layer of this point is bf16: nothing to export, use the model")
    bank = (
        Bank.of(model, json.loads(assignment.bank))
        if assignment.bank
        else Bank(model, get_quantizer(None, space.target.container))
    )
    require_disk(int(space.stored_bytes(assignment) * 1.05) + 10_000_000, out, "the export")
    bank.build(quantized_layers(space, assignment))
    with published(out) as unfinished:
        WRITERS[TARGETS[to].container](model, bank, formats, unfinished)
        about = {
            "base_model": model.name,
            "base_fingerprint": model.fingerprint,
            "awq": bool(model.preparation),
            "target": to,
            "assignment_id": assignment.id,
            "assignment": dict(assignment),
            "bank": bank.settings,
            "stored_bytes": space.stored_bytes(assignment),
            "bits_per_weight": space.bits_per_weight(assignment),
        }
        (unfinished / "mpsearch.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
        card = model_card(about, space, formats, budget_line)
        (unfinished / "README.md").write_text(card, encoding="utf-8")
    return out


def _check_target(model: Model, formats: Mapping[str, Format], to: str) -> None:
    """Raise `UsageError`, naming a layer and the targets that would do, if `to` cannot hold it."""
    embedding = model.embedding.name if model.embedding else ""
    head = model.head.name if model.head else ""
    wrong = TARGETS[to].misfits(formats, embedding, head)
    if not wrong:
        return
    layer, what = next(iter(wrong.items()))
    more = f" and {len(wrong) - 1} more layers do not fit" if len(wrong) > 1 else ""
    able = [t for t in EXPORT_TARGETS if not TARGETS[t].misfits(formats, embedding, head)]
    held = ", ".join(fmt.name for fmt in TARGETS[to].formats)
    raise UsageError(
        f"a checkpoint for {to} cannot hold this point: '{layer}' {what}{more}; it holds {held}: "
        f"search a space with 'target: {to}'"
        + (f", or export to {' or '.join(able)}" if able else "")
    )
