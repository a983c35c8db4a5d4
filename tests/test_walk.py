"""The walk: to the bit what a loaded model says, with the weights of one block at a time."""

from __future__ import annotations

import random
import threading
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from conftest import tiny_family
from test_skeleton import CPU, loaded, saved
from torch import Tensor, nn

from mpsearch.bank import Bank
from mpsearch.blocks import find_blocks
from mpsearch.errors import ModelError
from mpsearch.evaluate import Bench, all_layers
from mpsearch.formats import FORMATS, Format
from mpsearch.forward import Pass, TokenSequence
from mpsearch.models import Model
from mpsearch.quantizers.rounding import Rounding
from mpsearch.skeleton import load_skeleton
from mpsearch.space import SearchSpace
from mpsearch.walk import Held, Packed, Walk

INT2, INT8 = FORMATS["int2-g64"], FORMATS["int8-g64"]
FAMILIES = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "gemma": ("gemma", {}),
    "windows": ("gemma3_text", {
        "head_dim": 16, "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    }),
    "gpt2": ("gpt2", {"n_layer": 3}),
    "mixtral": ("mixtral", {}),
    "states in a tuple": ("falcon", {"alibi": False, "ffn_hidden_size": 128,
                                     "new_decoder_architecture": True, "num_kv_heads": 2}),
}  # fmt: skip


def some_pass(model: Model) -> Pass:
    rng = random.Random(0)
    sequences = [
        TokenSequence(tuple(rng.randrange(3, 70) for _ in range(4 + number % 5)), 2)
        for number in range(12)
    ]
    work = Pass(model, sequences, max_nodes=24)
    assert len(work.rows) > 2
    return work


def folder_of(root: Path, name: str) -> Path:
    family, changes = FAMILIES[name]
    blocks = {} if family == "gpt2" else {"num_hidden_layers": 3}
    return saved(root / "model", family, **blocks, **changes)


def bench_of(model: Model, root: Path) -> Bench:
    head = "head: [int8-g64, bf16]\n" if model.head else ""
    text = "version: 1\ntarget: compressed-tensors\nformats: [int2-g64, int8-g64, bf16]\n"
    text += "embedding: [fp8, bf16]\n" + head
    space = SearchSpace.parse(text, "test").resolve(model)
    bank = Bank(model, Rounding(), root=root / "bank")
    bank.build(all_layers(space))
    return Bench(space, bank)


def assignments(bench: Bench) -> list[dict[str, str]]:
    """The reference, one that is it but for a late block, and some that differ everywhere."""
    rng, options = random.Random(1), bench.space.options
    reference = dict.fromkeys(options, "bf16")
    late = next(name for name in options if ".2." in name)
    mixed = [
        {name: rng.choice(formats).name for name, formats in options.items()} for _ in range(2)
    ]
    whole = {name: formats[0].name for name, formats in options.items()}
    return [reference, {**reference, late: "int2-g64"}, *mixed, whole, reference]


@torch.inference_mode()
def plainly(bench: Bench, assignment: Mapping[str, str], work: Pass) -> list[Tensor]:
    """What the loaded model says, all blocks a row."""
    with bench:
        bench.put(assignment)
        return [work.logits(row).clone() for row in work.rows]


def held(bench: Bench, assignment: Mapping[str, str]) -> Held:
    """What a candidate's layers hold."""
    formats = bench.space.layer_formats(assignment).items()
    return {layer: (bench.bank.stored, fmt) for layer, fmt in formats if fmt.quantized}


def of(packed: Packed, formats: Mapping[str, Format]) -> Held:
    return {layer: (packed, fmt) for layer, fmt in formats.items()}


def equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", FAMILIES)
def test_both_ways_say_to_the_bit_what_the_loaded_model_says(tmp_path: Path, name: str) -> None:
    folder = folder_of(tmp_path, name)
    for dtype in (torch.bfloat16, torch.float32):
        whole = loaded(folder, dtype)
        bench = bench_of(whole, tmp_path)
        asked = assignments(bench)
        expected = [plainly(bench, assignment, some_pass(whole)) for assignment in asked]
        assert not equal(expected[0], expected[2])  # so that weights matter
        candidates = [held(bench, assignment) for assignment in asked]
        skeleton = load_skeleton(str(folder), device=CPU, dtype=dtype)
        for model in (whole, skeleton):
            walk = Walk(some_pass(model))
            for logits, theirs in zip(walk.run(candidates), expected, strict=True):
                assert equal(list(logits), theirs)
        for layer, place in whole.places.items():
            assert torch.equal(place.weight, skeleton.originals[layer])
        assert empty(skeleton)


def empty(skeleton: Model) -> bool:
    """Whether no block holds a weight."""
    blocks = find_blocks(skeleton.module, skeleton.places)
    return all(p.untyped_storage().nbytes() <= 4 for b in blocks for p in b.parameters())


@pytest.fixture
def opened(tmp_path: Path) -> tuple[Model, Bench]:
    folder = folder_of(tmp_path, "llama")
    return (
        load_skeleton(str(folder), device=CPU, dtype=torch.float32),
        bench_of(loaded(folder, torch.float32), tmp_path),
    )


def test_summed_log_probabilities_come_from_the_rows_of_a_walk(
    opened: tuple[Model, Bench],
) -> None:
    skeleton, bench = opened
    work = some_pass(skeleton)
    assert torch.equal(work.run(logits=Walk(work).logits({})), some_pass(bench.bank.model).run())


@pytest.mark.parametrize("states_bytes", [0, 40_000])
def test_states_on_disk_change_nothing(opened: tuple[Model, Bench], states_bytes: int) -> None:
    skeleton, bench = opened
    candidates = [held(bench, assignment) for assignment in assignments(bench)]
    work = some_pass(skeleton)
    in_memory = [list(logits) for logits in Walk(work).run(candidates)]
    on_disk = [list(logits) for logits in Walk(work, states_bytes=states_bytes).run(candidates)]
    assert all(map(equal, on_disk, in_memory))


# ------------------------------------------------------------------------------ what is read


def read(skeleton: Model, names: Sequence[str]) -> Mapping[str, Tensor]:
    assert skeleton.checkpoint is not None
    return skeleton.checkpoint.read(names)


class Watched:
    """A supply and packed weights that note what they are asked for, and by which thread."""

    def __init__(self, skeleton: Model, bench: Bench):
        self._skeleton, self._bench = skeleton, bench
        self.read: list[str] = []
        self.own: list[tuple[str, Format]] = []
        self.threads: set[str] = set()

    def supply(self, names: Sequence[str]) -> Mapping[str, Tensor]:
        self.read += names
        self.threads.add(threading.current_thread().name)
        return read(self._skeleton, names)

    def packed(self, layer: str, fmt: Format) -> Mapping[str, Tensor]:
        self.own.append((layer, fmt))
        return self._bench.bank.stored(layer, fmt)


def test_each_weight_is_fetched_once_for_all_candidates_and_ahead(
    opened: tuple[Model, Bench],
) -> None:
    skeleton, bench = opened
    watched = Watched(skeleton, bench)
    walk = Walk(some_pass(skeleton), watched.supply)
    up, down = (f"model.layers.1.mlp.{word}_proj" for word in ("up", "down"))
    candidates = ({}, {up: INT2}, {up: INT2, down: INT8}, {up: INT8})
    for logits in walk.run([of(watched.packed, formats) for formats in candidates]):
        list(logits)
    assert max(Counter(watched.read).values()) == 1
    assert watched.own == [(up, INT2), (down, INT8), (up, INT8)]
    inside = [name for name, _ in skeleton.module.named_parameters() if ".layers." in name]
    assert sorted(watched.read) == sorted(inside)
    assert all(name.startswith("fetch") for name in watched.threads)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_reference_weights_that_no_candidate_holds_are_not_read(tmp_path: Path, name: str) -> None:
    folder = folder_of(tmp_path, name)
    skeleton = load_skeleton(str(folder), device=CPU, dtype=torch.float32)
    watched = Watched(skeleton, bench_of(loaded(folder, torch.float32), tmp_path))
    walk = Walk(some_pass(skeleton), watched.supply)
    layers = [layer.name for layer in skeleton.layers]
    for logits in walk.run([of(watched.packed, dict.fromkeys(layers, f)) for f in (INT8, INT2)]):
        assert not any(row.isnan().any() for row in logits)
    assert watched.read
    assert not any(word in name for name in watched.read for word in ("proj", "experts"))
    assert len(watched.own) == 2 * len(layers)


def test_candidates_are_one_until_they_differ(
    opened: tuple[Model, Bench], module_calls: Counter[nn.Module]
) -> None:
    skeleton, bench = opened
    work = some_pass(skeleton)
    walk = Walk(work)
    ups = [f"model.layers.{block}.mlp.up_proj" for block in range(3)]
    module_calls.clear()
    candidates = ({}, {ups[1]: INT2}, {ups[1]: INT2, ups[2]: INT8}, {ups[2]: INT8})
    for logits in walk.run([of(bench.bank.stored, formats) for formats in candidates]):
        list(logits)
    blocks = find_blocks(skeleton.module, skeleton.places)
    assert [module_calls[block] // len(work.rows) for block in blocks] == [1, 2, 4]


def test_no_more_than_two_blocks_are_in_memory(opened: tuple[Model, Bench]) -> None:
    skeleton, _ = opened
    seen: list[weakref.ref[Tensor]] = []
    most = 0

    def supply(names: Sequence[str]) -> Mapping[str, Tensor]:
        nonlocal most
        weights = read(skeleton, names)
        seen.extend(map(weakref.ref, weights.values()))
        most = max(most, sum(tensor() is not None for tensor in seen))
        return weights

    list(Walk(some_pass(skeleton), supply).logits({}))
    assert len(seen) == 3 * 9
    assert most <= 2 * 9
    assert not any(tensor() is not None for tensor in seen)


# ------------------------------------------------------------------------------ broken off


def test_a_walk_that_is_broken_off_leaves_the_model_as_it_was(
    opened: tuple[Model, Bench],
) -> None:
    skeleton, bench = opened
    whole, layers = bench.bank.model, [layer.name for layer in bench.bank.model.layers]
    before = [parameter.data_ptr() for parameter in whole.module.parameters()]
    for model in (whole, skeleton):
        calls = 0

        def packed(layer: str, fmt: Format) -> Mapping[str, Tensor]:
            nonlocal calls
            calls += 1
            if calls == 20:
                raise KeyboardInterrupt
            return bench.bank.stored(layer, fmt)

        walk = Walk(some_pass(model))
        candidates = [of(packed, dict.fromkeys(layers, INT8)), {}]
        with pytest.raises(KeyboardInterrupt):
            list(walk.run(candidates))
        calls = 100
        for logits in walk.run(candidates):
            next(logits)
        assert not any("forward" in vars(module) for module in model.module.modules())
    assert [parameter.data_ptr() for parameter in whole.module.parameters()] == before
    assert empty(skeleton)


def test_a_model_that_reads_more_than_the_last_block_is_refused() -> None:
    model = tiny_family("llama")
    blocks = find_blocks(model.module, model.places)
    first: list[Tensor] = []
    blocks[0].register_forward_hook(lambda block, inputs, output: first.append(output))
    model.module.model.norm.register_forward_pre_hook(lambda norm, args: args[0] + first[-1])
    with pytest.raises(ModelError, match="hands on more between its blocks than hidden states"):
        Walk(some_pass(model))


def test_a_model_whose_blocks_share_something_is_refused() -> None:
    model = tiny_family("llama")
    shared: dict[str, object] = {"keys": object()}
    for block in find_blocks(model.module, model.places):
        block.register_forward_pre_hook(
            lambda block, args, kwargs: (args, {**kwargs, "shared": shared}), with_kwargs=True
        )
    with pytest.raises(ModelError, match="hands on more between its blocks than hidden states"):
        Walk(some_pass(model))
