"""The walk: all rows of a pass through one block, then all through the next.

A loaded model runs a row through all its blocks, and so has all their weights. A walk has those of
one block, and the hidden states of every row; what fits no memory at once so passes through it. The
blocks, their masks and positions, the embedding before and the norm and head behind them are the
model's own code, called as the model calls it, so a walk says to the bit what the model says.

Whose weights a block holds meanwhile is an argument: those of the loaded model (`resident`), or of
its checkpoint (`mpsearch.checkpoint`), fetched for the next block while this one computes. Several
candidates share a walk. A block's reference weights are fetched once, and only if some candidate
holds them; a candidate's own are decoded where it differs; and candidates are one until they
differ.

Held at a time: embedding, norm and head; two blocks, and the parts of a stack of experts while it
is put together; in one block, one candidate's decoded weights and those of them that a later one
holds too; the packed codes of all candidates in two blocks; and the hidden states of all rows for
each candidate that differs, which lie on disk above a limit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mpsearch.blocks import (
    Call,
    block_parameters,
    called,
    find_blocks,
    returning,
    within_blocks,
)
from mpsearch.codecs import Stored, decode
from mpsearch.device import available_memory_bytes
from mpsearch.errors import ModelError
from mpsearch.formats import Format
from mpsearch.forward import Pass, PreparedRow
from mpsearch.layers import Layer
from mpsearch.models import Model
from mpsearch.places import Place
from mpsearch.states import StateRoom, States

_MOST_MEMORY = 1 / 8  # of what is available, for hidden states

Supply = Callable[[Sequence[str]], Mapping[str, Tensor]]
"""Gives parameters of the reference by their names in the model, ready to compute with."""

Packed = Callable[[str, Format], Stored]
"""Gives the stored tensors of a layer in a format, as `Bank.stored`."""

Coded = tuple[Packed, Format]
"""A weight as codes: who has them, and in which format."""

Held = Mapping[str, Coded]
"""What a candidate's layers hold, but for those that hold reference weights."""

Own = tuple[tuple[str, Coded], ...]
"""The same of some layers, in order of their names."""

Owns = Mapping[int | None, Own]
"""The same of each block, and under None of what is in none of them."""

Codes = Mapping[tuple[str, Coded], Stored]
"""Packed layers of candidates."""


def resident(model: Model) -> Supply:
    """The parameters of a loaded model, which must hold its reference weights."""
    parameters = dict(model.module.named_parameters(remove_duplicate=False))
    return lambda names: {name: parameters[name].data for name in names}


@dataclass(frozen=True, eq=False)
class Branch:
    """Candidates that have been one so far.

    Attributes:
        members: their indices.
        calls: by row, how each block is called on it.
        states: what the next block is called with on each row.
        states_bytes: of all of these.
    """

    members: list[int]
    calls: list[list[Call]]
    states: States
    states_bytes: int


@dataclass(frozen=True, eq=False)
class _Fetched:
    """A block's weights: the reference's parameters, and packed layers of candidates."""

    reference: Mapping[str, Tensor]
    packed: Codes


