"""What a search is asked for, and what of it is refused in an instant."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from operator import index
from typing import Any

from mpsearch.asked import MOST_FACTS
from mpsearch.calibration import Calibration
from mpsearch.errors import UsageError
from mpsearch.fluency import check_max_text_kl
from mpsearch.formats import nearest
from mpsearch.samplers import SAMPLERS
from mpsearch.sizes import check_reachable, format_size, parse_size
from mpsearch.space import ResolvedSpace
from mpsearch.text import Text

log = logging.getLogger(__name__)

TRIALS = 150
_NO_END = 10**9
AT_ONCE = 4


@dataclass(frozen=True)
class Wish:
    """What a search is asked for, beside the model and the space.

    Attributes:
        budget: stored bytes allowed, as a number or as text such as `96 MiB`.
        trials: proposals after the baselines; None for `TRIALS`, or as many as `seconds` allow.
        seconds: stop proposing after this time, even if trials are left; what proposals took
            before a resume counts. None for no limit.
        quantizer: None for the target's default.
        calibration: for quantizers that need inputs; None for text that the model writes.
        search_facts: at most this many facts score each candidate.
        text: None for the built-in one.
        max_text_kl_nats: KL from the reference on search text, a token, that no recommended
            assignment exceeds; every candidate then reads that text. None for no limit. What is
            reported is of held-out text.
        at_once: proposals that are scored together, by one walk if the model is streamed, and so
            know nothing of each other's scores; None for 1, or `AT_ONCE` if it is streamed.
    """

    budget: str | int
    trials: int | None = None
    seconds: float | None = None
    seed: int = 0
    sampler: str = "level-switch"
    quantizer: str | None = None
    search_facts: int = MOST_FACTS["search"]
    calibration: Calibration | None = None
    text: Text | None = None
    max_text_kl_nats: float | None = None
    at_once: int | None = None

    def __post_init__(self) -> None:
        # Whole numbers of numpy become Python's, which JSON holds.
        for name in ("budget", "trials", "seed", "search_facts", "at_once"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                object.__setattr__(self, name, _whole(name, value))

    @property
    def budget_bytes(self) -> int:
        return parse_size(self.budget) if isinstance(self.budget, str) else self.budget

    @property
    def most_trials(self) -> int:
        if self.trials is not None:
            return self.trials
        return TRIALS if self.seconds is None else _NO_END


def _whole(name: str, value: Any) -> int:
    try:
        return index(value)
    except TypeError:
        size = ", or text such as '96 MiB'" if name == "budget" else ""
        raise UsageError(
            f"{name.replace('_', ' ')} {value!r}: a whole number is needed{size}"
        ) from None


def check_seed(seed: int) -> None:
    """Raise `UsageError` for one that not every generator takes."""
    if not 0 <= seed < 2**32:
        raise UsageError(f"seed {seed} is out of range; use 0 to {2**32 - 1}")


def check_wish(space: ResolvedSpace, wish: Wish) -> None:
    """Refuse in an instant what cannot be done.

    Raises:
        InfeasibleError: a budget below the smallest assignment.
        UsageError: a number that makes no sense.
    """
    if wish.most_trials < 0 or wish.search_facts < 2:
        raise UsageError(
            f"trials {wish.most_trials}, search facts {wish.search_facts}: at least 0 and 2 are "
            "needed"
        )
    if wish.seconds is not None and not wish.seconds >= 0:
        raise UsageError(f"seconds {wish.seconds}: at least 0 are needed, or None for no limit")
    check_seed(wish.seed)
    if wish.at_once is not None and wish.at_once < 1:
        raise UsageError(f"proposals scored at once {wish.at_once}: at least 1 is needed")
    check_max_text_kl(wish.max_text_kl_nats)
    if wish.sampler not in SAMPLERS:
        raise UsageError(f"no sampler '{wish.sampler}'{nearest(wish.sampler, SAMPLERS)}")
    smallest, largest = space.stored_bytes(space.smallest), space.stored_bytes(space.largest)
    kept = format_size(space.kept_bytes)
    check_reachable(
        wish.budget_bytes,
        smallest,
        largest,
        f"{kept} of it are weights that this space keeps in bf16; raise the budget to at least "
        f"{smallest / 2**20 + 0.01:.2f}MiB or allow smaller formats",
    )
    if wish.budget_bytes >= largest:
        log.warning(
            "budget %s holds even the largest formats of this space (%s): nothing needs to be "
            "given up; searching anyway",
            format_size(wish.budget_bytes),
            format_size(largest),
        )
