"""What the peers are asked: the search facts of all of them, and facts that nobody tunes on.

The final facts are of the LRE data set. A relation that the built-in facts hold too is left out
whole, and of the others every fact whose subject, by plain spelling, some built-in fact has: no
search, sensitivity or constant of this project has seen a final fact or its subject. A relation
stays if it has enough facts and the reference knows it: recall on its search partition beats chance
by two standard errors. Final facts are of the validation and test partitions, right or wrong in the
reference, so that its luck on them selects nothing; demonstrations are the solved examples. Facts
are chosen by a hash. The first of each relation are left out: earlier searches of this project were
scored on them, and what a search lowers was changed when it had lost there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from lre_agreement import SAME, plain
from numpy.typing import NDArray
from torch import Tensor

import mpsearch as mps
from mpsearch.asked import known_facts
from mpsearch.assignment import Assignment
from mpsearch.divergence import Shortened
from mpsearch.errors import CheckError, RunError
from mpsearch.estimates import relation_mean
from mpsearch.evaluate import Bench
from mpsearch.facts import Fact, FactSet
from mpsearch.facts.fact import unit_hash
from mpsearch.files import write_atomically
from mpsearch.forward import Pass, TokenSequence
from mpsearch.guard import TextGuard
from mpsearch.recall import SHOTS, RecallProxy, ask
from mpsearch.scores import objective
from mpsearch.text import Text

FINAL_FACTS = 80  # of a relation at most
GATE_FACTS = 40  # likewise
SEEN_FACTS = 40  # of a relation, by which this project has changed its search
GATE: tuple[str, ...] = ("search",)  # partitions
SCORED: tuple[str, ...] = ("validation", "test")
_LEAST_FACTS = 20  # of it for either, as few would count as much as many


@dataclass(frozen=True)
class Asked:
    """The facts of a whole comparison, frozen in its folder.

    Attributes:
        most: search facts that were asked for; the reference may know fewer.
    """

    search: tuple[Fact, ...]
    final: tuple[Fact, ...]
    most: int

    @classmethod
    def frozen(
        cls, folder: Path, model: mps.Model, facts: FactSet, final: FactSet, search_facts: int
    ) -> Asked:
        """As the folder says, or else chosen now, while the model holds the reference weights.

        Args:
            final: as `untouched` leaves it.
        Raises:
            CheckError: the reference knows no relation of the one or of the other.
        """
        path = folder / "asked.json"
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            return cls(_find(before[0], facts), _find(before[1], final), search_facts)
        _, search = known_facts(model, facts, search_facts)
        asked = cls(tuple(search), tuple(_final_facts(model, final)), search_facts)
        keys = [[(f.relation, f.subject) for f in part] for part in (asked.search, asked.final)]
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(keys, ensure_ascii=False))
        return asked


def untouched(lre: FactSet, facts: FactSet) -> FactSet:
    """The relations and subjects that the other facts do not hold."""
    same = {name for names in SAME.values() for name in names} | set(facts.relations)
    subjects = {plain(fact.subject) for fact in facts.facts}
    kept = (f for f in lre.facts if f.relation not in same and plain(f.subject) not in subjects)
    return FactSet(tuple(kept), lre.source)


def _final_facts(model: mps.Model, final: FactSet) -> list[Fact]:
    gate = _some(final, GATE)
    if not gate:
        raise CheckError(f"facts '{final.source}': none is left beside the search facts")
    rows = RecallProxy(model, final, gate, contrast=True).by_relation()
    known = {row.relation for row in rows if row.known}
    found = [fact for fact in _some(final, SCORED) if fact.relation in known]
    if not found:
        raise CheckError(f"facts '{final.source}': the reference answers none better than chance")
    return found


def _some(facts: FactSet, partitions: tuple[str, ...]) -> list[Fact]:
    """Of each relation that has enough and can be asked with distractors."""
    chosen: list[Fact] = []
    for relation in facts.relations:
        mine = sorted(
            facts.of(relation), key=lambda fact: unit_hash(f"final|{fact.subject.casefold()}")
        )
        parts = {part: [fact for fact in mine if fact.partition in part] for part in (GATE, SCORED)}
        parts[GATE] = parts[GATE][:GATE_FACTS]
        parts[SCORED] = parts[SCORED][SEEN_FACTS : SEEN_FACTS + FINAL_FACTS]
        several = len({fact.answer for fact in mine}) > 1
        if several and min(map(len, parts.values())) >= _LEAST_FACTS:
            chosen += parts[partitions]
    return chosen


def _find(keys: Sequence[Sequence[str]], source: FactSet) -> tuple[Fact, ...]:
    by_key = {(fact.relation, fact.subject): fact for fact in source.facts}
    if missing := [key for key in keys if tuple(key) not in by_key]:
        raise RunError(f"facts '{source.source}' no longer hold {missing[0]}; use another --runs")
    return tuple(by_key[relation, subject] for relation, subject in keys)


@lru_cache(maxsize=8)
def tokens_of(model: mps.Model, fact_set: FactSet, facts: tuple[Fact, ...], contrast: bool) -> int:
    """Unique tokens of scoring these facts once, as the proxy asks them."""
    asked = [(f, (f.answer, *(fact_set.distractors(f) if contrast else ()))) for f in facts]
    return Pass(model, [ask(model, fact_set, f, a, SHOTS) for f, answers in asked for a in answers
                        ]).tokens  # fmt: skip


class SearchFacts:
    """What searches lower, `mpsearch.scores.objective`, on all search facts or on some of them.

    Asked of some, a relation is read with the prompt of its first fact all the same. The model must
    hold its reference weights while this is built.

    Attributes:
        tokens: unique ones that asking all facts pushes through the model.
        relations: of each fact.
    """

    def __init__(self, bench: Bench, fact_set: FactSet, facts: Sequence[Fact]):
        model = bench.bank.model
        self._bench = bench
        self._sequences = [ask(model, fact_set, fact, fact.answer, SHOTS) for fact in facts]
        self.relations = [fact.relation for fact in facts]
        firsts = dict(zip(reversed(self.relations), reversed(self._sequences), strict=True))
        self._prompts = {
            name: TokenSequence(first.tokens[: first.start], 1) for name, first in firsts.items()
        }
        self._said: dict[str, Shortened] = {}
        self._everything = self._pass(tuple(range(len(facts))))
        self.tokens = self._everything.tokens
        names = list(dict.fromkeys(self.relations))

        def visit(index: int, log_probs: Tensor) -> None:
            if index >= len(facts):
                self._said[names[index - len(facts)]] = Shortened.of(log_probs)

        self._reference = self._everything.run(visit).numpy()[: len(facts)]

    def __len__(self) -> int:
        return len(self.relations)

    def cost(self, some: tuple[int, ...] | None) -> int:
        """Unique tokens of asking the facts with these numbers; None for all."""
        return self.tokens if some is None else self._pass(some).tokens

    def loss(self, assignment: Assignment, some: tuple[int, ...] | None) -> float:
        """In nats, a mean over relations; infinite where the candidate gives NaN."""
        work = self._everything if some is None else self._pass(some)
        numbers = list(range(len(self)) if some is None else some)
        relations = [self.relations[number] for number in numbers]
        names, kl = list(dict.fromkeys(relations)), {}

        def visit(index: int, log_probs: Tensor) -> None:
            if index >= len(numbers):
                name = names[index - len(numbers)]
                kl[name] = float(self._said[name].kl(log_probs).mean())

        self._bench.put(assignment)
        lost = self._reference[numbers] - work.run(visit).numpy()[: len(numbers)]
        values = objective(lost, np.array([kl[name] for name in relations]))
        return relation_mean(values, relations).mean if np.isfinite(values).all() else float("inf")

    @lru_cache(maxsize=8)  # noqa: B019 - it lives as long as the benchmark
    def _pass(self, some: tuple[int, ...]) -> Pass:
        """Of these facts, then of their relations' prompts."""
        prompts = dict.fromkeys(self.relations[number] for number in some)
        asked = [self._sequences[number] for number in some]
        return Pass(self._bench.bank.model, asked + [self._prompts[name] for name in prompts])


