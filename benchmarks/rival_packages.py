"""Ask a real package which bits each group gets; runs in the environment that holds the packages.

Protocol: the package scores every group in every width once, with its own method on the texts of
the request, and is then solved for each budget. What it searches over and how it counts are brought
next to ours: symmetric integers of our widths and group size, our ties, embedding and head left
out. Scales are left out of its count: they cost the same in every format of one group size, so what
is left differs from ours by a constant, and its bits a weight follow from a budget. Should a
solution take more than that, its bits are lowered until it fits.

    .venv-peers/bin/python benchmarks/rival_packages.py REQUEST REPLY

The request is JSON: `package`, `model` (a folder), `texts`, `tokens` (of each text, from its
beginning), `groups` (name, layers, weights, bytes by width), `group_size`, `kept_bytes`,
`budgets_bytes` by size, `work` (a folder that is thrown away). The reply: versions, what the
package was given, seconds, and for each size the bits of every group.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

Solve = Callable[[float], Mapping[str, int]]

BATCH = 8  # what AutoScheme takes by itself
_MOST_SOLVES = 13


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    start = time.perf_counter()
    solve, told = PACKAGES[request["package"]](request)
    told["score_seconds"] = time.perf_counter() - start
    sizes = {}
    for size, budget_bytes in request["budgets_bytes"].items():
        start = time.perf_counter()
        sizes[size] = within(budget_bytes, request, solve)
        sizes[size]["solve_seconds"] = time.perf_counter() - start
    names = (request["package"].replace("modelopt", "nvidia-modelopt"), "torch", "transformers")
    versions = {name: version(name) for name in names}
    reply = {"versions": versions, **told, "sizes": sizes}
    Path(sys.argv[2]).write_text(json.dumps(reply), encoding="utf-8")


# ------------------------------------------------------------------------------ bits and bytes


def widest(groups: Sequence[Mapping[str, Any]], layers: Mapping[str, int]) -> dict[str, int]:
    """Bits of each group from those of its layers: the most of any, where a tie was broken."""
    return {group["name"]: max(layers[name] for name in group["layers"]) for group in groups}


def stored_bytes(request: Mapping[str, Any], bits: Mapping[str, int]) -> int:
    """Bytes of the checkpoint, by the request's table."""
    searched = sum(group["bytes"][str(bits[group["name"]])] for group in request["groups"])
    return int(request["kept_bytes"] + searched)


def average_bits(request: Mapping[str, Any], size_bytes: int) -> float:
    """Bits a weight, scales left out, that fill so many bytes of a checkpoint."""
    groups = request["groups"]
    width, narrowest = min((int(width), width) for width in groups[0]["bytes"])
    fixed_bytes = request["kept_bytes"] + sum(
        group["bytes"][narrowest] - group["weights"] * width / 8 for group in groups
    )
    return float(8 * (size_bytes - fixed_bytes) / sum(group["weights"] for group in groups))


def within(budget_bytes: int, request: Mapping[str, Any], solve: Solve) -> dict[str, Any]:
    """The package's solution that takes most of a budget, and the bits that it was asked for.

    Raises:
        ValueError: not even its smallest solution fits.
    """
    widths = [int(width) for width in request["groups"][0]["bytes"]]
    low, high = float(min(widths)), min(average_bits(request, budget_bytes), float(max(widths)))
    best: dict[str, Any] = {}
    asked, solves = high, 0
    while solves < _MOST_SOLVES:
        solves += 1
        bits = widest(request["groups"], solve(asked))
        size_bytes = stored_bytes(request, bits)
        if size_bytes > budget_bytes:
            high = asked
        else:
            if size_bytes > best.get("stored_bytes", 0):
                best = {"bits": bits, "stored_bytes": size_bytes, "asked_bits": asked}
            if asked == high:
                break
            low = asked
        asked = (low + high) / 2
    if not best:
        raise ValueError(f"no solution of {request['package']} fits {budget_bytes:,} bytes")
    return {**best, "solves": solves}


# ------------------------------------------------------------------------------ the packages

# They are imported where they are used, so that what stands above is tested without them.


