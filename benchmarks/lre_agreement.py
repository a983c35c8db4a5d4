"""How far the built-in facts agree with the LRE data set where both know a subject.

    python benchmarks/lre_agreement.py LRE_FOLDER [--out FILE]

Protocol: a built-in relation is set beside the LRE relations that ask the same. Subjects and
answers match by spelling, but for capitals, a leading article and full stops. Two facts agree if
any right answer of the one is a right answer of the other. Disagreements are printed for a person
to look at; LRE is not the judge: it lists what a crawl found, doubtful objects included.

Writes one JSON: a row a pair of relations with `overlap` and `agree`, and the `disagreements`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from mpsearch.console import emit, table
from mpsearch.facts import Fact, FactSet
from mpsearch.files import write_atomically

SAME = {
    "capital": ["country capital city"],
    "city_country": ["city in country", "landmark in country"],
    "continent": ["landmark on continent"],
    "currency": ["country currency"],
    "food_country": ["food from country"],
    "landmark_country": ["landmark in country"],
    "language": ["country language"],
    "mountain_country": ["landmark in country"],
    "occupation_field": ["plays pro sport"],
    "product_company": ["product by company"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lre", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/lre_agreement.json"))
    args = parser.parse_args()
    builtin, lre = FactSet.builtin(), FactSet.load(args.lre)
    rows: list[dict[str, Any]] = []
    disagreements: list[str] = []
    for relation, others in SAME.items():
        for other in others:
            theirs = {plain(fact.subject): fact for fact in lre.of(other)}
            pairs = [(f, theirs[plain(f.subject)]) for f in builtin.of(relation)
                     if plain(f.subject) in theirs]  # fmt: skip
            wrong = [(mine, their) for mine, their in pairs if not agree(mine, their)]
            rows.append({"relation": relation, "lre": other, "overlap": len(pairs),
                         "agree": len(pairs) - len(wrong)})  # fmt: skip
            disagreements += [
                f"{relation}: {mine.subject} = {mine.answer}; LRE: {', '.join(their.accepted)}"
                for mine, their in wrong
            ]
    total = {"relation": "all", "lre": "", "overlap": sum(r["overlap"] for r in rows),
             "agree": sum(r["agree"] for r in rows)}  # fmt: skip
    table(
        ["relation", "LRE relation", "in both", "agree"],
        [[str(value) for value in row.values()] for row in (*rows, total)],
    )
    emit("\n".join(disagreements))
    result = {"rows": [*rows, total], "disagreements": disagreements}
    write_atomically(args.out, json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def agree(mine: Fact, their: Fact) -> bool:
    return bool({plain(a) for a in mine.accepted} & {plain(a) for a in their.accepted})


def plain(text: str) -> str:
    return text.casefold().replace(".", "").removeprefix("the ").strip()


if __name__ == "__main__":
    main()
