"""A resolved space as JSON: a run is read without its model and without the space's file."""

from __future__ import annotations

from typing import Any

from mpsearch.formats import FORMATS
from mpsearch.layers import Layer, LayerGroup
from mpsearch.space import ResolvedSpace, Rule, SearchSpace
from mpsearch.targets import TARGETS


def to_json(space: ResolvedSpace) -> dict[str, Any]:
    """What of a space a run keeps: its groups with their options, and the bytes beside them."""
    return {
        "target": space.target.name,
        "formats": list(space.space.formats),
        "source": space.space.source,
        "kept_bytes": space.kept_bytes,
        "groups": [
            {
                "layers": [
                    [layer.name, layer.rows, layer.columns, *filter(None, [layer.tied])]
                    for layer in group.layers
                ],
                "options": [fmt.name for fmt in space.options[group.name]],
            }
            for group in space.groups
        ],
    }


def from_json(content: dict[str, Any]) -> ResolvedSpace:
    """The space again. Raises `LookupError`, `TypeError` or `ValueError` if it is none."""
    rules: tuple[Rule, ...] = ()  # already applied to the options
    file = SearchSpace(
        TARGETS[content["target"]], tuple(content["formats"]), rules, source=content["source"]
    )
    groups = tuple(
        LayerGroup(tuple(Layer(*layer) for layer in group["layers"])) for group in content["groups"]
    )
    options = {
        group.name: tuple(FORMATS[name] for name in described["options"])
        for group, described in zip(groups, content["groups"], strict=True)
    }
    return ResolvedSpace(file, groups, options, content["kept_bytes"])
