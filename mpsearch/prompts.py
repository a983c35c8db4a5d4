"""Ask the same facts in other ways: in other words, with more examples, with reordered ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mpsearch.displaced import EXAMPLES, PARAPHRASE
from mpsearch.facts import Fact, FactSet
from mpsearch.models import Model
from mpsearch.recall import SHOTS, RecallProxy
from mpsearch.scores import FactScores


def ask_otherwise(
    model: Model,
    fact_set: FactSet,
    facts: Sequence[Fact],
    shots: int,
    report: Callable[[int, int], None],
) -> dict[str, FactScores]:
    """Scores under every paraphrase, and with twice the examples.

    A fact that lacks a paraphrase is asked as before there, so it cannot come back by it.

    Args:
        shots: of the ordinary prompt; without any, four are more.
        report: called with prompts done and in all.
    Returns:
        Scores of all facts by name of the prompt.
    """
    paraphrases = max((len(fact.paraphrases) for fact in facts), default=0)
    total = paraphrases + 1
    found = {}
    for number in range(1, total):
        report(number - 1, total)
        asked = [f.paraphrased(number) if len(f.paraphrases) >= number else f for f in facts]
        proxy = RecallProxy(model, fact_set.paraphrased(number), asked, contrast=True, shots=shots)
        found[f"{PARAPHRASE} {number}"] = proxy.reference
    report(paraphrases, total)
    more = 2 * shots or SHOTS
    if any(len(fact_set.demonstrations(f.relation, more)) > shots for f in facts):
        proxy = RecallProxy(model, fact_set, facts, contrast=True, shots=more)
        found[EXAMPLES] = proxy.reference
    report(total, total)
    return found


def ask_reordered(
    model: Model, fact_set: FactSet, facts: Sequence[Fact], shots: int
) -> FactScores | None:
    """Scores with the examples in the opposite order; None where no order can change."""
    if all(len(fact_set.demonstrations(fact.relation, shots)) < 2 for fact in facts):
        return None
    proxy = RecallProxy(model, fact_set, facts, contrast=True, shots=shots, reverse_examples=True)
    return proxy.reference
