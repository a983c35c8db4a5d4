"""Load a model whole where memory holds it and the job, else open it to be run block by block.

The choice is made from the headers of its files, by `mpsearch.footprint`, before anything is
loaded. Both ways give the same scores to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from pathlib import Path
from tempfile import gettempdir

import torch
from torch import Tensor

from mpsearch.architecture import read_config
from mpsearch.contents import Contents
from mpsearch.device import (
    available_memory_bytes,
    compute_dtype,
    limit_memory,
    memory_limit,
    pick_device,
    pick_devices,
    require_disk,
    require_memory,
    used_memory_bytes,
)
from mpsearch.errors import ResourceError
from mpsearch.footprint import (
    JOBS,
    PROCESS_BYTES,
    Footprint,
    Job,
    Way,
    footprint,
    held_bytes,
)
from mpsearch.forecast import Needs
from mpsearch.forward import Pass, TokenSequence
from mpsearch.model_files import check_folder, locate
from mpsearch.models import Model, load_whole
from mpsearch.refusals import require_masked
from mpsearch.shards import Shards
from mpsearch.sizes import format_size
from mpsearch.skeleton import load_skeleton
from mpsearch.walk import Walk


def load_model(
    name: str,
    chat_template: bool = False,
    memory_limit_bytes: int | None = None,
    job: str | Job = "search",
) -> Model:
    """`builtin:smollm2-135m`, a local folder (one safetensors file or shards) or a hub id.

    Args:
        chat_template: ask facts as a user's turn in the tokenizer's chat template.
        memory_limit_bytes: this process may have so much at most, from now on, as
            `mpsearch.device.limit_memory`; by default what it was told before, or all there is.
        job: what memory has to suffice for, by its name in `mpsearch.footprint.JOBS` or itself.
    Raises:
        ModelError: it cannot be had, is stored as pickle, is already quantized, or would have to be
            run block by block and cannot.
        CheckError: a weight is NaN or infinite.
        ResourceError: memory is too small for it block by block, or disk.
    """
    if memory_limit_bytes is not None:
        limit_memory(memory_limit_bytes)
    folder = locate(name)
    check_folder(folder, name)
    contents = Contents.of(Shards(folder, name), read_config(folder / "config.json", name))
    choice = choose(name, contents, JOBS[job] if isinstance(job, str) else job)
    if not choice.streamed:
        return load_whole(name, chat_template, choice.beside)
    model = load_skeleton(name, chat_template)
    _check_attention(model)
    return model


@dataclass(frozen=True)
class Choice:
    """How a model is to be run.

    Attributes:
        streamed: block by block, or else loaded whole.
        footprint: of the job in that way.
        why: in words and numbers.
        beside: more devices that its blocks are spread over, where the first does not hold it.
    """

    streamed: bool
    footprint: Footprint
    why: str
    beside: tuple[torch.device, ...] = ()


def choose(name: str, contents: Contents, job: Job) -> Choice:
    """Loaded whole if memory holds the job so, else block by block.

    Raises:
        ResourceError: not even so.
    """
    device = pick_device()
    whole, streamed = (
        footprint(contents, _way(device, compute_dtype(device), streams), job)
        for streams in (False, True)
    )
    room = _Room.of(device, PROCESS_BYTES if device.type == "cpu" else 0)
    if whole.least_bytes <= room.allowed_bytes:
        return Choice(False, whole, str(room))
    if beside := _beside(room.allowed_bytes, whole):
        return Choice(False, whole, f"on {1 + len(beside)} devices, {room} on the first", beside)
    if streamed.least_bytes <= room.allowed_bytes:
        takes = format_size(whole.least_bytes)
        return Choice(True, streamed, f"loaded whole it takes {takes}, and {room}")
    least = _as_limit(streamed.least_bytes + room.others_bytes)
    way_out = "close other programs or use a smaller model"
    raise ResourceError(
        f"model '{name}' needs at least {least} of memory even block by block, and {room}; "
        + (f"give --memory-limit {least} or more" if room.limited else way_out)
    )


def _beside(first_bytes: int, whole: Footprint) -> tuple[torch.device, ...]:
    """The other devices if all together hold a loaded model and its job; none under a limit, which
    is of one. Each has to hold what runs through a block, too. Not verified on several."""
    others = pick_devices()[1:] if memory_limit() is None else ()
    running_bytes = whole["activations"] + whole["logits"] + whole["decoding"]
    more_bytes = sum(max(0, available_memory_bytes(d) - running_bytes) for d in others)
    return others if first_bytes + more_bytes >= whole.least_bytes else ()


def needs_of(model: Model, job: Job, what: str, disk_bytes: int = 0) -> Needs:
    """What a job takes with a model that is open.

    Args:
        what: the job, for messages.
        disk_bytes: that the bank lacks.
    Raises:
        ResourceError: memory does not hold it, or the disk not the hidden states.
    """
    contents = _contents_of(model)
    here, there = (
        _way(model.device, model.dtype, streams) for streams in (model.streamed, not model.streamed)
    )
    found = footprint(contents, here, job)
    needed_bytes = found.least_bytes - held_bytes(contents, here)
    if not model.streamed:  # blocks may lie on other devices, too, and what they need beside them
        others = {place.parameter.device for place in model.places.values()} - {model.device}
        needed_bytes -= sum(map(available_memory_bytes, others))
    require_memory(needed_bytes, model.device, what)
    require_disk(found["states"], Path(gettempdir()), "keeping hidden states")
    room = _Room.of(model.device, held_bytes(contents, here))
    why = str(room)
    if model.streamed:
        whole = footprint(contents, there, job).least_bytes
        why = f"loaded whole it takes {format_size(whole)}, and {why}"
    memory_bytes = found.least_bytes + found["whole"]
    if memory_bytes > room.allowed_bytes:
        memory_bytes = found.least_bytes
    return Needs(model.streamed, why, memory_bytes, disk_bytes, found["states"])


def _way(device: torch.device, dtype: torch.dtype, streamed: bool) -> Way:
    return Way(streamed, dtype.itemsize, on_cpu=device.type == "cpu")


@dataclass(frozen=True)
class _Room:
    """What a job may take, with what this process has of it already.

    Attributes:
        allowed_bytes: for the job.
        others_bytes: that this process has beside it.
        limited: whether that is because of a limit.
    """

    allowed_bytes: int
    others_bytes: int
    limited: bool

    @classmethod
    def of(cls, device: torch.device, held_bytes: int) -> _Room:
        """Where so many bytes of a job would be in memory, if it had all that it begins with."""
        used_bytes, limit_bytes = used_memory_bytes(device), memory_limit()
        here = min(used_bytes, held_bytes)
        left_bytes = available_memory_bytes(device)
        limited = limit_bytes is not None and limit_bytes <= used_bytes + left_bytes
        return cls(left_bytes + here, used_bytes - here, limited)

    def __str__(self) -> str:
        bytes_in_all = self.allowed_bytes + self.others_bytes
        if self.limited:
            return f"{format_size(min(bytes_in_all, memory_limit() or 0))} is allowed"
        return f"{format_size(bytes_in_all)} is available"


def _contents_of(model: Model) -> Contents:
    if model.streamed:
        config = read_config(model.folder / "config.json", model.name)
        return Contents.of(Shards(model.folder, model.name), config)
    return Contents.of(dict(model.module.named_parameters()), model.module.config.to_dict())


def _as_limit(size_bytes: int) -> str:
    """Rounded up, as `parse_size` reads it: `1.3GiB`, `750MiB`."""
    tenths = ceil(10 * size_bytes / 2**30)
    return f"{tenths / 10:g}GiB" if tenths > 10 else f"{10 * ceil(size_bytes / 10 / 2**20)}MiB"


def _check_attention(model: Model) -> None:
    """What `from_module` refuses a loaded model for, found out block by block.

    Raises:
        ModelError: tokens reach each other past the mask, or blocks hand on more than states.
    """
    # Two texts begin alike and part: the end of the second must not notice that of the first.
    # Both of the first's ends are asked in one walk, as each reads all weights.
    asked, other = (
        Pass(model, [TokenSequence((1, hidden, 0), 2), TokenSequence((1, 5, 0), 2)])
        for hidden in (3, 4)
    )
    asked.rows += other.rows
    walk = Walk(asked)

    def logits() -> list[Tensor]:
        return [found[-1] for found in walk.logits({})]

    require_masked(
        model.name, model.module, logits, any(".experts." in layer for layer in model.places)
    )
