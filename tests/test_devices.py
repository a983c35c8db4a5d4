"""The catalogue of cards: complete, sane, shipped; and every name people type finds one card."""

from __future__ import annotations

import json
import re
from collections import Counter
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mpsearch
from mpsearch import devices
from mpsearch.devices import Device, catalogue, find_device, parse
from mpsearch.errors import MpsearchError, UsageError

GIB = 2**30
NAMES = [device.name for device in catalogue()]
CARD = {
    "name": "NVIDIA GeForce RTX 3060",
    "vendor": "NVIDIA",
    "kind": "discrete",
    "memory_gb": 12,
    "source": "a page",
}
CHIP = CARD | {
    "name": "Apple M1",
    "vendor": "Apple",
    "kind": "unified",
    "memory_gb": 16,
    "usable_share": "2/3",
}


def usable_mib(name: str) -> float:
    return find_device(name).usable_bytes / 2**20


def read(*entries: Any) -> tuple[Device, ...]:
    return parse(json.dumps(entries))


def refusal(*entries: Any) -> str:
    with pytest.raises(MpsearchError) as caught:
        read(*entries)
    return str(caught.value)


def test_every_vendor_and_kind_of_card_is_there() -> None:
    assert len(catalogue()) >= 30
    count = Counter(device.vendor for device in catalogue())
    assert set(count) == {"NVIDIA", "AMD", "Intel", "Apple"}
    assert min(count.values()) >= 10
    assert {device.vendor for device in catalogue() if device.unified} == {"Apple"}
    sizes_gb = {d.memory_bytes // GIB for d in catalogue() if "GeForce" in d.name}
    assert {6, 8, 10, 11, 12, 16, 24, 32} <= sizes_gb


@pytest.mark.parametrize("device", catalogue(), ids=NAMES)
def test_an_entry_is_sane_and_says_where_its_figure_is_from(device: Device) -> None:
    assert 4 * GIB <= device.memory_bytes <= 512 * GIB
    assert device.memory_bytes % GIB == 0
    assert device.name == f"{device.card} {device.memory_bytes // GIB}GB"
    assert device.name.startswith(f"{device.vendor} ")
    assert len(device.source) > 20
    assert ":" in device.source
    if device.unified:
        share = (2, 3) if device.memory_bytes <= 36 * GIB else (3, 4)
        assert device.usable_bytes == device.memory_bytes * share[0] // share[1]
    elif ", each a device of its own" in device.source:
        assert 0.49 * device.memory_bytes < device.usable_bytes <= device.memory_bytes // 2
    else:
        assert 0.93 * device.memory_bytes < device.usable_bytes <= device.memory_bytes


def test_the_catalogue_is_sorted_by_usable_memory_then_name_and_read_once() -> None:
    order = [(device.usable_bytes, device.name) for device in catalogue()]
    assert order == sorted(order)
    assert len(set(NAMES)) == len(NAMES)
    assert catalogue() is catalogue()


@pytest.mark.parametrize(
    ("name", "mib"),
    [  # totals that nvidia-smi and rocm-smi print
        ("rtx 3060 12gb", 12_288),
        ("rtx 3090", 24_576),
        ("rtx 4090", 24_564),
        ("rtx 5090", 32_607),
        ("t4", 15_360),
        ("l4", 23_034),
        ("a10", 23_028),
        ("a100 40gb", 40_960),
        ("a100 80gb", 81_920),
        ("h100", 81_559),
        ("h200", 143_771),
        ("b200", 183_359),
        ("rx 7900 xtx", 24_560),
        ("mi300x", 196_592),
        ("rx 7600", 8192),  # none known: all of it
        ("m2 max 96gb", 73_728),
    ],
)
def test_usable_is_what_the_driver_reports(name: str, mib: int) -> None:
    assert usable_mib(name) == mib


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("rtx-3060-12gb", "NVIDIA GeForce RTX 3060 12GB"),
        ("RTX 3060 12GB", "NVIDIA GeForce RTX 3060 12GB"),
        ("rtx_3060_12_GiB", "NVIDIA GeForce RTX 3060 12GB"),
        ("  3060 12g\t", "NVIDIA GeForce RTX 3060 12GB"),
        ("RTX 3090", "NVIDIA GeForce RTX 3090 24GB"),
        ("3090", "NVIDIA GeForce RTX 3090 24GB"),
        ("geforce rtx 3090", "NVIDIA GeForce RTX 3090 24GB"),
        ("NVIDIA GeForce RTX 3090", "NVIDIA GeForce RTX 3090 24GB"),
        ("rtx3090", "NVIDIA GeForce RTX 3090 24GB"),
        ("RTX 3090 Ti", "NVIDIA GeForce RTX 3090 Ti 24GB"),
        ("3090ti", "NVIDIA GeForce RTX 3090 Ti 24GB"),
        ("4060 ti 16gb", "NVIDIA GeForce RTX 4060 Ti 16GB"),
        ("4070 ti", "NVIDIA GeForce RTX 4070 Ti 12GB"),
        ("4070 ti super", "NVIDIA GeForce RTX 4070 Ti SUPER 16GB"),
        ("4070 super", "NVIDIA GeForce RTX 4070 SUPER 12GB"),
        ("4080", "NVIDIA GeForce RTX 4080 16GB"),
        ("4080 super", "NVIDIA GeForce RTX 4080 SUPER 16GB"),
        ("rtx 4080 laptop", "NVIDIA GeForce RTX 4080 Laptop GPU 12GB"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 Laptop GPU 16GB"),
        ("rtx 4090 mobile", "NVIDIA GeForce RTX 4090 Laptop GPU 16GB"),
        ("rtx a6000", "NVIDIA RTX A6000 48GB"),
        ("rtx 6000 ada", "NVIDIA RTX 6000 Ada Generation 48GB"),
        ("quadro rtx 6000", "NVIDIA Quadro RTX 6000 24GB"),
        ("rtx pro 6000", "NVIDIA RTX PRO 6000 Blackwell 96GB"),
        ("a100-80gb", "NVIDIA A100 80GB"),
        ("A100 80 GB SXM", "NVIDIA A100 80GB"),
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB"),
        ("NVIDIA A100-PCIE-40GB", "NVIDIA A100 40GB"),
        ("Tesla V100-SXM2-16GB", "NVIDIA V100 16GB"),
        ("v100s", "NVIDIA V100 32GB"),
        ("Tesla T4", "NVIDIA T4 16GB"),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB"),
        ("h100 nvl", "NVIDIA H100 NVL 94GB"),
        ("7900 xtx", "AMD Radeon RX 7900 XTX 24GB"),
        ("7900 xt", "AMD Radeon RX 7900 XT 20GB"),
        ("radeon pro w7900", "AMD Radeon PRO W7900 48GB"),
        ("mi300x", "AMD Instinct MI300X 192GB"),
        ("arc a770 16gb", "Intel Arc A770 16GB"),
        ("max 1550", "Intel Data Center GPU Max 1550 128GB"),
        ("m3-max-64gb", "Apple M3 Max 64GB"),
        ("apple m1 8 gb", "Apple M1 8GB"),
        ("M3 Ultra 512GB", "Apple M3 Ultra 512GB"),
    ],
)
def test_what_people_type_finds_the_card(typed: str, name: str) -> None:
    assert find_device(typed).name == name


