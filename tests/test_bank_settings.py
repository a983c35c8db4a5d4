"""Which bank: its folder is made of what decided its content, and settings find it again."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from banks import INT2, Calibrated, Counting
from conftest import build_tokenizer, tiny_llama

from mpsearch.bank import Bank
from mpsearch.calibration import Calibration
from mpsearch.errors import RunError
from mpsearch.models import Model, from_module
from mpsearch.quantizers.rounding import Rounding


@pytest.fixture
def other_model() -> Model:
    tokenizer = build_tokenizer()
    module = tiny_llama(len(tokenizer), seed=9)
    return from_module("other", Path(), module, tokenizer, torch.device("cpu"), torch.float32)


def test_models_quantizers_and_calibrations_do_not_share_a_folder(
    tiny: Model, other_model: Model, tmp_path: Path
) -> None:
    class Newer(Rounding):
        @property
        def settings(self) -> Mapping[str, str]:
            return {"compressed-tensors": "99"}

    banks = [
        Bank(tiny, Rounding(), root=tmp_path),
        Bank(other_model, Rounding(), root=tmp_path),
        Bank(tiny, Newer(), root=tmp_path),
        Bank(tiny, Counting(), root=tmp_path),
        Bank(tiny, Calibrated(), Calibration(seed=0), root=tmp_path),
        Bank(tiny, Calibrated(), Calibration(seed=1), root=tmp_path),
        Bank(tiny, Calibrated(), Calibration(length=7), root=tmp_path),
    ]
    assert len({bank.folder for bank in banks}) == len(banks)


def test_calibration_does_not_matter_to_a_quantizer_that_needs_none(
    tiny: Model, tmp_path: Path
) -> None:
    one, two = (Bank(tiny, Rounding(), Calibration(seed=s), tmp_path) for s in (0, 1))
    assert one.folder == two.folder
    assert "calibration" not in one.settings


def test_what_layers_read_follows_from_the_config_too(tiny: Model, tmp_path: Path) -> None:
    config = json.loads((tiny.folder / "config.json").read_text(encoding="utf-8"))
    for name, changes in (
        ("as", {"dtype": "no", "eos_token_id": 3}),
        ("other", {"rms_norm_eps": 0.1}),
    ):
        (tmp_path / name).mkdir()
        text = json.dumps({**config, **changes})
        (tmp_path / name / "config.json").write_text(text, encoding="utf-8")
    alike, other = (replace(tiny, folder=tmp_path / name) for name in ("as", "other"))
    calibrated = [Bank(model, Calibrated(), root=tmp_path) for model in (tiny, alike, other)]
    assert calibrated[0].folder == calibrated[1].folder != calibrated[2].folder
    assert calibrated[0].settings == calibrated[2].settings  # which older runs have, too
    rounded = {Bank(model, Rounding(), root=tmp_path).folder for model in (tiny, alike, other)}
    assert len(rounded) == 1


def test_files_stay_inside_the_bank_whatever_a_layer_is_called(tiny: Model, tmp_path: Path) -> None:
    bank = Bank(tiny, Rounding(), root=tmp_path)
    for name in ("../../up", "/absolute", "a/b", "..", "nul\0", "weiß"):
        assert bank.path(name, INT2).parent == bank.folder
        assert re.fullmatch(r"[A-Za-z0-9_.-]+", bank.path(name, INT2).name)


def test_banks_lie_under_the_home_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, tiny: Model, tmp_path: Path
) -> None:
    monkeypatch.setenv("MPSEARCH_HOME", str(tmp_path))
    assert (tmp_path / "bank") in Bank(tiny, Rounding()).folder.parents


@pytest.mark.parametrize(
    ("name", "library"), [("rounding", "compressed_tensors"), ("gptq", "gptqmodel")]
)
def test_settings_written_as_json_find_the_same_bank_again(
    tiny: Model, name: str, library: str
) -> None:
    pytest.importorskip(library)
    from mpsearch.quantizers import get_quantizer

    bank = Bank(tiny, get_quantizer(name, "compressed-tensors"), Calibration(3, 17, seed=5))
    found = Bank.of(tiny, json.loads(json.dumps(bank.settings)))
    assert found.folder == bank.folder
    assert found.settings == bank.settings
    assert (found.calibration == bank.calibration) == (name == "gptq")


def test_settings_of_another_version_are_refused_with_both(tiny: Model) -> None:
    old = {**Bank(tiny, Rounding()).settings, "compressed-tensors": "0.1"}
    with pytest.raises(RunError, match=r'"0\.1".*install the same versions') as caught:
        Bank.of(tiny, old)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(
            {"quantizer": "awq", "awq": "1"},
            id="unknown-quantizer",
        ),
        pytest.param(
            {"quantizer": "rounding", "calibration": {"text": "wikitext", "rows": 5}},
            id="unknown-calibration",
        ),
        pytest.param({"quantizer": "rounding"}, id="no-version"),
        pytest.param(
            {"quantizer": "rounding", "compressed-tensors": "0.20.0", "new": 1},
            id="unknown-setting",
        ),
    ],
)
def test_settings_that_this_installation_does_not_know_are_refused(
    tiny: Model, settings: dict[str, object]
) -> None:
    with pytest.raises(RunError):
        Bank.of(tiny, settings)
