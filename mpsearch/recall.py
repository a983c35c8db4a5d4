"""The proxy: does the model still recall facts?

Each fact is asked after a few solved examples of its relation. Scores per fact:

- answer log-probability, summed over the answer's tokens, in nats;
- KL from the reference to the candidate at the first answer token, in nats;
- top-1: the likeliest first token is a non-empty, case-insensitive prefix of the answer
  (the rule of the LRE study, Hernandez et al. 2023);
- contrastive: the answer ranks first among distractors by log-probability per token.

Answer loss is the reference's log-probability of the answer minus the candidate's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpsearch.errors import CheckError
from mpsearch.facts import Fact, FactSet
from mpsearch.forward import Pass, TokenSequence
from mpsearch.models import Model

SHOTS = 4


@dataclass(frozen=True, eq=False)
class FactScores:
    """What one model said about a fixed list of facts.

    Attributes:
        log_prob: `(facts,)` of the answer, in nats.
        kl: `(facts,)` from the reference, in nats; zero for the reference itself.
        top1: `(facts,)` bool.
        correct: `(facts,)` bool, contrastive; None where distractors were not asked.
    """

    log_prob: NDArray[Any]
    kl: NDArray[Any]
    top1: NDArray[Any]
    correct: NDArray[Any] | None


class RecallProxy:
    """A list of facts, prepared once and asked of every candidate.

    The model must hold its reference weights while this is built.

    Args:
        model: asked with whatever weights it holds at the time.
        fact_set: source of solved examples and distractors.
        facts: the ones to ask, usually one partition.
        contrast: whether to ask the distractors too.
        shots: solved examples before each question, where the relation has that many.
    """

    def __init__(
        self,
        model: Model,
        fact_set: FactSet,
        facts: Sequence[Fact],
        *,
        contrast: bool,
        shots: int = SHOTS,
    ):
        self.facts = tuple(facts)
        self.relations = [fact.relation for fact in self.facts]
        self._answers_of: list[list[int]] = []
        sequences: list[TokenSequence] = []
        for fact in self.facts:
            distractors = fact_set.distractors(fact) if contrast else ()
            self._answers_of.append(
                list(range(len(sequences), len(sequences) + 1 + len(distractors)))
            )
            sequences += [
                ask(model, fact_set, fact, answer, shots) for answer in (fact.answer, *distractors)
            ]
        self._lengths = np.array([len(s.tokens) - s.start for s in sequences])
        self._contrast = contrast
        self._tokenizer = model.tokenizer
        self._pass = Pass(model, sequences)
        self._reference_first: Tensor | None = None
        self.reference = self.score()

    @property
    def tokens(self) -> int:
        """Distinct tokens that scoring pushes through the model."""
        return self._pass.tokens

    @property
    def chance(self) -> float:
        """Contrastive recall of blind guessing, averaged over facts."""
        return float(np.mean([1 / len(answers) for answers in self._answers_of]))

    def score(self) -> FactScores:
        """Ask all facts of the weights that the model holds now.

        Raises:
            CheckError: a log-probability is NaN; the weights or the arithmetic broke.
        """
        fact_of = {answers[0]: index for index, answers in enumerate(self._answers_of)}
        kl = np.zeros(len(self.facts))
        first_tokens = np.zeros(len(self.facts), dtype=np.int64)
        reference = self._reference_first
        firsts: list[tuple[int, Tensor]] = []

        def visit(index: int, log_probs: Tensor) -> None:
            if (fact := fact_of.get(index)) is None:
                return
            first_tokens[fact] = int(log_probs.argmax())
            if reference is None:
                firsts.append((fact, log_probs.cpu()))
            else:
                kl[fact] = kl_divergence(reference[fact].to(log_probs.device), log_probs)

        sums = self._pass.run(visit).numpy()
        if not np.isfinite(sums).all():
            raise CheckError(
                f"{int((~np.isfinite(sums)).sum())} of {sums.size} answer log-probabilities are "
                "NaN or infinite; the weights in place are broken"
            )
        if reference is None:
            self._reference_first = torch.stack(
                [lp for _, lp in sorted(firsts, key=lambda f: f[0])]
            )
        top1 = [
            _is_prefix(self._tokenizer.decode([int(token)]), fact)
            for token, fact in zip(first_tokens, self.facts, strict=True)
        ]
        correct = None
        if self._contrast:
            per_token = sums / self._lengths
            correct = np.array(
                [per_token[a[0]] > per_token[a[1:]].max() for a in self._answers_of], dtype=bool
            )
        log_prob = sums[[answers[0] for answers in self._answers_of]]
        return FactScores(log_prob, kl, np.array(top1, dtype=bool), correct)


def prompt(fact_set: FactSet, fact: Fact, shots: int) -> str:
    """Solved examples of the relation, a line each, then the fact's own prompt."""
    examples = fact_set.demonstrations(fact.relation, shots)
    return "".join(f"{e.prompt} {e.answer}\n" for e in examples) + fact.prompt


