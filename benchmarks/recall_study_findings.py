"""What a published study of factual recall under quantization found, tried on what was measured.

A finding is split into claims. Each names its measure, says its figures, and has a verdict by a
rule that was written before the figures were seen: "holds here" and "does not hold here" need
p < 0.05, or a 95 % interval beyond zero, on that side; all else is "not decided by this many
facts".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from study_statistics import rank_test, stratified_difference

from mpsearch.bootstrap import Interval, subject_bootstrap
from mpsearch.facts import Fact
from mpsearch.facts.fact import unit_hash
from mpsearch.significance import holm, mcnemar

HOLDS, FAILS, OPEN = "holds here", "does not hold here", "not decided by this many facts"
REFERENCE = "unquantized"
_FEWEST_RIGHT = 3  # a relation of which the reference knows fewer in a half has no relative loss


@dataclass(frozen=True, eq=False)
class Answers:
    """What one model got right, `(facts,)` bool each.

    Attributes:
        one_hop: LRE facts, by the first token.
        two_hop, contrastive: chains, by the first token and among distractors.
        first, second: the chains' hops, asked alone, by the first token.
    """

    one_hop: NDArray[Any]
    two_hop: NDArray[Any]
    contrastive: NDArray[Any]
    first: NDArray[Any]
    second: NDArray[Any]


@dataclass(frozen=True)
class Asked:
    """The facts and chains in the order of the answers; a chain's cluster is its bridge."""

    facts: Sequence[Fact]
    chains: Sequence[Any]

    @property
    def relations(self) -> list[str]:
        return [fact.relation for fact in self.facts]

    @property
    def subjects(self) -> list[str]:
        return [fact.subject for fact in self.facts]

    @property
    def pairs(self) -> list[str]:
        return [chain.relation for chain in self.chains]

    @property
    def bridges(self) -> list[str]:
        return [chain.bridge for chain in self.chains]


def findings(models: Mapping[str, Answers], asked: Asked, seed: int) -> list[dict[str, Any]]:
    """Every claim with its measure, figures and verdict; `models` has the reference first."""
    generator = np.random.default_rng(seed)
    return [
        *_bitsandbytes_keeps_most(models, asked, generator),
        *_two_hops_fall_with_the_first(models, asked, generator),
        _some_recall_more(models, asked, generator),
        _unsaturated_lose_most(models, asked, generator),
    ]


def _claim(
    number: str, claim: str, measure: str, verdict: str, said: str, **figures: Any
) -> dict[str, Any]:
    return {
        "finding": number,
        "claim": claim,
        "verdict": verdict,
        "said": said,
        "measure": measure,
        "figures": figures,
    }


def by_sign(estimates: Sequence[float], p_values: Sequence[float]) -> str:
    """Holds if all are significantly above zero; does not if any is significantly below."""
    if all(e > 0 and p < 0.05 for e, p in zip(estimates, p_values, strict=True)):
        return HOLDS
    if any(e < 0 and p < 0.05 for e, p in zip(estimates, p_values, strict=True)):
        return FAILS
    return OPEN


def by_interval(interval: Interval) -> str:
    if not interval.excludes_zero:
        return OPEN
    return HOLDS if interval.low > 0 else FAILS


def percent(interval: Interval) -> dict[str, float]:
    """In percentage points."""
    return {
        "mean": 100 * interval.mean,
        "low": 100 * interval.low,
        "high": 100 * interval.high,
    }


def points(interval: Mapping[str, float]) -> str:
    return "{mean:+.1f} points [{low:+.1f}, {high:+.1f}]".format(**interval)


def changes(before: NDArray[Any], after: NDArray[Any]) -> tuple[int, int]:
    """Facts forgotten and gained."""
    return int((before & ~after).sum()), int((~before & after).sum())


