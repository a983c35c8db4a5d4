"""Reuse: to the bit what whole runs say, without running blocks that are as they were."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Hashable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, tiny_family
from torch import Tensor, nn

from mpsearch import reuse
from mpsearch.assignment import Assignment
from mpsearch.bank import Bank
from mpsearch.blocks import find_blocks
from mpsearch.errors import CheckError
from mpsearch.evaluate import Bench, all_layers
from mpsearch.facts import FactSet
from mpsearch.forward import Pass, TokenSequence
from mpsearch.models import Model
from mpsearch.quantizers.rounding import Rounding
from mpsearch.recall import RecallProxy
from mpsearch.reuse import Reuse
from mpsearch.space import SearchSpace

FEW = "version: 1\ntarget: compressed-tensors\nformats: [int2-g64, int8-g64, bf16]\n"
MORE = FEW + "embedding: [fp8, bf16]\n"


def some_pass(model: Model) -> Pass:
    rng = random.Random(0)
    sequences = [
        TokenSequence(tuple(rng.randrange(3, 70) for _ in range(8)), 5 + number % 3)
        for number in range(12)
    ]
    work = Pass(model, sequences, max_nodes=32)
    assert len(work.rows) > 1
    return work


def bench_of(model: Model, root: Path, text: str = FEW) -> Bench:
    space = SearchSpace.parse(text, "test").resolve(model)
    bank = Bank(model, Rounding(), root=root)
    bank.build(all_layers(space))
    return Bench(space, bank)


def four_blocks(family: str = "llama", **changes: object) -> Model:
    blocks = "n_layer" if family == "gpt2" else "num_hidden_layers"
    return tiny_family(family, **{blocks: 4, **changes})


def moves(bench: Bench, count: int = 10) -> Iterator[Assignment]:
    """Each differs from an earlier one in one or two groups."""
    rng, seen = random.Random(1), [dict.fromkeys(bench.space.options, "int8-g64")]
    seen[0].update({name: options[0].name for name, options in bench.space.options.items()
                    if "int8-g64" not in [fmt.name for fmt in options]})  # fmt: skip
    for _ in range(count):
        yield Assignment.of(seen[-1])
        changed = dict(rng.choice(seen[-4:]))
        for name in rng.sample(sorted(changed), 2):
            changed[name] = rng.choice(bench.space.options[name]).name
        seen.append(changed)


@torch.inference_mode()
def plainly(work: Pass) -> list[Tensor]:
    return [work.logits(row) for row in work.rows]


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    """To the bit, NaN for NaN."""
    pairs = zip(found, expected, strict=True)
    return all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in pairs)


@pytest.mark.parametrize("family", FAMILIES)
def test_candidates_say_to_the_bit_what_they_say_plainly(
    family: str, tmp_path: Path, module_calls: Counter[nn.Module]
) -> None:
    model = four_blocks(family)
    bench, work = bench_of(model, tmp_path, MORE), some_pass(model)
    runs, expected = Reuse(work), []
    assignments = list(moves(bench))
    for assignment in assignments:
        bench.put(assignment)
        expected.append(plainly(work))
    module_calls.clear()
    for assignment, plain in zip(assignments, expected, strict=True):
        bench.put(assignment)
        assert equal(list(runs.logits(bench.held)), plain)
    first, *_, last = find_blocks(model.module, model.places)
    rows = len(work.rows)
    assert rows < module_calls[first] < module_calls[last] <= rows * len(assignments) + 2


def test_only_blocks_from_the_first_change_on_are_run(
    tmp_path: Path, module_calls: Counter[nn.Module]
) -> None:
    model = four_blocks(tie_word_embeddings=False)
    bench, work = bench_of(model, tmp_path, MORE + "head: [int8-g64, bf16]\n"), some_pass(model)
    blocks, runs = find_blocks(model.module, model.places), Reuse(work)
    base = dict.fromkeys(bench.space.options, "bf16")
    for changes, first in [
        ({}, 0),
        ({}, 4),
        ({"layers.2.mlp.down": "int2-g64"}, 2),
        ({"layers.2.mlp.down": "int2-g64", "layers.3.mlp.down": "int2-g64"}, 3),
        ({"layers.0.mlp.down": "int2-g64"}, 0),
        ({"lm_head": "int8-g64"}, 4),
        ({"layers.2.mlp.down": "int2-g64", "lm_head": "int8-g64"}, 4),
        ({"embed": "fp8"}, 0),
        ({"layers.1.self_attn.o": "int8-g64"}, 1),
    ]:
        names = {part: next(name for name in base if part in name) for part in changes}
        bench.put({**base, **{names[part]: fmt for part, fmt in changes.items()}})
        plain = plainly(work)
        module_calls.clear()
        assert equal(list(runs.logits(bench.held)), plain)
        if changes or first:  # the first run also tries whether it can start late
            ran = [module_calls[block] // len(work.rows) for block in blocks]
            assert ran == [int(index >= first) for index in range(4)], changes


def test_equal_formats_of_another_bank_are_other_weights(tmp_path: Path) -> None:
    model = four_blocks()
    work, runs = some_pass(model), Reuse(some_pass(model))
    for root, factor in ((tmp_path / "a", 1.0), (tmp_path / "b", 0.5)):
        with bench_of(model, root) as bench:
            weight = bench.bank.weight
            bench.bank.weight = lambda layer, fmt: weight(layer, fmt) * factor  # noqa: B023
            bench.put(dict.fromkeys(bench.space.options, "int8-g64"))
            assert equal(list(runs.logits(bench.held)), plainly(work))


@pytest.mark.parametrize("broken", ["layers.0.mlp.down_proj", "layers.3.mlp.down_proj"])
def test_a_candidate_that_gives_nan_spoils_nothing(
    broken: str, tiny_facts: FactSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = four_blocks()
    bench = bench_of(model, tmp_path)
    facts = tiny_facts.part("search")
    proxy, plain = (RecallProxy(model, tiny_facts, facts, contrast=False) for _ in range(2))
    weight = bench.bank.weight

    def put_nan(layer: str, fmt: object) -> Tensor:
        nan = layer.endswith(broken) and getattr(fmt, "name", "") == "int2-g64"
        return weight(layer, fmt) * (torch.nan if nan else 1)  # type: ignore[arg-type]

    monkeypatch.setattr(bench.bank, "weight", put_nan)
    good = Assignment.of(dict.fromkeys(bench.space.options, "int8-g64"))
    bad = Assignment.of({**good, f"model.{broken}": "int2-g64"})
    later = Assignment.of({**good, "model.layers.2.mlp.down_proj": "int2-g64"})
    with bench:
        for assignment in (bad, bad, good, bad, later, good):  # NaN first, so before it was tried
            if assignment == bad:
                with pytest.raises(CheckError, match="NaN"):
                    bench.evaluate(assignment, proxy)
                continue
            found = bench.evaluate(assignment, proxy).scores
            expected = plain.score()
            assert (found.log_prob == expected.log_prob).all()
            assert (found.kl == expected.kl).all()
    assert proxy._runner.blocks_to_run(model.layers[-1:]) == 1  # NaN did not decide that it is all


def test_a_run_that_is_broken_off_leaves_nothing(tmp_path: Path) -> None:
    model = four_blocks()
    bench, work = bench_of(model, tmp_path), some_pass(model)
    runs = Reuse(work)
    for assignment in moves(bench, 4):
        bench.put(assignment)
        held = bench.held
        with pytest.raises(KeyboardInterrupt):
            for number, _ in enumerate(runs.logits(held)):
                if number == 1:
                    raise KeyboardInterrupt
        assert not any("forward" in vars(module) for module in model.module.modules())
        assert not any(module._forward_hooks for module in model.module.modules())
        assert equal(list(runs.logits(held)), plainly(work))


@pytest.mark.parametrize("reader", [1, 3])
def test_where_blocks_hand_on_more_than_they_return_all_of_them_run(
    reader: int, tmp_path: Path, module_calls: Counter[nn.Module]
) -> None:
    model = four_blocks()
    blocks = find_blocks(model.module, model.places)
    noted: list[Tensor] = []

    def note(block: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        noted.append(inputs[0])

    blocks[0].register_forward_hook(note)
    # Reads what entered the first one, as models with shared keys or values do.
    blocks[reader].register_forward_hook(lambda block, inputs, output: output + 0.1 * noted[-1])
    bench, work = bench_of(model, tmp_path), some_pass(model)
    runs = Reuse(work)
    for number, assignment in enumerate(moves(bench, 4)):
        bench.put(assignment)
        plain = plainly(work)
        module_calls.clear()
        assert equal(list(runs.logits(bench.held)), plain)
        assert number == 0 or module_calls[blocks[0]] == len(work.rows)


def test_where_more_than_the_last_block_is_read_all_of_them_run(tmp_path: Path) -> None:
    model = four_blocks()
    blocks = find_blocks(model.module, model.places)
    first: list[Tensor] = []
    blocks[0].register_forward_hook(lambda block, inputs, output: first.append(output))
    model.module.model.norm.register_forward_pre_hook(lambda norm, args: args[0] + first[-1])
    bench, work = bench_of(model, tmp_path), some_pass(model)
    runs = Reuse(work)
    for assignment in moves(bench, 4):
        bench.put(assignment)
        assert equal(list(runs.logits(bench.held)), plainly(work))
    assert runs.blocks_to_run(model.layers[-1:]) == 4


def test_what_is_kept_is_bounded_by_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module_calls: Counter[nn.Module]
) -> None:
    model = four_blocks()
    bench, work = bench_of(model, tmp_path), some_pass(model)
    assignments = list(moves(bench))
    state_bytes = work.tokens * 64 * 4
    for most in (0, 1, 3, 100):
        runs = Reuse(work)

        def available(device: object, runs: Reuse = runs, most: int = most) -> int:
            return (8 * most - len(runs._kept)) * state_bytes

        monkeypatch.setattr(reuse, "available_memory_bytes", available)
        for assignment in assignments:
            bench.put(assignment)
            assert equal(list(runs.logits(bench.held)), plainly(work))
            kept: dict[Hashable, list[Tensor]] = dict(runs._kept)
            sizes = [sum(state.nbytes for state in states) for states in kept.values()]
            assert sizes == [state_bytes] * len(sizes)
            assert len(sizes) <= min(most, 4 * 4)
        assert (len(sizes) > 0) == (most > 0)