def auto_round(request: Mapping[str, Any]) -> tuple[Solve, dict[str, Any]]:
    """AutoScheme: |gradient x weight error| summed over weights, then an exact dynamic program.

    Its scores are kept in files that later solutions read.
    """
    scores = Path(request["work"], "scores")
    os.environ["AR_AUTO_SCHEME_CACHE"] = str(scores)
    from auto_round import AutoScheme
    from auto_round.auto_scheme.gen_auto_scheme import GenScheme
    from auto_round.schemes import QuantizationScheme

    model, tokenizer = _load(request)
    texts = Path(request["work"], "texts.json")
    texts.write_text(json.dumps(request["texts"]), encoding="utf-8")
    widths = [int(width) for width in request["groups"][0]["bytes"]]
    options = [
        QuantizationScheme(
            bits=bits, group_size=request["group_size"], sym=True, data_type="int", act_bits=16
        )
        for bits in widths
    ]
    layers = [name for group in request["groups"] for name in group["layers"]]
    settings = {
        "ignore_scale_zp_bits": True,
        "nsamples": len(request["texts"]),
        "seqlen": request["tokens"],
        "batch_size": BATCH,
        "low_cpu_mem_usage": False,  # would read every block from its file again
    }

    def solve(bits: float) -> Mapping[str, int]:
        scheme = AutoScheme(
            # It rounds the bits of the whole model down.
            avg_bits=min(bits + 1e-8, float(max(widths))),
            options=options,
            shared_layers=[group["layers"] for group in request["groups"]],
            dataset=str(texts),
            **settings,
        )
        generator = GenScheme(
            scheme, model, layers, {}, dataset=str(texts), device_map="cpu", tokenizer=tokenizer
        )
        found = generator.get_layer_config()
        return {name: int(found[name]["bits"]) for name in layers}

    solve((min(widths) + max(widths)) / 2)  # scores
    return solve, {
        "formats_used": [
            {"bits": bits, "group_size": request["group_size"], "sym": True, "data_type": "int"}
            for bits in widths
        ],
        "ties": "shared_layers: our groups",
        "scales": "not counted (ignore_scale_zp_bits)",
        "settings": settings,
        "dtype": str(model.dtype),
    }


def modelopt(request: Mapping[str, Any]) -> tuple[Solve, dict[str, Any]]:
    """auto_quantize: (gradient x output error)^2 summed over outputs, then a linear program."""
    import modelopt.torch.quantization as mtq
    import torch

    model, tokenizer = _load(request)
    tokens = torch.tensor(
        [tokenizer(text)["input_ids"][: request["tokens"]] for text in request["texts"]]
    )
    batches = [{"input_ids": batch, "labels": batch} for batch in torch.split(tokens, BATCH)]
    widths = [int(width) for width in request["groups"][0]["bytes"]]
    quantizers = [{"num_bits": bits, "block_sizes": {-1: request["group_size"]}} for bits in widths]
    formats = [
        {
            "quant_cfg": [
                {"quantizer_name": "*", "enable": False},
                {"quantizer_name": "*weight_quantizer", "cfg": quantizer, "enable": True},
            ],
            "algorithm": "max",
        }
        for quantizer in quantizers
    ]
    layers = [name for group in request["groups"] for name in group["layers"]]
    settings = {
        "method": "gradient",
        "num_calib_steps": 0,  # scales are of the weights alone
        "num_score_steps": len(batches),
    }

    def constraints(bits: float) -> dict[str, Any]:
        return {"effective_bits": bits, "cost": {"excluded_module_name_patterns": ["*lm_head*"]}}

    _, state = mtq.auto_quantize(
        model,
        constraints=constraints((min(widths) + max(widths)) / 2),
        quantization_formats=formats,
        # Every layer is quantized: no unquantized ones among the choices.
        module_search_spaces=[
            {
                "module_name_patterns": layers,
                "quantization_formats": formats,
                "allow_no_quant": False,
            }
        ],
        data_loader=batches,
        forward_step=lambda model, batch: model(**batch),
        loss_func=lambda output, batch: output.loss,
        disabled_layers=["*lm_head*"],
        verbose=False,
        **settings,
    )

    def solve(bits: float) -> Mapping[str, int]:
        config = mtq.get_auto_quantize_config(state, constraints(bits))
        found = {
            entry["quantizer_name"].removesuffix(".weight_quantizer"): int(entry["cfg"]["num_bits"])
            for entry in config["quant_cfg"]
            if entry["quantizer_name"].endswith(".weight_quantizer") and entry["enable"]
        }
        return {name: found[name] for name in layers}

    return solve, {
        "formats_used": [{**cfg, "block_sizes": {"-1": request["group_size"]}, "algorithm": "max"}
                         for cfg in quantizers],
        "ties": "its own rules: q/k/v and gate/up",
        "scales": "not counted (effective_bits is of num_bits)",
        "settings": {**settings, "batch_size": BATCH},
        "dtype": str(model.dtype),
    }  # fmt: skip


def _load(request: Mapping[str, Any]) -> tuple[Any, Any]:
    """Model and tokenizer, in fp32: exact, and on a CPU without bf16 units many times faster."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    folder = request["model"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


PACKAGES = {"auto-round": auto_round, "modelopt": modelopt}


if __name__ == "__main__":
    main()
