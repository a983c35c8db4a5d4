"""A search space: which formats each group may get, read from a strict YAML file.

    version: 1
    target: compressed-tensors           # the checkpoint's container
    formats: [int2-g64, int4-g64, bf16]  # allowed everywhere
    rules:                               # later rules win
      - match: "*.down_proj"             # shell pattern on whole layer names
        formats: [int4-g64]
    embedding: [int8-channel-unpacked]   # of the input embedding, and of a head tied to it
    head: [int4-g64, bf16]               # of an output head with a weight of its own
    tie: fused                           # or lists of siblings to tie beyond what runtimes fuse

The embedding and the head are not what `formats` and `rules` speak of: no pattern, however wide,
reaches them, and without their keys they stay as they are.

Every fault is one line that names the file, the line and the nearest valid word.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol

import yaml

from mpsearch.assignment import Assignment
from mpsearch.errors import SpaceError
from mpsearch.formats import BF16, FORMATS, ITEM_BYTES, Format, nearest
from mpsearch.layers import Layer, LayerGroup, group_layers
from mpsearch.targets import TARGETS, Target


class HasLayers(Protocol):
    """What a space is resolved against: a loaded model, or anything that lists its layers."""

    @property
    def layers(self) -> Sequence[Layer]: ...

    @property
    def embedding(self) -> Layer | None: ...

    @property
    def head(self) -> Layer | None: ...

    @property
    def kept_bytes(self) -> int: ...

    @property
    def vector_weights(self) -> int: ...


@dataclass(frozen=True)
class Rule:
    """Formats of the layers that a pattern matches, or of the embedding or the head by that key."""

    match: str
    formats: tuple[str, ...]
    line: int


@dataclass(frozen=True)
class SearchSpace:
    """A parsed space file, not yet bound to a model.

    Attributes:
        ties: sibling names tied by the user, each with its line; beyond `target.fused`.
        embedding: for the input embedding, which a tied head follows; None where it is kept.
        head: for an output head with a weight of its own; None where it is kept.
    """

    target: Target
    formats: tuple[str, ...]
    rules: tuple[Rule, ...] = ()
    ties: tuple[tuple[tuple[str, ...], int], ...] = ()
    source: str = "the default space"
    embedding: Rule | None = None
    head: Rule | None = None

    @classmethod
    def default(cls) -> SearchSpace:
        """Packed integers of four widths; the same as compressed_tensors.yaml in search_spaces/."""
        return cls(TARGETS["compressed-tensors"], ("int2-g64", "int3-g64", "int4-g64", "int8-g64"))

    @classmethod
    def load(cls, path: str | Path) -> SearchSpace:
        """Parse a space file.

        Raises:
            SpaceError: the file cannot be read, or any fault in it, with its line.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise SpaceError(f"space file '{path}': {reason}") from None
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: str, source: str) -> SearchSpace:
        return _parse(text, source)

    def resolve(self, model: HasLayers) -> ResolvedSpace:
        """Bind the space to a model's layers.

        Raises:
            SpaceError: a pattern, tie or key that matches nothing, or a group without a format.
        """
        names = [layer.name for layer in model.layers]
        last_names = sorted({name.rpartition(".")[2] for name in names})
        patterns = [f"*.{last}" for last in last_names]
        for rule in self.rules:
            if not any(fnmatchcase(name, rule.match) for name in names):
                for key, layer in (("embedding", model.embedding), ("head", model.head)):
                    if layer and any(fnmatchcase(n, rule.match) for n in (layer.name, layer.tied)):
                        raise self._fault(
                            rule.line,
                            f"pattern '{rule.match}' matches no layer: '{layer.name}' gets formats "
                            f"by the key '{key}' alone",
                        )
                raise self._fault(
                    rule.line,
                    f"pattern '{rule.match}' matches no layer"
                    f"{nearest(rule.match, patterns, also=names)}",
                )
        for tie, line in self.ties:
            for member in tie:
                if member not in last_names:
                    raise self._fault(
                        line, f"tie '{member}' matches no layer{nearest(member, last_names)}"
                    )
            if len(tie) > 1 and not any(
                len({layer.name.rpartition(".")[2] for layer in group.layers}) > 1
                for group in group_layers(model.layers, [tie])
            ):
                raise self._fault(
                    line,
                    f"tie {', '.join(tie)}: no two of them stand in one module; only siblings "
                    "can be tied",
                )
        ties = _union([*self.target.fused, *(tie for tie, _ in self.ties)])
        groups = group_layers(model.layers, ties, self.target.fuses_experts)
        options = {group.name: self._options(group) for group in groups}
        kept_bytes = model.kept_bytes
        if self.target.float32_vectors:
            kept_bytes += (ITEM_BYTES["float32"] - ITEM_BYTES["bfloat16"]) * model.vector_weights
        for layer, rule in self._beside(model):
            group = LayerGroup((layer,))
            groups += (group,)
            options[group.name] = _smallest_first(rule.formats, group)
            kept_bytes -= BF16.stored_bytes(group)
        return ResolvedSpace(self, groups, options, kept_bytes)

    def _beside(self, model: HasLayers) -> list[tuple[Layer, Rule]]:
        """The embedding and the head, if the space decides their formats."""
        found = []
        if self.embedding:
            if model.embedding is None:
                raise self._fault(
                    self.embedding.line,
                    "the model has no plain input embedding; leave 'embedding' out",
                )
            found.append((model.embedding, self.embedding))
        if self.head:
            if model.head is not None:
                found.append((model.head, self.head))
            elif model.embedding is None or not model.embedding.tied:
                raise self._fault(
                    self.head.line, "the model has no plain output head; leave 'head' out"
                )
            elif not self.embedding:
                raise self._fault(
                    self.head.line,
                    "the model's output head is its embedding; "
                    + ("rename 'head' to 'embedding'" if self.target.embedding else
                       f"a {self.target.name} checkpoint keeps that in bf16, leave 'head' out"),
                )  # fmt: skip
        return found

    def _options(self, group: LayerGroup) -> tuple[Format, ...]:
        """Formats allowed for every layer of the group, smallest first."""
        allowed = set(self.formats)
        line = 1
        for layer in group.layers:
            of_layer: Iterable[str] = self.formats
            for rule in self.rules:
                if fnmatchcase(layer.name, rule.match):
                    of_layer, line = rule.formats, rule.line
            allowed &= set(of_layer)
        if not allowed:
            raise self._fault(
                line,
                f"the layers of '{group.name}' share one format, and these rules leave none in "
                "common; give them the same formats",
            )
        return _smallest_first(allowed, group)

    def _fault(self, line: int, message: str) -> SpaceError:
        return SpaceError(f"{self.source}, line {line}: {message}")


