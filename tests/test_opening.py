"""Loaded whole or block by block: what is chosen, what is refused and with which way out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_skeleton import saved

from mpsearch import device, footprint, opening
from mpsearch.contents import Contents
from mpsearch.errors import ModelError, ResourceError, UsageError
from mpsearch.footprint import JOBS
from mpsearch.models import Model
from mpsearch.opening import choose, load_model, needs_of
from mpsearch.sizes import parse_size

PROCESS = footprint.PROCESS_BYTES


@pytest.fixture(autouse=True)
def as_if_just_started(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The process that tests share has grown; here it is as small as one that begins."""
    monkeypatch.setattr(opening, "used_memory_bytes", lambda of: PROCESS)
    monkeypatch.setattr(device, "used_memory_bytes", lambda of: PROCESS)
    yield
    device.limit_memory(None)


def sizes(**changes: object) -> Contents:
    """Of a model of 8 GiB in bf16: 32 blocks, a tenth of it outside."""
    block = 2**32 * 9 // 10 // 32
    made = Contents(
        outside=2**32 // 10, blocks=(block,) * 32, largest_outside=2**32 // 10,
        largest_layer=block // 4, columns=14_336, largest_read=block // 4, stacked=False,
        stored_bytes=2, vocabulary=100_000, hidden=4096, squares=10**8, all_squares=10**9,
        rows=40_000, architecture=None,
    )  # fmt: skip
    return replace(made, **changes)


def plenty(monkeypatch: pytest.MonkeyPatch, left_bytes: int) -> None:
    """So much is left beside the process."""
    monkeypatch.setattr(opening, "available_memory_bytes", lambda of: left_bytes)


def test_what_fits_is_loaded_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    ask, whole = JOBS["ask"], choose_within(monkeypatch, 2**40, "ask")
    assert not whole.streamed
    needed = whole.footprint.least_bytes
    assert needed > 2 * 2**32
    assert not choose_within(monkeypatch, needed - PROCESS, "ask").streamed
    streamed = choose_within(monkeypatch, needed - PROCESS - 1, "ask")
    assert streamed.streamed
    assert "loaded whole it takes" in streamed.why and "available" in streamed.why
    assert streamed.footprint.least_bytes < needed / 2
    assert ask.stages == ("asking",)


def choose_within(monkeypatch: pytest.MonkeyPatch, left_bytes: int, job: str) -> opening.Choice:
    plenty(monkeypatch, left_bytes)
    return choose("big", sizes(), JOBS[job])


def test_a_search_is_streamed_where_recall_alone_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    room = choose_within(monkeypatch, 2**40, "ask").footprint.least_bytes - PROCESS
    assert not choose_within(monkeypatch, room, "ask").streamed
    assert choose_within(monkeypatch, room, "search").streamed


def test_the_limit_that_a_refusal_names_is_the_smallest_that_works() -> None:
    device.limit_memory(2**29)
    with pytest.raises(
        ResourceError,
        match=r"^model 'big' needs at least ([\d.]+GiB) of memory even block by block, and "
        r"512.00 MiB is allowed; give --memory-limit \1 or more$",
    ) as caught:
        choose("big", sizes(), JOBS["search"])
    named = re.search(r"at least (\S+) of", str(caught.value))
    assert named
    least = parse_size(named.group(1))
    device.limit_memory(least)
    found = choose("big", sizes(), JOBS["search"])
    assert found.streamed and found.footprint.least_bytes <= least
    device.limit_memory(least - 2**30 // 10)  # of what it was rounded up to
    with pytest.raises(ResourceError):
        choose("big", sizes(), JOBS["search"])


def test_what_else_is_in_memory_counts_against_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    device.limit_memory(2**29)
    with pytest.raises(ResourceError) as before:
        choose("big", sizes(), JOBS["search"])
    for module in (opening, device):
        monkeypatch.setattr(module, "used_memory_bytes", lambda of: PROCESS + 2**31)
    with pytest.raises(ResourceError) as after:
        choose("big", sizes(), JOBS["search"])
    one, other = (
        parse_size(re.findall(r"at least (\S+) of", str(caught.value))[0])
        for caught in (before, after)
    )
    assert other - one == pytest.approx(2**31, rel=0.06)  # rounded up both


def test_without_a_limit_the_way_out_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    plenty(monkeypatch, 1000)
    with pytest.raises(ResourceError, match="is available; close other programs or use a smaller"):
        choose("big", sizes(), JOBS["ask"])


@pytest.mark.parametrize("limit", [0, -5])
def test_a_limit_that_is_no_size_is_refused(tiny_folder: Path, limit: int) -> None:
    with pytest.raises(UsageError, match=f"memory limit {limit} is no size"):
        load_model(str(tiny_folder), memory_limit_bytes=limit)


def test_a_forced_limit_streams_and_says_the_same(
    tiny_folder: Path, tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What loading takes beyond the limit is so little here that the two ways are told apart by it.
    monkeypatch.setattr(opening, "choose", lambda name, contents, job: FORCED)
    model = load_model(str(tiny_folder), job="ask", memory_limit_bytes=2**30)
    assert model.streamed and not tiny.streamed
    assert model.fingerprint == tiny.fingerprint
    assert device.memory_limit() == 2**30


FORCED = opening.Choice(True, footprint.Footprint("asking", ()), "")


def test_a_streamed_model_is_refused_for_its_attention_as_a_loaded_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "choose", lambda name, contents, job: FORCED)
    folder = saved(tmp_path, "llama")
    assert load_model(str(folder)).streamed
    sees_all = "mpsearch.forward.Row.mask"
    monkeypatch.setattr(sees_all, lambda row: torch.ones(len(row.tokens), len(row.tokens)) > 0)
    with pytest.raises(ModelError, match="lets a token see another that its mask hides"):
        load_model(str(folder))


def test_experts_may_differ_by_rounding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "choose", lambda name, contents, job: FORCED)
    assert load_model(str(saved(tmp_path, "mixtral"))).streamed


def test_all_weights_are_read_once_for_the_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "choose", lambda name, contents, job: FORCED)
    model = load_model(str(saved(tmp_path, "llama")))
    assert model.checkpoint is not None
    whole = sum(p.numel() for p in model.module.parameters())
    # For the fingerprint, for what is outside the blocks, and for one walk.
    assert model.checkpoint.read_bytes <= 2 * 2 * whole + 2 * 2 * 71 * 64


def test_a_model_that_cannot_be_streamed_keeps_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "choose", lambda name, contents, job: FORCED)
    monkeypatch.setattr("mpsearch.skeleton.find_blocks", lambda *_: [])
    with pytest.raises(ModelError, match="give it the memory to be loaded whole"):
        load_model(str(saved(tmp_path, "llama")))


def test_needs_of_an_open_model_are_what_was_chosen_by(
    tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = needs_of(tiny, JOBS["search"], "the search", disk_bytes=7)
    assert not found.streamed and found.disk_bytes == 7
    assert found.states_bytes == 0
    assert PROCESS < found.memory_bytes < 2 * PROCESS
    monkeypatch.setattr(device, "available_memory_bytes", lambda of: 1000)
    with pytest.raises(ResourceError, match=r"^the search needs about \d+.*of memory and 1000 B"):
        needs_of(tiny, JOBS["search"], "the search")
