"""vLLM's own tables beside the target's: a scheme for every format, and a kernel where it says so.

Its CUDA kernels are not run: the functions that choose one are asked as if a card were there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from vllm.model_executor.kernels.linear import MPLinearLayerConfig, choose_mp_linear_kernel
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability, PlatformEnum

FORMATS = json.loads((Path(__file__).parents[1] / "build/vllm/formats.json").read_text())
ROWS, COLUMNS = 1536, 1536
TURING, AMPERE, ADA, HOPPER, BLACKWELL = (7, 5), (8, 6), (8, 9), (9, 0), (12, 0)

each_format = pytest.mark.parametrize("name", FORMATS)


@contextmanager
def on_card(*capability: int) -> Iterator[None]:
    """vLLM takes this machine for one with an NVIDIA card of that compute capability."""
    card = DeviceCapability(*capability)
    with (
        patch.object(current_platform, "_enum", PlatformEnum.CUDA),
        patch.object(type(current_platform), "get_device_capability", lambda *_, **__: card),
    ):
        yield


def scheme(name: str) -> Any:
    """What vLLM makes of a config.json with that format."""
    group = {"targets": ["Linear"], **FORMATS[name]}
    config = CompressedTensorsConfig.from_config(
        {"config_groups": {name: group}, "format": "mixed-precision", "ignore": []}
    )
    return config.get_scheme(torch.nn.Linear(COLUMNS, ROWS), "model.layers.0.mlp.down_proj")


def kernel(name: str) -> str:
    """The kernel that vLLM would choose here for a bf16 model."""
    found = scheme(name)
    shape = (COLUMNS, ROWS)
    config = MPLinearLayerConfig(
        shape, shape, found.quant_type, torch.bfloat16, found.group_size, not found.symmetric
    )
    return str(choose_mp_linear_kernel(config).__name__)


@each_format
def test_it_has_a_scheme_for_weights_alone(name: str) -> None:
    assert type(scheme(name)).__name__ == "CompressedTensorsWNA16"


@each_format
@pytest.mark.parametrize("capability", [TURING, AMPERE, ADA, HOPPER, BLACKWELL])
def test_it_has_a_kernel_on_every_card_since_turing(name: str, capability: tuple[int, int]) -> None:
    with on_card(*capability):
        chosen = kernel(name)
    hoppers_own = capability == HOPPER and not name.endswith("-g32")
    assert chosen == ("MacheteLinearKernel" if hoppers_own else "MarlinLinearKernel")


@each_format
def test_its_cpu_build_takes_four_bits_alone(name: str) -> None:
    if FORMATS[name]["weights"]["num_bits"] == 4:
        assert kernel(name) == "CPUWNA16LinearKernel"
    else:
        with pytest.raises(ValueError, match="Failed to find a kernel"):
            kernel(name)
