"""mpsearch: how many bits each layer of a language model should get.

import mpsearch as mps
model = mps.load_model("builtin:smollm2-135m")
space = mps.SearchSpace.load("search_spaces/compressed_tensors.yaml").resolve(model)
run = mps.search(model, space, budget="104 MiB", trials=100, seed=0, out="runs/smollm2")
pick = run.front().best(max_bytes="104 MiB")
mps.export(model, pick.assignment, run=run, out="exports/smollm2-mixed")
assert mps.verify("exports/smollm2-mixed").passed
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

# Resolved when first used, so that importing the package does not import torch.
_HOME = {
    "Assignment": "assignment",
    "Bank": "bank",
    "Fact": "facts",
    "FactSet": "facts",
    "Format": "formats",
    "Layer": "layers",
    "LayerGroup": "layers",
    "LevelSwitchSampler": "samplers",
    "Model": "models",
    "MpsearchError": "errors",
    "ParetoFront": "points",
    "RecallProxy": "recall",
    "Run": "run",
    "SearchSpace": "space",
    "Sensitivity": "measures",
    "export": "export",
    "load_model": "opening",
    "measure_sensitivity": "sensitivity",
    "plot": "plot",
    "refine": "refine",
    "search": "search",
    "verify": "verify",
}
__all__ = ["__version__", *_HOME]


class _Package(ModuleType):
    """Keeps `mps.search` the function, although a submodule has the same name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mpsearch' has no attribute '{name}'")
    return getattr(import_module(f"mpsearch.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
