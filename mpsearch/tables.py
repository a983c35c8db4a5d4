"""What a search, its space, facts and measures look like on a terminal, and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mpsearch.console import emit, plus_minus, say, table
from mpsearch.estimates import Estimate
from mpsearch.facts import PARTITIONS
from mpsearch.facts.describe import Description
from mpsearch.measures import Sensitivity
from mpsearch.outcome import outcome
from mpsearch.points import ParetoFront, Point
from mpsearch.predict import Foresight
from mpsearch.run import Run
from mpsearch.sizes import format_size


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
    kinds, rows = run.space.by_block(point.assignment)
    table(["block", *kinds], rows, left=1 + len(kinds))


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