@given(st.data(), st.sampled_from(catalogue()))
@settings(deadline=None, max_examples=200)
def test_a_name_is_found_in_any_case_with_any_separators(data: Any, device: Device) -> None:
    words = device.name.replace("GB", " GB").split()
    separators = [data.draw(st.sampled_from([" ", "-", "_", " - "])) for _ in words[1:]]
    typed = "".join(a + b for a, b in zip(words, [*separators, ""], strict=True))
    assert find_device(data.draw(st.sampled_from([typed, typed.upper(), typed.lower()]))) is device


def test_every_name_and_alias_leads_to_one_card() -> None:
    for device in catalogue():
        memory = device.name.rpartition(" ")[2]
        brand = device.name.split()[0]
        for name in (device.card, *device.aliases, *(f"{brand} {a}" for a in device.aliases)):
            assert find_device(f"{name} {memory}") is device
    for key, found in devices._index().items():
        assert key
        assert len({device.card for device in found}) == 1
        assert len({device.memory_bytes for device in found}) == len(found)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (
            "rtx 3060",
            "device 'rtx 3060' comes with several memory sizes; name one of: "
            "NVIDIA GeForce RTX 3060 8GB, NVIDIA GeForce RTX 3060 12GB",
        ),
        (
            "4060 Ti",
            "device '4060 Ti' comes with several memory sizes; name one of: "
            "NVIDIA GeForce RTX 4060 Ti 8GB, NVIDIA GeForce RTX 4060 Ti 16GB",
        ),
        (
            "a100",
            "device 'a100' comes with several memory sizes; name one of: "
            "NVIDIA A100 40GB, NVIDIA A100 80GB",
        ),
        (
            "v100",
            "device 'v100' comes with several memory sizes; name one of: "
            "NVIDIA V100 16GB, NVIDIA V100 32GB",
        ),
        (
            "m2-max",
            "device 'm2-max' comes with several memory sizes; name one of: "
            "Apple M2 Max 32GB, Apple M2 Max 64GB, Apple M2 Max 96GB",
        ),
        (
            "rtx 3090 16gb",
            "device 'rtx 3090 16gb' does not come with that memory; name one of: "
            "NVIDIA GeForce RTX 3090 24GB",
        ),
        (
            "m9-max-64gb",
            "no device 'm9-max-64gb'; nearest: Apple M4 Max 64GB, Apple M3 Max 64GB, "
            "Apple M2 Max 64GB, Apple M1 Max 64GB; or give its memory, such as 12GiB",
        ),
    ],
)
def test_a_name_that_is_not_one_card_is_answered_with_names(typed: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_device(typed)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("typed", "among"),
    [
        ("rtx 3091", "NVIDIA GeForce RTX 3090 24GB"),
        ("3080 tii", "NVIDIA GeForce RTX 3080 Ti 12GB"),
        ("rtx 6000", "NVIDIA RTX 6000 Ada Generation 48GB"),  # three cards, none of that name
        ("amd rtx 3090", "NVIDIA GeForce RTX 3090 24GB"),  # another vendor's brand
        ("rtx 3060 0.12gb", "NVIDIA GeForce RTX 3060 12GB"),
        ("rx 7900", "AMD Radeon RX 7900 XT 20GB"),
        ("mi300", "AMD Instinct MI300X 192GB"),
    ],
)
def test_an_unknown_name_lists_the_nearest(typed: str, among: str) -> None:
    with pytest.raises(UsageError, match=rf"^no device '{typed}'; nearest: .*\b{among}[,;]") as e:
        find_device(typed)
    listed = str(e.value).split("nearest: ")[1].split(";")[0].split(", ")
    assert len(listed) == 4
    assert set(listed) <= set(NAMES)


