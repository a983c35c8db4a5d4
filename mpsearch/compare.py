"""Two models on the same facts: what was kept, forgotten and gained, and whether that is noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpsearch.bootstrap import Interval, subject_bootstrap
from mpsearch.facts import Fact
from mpsearch.scores import FactScores, NoiseFloor
from mpsearch.significance import holm, mcnemar


@dataclass(frozen=True)
class Changes:
    """How the answers of some facts changed from the reference to the candidate.

    Attributes:
        kept, forgotten, gained, never: facts right in both, in the reference only, in the
            candidate only, in neither.
        p: McNemar's of forgotten against gained; Holm-corrected where relations are compared.
        answer_loss: nats, paired by fact, with its 95 % bootstrap interval over subjects.
        kl_nats: mean KL from the reference.
    """

    facts: int
    kept: int
    forgotten: int
    gained: int
    never: int
    p: float
    answer_loss: Interval
    kl_nats: float


@dataclass(frozen=True)
class Flip:
    """A fact that one model answers and the other does not.

    Attributes:
        reference_margin, candidate_margin: nats a token; see `FactScores`.
        within_noise: the reference's margin is one that noise alone could turn, so that this fact
            was won or missed by luck.
    """

    relation: str
    subject: str
    answer: str
    forgotten: bool
    reference_margin: float
    candidate_margin: float
    answer_loss_nats: float
    within_noise: bool


@dataclass(frozen=True)
class Comparison:
    """A candidate against its reference.

    Attributes:
        overall: over all facts; means over relations where it says mean.
        relations: the same by relation.
        flips: forgotten facts by falling reference margin, then gained ones likewise.
        noise: of the reference with itself.
    """

    overall: Changes
    relations: dict[str, Changes]
    flips: tuple[Flip, ...]
    noise: NoiseFloor

    @property
    def below_noise(self) -> bool:
        """Whether the answer loss is no larger than what packing the facts otherwise gives."""
        return abs(self.overall.answer_loss.mean) <= self.noise.mean_nats

    @property
    def verdict(self) -> str:
        """One plain sentence about the loss and the flips."""
        all_facts, loss = self.overall, self.overall.answer_loss
        figures = f"{loss.mean:.3f} nats [{loss.low:.3f}, {loss.high:.3f}]"
        if self.below_noise or not loss.excludes_zero:
            said = f"The answer loss, {figures}, is not beyond noise"
        else:
            said = f"An answer loses {figures}" if loss.mean > 0 else f"An answer gains {figures}"
        flips = f"{all_facts.forgotten} facts forgotten and {all_facts.gained} gained"
        balance = "more than chance" if all_facts.p < 0.05 else "no more one way than by chance"
        return f"{said}; {flips}, {balance} (p = {all_facts.p:.3g})."

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "below_noise": self.below_noise, "verdict": self.verdict}


def compare(
    reference: FactScores,
    candidate: FactScores,
    facts: Sequence[Fact],
    noise: NoiseFloor,
    generator: np.random.Generator,
) -> Comparison:
    """Compare two models' scores of the same facts, which must include the distractors.

    Args:
        facts: in the order of the scores.
        noise: of the reference.
        generator: of the bootstrap.
    Raises:
        ValueError: a margin is missing.
    """
    before, after = reference.margin, candidate.margin
    if before is None or after is None or noise.margin_nats is None:
        raise ValueError("a comparison needs scores with distractors")
    relations = [fact.relation for fact in facts]
    loss = reference.log_prob - candidate.log_prob
    subjects = [fact.subject for fact in facts]
    over_all, within = subject_bootstrap(loss, relations, subjects, generator)
    names = np.asarray(relations)
    changes = {
        name: _changes(before[mine], after[mine], interval, candidate.kl[mine])
        for name, interval in within.items()
        if (mine := names == name).any()
    }
    corrected = holm([change.p for change in changes.values()])
    by_relation = {
        name: replace(change, p=p)
        for (name, change), p in zip(changes.items(), corrected, strict=True)
    }
    overall = replace(
        _changes(before, after, over_all, candidate.kl),
        kl_nats=float(np.mean([change.kl_nats for change in changes.values()])),
    )
    flips = [
        Flip(
            fact.relation,
            fact.subject,
            fact.answer,
            bool(before[i] > 0),
            float(before[i]),
            float(after[i]),
            float(loss[i]),
            bool(abs(before[i]) <= noise.margin_nats),
        )
        for i, fact in enumerate(facts)
        if (before[i] > 0) != (after[i] > 0)
    ]
    flips.sort(key=lambda flip: (not flip.forgotten, -flip.reference_margin))
    return Comparison(overall, by_relation, tuple(flips), noise)


def _changes(
    before: NDArray[Any], after: NDArray[Any], answer_loss: Interval, kl: NDArray[Any]
) -> Changes:
    was, now = before > 0, after > 0
    forgotten, gained = int((was & ~now).sum()), int((~was & now).sum())
    return Changes(
        facts=len(was),
        kept=int((was & now).sum()),
        forgotten=forgotten,
        gained=gained,
        never=int((~was & ~now).sum()),
        p=mcnemar(forgotten, gained),
        answer_loss=answer_loss,
        kl_nats=float(kl.mean()),
    )
