"""Shared fixtures: a tiny Llama that was taught synthetic facts in a few seconds, and its files.

It knows `color`, `shape` and `place` of made-up subjects, so recall, sensitivity and search have
something to lose; everything runs offline.
"""

from __future__ import annotations

import json
import logging
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
# What tests compare to the bit are a CPU's numbers; a GPU's are compared in `test_gpu.py`.
os.environ["MPSEARCH_DEVICE"] = "cpu"

import pytest
import torch
from cli_cases import BUDGET, TRIALS, Cli, Outcome
from searches import SEARCH_FACTS, SEARCH_TRIALS, Search
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from mpsearch import cli, device
from mpsearch.assignment import Assignment
from mpsearch.bank import Bank
from mpsearch.evaluate import Bench, Evaluation, all_layers
from mpsearch.facts import FactSet
from mpsearch.formats import FORMATS
from mpsearch.models import Model, from_module, load_whole
from mpsearch.quantizers import get_quantizer
from mpsearch.recall import RecallProxy
from mpsearch.run import Run
from mpsearch.search import search
from mpsearch.space import ResolvedSpace, SearchSpace
from mpsearch.wanted import Wanted

ANSWERS = {
    "color": ["red", "green", "blue", "white", "black", "brown"],
    "shape": ["round", "square", "flat", "long", "thin"],
    "place": ["north", "south", "east", "west"],
}
SUBJECTS = 48