def ask(model: Model, fact_set: FactSet, fact: Fact, answer: str, shots: int) -> TokenSequence:
    """A fact's question and one answer to it, in the model's chat template if it is asked so."""
    context = prompt(fact_set, fact, shots)
    if not model.chat:
        return encode(model.tokenizer, context, f" {answer}")
    turn = [{"role": "user", "content": context}]
    context = model.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    # The template has written the special tokens.
    return encode(model.tokenizer, context, answer, add_special_tokens=False)


def encode(
    tokenizer: Any, context: str, continuation: str, add_special_tokens: bool = True
) -> TokenSequence:
    """Tokens of context and continuation, and where the continuation starts.

    The text is tokenized whole, so a token that covers both sides of the boundary counts as the
    continuation's. Special tokens that the tokenizer puts in front stay, those behind are dropped.
    """
    encoded = tokenizer(
        context + continuation, return_offsets_mapping=True, add_special_tokens=add_special_tokens
    )
    tokens, offsets = encoded["input_ids"], encoded["offset_mapping"]
    while offsets[-1][0] == offsets[-1][1]:
        tokens, offsets = tokens[:-1], offsets[:-1]
    start = next(i for i, (_, end) in enumerate(offsets) if end > len(context))
    return TokenSequence(tuple(tokens), start)


def kl_divergence(reference: Tensor, candidate: Tensor) -> float:
    """KL(reference || candidate) of two `(vocab,)` log-probability vectors, in nats.

    Clamped at zero, below which only rounding can take it. NaN if the candidate is NaN.
    Source: forward KL as a fitness, EvoPress (arXiv:2410.14649).
    """
    divergence = (reference.exp() * (reference - candidate)).sum(dtype=torch.float64)
    return float(divergence.clamp(min=0.0))


def known_relations(proxy: RecallProxy) -> tuple[str, ...]:
    """Relations that the reference knows: contrastive recall beats chance by two standard errors.

    Raises:
        CheckError: it knows none, so there is nothing that a search could preserve.
    """
    correct = proxy.reference.correct
    if correct is None:
        raise ValueError("the gate needs a proxy that asks distractors")
    known = []
    for relation in dict.fromkeys(proxy.relations):
        mine = [i for i, name in enumerate(proxy.relations) if name == relation]
        chance = float(np.mean([1 / len(proxy._answers_of[i]) for i in mine]))
        needed = chance + 2 * np.sqrt(chance * (1 - chance) / len(mine))
        if float(correct[mine].mean()) > needed:
            known.append(relation)
    if not known:
        raise CheckError(
            "the reference answers no relation better than chance, so there is no knowledge to "
            "preserve; use other facts or another model"
        )
    return tuple(known)


def _is_prefix(predicted: str, fact: Fact) -> bool:
    text = predicted.strip().casefold()
    return bool(text) and any(answer.casefold().startswith(text) for answer in fact.accepted)