@dataclass(frozen=True, eq=False)
class Final:
    """What an assignment kept of the final facts and of held-out text.

    Attributes:
        loss_nats: `(facts,)` answer loss.
        correct: `(facts,)` bool, contrastive.
        text_kl_nats: a token.
    """

    loss_nats: NDArray[Any]
    correct: NDArray[Any]
    text_kl_nats: float


class Referee:
    """Scores every assignment once on the final facts and on held-out text, and remembers it.

    Args:
        folder: where per-fact losses are kept.
        code: a name of an assignment.
    """

    def __init__(
        self,
        folder: Path,
        bench: Bench,
        fact_set: FactSet,
        facts: Sequence[Fact],
        code: Callable[[Assignment], str],
    ):
        self._path = folder / "final.jsonl"
        self._bench, self._fact_set, self._code = bench, fact_set, code
        self.facts = tuple(facts)
        self._asks: tuple[RecallProxy, TextGuard] | None = None
        self._known: dict[str, Final] = {}
        for line in whole_lines(self._path):
            self._known[line["levels"]] = Final(
                np.array(line["loss_nats"]), np.array(line["correct"], bool), line["text_kl_nats"]
            )

    def score(self, assignment: Assignment) -> Final:
        """Raises `CheckError` if it gives NaN."""
        code = self._code(assignment)
        if code not in self._known:
            if self._asks is None:
                self._bench.restore()
                model = self._bench.bank.model
                self._asks = (
                    RecallProxy(model, self._fact_set, self.facts, contrast=True),
                    TextGuard(model, Text.builtin().held_out),
                )
            proxy, guard = self._asks
            found = self._bench.evaluate(assignment, proxy)
            correct = found.scores.correct
            assert correct is not None  # the proxy asks distractors
            final = Final(found.loss_per_fact, correct, guard.score().kl.mean)
            line = {"levels": code, "loss_nats": final.loss_nats.tolist(),
                    "correct": [int(right) for right in correct],
                    "text_kl_nats": final.text_kl_nats}  # fmt: skip
            with open(self._path, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")
            self._known[code] = final
        return self._known[code]


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of JSON; an end that a kill tore off is cut away from it."""
    if not path.exists():
        return []
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        path.write_bytes(whole)
    return [json.loads(line) for line in whole.splitlines()]