def fact_lines() -> list[dict[str, str]]:
    """Relation lines and fact lines of the synthetic facts."""
    lines: list[dict[str, str]] = []
    for offset, (relation, answers) in enumerate(ANSWERS.items()):
        lines.append({"relation": relation, "template": f"the {relation} of {{}} is"})
        lines += [
            {
                "relation": relation,
                "subject": f"s{number}",
                "answer": answers[(number * (2 * offset + 3) + number // 7) % len(answers)],
            }
            for number in range(SUBJECTS)
        ]
    return lines


def build_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<unk>", "the", "of", "is", *ANSWERS]
    words += [answer for answers in ANSWERS.values() for answer in answers]
    words += [f"s{number}" for number in range(SUBJECTS)]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")


def tiny_llama(vocabulary: int, seed: int = 0) -> LlamaForCausalLM:
    """Two blocks, hidden size 64, grouped-query attention, tied embedding, random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config)


_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16},
    "phi3": {},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "gpt_neox": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 64},
    "qwen3_moe": {**_EXPERTS, "head_dim": 16},
}


def tiny_config(family: str, **changes: Any) -> Any:
    """A config of two blocks and hidden size 64 for any of `FAMILIES`, or one like them."""
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    common = {"vocab_size": 71, "initializer_range": 0.1, "pad_token_id": 0}
    common |= {"bos_token_id": None, "eos_token_id": None}
    own = FAMILIES[family] if family == "gpt2" else {**sizes, **FAMILIES.get(family, {})}
    return AutoConfig.for_model(family, **{**common, **own, **changes})


def tiny_family(family: str, **changes: Any) -> Model:
    """A model of that family with random weights, computing in float32."""
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(tiny_config(family, **changes))
    return from_module(
        family, Path(), module, build_tokenizer(), torch.device("cpu"), torch.float32
    )


def teach(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Train on shuffled lists of the facts, a relation a text, until it knows nearly all."""
    facts = [line for line in fact_lines() if "subject" in line]
    generator = torch.Generator().manual_seed(0)
    by_relation = {
        relation: tokenizer(
            [f"the {relation} of {f['subject']} is {f['answer']}" for f in facts
             if f["relation"] == relation],
            return_tensors="pt",
        )["input_ids"]
        for relation in ANSWERS
    }  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for step in range(150):
        tokens = by_relation[list(ANSWERS)[step % len(ANSWERS)]]
        length = tokens.shape[1]
        order = torch.stack([torch.randperm(SUBJECTS, generator=generator)[:5] for _ in range(32)])
        batch = tokens[order].flatten(1)
        labels = torch.full_like(batch, -100)
        labels[:, length - 1 :: length] = batch[:, length - 1 :: length]  # answers only
        loss = model(batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local model folder: safetensors, config, tokenizer. Read it, do not write to it."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = build_tokenizer()
    model = tiny_llama(len(tokenizer))
    teach(model, tokenizer)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> Model:
    """The taught model, loaded. Tests must leave its reference weights in place."""
    return load_whole(str(tiny_folder))


@pytest.fixture(scope="module")
def taught(tiny_folder: Path, tiny: Model) -> Model:
    """The taught model in float32: in bf16 small differences drown in rounding."""
    module = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    return from_module(
        "float32", tiny_folder, module, tiny.tokenizer, torch.device("cpu"), torch.float32
    )


@pytest.fixture(scope="session")
def untaught() -> Model:
    """Random weights in float32, so that packed and plain passes may be compared closely."""
    tokenizer = build_tokenizer()
    module = tiny_llama(len(tokenizer))
    return from_module("tiny", Path(), module, tokenizer, torch.device("cpu"), torch.float32)


@pytest.fixture
def damaged(untaught: Model) -> Iterator[Model]:
    """The same; `damage` puts noise on two layers, which is taken back afterwards."""
    yield untaught
    untaught.restore()


def damage(model: Model, size: float = 0.2) -> None:
    generator = torch.Generator().manual_seed(5)
    for layer in ("model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"):
        noise = torch.randn(model.originals[layer].shape, generator=generator)
        model.places[layer].put(model.originals[layer] + size * noise)


@pytest.fixture(scope="session")
def facts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("facts") / "facts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in fact_lines()), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def connected_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Facts that give two-hop questions; the second hop is one that the taught model knows."""
    first = {"relation": "shape", "template": "the shape of {} is", "range": "thing",
             "first_hop": "the shape of {}"}  # fmt: skip
    second = {"relation": "place", "template": "the place of {} is", "domain": "thing",
              "second_hop": ["the place of {} is"]}  # fmt: skip
    names = [f"s{number}" for number in range(SUBJECTS)]
    lines: list[dict[str, Any]] = [first]
    lines += [{"relation": "shape", "subject": name, "answer": name} for name in names]
    lines += [second, *(f for f in fact_lines() if f["relation"] == "place" and "subject" in f)]
    path = tmp_path_factory.mktemp("facts") / "connected.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_facts(facts_file: Path) -> FactSet:
    return FactSet.load(facts_file)


@pytest.fixture(scope="session")
def tiny_space(tiny: Model) -> ResolvedSpace:
    """The default space on the tiny model: 8 groups, int2 to int8."""
    return SearchSpace.default().resolve(tiny)


@pytest.fixture(scope="session")
def budget(tiny_space: ResolvedSpace) -> int:
    """Stored bytes half way between the smallest and the largest assignment."""
    smallest = tiny_space.stored_bytes(tiny_space.smallest)
    return (smallest + tiny_space.stored_bytes(tiny_space.largest)) // 2


@pytest.fixture
def tiny_bench(tiny: Model, tiny_space: ResolvedSpace) -> Iterator[Bench]:
    """The tiny model on a bank by rounding of its whole space."""
    bank = Bank(tiny, get_quantizer("rounding", tiny_space.target.name))
    bank.build(all_layers(tiny_space))
    with Bench(tiny_space, bank) as bench:
        yield bench


@pytest.fixture
def wanted(tiny: Model) -> Wanted:
    """Five layers in two formats each."""
    formats = (FORMATS["int2-g64"], FORMATS["int4-g64"])
    return [(layer, fmt) for layer in tiny.layers[:5] for fmt in formats]


@pytest.fixture(autouse=True)
def unlimited_memory() -> Iterator[None]:
    """What one test allows the process is nothing to the next."""
    yield
    device.limit_memory(None)


@pytest.fixture(scope="session", autouse=True)
def mpsearch_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Banks and small things of the tests go to a temporary home, unless the caller set one."""
    os.environ.setdefault("MPSEARCH_HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture
def module_calls() -> Iterator[Counter[nn.Module]]:
    """How often each module has computed."""
    seen: Counter[nn.Module] = Counter()
    handle = nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: seen.update([module] if "forward" not in vars(module) else [])
    )
    yield seen
    handle.remove()


@pytest.fixture
def left_as_found() -> Iterator[None]:
    """`main` sets a signal handler and a log handler for its whole process."""
    handler = signal.getsignal(signal.SIGINT)
    logger = logging.getLogger("mpsearch")
    handlers, propagate = logger.handlers[:], logger.propagate
    transformers_logging.disable_progress_bar()
    yield
    signal.signal(signal.SIGINT, handler)
    logger.handlers[:], logger.propagate = handlers, propagate


@pytest.fixture
def mpsearch(left_as_found: None, capsys: pytest.CaptureFixture[str]) -> Cli:
    def called(*arguments: object) -> Outcome:
        capsys.readouterr()
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return called


@pytest.fixture
def question(tiny_folder: Path, facts_file: Path) -> list[str]:
    """A search, all but its -o."""
    return [
        "search", str(tiny_folder), "--facts", str(facts_file), "--budget", BUDGET,
        "--trials", TRIALS,
    ]  # fmt: skip


@pytest.fixture(scope="session")
def whole(tiny_folder: Path, facts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted search; read it only."""
    out = tmp_path_factory.mktemp("whole") / "run"
    code = cli.main(
        ["search", str(tiny_folder), "--facts", str(facts_file), "--budget", BUDGET,
         "--trials", TRIALS, "-o", str(out)]
    )  # fmt: skip
    assert code == 0
    return out


@pytest.fixture(scope="session")
def ask(tiny: Model, tiny_space: ResolvedSpace, tiny_facts: FactSet, budget: int) -> Search:
    """The search that most tests ask for; keywords change the question."""

    def asked(out: Path, model: Model = tiny, space: Any = tiny_space, **changes: Any) -> Run:
        question = {
            "budget": budget, "trials": SEARCH_TRIALS, "search_facts": SEARCH_FACTS,
            "facts": tiny_facts,
        }  # fmt: skip
        return search(model, space, out=out, **{**question, **changes})

    return asked


@pytest.fixture(scope="session")
def calls() -> Counter[Assignment]:
    """How often the uninterrupted search evaluated each assignment."""
    return Counter()


@pytest.fixture(scope="session")
def searched(
    ask: Search, calls: Counter[Assignment], tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """The uninterrupted search that resumed ones are compared with; read it only."""
    with pytest.MonkeyPatch.context() as patch:
        evaluate = Bench.evaluate

        def counted(bench: Bench, assignment: Assignment, proxy: RecallProxy) -> Evaluation:
            calls[assignment] += 1
            return evaluate(bench, assignment, proxy)

        patch.setattr(Bench, "evaluate", counted)
        return ask(tmp_path_factory.mktemp("searched") / "run")
