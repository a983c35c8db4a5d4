"""The figure of a run: recall against size, and the bits of each layer of the pick.

Readable in grey: points differ by marker and fill, bits by lightness and a printed number.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from mpsearch.errors import ResourceError, RunError, UsageError, exhausted
from mpsearch.formats import FORMATS, nearest
from mpsearch.front import pareto_front
from mpsearch.measures import MEASURES, OF_PAIRS, Sensitivity
from mpsearch.points import ParetoFront
from mpsearch.run import Run
from mpsearch.space import ResolvedSpace

_MARKS: dict[str, dict[str, Any]] = {
    "uniform": {"marker": "s", "markerfacecolor": "white", "markersize": 7},
    "greedy": {"marker": "^", "markerfacecolor": "0.75", "markersize": 7},
    "knapsack": {"marker": "D", "markerfacecolor": "0.75", "markersize": 6},
    "search": {"marker": "o", "markerfacecolor": "black", "markersize": 5},
    "refined": {"marker": "*", "markerfacecolor": "black", "markersize": 9},
}
_FILES = (".png", ".svg", ".pdf")


def plot(
    run: Run,
    out: str | Path,
    beside: str | None = None,
    sensitivity: str | Path | None = None,
) -> Path:
    """Draw a run to a .png, .svg or .pdf file.

    Args:
        beside: one of `mpsearch.measures.MEASURES`, to show it with the bits.
        sensitivity: the file that holds it; the run's own by default.
    Raises:
        UsageError: another suffix or measure, or the file cannot be written.
        RunError: nothing has been scored yet, the measure is not there, or of another model.
    """
    out = Path(out)
    if out.suffix.lower() not in _FILES:
        raise UsageError(f"'{out}' ends in '{out.suffix}'; use {', '.join(_FILES)}")
    if sensitivity is not None and beside is None:
        raise UsageError("a sensitivity file is shown by --beside MEASURE only; say which")
    values = None if beside is None else _values(run, beside, sensitivity)
    front = run.front()
    figure = _figure(12, 5.2)
    rows = ["bits", "beside"] if values else ["bits"]
    axes = figure.subplot_mosaic([["trade-off", row] for row in rows], width_ratios=[1.0, 1.25])
    _trade_off(axes["trade-off"], run, front)
    shown = front.pick or front.points[0]
    _bits(axes["bits"], run.space, shown.assignment, f"{shown.id} ({shown.kind})")
    if values:
        _beside(axes["beside"], figure, run, *values)
    return _saved(figure, out)


def plot_bits(
    space: ResolvedSpace, assignment: Mapping[str, str], name: str, out: str | Path
) -> Path:
    """Draw the bits of one assignment by block and kind of group; see `plot`.

    Args:
        name: of the assignment, for the title.
    """
    figure = _figure(9, 2.6)
    _bits(figure.subplots(), space, assignment, name)
    return _saved(figure, Path(out))


def _figure(width_inches: float, height_inches: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_inches, height_inches), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _saved(figure: Any, out: Path) -> Path:
    unfinished = out.with_name(f".{os.getpid()}.{out.name}")
    try:
        figure.savefig(unfinished, dpi=150)
        unfinished.replace(out)
    except OSError as error:
        if ran_out := exhausted(error):
            raise ResourceError(f"cannot write '{out}': {ran_out}") from None
        raise UsageError(f"cannot write '{out}': {error.strerror}") from None
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
    return out


def _trade_off(axes: Any, run: Run, front: ParetoFront) -> None:
    """Recall with error bars against stored size; the line joins the best recall so far."""
    for kind, style in _MARKS.items():
        points = [point for point in front.points if point.kind == kind]
        if points:
            axes.errorbar(
                [point.stored_bytes / 2**20 for point in points],
                [point.recall.mean * 100 for point in points],
                yerr=[point.recall.stderr * 100 for point in points],
                linestyle="none",
                color="black",
                elinewidth=0.8,
                capsize=2,
                label=kind,
                zorder=3,
                **style,
            )
    allowed = [point for point in front.points if not point.over_text_kl]
    best = pareto_front(allowed, lambda p: (p.stored_bytes, -p.recall.mean))
    axes.plot(
        [point.stored_bytes / 2**20 for point in best],
        [point.recall.mean * 100 for point in best],
        color="0.55",
        linewidth=1.2,
        zorder=2,
        label="front",
    )
    if front.pick is not None:
        axes.plot(
            front.pick.stored_bytes / 2**20,
            front.pick.recall.mean * 100,
            marker="o",
            markersize=14,
            markerfacecolor="none",
            markeredgecolor="black",
            linestyle="none",
            label=f"pick {front.pick.id}",
            zorder=4,
        )
    device = run.content.get("device_budget")
    axes.axvline(
        run.budget_bytes / 2**20, color="black", linestyle="--", linewidth=1,
        label="budget" if device is None else
        f"budget: {device['device']},\n{device['context']:,} tokens x {device['batch']:,}",
    )  # fmt: skip
    reference = run.content.get("reference_validation")
    if reference:
        axes.axhline(
            reference["recall"] * 100, color="0.4", linestyle=":", linewidth=1, label="unquantized"
        )
        axes.axhline(
            reference["chance"] * 100, color="0.4", linestyle="-.", linewidth=1, label="chance"
        )
    axes.set_xlabel("stored size (MiB)")
    axes.set_ylabel("recall on validation facts (%), ± one standard error")
    axes.set_title(run.question["model"], fontsize=11, parse_math=False)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.legend(loc="lower right", fontsize=8, frameon=True)


def _bits(axes: Any, space: ResolvedSpace, assignment: Mapping[str, str], name: str) -> None:
    """A row a kind of group, a column a block; lightness and number are nominal bits."""
    import numpy as np

    kinds, bits = _grid(
        space, {group: float(FORMATS[fmt].bits) for group, fmt in assignment.items()}
    )
    depth = bits.shape[1]
    # Levels are spaced evenly, as 8 bits are no four times darker than 2.
    levels = sorted({int(value) for value in bits[~np.isnan(bits)]})
    shades = np.full(bits.shape, np.nan)
    for index, level in enumerate(levels):
        shades[bits == level] = index / max(len(levels) - 1, 1)
    axes.imshow(shades, cmap="Greys", vmin=-0.15, vmax=1.25, aspect="auto")
    for row, column in zip(*np.nonzero(~np.isnan(bits)), strict=True):
        axes.text(
            column,
            row,
            f"{int(bits[row, column])}",
            ha="center",
            va="center",
            fontsize=8 if depth <= 40 else 5,
            color="white" if shades[row, column] > 0.6 else "black",
        )
    _name_rows(axes, kinds)
    axes.set_title(
        f"bits of {name}: {space.bits_per_weight(assignment):.2f} bits a weight, scales included",
        fontsize=10,
    )


def _beside(axes: Any, figure: Any, run: Run, title: str, of_groups: Mapping[str, float]) -> None:
    """The same rows and columns as the bits; the darker, the larger the measure."""
    import numpy as np
    from matplotlib.colors import LogNorm

    kinds, grid = _grid(run.space, of_groups)
    found = grid[~np.isnan(grid)]
    spread = bool(found.size) and found.min() > 0 and found.max() > 10 * found.min()
    image = axes.imshow(grid, cmap="Greys", norm=LogNorm() if spread else None, aspect="auto")
    figure.colorbar(image, ax=axes, pad=0.01)
    _name_rows(axes, kinds)
    axes.set_title(title, fontsize=10)


def _grid(space: ResolvedSpace, of_groups: Mapping[str, float]) -> tuple[list[str], NDArray[Any]]:
    """Kinds of groups, and a value for each kind and block; NaN where there is no such group."""
    import numpy as np

    groups = [group for group in space.groups if group.depth is not None]
    kinds = list(dict.fromkeys(group.kind for group in groups))
    depth = 1 + max((group.depth or 0) for group in groups) if groups else 1
    grid = np.full((max(len(kinds), 1), depth), np.nan)
    for group in groups:
        grid[kinds.index(group.kind), group.depth] = of_groups.get(group.name, np.nan)
    return kinds, grid


def _name_rows(axes: Any, kinds: Sequence[str]) -> None:
    axes.set_yticks(range(len(kinds)), [kind.replace("+", "\n+") for kind in kinds], fontsize=8)
    axes.set_xlabel("block")


def _values(run: Run, measure: str, file: str | Path | None) -> tuple[str, Mapping[str, float]]:
    """What the panel of a measure is called, and its value for each group."""
    if measure not in MEASURES:
        raise UsageError(f"no measure '{measure}'{nearest(measure, MEASURES)}")
    path = run.folder / "sensitivity.json" if file is None else Path(file)
    try:
        table = Sensitivity.load(path)
    except RunError as error:
        again = "'mpsearch search --resume' measures it again" if file is None else _how(run)
        raise RunError(f"{error}; {again}") from None
    fingerprint = table.provenance.get("fingerprint", run.question["fingerprint"])
    if fingerprint != run.question["fingerprint"]:
        raise RunError(f"'{path}' is of another model than '{run.folder}'; {_how(run)}")
    if measure not in table.measures:
        raise RunError(
            f"'{path}' holds no {measure}, but {', '.join(table.measures)}; {_how(run, measure)}"
        )
    of_format = f" in {table.middle_format}" if measure in OF_PAIRS else ""
    return f"{measure}: {MEASURES[measure]}{of_format}", table.of_groups(measure)


def _how(run: Run, measure: str = "") -> str:
    """How to get a table with every measure; a search measures what it needs."""
    if run.question.get("awq"):
        return "it is measured of models without --awq only"
    space = run.space.space.source
    given = [shlex.quote(run.question["model"]), "--quantizer", run.question["bank"]["quantizer"]]
    given += ["--space", shlex.quote(space)] * Path(space).exists()
    given += ["--chat-template"] * run.question.get("chat_template", False)
    given += ["--check"] * (measure == "perturb_nats")
    return (
        f"measure it with 'mpsearch sensitivity {' '.join(given)} -o FILE.json', then plot with "
        "--sensitivity FILE.json"
    )
