"""What every export writes beside the quantized layers."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig

from mpsearch.export.checkpoint import readable_by_transformers_4

PLAIN = {"rope_type": "default", "rope_theta": 5e5}
SCALED = {
    **{"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0},
    **{"high_freq_factor": 4.0, "original_max_position_embeddings": 256},
}


def test_rotary_settings_stand_where_transformers_4_reads_them() -> None:
    found = readable_by_transformers_4({"hidden_size": 8, "rope_parameters": PLAIN})
    assert found == {"hidden_size": 8, "rope_parameters": PLAIN, "rope_theta": 5e5}
    found = readable_by_transformers_4({"rope_parameters": SCALED})
    assert found["rope_theta"] == 5e5
    assert found["rope_scaling"] == {k: v for k, v in SCALED.items() if k != "rope_theta"}
    found = readable_by_transformers_4({"rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}})
    assert found["partial_rotary_factor"] == 0.5


@pytest.mark.parametrize("rotary", [PLAIN, SCALED])
def test_transformers_5_reads_the_same_from_both_places(rotary: dict[str, Any]) -> None:
    config = LlamaConfig(rope_parameters=rotary)
    again = LlamaConfig.from_dict(readable_by_transformers_4(config.to_dict()))
    assert again.rope_parameters == config.rope_parameters


@pytest.mark.parametrize(
    "config", [{}, {"rope_parameters": None}, {"rope_parameters": {"full_attention": PLAIN}}]
)
def test_a_model_without_one_rotation_for_all_is_left_alone(config: dict[str, Any]) -> None:
    assert readable_by_transformers_4(config) == config