@dataclass(frozen=True)
class ResolvedSpace:
    """A space bound to a model: the decisions of the search.

    Attributes:
        groups: the decisions, in model order; the embedding and the head, if searched, are last.
        options: group name to its allowed formats, smallest first.
        kept_bytes: stored bytes of everything that is not searched.
    """

    space: SearchSpace
    groups: tuple[LayerGroup, ...]
    options: Mapping[str, tuple[Format, ...]]
    kept_bytes: int

    @property
    def target(self) -> Target:
        return self.space.target

    @property
    def weights(self) -> int:
        """Weights whose bits are searched."""
        return sum(group.weights for group in self.groups)

    @property
    def smallest(self) -> Assignment:
        return Assignment.of({name: fmts[0].name for name, fmts in self.options.items()})

    @property
    def largest(self) -> Assignment:
        return Assignment.of({name: fmts[-1].name for name, fmts in self.options.items()})

    def stored_bytes(self, assignment: Mapping[str, str]) -> int:
        """Tensor bytes of the exported checkpoint, kept weights included."""
        searched = sum(FORMATS[assignment[group.name]].stored_bytes(group) for group in self.groups)
        return self.kept_bytes + searched

    def bits_per_weight(self, assignment: Mapping[str, str]) -> float:
        """Stored bits of the searched weights, scales included, over their number."""
        return 8 * (self.stored_bytes(assignment) - self.kept_bytes) / self.weights

    def allows(self, assignment: Mapping[str, str]) -> bool:
        return set(assignment) == set(self.options) and all(
            assignment[name] in {fmt.name for fmt in fmts} for name, fmts in self.options.items()
        )

    def by_block(self, assignment: Mapping[str, str]) -> tuple[list[str], list[list[str]]]:
        """The kinds of groups, and a row a block: its number, then the format of each kind.

        What lies in no block has a last row without a number; a kind that a block lacks is empty.
        """
        kinds = list(dict.fromkeys(group.kind for group in self.groups))
        blocks: dict[str, dict[str, str]] = {}
        for group in self.groups:
            depth = "" if group.depth is None else str(group.depth)
            blocks.setdefault(depth, {})[group.kind] = assignment[group.name]
        return kinds, [[block, *(of.get(k, "") for k in kinds)] for block, of in blocks.items()]

    def layer_formats(self, assignment: Mapping[str, str]) -> dict[str, Format]:
        """Layer name to format, in model order."""
        return {
            layer.name: FORMATS[assignment[group.name]]
            for group in self.groups
            for layer in group.layers
        }


