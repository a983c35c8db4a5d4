"""What is wrong with a model's folder, weights or attention, in one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from mpsearch.errors import CheckError, ModelError, ResourceError, exhausted

# What transformers, tokenizers and safetensors raise for a damaged or strange folder.
_FROM_BELOW = (
    OSError, ValueError, LookupError, RuntimeError, ImportError, TypeError, AttributeError,
    SafetensorError,
)  # fmt: skip


@contextmanager
def one_line(name: str) -> Iterator[None]:
    """What the libraries below raise for a damaged or strange folder becomes a `ModelError`.

    A `ResourceError` where memory or disk ran out.
    """
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except (*_FROM_BELOW, StrictDataclassError) as error:
        if ran_out := exhausted(error):
            raise ResourceError(f"model '{name}': {ran_out}") from error
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"model '{name}' does not load: {reason}") from error


def require_finite(name: str, tensor_name: str, tensor: Tensor) -> None:
    """Raise `CheckError` if a tensor of model `name` holds a NaN or an infinity."""
    if not tensor.is_floating_point() or not tensor.numel():
        return
    # A NaN is the least and the greatest; this needs no second tensor of the size.
    if not all(extreme.isfinite() for extreme in tensor.aminmax()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise CheckError(
            f"model '{name}': '{tensor_name}' holds {bad} NaN or infinite of "
            f"{tensor.numel()} values; the checkpoint is damaged, get it again"
        )


@torch.inference_mode()
def check_attention(name: str, module: Any, device: torch.device, has_experts: bool) -> None:
    """Refuse models in which a token sees another that its mask hides; see `mpsearch.forward`."""
    mask = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool, device=device)

    def logits_of_last(hidden: int) -> Tensor:
        output = module(
            input_ids=torch.tensor([[1, hidden, 2]], device=device),
            position_ids=torch.tensor([[0, 1, 1]], device=device),
            attention_mask=mask[None, None],
            use_cache=False,
            logits_to_keep=torch.tensor([2], device=device),
        )
        logits: Tensor = output.logits[0, -1].float()
        return logits

    require_masked(name, module, lambda: [logits_of_last(hidden) for hidden in (3, 4)], has_experts)


def require_masked(
    name: str, module: Any, ask: Callable[[], Sequence[Tensor]], has_experts: bool
) -> None:
    """Refuse a model in which a token sees another that its mask hides.

    State spaces, linear attention and attention without a general mask fail this.

    Args:
        ask: gives the logits of the last of three tokens, which attends to the first only, with one
            and with another token between them, which it so must not notice.
    Raises:
        ModelError: it does notice, or no such mask can be given.
    """
    try:
        one, other = ask()
    except _FROM_BELOW as error:
        if exhausted(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"model '{name}' ({type(module).__name__}) does not run under a general attention "
            f"mask, by which facts share a pass ({reason}); use another model"
        ) from error
    # Rounding alone, where experts take other tokens together in the second pass.
    tolerance = 5e-2 if has_experts else 1e-4
    if (one - other).abs().max() > tolerance * one.std():
        raise ModelError(
            f"model '{name}' ({type(module).__name__}) lets a token see another that its mask "
            "hides, as state spaces and linear attention do, so facts cannot share a pass; use a "
            "model with softmax attention throughout, loaded with sdpa"
        )
