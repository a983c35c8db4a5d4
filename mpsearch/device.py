"""The one place that knows devices, memory and disk.

CPU is what this project is tested on at every change. The CUDA branch ran on one H200
(`tests/test_gpu.py`); several GPUs and MPS are not verified.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.errors import ResourceError, UsageError
from mpsearch.sizes import format_size
from mpsearch.this_device import ThisDevice


def pick_device() -> torch.device:
    """CUDA, then Apple's MPS, then the CPU; `MPSEARCH_DEVICE` overrides."""
    return pick_devices()[0]


def pick_devices() -> tuple[torch.device, ...]:
    """All that blocks of a loaded model may lie on, the one of `pick_device` first.

    Those that `MPSEARCH_DEVICE` names, with commas between them, or every CUDA device.

    Raises:
        UsageError: it names something else.
    """
    if wanted := os.environ.get("MPSEARCH_DEVICE"):
        try:
            devices = tuple(torch.device(name.strip()) for name in wanted.split(","))
            if not all(map(_is_here, devices)):
                raise RuntimeError
        except RuntimeError:
            raise UsageError(
                f"MPSEARCH_DEVICE '{wanted}' is no device here; use cpu, cuda:0, or cuda:0,cuda:1 "
                "where there are such"
            ) from None
        return devices
    if torch.cuda.is_available():
        others = (torch.device("cuda", number) for number in range(1, torch.cuda.device_count()))
        return (torch.device("cuda"), *others)
    return (torch.device("mps" if torch.backends.mps.is_available() else "cpu"),)


def _is_here(device: torch.device) -> bool:
    """Whether torch has it."""
    if device.type == "mps":
        return torch.backends.mps.is_available()
    if device.type == "cuda":
        return torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
    return True


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


# Tokens of a row. Attention is computed between all of them, most of which do not see each other;
# smaller rows repeat more beginnings, and leave a GPU waiting for its next kernel.
CPU_ROW_TOKENS = 256
GPU_ROW_TOKENS = 512


def row_tokens(device: torch.device) -> int:
    """How many tokens run through a model at once, where they need not be fewer."""
    return GPU_ROW_TOKENS if device.type == "cuda" else CPU_ROW_TOKENS


def spread(block_bytes: Sequence[int], free_bytes: Sequence[int]) -> list[int]:
    """Which device each block of a model goes to.

    Each device gets blocks that follow each other, in the devices' order, so that the one that is
    fullest, for what is free on it, is as little full as can be, to a thousandth.

    Args:
        block_bytes: of each block, in order.
        free_bytes: of each device.
    Returns:
        For each block the index of its device.
    Raises:
        ResourceError: they do not fit so.
    """

    def filled(thousandths: int) -> list[int]:
        found, device, used_bytes = list[int](), 0, 0
        for size_bytes in block_bytes:
            while 1000 * (used_bytes + size_bytes) > thousandths * free_bytes[device]:
                device, used_bytes = device + 1, 0
                if device == len(free_bytes):
                    return []
            found.append(device)
            used_bytes += size_bytes
        return found

    for thousandths in range(1001):
        if len(found := filled(thousandths)) == len(block_bytes):
            return found
    free = " + ".join(map(format_size, free_bytes))
    raise ResourceError(
        f"the model's blocks take {format_size(sum(block_bytes))} and {free} is free on its "
        "devices; close other programs, name more devices, or use a smaller model"
    )


def place_blocks(
    module: nn.Module, blocks: Sequence[nn.Module], devices: Sequence[torch.device]
) -> None:
    """Put a model's blocks on several devices, and everything else on the first.

    Norm and head are there, too: tokens, what is read of states, and logits so are all on one
    device, and a tied head is where its embedding is. A block takes to its own device whatever it
    is called with, and the last one hands back its output to the first device. Not verified on
    several GPUs.

    Raises:
        ResourceError: the blocks do not fit.
    """
    sizes_bytes = [_bytes(block) for block in blocks]
    free_bytes = [available_memory_bytes(device) for device in devices]
    free_bytes[0] = max(0, free_bytes[0] - (_bytes(module) - sum(sizes_bytes)))
    device_of = [devices[index] for index in spread(sizes_bytes, free_bytes)]
    inside = {id(child) for block in blocks for child in block.modules()}
    for child in module.modules():
        if id(child) not in inside:
            child._apply(  # type: ignore[no-untyped-call]  # torch's own has no types
                lambda tensor: tensor.to(devices[0]), recurse=False
            )
    for block, device in zip(blocks, device_of, strict=True):
        block.to(device)
        block.register_forward_pre_hook(_moves_in(device), with_kwargs=True)
    blocks[-1].register_forward_hook(lambda block, args, output: moved(output, devices[0]))


