"""Is a forgotten fact gone, or does another prompt bring it back?

A fact that the reference answers and the candidate does not is asked of the candidate in other
ways. One that comes back was only displaced (Hoang et al., arXiv:2310.00867). But whoever asks
several times also rescues facts by chance, so the same is done with facts that neither model
answered, which gives the rate of luck, and with facts that were kept, which gives the rate at which
a known fact survives being asked otherwise. Forgotten facts are taken for a mixture of the two.

Gains need a null, too: facts near the edge flip whatever is changed. So they are compared with what
the reference gains when its own solved examples are merely shown in the opposite order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpsearch.bootstrap import DRAWS, Interval, subject_weights
from mpsearch.facts import Fact
from mpsearch.scores import FactScores, wilson
from mpsearch.significance import mcnemar

PARAPHRASE = "paraphrase"  # what the names of prompts in other words begin with
EXAMPLES = "more examples"  # the name of the prompt with more solved ones


@dataclass(frozen=True)
class Rescue:
    """How often facts come back one way.

    Attributes:
        forgotten, missed, kept: shares of facts that are right when asked this way: of those that
            only the reference answers, that neither does, and that both do. The latter two are
            weighted to the forgotten ones' mix of relations. None where there are no such facts.
        displaced: share of the forgotten facts that is known after all, with luck subtracted:
            `(forgotten - missed) / (kept - missed)`, within 0 and 1. None where that is undefined.
    """

    way: str
    forgotten: Interval | None
    missed: Interval | None
    kept: Interval | None
    displaced: Interval | None


@dataclass(frozen=True)
class Forgotten:
    """A forgotten fact and the ways by which it came back; by none, it counts as gone."""

    relation: str
    subject: str
    answer: str
    back_by: tuple[str, ...]


@dataclass(frozen=True)
class Null:
    """Flips of the candidate beside those of the reference with its examples in another order.

    Attributes:
        missed: facts that the reference does not answer.
        gained, null_gained: of these, what the candidate answers, and the reordered reference.
        forgotten, null_forgotten: the same of the others, lost.
        p: McNemar's of gained against null gained, on the same facts.
    """

    missed: int
    gained: int
    null_gained: int
    forgotten: int
    null_forgotten: int
    p: float


@dataclass(frozen=True)
class Displacement:
    """What became of the forgotten facts.

    Attributes:
        ways: by any paraphrase, by more examples, by the prompt on which the candidate is surest,
            and by any prompt at all; those that were asked.
        facts: the forgotten ones.
        null: None where too few examples were shown to reorder them.
    """

    missed: int
    kept: int
    ways: tuple[Rescue, ...]
    facts: tuple[Forgotten, ...]
    null: Null | None

    @property
    def verdict(self) -> str:
        """Plain sentences on the forgotten facts and on the gained ones."""
        return " ".join(filter(None, (self._of_forgotten, self._of_gained)))

    @property
    def _of_forgotten(self) -> str:
        if not self.facts:
            return "Nothing was forgotten."
        if not self.ways:
            return "The facts have no paraphrase and no further examples to ask with."
        last = self.ways[-1]
        back = sum(bool(fact.back_by) for fact in self.facts)
        said = f"Of {len(self.facts)} forgotten facts {back} come back by {last.way}"
        if last.missed is None or last.kept is None:
            return f"{said}; there are no facts to tell how many do so by chance."
        said += (
            f"; so do {last.missed.mean:.0%} of the facts that neither model answers, and "
            f"{last.kept.mean:.0%} of those kept are right that way"
        )
        if last.displaced is None:
            return f"{said}: no different from luck."
        low, high = last.displaced.low, last.displaced.high
        share = f"{last.displaced.mean:.0%} [{low:.0%}, {high:.0%}]"
        return f"{said}: about {share} of the forgotten are displaced, the others gone."

    @property
    def _of_gained(self) -> str:
        if self.null is None:
            return ""
        null = self.null
        real = null.p < 0.05 and null.gained > null.null_gained
        return (
            f"{null.gained} facts gained; the reference gains {null.null_gained} and forgets "
            f"{null.null_forgotten} when its own examples are merely reordered, so this is "
            f"{'more than' if real else 'no more than'} luck (p = {null.p:.3g})."
        )

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}


def displacement(
    reference: FactScores,
    candidate: FactScores,
    otherwise: Mapping[str, FactScores],
    reordered: FactScores | None,
    facts: Sequence[Fact],
    generator: np.random.Generator,
) -> Displacement:
    """Tell displaced facts from forgotten ones; all scores must include the distractors.

    Args:
        otherwise: the candidate's scores of the same facts under other prompts, by name: see
            `PARAPHRASE` and `EXAMPLES`.
        reordered: the reference's with its examples in the opposite order.
        facts: in the order of the scores.
        generator: of the bootstrap over subjects.
    Raises:
        ValueError: distractors were not asked.
    """
    was, now = _right(reference), _right(candidate)
    groups = {"forgotten": was & ~now, "missed": ~was & ~now, "kept": was & now}
    back = _ways(candidate, otherwise)
    relations = np.array([fact.relation for fact in facts])
    weights = {
        name: group * _like(relations, group, groups["forgotten"]) for name, group in groups.items()
    }
    drawn = subject_weights([fact.subject for fact in facts], generator, DRAWS)
    null = None
    if reordered is not None:
        null = _null(was, now, _right(reordered))
    return Displacement(
        missed=int(groups["missed"].sum()),
        kept=int(groups["kept"].sum()),
        ways=tuple(_rescue(way, right, weights, drawn) for way, right in back.items()),
        facts=tuple(
            Forgotten(
                fact.relation,
                fact.subject,
                fact.answer,
                tuple(way for way, right in list(back.items())[:-1] if right[i]),
            )
            for i, fact in enumerate(facts)
            if groups["forgotten"][i]
        ),
        null=null,
    )


def _right(scores: FactScores) -> NDArray[Any]:
    if scores.correct is None:
        raise ValueError("displacement needs scores with distractors")
    return scores.correct


def _ways(candidate: FactScores, otherwise: Mapping[str, FactScores]) -> dict[str, NDArray[Any]]:
    """Which facts are right each way, `(facts,)` bool; the last way is by any prompt."""
    if not otherwise:
        return {}
    found = {}
    paraphrases = [_right(s) for name, s in otherwise.items() if name.startswith(PARAPHRASE)]
    if paraphrases:
        found["any paraphrase"] = np.any(paraphrases, axis=0)
    if EXAMPLES in otherwise:
        found[EXAMPLES] = _right(otherwise[EXAMPLES])
    # The prompt that sets the likeliest option farthest apart, whether it is the right one or not.
    prompts = [candidate, *otherwise.values()]
    leads = np.array([scores.lead for scores in prompts], dtype=float)
    surest = leads.argmax(0)
    found["the surest prompt"] = np.choose(surest, [_right(scores) for scores in prompts])
    return {**found, "any other prompt": np.any([_right(s) for s in otherwise.values()], axis=0)}


def _like(relations: NDArray[Any], group: NDArray[Any], target: NDArray[Any]) -> NDArray[Any]:
    """`(facts,)` weights that give the facts of a group the relations' shares in the target."""
    names, relation_of = np.unique(relations, return_inverse=True)
    have = np.bincount(relation_of, group, len(names))
    want = np.bincount(relation_of, target, len(names))
    weights: NDArray[Any] = (want / np.maximum(have, 1))[relation_of]
    return weights


