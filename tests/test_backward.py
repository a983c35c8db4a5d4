"""Backward: to the bit the gradients of a loaded model, with the weights of one block at a time."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import pytest
import torch
from test_skeleton import CPU, loaded
from test_walk import FAMILIES, assignments, bench_of, empty, folder_of, held, of, read, some_pass
from torch import Tensor

from mpsearch import backward
from mpsearch.backward import Backward, Sample, gradients, products
from mpsearch.errors import ResourceError
from mpsearch.evaluate import Bench
from mpsearch.formats import FORMATS, Format
from mpsearch.forward import PreparedRow
from mpsearch.models import Model
from mpsearch.skeleton import load_skeleton
from mpsearch.walk import Held

INT8 = FORMATS["int8-g64"]
Found = dict[tuple[int, int], dict[str, Tensor]]


def two_scalars(row: PreparedRow, logits: Tensor) -> list[Tensor]:
    """Two answers' log-probabilities, which the row's tokens decide."""
    log_probs = logits.log_softmax(-1)
    return [log_probs[:, shift::5].sum() * 0.01 for shift in (1, 2)]


def collected(parts: Iterable[Iterable[Sample]]) -> Found:
    """Row and scalar to all gradients, those of several parts added."""
    found: Found = {}
    for part in parts:
        for row, number, of_layers in part:
            into = found.setdefault((row, number), {})
            for layer, gradient in of_layers.items():
                into[layer] = into[layer] + gradient if layer in into else gradient.clone()
    return found


def names(model: Model) -> list[str]:
    return [layer.name for layer in model.layers]


def same(found: Found, expected: Found) -> bool:
    return found.keys() == expected.keys() and all(
        found[key].keys() == of_layers.keys()
        and all(torch.equal(found[key][layer], g) for layer, g in of_layers.items())
        for key, of_layers in expected.items()
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_to_the_bit_those_of_the_loaded_model(tmp_path: Path, name: str) -> None:
    folder = folder_of(tmp_path, name)
    for dtype in (torch.bfloat16, torch.float32):
        whole = loaded(folder, dtype)
        bench = bench_of(whole, tmp_path)
        skeleton = load_skeleton(str(folder), device=CPU, dtype=dtype)
        work = some_pass(skeleton)
        before: Found = {}
        for assignment in assignments(bench)[1:3]:
            with bench:
                bench.put(assignment)
                parts = gradients(some_pass(whole), {}, names(whole), two_scalars)
                expected = collected(parts)
            assert len(expected) == 2 * len(work.rows)
            assert all(g.shape == whole.originals[x].shape for x, g in expected[0, 0].items())
            assert not same(expected, before)  # so that weights matter
            candidate = held(bench, assignment)
            parts = gradients(work, candidate, names(skeleton), two_scalars, most=2)
            assert same(collected(parts), expected)
            before = expected
        # Whose weights a block holds is an argument: those of the loaded model serve, too.
        parts = Backward(some_pass(whole)).parts(candidate, names(whole), two_scalars, most=2)
        assert same(collected(parts), expected)
        assert empty(skeleton)


@pytest.mark.parametrize("short", [False, True])
def test_a_loaded_model_is_gone_back_through_by_block_where_memory_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short: bool
) -> None:
    whole = loaded(folder_of(tmp_path, "llama"), torch.bfloat16)
    bench = bench_of(whole, tmp_path)
    with bench:
        bench.put(assignments(bench)[2])
        expected = collected(gradients(some_pass(whole), {}, names(whole), two_scalars))
        work, count = some_pass(whole), 0
        weights = sum(layer.weights for layer in whole.layers)
        monkeypatch.setattr(
            "mpsearch.backward.available_memory_bytes",
            lambda device: weights * 6 if short else 2**30,
        )

        def counted() -> Iterator[Iterable[Sample]]:
            nonlocal count
            for part in gradients(work, bench.held, names(whole), two_scalars, most=2):
                count += 1
                yield part

        assert same(collected(counted()), expected)
    assert (count > 1) == short


def test_a_loaded_model_that_goes_at_once_alone_is_refused_where_memory_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = loaded(folder_of(tmp_path, "llama"), torch.bfloat16)
    monkeypatch.setattr("mpsearch.walk.Walk._hands_on_states", lambda walk, as_tuple: False)
    assert collected(gradients(some_pass(whole), {}, names(whole), two_scalars))
    monkeypatch.setattr("mpsearch.backward.available_memory_bytes", lambda device: 0)
    monkeypatch.setattr("mpsearch.device.available_memory_bytes", lambda device: 0)
    with pytest.raises(ResourceError, match="going back through the model at once needs about"):
        collected(gradients(some_pass(whole), {}, names(whole), two_scalars))


@pytest.mark.parametrize("name", ["llama", "tied", "gemma", "gpt2", "states in a tuple"])
def test_embedding_and_head_get_theirs_and_a_tied_one_both(tmp_path: Path, name: str) -> None:
    folder = folder_of(tmp_path, name)
    whole = loaded(folder, torch.float32)
    bench = bench_of(whole, tmp_path)
    layers = [layer.name for layer in whole.every_layer]
    assignment = assignments(bench)[4]
    with bench:
        bench.put(assignment)
        expected = collected(gradients(some_pass(whole), {}, layers, two_scalars))
    skeleton = load_skeleton(str(folder), device=CPU, dtype=torch.float32)
    parts = gradients(some_pass(skeleton), held(bench, assignment), layers, two_scalars, most=2)
    seen: Counter[str] = Counter()
    found: list[list[Sample]] = []
    for part in parts:
        found.append(list(part))
        seen.update(found[-1][0][2].keys())
    assert whole.embedding is not None
    assert seen == {x: 2 if x == whole.embedding.name and not whole.head else 1 for x in layers}
    added = collected(found)
    for key, of_layers in expected.items():
        for layer, gradient in of_layers.items():
            assert gradient.any()
            torch.testing.assert_close(added[key][layer], gradient, rtol=1e-4, atol=1e-6)


@pytest.fixture
def opened(tmp_path: Path) -> tuple[Model, Bench]:
    folder = folder_of(tmp_path, "llama")
    return (
        load_skeleton(str(folder), device=CPU, dtype=torch.float32),
        bench_of(loaded(folder, torch.float32), tmp_path),
    )


@pytest.mark.parametrize("states_bytes", [0, 100_000])
def test_states_on_disk_change_nothing(opened: tuple[Model, Bench], states_bytes: int) -> None:
    skeleton, bench = opened
    work, candidate = some_pass(skeleton), held(bench, assignments(bench)[2])
    layers = [layer.name for layer in skeleton.every_layer]
    ways = [
        collected(Backward(work, states_bytes=most).parts(candidate, layers, two_scalars, most=2))
        for most in (2**30, states_bytes)
    ]
    assert same(*ways)


def test_a_row_of_which_nothing_is_asked_has_no_gradients(opened: tuple[Model, Bench]) -> None:
    skeleton, _ = opened
    layers = [layer.name for layer in skeleton.every_layer]
    asked = some_pass(skeleton).rows[1].indices

    def some(row: PreparedRow, logits: Tensor) -> list[Tensor]:
        return two_scalars(row, logits) if row.indices == asked else []

    everything = collected(gradients(some_pass(skeleton), {}, layers, two_scalars, most=2))
    found = collected(gradients(some_pass(skeleton), {}, layers, some, most=2))
    assert same(found, {key: of for key, of in everything.items() if key[0] == 1})


def test_an_expert_that_no_token_reached_gets_zeros(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "mixtral")
    skeleton = load_skeleton(str(folder), device=CPU, dtype=torch.float32)
    work = some_pass(skeleton)
    del work.rows[1:]
    work.rows[0].inputs["attention_mask"][:] = torch.eye(
        work.rows[0].inputs["input_ids"].shape[1], dtype=torch.bool
    )
    work.rows[0].inputs["input_ids"][:] = 7  # one token alone: two experts of four
    found = collected(gradients(work, {}, names(skeleton), two_scalars, most=2))
    last = [g for x, g in found[0, 0].items() if ".2.mlp.experts." in x and "down_proj" in x]
    assert sorted(bool(gradient.any()) for gradient in last) == [False, False, True, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_are_taken_in_slices_and_each_as_if_alone(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = torch.Generator().manual_seed(0)
    weight, *some = (torch.randn(50, 24, generator=rng).to(dtype) for _ in range(4))
    expected = [float((gradient.double() * weight.double()).sum()) for gradient in some]
    for size in (2**26, 24 * 7, 1):
        monkeypatch.setattr(backward, "SLICE", size)
        found = products(some, weight)
        assert found.dtype == torch.float32
        assert found.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)
        alone = torch.cat([products([gradient], weight) for gradient in some])
        assert torch.equal(alone, found)


# ------------------------------------------------------------------------------ what is held


def test_each_block_is_fetched_twice_and_no_more_than_two_are_in_memory(
    opened: tuple[Model, Bench],
) -> None:
    skeleton, _ = opened
    seen: list[weakref.ref[Tensor]] = []
    order: list[str] = []
    most = 0

    def supply(wanted: Sequence[str]) -> Mapping[str, Tensor]:
        nonlocal most
        weights = read(skeleton, wanted)
        order.append(wanted[0].split(".")[2])
        seen.extend(map(weakref.ref, weights.values()))
        most = max(most, sum(tensor() is not None for tensor in seen))
        return weights

    collected(Backward(some_pass(skeleton), supply).parts({}, names(skeleton), two_scalars, most=2))
    assert order == ["0", "1", "2", "2", "1", "0"]
    assert most <= 2 * 9
    assert not any(tensor() is not None for tensor in seen)


def test_a_layer_of_the_part_holds_what_the_candidate_does(opened: tuple[Model, Bench]) -> None:
    skeleton, bench = opened
    candidate: Held = of(bench.bank.stored, dict.fromkeys(names(skeleton)[::2], INT8))
    layers = [layer.name for layer in skeleton.every_layer]
    seen: set[str] = set()
    for part in gradients(some_pass(skeleton), candidate, layers, two_scalars, most=2):
        for _, _, of_layers in part:
            for layer in of_layers.keys() - seen:
                fmt = INT8 if layer in candidate else FORMATS["bf16"]
                weight = skeleton.places[layer].weight
                assert torch.equal(weight, bench.bank.weight(layer, fmt)), layer
            seen.update(of_layers)
    assert seen == set(layers)


def test_progress_counts_parts(opened: tuple[Model, Bench]) -> None:
    skeleton, _ = opened
    seen: list[tuple[int, int]] = []
    parts = gradients(
        some_pass(skeleton), {}, names(skeleton), two_scalars, most=2,
        report=lambda *report: seen.append(report),
    )  # fmt: skip
    collected(parts)
    assert seen == [(done, 7) for done in range(8)]


# ------------------------------------------------------------------------------ broken off


def is_as_before(model: Model) -> bool:
    modules = model.module.modules()
    return (
        not any("forward" in vars(module) for module in modules)
        and not any(parameter.requires_grad for parameter in model.module.parameters())
        and torch.is_grad_enabled()
    )


@pytest.mark.parametrize("part", range(5))
def test_broken_off_it_leaves_the_model_as_it_was(opened: tuple[Model, Bench], part: int) -> None:
    skeleton, bench = opened
    whole = bench.bank.model
    pointers = [parameter.data_ptr() for parameter in whole.module.parameters()]
    layers = [layer.name for layer in skeleton.every_layer]
    candidate = held(bench, assignments(bench)[4])
    for model in (whole, skeleton):
        run = Backward(some_pass(model)).parts(candidate, layers, two_scalars, most=2)
        with pytest.raises(KeyboardInterrupt), closing(run):
            for number, samples in enumerate(run):
                for row, _, _ in samples:
                    if (number, row) == (part, 1):
                        raise KeyboardInterrupt
        assert samples is not None and is_as_before(model)
    assert [parameter.data_ptr() for parameter in whole.module.parameters()] == pointers
    assert empty(skeleton)


def test_a_fetch_that_fails_leaves_the_model_as_it_was(opened: tuple[Model, Bench]) -> None:
    skeleton, bench = opened
    calls = 0

    def packed(layer: str, fmt: Format) -> Mapping[str, Tensor]:
        nonlocal calls
        calls += 1
        if calls == 30:  # on the way back
            raise ResourceError("gone")
        return bench.bank.stored(layer, fmt)

    candidate = of(packed, dict.fromkeys(names(skeleton), INT8))
    with pytest.raises(ResourceError, match="gone"):
        collected(gradients(some_pass(skeleton), candidate, names(skeleton), two_scalars, most=2))
    assert is_as_before(skeleton)
    assert empty(skeleton)


def test_without_gradients_around_it_there_are_gradients(opened: tuple[Model, Bench]) -> None:
    skeleton, bench = opened
    for model in (skeleton, bench.bank.model):
        expected = collected(gradients(some_pass(model), {}, names(model), two_scalars, most=2))
        with torch.no_grad():
            for part in gradients(some_pass(model), {}, names(model), two_scalars, most=2):
                for row, number, of_layers in part:
                    assert not torch.is_grad_enabled()
                    for layer, gradient in of_layers.items():
                        assert torch.equal(gradient, expected[row, number][layer])
