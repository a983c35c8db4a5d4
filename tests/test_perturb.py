"""Perturb-one KL: equal to plain evaluations to the bit, and cheaper."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, tiny_family
from test_skeleton import CPU, loaded
from test_walk import empty, folder_of
from torch import nn

from mpsearch import perturb
from mpsearch.bank import Bank
from mpsearch.blocks import find_blocks
from mpsearch.errors import CheckError
from mpsearch.evaluate import Bench, all_layers
from mpsearch.formats import Format
from mpsearch.forward import Pass, TokenSequence
from mpsearch.models import Model
from mpsearch.perturb import perturb_one
from mpsearch.quantizers.rounding import Rounding
from mpsearch.skeleton import load_skeleton
from mpsearch.space import SearchSpace

Key = tuple[str, str]
FEW = "version: 1\ntarget: compressed-tensors\nformats: [int2-g64, int8-g64]\n"


def some_sequences(count: int = 12) -> list[TokenSequence]:
    """Answers of one to three tokens."""
    rng = random.Random(0)
    return [
        TokenSequence(tuple(rng.randrange(3, 70) for _ in range(8)), 5 + number % 3)
        for number in range(count)
    ]


def bench_of(model: Model, root: Path, text: str = FEW) -> Bench:
    space = SearchSpace.parse(text, "test").resolve(model)
    bank = Bank(model, Rounding(), root=root)
    bank.build(all_layers(space))
    return Bench(space, bank)


@torch.inference_mode()
def plainly(bench: Bench, work: Pass) -> dict[Key, float]:
    """Every candidate through the whole model, a row's KL as the measure defines it."""
    reference = [work.logits(row).log_softmax(-1) for row in work.rows]
    found = {}
    for group, formats in bench.space.options.items():
        for fmt in formats:
            bench.put({**dict.fromkeys(bench.space.options, "bf16"), group: fmt.name})
            total = 0.0
            for row, of_reference in zip(work.rows, reference, strict=True):
                candidate = work.logits(row).log_softmax(-1)
                kl = (of_reference.exp() * (of_reference - candidate)).sum(-1, dtype=torch.float64)
                total += float(kl.clamp(min=0)[row.places].sum())
            found[group, fmt.name] = total / work.count
    bench.restore()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_it_equals_plain_evaluations_to_the_bit_without_running_earlier_blocks(
    family: str, tmp_path: Path, module_calls: Counter[nn.Module]
) -> None:
    model = tiny_family(family, **{"n_layer" if family == "gpt2" else "num_hidden_layers": 4})
    bench = bench_of(model, tmp_path)
    work = Pass(model, some_sequences(), max_nodes=32)
    assert len(work.rows) > 1
    module_calls.clear()
    found = perturb_one(bench, work)
    rows = len(work.rows)
    pairs = Counter(group.depth for group in bench.space.groups for _ in range(2))
    blocks = find_blocks(model.module, model.places)
    assert len(blocks) == 4
    for index, block in enumerate(blocks):
        candidates = sum(pairs[depth] for depth in range(index + 1))
        once = index < 3  # to get what the next block reads, which others have driven out
        tried = 1 + (index > 0)  # whether starting late is exact, on one row
        assert module_calls[block] == rows * (1 + candidates + once) + tried
    assert found == plainly(bench, work)


def test_embedding_and_head_are_perturbed_too(tmp_path: Path) -> None:
    text = FEW + "embedding: [fp8, bf16]\nhead: [int8-g64, bf16]\n"
    bench = bench_of(tiny_family("llama", tie_word_embeddings=False), tmp_path, text)
    work = Pass(bench.bank.model, some_sequences(), max_nodes=32)
    found = perturb_one(bench, work)
    assert list(found) == [
        (group, fmt.name) for group, formats in bench.space.options.items() for fmt in formats
    ]
    assert found == plainly(bench, work)
    assert found["model.embed_tokens", "fp8"] > 0 < found["lm_head", "int8-g64"]
    assert found["model.embed_tokens", "bf16"] == 0 == found["lm_head", "bf16"]


