"""The comparison with peers as a Markdown table, sentences, and a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from peers_findings import EVOLUTION, OURS

from mpsearch.console import emit

Rows = Sequence[Mapping[str, Any]]
# Logarithmic in nats, but linear next to zero, below which answers may gain.
_SCALE: dict[str, Any] = {"value": "symlog", "linthresh": 0.5, "linscale": 0.3}
_TICKS = (-0.5, 0, 0.5, 1, 2, 3, 5, 10, 20, 30, 50)


def report(result: Mapping[str, Any], figure: Path) -> None:
    """Data on standard output, and the figure.

    Args:
        result: what the benchmark writes.
    """
    rows = result["rows"]
    if not rows:
        return
    measured = {row["size"] for row in rows}
    budgets_bytes = {
        size: budget
        for size, budget in result["conditions"]["budgets_bytes"].items()
        if size in measured
    }
    for line in table(rows, result["findings"]["sizes"], budgets_bytes):
        emit(line)
    emit("")
    for found in result["findings"]["sizes"]:
        emit(_said(found))
    for found in result["findings"]["targets"]:
        emit(f"Target {found['target']}: {found['verdict']}. {found['said']}")
    draw(rows, result["curves"], list(budgets_bytes), figure)


def table(rows: Rows, of_sizes: Rows, budgets_bytes: Mapping[str, int]) -> list[str]:
    """A row a rival, best first at the smallest size; its losses over seeds, and what it cost.

    The lowest loss of a size is bold; * is significantly worse than ours and + significantly
    better, after Holm's correction.

    Args:
        budgets_bytes: of the sizes that have rows, the smallest first.
    """
    sizes = list(budgets_bytes)
    rivals = list(dict.fromkeys(row["rival"] for row in rows))
    means = {key: mean(row["answer_loss"] for row in some) for key, some in _cells(rows).items()}
    rivals.sort(key=lambda name: [means.get((size, name), float("inf")) for size in sizes])
    lowest = {size: min(loss for (its, _), loss in means.items() if its == size) for size in sizes}
    marks = {
        (found["size"], row["rival"]): "*" if row["difference_nats"]["mean"] > 0 else "+"
        for found in of_sizes
        for row in found["against"]
        if row["p_holm"] < 0.05
    }
    lines = [
        "| answer loss (nats) and recall (%) | "
        + " | ".join(f"{size}, {budgets_bytes[size] / 1e6:.1f} MB" for size in sizes)
        + " | seeds | evaluations |",
        "|---" * (len(sizes) + 3) + "|",
    ]
    for name in rivals:
        shown = []
        for size in sizes:
            if not (some := _cells(rows).get((size, name))):
                shown.append("")
                continue
            loss = means[size, name]
            text = f"{loss:.2f}"
            text = f"**{text}**" if loss == lowest[size] else text
            recall = 100 * mean(row["recall"] for row in some)
            shown.append(f"{text}{marks.get((size, name), '')} ({recall:.0f})")
        mine = [row for row in rows if row["rival"] == name]
        spent = sorted({round(row["evaluations"]) for row in mine})
        cost = f"{spent[0]}" if len(spent) == 1 else f"{spent[0]} to {spent[-1]}"
        seeds = len({row["seed"] for row in mine})
        lines.append(f"| {name} | " + " | ".join(shown) + f" | {seeds} | {cost} |")
    return lines


def _said(found: Mapping[str, Any]) -> str:
    """Ours at one size, in a line."""
    parts = [f"{found['size']}: lowest is {found['lowest']}"]
    below = {row["rival"]: row["percent_below"] for row in found["against"]}
    parts += [
        "{:.0f} % [{:.0f}, {:.0f}] below {}".format(*below[name].values(), name)
        for name in dict.fromkeys(("uniform", found["best_predictor"]))
        if name in below
    ]
    better = [row["rival"] for row in found["against"]
              if row["p_holm"] < 0.05 and row["difference_nats"]["mean"] < 0]  # fmt: skip
    parts.append(f"significantly better than ours: {', '.join(better) or 'none'}")
    for sign, word in ((1, "more"), (-1, "fewer")):
        apart = [row["rival"] for row in found["against"] if row["recall_p_holm"] < 0.05
                 and sign * row["recall_points"]["mean"] > 0]  # fmt: skip
        parts.append(f"recalls significantly {word} facts than {', '.join(apart) or 'none'}")
    return "; ".join(parts)


def _cells(rows: Rows) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """Rows of all seeds by (size, rival)."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["size"], row["rival"]), []).append(row)
    return found


def _at_the_tightest(
    cells: Mapping[tuple[str, str], Rows], sizes: Sequence[str], name: str
) -> tuple[int, float]:
    """What orders rivals: the first size that they were run at, and answer loss there."""
    place = next(i for i, size in enumerate(sizes) if (size, name) in cells)
    return place, mean(row["answer_loss"] for row in cells[sizes[place], name])


def _ticks(axis: Any) -> None:
    """A few round numbers of what is shown."""
    low, high = axis.get_view_interval()
    shown = [tick for tick in _TICKS if low <= tick <= high]
    axis.set_ticks(shown, [f"{tick:g}" for tick in shown])


def draw(rows: Rows, curves: Rows, sizes: Sequence[str], out: Path) -> None:
    """A panel a size: every row's answer loss on the final facts with its 95 % interval, seeds as
    points; below, the lowest search loss by fact tokens of ours and of the evolutionary search from
    the same start, a line a seed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cells = _cells(rows)
    names = list(dict.fromkeys(row["rival"] for row in rows))
    names.sort(key=lambda name: _at_the_tightest(cells, sizes, name), reverse=True)
    figure = Figure(figsize=(3.4 * len(sizes) + 1.2, 8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(sizes), squeeze=False, height_ratios=[3, 2])
    for column, size in enumerate(sizes):
        upper, lower = panels[0][column], panels[1][column]
        upper.set_xscale(**_SCALE)
        lower.set_yscale(**_SCALE)
        for place, name in enumerate(names):
            color = "tab:red" if name == OURS else "0.25"
            for row in cells.get((size, name), ()):
                upper.errorbar(
                    row["answer_loss"], place, xerr=1.96 * row["stderr"], fmt="o", color=color,
                    markersize=4, elinewidth=0.8, alpha=0.7,
                )  # fmt: skip
        upper.set_yticks(range(len(names)), names if column == 0 else [""] * len(names))
        upper.set_ylim(-0.6, len(names) - 0.4)
        upper.set_title(size, fontsize=10)
        upper.set_xlabel("answer loss on final facts (nats)")
        _ticks(upper.xaxis)
        named: set[str] = set()
        for curve in curves:
            if curve["size"] == size and curve["rival"] in (OURS, EVOLUTION):
                tokens, losses = zip(*curve["points"], strict=True)
                ours = curve["rival"] == OURS
                label = None if curve["rival"] in named else curve["rival"]
                named.add(curve["rival"])
                lower.step(
                    [*tokens, curve["fact_tokens"]], [*losses, losses[-1]], where="post",
                    color="tab:red" if ours else "tab:blue", linewidth=1.2, label=label,
                )  # fmt: skip
        if named:
            lower.set_xscale("log")
            lower.xaxis.set_minor_formatter("")
            lower.legend(fontsize=8)
            _ticks(lower.yaxis)
        lower.set_xlabel("fact tokens")
        if column == 0:
            lower.set_ylabel("lowest search loss (nats)")
        for axes in (upper, lower):
            axes.grid(color="0.92")
            axes.set_axisbelow(True)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