def _smallest_first(names: Iterable[str], group: LayerGroup) -> tuple[Format, ...]:
    formats = [FORMATS[name] for name in names]
    return tuple(sorted(formats, key=lambda fmt: (fmt.stored_bytes(group), fmt.name)))


def _union(ties: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """Merge ties that share a member."""
    merged: list[tuple[str, ...]] = []
    for tie in ties:
        overlapping = [other for other in merged if set(other) & set(tie)]
        merged = [other for other in merged if other not in overlapping]
        merged.append(tuple(dict.fromkeys(name for part in (*overlapping, tie) for name in part)))
    return merged


# ------------------------------------------------------------------------------ strict YAML


class _Reader:
    """Reads a YAML node tree and keeps the line of everything it says no to."""

    def __init__(self, source: str):
        self.source = source

    def fault(self, node: yaml.Node | None, message: str) -> SpaceError:
        line = node.start_mark.line + 1 if node is not None else 1
        return SpaceError(f"{self.source}, line {line}: {message}")

    def mapping(self, node: yaml.Node, allowed: Sequence[str]) -> dict[str, yaml.Node]:
        if not isinstance(node, yaml.MappingNode):
            raise self.fault(node, f"expected keys ({', '.join(allowed)})")
        found: dict[str, yaml.Node] = {}
        for key_node, value in node.value:
            key = self.text(key_node, "a key")
            if key not in allowed:
                raise self.fault(key_node, f"unknown key '{key}'{nearest(key, allowed)}")
            if key in found:
                raise self.fault(key_node, f"duplicate key '{key}'; keep one")
            found[key] = value
        return found

    def sequence(self, node: yaml.Node, what: str) -> list[yaml.Node]:
        if not isinstance(node, yaml.SequenceNode) or not node.value:
            raise self.fault(node, f"{what} must be a list with at least one entry")
        return list(node.value)

    def text(self, node: yaml.Node, what: str) -> str:
        if not isinstance(node, yaml.ScalarNode):
            raise self.fault(node, f"{what} must be a plain word")
        return str(node.value)

    def formats(self, node: yaml.Node, target: Target, key: str = "formats") -> tuple[str, ...]:
        held = {fmt.name for fmt in target.formats}
        names: list[str] = []
        for entry in self.sequence(node, f"'{key}'"):
            name = self.text(entry, "a format")
            if name not in FORMATS:
                raise self.fault(entry, f"no format '{name}'{nearest(name, FORMATS)}")
            if name not in held:
                raise self.fault(
                    entry,
                    f"format '{name}' cannot be stored in a {target.name} checkpoint; keep one "
                    "container a space",
                )
            if name in names:
                raise self.fault(entry, f"format '{name}' stands twice; keep one")
            names.append(name)
        return tuple(names)

    def beside(
        self, keys: Mapping[str, yaml.Node], key: str, target: Target, held: Sequence[Format]
    ) -> Rule | None:
        """The formats that the key `embedding` or `head` gives, of those that the target holds."""
        if key not in keys:
            return None
        if not held:
            raise self.fault(
                keys[key], f"a {target.name} checkpoint keeps the {key} in bf16; leave '{key}' out"
            )
        names = self.formats(keys[key], target, key)
        allowed = [fmt.name for fmt in held]
        for name in names:
            if name not in allowed:
                raise self.fault(
                    keys[key],
                    f"format '{name}' cannot be the {key}'s in a {target.name} checkpoint; use "
                    f"{', '.join(allowed)}",
                )
        return Rule(key, names, keys[key].start_mark.line + 1)


def _parse(text: str, source: str) -> SearchSpace:
    reader = _Reader(source)
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = mark.line + 1 if mark else 1
        raise SpaceError(f"{source}, line {line}: not YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise SpaceError(f"{source}: not YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise SpaceError(f"{source}: not a search space: nested too deeply") from None
    if root is None:
        raise SpaceError(f"{source}: the file is empty; start from search_spaces/")
    keys = reader.mapping(
        root, ("version", "target", "formats", "rules", "embedding", "head", "tie")
    )
    for required in ("version", "target", "formats"):
        if required not in keys:
            raise reader.fault(root, f"key '{required}' is missing")
    if (version := reader.text(keys["version"], "'version'")) != "1":
        raise reader.fault(keys["version"], f"version '{version}' is not known; use 1")
    target_name = reader.text(keys["target"], "'target'")
    if target_name not in TARGETS:
        raise reader.fault(
            keys["target"], f"no target '{target_name}'{nearest(target_name, TARGETS)}"
        )
    target = TARGETS[target_name]
    formats = reader.formats(keys["formats"], target)
    rules = []
    for node in reader.sequence(keys["rules"], "'rules'") if "rules" in keys else ():
        rule = reader.mapping(node, ("match", "formats"))
        if set(rule) != {"match", "formats"}:
            raise reader.fault(node, "a rule needs 'match' and 'formats'")
        rules.append(
            Rule(
                reader.text(rule["match"], "'match'"),
                reader.formats(rule["formats"], target),
                rule["match"].start_mark.line + 1,
            )
        )
        if not set(rules[-1].formats) <= set(formats):
            extra = sorted(set(rules[-1].formats) - set(formats))
            raise reader.fault(
                rule["formats"],
                f"rule allows {', '.join(extra)}, which 'formats' above does not list",
            )
    quantized = [name for name in formats if FORMATS[name].quantized]
    if len(quantized) > 1 and not target.mixes:
        raise reader.fault(
            keys["formats"],
            f"one {target.name} checkpoint holds one quantized format, and this space has "
            f"{' and '.join(quantized)}; keep one, beside bf16",
        )
    ties = []
    tie_node = keys.get("tie")
    if isinstance(tie_node, yaml.SequenceNode):
        for node in tie_node.value:
            members = tuple(
                reader.text(member, "a tied name") for member in reader.sequence(node, "a tie")
            )
            ties.append((members, node.start_mark.line + 1))
    elif tie_node is not None and reader.text(tie_node, "'tie'") != "fused":
        raise reader.fault(tie_node, "'tie' is either the word fused or a list of lists of names")
    return SearchSpace(
        target,
        formats,
        tuple(rules),
        tuple(ties),
        source,
        reader.beside(keys, "embedding", target, target.embedding_formats),
        reader.beside(keys, "head", target, target.head_formats),
    )
