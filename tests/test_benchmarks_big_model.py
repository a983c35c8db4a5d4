"""A model that memory does not hold is searched all the same: the benchmark, and a small proof."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import big_model

from mpsearch.facts import FactSet
from mpsearch.shards import Shards
from mpsearch.skeleton import load_skeleton

TINY = {**big_model.SIZES, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
NARROW = {**TINY, "hidden_size": 512, "intermediate_size": 1536}


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path) -> Path:
    monkeypatch.setenv("MPSEARCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(big_model, "builtin_folder", lambda: tiny_folder)
    return tmp_path


def test_every_stage_is_done_and_told(
    made: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny_facts: FactSet,
) -> None:
    written = big_model.write_model(made / "model", 0.001, TINY)
    assert written["weights_bytes"] == pytest.approx(1e6, rel=0.05)
    shards = Shards(made / "model", "written")
    assert len(shards.files) == written["blocks"] + 1
    assert sum(shards[name].nbytes for name in shards) == written["weights_bytes"]
    asked = []

    def load_model(folder: str, **how: Any) -> Any:
        asked.append(how)
        return load_skeleton(folder)

    monkeypatch.setattr(big_model.mps, "load_model", load_model)
    monkeypatch.setattr(big_model.FactSet, "builtin", lambda: tiny_facts)
    rows = [
        {"stage": stage, "done": True, **big_model.run_stage(stage, made, 4, 2**30)}
        for stage in big_model.STAGES
    ]
    assert [how["job"] for how in asked] == ["bank", "sensitivity", "search", "export"]
    assert all(how["memory_limit_bytes"] == 2**30 for how in asked)
    loaded, bank, sensitivity, evaluate, export = rows
    assert not loaded["streamed"] and loaded["read_bytes"] == 0
    # Opening reads all of it, and so does quantizing; the bank's codes are read in its place then.
    assert bank["read_bytes"] > 1.9 * written["weights_bytes"]
    assert bank["files"] == written["blocks"] * 7 * 2 and sensitivity["pairs"] % 2 == 0
    assert len(evaluate["evaluations"]) == 10
    assert all(said["kl_nats"] > 0 for said in evaluate["evaluations"].values())
    assert export["predicted_bytes"] == export["stored_bytes"] < written["weights_bytes"]
    assert sum(export["layers_in"].values()) == written["blocks"] * 7
    assert not big_model.proven(rows)  # it could be loaded
    refused = {"stage": "loaded", "done": False, "error": "no room"}
    assert big_model.proven([refused, *rows[1:]])
    assert not big_model.proven([refused, *rows[1:-1]])
    big_model.show({**written, "limit": "none", "limit_bytes": 2**30, "rows": [refused, *rows[1:]]})
    shown = capsys.readouterr().out
    assert "| loaded | no: no room |" in shown and "| export | yes |" in shown


PROOF = """
import json, resource, sys
limit = int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
import torch
torch.set_num_threads(1)
import mpsearch as mps
from mpsearch.models import load_whole
from mpsearch.quantizers.rounding import Rounding

said = {}
try:
    load_whole(sys.argv[1])
except (mps.MpsearchError, MemoryError, RuntimeError) as error:
    said["loaded"] = str(error)
model = mps.load_model(sys.argv[1], memory_limit_bytes=limit)
said["streamed"] = model.streamed
space = mps.SearchSpace.parse(
    "version: 1\\ntarget: compressed-tensors\\nformats: [fp8, bf16]\\n", "proof"
).resolve(model)
bank = mps.Bank(model, Rounding())
formats = {group: [fmt.name for fmt in of if fmt.quantized] for group, of in space.options.items()}
chosen = [mps.Assignment.of({group: of[0] for group, of in formats.items()})]
chosen.append(mps.Assignment.of(
    {group: "bf16" if number % 2 else of[0] for number, (group, of) in enumerate(formats.items())}
))
from mpsearch.evaluate import Bench, quantized_layers
bank.build(quantized_layers(space, chosen[0]))
facts = mps.FactSet.load(sys.argv[2])
proxy = mps.RecallProxy(model, facts, facts.part("search")[:8], contrast=False)
with Bench(space, bank) as bench:
    said["kl_nats"] = [found.kl.mean for found in bench.evaluate_all(chosen, proxy)]
print(json.dumps(said))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels limit no private memory")
def test_a_model_beyond_the_limit_is_quantized_and_evaluated(made: Path, facts_file: Path) -> None:
    written = big_model.write_model(made / "model", 0.4, NARROW)
    said = _under(650 * 2**20, made / "model", facts_file)
    assert written["weights_bytes"] > 0.39e9
    assert "memory ran out" in said["loaded"]
    assert said["streamed"]
    assert min(said["kl_nats"]) > 0 and len(said["kl_nats"]) == 2


def _under(limit_bytes: int, *arguments: object) -> Mapping[str, Any]:
    """What the proof says, in a process of at most so much private memory."""
    done = subprocess.run(
        [sys.executable, "-c", PROOF, *map(str, arguments), str(limit_bytes)],
        capture_output=True, text=True, env={**os.environ, **big_model._ENVIRONMENT}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))
