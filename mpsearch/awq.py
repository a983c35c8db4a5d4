"""AWQ as a preparation of the model: activation-aware scales, folded into its norms, exactly.

A linear that reads a norm's output computes the same if an input channel of its weight is
multiplied by a scale and the norm's gain divided by it. Channels that carry large activations get
large weights, and so small relative errors, whatever quantizer and format follow (Lin et al.,
arXiv:2306.00978).

Scales here are powers of two. Multiplying by one changes no digit of a floating-point number, so
the prepared model is the same function bit for bit, and stays one when it is stored in bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.calibration import Calibration, calibration_tokens, input_statistics
from mpsearch.codecs import decode
from mpsearch.errors import ModelError, ResourceError
from mpsearch.formats import FORMATS
from mpsearch.models import Model, from_module
from mpsearch.quantizers import InputStatistics
from mpsearch.quantizers.rounding import Rounding

# Of an activation's root mean square: how much of it goes into the scale.
_STRENGTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
_TRIED_ON = (FORMATS["int3-g64"], FORMATS["int3-g32"], FORMATS["int3-channel"])
# Of the layers that read a norm together, evenly spread: some outputs tell which scale is best.
_MOST_ROWS = 512


def prepare(
    model: Model,
    calibration: Calibration | None = None,
    report: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Model:
    """The same function with the scales folded in under which its linears err least.

    Errors are of the outputs of the linears that read a norm, or of a few hundred of them,
    rounded to 3 bits, on the calibration text; the choice is among powers of each channel's root
    mean square.

    Args:
        model: must not be used any more afterwards.
    Raises:
        ModelError: no norm is read by linears alone, or folding would change the function.
        ResourceError: the model is streamed.
    """
    _require_loaded(model)
    tokens = calibration_tokens(model, calibration or Calibration())
    readers = _readers(model, tokens[:1])
    if not readers:
        raise ModelError(
            f"model '{model.name}' has no norm whose output linears read, so there is nothing to "
            "fold AWQ's scales into; leave --awq away"
        )
    statistics = input_statistics(
        model, tokens, lambda done, total: report("calibration", done, total)
    )
    foldings = {}
    for index, (norm, layers) in enumerate(readers.items()):
        report("awq", index, len(readers))
        exponents = _best_exponents(model, layers, statistics[layers[0]])
        foldings[norm] = {"readers": layers, "exponents": exponents}
    report("awq", len(readers), len(readers))
    return fold(model, foldings)


def fold(model: Model, foldings: Mapping[str, Any]) -> Model:
    """Fold scales in that were found before: a prepared model's `preparation`.

    Args:
        model: must not be used any more afterwards.
        foldings: norm to the layers that read it and to one exponent of two a channel.
    Raises:
        ModelError: it would not be the same function: a norm does not multiply by its weight, or
            something else reads it.
        ResourceError: the model is streamed.
    """
    _require_loaded(model)
    probe = torch.arange(1, 17, device=model.device)[None] % len(model.tokenizer)
    with torch.inference_mode():
        before = model.module(probe, use_cache=False).logits
    for norm, folding in foldings.items():
        scale = 2.0 ** torch.tensor(folding["exponents"], device=model.device)
        for parameter in model.module.get_submodule(norm).parameters():
            parameter.data = (parameter.data.float() / scale).to(parameter.dtype)
        for layer in folding["readers"]:
            place = model.places[layer]
            place.put((place.original.float() * scale).to(model.dtype))
    with torch.inference_mode():
        after = model.module(probe, use_cache=False).logits
    if not torch.equal(before, after):
        raise ModelError(
            f"model '{model.name}': folding AWQ's scales into its norms changes what it computes; "
            "leave --awq away"
        )
    prepared = from_module(
        model.name, model.folder, model.module, model.tokenizer, model.device, model.dtype
    )
    return replace(prepared, preparation=dict(foldings), chat=model.chat)


def _require_loaded(model: Model) -> None:
    if model.streamed:
        raise ResourceError(
            f"AWQ's scales are folded into a model in memory, and '{model.name}' is read block by "
            "block for want of it; give it more memory, or leave --awq away"
        )


def _readers(model: Model, tokens: Tensor) -> dict[str, list[str]]:
    """Norm to the layers that read its output; only linears of their own parameter."""
    latest: dict[str, Any] = {"norm": "", "output": None}
    found: dict[str, list[str]] = {}

    def after_norm(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            latest.update(norm=name, output=output)

        return hook

    def before_layer(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inputs[0] is latest["output"]:
                found.setdefault(latest["norm"], []).append(name)

        return hook

    modules = dict(model.module.named_modules())
    hooks = [
        module.register_forward_hook(after_norm(name))
        for name, module in modules.items()
        if "norm" in type(module).__name__.lower() and getattr(module, "weight", None) is not None
    ]
    hooks += [
        modules[name].register_forward_pre_hook(before_layer(name))
        for name, place in ((layer.name, model.places[layer.name]) for layer in model.layers)
        if place.expert is None
    ]
    try:
        with torch.inference_mode():
            model.module.get_decoder()(tokens, use_cache=False)
    finally:
        for registered in hooks:
            registered.remove()
    return found


@torch.no_grad()
def _best_exponents(model: Model, layers: list[str], seen: InputStatistics) -> list[int]:
    """The exponents, among those of all strengths, with the least error of the layers' outputs."""
    weights = [model.originals[layer] for layer in layers]
    step = ceil(sum(len(rows) for rows in weights) / _MOST_ROWS)
    weight = torch.cat([rows[::step] for rows in weights]).float()
    columns = weight.shape[1]
    fmt = next(f for f in _TRIED_ON if f.group_size is None or columns % f.group_size == 0)
    rms = (seen.gram.diagonal() / seen.tokens).sqrt()
    used = rms > 0
    size = torch.where(used, rms, rms[used].median() if used.any() else 1.0).log2()
    best, least = torch.zeros(columns), float("inf")
    for strength in _STRENGTHS:
        exponents = (strength * (size - size.mean())).round()
        scale = 2.0**exponents
        stored = Rounding().quantize(weight * scale, [fmt], None)[fmt.name]
        wrong = decode(stored, fmt).float() / scale - weight
        error = float(((wrong @ seen.gram) * wrong).sum())
        if error < least:
            best, least = exponents, error
    return [int(exponent) for exponent in best]