def _bitsandbytes_keeps_most(
    models: Mapping[str, Answers], asked: Asked, generator: np.random.Generator
) -> list[dict[str, Any]]:
    rivals = {
        "bitsandbytes NF4": ("GPTQ 4-bit", "AWQ 4-bit", "rounding 4-bit"),
        "bitsandbytes int8": ("GPTQ 8-bit",),
    }
    rows: list[dict[str, Any]] = []
    for ours, others in rivals.items():
        for other in others:
            a, b = models[ours].one_hop, models[other].one_hop
            difference, _ = subject_bootstrap(
                a.astype(float) - b, asked.relations, asked.subjects, generator
            )
            lost, won = changes(a, b)
            rows.append(
                {
                    "model": ours,
                    "rival": other,
                    "difference_points": percent(difference),
                    "right_here_only": lost,
                    "right_there_only": won,
                    "p": mcnemar(lost, won),
                }
            )
    for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = p
    measure = (
        "LRE top-1 on the same facts; exact McNemar on facts that one of the two answers, Holm "
        f"over {len(rows)} comparisons; differences are means over relations, 95 % over subjects"
    )
    claims = []
    for number, ours in zip(("1a", "1b"), rivals, strict=True):
        mine = [row for row in rows if row["model"] == ours]
        ahead = [float(row["right_here_only"] - row["right_there_only"]) for row in mine]
        verdict = by_sign(ahead, [row["p_holm"] for row in mine])
        width = "4" if "NF4" in ours else "8"
        claim = f"bitsandbytes keeps most of the recall among the {width}-bit methods"
        said = "; ".join(
            f"{points(row['difference_points'])} against {row['rival']} ({row['right_here_only']} "
            f"facts against {row['right_there_only']}, p = {row['p_holm']:.2g})"
            for row in mine
        )
        claims.append(_claim(number, claim, measure, verdict, said, comparisons=mine))
    return claims


def _two_hops_fall_with_the_first(
    models: Mapping[str, Answers], asked: Asked, generator: np.random.Generator
) -> list[dict[str, Any]]:
    reference = models[REFERENCE]
    quantized = {name: found for name, found in models.items() if name != REFERENCE}
    pairs, bridges = np.array(asked.pairs), np.array(asked.bridges)

    def after(hop: str) -> dict[str, Any]:
        """Chains whose hop the reference answers: two-hop change where it is kept or forgotten."""
        known = getattr(reference, hop)
        figures: dict[str, Any] = {}
        for rule in ("two_hop", "contrastive"):
            kept = np.concatenate([getattr(m, hop)[known] for m in quantized.values()])
            now = np.concatenate([getattr(m, rule)[known] for m in quantized.values()])
            was = np.tile(getattr(reference, rule)[known], len(quantized))
            interval = stratified_difference(
                now.astype(float) - was,
                kept,
                [f"{name} {pair}" for name in quantized for pair in pairs[known]],
                np.tile(bridges[known], len(quantized)).tolist(),
                generator,
            )
            figures[rule] = {
                "kept": int(kept.sum()),
                "forgotten": int((~kept).sum()),
                "accuracy_kept": float(now[kept].mean()),
                "accuracy_forgotten": float(now[~kept].mean()),
                "reference_accuracy_kept": float(was[kept].mean()),
                "reference_accuracy_forgotten": float(was[~kept].mean()),
                "change_difference_points": percent(interval),
            }
        return figures

    first, second = after("first"), after("second")
    plain = first["two_hop"]
    difference = plain["change_difference_points"]
    said = (
        f"two-hop top-1 goes from {plain['reference_accuracy_kept']:.1%} to "
        f"{plain['accuracy_kept']:.1%} where the first hop is kept ({plain['kept']} answers) and "
        f"from {plain['reference_accuracy_forgotten']:.1%} to {plain['accuracy_forgotten']:.1%} "
        f"where it is forgotten ({plain['forgotten']}); the changes differ by {points(difference)} "
        f"within model and relations; among distractors by "
        f"{points(first['contrastive']['change_difference_points'])}; by the second hop instead, "
        f"{points(second['two_hop']['change_difference_points'])}"
    )
    within = _claim(
        "2a",
        "a chain is lost where its first hop is",
        "change of two-hop top-1 from the reference, first hop kept minus forgotten, among chains "
        "whose first hop the reference answers; within model and pair of relations, 95 % over "
        "bridges; the verdict by top-1, contrastive beside it",
        by_interval(Interval(**difference)),
        said,
        first_hop=first,
        second_hop_for_comparison=second,
    )

    def mean_change(found: Answers, rule: str) -> float:
        gone = getattr(found, rule).astype(float) - getattr(reference, rule)
        return 100 * float(np.mean([gone[pairs == pair].mean() for pair in dict.fromkeys(pairs)]))

    rows = {
        name: {
            f"{rule}_change_points": mean_change(found, rule)
            for rule in ("first", "second", "two_hop", "contrastive")
        }
        for name, found in quantized.items()
    }

    def column(rule: str) -> NDArray[Any]:
        return np.array([row[f"{rule}_change_points"] for row in rows.values()])

    rho, p = rank_test([(column("first"), column("two_hop"))], generator)
    other_rho, other_p = rank_test([(column("first"), column("contrastive"))], generator)
    across = _claim(
        "2b",
        "models that lose more first hops lose more chains",
        f"Spearman over {len(rows)} quantized models of the change of first-hop top-1 and of "
        "two-hop top-1 (means over pairs of relations), exact permutation p",
        by_sign([rho], [p]),
        f"rho = {rho:+.2f}, p = {p:.2g}; with chains among distractors {other_rho:+.2f}, "
        f"p = {other_p:.2g}",
        rho=rho,
        p=p,
        contrastive_rho=other_rho,
        contrastive_p=other_p,
        models=rows,
    )
    return [within, across]