def _moves_in(device: torch.device) -> Any:
    def hook(block: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return moved(args, device), moved(kwargs, device)

    return hook


def moved(value: Any, device: torch.device) -> Any:
    """With every tensor in it, tuples, lists and mappings included, on a device.

    What is there already is not copied.
    """
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(moved(part, device) for part in value)
    if type(value) is dict:
        return {key: moved(part, device) for key, part in value.items()}
    return value


def _bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


# Where the two versions of control groups say limit, use, and what of it can be reclaimed. In the
# first a number beyond any memory stands for no limit.
_CONTAINERS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    (
        "/sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)

_limit_bytes: int | None = None


def limit_memory(limit_bytes: int | None) -> None:
    """Let this process count on so much memory at most, from now on; None for all that there is.

    Of a GPU's memory if it computes on one, else of its own. Nothing stops at the limit by itself:
    every cache takes a share of `available_memory_bytes`, and what does not fit is refused.

    Raises:
        UsageError: it is not above zero.
    """
    global _limit_bytes
    if limit_bytes is not None and limit_bytes <= 0:
        raise UsageError(f"memory limit {limit_bytes} is no size; give bytes above 0")
    _limit_bytes = limit_bytes


def memory_limit() -> int | None:
    """What `limit_memory` was last given, in bytes."""
    return _limit_bytes


def available_memory_bytes(device: torch.device) -> int:
    """Memory that a new allocation can use now, never below zero.

    Of the GPU; or of this machine, its container, and what limits this process (`ulimit -v`,
    `ulimit -d`); or what `limit_memory` leaves beside what this process has.
    """
    there_is = [_of_gpu(device)] if device.type == "cuda" else _of_this_machine()
    if _limit_bytes is not None:
        there_is.append(_limit_bytes - used_memory_bytes(device))
    return max(0, min(there_is))


def used_memory_bytes(device: torch.device) -> int:
    """What this process has: reserved on the GPU, else resident, mapped files included."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    pages = " ".join(_lines(Path("/proc/self/statm"))).split()[1:2]
    # Where the kernel does not say, it has at some time been as large as at most now.
    return int(pages[0]) * os.sysconf("SC_PAGE_SIZE") if pages else peak_memory_bytes()


def return_freed_memory(device: torch.device) -> None:
    """Hand memory that was freed back to the system: allocators keep it, often in pieces.

    What runs next may be refused without, as kept memory counts as used.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:  # glibc's
        trim(0)


def _of_gpu(device: torch.device) -> int:
    return int(torch.cuda.mem_get_info(device)[0])


def _of_this_machine() -> list[int]:
    """What is left under each bound that there is."""
    found = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    meminfo = _fields(Path("/proc/meminfo"))
    if "MemAvailable" in meminfo:  # counts reclaimable page cache, which sysconf does not
        found = [meminfo["MemAvailable"] * 1024]
    for folder, limit, used, inactive in _CONTAINERS:
        said = [" ".join(_lines(Path(f"{folder}/{name}"))) for name in (limit, used)]
        if all(text.isdecimal() for text in said):
            # The container's page cache counts as used, and is given back when needed.
            reclaimable = _fields(Path(f"{folder}/memory.stat")).get(inactive, 0)
            found.append(int(said[0]) - int(said[1]) + reclaimable)
    return found + _of_this_process()


def _of_this_process() -> list[int]:
    """What soft limits of address space and of data leave."""
    import resource

    status = _fields(Path("/proc/self/status"))
    found = []
    for which, field in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        soft, _ = resource.getrlimit(which)
        if soft != resource.RLIM_INFINITY and field in status:
            found.append(soft - status[field] * 1024)
    return found


def _fields(path: Path) -> dict[str, int]:
    """The numbers in lines such as `VmSize:  4096 kB`, by what stands before them."""
    words = [line.replace(":", " ").split() for line in _lines(path)]
    return {line[0]: int(line[1]) for line in words if len(line) > 1 and line[1].isdecimal()}


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def require_memory(needed_bytes: int, device: torch.device, what: str) -> None:
    """Raise `ResourceError` before work starts if the device cannot hold it."""
    if (available := available_memory_bytes(device)) >= needed_bytes:
        return
    where = f"available on {device.type}"
    way_out = "close other programs or use a smaller model"
    if _limit_bytes is not None:
        where = f"left of the limit of {format_size(_limit_bytes)}"
        way_out = "give a larger --memory-limit, or none"
    raise ResourceError(
        f"{what} needs about {format_size(needed_bytes)} of memory and {format_size(available)} is "
        f"{where}; {way_out}"
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

    # A new process inherits the other counter from the one that started it.
    if peak := _fields(Path("/proc/self/status")).get("VmHWM"):
        return peak * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