class Walk:
    """Candidates asked all rows of a pass, block by block.

    Args:
        work: whose rows are run.
        supply: of reference weights; by default the model's checkpoint, or what it has loaded.
        states_bytes: hidden states in memory at most; others lie on disk. By default an eighth of
            the memory that is available.
    Attributes:
        blocks: of the model, in order.
        layers: names of each block's layers.
    Raises:
        ModelError: the model's blocks hand on more than hidden states.
    """

    def __init__(self, work: Pass, supply: Supply | None = None, states_bytes: int | None = None):
        model = work.model
        read = resident(model) if model.checkpoint is None else model.checkpoint.read
        self._work, self._supply = work, supply or read
        self._states_bytes = states_bytes
        self.blocks = find_blocks(model.module, model.places)
        self._parameters = dict(model.module.named_parameters(remove_duplicate=False))
        self._names = block_parameters(model.module, self.blocks)
        within = within_blocks(model.module, self.blocks, model.places)
        self._depth = {layer: depth for layer, (depth, _) in within.items()}
        self._within = {layer: name for layer, (_, name) in within.items()}
        self.layers: list[list[str]] = [[] for _ in self.blocks]
        for layer, depth in self._depth.items():
            self.layers[depth].append(layer)
        self._as_tuple = False
        if not self.blocks or not any(map(self._hands_on_states, (False, True))):
            raise ModelError(
                f"model '{model.name}' ({type(model.module).__name__}) hands on more between its "
                "blocks than hidden states, so it cannot be run one block at a time; give it the "
                "memory to be loaded whole"
            )

    @property
    def as_tuple(self) -> bool:
        """Whether the model's blocks return their states in a tuple."""
        return self._as_tuple

    def logits(self, held: Held) -> Iterator[Tensor]:
        """What `Pass.logits` gives for each row, in order, of one candidate; as `run`."""
        (logits,) = self.run([held])
        return logits

    def run(self, candidates: Sequence[Held]) -> Iterator[Iterator[Tensor]]:
        """For each candidate in order what `Pass.logits` gives for each row, in order.

        The first is there when all have been through all blocks. Take a candidate's rows before the
        next candidate.

        Args:
            candidates: those that hold the same weight in a layer hold equal `Coded` there.
        Raises:
            ResourceError: hidden states fill the disk.
        """
        owns = [self.own(candidate) for candidate in candidates]
        branches: list[Branch] = []
        for branches in self._by_depth(owns):  # noqa: B007
            pass
        branch_of = {member: branch for branch in branches for member in branch.members}
        for index, own in enumerate(owns):
            yield self._left(branch_of[index], own)

    def readings(self) -> Iterator[Iterator[Tensor]]:
        """For each block what `Pass.logits` would give for each row if it were the last, of the
        reference. Take a block's rows before the next block.

        Raises:
            ResourceError: hidden states fill the disk.
        """
        for (branch,) in self._by_depth([{}]):
            yield self._left(branch, {})

    def _by_depth(self, owns: Sequence[Owns]) -> Iterator[list[Branch]]:
        """All candidates after each block."""
        room = self.room()
        branches = self.entered(owns, room)
        for depth, packed in self.fetched(range(len(self.blocks)), owns):
            branches = self._through(depth, packed, branches, owns, room)
            del packed
            yield branches

    def own(self, candidate: Held) -> dict[int | None, Own]:
        """What a candidate holds in each block where it holds something of its own."""
        own: dict[int | None, list[tuple[str, Coded]]] = {}
        for layer in sorted(candidate):
            own.setdefault(self._depth.get(layer), []).append((layer, candidate[layer]))
        return {depth: tuple(items) for depth, items in own.items()}

    def blocks_to_run(self, layers: Iterable[Layer]) -> int:
        """How many blocks give something else if the weights of these layers are others."""
        head = self._work.model.head
        firsts = (len(self.blocks) if x == head else self._depth.get(x.name, 0) for x in layers)
        return len(self.blocks) - min(firsts)

    def room(self) -> StateRoom:
        """For the hidden states of one run."""
        most_bytes = self._states_bytes
        if most_bytes is None:
            most_bytes = int(available_memory_bytes(self._work.model.device) * _MOST_MEMORY)
        return StateRoom(most_bytes)

    def fetched(self, depths: Sequence[int], owns: Sequence[Owns]) -> Iterator[tuple[int, Codes]]:
        """One block after another, each fetched while the one before it computes.

        Yields:
            Which block it is, whose reference weights are in place until the next is asked for, and
            its layers that some candidate holds.
        """
        with ThreadPoolExecutor(1, "fetch") as ahead:
            fetching = ahead.submit(self._fetch, depths[0], owns)
            for number, depth in enumerate(depths, start=1):
                fetched = fetching.result()
                if number < len(depths):
                    fetching = ahead.submit(self._fetch, depths[number], owns)
                with self._holding(fetched.reference):
                    yield depth, fetched.packed
                del fetched

    def _fetch(self, depth: int, owns: Sequence[Owns]) -> _Fetched:
        """Read what some candidate holds in a block; another thread runs this."""
        here = [dict(own.get(depth, ())) for own in owns]
        layers = self.layers[depth]
        # A parameter is read if some candidate holds the reference in it, of an expert at least.
        shared = {self._within[x] for x in layers if not all(x in own for own in here)}
        replaced = {self._within[x] for x in layers} - shared
        names = [name for name in self._names[depth] if name not in replaced]
        wanted = dict.fromkeys(item for own in here for item in own.items())
        packed = {(layer, (get, fmt)): get(layer, fmt) for layer, (get, fmt) in wanted}
        return _Fetched(self._supply(names), packed)

    @torch.no_grad()
    def entered(self, owns: Sequence[Owns], room: StateRoom) -> list[Branch]:
        """Everything before the first block."""
        groups: dict[Own, list[int]] = {}
        for index, own in enumerate(owns):
            groups.setdefault(self._before(own), []).append(index)
        branches = []
        for before, members in groups.items():
            with self.outside(before):
                first, _ = self.entering(self._work.rows[0])
                size_bytes = first.nbytes // first.shape[1] * self._work.tokens
                calls, states = [], room.states(size_bytes)
                for index, row in enumerate(self._work.rows):
                    states[index], of_row = self.entering(row)
                    calls.append(of_row)
            branches.append(Branch(members, calls, states, size_bytes))
        return branches

    def _before(self, own: Owns) -> Own:
        """What of a candidate's own decides what enters the first block."""
        head = self._work.model.head
        return tuple(item for item in own.get(None, ()) if not head or item[0] != head.name)

    @torch.no_grad()
    def _through(
        self,
        depth: int,
        packed: Codes,
        branches: Iterable[Branch],
        owns: Sequence[Owns],
        room: StateRoom,
    ) -> list[Branch]:
        """All rows of all candidates through one block; candidates that differ in it part."""
        places = self._places(depth)
        parting = []
        for branch in branches:
            parts: dict[Own, list[int]] = {}
            for member in branch.members:
                parts.setdefault(owns[member].get(depth, ()), []).append(member)
            parting.append((branch, parts))
        uses = Counter(item for _, parts in parting for own in parts for item in own)
        decoded: dict[tuple[str, Coded], Tensor] = {}
        through = []
        for branch, parts in parting:
            for number, (own, members) in enumerate(parts.items(), start=1):
                for item in own:
                    if item not in decoded:
                        decoded[item] = self._decode(item, packed[item])
                # Those that part last go on in the room of them all.
                last = number == len(parts)
                states = branch.states if last else room.states(branch.states_bytes)
                with _put(places, {item[0]: decoded[item] for item in own}):
                    self.forward(depth, branch, states)
                through.append(replace(branch, members=members, states=states))
                uses.subtract(own)
                decoded = {item: weight for item, weight in decoded.items() if uses[item]}
        return through

    @torch.no_grad()
    def forward(self, depth: int, branch: Branch, into: States) -> None:
        """All rows through one block and the weights that are in place.

        Args:
            into: where what leaves it goes, which may be where what enters it is.
        """
        for row, calls in enumerate(branch.calls):
            into[row] = calls[depth].of(self.blocks[depth], branch.states[row])

    @torch.no_grad()
    def _left(self, branch: Branch, own: Owns) -> Iterator[Tensor]:
        """Everything behind the last block, row by row."""
        weights = self._decoded(own.get(None, ()))
        for index, row in enumerate(self._work.rows):
            with _put(self._work.model.places, weights):
                logits = self.behind(row, branch.states[index])
            yield logits

    # ------------------------------------------------------------ the model around its blocks

    def entering(self, row: PreparedRow) -> tuple[Tensor, list[Call]]:
        """What the model calls its first block with: hidden states, and how it calls each."""
        noted = self._calls(row, self._as_tuple)
        return noted[0][0], [call for _, call in noted]

    def _calls(self, row: PreparedRow, as_tuple: bool) -> list[tuple[Tensor, Call]]:
        """How the model calls its blocks on a row, were they to compute nothing."""
        with called(self.blocks, as_tuple) as calls:
            self._work.model.module.get_decoder()(**row.inputs, use_cache=False)
        return calls

    def behind(self, row: PreparedRow, state: Tensor, before: Tensor | None = None) -> Tensor:
        """The row's logits, given what the last block returns, and those before it if that is
        something else."""
        blocks, (last, other) = self.blocks, (
            (output,) if self._as_tuple else output
            for output in (state, state if before is None else before)
        )  # fmt: skip
        with returning(blocks[:-1], other), returning(blocks[-1:], last):
            return self._work.logits(row)

    @torch.no_grad()
    def _hands_on_states(self, as_tuple: bool) -> bool:
        """Whether hidden states, returned in a tuple or alone, are all that blocks hand on.

        Tried on one row, whose blocks compute nothing: what one returns is what the next is called
        with, there is nothing else through which it could be reached, and of all that they return
        only the last decides the logits.
        """
        row = min(self._work.rows, key=lambda row: row.inputs["input_ids"].shape[1])
        self._as_tuple = as_tuple
        try:
            calls = self._calls(row, as_tuple)
            if len(calls) != len(self.blocks) or any(s is not calls[0][0] for s, _ in calls):
                return False
            given = (part for _, call in calls for part in (*call.others, *call.named.values()))
            if not all(map(_is_fixed, given)):
                return False
            state = calls[0][0]
            return torch.equal(self.behind(row, state), self.behind(row, state, state + 1))
        except (RuntimeError, LookupError, TypeError, ValueError, AttributeError):
            return False

    # ------------------------------------------------------------------------------------ weights

    def _decode(self, item: tuple[str, Coded], stored: Stored) -> Tensor:
        model, (layer, (_, fmt)) = self._work.model, item
        device = model.device_of(layer)
        there = {name: tensor.to(device) for name, tensor in stored.items()}
        return decode(there, fmt).to(model.dtype)

    @contextmanager
    def inside(self, depth: int, own: Owns, packed: Codes) -> Iterator[None]:
        """A block holds what a candidate does meanwhile.

        Args:
            packed: as `fetched` yields them with the block.
        """
        items = own.get(depth, ())
        weights = {item[0]: self._decode(item, packed[item]) for item in items}
        with _put(self._places(depth), weights):
            yield

    @contextmanager
    def outside(self, own: Own) -> Iterator[None]:
        """Layers that are in no block hold these meanwhile."""
        with _put(self._work.model.places, self._decoded(own)):
            yield

    def _decoded(self, own: Own) -> dict[str, Tensor]:
        return {item[0]: self._decode(item, item[1][0](item[0], item[1][1])) for item in own}

    def _places(self, depth: int) -> dict[str, Place]:
        """Of a block's layers while its reference weights are in place."""
        of = self._work.model.places
        return {
            layer: replace(of[layer], loaded=of[layer].parameter.data)
            for layer in self.layers[depth]
        }

    @contextmanager
    def _holding(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """The model's parameters point at these meanwhile."""
        before = {name: self._parameters[name].data for name in tensors}
        try:
            for name, tensor in tensors.items():
                self._parameters[name].data = tensor
            yield
        finally:
            for name, tensor in before.items():
                self._parameters[name].data = tensor


@contextmanager
def _put(places: Mapping[str, Place], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Layers compute with these `(rows, columns)` weights meanwhile."""
    try:
        for layer, weight in weights.items():
            places[layer].put(weight)
        yield
    finally:
        for layer in weights:
            places[layer].restore()


def _is_fixed(value: Any) -> bool:
    """Whether nothing can be left in it for another block to find."""
    if isinstance(value, tuple | list):
        return all(map(_is_fixed, value))
    if isinstance(value, Mapping):  # an empty one may be there to be filled
        return bool(value) and all(map(_is_fixed, value.values()))
    return value is None or isinstance(value, Tensor | bool | int | float | str)
