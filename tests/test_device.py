"""Devices, memory and disk: what is picked, what is measured; shortage stops work early."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mpsearch import device
from mpsearch.errors import ResourceError, UsageError

CPU = torch.device("cpu")


def accelerators(monkeypatch: pytest.MonkeyPatch, *, cuda: bool, mps: bool) -> None:
    monkeypatch.delenv("MPSEARCH_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


def cpu_instructions(monkeypatch: pytest.MonkeyPatch, *, avx512: bool, amx: bool) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)


def fake_files(monkeypatch: pytest.MonkeyPatch, folder: Path, contents: dict[str, str]) -> None:
    """Let the module read these files in place of the kernel's; all others are missing."""
    for name, text in contents.items():
        (folder / name).write_text(text)
    monkeypatch.setattr(device, "Path", lambda path: folder / Path(path).name)


# ------------------------------------------------------------------------------- which device


def test_all_cuda_devices_may_hold_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerators(monkeypatch, cuda=True, mps=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert device.pick_devices() == (
        torch.device("cuda"), torch.device("cuda:1"), torch.device("cuda:2"),
    )  # fmt: skip
    monkeypatch.setenv("MPSEARCH_DEVICE", "cuda:1, cuda:0")
    assert device.pick_devices() == (torch.device("cuda:1"), torch.device("cuda:0"))
    assert device.pick_device() == torch.device("cuda:1")
    monkeypatch.setenv("MPSEARCH_DEVICE", "cuda:1,gpu")
    with pytest.raises(UsageError, match=r"'cuda:1,gpu' is no device here; use cpu, cuda:0, or"):
        device.pick_devices()


@pytest.mark.parametrize("kind", ["cuda", "mps", "cpu, cuda:1"])
def test_a_device_that_is_not_here_is_one_line(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerators(monkeypatch, cuda=False, mps=False)
    monkeypatch.setenv("MPSEARCH_DEVICE", kind)
    with pytest.raises(UsageError, match=f"'{kind}' is no device here"):
        device.pick_devices()


@pytest.mark.parametrize(
    ("cuda", "mps", "picked"),
    [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_cuda_is_preferred_over_mps_over_cpu(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, picked: str
) -> None:
    accelerators(monkeypatch, cuda=cuda, mps=mps)
    assert device.pick_device() == torch.device(picked)


def test_environment_overrides_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerators(monkeypatch, cuda=True, mps=True)
    monkeypatch.setenv("MPSEARCH_DEVICE", "cpu")
    assert device.pick_device() == CPU


@pytest.mark.parametrize(
    ("avx512", "amx", "dtype"),
    [
        (False, False, torch.float32),
        (True, False, torch.bfloat16),
        (False, True, torch.bfloat16),
    ],
)
def test_cpu_computes_in_bf16_only_with_native_instructions(
    monkeypatch: pytest.MonkeyPatch, avx512: bool, amx: bool, dtype: torch.dtype
) -> None:
    cpu_instructions(monkeypatch, avx512=avx512, amx=amx)
    assert device.compute_dtype(CPU) == dtype


@pytest.mark.parametrize(("supported", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_gpu_computes_in_bf16_only_where_it_can(
    monkeypatch: pytest.MonkeyPatch, supported: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: supported)
    assert device.compute_dtype(torch.device("cuda")) == dtype


def test_mps_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_instructions(monkeypatch, avx512=True, amx=True)
    assert device.compute_dtype(torch.device("mps")) == torch.float32


# --------------------------------------------------------------------------------- how much


def test_available_memory_lies_between_nothing_and_the_whole_machine() -> None:
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < device.available_memory_bytes(CPU) <= whole


def test_available_memory_counts_what_the_kernel_can_reclaim(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    meminfo = "MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable:    4096 kB\n"
    fake_files(monkeypatch, tmp_path, {"meminfo": meminfo})
    assert device.available_memory_bytes(CPU) == 4096 * 1024


def test_container_limit_caps_available_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = {"meminfo": "MemAvailable: 1000000 kB\n", "memory.max": "5000\n"}
    fake_files(monkeypatch, tmp_path, {**files, "memory.current": "3000\n"})
    assert device.available_memory_bytes(CPU) == 2000


def test_container_without_a_limit_does_not_cap_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = {"meminfo": "MemAvailable: 7 kB\n", "memory.max": "max\n"}
    fake_files(monkeypatch, tmp_path, {**files, "memory.current": "3000\n"})
    assert device.available_memory_bytes(CPU) == 7 * 1024


def test_gpu_memory_is_what_its_driver_says_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda of: (123, 456))
    assert device.available_memory_bytes(torch.device("cuda")) == 123


def test_the_first_control_groups_cap_memory_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = {"meminfo": "MemAvailable: 1000000 kB\n", "memory.limit_in_bytes": "5000\n"}
    files |= {"memory.stat": "cache 9\ntotal_inactive_file 300\n"}
    fake_files(monkeypatch, tmp_path, {**files, "memory.usage_in_bytes": "3000\n"})
    assert device.available_memory_bytes(CPU) == 2300


@pytest.mark.parametrize(("which", "field"), [("RLIMIT_AS", "VmSize"), ("RLIMIT_DATA", "VmData")])
def test_limits_of_the_process_cap_memory(
    which: str, field: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = {"meminfo": "MemAvailable: 9000 kB\n", "status": f"{field}:\t  4000 kB\n"}
    fake_files(monkeypatch, tmp_path, files)
    number = getattr(resource, which)
    unlimited = (resource.RLIM_INFINITY,) * 2
    soft = {number: (5000 * 1024, resource.RLIM_INFINITY)}
    monkeypatch.setattr(resource, "getrlimit", lambda of: soft.get(of, unlimited))
    assert device.available_memory_bytes(CPU) == 1000 * 1024


@pytest.fixture
def unlimited_afterwards() -> Iterator[None]:
    yield
    device.limit_memory(None)


@pytest.mark.usefixtures("unlimited_afterwards")
def test_a_limit_leaves_what_the_process_does_not_have(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    page = os.sysconf("SC_PAGE_SIZE")
    files = {"meminfo": "MemAvailable: 1000000 kB\n", "statm": "90 3 2 1 0 4 0\n"}
    fake_files(monkeypatch, tmp_path, files)
    before = device.available_memory_bytes(CPU)
    device.limit_memory(10 * page)
    assert device.memory_limit() == 10 * page
    assert device.available_memory_bytes(CPU) == 7 * page
    device.limit_memory(2 * page)
    assert device.available_memory_bytes(CPU) == 0  # and not less
    with pytest.raises(ResourceError, match=r"0 B is left of the limit of .*larger --memory-limit"):
        device.require_memory(1, CPU, "thinking")
    device.limit_memory(None)
    assert device.available_memory_bytes(CPU) == before


@pytest.mark.usefixtures("unlimited_afterwards")
def test_a_limit_of_a_gpu_is_of_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda of: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda of: 300)
    device.limit_memory(700)
    assert device.available_memory_bytes(torch.device("cuda")) == 400


@pytest.mark.usefixtures("unlimited_afterwards")
@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_is_above_zero(limit: int) -> None:
    with pytest.raises(UsageError, match=f"memory limit {limit} is no size"):
        device.limit_memory(limit)
    assert device.memory_limit() is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_in_bytes_and_grows_with_an_allocation() -> None:
    page = os.sysconf("SC_PAGE_SIZE")
    block = torch.ones(1 << 25)  # 128 MiB, written
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * page
    whole = os.sysconf("SC_PHYS_PAGES") * page
    assert block.nbytes < 0.98 * resident <= device.peak_memory_bytes() <= whole  # counters lag


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_of_a_process_is_not_that_of_the_one_that_started_it() -> None:
    block = torch.ones(1 << 28)  # 1 GiB, more than a process takes that only imports torch
    code = "from mpsearch.device import peak_memory_bytes; print(peak_memory_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 2**26 < int(done.stdout) < block.nbytes < device.peak_memory_bytes()


# ----------------------------------------------------------------------------------- refusals


def test_memory_shortage_is_refused_with_both_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "available_memory_bytes", lambda of: 3 * 2**20)
    device.require_memory(3 * 2**20, CPU, "fitting exactly")
    with pytest.raises(
        ResourceError, match=r"^thinking needs about 4\.0+ ?MiB.*3\.0+ ?MiB"
    ) as caught:
        device.require_memory(4 * 2**20, CPU, "thinking")
    assert "\n" not in str(caught.value)


def test_disk_shortage_is_refused_with_both_sizes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3 * 2**20))
    device.require_disk(3 * 2**20, tmp_path, "fitting exactly")
    with pytest.raises(
        ResourceError, match=r"^writing needs about 4\.0+ ?MiB.*3\.0+ ?MiB"
    ) as caught:
        device.require_disk(4 * 2**20, tmp_path, "writing")
    assert "\n" not in str(caught.value)


def test_disk_of_a_folder_to_come_is_that_of_its_nearest_parent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Path] = []

    def usage(path: Path) -> SimpleNamespace:
        asked.append(Path(path))
        return SimpleNamespace(free=10)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    device.require_disk(10, tmp_path / "not" / "yet", "writing")
    monkeypatch.chdir(tmp_path)
    device.require_disk(10, Path("relative/one"), "writing")
    assert [path.resolve() for path in asked] == [tmp_path.resolve()] * 2
    (tmp_path / "mounted").mkdir()
    device.require_disk(10, tmp_path / "mounted", "writing")
    assert asked[-1] == tmp_path / "mounted"


@pytest.mark.parametrize("name", ["gpu", "cuda:x"])
def test_unknown_device_name_is_a_usage_error(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("MPSEARCH_DEVICE", name)
    with pytest.raises(UsageError, match=name):
        device.pick_device()


# --------------------------------------------------------------------------- the GPU here


def fake_driver(monkeypatch: pytest.MonkeyPatch, *answers: str) -> list[list[str]]:
    """Let `nvidia-smi` answer these lines in turn, and torch use a GPU that is the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 20 * 2**20)
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, dtype, device: ones(*size, dtype=dtype))
    asked, left = [], iter(answers)

    def run(command: list[str], **_: object) -> SimpleNamespace:
        asked.append(command)
        return SimpleNamespace(stdout=next(left) + "\n")

    monkeypatch.setattr(device.subprocess, "run", run)
    return asked


def test_a_context_is_what_the_driver_counts_beside_the_allocator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    asked = fake_driver(monkeypatch, "NVIDIA X, 12288, 11988", "NVIDIA X, 12288, 11538")
    found = device.measure_this_device()
    assert found.name == "NVIDIA X"
    assert found.memory_bytes == 12288 * 2**20
    assert found.other_bytes == 300 * 2**20
    assert found.context_bytes == (750 - 300 - 20) * 2**20
    assert "--id=2" in asked[0]


@pytest.mark.parametrize("answer", ["", "NVIDIA X", "NVIDIA X, [N/A], 300"])
def test_a_driver_that_says_something_else_is_one_line(
    answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_driver(monkeypatch, answer)
    with pytest.raises(UsageError, match="nvidia-smi does not say how much memory"):
        device.measure_this_device()


_KEPT = """
import torch
from mpsearch.device import return_freed_memory, used_memory_bytes

cpu = torch.device("cpu")
before = used_memory_bytes(cpu)
for _ in range(3):  # freed at once, they teach glibc to take such sizes from its heap
    torch.ones(30 * 2**18)
held = [torch.ones(2**18) for _ in range(300)]
last = held.pop()
del held
freed = used_memory_bytes(cpu) - before
return_freed_memory(cpu)
print(freed // 2**20, (used_memory_bytes(cpu) - before) // 2**20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are not asked")
def test_freed_memory_is_handed_back() -> None:
    done = subprocess.run([sys.executable, "-c", _KEPT], capture_output=True, text=True, check=True)
    freed, handed_back = map(int, done.stdout.split())
    assert freed > 200  # what glibc keeps of 300 MiB
    assert handed_back < 50
