"""What a model said about running text: perplexity, and KL from the reference, a token.

Paragraphs are the independent units, so every standard error is over them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import exp, isfinite
from typing import Any

import numpy as np

from mpsearch.errors import UsageError
from mpsearch.estimates import Estimate, ratio


@dataclass(frozen=True)
class TextScores:
    """Sums over the tokens that one model predicted in each paragraph of a text.

    Attributes:
        tokens: `(paragraphs,)` predicted ones.
        log_prob_nats: `(paragraphs,)` of the text itself.
        kl_nats: `(paragraphs,)` from the reference's next-token distributions to the model's; zero
            for the reference itself.
    """

    tokens: tuple[int, ...]
    log_prob_nats: tuple[float, ...]
    kl_nats: tuple[float, ...]

    @classmethod
    def of(cls, content: Mapping[str, Any] | None) -> TextScores | None:
        """From JSON; None where there is none."""
        if content is None:
            return None
        return cls(*(tuple(content[name]) for name in ("tokens", "log_prob_nats", "kl_nats")))

    @property
    def kl(self) -> Estimate:
        """Nats a token."""
        return ratio(self.kl_nats, self.tokens)

    @property
    def log_perplexity(self) -> Estimate:
        """Nats a token: minus the mean log-probability of the text."""
        return ratio(-np.array(self.log_prob_nats), self.tokens)

    @property
    def perplexity(self) -> float:
        return exp(self.log_perplexity.mean)

    def log_perplexity_change(self, reference: TextScores) -> Estimate:
        """Nats a token, paired by paragraph; above zero where this model predicts worse."""
        change = np.array(reference.log_prob_nats) - np.array(self.log_prob_nats)
        return ratio(change, self.tokens)

    def about(self) -> dict[str, Any]:
        """As JSON: how much text, and how well it is predicted."""
        return {
            "paragraphs": len(self.tokens),
            "tokens": sum(self.tokens),
            "perplexity": self.perplexity,
            "log_perplexity_nats": asdict(self.log_perplexity),
        }

    def compared(self, reference: TextScores) -> dict[str, Any]:
        """As JSON: how this model's predictions differ from the reference's."""
        return {
            **self.about(),
            "reference_perplexity": reference.perplexity,
            "log_perplexity_change_nats": asdict(self.log_perplexity_change(reference)),
            "kl_nats": asdict(self.kl),
        }


def check_max_text_kl(nats: float | None) -> None:
    """Raise `UsageError` for a limit that makes no sense; None is no limit."""
    if nats is not None and not (isfinite(nats) and nats >= 0):
        raise UsageError(
            f"max text KL {nats}: a number of nats a token is needed, 0 or more, such as 0.1"
        )