def _rescue(
    way: str,
    right: NDArray[Any],
    weights: Mapping[str, NDArray[Any]],
    drawn: NDArray[Any],
) -> Rescue:
    present = {name: weight for name, weight in weights.items() if weight.any()}
    shares = {name: _share(right, weight) for name, weight in present.items()}
    displaced = None
    if len(present) == len(weights):
        # The estimate, then the draws.
        rates = {name: _rates(right, weight, drawn) for name, weight in present.items()}
        room = rates["kept"] - rates["missed"]
        if room[0] > 0:
            excess = rates["forgotten"] - rates["missed"]
            # A draw in which luck does as well as knowledge tells nothing: any share fits it.
            known = np.where(room > 0, excess / np.where(room > 0, room, 1), 0.5).clip(0, 1)
            low, high = np.percentile(known[1:], (2.5, 97.5))
            displaced = Interval(float(known[0]), float(low), float(high))
    return Rescue(way, shares.get("forgotten"), shares.get("missed"), shares.get("kept"), displaced)


def _rates(right: NDArray[Any], weight: NDArray[Any], drawn: NDArray[Any]) -> NDArray[Any]:
    """`(1 + draws,)` weighted shares."""
    mine = weight > 0
    weights = np.vstack([weight[mine], drawn[:, mine] * weight[mine]])
    rates: NDArray[Any] = weights @ right[mine].astype(float) / weights.sum(1)
    return rates


def _share(right: NDArray[Any], weight: NDArray[Any]) -> Interval:
    """A weighted share, its interval that of as many facts as the weights are worth (Kish)."""
    worth = weight.sum() ** 2 / (weight**2).sum()
    return wilson(float(right @ weight / weight.sum() * worth), float(worth))


def _null(was: NDArray[Any], now: NDArray[Any], reordered: NDArray[Any]) -> Null:
    gained, null_gained = ~was & now, ~was & reordered
    return Null(
        missed=int((~was).sum()),
        gained=int(gained.sum()),
        null_gained=int(null_gained.sum()),
        forgotten=int((was & ~now).sum()),
        null_forgotten=int((was & ~reordered).sum()),
        p=mcnemar(int((gained & ~null_gained).sum()), int((null_gained & ~gained).sum())),
    )
