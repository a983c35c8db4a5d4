"""The proxy: does the model still recall facts?

Each fact is asked after a few solved examples of its relation. Scores per fact:

- answer log-probability, summed over the answer's tokens, in nats;
- KL from the reference to the candidate at the first answer token, in nats;
- prompt KL, where it is asked for: the same a token of the prompt that a relation's first fact is
  asked with, most of which are the solved examples. All facts of a relation share it. Its tokens
  are computed anyway;
- top-1: the likeliest first token is a non-empty, case-insensitive prefix of the answer
  (the rule of the LRE study, Hernandez et al. 2023). The first token is the first one with visible
  characters: some tokenizers write the space before a number as a token of its own;
- margin: the answer's log-probability per token minus the best distractor's, in nats;
- contrastive: the answer ranks first among the distractors, so the margin is above zero;
- lead: the likeliest option's log-probability per token minus the next one's, whichever they are.

Answer loss is the reference's log-probability of the answer minus the candidate's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpsearch.backward import gradients
from mpsearch.device import available_memory_bytes
from mpsearch.divergence import Shortened, kl_divergence
from mpsearch.errors import CheckError, UsageError
from mpsearch.facts import Fact, FactSet
from mpsearch.forward import Pass, PreparedRow, TokenSequence
from mpsearch.models import Model
from mpsearch.runner import each_scored, runner
from mpsearch.scores import (
    PROMPT_WEIGHT,
    FactScores,
    NoiseFloor,
    RecallSummary,
    RelationRecall,
    by_relation,
    summarize,
)
from mpsearch.states import StateRoom, States
from mpsearch.walk import Held

SHOTS = 4
_NOISE_ROW_TOKENS = 192  # a row size that no other pass uses
_NOISE_FACTS = 128
_MOST_MEMORY = 1 / 16  # of what is available, for what the reference said


@dataclass(frozen=True, eq=False)
class FirstTokens:
    """What KL is measured from, without the model that said it.

    Attributes:
        log_probs: by fact `(vocab,)` at the first answer token with visible characters, in memory
            up to a limit, on disk beyond it.
    """

    model_name: str
    sequences: tuple[TokenSequence, ...]
    log_probs: States


class RecallProxy:
    """A list of facts, prepared once and asked of every candidate.

    The model must hold its reference weights while this is built.

    Args:
        model: asked with whatever weights it holds at the time.
        fact_set: source of solved examples and distractors.
        facts: the ones to ask, usually one partition.
        contrast: whether to ask the distractors too.
        prompts: whether to read the prompts' KL.
        shots: solved examples before each question, where the relation has that many.
        against: another model's first tokens on the same facts, from which KL is measured; by
            default these weights' own.
        row_tokens: so many go through the model at once; by default what suits the device.
        reverse_examples: show the solved examples in the opposite order.
    Attributes:
        reference: the scores of the weights that the model holds now.
        chances: `(facts,)` probability that a blind guess among the answers asked is right.
        first: what KL is measured from.
    Raises:
        UsageError: `against` reads the facts as other tokens.
    """

    def __init__(
        self,
        model: Model,
        fact_set: FactSet,
        facts: Sequence[Fact],
        *,
        contrast: bool,
        prompts: bool = False,
        shots: int = SHOTS,
        against: FirstTokens | None = None,
        row_tokens: int | None = None,
        reverse_examples: bool = False,
    ):
        self.facts = tuple(facts)
        self.relations = [fact.relation for fact in self.facts]
        self._model, self._fact_set, self._shots = model, fact_set, shots
        self._answers_of: list[list[int]] = []
        sequences: list[TokenSequence] = []
        for fact in self.facts:
            distractors = fact_set.distractors(fact) if contrast else ()
            self._answers_of.append(
                list(range(len(sequences), len(sequences) + 1 + len(distractors)))
            )
            sequences += [
                ask(model, fact_set, fact, answer, shots, reverse_examples)
                for answer in (fact.answer, *distractors)
            ]
        self._first_visible = [self._blank_tokens(sequences[a[0]]) for a in self._answers_of]
        self.chances = np.array([1 / len(answers) for answers in self._answers_of])
        self._contrast = contrast
        # Each relation's prompt as a sequence of its own, and what the reference says in it.
        self._reads_prompts = prompts
        self._prompt_of: dict[int, str] = {}
        self._said: dict[int, Shortened] = {}
        if prompts:
            firsts = dict(zip(reversed(self.relations), reversed(self._answers_of), strict=True))
            for relation, (first, *_) in firsts.items():
                asked = sequences[first]
                if asked.start > 1:  # or else there is nothing before it to predict
                    self._prompt_of[len(sequences)] = relation
                    sequences.append(TokenSequence(asked.tokens[: asked.start], 1))
        self._sequences = tuple(sequences)
        self._lengths = np.array([len(s.tokens) - s.start for s in sequences])
        self._pass = Pass(model, sequences, row_tokens)
        self._runner = runner(self._pass)
        if against is not None and against.sequences != self._sequences:
            raise UsageError(
                f"'{model.name}' reads these facts as other tokens than '{against.model_name}', so "
                "their log-probabilities cannot be compared; compare a model with its own "
                "quantizations"
            )
        self.first: FirstTokens | None = against
        self.reference = self.score()

    @property
    def tokens(self) -> int:
        """Distinct tokens that scoring pushes through the model."""
        return self._pass.tokens

    @property
    def digest(self) -> str:
        """Of all token ids that are asked, in order: what the tokenizer made of the facts."""
        asked = [(sequence.tokens, sequence.start) for sequence in self._sequences]
        return hashlib.sha256(repr(asked).encode()).hexdigest()

    def score(self, held: Held | None = None) -> FactScores:
        """Ask all facts of the weights that the model holds now.

        Args:
            held: the codes that layers hold, but for reference weights. Where they are given, first
                blocks that held the same in an earlier scoring are not run again; a streamed model
                has no others.
        Raises:
            CheckError: a log-probability is NaN; the weights or the arithmetic broke.
        """
        if held is None and not self._model.streamed:
            return self._scores(None)
        return self._scores(self._runner.logits(held or {}))

    def score_all(self, candidates: Sequence[Held]) -> Iterator[FactScores | CheckError]:
        """Ask all facts of several candidates of a streamed model in one walk.

        Yields:
            For each its scores, or what `score` raises.
        """
        return each_scored(self._runner, candidates, self._scores)

    def _scores(self, logits: Iterable[Tensor] | None) -> FactScores:
        """Of the rows' logits; by default those of the weights in place."""
        fact_of = {answers[0]: index for index, answers in enumerate(self._answers_of)}
        # As tensors on the device until all are there: to ask for a number waits for it.
        prompt_kl: dict[str, Tensor] = {}
        first_tokens: dict[int, Tensor] = {}
        kl: dict[int, Tensor] = {}
        reference = None if self.first is None else self.first.log_probs
        kept: States | None = None

        def visit(index: int, log_probs: Tensor) -> None:
            nonlocal kept
            if (relation := self._prompt_of.get(index)) is not None:
                if index not in self._said:  # these are the reference's
                    self._said[index] = Shortened.of(log_probs)
                else:
                    prompt_kl[relation] = self._said[index].kl(log_probs).mean()
                return
            if (fact := fact_of.get(index)) is None:
                return
            first = log_probs[self._first_visible[fact]]
            first_tokens[fact] = first.argmax()
            if reference is None:
                kept = kept or self._room(first.nbytes)
                kept[fact] = first.to("cpu", copy=True)  # not a view of all that was read
            elif len(of_reference := reference[fact]) != len(first):
                raise UsageError(
                    f"'{self._model.name}' has {len(first):,} tokens and the model that it is "
                    f"compared with {len(of_reference):,}; compare a model with its own "
                    "quantizations"
                )
            else:
                kl[fact] = kl_divergence(of_reference.to(first.device), first)

        sums = self._pass.run(visit, logits).numpy()
        if not np.isfinite(sums).all():
            raise CheckError(
                f"{int((~np.isfinite(sums)).sum())} of {sums.size} answer log-probabilities are "
                "NaN or infinite; the weights in place are broken"
            )
        if kept is not None:
            self.first = FirstTokens(self._model.name, self._sequences, kept)
        top1 = [
            _is_prefix(self._model.tokenizer.decode([token]), fact)
            for token, fact in zip(_numbers(first_tokens).values(), self.facts, strict=True)
        ]
        margin, lead = None, None
        if self._contrast:
            per_token = sums / self._lengths
            options = [per_token[answers] for answers in self._answers_of]
            margin = np.array([option[0] - option[1:].max() for option in options])
            lead = np.array([np.diff(np.sort(option)[-2:])[0] for option in options])
        log_prob = sums[[answers[0] for answers in self._answers_of]]
        of_relation = _numbers(prompt_kl)
        of_prompts = np.array([of_relation.get(name, 0.0) for name in self.relations])
        return FactScores(
            log_prob,
            np.array([*_numbers(kl).values()]) if kl else np.zeros(len(self.facts)),
            np.array(top1, dtype=bool),
            margin,
            lead,
            of_prompts if self._reads_prompts else None,
        )

    def _room(self, size_bytes: int) -> States:
        """For the reference's first tokens, each of so many bytes."""
        available = available_memory_bytes(torch.device("cpu"))
        return StateRoom(int(available * _MOST_MEMORY)).states(size_bytes * len(self.facts))

    def _blank_tokens(self, sequence: TokenSequence) -> int:
        """How many tokens of an answer come before the first one with visible characters."""
        answer = sequence.tokens[sequence.start :]
        texts = (self._model.tokenizer.decode([token]) for token in answer)
        return next((place for place, text in enumerate(texts) if text.strip()), 0)

    def objective_gradients(
        self, layers: Sequence[str], weights: Sequence[float], held: Held
    ) -> Generator[dict[str, Tensor], None, None]:
        """Gradients of the facts' objectives, weighted and summed, by part of the model.

        Args:
            layers: whose gradients are wanted.
            weights: one a fact.
            held: what a streamed model's layers hold; a loaded one holds what it holds.
        Yields:
            For each part that `mpsearch.backward.gradients` knows, layer to its `(rows, columns)`
            in float32, in nats; zeros where no token reached it.
        """
        # Of the sequences, what their loss counts.
        of_answers = {a[0]: weights[fact] for fact, a in enumerate(self._answers_of)}
        of_prompts = {
            index: PROMPT_WEIGHT
            * sum(w for w, name in zip(weights, self.relations, strict=True) if name == relation)
            for index, relation in self._prompt_of.items()
        }

        def loss(row: PreparedRow, logits: Tensor) -> list[Tensor]:
            log_probs, terms = logits.log_softmax(-1), []
            for index, places, tokens in row.continuations():
                if index in of_answers:
                    terms.append(-of_answers[index] * log_probs[places, tokens].sum())
                elif index in of_prompts:
                    of_tokens = self._said[index].kl(log_probs[places])
                    terms.append(of_prompts[index] * of_tokens.mean().float())
            return [torch.stack(terms).sum()] if terms else []

        with closing(gradients(self._pass, held, layers, loss)) as parts:
            for part in parts:
                totals: dict[str, Tensor] = {}
                for _, _, of_layers in part:
                    for layer, gradient in of_layers.items():
                        if layer in totals:
                            totals[layer] += gradient
                        else:
                            totals[layer] = gradient.to(torch.float32, copy=True)
                    del of_layers  # the next row's take their place
                yield totals

    def noise_floor(self) -> NoiseFloor:
        """What packing the facts into other rows changes; the model must hold the reference.

        Measured on at most 128 facts, at even distances.
        """
        some = slice(None, None, -(-len(self.facts) // _NOISE_FACTS))
        other = RecallProxy(
            self._model,
            self._fact_set,
            self.facts[some],
            contrast=self._contrast,
            shots=self._shots,
            row_tokens=_NOISE_ROW_TOKENS,
        )
        return NoiseFloor.between(self.reference.part(some), other.reference, other.relations)

    def by_relation(self) -> tuple[RelationRecall, ...]:
        """Recall of each relation by the reference; the proxy must ask distractors."""
        return by_relation(self.reference, self.relations, self.chances)

    def summary(self, generator: np.random.Generator) -> RecallSummary:
        """The reference's recall with intervals over subjects; the proxy must ask distractors."""
        subjects = [fact.subject for fact in self.facts]
        return summarize(self.reference, self.relations, subjects, self.chances, generator)


def prompt(fact_set: FactSet, fact: Fact, shots: int, reverse_examples: bool = False) -> str:
    """Solved examples of the relation, a line each, then the fact's own prompt."""
    examples = fact_set.demonstrations(fact.relation, shots)
    if reverse_examples:
        examples = examples[::-1]
    return "".join(f"{e.prompt} {e.answer}\n" for e in examples) + fact.prompt


def ask(
    model: Model,
    fact_set: FactSet,
    fact: Fact,
    answer: str,
    shots: int,
    reverse_examples: bool = False,
) -> TokenSequence:
    """A fact's question and one answer to it, in the model's chat template if it is asked so."""
    context = prompt(fact_set, fact, shots, reverse_examples)
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
    continuation's. Where that would leave nothing before it, as when a tokenizer without a
    beginning token merges a one-token question with its answer, the two are tokenized apart.
    Special tokens that the tokenizer puts in front stay, those behind are dropped.
    """
    tokens, ends = _tokenize(tokenizer, context + continuation, add_special_tokens)
    start = next(i for i, end in enumerate(ends) if end > len(context))
    if start == 0:
        tokens, _ = _tokenize(tokenizer, context, False)
        start = len(tokens)
        tokens += _tokenize(tokenizer, continuation, False)[0]
    return TokenSequence(tuple(tokens), start)


def _tokenize(tokenizer: Any, text: str, special: bool) -> tuple[list[int], list[int]]:
    """Tokens and the characters at which they end, without special tokens behind the text."""
    encoded = tokenizer(
        text,
        return_offsets_mapping=True,
        add_special_tokens=special,
        padding=False,
        truncation=False,
    )
    tokens, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
    while offsets[-1][0] == offsets[-1][1]:
        tokens, offsets = tokens[:-1], offsets[:-1]
    return tokens, [end for _, end in offsets]


def _numbers(found: Mapping[Any, Tensor]) -> dict[Any, Any]:
    """What one-element tensors hold, in the order of their keys, read at once."""
    keys = sorted(found)
    numbers = torch.stack([found[key] for key in keys]).tolist() if keys else []
    return dict(zip(keys, numbers, strict=True))


def _is_prefix(predicted: str, fact: Fact) -> bool:
    text = predicted.strip().casefold()
    return bool(text) and any(answer.casefold().startswith(text) for answer in fact.accepted)
