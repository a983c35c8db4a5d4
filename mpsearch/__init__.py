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
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mpsearch.assignment import Assignment as Assignment
    from mpsearch.bank import Bank as Bank
    from mpsearch.errors import MpsearchError as MpsearchError
    from mpsearch.export import export as export
    from mpsearch.facts import Fact as Fact
    from mpsearch.facts import FactSet as FactSet
    from mpsearch.formats import Format as Format
    from mpsearch.layers import Layer as Layer
    from mpsearch.layers import LayerGroup as LayerGroup
    from mpsearch.measures import Sensitivity as Sensitivity
    from mpsearch.models import Model as Model
    from mpsearch.opening import load_model as load_model
    from mpsearch.plot import plot as plot
    from mpsearch.points import ParetoFront as ParetoFront
    from mpsearch.recall import RecallProxy as RecallProxy
    from mpsearch.refine import refine as refine
    from mpsearch.run import Run as Run
    from mpsearch.samplers import LevelSwitchSampler as LevelSwitchSampler
    from mpsearch.search import search as search
    from mpsearch.sensitivity import measure_sensitivity as measure_sensitivity
    from mpsearch.space import SearchSpace as SearchSpace
    from mpsearch.verify import verify as verify

# The same, resolved when first used, so that importing the package does not import torch.
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