def test_where_blocks_hand_on_more_than_hidden_states_every_block_runs(tmp_path: Path) -> None:
    model = tiny_family("llama", num_hidden_layers=3)
    blocks = find_blocks(model.module, model.places)
    noted: list[torch.Tensor] = []

    def note(block: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        noted.append(inputs[0] if "forward" in vars(block) else output)

    blocks[0].register_forward_hook(note)
    # The last block also reads what the first one gave, as models with shared keys do.
    blocks[2].register_forward_hook(lambda block, inputs, output: output + 0.1 * noted[-1])
    bench = bench_of(model, tmp_path)
    work = Pass(model, some_sequences(), max_nodes=32)
    assert perturb_one(bench, work) == plainly(bench, work)


def test_the_reference_is_back_whatever_happens(tmp_path: Path) -> None:
    bench = bench_of(tiny_family("llama"), tmp_path)
    model = bench.bank.model
    work = Pass(model, some_sequences(), max_nodes=32)
    before = work.run()

    def interrupt(stage: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with bench, pytest.raises(KeyboardInterrupt):
        perturb_one(bench, work, interrupt)
    assert torch.equal(work.run(), before)
    assert not any("forward" in vars(module) for module in model.module.modules())
    assert not any(module._forward_hooks for module in model.module.modules())


def test_nan_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_of(tiny_family("llama"), tmp_path)
    weight = bench.bank.weight
    broken = "model.layers.1.mlp.down_proj"
    monkeypatch.setattr(
        bench.bank,
        "weight",
        lambda layer, fmt: weight(layer, fmt) * (torch.nan if layer == broken else 1),
    )
    with pytest.raises(CheckError, match=r"layers\.1\.mlp\.down_proj' in int2-g64 gives NaN"):
        perturb_one(bench, Pass(bench.bank.model, some_sequences()))


def test_progress_counts_the_work_that_is_left(tmp_path: Path) -> None:
    bench = bench_of(tiny_family("llama"), tmp_path)
    seen: list[tuple[str, int, int]] = []
    work = Pass(bench.bank.model, some_sequences())
    perturb_one(bench, work, lambda *report: seen.append(report))
    steps = [later[1] - earlier[1] for earlier, later in pairwise(seen)]
    assert set(steps) == {2, 3}  # blocks that run and the head, for the two blocks
    assert seen[0][1] == 0
    assert seen[-1][1] == seen[-1][2] == sum(steps)
    assert {stage for stage, _, _ in seen} == {perturb.STAGE}


# ------------------------------------------------------------------------------ streamed


@pytest.mark.parametrize("name", ["llama", "tied", "gpt2", "mixtral"])
def test_candidates_of_a_streamed_model_share_walks_and_say_what_loaded_ones_do(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perturb, "_AT_ONCE", 5)
    folder = folder_of(tmp_path, name)
    head = "head: [int8-g64, bf16]\n" if name == "llama" else ""
    text = f"{FEW}embedding: [fp8, bf16]\n{head}"
    benches = [
        bench_of(model, tmp_path / "bank", text)
        for model in (
            loaded(folder, torch.bfloat16),
            load_skeleton(str(folder), device=CPU, dtype=torch.bfloat16),
        )
    ]
    seen: list[tuple[int, int]] = []
    whole, streamed = (
        perturb_one(
            bench,
            Pass(bench.bank.model, some_sequences(), max_nodes=32),
            lambda _, *report: seen.append(report),
        )
        for bench in benches
    )
    assert streamed == whole
    assert list(streamed) == list(whole)
    assert seen[-1][0] == seen[-1][1] == seen[-2][1] > seen[-2][0]
    walks = -(-len(whole) // 5)
    assert [done for done, _ in seen].count(0) == 2
    assert len(seen) == len(whole) + 1 + walks + 1
    assert not benches[1].held
    assert empty(benches[1].bank.model)


def test_nan_in_a_streamed_model_is_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "llama")
    model = load_skeleton(str(folder), device=CPU, dtype=torch.float32)
    bench = bench_of(model, tmp_path / "bank")
    stored = bench.bank.stored
    broken = "model.layers.1.mlp.down_proj"

    def spoilt(layer: str, fmt: Format) -> dict[str, torch.Tensor]:
        tensors = stored(layer, fmt)
        if layer == broken:
            tensors["weight_scale"][:] = torch.nan
        return tensors

    bench.bank.stored = spoilt  # type: ignore[method-assign]
    with pytest.raises(CheckError, match=r"layers\.1\.mlp\.down_proj' in int2-g64 gives NaN"):
        perturb_one(bench, Pass(model, some_sequences()))
    assert empty(model)