@pytest.mark.parametrize("typed", ["", " - ", "24gb", "toaster", "nvidia", "12", "\n"])
def test_any_other_text_is_refused_in_one_line(typed: str) -> None:
    with pytest.raises(UsageError, match=r"^no device .*; or give its memory, such as 12GiB$"):
        find_device(typed)


def test_an_entry_becomes_a_device() -> None:
    reported = {"reported_mib": 12_000, "aliases": ["3060 LHR"]}
    chip, card = read(CARD | reported, CHIP)
    assert card == Device(
        name="NVIDIA GeForce RTX 3060 12GB",
        vendor="NVIDIA",
        unified=False,
        memory_bytes=12 * GIB,
        usable_bytes=12_000 * 2**20,
        aliases=("3060 LHR",),
        source="a page",
    )
    assert chip.unified
    assert chip.usable_bytes == 16 * GIB * 2 // 3  # rounded down to a byte
    assert read(CARD)[0].usable_bytes == 12 * GIB


WHERE = "devices.json, entry 1 ('NVIDIA GeForce RTX 3060'): "
FIELDS = "name, vendor, kind, memory_gb, source, aliases, reported_mib, usable_share"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"memroy": 12}, f"unknown field 'memroy'; known: {FIELDS}"),
        ({"memory_gb": "12"}, "'memory_gb' must be int and not empty, not '12'"),
        ({"memory_gb": 12.0}, "'memory_gb' must be int and not empty, not 12.0"),
        ({"memory_gb": True}, "'memory_gb' must be int and not empty, not True"),
        ({"memory_gb": 0}, "'memory_gb' must be int and not empty, not 0"),
        ({"source": ""}, "'source' must be str and not empty, not ''"),
        ({"aliases": "3060"}, "'aliases' must be list and not empty, not '3060'"),
        ({"aliases": ["3060", " "]}, "'aliases' must be names, not ['3060', ' ']"),
        ({"kind": "rented"}, "'kind' must be discrete or unified, not 'rented'"),
        ({"vendor": "AMD"}, "the name must begin with the vendor, 'AMD'"),
    ],
)
def test_a_senseless_field_is_refused_by_the_entrys_name(
    change: dict[str, Any], fault: str
) -> None:
    assert refusal(CARD | change) == WHERE + fault


