"""How much memory a card has: a catalogue, and its names as people type them.

`devices.json` beside this file is a list of entries, one for each memory size of a card:

    name          the vendor's name, without the memory
    vendor        its first word
    kind          `discrete`, or `unified` where the processor shares the memory
    memory_gb     as the vendor states it; a gigabyte of DRAM is 2^30 bytes
    source        where the vendor states it
    aliases       optional: other names, without the brand words that the name begins with
    reported_mib  optional, discrete only: the total that the driver reports
    usable_share  unified only: the share that the GPU may use

What a driver reports is its total for one device, as `nvidia-smi` (drivers since 510, ECC as the
card is delivered), `rocm-smi` or SYCL print it. Where no such figure is known for sure, all of the
memory counts as usable. A process gets less than the total on any card: NVIDIA's driver keeps some
250 to 700 MiB (`Reserved` in `nvidia-smi -q`), a runtime's overhead, not taken off here.

The share of unified memory is an approximation: two thirds up to 36 GB, three quarters above, the
`recommendedMaxWorkingSetSize` of Metal in published logs of llama.cpp (10,923 MiB of 16 GB, 21,845
of 32, 73,728 of 96). Newer releases of macOS allow more (107.5 GiB of 128), and so may
`sysctl iogpu.wired_limit_mb`.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from importlib import resources
from itertools import combinations
from typing import Any

from mpsearch.errors import MpsearchError, UsageError

_FILE = "devices.json"
_NEEDED = {"name": str, "vendor": str, "kind": str, "memory_gb": int, "source": str}
_OPTIONAL = {"aliases": list, "reported_mib": int, "usable_share": str}
_KINDS = ("discrete", "unified")

# Words that people leave out: at the beginning of a name, and at its end.
_BRANDS = frozenset(
    (
        *("nvidia", "geforce", "gtx", "rtx", "tesla", "amd", "radeon", "rx", "instinct"),
        *("intel", "arc", "apple"),
    )
)
_ENDINGS = frozenset(("gpu", "generation"))
_MEMORY = re.compile(r"\b(\d+) ?gi?b?\b")
_MOST_NEAR = 4
_KEYS_TO_SEARCH = 24  # a card has several keys, so more than devices to be named


@dataclass(frozen=True)
class Device:
    """A card, or a chip with unified memory, in one memory size.

    Attributes:
        name: the card and its memory, such as `NVIDIA GeForce RTX 3060 12GB`.
        unified: whether the processor shares the memory.
        memory_bytes: nominal.
        usable_bytes: what processes can have at most, all together: what the driver reports for
            one device, or the usable share of unified memory.
        aliases: other names of the card, without its memory.
        source: where the vendor states the memory.
    """

    name: str
    vendor: str
    unified: bool
    memory_bytes: int
    usable_bytes: int
    aliases: tuple[str, ...]
    source: str

    @property
    def card(self) -> str:
        """The name without the memory."""
        return self.name.rpartition(" ")[0]


@cache
def catalogue() -> tuple[Device, ...]:
    """Every device known, by usable memory, then by name."""
    return parse((resources.files("mpsearch") / _FILE).read_text(encoding="utf-8"))


def find_device(name: str) -> Device:
    """The device that a name means.

    Case does not matter, spaces, dashes and underscores are alike, and words of the brand may be
    missing: `rtx-3060-12gb`, `RTX 3090`, `3090`, `a100-80gb`, `A100 80 GB SXM`, `m3-max-64gb`. The
    memory may be missing where a card comes with one size.

    Raises:
        UsageError: no such card, or several sizes and none given; with names to choose from.
    """
    words, memory_gb = _split_memory(name)
    card = _index().get(words.replace(" ", ""), ())
    found = [d for d in card if memory_gb in (None, d.memory_bytes >> 30)]
    if len(found) == 1:
        return found[0]
    if card:
        fault = "comes with several memory sizes" if found else "does not come with that memory"
        names = ", ".join(device.name for device in card)
        raise UsageError(f"device '{name}' {fault}; name one of: {names}")
    raise UsageError(
        f"no device '{name}'; nearest: {', '.join(_nearest(words, memory_gb))}; or give its "
        "memory, such as 12GiB"
    )


def parse(text: str) -> tuple[Device, ...]:
    """Devices of a catalogue file, sorted as `catalogue` says.

    Raises:
        MpsearchError: naming the entry: a field is missing, unknown or senseless, or a name stands
            for two cards.
    """
    try:
        entries = json.loads(text)
    except ValueError as error:
        raise MpsearchError(f"{_FILE} is not JSON: {error}") from None
    if not isinstance(entries, list):
        raise MpsearchError(f"{_FILE} must be a list of entries")
    devices = [_device(number, entry) for number, entry in enumerate(entries, start=1)]
    devices.sort(key=lambda device: (device.usable_bytes, device.name))
    _by_key(devices)
    return tuple(devices)


def _device(number: int, entry: Any) -> Device:
    name = entry.get("name") if isinstance(entry, dict) else None
    where = f"{_FILE}, entry {number} ('{name}')" if name else f"{_FILE}, entry {number}"
    if not isinstance(entry, dict):
        raise MpsearchError(f"{where}: must be an object with {', '.join(_NEEDED)}")
    _check_fields(where, entry)
    memory_bytes = entry["memory_gb"] << 30
    return Device(
        name=f"{name} {entry['memory_gb']}GB",
        vendor=entry["vendor"],
        unified=entry["kind"] == "unified",
        memory_bytes=memory_bytes,
        usable_bytes=_usable_bytes(where, entry, memory_bytes),
        aliases=tuple(entry.get("aliases", ())),
        source=entry["source"],
    )


def _check_fields(where: str, entry: Mapping[str, Any]) -> None:
    known = _NEEDED | _OPTIONAL
    for field in _NEEDED:
        if field not in entry:
            raise MpsearchError(f"{where}: '{field}' is missing")
    for field, value in entry.items():
        if field not in known:
            raise MpsearchError(f"{where}: unknown field '{field}'; known: {', '.join(known)}")
        if type(value) is not known[field] or not value:
            raise MpsearchError(
                f"{where}: '{field}' must be {known[field].__name__} and not empty, not {value!r}"
            )
    if entry["kind"] not in _KINDS:
        raise MpsearchError(f"{where}: 'kind' must be {' or '.join(_KINDS)}, not '{entry['kind']}'")
    if not entry["name"].startswith(f"{entry['vendor']} "):
        raise MpsearchError(f"{where}: the name must begin with the vendor, '{entry['vendor']}'")
    if not all(isinstance(alias, str) and alias.strip() for alias in entry.get("aliases", ())):
        raise MpsearchError(f"{where}: 'aliases' must be names, not {entry['aliases']!r}")


def _usable_bytes(where: str, entry: Mapping[str, Any], memory_bytes: int) -> int:
    """What is usable of the memory, in whole bytes, rounded down."""
    unified = entry["kind"] == "unified"
    if ("usable_share" in entry) is not unified or (unified and "reported_mib" in entry):
        raise MpsearchError(
            f"{where}: unified memory needs 'usable_share' and no 'reported_mib'; discrete memory "
            "has no 'usable_share'"
        )
    if not unified:
        usable_bytes = entry["reported_mib"] << 20 if "reported_mib" in entry else memory_bytes
    else:
        try:
            usable_bytes = int(memory_bytes * Fraction(entry["usable_share"]))
        except (ValueError, ZeroDivisionError):
            usable_bytes = 0
    if not 0 < usable_bytes <= memory_bytes:
        raise MpsearchError(
            f"{where}: 'memory_gb' must be positive, and 'reported_mib' or 'usable_share' more "
            "than nothing and no more than that memory"
        )
    return usable_bytes


@cache
def _index() -> Mapping[str, tuple[Device, ...]]:
    return _by_key(catalogue())


def _by_key(devices: Iterable[Device]) -> Mapping[str, tuple[Device, ...]]:
    """The sizes of a card by every way to write it; refuses a way that leads to two cards."""
    index: dict[str, tuple[Device, ...]] = {}
    for device in devices:
        for key in sorted(_keys(device)):
            others = index.get(key, ())
            for other in others:
                if other.card != device.card or other.name == device.name:
                    raise MpsearchError(
                        f"{_FILE}: '{key}' stands for both '{other.name}' and '{device.name}'"
                    )
            index[key] = (*others, device)
    return index


def _keys(device: Device) -> set[str]:
    """Every way to write a card: without separators, with and without brands and endings."""
    words = _plain(device.card).split()
    brands = _leading(words, _BRANDS)
    keys: set[str] = set()
    for core in (words[len(brands) :], *(_plain(alias).split() for alias in device.aliases)):
        before = [*brands, *_leading(core, _BRANDS)]
        after = _leading(core[::-1], _ENDINGS)[::-1]
        middle = "".join(core[len(before) - len(brands) : len(core) - len(after)])
        keys |= {
            left + middle + right for left in _selections(before) for right in _selections(after)
        }
    return keys


def _leading(words: list[str], among: frozenset[str]) -> list[str]:
    """The words before the first one that is not among those."""
    count = next((n for n, word in enumerate(words) if word not in among), len(words))
    return words[:count]


def _selections(words: list[str]) -> list[str]:
    """All selections of words, in their order, joined."""
    return ["".join(some) for n in range(len(words) + 1) for some in combinations(words, n)]


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _split_memory(name: str) -> tuple[str, int | None]:
    """The words of a name and the memory among them: `a100 sxm` and 80 of `A100-80GB SXM`."""
    plain = _plain(name)
    found = _MEMORY.search(plain)
    if found is None:
        return plain, None
    return _plain(plain[: found.start()] + plain[found.end() :]), int(found.group(1))


def _nearest(words: str, memory_gb: int | None) -> list[str]:
    """Names of the devices that are written most like that, of that memory if there are any."""
    index = _index()
    keys = difflib.get_close_matches(words.replace(" ", ""), index, _KEYS_TO_SEARCH, cutoff=0.0)
    near = list(dict.fromkeys(device for key in keys for device in index[key]))
    of_that_memory = [device for device in near if device.memory_bytes >> 30 == memory_gb]
    return [device.name for device in (of_that_memory or near)[:_MOST_NEAR]]
