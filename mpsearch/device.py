"""The one place that knows devices, memory and disk.

CPU is what this project is tested on. The CUDA and MPS branches are not verified on such devices.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import torch

from mpsearch.errors import ResourceError, UsageError
from mpsearch.sizes import format_size
from mpsearch.this_device import ThisDevice


def pick_device() -> torch.device:
    """CUDA, then Apple's MPS, then the CPU; `MPSEARCH_DEVICE` overrides."""
    if wanted := os.environ.get("MPSEARCH_DEVICE"):
        try:
            return torch.device(wanted)
        except RuntimeError:
            raise UsageError(
                f"MPSEARCH_DEVICE '{wanted}' is no device; use cpu or cuda:0"
            ) from None
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it natively, else float32.

    Weights have bf16 precision either way; this only decides the arithmetic.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if device.type == "cpu":
        # Without these instructions bf16 products are emulated and slower than float32.
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if native else torch.float32
    return torch.float32


def available_memory_bytes(device: torch.device) -> int:
    """Memory that a new allocation can use now: of the GPU, or of this machine or its container."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():  # counts reclaimable page cache, which sysconf does not
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        # The container's page cache counts as used, and is given back when needed.
        fields = dict(line.split() for line in _lines(Path("/sys/fs/cgroup/memory.stat")))
        reclaimable = int(fields.get("inactive_file", 0))
        available = min(available, int(text) - int(used.read_text()) + reclaimable)
    return available


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def require_memory(needed_bytes: int, device: torch.device, what: str) -> None:
    """Raise `ResourceError` before work starts if the device cannot hold it."""
    if (available := available_memory_bytes(device)) < needed_bytes:
        raise ResourceError(
            f"{what} needs about {format_size(needed_bytes)} of memory and "
            f"{format_size(available)} is available on {device.type}; close other programs or use "
            "a smaller model"
        )


def require_disk(needed_bytes: int, folder: Path, what: str) -> None:
    """Raise `ResourceError` before work starts if the file system cannot hold it."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if (free := shutil.disk_usage(existing).free) < needed_bytes:
        raise ResourceError(
            f"{what} needs about {format_size(needed_bytes)} of disk and {format_size(free)} is "
            f"free at '{existing}'; free some space, or set MPSEARCH_HOME or -o to another disk"
        )


def measure_this_device() -> ThisDevice:
    """What the driver says of an NVIDIA GPU before and after a process has begun to use it.

    Source: `nvidia-smi`, whose count of used memory has what no allocator of ours knows.

    Raises:
        UsageError: there is no such GPU here, or the driver's tool cannot be run.
    """
    if not torch.cuda.is_available() or torch.version.cuda is None:
        raise UsageError("torch finds no NVIDIA GPU here; run it on the machine that has one")
    name, memory_bytes, before = _ask_driver()
    square = torch.ones(1024, 1024, dtype=torch.bfloat16, device="cuda")
    (square @ square).sum().item()  # loads the kernels, and takes their workspace
    _, _, after = _ask_driver()
    context_bytes = max(after - before - torch.cuda.memory_reserved(), 0)
    return ThisDevice(name, memory_bytes, before, context_bytes)


def _ask_driver() -> tuple[str, int, int]:
    """Name, memory in all and memory in use, in bytes, of the first visible GPU."""
    index = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    asked = ["nvidia-smi", f"--id={index}", "--query-gpu=name,memory.total,memory.free"]
    try:
        done = subprocess.run(
            [*asked, "--format=csv,noheader,nounits"],
            capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
        name, total, free = done.stdout.splitlines()[0].rsplit(",", 2)
        # Not `memory.used`, which leaves out what the driver keeps for itself.
        return name.strip(), int(total) * 2**20, (int(total) - int(free)) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        raise UsageError(f"nvidia-smi does not say how much memory there is: {error}") from None


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far."""
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
