"""What an evaluation costs beside its block linears alone, and what reusing hidden states saves.

Protocol: the built-in model, built-in search facts as a search asks them (no distractors, KL of
prompts), candidates of a finished run. All figures are processor seconds of one thread, which other
programs on the machine change less than seconds by the clock; what is compared is measured in turn.

`evaluation`: swapping weights, asking all facts, KLs and top-1, nothing reused; beside it the
linears of all blocks alone, on as many tokens in one piece. The ratio is the median of the turns'.
`parts` is where one evaluation's seconds go: the modules are timed as they run. `dispatch` is what
is neither linear, head nor attention when a row has one token, so Python and the calls; the rest of
a whole row beyond that is `elementwise`: norms, rotary embedding, gates, residuals.

`proposals`: the run's proposals one after another in their order, on fewer facts, each once with
and once without reuse; scores must be equal to the bit. `skipped` is the share of blocks that did
not run for bounds on what is kept, in candidates with nothing in common. What the file holds
already is not measured again.

    python benchmarks/evaluation_cost.py [--run runs/demo] [--facts 400] [--turns 5] [--out FILE]
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from result_file import commit, load, save
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import mpsearch as mps
from mpsearch import reuse
from mpsearch.asked import balanced
from mpsearch.assignment import Assignment
from mpsearch.bank import Bank
from mpsearch.blocks import find_blocks
from mpsearch.console import quiet_libraries, say
from mpsearch.evaluate import Bench
from mpsearch.forward import Pass, TokenSequence
from mpsearch.models import Model, from_module
from mpsearch.run import Run
from mpsearch.space import ResolvedSpace

MODEL = "builtin:smollm2-135m"
BOUNDS = (1, 2, 4, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/demo"))
    parser.add_argument("--facts", type=int, default=400)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--proposal-facts", type=int, default=24)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/evaluation_cost.json"))
    args = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    run, model, facts = Run.open(args.run), mps.load_model(MODEL), mps.FactSet.builtin()
    space = run.space
    scored = [score for score in run.scores() if score.partition == "search"]
    candidates = [score.assignment for score in scored]
    first = next(place for place, score in enumerate(scored) if score.kind == "search")
    bank = Bank.of(model, run.question["bank"])
    result = load(args.out)
    result.pop("rows", None)
    result["conditions"] = {
        "model": MODEL,
        "fingerprint": model.fingerprint,
        "commit": commit(),
        "dtype": str(model.dtype),
        "device": str(model.device),
        "threads": 1,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, "
        f"{torch.backends.cpu.get_cpu_capability()}",
        "load": os.getloadavg(),
        "run": {"sampler": run.question["sampler"], "seed": run.question["seed"]},
        "versions": {name: version(name) for name in ("mpsearch", "torch", "transformers")},
    }

    def proxy(most: int) -> mps.RecallProxy:
        some = balanced(facts.part("search"), most)
        return mps.RecallProxy(model, facts, some, contrast=False, prompts=True)

    with Bench(space, bank) as bench:
        parts: dict[str, Callable[[], Any]] = {
            "skipped": lambda: _skipped(space, candidates, first),
            "evaluation": lambda: _evaluation(
                bench, proxy(args.facts), candidates[first:], args.turns
            ),
            "parts": lambda: _parts(bench, proxy(args.facts), candidates[first:]),
            "proposals": lambda: _proposals(bench, proxy(args.proposal_facts), candidates, first),
        }
        for name, measure in parts.items():
            if name not in result:
                bench.restore()
                result[name] = measure()
                save(args.out, result)


def cpu_seconds(work: Callable[[], object]) -> float:
    """Of the process, all its threads."""
    start = time.process_time()
    work()
    return time.process_time() - start


@torch.inference_mode()
def _evaluation(
    bench: Bench, proxy: mps.RecallProxy, candidates: list[Assignment], turns: int
) -> dict[str, Any]:
    model = bench.bank.model
    inputs = {
        layer.columns: torch.randn(proxy.tokens, layer.columns, device=model.device).to(model.dtype)
        for layer in model.layers
    }

    def linears() -> None:
        for layer in model.layers:
            nn.functional.linear(inputs[layer.columns], model.originals[layer.name])

    def evaluation(candidate: Assignment) -> None:
        bench.put(candidate)
        proxy.score()

    whole, alone = [], []
    for turn in range(turns):
        say(f"evaluation, turn {turn + 1} of {turns}")
        candidate = candidates[turn % len(candidates)]
        whole.append(cpu_seconds(lambda: evaluation(candidate)))  # noqa: B023
        alone.append(cpu_seconds(linears))
    return {
        "facts": len(proxy.facts),
        "tokens": proxy.tokens,
        "evaluation_cpu_seconds": whole,
        "linears_alone_cpu_seconds": alone,
        "ratio": statistics.median(a / b for a, b in zip(whole, alone, strict=True)),
    }


def _parts(
    bench: Bench, proxy: mps.RecallProxy, candidates: list[Assignment]
) -> dict[str, float | int]:
    """Processor seconds of one evaluation by part."""
    model, work = bench.bank.model, proxy._pass
    bench.put(candidates[0])
    swapping = cpu_seconds(lambda: bench.put(candidates[1]))
    with _timed(model) as spent:
        spent["all"] = cpu_seconds(proxy.score)
    rest = _rest(spent)
    one = Pass(model, [TokenSequence(tuple(work.rows[0].inputs["input_ids"][0, :2].tolist()), 1)])
    rests = []
    for _ in range(5):
        with _timed(model) as small:
            one.logits(one.rows[0])
        rests.append(_rest(small))
    dispatch = statistics.median(rests) * len(work.rows)
    return {
        "rows": len(work.rows),
        "read_nodes": sum(len(row.read_nodes) for row in work.rows),
        "linears": spent["linears"],
        "attention": spent["attention"],
        "elementwise": rest - dispatch,
        "dispatch": dispatch,
        "head": spent["head"],
        "softmax, KL and top-1": spent["all"] - spent["model"],
        "swapping weights": swapping,
    }


def _rest(spent: dict[str, float]) -> float:
    return spent["model"] - spent["linears"] - spent["attention"] - spent["head"]


@contextmanager
def _timed(model: Model) -> Iterator[dict[str, float]]:
    """Processor seconds spent meanwhile in the model, its linears, its head and attention."""
    spent: dict[str, float] = defaultdict(float)
    timed = {"model": [model.module], "head": [model.module.get_output_embeddings()]}
    timed["linears"] = [model.module.get_submodule(layer.name) for layer in model.layers]
    hooks = []
    for part, modules in timed.items():
        for module in modules:
            began: list[float] = []

            def before(*call: object, began: list[float] = began) -> None:
                began.append(time.process_time())

            def after(*call: object, part: str = part, began: list[float] = began) -> None:
                spent[part] += time.process_time() - began.pop()

            hooks.append(module.register_forward_pre_hook(before))
            hooks.append(module.register_forward_hook(after))
    attention = nn.functional.scaled_dot_product_attention

    def timed_attention(*args: Any, **kwargs: Any) -> torch.Tensor:
        start = time.process_time()
        found = attention(*args, **kwargs)
        spent["attention"] += time.process_time() - start
        return found

    try:
        with patch.object(nn.functional, "scaled_dot_product_attention", timed_attention):
            yield spent
    finally:
        for hook in hooks:
            hook.remove()


def _proposals(
    bench: Bench, proxy: mps.RecallProxy, candidates: list[Assignment], first: int
) -> dict[str, Any]:
    """The run's proposals in order, after the last of what was scored before them."""
    plain, reused, equal = [], [], True
    for place, candidate in enumerate(candidates[first - 4 :]):
        say(f"proposal {place - 3} of {len(candidates) - first}")
        bench.put(candidate)
        scores = []
        without = cpu_seconds(lambda: scores.append(proxy.score()))  # noqa: B023
        with_reuse = cpu_seconds(lambda: scores.append(proxy.score(bench.held)))  # noqa: B023
        equal &= all(map(torch.equal, *([torch.tensor(s.log_prob)] for s in scores)))
        if place >= 4:
            plain.append(without)
            reused.append(with_reuse)
    return {
        "facts": len(proxy.facts),
        "tokens": proxy.tokens,
        "plain_cpu_seconds": plain,
        "reused_cpu_seconds": reused,
        "equal_to_the_bit": equal,
        "time_ratio": sum(reused) / sum(plain),
    }


