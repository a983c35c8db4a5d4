"""The guard beside facts: does a candidate still predict text as its reference does?

Perplexity and KL are over every token of the text. While it reads, about four `(256, vocab)`
float32 tensors are held beside what was kept of the reference (`divergence.py`): 0.2 GiB for 49k
tokens, 0.5 GiB for 128k.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from mpsearch.divergence import Shortened
from mpsearch.errors import CheckError, UsageError
from mpsearch.fluency import TextScores
from mpsearch.forward import Pass, TokenSequence
from mpsearch.models import Model
from mpsearch.runner import each_scored, runner
from mpsearch.walk import Held

LENGTH = 256  # tokens, at which a longer paragraph is cut
MOST_TOKENS = 4096  # of a text; further paragraphs are left out
_LEAST_PARAGRAPHS = 2  # for a standard error


@dataclass(frozen=True, eq=False)
class ReferenceText:
    """What KL is measured from, without the model that said it.

    Attributes:
        distributions: for each sequence its tokens'.
    """

    model_name: str
    sequences: tuple[TokenSequence, ...]
    distributions: tuple[Shortened, ...]


class TextGuard:
    """Some paragraphs, prepared once and predicted by every candidate.

    The model must hold its reference weights while this is built.

    Args:
        model: predicts with whatever weights it holds at the time.
        paragraphs: usually one half of a `Text`.
        against: another model's, from which KL is measured; by default these weights' own.
    Attributes:
        reference: the scores of the weights that the model holds now.
        said: what KL is measured from.
    Raises:
        UsageError: too little text, or `against` reads it as other tokens.
    """

    def __init__(
        self, model: Model, paragraphs: Sequence[str], *, against: ReferenceText | None = None
    ):
        pieces = cut_text(model.tokenizer, paragraphs)
        self._model = model
        self._sequences = tuple(piece for cut in pieces for piece in cut)
        self._paragraph_of = [number for number, cut in enumerate(pieces) for _ in cut]
        self._pass = Pass(model, self._sequences)
        self._runner = runner(self._pass)
        if against is not None and against.sequences != self._sequences:
            raise UsageError(
                f"'{model.name}' reads the text as other tokens than '{against.model_name}', so "
                "their predictions cannot be compared; compare a model with its own quantizations"
            )
        self.said = against
        self.reference = self.score()

    def score(self, held: Held | None = None) -> TextScores:
        """Let the weights that the model holds now predict the text.

        Args:
            held: as `RecallProxy.score` takes it.
        Raises:
            CheckError: a log-probability is NaN; the weights or the arithmetic broke.
        """
        if held is None and not self._model.streamed:
            return self._scores(None)
        return self._scores(self._runner.logits(held or {}))

    def score_all(self, candidates: Sequence[Held]) -> Iterator[TextScores | CheckError]:
        """As `RecallProxy.score_all`."""
        return each_scored(self._runner, candidates, self._scores)

    def _scores(self, logits: Iterable[Tensor] | None) -> TextScores:
        """Of the rows' logits; by default those of the weights in place."""
        paragraphs = self._paragraph_of[-1] + 1
        counts, log_prob, kl = np.zeros(paragraphs, dtype=int), *np.zeros((2, paragraphs))
        said: dict[int, Shortened] = {}
        for index, log_probs, tokens in self._pass.continuations(logits):
            paragraph = self._paragraph_of[index]
            counts[paragraph] += len(tokens)
            log_prob[paragraph] += float(log_probs.gather(-1, tokens[:, None]).double().sum())
            if self.said is None:
                said[index] = Shortened.of(log_probs)
            else:
                kl[paragraph] += float(self.said.distributions[index].kl(log_probs).sum())
        if not (np.isfinite(log_prob).all() and np.isfinite(kl).all()):
            raise CheckError(
                "log-probabilities of the text are NaN or infinite; the weights in place are broken"
            )
        if self.said is None:
            kept = tuple(said[index] for index in range(len(said)))
            self.said = ReferenceText(self._model.name, self._sequences, kept)
        return TextScores(
            tuple(int(count) for count in counts),
            tuple(float(nats) for nats in log_prob),
            tuple(float(nats) for nats in kl),
        )


def cut_text(tokenizer: Any, paragraphs: Sequence[str]) -> list[list[TokenSequence]]:
    """The sequences of each paragraph, up to `MOST_TOKENS`; raises `UsageError` if too few."""
    found: list[list[TokenSequence]] = []
    for paragraph in paragraphs:
        if cut := cut_paragraph(tokenizer, paragraph):
            found.append(cut)
        if sum(len(piece.tokens) for cut in found for piece in cut) >= MOST_TOKENS:
            break
    if len(found) < _LEAST_PARAGRAPHS:
        raise UsageError(
            f"half of the text has {len(found)} paragraphs of at least two tokens, and "
            f"{_LEAST_PARAGRAPHS} are needed; give a longer text"
        )
    return found


def cut_paragraph(tokenizer: Any, paragraph: str) -> list[TokenSequence]:
    """Sequences of at most `LENGTH` tokens, each after the special tokens that begin a text.

    Where a tokenizer has none, the first token of a sequence is not predicted; a sequence with
    nothing left to predict is left out.
    """
    encoded = tokenizer(paragraph, return_special_tokens_mask=True, padding=False, truncation=False)
    tokens, special = encoded["input_ids"], encoded["special_tokens_mask"]
    own = [token for token, added in zip(tokens, special, strict=True) if not added]
    front = tokens[: [*special, 0].index(0)]
    start, step = max(len(front), 1), LENGTH - len(front)
    cut = ((*front, *own[at : at + step]) for at in range(0, len(own), step))
    return [TokenSequence(piece, start) for piece in cut if len(piece) > start]