@pytest.mark.parametrize("field", ["vendor", "kind", "memory_gb", "source"])
def test_a_missing_field_is_refused_by_the_entrys_name(field: str) -> None:
    assert refusal({key: CARD[key] for key in CARD if key != field}) == (
        f"{WHERE}'{field}' is missing"
    )


@pytest.mark.parametrize(
    "entry",
    [
        CARD | {"memory_gb": -12},
        CARD | {"reported_mib": 12 * 1024 + 1},
        CARD | {"reported_mib": -1},
        CHIP | {"usable_share": "4/3"},
        CHIP | {"usable_share": "1/0"},
        CHIP | {"usable_share": "most"},
        CHIP | {"usable_share": "-1/3"},
    ],
)
def test_usable_memory_is_some_and_at_most_all(entry: dict[str, Any]) -> None:
    assert refusal(entry).endswith(
        "'memory_gb' must be positive, and 'reported_mib' or 'usable_share' more than nothing and "
        "no more than that memory"
    )


@pytest.mark.parametrize(
    "entry",
    [
        CARD | {"usable_share": "2/3"},
        CHIP | {"reported_mib": 10_000},
        {key: CHIP[key] for key in CHIP if key != "usable_share"},
    ],
)
def test_a_share_belongs_to_unified_memory_and_a_report_to_discrete(entry: dict[str, Any]) -> None:
    assert "unified memory needs 'usable_share' and no 'reported_mib'" in refusal(entry)


def test_a_file_that_is_no_list_of_named_entries_is_refused() -> None:
    assert refusal({"vendor": "NVIDIA"}) == "devices.json, entry 1: 'name' is missing"
    assert refusal(CARD, 5).startswith("devices.json, entry 2: must be an object with name, vendor")
    for text, fault in (("{", "is not JSON: "), ("{}", "must be a list of entries")):
        with pytest.raises(MpsearchError, match=f"^devices.json {fault}"):
            parse(text)


@pytest.mark.parametrize(
    ("other", "key"),
    [
        (CARD, "3060"),
        (CARD | {"name": "NVIDIA RTX 3060"}, "3060"),
        (CARD | {"name": "NVIDIA GeForce RTX 4060", "aliases": ["3060"], "memory_gb": 8}, "3060"),
    ],
)
def test_a_name_for_two_cards_is_refused(other: dict[str, Any], key: str) -> None:
    assert f"'{key}' stands for both" in refusal(CARD, other)


def test_sizes_of_one_card_share_its_names() -> None:
    assert len(read(CARD, CARD | {"memory_gb": 8})) == 2


def test_the_file_is_part_of_the_wheel() -> None:
    """The wheel holds the package's folder whole, less what git ignores."""
    package = Path(mpsearch.__file__).parent
    file = package / "devices.json"
    assert parse(file.read_text(encoding="utf-8")) == catalogue()
    assert (resources.files("mpsearch") / "devices.json").is_file()
    wheel = (package.parent / "pyproject.toml").read_text(encoding="utf-8")
    rules = re.findall(
        r"^\[tool\.hatch\.build(?:\.targets\.wheel)?\]\n.*?(?=^\[)", wheel, re.MULTILINE | re.DOTALL
    )
    assert [rule.split() for rule in rules] == [
        ["[tool.hatch.build.targets.wheel]", "packages", "=", '["mpsearch"]']
    ]
    ignored = (package.parent / ".gitignore").read_text(encoding="utf-8").split()
    assert not any(file.match(pattern.strip("/")) for pattern in ignored)
