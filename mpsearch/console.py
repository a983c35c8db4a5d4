"""The only module that prints: data on standard output, talk on standard error."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mpsearch.estimates import Estimate
from mpsearch.facts import PARTITIONS
from mpsearch.facts.describe import Description
from mpsearch.forecast import Forecast
from mpsearch.measures import Sensitivity
from mpsearch.outcome import outcome
from mpsearch.points import ParetoFront, Point
from mpsearch.predict import Foresight
from mpsearch.run import Run
from mpsearch.sizes import format_size

_PLAIN_EVERY_SECONDS = 10.0


def say(message: str) -> None:
    """A line of talk."""
    print(message, file=sys.stderr, flush=True)


def emit(text: str) -> None:
    """Data."""
    print(text, flush=True)


def emit_json(content: Any) -> None:
    emit(json.dumps(content, indent=1, ensure_ascii=False))


def quiet_libraries() -> None:
    """Keep other libraries' chatter off the terminal; their errors become ours."""
    import os

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TORCH_LOGS", "-all")  # errors only
    for name in ("torchao", "torch", "gptqmodel", "bitsandbytes", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    own = logging.getLogger("mpsearch")
    own.handlers[:] = [handler]
    own.propagate = False


class Progress:
    """Shows stages with time left: a live bar on a terminal, else a plain line now and then.

    Called as `progress(stage, done, total)`. A stage begins when its first word changes.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._stage = ""
        self._started = (0.0, 0)
        self._said = float("-inf")
        self._forecast: Forecast | None = None
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
                console=Console(stderr=True),
            )
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = self._clock()
        begins = stage.split(",")[0] != self._stage
        if begins:
            self._stage = stage.split(",")[0]
            self._started = (now, done)
        left = self._left(now, done, total)
        if self._bar is not None:
            if begins:
                self._task = self._bar.add_task(stage, total=total, left="")
            self._bar.update(self._task, description=stage, completed=done, total=total, left=left)
        elif begins or done == total or now - self._said >= _PLAIN_EVERY_SECONDS:
            self._said = now
            say(f"{stage}: {done}/{total}{', ' + left if left else ''}")

    def _left(self, now: float, done: int, total: int) -> str:
        since, first = self._started
        if done <= first or done >= total:
            return ""
        pace = (now - since) / (done - first)
        seconds = pace * (total - done)
        if self._forecast is None or self._stage != "search":
            return f"about {format_seconds(seconds)} left"
        if self._forecast.limit is not None:
            seconds = min(seconds, max(self._forecast.limit - (now - since), 0.0))
        after = self._forecast.after_trials(pace)
        return f"about {format_seconds(seconds)} left, then {format_seconds(after)}"

    def expect(self, forecast: Forecast) -> None:
        """Say how long a search takes; its trials then show what follows them, too."""
        self._forecast = forecast
        say(forecast_line(forecast))


def format_seconds(seconds: float) -> str:
    """`45 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def forecast_line(forecast: Forecast) -> str:
    """What a search takes, in all and by part."""
    trials = f"{forecast.trials} trials of {forecast.trial:.1f} s"
    if forecast.limit is not None:
        trials = f"about {trials} in {format_seconds(forecast.limit)} at most"
    names = {
        "bank": "bank",
        "sensitivity": "sensitivity",
        "baselines": "simple allocations",
        "trials": trials,
        "finalists": "finalists",
        "test": "test facts",
    }
    parts = [
        f"{names[stage]} {format_seconds(seconds)}"
        for stage, seconds in forecast.by_stage.items()
        if seconds
    ]
    bank = " beside the bank, which is timed next" if forecast.bank is None else ""
    return (
        f"about {format_seconds(forecast.total)}{bank}: {', '.join(parts)} (on this machine, as "
        "busy as it is now; updated as it goes)"
    )


def table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], title: str = "", left: int = 2
) -> None:
    """A table as wide as it needs: the first `left` columns left-aligned, the others right."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=title or None, box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for index, header in enumerate(headers):
        shown.add_column(header, justify="left" if index < left else "right", no_wrap=True)
    for row in rows:
        shown.add_row(*(Text(cell) for cell in row))
    console = Console(width=10_000, highlight=False, markup=False)  # cuts no cell
    with console.capture() as text:  # printed by us: rich ends the process on a closed pipe
        console.print(shown)
    emit(text.get().rstrip("\n"))


def plus_minus(estimate: Estimate | None, scale: float = 1.0, digits: int = 3) -> str:
    if estimate is None:
        return "-"
    return f"{estimate.mean * scale:.{digits}f} ± {estimate.stderr * scale:.{digits}f}"


def show_front(run: Run, front: ParetoFront) -> None:
    """The validation table, the verdict, and the test figures of the pick."""
    rows = [_front_row(point, front, _noise_floor_nats(run) or 0.0) for point in front.points]
    if "reference_validation" in run.content:
        recall = run.content["reference_validation"]["recall"]
        text = run.content.get("reference_text")
        read = ["0.000", f"{text['perplexity']:.2f}"] if text else ["", ""]
        rows.append(["reference", "", "", "16.000", f"{recall * 100:.1f}", "0.000", "", *read, ""])
    table(
        ["id", "kind", "stored bytes", "bits/weight", "recall %", "answer loss (nats)",
         "against uniform", "text KL", "perplexity", "front"],
        rows,
        title=f"{run.question['model']} on validation facts, budget "
        f"{format_size(run.budget_bytes)}; ± is one standard error",
    )  # fmt: skip
    if run.budget_line:
        emit(f"Budget: {run.budget_line}")
    if run.max_text_kl_nats is not None:
        emit(
            f"Text KL is limited to {run.max_text_kl_nats:g} nats a token on search text; the "
            "table shows it on held-out text."
        )
    if (floor := _noise_floor_nats(run)) is not None:
        emit(
            f"Noise floor (the reference against itself, packed otherwise): {floor:.2g} nats of "
            "mean answer loss; ~ marks what is below it."
        )
    for gain in filter(None, (point.gain for point in front.points)):
        emit(gain)
    emit(front.verdict)
    if found := outcome(run):
        emit(found.verdict)
    if foreseen := run.content.get("foresight"):
        emit(str(Foresight(**foreseen)))
    if not run.finished:
        say("This search is not finished; the table holds what has been validated so far.")


def _noise_floor_nats(run: Run) -> float | None:
    """Of validation facts; None in runs that were not finished, or of before it was measured."""
    floor: float | None = run.content.get("reference_validation", {}).get("noise_floor_nats")
    return floor


def _front_row(point: Point, front: ParetoFront, floor_nats: float) -> list[str]:
    def nats(estimate: Estimate | None) -> str:
        if estimate is None:
            return ""
        return ("~" if abs(estimate.mean) <= floor_nats else "") + plus_minus(estimate)

    marks = ("*" if point.id in front.pareto_ids else "") + (
        " pick" if front.pick is not None and point.id == front.pick.id else ""
    )
    if point.over_text_kl:
        marks = "over text KL"
    return [
        point.id,
        point.kind,
        f"{point.stored_bytes:,}",
        f"{point.bits_per_weight:.3f}",
        plus_minus(point.recall, 100, 1),
        nats(point.answer_loss),
        nats(point.against_uniform),
        plus_minus(point.text.kl) if point.text is not None else "",
        f"{point.text.perplexity:.2f}" if point.text is not None else "",
        marks.strip(),
    ]


def front_json(run: Run, front: ParetoFront) -> dict[str, Any]:
    test = outcome(run)
    return {
        "model": run.question["model"],
        "budget_bytes": run.budget_bytes,
        "device_budget": run.content.get("device_budget"),
        "max_text_kl_nats": run.max_text_kl_nats,
        "finished": run.finished,
        "points": [
            {**point.to_json(), "on_front": point.id in front.pareto_ids} for point in front.points
        ],
        "pick": front.pick and front.pick.id,
        "verdict": front.verdict,
        "test": test and test.to_json(),
        "foresight": run.content.get("foresight"),
        "reference": {
            partition: run.content.get(f"reference_{partition}")
            for partition in ("validation", "test")
        },
        "reference_text": run.content.get("reference_text"),
    }


def show_point(run: Run, point: Point) -> None:
    """Size, figures and the format of every group, a row a block."""
    emit(
        f"{point.id} ({point.kind}): {point.stored_bytes:,} bytes "
        f"({format_size(point.stored_bytes)}), {point.bits_per_weight:.3f} bits a searched weight"
    )
    emit(
        f"validation facts: recall {plus_minus(point.recall, 100, 1)} %, answer loss "
        f"{plus_minus(point.answer_loss)} nats, KL {point.kl_nats:.3f} nats"
    )
    if point.gain:
        emit(point.gain)
    if point.text is not None:
        emit(
            f"held-out text: KL {plus_minus(point.text.kl)} nats a token, perplexity "
            f"{point.text.perplexity:.2f}"
        )
    if run.budget_line:
        emit(f"budget: {run.budget_line}")
    kinds = list(dict.fromkeys(group.kind for group in run.space.groups))
    blocks: dict[str, dict[str, str]] = {}
    for group in run.space.groups:
        blocks.setdefault(str(group.depth), {})[group.kind] = point.assignment[group.name]
    table(
        ["block", *kinds],
        [[block, *(formats.get(kind, "") for kind in kinds)] for block, formats in blocks.items()],
        left=1 + len(kinds),
    )


def show_layers(space: Any, model_name: str) -> None:
    rows = [
        [
            group.name,
            " ".join(f"{layer.rows}x{layer.columns}" for layer in group.layers),
            f"{group.weights:,}",
            *(f"{fmt.name} {fmt.bits_per_weight(group):.3f}" for fmt in space.options[group.name]),
        ]
        for group in space.groups
    ]
    width = max(len(row) for row in rows)
    headers = ["group", "shapes", "weights", "formats and bits/weight", *[""] * (width - 4)]
    table(headers, [row + [""] * (width - len(row)) for row in rows])
    layers = sum(len(group.layers) for group in space.groups)
    smallest, largest = space.stored_bytes(space.smallest), space.stored_bytes(space.largest)
    emit(
        f"{model_name}: {layers} layers in {len(space.groups)} groups, {space.weights:,} searched "
        f"weights; {format_size(space.kept_bytes)} kept in bf16; stored "
        f"{format_size(smallest)} to {format_size(largest)}"
    )


def layers_json(space: Any) -> dict[str, Any]:
    return {
        "kept_bytes": space.kept_bytes,
        "smallest_bytes": space.stored_bytes(space.smallest),
        "largest_bytes": space.stored_bytes(space.largest),
        "groups": [
            {
                "name": group.name,
                "layers": [layer.name for layer in group.layers],
                "weights": group.weights,
                "stored_bytes": {
                    fmt.name: fmt.stored_bytes(group) for fmt in space.options[group.name]
                },
            }
            for group in space.groups
        ],
    }


def show_bank(held: Mapping[str, tuple[int, int, int]]) -> None:
    """A row a format: files there, files wanted, stored bytes."""
    rows = [[name, f"{have} of {of}", f"{size:,}"] for name, (have, of, size) in held.items()]
    total = [sum(h[which] for h in held.values()) for which in range(3)]
    rows.append(["all", f"{total[0]} of {total[1]}", f"{total[2]:,}"])
    table(["format", "layers", "stored bytes"], rows, left=1)


def show_kept(rows: Sequence[Mapping[str, Any]]) -> None:
    """What is not searched and why, a row a reason."""
    table(
        ["kept because it is", "tensors", "weights", "stored", "first"],
        [
            [
                row["reason"],
                str(len(row["names"])),
                f"{row['weights']:,}",
                format_size(row["stored_bytes"]),
                row["names"][0],
            ]
            for row in rows
        ],
    )


def show_facts(description: Description) -> None:
    """A row a relation, one-hop relations first, the totals, and on standard error the warnings."""
    table(
        ["relation", "kind", "facts", *PARTITIONS, "templates", "answers", "with several",
         "characters", "chance %"],
        [
            [
                row.relation,
                row.kind,
                f"{row.facts:,}",
                *(f"{row.partitions[name]:,}" for name in PARTITIONS),
                str(row.templates),
                f"{row.answers:,}",
                f"{row.several_answers:,}",
                "{:.0f}, at most {}".format(*row.answer_characters),
                f"{row.chance * 100:.1f}",
            ]
            for row in description.relations
        ],
    )  # fmt: skip
    emit(
        f"{description.source}: {description.one_hop:,} one-hop facts, {description.two_hop:,} "
        f"two-hop questions; {len(description.repeated)} questions asked twice with one answer, "
        f"{len(description.contradicting)} with different answers"
    )
    for warning in description.warnings:
        say(f"look at this: {warning}")


def show_sensitivity(found: Sensitivity) -> None:
    """A row a group: KL in each format, errors in the middle one, geometry; then how they agree."""
    columns: dict[str, dict[str, float]] = {}
    for measure, short in (("fisher_nats", "KL"), ("perturb_nats", "measured")):
        if measure in found.measures:
            columns |= {f"{short} {fmt}": found.of_groups(measure, fmt) for fmt in found.formats}
    for measure, short in (
        ("weight_error", f"weights {found.middle_format}"),
        ("output_error", f"outputs {found.middle_format}"),
        ("outlier_ratio", "outliers"),
        ("effective_rank", "rank"),
        ("drift", "drift"),
    ):
        if measure in found.measures:
            columns[short] = found.of_groups(measure)
    table(
        ["group", *columns],
        [
            [group, *(f"{of[group]:.3g}" if group in of else "" for of in columns.values())]
            for group in dict.fromkeys(group for group, _ in found.fisher_nats)
        ],
        title="Each group alone: predicted KL (KL-Fisher) in nats, relative errors of its weights "
        "and outputs, geometry of its inputs and its block",
        left=1,
    )
    _show_correlations(found)


def _show_correlations(found: Sensitivity) -> None:
    """A row a measure: how it ranks against the measured KL, or else against KL-Fisher."""
    against = "perturb_nats" if "perturb_nats" in found.measures else "fisher_nats"
    rows: dict[str, dict[str, str]] = {}
    for row in found.correlations():
        if against in (row.a, row.b):
            other = row.b if row.a == against else row.a
            rho = "-" if row.spearman is None else f"{row.spearman:.2f}"
            rows.setdefault(other, {})[row.over] = rho
    overs = list(dict.fromkeys(over for of_measure in rows.values() for over in of_measure))
    table(
        ["measure", *overs],
        [[name, *(of.get(over, "") for over in overs)] for name, of in rows.items()],
        title=f"Spearman's rank correlation with {against}: over (group, format) pairs, and over "
        "the groups in one format",
        left=1,
    )
