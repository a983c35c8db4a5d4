"""What runs a pass for candidates, as the model's weights allow: the model itself, or a walk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from torch import Tensor

from mpsearch.errors import CheckError
from mpsearch.forward import Pass
from mpsearch.reuse import Reuse
from mpsearch.walk import Held, Walk

T = TypeVar("T")


def runner(work: Pass) -> Reuse | Walk:
    """What runs a pass for one candidate after another, as the model's weights allow."""
    return Walk(work) if work.model.streamed else Reuse(work)


def each_scored(
    run: Reuse | Walk, candidates: Sequence[Held], scores: Callable[[Iterable[Tensor]], T]
) -> Iterator[T | CheckError]:
    """Several candidates of a streamed model, each scored by its rows' logits.

    Yields:
        For each what `scores` gives, or the `CheckError` that it raises.
    """
    assert isinstance(run, Walk)  # a loaded model's candidates are put in place one by one
    for logits in run.run(candidates):
        try:
            yield scores(logits)
        except CheckError as error:
            yield error
