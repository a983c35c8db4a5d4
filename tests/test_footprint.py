"""Memory told by headers: what counts as a block, parts by hand, and that nothing shrinks."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config
from test_skeleton import MODELS, saved
from transformers import AutoModelForCausalLM

from mpsearch.architecture import load_config
from mpsearch.contents import Contents
from mpsearch.footprint import JOBS, PROCESS_BYTES, Job, Way, footprint, held_bytes
from mpsearch.shards import Shards

LOADED, STREAMED = Way(False, 2), Way(True, 2)


def contents_of(folder: Path) -> Contents:
    return Contents.of(Shards(folder, "tiny"), load_config(str(folder)))


@pytest.mark.parametrize("family", MODELS)
def test_weights_are_counted_where_the_model_has_them(tmp_path: Path, family: str) -> None:
    kind, changes = MODELS[family]
    found = contents_of(saved(tmp_path, kind, **changes))  # type: ignore[arg-type]
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(tiny_config(kind, **changes))
    counted: Counter[Any] = Counter()
    for name, parameter in module.named_parameters():
        part = next((word for word in name.split(".") if word.isdigit()), None)
        counted[part] += parameter.numel()
    outside = counted.pop(None)
    # A router's own bias is no parameter.
    assert found.outside == outside
    assert list(found.blocks) == pytest.approx([counted[str(n)] for n in range(2)], abs=4)
    assert found.inside == sum(found.blocks) and found.block == max(found.blocks)
    assert (found.vocabulary, found.hidden) == (71, 64)
    assert found.stored_bytes == 2
    assert found.architecture is not None


def test_experts_stored_one_by_one_are_put_together(tmp_path: Path) -> None:
    found = contents_of(saved(tmp_path, "mixtral"))
    assert found.stacked
    assert found.columns == 128
    assert found.largest_read == 2 * 4 * 128 * 64  # gate and up of four
    assert found.largest_layer == 128 * 64


def test_inputs_that_are_read_together_have_one_gram_matrix(tmp_path: Path) -> None:
    found = contents_of(saved(tmp_path, "llama"))
    # Of query, key and value; output; gate and up; down.
    assert found.squares == 64**2 + 64**2 + 64**2 + 128**2
    assert found.all_squares == 2 * found.squares


def test_a_family_that_is_not_known_is_bounded_by_its_rows(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama")
    known = contents_of(folder)
    unknown = Contents.of(Shards(folder, "tiny"), {"model_type": "strange"})
    assert unknown.architecture is None
    taken = [footprint(c, LOADED, JOBS["ask"])["activations"] for c in (known, unknown)]
    assert 0 < taken[0] <= taken[1] < 4 * taken[0]


@pytest.fixture
def plain() -> Contents:
    """Two blocks of a thousand weights, 500 outside."""
    return Contents(
        outside=500, blocks=(1000, 1000), largest_outside=400, largest_layer=300, columns=20,
        largest_read=300, stacked=False, stored_bytes=2, vocabulary=10, hidden=8, squares=64,
        all_squares=128, rows=100, architecture=None,
    )  # fmt: skip


def test_parts_by_hand(plain: Contents) -> None:
    whole, streamed = (footprint(plain, way, JOBS["ask"]) for way in (LOADED, STREAMED))
    assert whole.stage == streamed.stage == "asking"
    assert whole["process"] == streamed["process"] == PROCESS_BYTES
    assert whole["outside"] == streamed["outside"] == 2 * 500
    assert whole["blocks"] == 2 * 2000
    assert streamed["blocks"] == 2 * 2 * 1000  # one computes, one is read
    assert streamed["reading"] == 0  # as stored
    assert whole["logits"] == 256 * 10 * (4 * 4 + 2)
    assert whole["states"] == 0 < streamed["states"]
    assert streamed.peak_bytes - streamed.least_bytes >= streamed["states"]
    assert held_bytes(plain, LOADED) == PROCESS_BYTES + 2 * 2500
    assert held_bytes(plain, STREAMED) == PROCESS_BYTES + 2 * 500


def test_another_precision_needs_room_to_convert(plain: Contents) -> None:
    streamed = footprint(plain, Way(True, 4), JOBS["ask"])
    assert (streamed["blocks"], streamed["reading"]) == (4 * 2000, 2 * 300)
    single = footprint(replace(plain, stored_bytes=4), Way(True, 4), JOBS["ask"])
    assert single["reading"] == 2 * 300  # through bf16
    whole = footprint(plain, Way(False, 4), Job(()))
    assert (whole.stage, whole["reading"], whole["kept"]) == ("opening", 2 * 2000, 2 * 500)


def test_candidates_take_weights_of_all_blocks_or_of_one(plain: Contents) -> None:
    job = Job(("candidates",))
    whole, streamed = (footprint(plain, way, job) for way in (LOADED, STREAMED))
    assert (whole["candidate"], streamed["candidate"]) == (2 * 2000, 2 * 1000)
    # A quarter of what is beside the model, for the bank's decoded weights.
    beside = whole.least_bytes - held_bytes(plain, LOADED) - whole["decoding"]
    assert whole["cache"] == pytest.approx(beside / 4, abs=2)
    assert streamed["codes"] == 2 * 4 * 1000


def test_calibrated_quantizers_hold_what_layers_read(plain: Contents) -> None:
    rounding, gptq = Job(("quantizing",)), Job(("quantizing",), calibrated=True)
    assert footprint(plain, LOADED, rounding)["grams"] == 0
    assert footprint(plain, LOADED, gptq)["grams"] == 4 * 128
    assert footprint(plain, STREAMED, gptq)["grams"] == 4 * 64
    assert footprint(plain, LOADED, gptq)["process"] > PROCESS_BYTES
    beside = [footprint(plain, LOADED, job)["quantizing"] for job in (rounding, gptq)]
    assert beside == [4 * 300 * 15, 4 * (300 * 15 + 3 * 20**2)]  # GPTQ factors a Gram matrix
    few = replace(rounding, floats=8)
    assert footprint(plain, LOADED, few)["quantizing"] == 4 * 300 * 8
    tables = replace(rounding, tables=True)
    bytes_of = [footprint(plain, LOADED, job)["quantizing"] for job in (rounding, tables)]
    assert bytes_of[1] == bytes_of[0] * 400 // 300


@pytest.mark.parametrize(("stage", "a_weight"), [("sensitivity", 2 * 2), ("slopes", 2 + 4)])
def test_gradients_are_of_a_block_and_of_all_where_there_is_room(
    plain: Contents, stage: str, a_weight: int
) -> None:
    whole, streamed = (footprint(plain, way, Job((stage,))) for way in (LOADED, STREAMED))
    assert whole["gradients"] == streamed["gradients"] == plain.block * a_weight
    assert whole["graph"] == streamed["graph"] > 0
    assert whole["whole"] == (plain.inside - plain.block) * a_weight + whole["graph"]  # of two
    assert streamed["whole"] == 0
    assert whole.least_bytes == whole.peak_bytes - whole["whole"] - whole["reference"]


def test_a_gpu_holds_no_interpreter(plain: Contents) -> None:
    found = footprint(plain, Way(True, 2, on_cpu=False), JOBS["search"])
    assert found["process"] == 0


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("item_bytes", [2, 4])
def test_a_deep_model_takes_no_more_block_by_block(
    plain: Contents, job: str, item_bytes: int
) -> None:
    two, fifty = (
        replace(plain, blocks=(10**7,) * count, largest_layer=10**6, all_squares=count * 64)
        for count in (2, 50)
    )
    of = {
        (count, streamed): footprint(c, Way(streamed, item_bytes), JOBS[job]).least_bytes
        for count, c in ((2, two), (50, fifty))
        for streamed in (False, True)
    }
    assert of[50, True] == of[2, True]
    assert of[50, False] > of[2, False]
    assert of[50, False] > of[50, True]