def _skipped(
    space: ResolvedSpace, candidates: list[Assignment], first: int
) -> dict[str, dict[str, float]]:
    """Share of blocks that proposals do not run, on a small model of as many blocks."""
    depth = 1 + max(group.depth or 0 for group in space.groups)
    config = LlamaConfig(
        vocab_size=64, hidden_size=8, intermediate_size=8, num_hidden_layers=depth,
        num_attention_heads=1,
    )  # fmt: skip
    module = LlamaForCausalLM(config)
    model = from_module("small", Path(), module, None, torch.device("cpu"), torch.float32)
    work = Pass(model, [TokenSequence((1, 2, 3), 1)])
    found = {}
    for bound in BOUNDS:
        ran: list[int] = []
        runs = reuse.Reuse(work)
        with patch.object(reuse, "_MOST_RUNS", bound):
            for candidate in candidates:
                formats = space.layer_formats(candidate)
                with _counted(find_blocks(module, model.places)) as blocks:
                    list(runs.logits({layer: fmt.name for layer, fmt in formats.items()}))
                ran.append(len(blocks))
        shares = [1 - blocks / depth for blocks in ran[first:]]
        found[str(bound)] = {
            "mean": statistics.mean(shares),
            "median": statistics.median(shares),
            "proposals_that_skip_some": sum(share > 0 for share in shares) / len(shares),
        }
    return found


@contextmanager
def _counted(blocks: list[nn.Module]) -> Iterator[list[nn.Module]]:
    """The blocks that compute meanwhile, those that are made to return something left out."""
    ran: list[nn.Module] = []

    def note(block: nn.Module, *call: object) -> None:
        if "forward" not in vars(block):
            ran.append(block)

    hooks = [block.register_forward_pre_hook(note) for block in blocks]
    try:
        yield ran
    finally:
        for hook in hooks:
            hook.remove()


if __name__ == "__main__":
    main()