def _some_recall_more(
    models: Mapping[str, Answers], asked: Asked, generator: np.random.Generator
) -> dict[str, Any]:
    before = models[REFERENCE].one_hop
    relations = np.array(asked.relations)
    tests: list[dict[str, Any]] = []
    overall: dict[str, dict[str, float]] = {}
    for name, found in models.items():
        if name == REFERENCE:
            continue
        change, _ = subject_bootstrap(
            found.one_hop.astype(float) - before, asked.relations, asked.subjects, generator
        )
        overall[name] = percent(change)
        for relation in ("", *dict.fromkeys(asked.relations)):
            mine = relations == relation if relation else np.ones(relations.size, dtype=bool)
            forgotten, gained = changes(before[mine], found.one_hop[mine])
            tests.append(
                {
                    "model": name,
                    "relation": relation or "all",
                    "forgotten": forgotten,
                    "gained": gained,
                    "p": mcnemar(forgotten, gained),
                }
            )
    for test, p in zip(tests, holm([test["p"] for test in tests]), strict=True):
        test["p_holm"] = p
    ahead = [test for test in tests if test["gained"] > test["forgotten"]]
    if any(test["p_holm"] < 0.05 for test in ahead):
        verdict = HOLDS
    else:
        verdict = FAILS if all(change["high"] < 0 for change in overall.values()) else OPEN
    best = max(overall, key=lambda name: overall[name]["mean"])
    least = min(ahead, key=lambda test: test["p"], default=None)
    relations_above = sum(test["relation"] != "all" for test in ahead)
    behind = [test for test in tests if test["forgotten"] > test["gained"]]
    relations_below = sum(test["relation"] != "all" for test in behind)
    above = sum(change["mean"] > 0 for change in overall.values())
    said = (
        f"{above} of {len(overall)} models are above in the mean, the best is {best}, "
        f"{points(overall[best])}; by relation {relations_above} are above and {relations_below} "
        "below; "
    )
    said += (
        f"the clearest gain is {least['model']}, {least['relation']}, {least['gained']} gained and "
        f"{least['forgotten']} forgotten, p = {least['p']:.2g}, {least['p_holm']:.2g} corrected"
        if least
        else "nothing gained"
    )
    return _claim(
        "3",
        "some quantized models recall more than the original",
        "LRE top-1: a net gain over all facts or in a relation, exact McNemar, Holm over all "
        f"{len(tests)} tests; it does not hold if every model's change lies below zero",
        verdict,
        said,
        change_points=overall,
        models_above=above,
        relations_above=relations_above,
        relations_below=relations_below,
        clearest_gains=sorted(ahead, key=lambda test: test["p"])[:5],
        significant_losses=sum(test["p_holm"] < 0.05 for test in behind),
    )


