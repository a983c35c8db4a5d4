"""The loops that the speed benchmark compares with say what the pass says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from recall_speed import Loop, _sequences, cached, padded

from mpsearch.facts import FactSet
from mpsearch.forward import Pass
from mpsearch.models import Model


@pytest.mark.parametrize("loop", [padded, cached])
@pytest.mark.parametrize(("contrast", "shots"), [(True, 3), (False, 2), (True, 0)])
def test_a_loop_says_what_the_pass_says(
    loop: Loop, contrast: bool, shots: int, tiny: Model, tiny_facts: FactSet
) -> None:
    facts = [f for name in tiny_facts.relations for f in tiny_facts.part("search", {name})[:5]]
    groups = _sequences(tiny, tiny_facts, facts, contrast, shots)
    sequences = [sequence for group in groups for sequence in group]
    ours = Pass(tiny, sequences)
    said, tokens = loop(tiny.module, groups, 4)
    # Batches of other shapes round bf16 arithmetic otherwise, where the machine has it.
    atol, rtol = (1e-5, 1e-4) if tiny.dtype == torch.float32 else (0.05, 0.02)
    torch.testing.assert_close(said, ours.run(), atol=atol, rtol=rtol)
    assert tokens >= ours.tokens
