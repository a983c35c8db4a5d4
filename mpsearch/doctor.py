"""What this machine has, and what mpsearch can use of it."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil

from mpsearch.device import available_memory_bytes, compute_dtype, pick_device
from mpsearch.files import home
from mpsearch.hub import BUILTIN_NAME
from mpsearch.sizes import format_size

_LIBRARIES = {
    "torch": "arithmetic",
    "transformers": "models and tokenizers",
    "optuna": "the study",
    "compressed-tensors": "integers of 2 to 8 bits, fp8, exports",
    "gguf": f"reading {BUILTIN_NAME}",
    "gptqmodel": "quantizer gptq; pip install --no-build-isolation gptqmodel==7.6.0",
    "hqq": "quantizer hqq; pip install --no-build-isolation hqq",
    "bitsandbytes": "formats nf4, fp4 and int8; pip install 'mpsearch[bitsandbytes]'",
}


def examine() -> list[tuple[str, str, str]]:
    """(what, found, what for) for everything that decides what can be done here."""
    device = pick_device()
    dtype = str(compute_dtype(device)).removeprefix("torch.")
    existing = next(path for path in (home(), *home().absolute().parents) if path.exists())
    findings = [
        ("python", platform.python_version(), "3.10 or later"),
        ("device", f"{device}, {dtype}", "where and in what precision forwards run"),
        ("memory", format_size(available_memory_bytes(device)), "available now"),
        ("home", str(home()), "prepared models and the weight bank; set MPSEARCH_HOME"),
        ("disk", format_size(shutil.disk_usage(existing).free), "free at home"),
    ]
    for name, use in _LIBRARIES.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found = "missing"
        findings.append((name, found, use))
    return findings
