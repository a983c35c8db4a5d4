"""The model card of an export: what it is, how large, what for, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mpsearch.formats import Format
from mpsearch.sizes import format_size
from mpsearch.space import ResolvedSpace


def model_card(
    about: Mapping[str, Any], space: ResolvedSpace, formats: Mapping[str, Format], budget_line: str
) -> str:
    """Markdown.

    Args:
        about: what `mpsearch.json` holds.
        formats: of every searched layer.
        budget_line: what the run's budget follows from; empty where it was stated in bytes.
    """
    counts: dict[str, int] = {}
    for fmt in formats.values():
        counts[fmt.name] = counts.get(fmt.name, 0) + 1
    named = ", ".join(f"{count} layers {name}" for name, count in counts.items())
    lines = [
        f"# {about['base_model']}, quantized",
        "",
        f"Made by mpsearch from {about['base_model']}, weights {about['base_fingerprint'][:16]}: "
        f"{about['stored_bytes']:,} bytes of tensors ({format_size(about['stored_bytes'])}), "
        f"{about['bits_per_weight']:.2f} bits a searched weight, {about['target']}.",
        "",
        f"- Formats: {named}; everything else bf16.",
        *([f"- Made for: {budget_line}."] if budget_line else []),
        f"- Codes chosen by {about['bank']['quantizer']}; assignment {about['assignment_id']}.",
        "",
        *_table(space, about["assignment"]),
        "",
        "`mpsearch.json` holds the whole assignment, `mpsearch compare` what was forgotten.",
        "",
    ]
    return "\n".join(lines)


def _table(space: ResolvedSpace, assignment: Mapping[str, str]) -> list[str]:
    """A row a block, a column a kind of group."""
    kinds = list(dict.fromkeys(group.kind for group in space.groups))
    blocks: dict[str, dict[str, str]] = {}
    for group in space.groups:
        depth = "" if group.depth is None else str(group.depth)
        blocks.setdefault(depth, {})[group.kind] = assignment[group.name]
    rows = [
        "| " + " | ".join([block, *(of.get(kind, "") for kind in kinds)]) + " |"
        for block, of in blocks.items()
    ]
    return ["| " + " | ".join(["block", *kinds]) + " |", "|---" * (1 + len(kinds)) + "|", *rows]
