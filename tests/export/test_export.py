"""The folder of an export: whole or not there, never over another, split where it is large."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import mpsearch as mps
from mpsearch.errors import CheckError, ResourceError, RunError, UsageError
from mpsearch.export import check_writable
from mpsearch.export.reload import load_any
from mpsearch.manifest import faults, read_manifest
from mpsearch.models import Model, load_whole
from mpsearch.run import Run
from mpsearch.space import ResolvedSpace


def test_the_folder_holds_all_that_serving_and_checking_it_takes(
    tiny: Model, tiny_folder: Path, tiny_space: ResolvedSpace, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_folder, tmp_path / "base"))
    (base / "LICENSE.txt").write_text("do as you like")
    (base / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (base / "LICENSES").mkdir()
    (base / "LICENSES" / "MIT.txt").write_text("as is")
    (base / "NOTICE").write_text("made by others")
    model = load_whole(str(base))
    out = mps.export(model, tiny_space.smallest, out=tmp_path / "export", space=tiny_space)
    assert {path.name for path in out.iterdir()} >= {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"),
        *("tokenizer_config.json", "README.md", "formats.png", "mpsearch.json", "LICENSE.txt"),
        "chat_template.jinja",
    }
    assert (out / "LICENSE.txt").read_text() == "do as you like"
    assert (out / "chat_template.jinja").read_text() == "{{ messages[0].content }}"
    assert (out / "additional_chat_templates" / "tools.jinja").read_text() == "{{ tools }}"
    assert (out / "LICENSES" / "MIT.txt").read_text() == "as is"
    assert (out / "NOTICE").read_text() == "made by others"
    assert (out / "formats.png").read_bytes().startswith(b"\x89PNG")
    assert faults(out, read_manifest(out)) == []
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_weights_above_the_limit_are_split_and_load_the_same(
    tiny: Model, tiny_space: ResolvedSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = mps.export(tiny, tiny_space.smallest, out=tmp_path / "one", space=tiny_space)
    monkeypatch.setattr(sys.modules["mpsearch.export.checkpoint"], "SHARD_BYTES", 9_000)
    many = mps.export(tiny, tiny_space.smallest, out=tmp_path / "many", space=tiny_space)
    shards = sorted(many.glob("*.safetensors"))
    assert len(shards) > 2 and shards[0].name.startswith("model-00001-of-")
    index = json.loads((many / "model.safetensors.index.json").read_text())
    whole = load_file(one / "model.safetensors")
    assert set(index["weight_map"]) == set(whole)
    assert {name for shard in shards for name in load_file(shard)} == set(whole)
    for name, shard in index["weight_map"].items():
        assert torch.equal(load_file(many / shard)[name], whole[name])
    assert {shard.stat().st_mode & 0o777 for shard in shards} == {0o644}
    a, b = load_any(str(one)), load_any(str(many))
    assert a.fingerprint == b.fingerprint
    shards[1].unlink()
    assert faults(many, read_manifest(many)) == [f"'{shards[1].name}' is missing"]


def test_an_earlier_export_is_replaced_only_when_asked_and_when_the_new_one_is_whole(
    tiny: Model, tiny_space: ResolvedSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "export"
    mps.export(tiny, tiny_space.smallest, out=out, space=tiny_space)
    before = read_manifest(out)
    with pytest.raises(RunError, match="say --overwrite to replace it"):
        mps.export(tiny, tiny_space.largest, out=out, space=tiny_space)
    with monkeypatch.context() as patch:
        patch.setattr(
            sys.modules["mpsearch.export"], "model_card", lambda *_: (_ for _ in ()).throw(OSError)
        )
        with pytest.raises(OSError):
            mps.export(tiny, tiny_space.largest, out=out, space=tiny_space, overwrite=True)
    assert read_manifest(out) == before and faults(out, before) == []
    mps.export(tiny, tiny_space.largest, out=out, space=tiny_space, overwrite=True)
    assert read_manifest(out)["assignment_id"] == tiny_space.largest.id
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_folder_that_is_no_export_is_never_replaced(
    tiny: Model, tiny_space: ResolvedSpace, tmp_path: Path
) -> None:
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(RunError, match="was not written by mpsearch export"):
        mps.export(tiny, tiny_space.smallest, out=tmp_path, space=tiny_space, overwrite=True)
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_place_that_is_no_folder_is_refused_before_any_work(
    tiny: Model, tiny_space: ResolvedSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["mpsearch.export"], "Bank", lambda *_: pytest.fail("worked"))
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="file' is no folder"):
        mps.export(tiny, tiny_space.smallest, out=tmp_path / "file" / "a" / "b", space=tiny_space)


def test_what_its_owner_put_into_an_export_is_never_replaced(
    tiny: Model, tiny_space: ResolvedSpace, tmp_path: Path
) -> None:
    out = mps.export(tiny, tiny_space.smallest, out=tmp_path / "export", space=tiny_space)
    (out / "thesis").mkdir()
    (out / "thesis" / "one.tex").write_text("mine")
    with pytest.raises(RunError, match=r"'thesis/one\.tex' .* was not written by mpsearch export"):
        mps.export(tiny, tiny_space.smallest, out=out, space=tiny_space, overwrite=True)
    assert (out / "thesis" / "one.tex").read_text() == "mine"


def test_a_point_of_another_model_is_refused(whole: Path, tiny: Model, tmp_path: Path) -> None:
    run = Run.open(whole)
    other = replace(tiny, fingerprint="0" * 64)
    with pytest.raises(RunError, match="is not the model that"):
        mps.export(other, run.find("best").assignment, out=tmp_path / "export", run=run)
    assert list(tmp_path.iterdir()) == []


def test_codes_that_are_made_again_are_said_and_refused_where_they_would_be_others(
    whole: Path, tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    run = Run.open(whole)
    point = run.find("best")
    monkeypatch.setenv("MPSEARCH_HOME", str(tmp_path / "elsewhere"))
    mps.export(tiny, point.assignment, out=tmp_path / "export", run=run)
    (said,) = caplog.messages
    assert "no longer in the weight bank" in said and "'mpsearch verify' says" in said
    caplog.clear()
    mps.export(tiny, point.assignment, out=tmp_path / "again", run=run)
    assert not caplog.messages
    calibrated = SimpleNamespace(quantizer=SimpleNamespace(calibrated=True, name="q"), folder="b")
    exports = sys.modules["mpsearch.export"]
    exports._check_codes(run, tiny, calibrated, 3)
    run.content["question"]["dtype"] = "torch.float16"
    with pytest.raises(RunError, match=r"q would make other codes in torch\.\w+ than .*float16"):
        exports._check_codes(run, tiny, calibrated, 3)


def test_a_model_that_no_point_can_be_written_for_is_told_beforehand(tiny: Model) -> None:
    check_writable(tiny, "gptq")
    with pytest.raises(UsageError, match="tokenizer"):
        check_writable(tiny, "gguf")


def test_a_small_disk_is_refused_before_anything_is_written(
    tiny: Model, tiny_space: ResolvedSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ResourceError, match="the export needs about"):
        mps.export(tiny, tiny_space.smallest, out=tmp_path / "out", space=tiny_space)
    assert list(tmp_path.iterdir()) == []


def test_another_size_than_was_predicted_is_our_fault_and_no_export(
    tiny: Model, tiny_space: ResolvedSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["mpsearch.export"], "tensor_bytes", lambda folder: 7)
    with pytest.raises(CheckError, match="holds 7 bytes of tensors and"):
        mps.export(tiny, tiny_space.smallest, out=tmp_path / "out", space=tiny_space)
    assert list(tmp_path.iterdir()) == []