def half(subject: str) -> int:
    """0 or 1, by the subject's spelling; unrelated to its partition."""
    return int(unit_hash(f"half|{subject.casefold()}") < 0.5)


def _unsaturated_lose_most(
    models: Mapping[str, Answers], asked: Asked, generator: np.random.Generator
) -> dict[str, Any]:
    before = models[REFERENCE].one_hop
    quantized = {name: found.one_hop for name, found in models.items() if name != REFERENCE}
    relations = np.array(asked.relations)
    halves = np.array([half(subject) for subject in asked.subjects])

    def cells(right: NDArray[Any], names: Sequence[str]) -> NDArray[Any]:
        """`(2, relations)` sums over the facts of each half."""
        return np.array(
            [[right[(halves == h) & (relations == name)].sum() for name in names] for h in (0, 1)],
            dtype=float,
        )

    every = list(dict.fromkeys(asked.relations))
    enough = np.all(cells(before, every) >= _FEWEST_RIGHT, axis=0).tolist()
    names = [name for name, ok in zip(every, enough, strict=True) if ok]
    known, facts = cells(before, names), cells(np.ones(before.size), names)
    saturation = known / facts

    def tested(kept: NDArray[Any], per: NDArray[Any]) -> dict[str, float]:
        """Saturation of one half against the other half's loss, both ways."""
        lost = (known - kept) / per
        rho, p = rank_test([(saturation[0], lost[1]), (saturation[1], lost[0])], generator)
        return {"rho": rho, "p": p}

    by_model = {}
    for name, right in quantized.items():
        kept = cells(right, names)
        by_model[name] = {"relative": tested(kept, known), "absolute": tested(kept, facts)}
    for name, p in zip(
        by_model, holm([row["relative"]["p"] for row in by_model.values()]), strict=True
    ):
        by_model[name]["relative"]["p_holm"] = p
    pooled = np.mean([cells(right, names) for right in quantized.values()], axis=0)
    relative, absolute = tested(pooled, known), tested(pooled, facts)
    unforgotten = np.mean([cells(right & before, names) for right in quantized.values()], axis=0)
    forgotten = tested(unforgotten, known)
    return _claim(
        "4",
        "relations that are not saturated lose most",
        "Spearman over relations between the reference's top-1 on one half of the subjects and the "
        "loss on the other half, both ways averaged, permutation p; the verdict by the relative "
        "loss, 1 - right / right before, of all quantized models together",
        by_sign([-relative["rho"]], [relative["p"]]),
        f"relative loss: rho = {relative['rho']:+.2f}, p = {relative['p']:.2g}; absolute loss: "
        f"{absolute['rho']:+.2f}, p = {absolute['p']:.2g}; share forgotten, gains not "
        f"counted: {forgotten['rho']:+.2f}, p = {forgotten['p']:.2g}; {len(names)} relations",
        relative=relative,
        absolute=absolute,
        forgotten=forgotten,
        models=by_model,
        relations={
            name: {
                "saturation": float(known[:, i].sum() / facts[:, i].sum()),
                "relative_loss": float(1 - pooled[:, i].sum() / known[:, i].sum()),
            }
            for i, name in enumerate(names)
        },
        relations_left_out=[name for name in every if name not in names],
    )
