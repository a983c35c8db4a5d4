"""The figure: written whole, labelled, readable in the bits panel, and drawn for odd runs too."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from mpsearch.errors import ResourceError, RunError, UsageError
from mpsearch.measures import MEASURES, OF_GROUPS, OF_PAIRS, Sensitivity
from mpsearch.plot import plot
from mpsearch.run import Run

FORMATS = ["int2-g64", "int3-g64", "int4-g64", "int8-g64"]
KINDS = {
    "self_attn": [["q_proj", 64, 64], ["k_proj", 32, 64], ["v_proj", 32, 64]],
    "self_attn.o": [["o_proj", 64, 64]],
    "mlp": [["gate_proj", 128, 64], ["up_proj", 128, 64]],
    "mlp.down": [["down_proj", 64, 128]],
}
MakeRun = Callable[..., Run]


def make_groups(blocks: int) -> list[dict[str, Any]]:
    groups = []
    for block in range(blocks):
        for kind, layers in KINDS.items():
            parent = f"model.layers.{block}.{kind.partition('.')[0]}"
            named = [[f"{parent}.{name}", rows, columns] for name, rows, columns in layers]
            groups.append({"layers": named, "options": FORMATS})
    return groups


def group_name(group: dict[str, Any]) -> str:
    first, *rest = (layer[0] for layer in group["layers"])
    return "+".join([first, *(name.rpartition(".")[2] for name in rest)])


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """A run folder written by hand: uniform, greedy and searched points over so many blocks."""

    def made(
        blocks: int = 30,
        budget_bytes: int | None = None,
        groups: list[dict[str, Any]] | None = None,
        kinds: Sequence[str] = ("uniform", "uniform", "uniform", "greedy", "knapsack", "search"),
    ) -> Run:
        folder = tmp_path / "run"
        folder.mkdir()
        groups = groups or make_groups(blocks)
        lines = []
        for index, kind in enumerate(kinds):
            assignment = {
                group_name(group): FORMATS[index if kind == "uniform" else (index + place) % 4]
                for place, group in enumerate(groups)
            }
            content = {
                "assignment": assignment, "kind": kind, "partition": "validation",
                "loss_per_fact": [1.0 / (index + 1)] * 6, "kl_nats": 0.1, "top1": 0.5,
                "correct": [place < index + 1 for place in range(6)], "seconds": 0.1,
            }  # fmt: skip
            lines.append(json.dumps(content) + "\n")
        weights = sum(r * c for group in groups for _, r, c in group["layers"])
        content = {
            "version": 1,
            "question": {
                "model": "made-up [model]",
                "budget_bytes": weights if budget_bytes is None else budget_bytes,
                "bank": {"quantizer": "rounding"},
                "fingerprint": "made up",
            },
            "space": {
                "target": "compressed-tensors", "formats": FORMATS, "source": "by hand",
                "kept_bytes": 1000, "groups": groups,
            },
            "asked": {"search": [], "validation": ["a"] * 6},
            "reference_validation": {"recall": 0.9, "top1": 0.8, "chance": 0.125},
        }  # fmt: skip
        (folder / "run.json").write_text(json.dumps(content), encoding="utf-8")
        (folder / "evaluations.jsonl").write_text("".join(lines), encoding="utf-8")
        return Run.open(folder)

    return made


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved."""
    figures: list[Figure] = []
    savefig = Figure.savefig

    def kept(figure: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(figure)
        savefig(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", kept)
    return figures


def panels(figure: Figure) -> tuple[Axes, Axes]:
    trade_off, bits = figure.axes[:2]
    return trade_off, bits


@pytest.mark.parametrize(
    ("suffix", "magic"),
    [(".png", b"\x89PNG\r\n\x1a\n"), (".svg", b"<?xml"), (".pdf", b"%PDF"), (".PNG", b"\x89PNG")],
)
def test_each_file_type_is_written_and_holds_a_figure(
    suffix: str, magic: bytes, make_run: MakeRun, tmp_path: Path
) -> None:
    out = plot(make_run(4), tmp_path / f"figure{suffix}")
    assert out == tmp_path / f"figure{suffix}"
    content = out.read_bytes()
    assert content.startswith(magic)
    assert len(content) > 8000


def test_the_svg_names_axes_points_budget_and_model(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(4)
    text = plot(run, tmp_path / "figure.svg").read_text(encoding="utf-8")
    pick = run.front().pick
    assert pick is not None
    for words in (
        "stored size (MiB)", "recall on validation facts (%)", "block", "budget", "unquantized",
        "chance", "uniform", "greedy", "knapsack", "search", "made-up [model]", f"pick {pick.id}",
    ):  # fmt: skip
        assert words in text, words


@pytest.mark.parametrize("suffix", [".jpg", "", ".svgz", ".txt"])
def test_another_suffix_is_refused_with_those_there_are(
    suffix: str, make_run: MakeRun, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"\.png, \.svg, \.pdf"):
        plot(make_run(1), tmp_path / f"figure{suffix}")
    assert not list(tmp_path.glob("figure*"))


def test_a_file_that_cannot_be_written_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        plot(make_run(1), tmp_path / "nowhere" / "figure.png")


def test_a_disk_that_fills_up_leaves_no_half_of_a_figure(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_short(figure: Figure, out: Path, **_: Any) -> None:
        out.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    run, there = make_run(1), tmp_path / "figure.png"
    there.write_bytes(b"an earlier one")
    monkeypatch.setattr(Figure, "savefig", cut_short)
    with pytest.raises(ResourceError, match=r"figure\.png': the disk is full"):
        plot(run, there)
    assert there.read_bytes() == b"an earlier one"
    assert {path.name for path in tmp_path.iterdir()} == {"run", "figure.png"}


def test_a_name_is_drawn_as_it_is_and_not_as_a_formula(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(1)
    run.content["question"]["model"] = "a$b{$c"
    plot(run, tmp_path / "figure.svg")
    assert "a$b{$c" in (tmp_path / "figure.svg").read_text(encoding="utf-8")


def test_a_run_without_points_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no scored point"):
        plot(make_run(1, kinds=()), tmp_path / "figure.png")
    assert not (tmp_path / "figure.png").exists()


def test_the_budget_the_points_and_the_best_recall_so_far_are_where_they_belong(
    make_run: MakeRun, drawn: list[Figure], tmp_path: Path
) -> None:
    run = make_run(4)
    front = run.front()
    plot(run, tmp_path / "figure.png")
    trade_off, _ = panels(drawn[0])
    lines = {str(line.get_label()): line for line in trade_off.lines}
    assert list(lines["budget"].get_xdata()) == [run.budget_bytes / 2**20] * 2
    assert front.pick is not None
    assert list(lines[f"pick {front.pick.id}"].get_xydata()[0]) == [
        front.pick.stored_bytes / 2**20,
        front.pick.recall.mean * 100,
    ]
    shown = {
        (x, y) for container in trade_off.containers for x, y in container.lines[0].get_xydata()
    }
    assert shown == {(p.stored_bytes / 2**20, p.recall.mean * 100) for p in front.points}
    heights = list(lines["front"].get_ydata())
    assert heights == sorted(heights)
    assert heights[-1] == max(point.recall.mean * 100 for point in front.points)


def test_points_over_a_limit_of_text_kl_are_drawn_off_the_front(
    make_run: MakeRun, drawn: list[Figure], tmp_path: Path
) -> None:
    run = make_run(4)
    run.content["question"]["max_text_kl_nats"] = 0.1  # which no score says that it keeps
    plot(run, tmp_path / "figure.png")
    trade_off, _ = panels(drawn[0])
    lines = {str(line.get_label()): line for line in trade_off.lines}
    assert list(lines["front"].get_xdata()) == []
    assert sum(len(c.lines[0].get_xdata()) for c in trade_off.containers) == len(run.points())


def test_every_group_of_the_pick_shows_its_bits_in_its_block(
    make_run: MakeRun, drawn: list[Figure], tmp_path: Path
) -> None:
    run = make_run(5)
    pick = run.front().pick
    assert pick is not None
    plot(run, tmp_path / "figure.png")
    _, bits = panels(drawn[0])
    kinds = list(dict.fromkeys(group.kind for group in run.space.groups))
    expected = {
        (group.depth, kinds.index(group.kind)): pick.assignment[group.name][3]
        for group in run.space.groups
    }
    shown = {tuple(map(int, text.get_position())): text.get_text() for text in bits.texts}
    assert shown == expected
    assert [label.get_text().replace("\n", "") for label in bits.get_yticklabels()] == kinds


def overlapping(figure: Figure, texts: Sequence[Text]) -> list[tuple[str, str]]:
    """Pairs of texts whose boxes, as drawn, share more than a pixel."""
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    shown = [text for text in texts if text.get_visible() and text.get_text()]
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in shown]
    return [
        (a, b)
        for (a, one), (b, two) in combinations(boxes, 2)
        if min(one.x1, two.x1) - max(one.x0, two.x0) > 1
        and min(one.y1, two.y1) - max(one.y0, two.y0) > 1
    ]


@pytest.mark.parametrize("blocks", [1, 2, 30, 48, 80])
def test_no_text_of_the_bits_panel_overlaps_another(
    blocks: int, make_run: MakeRun, drawn: list[Figure], tmp_path: Path
) -> None:
    plot(make_run(blocks), tmp_path / "figure.png")
    trade_off, bits = panels(drawn[0])
    drawn[0].canvas.draw()
    texts = [
        *bits.texts, *bits.get_yticklabels(), *bits.get_xticklabels(), bits.title,
        bits.xaxis.label, trade_off.title,
    ]  # fmt: skip
    assert overlapping(drawn[0], texts) == []
    assert len(bits.texts) == 4 * blocks


@pytest.mark.parametrize("blocks", [1, 30])
def test_all_text_stays_inside_the_figure(
    blocks: int, make_run: MakeRun, drawn: list[Figure], tmp_path: Path
) -> None:
    plot(make_run(blocks), tmp_path / "figure.png")
    figure = drawn[0]
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    trade_off, bits = panels(figure)
    texts = [text for axes in (trade_off, bits) for text in (axes.title, axes.xaxis.label)]
    for text in (*texts, trade_off.yaxis.label, *bits.get_yticklabels()):
        box = text.get_window_extent(renderer)
        assert 0 <= box.x0 <= box.x1 <= figure.bbox.width, text.get_text()
        assert 0 <= box.y0 <= box.y1 <= figure.bbox.height, text.get_text()


def test_numbers_contrast_with_the_cells_they_stand_on(
    make_run: MakeRun, drawn: list[Figure], tmp_path: Path
) -> None:
    plot(make_run(4), tmp_path / "figure.png")
    _, bits = panels(drawn[0])
    image = bits.images[0]
    for text in bits.texts:
        column, row = map(int, text.get_position())
        cell = float(image.cmap(image.norm(image.get_array()[row, column]))[0])
        number = {"white": 1.0, "black": 0.0}[text.get_color()]
        assert abs(cell - number) > 0.4


def test_a_run_where_nothing_fits_the_budget_is_drawn_without_a_pick(
    make_run: MakeRun, drawn: list[Figure], tmp_path: Path
) -> None:
    run = make_run(3, budget_bytes=10)
    assert run.front().pick is None
    plot(run, tmp_path / "figure.png")
    trade_off, bits = panels(drawn[0])
    assert not any(str(line.get_label()).startswith("pick") for line in trade_off.lines)
    assert run.front().points[0].id in bits.get_title()


def test_a_model_without_blocks_is_drawn(
    make_run: MakeRun, drawn: list[Figure], tmp_path: Path
) -> None:
    groups = [{"layers": [["projection", 64, 64]], "options": FORMATS}]
    out = plot(make_run(groups=groups), tmp_path / "figure.png")
    assert out.stat().st_size > 8000
    assert len(panels(drawn[0])[1].texts) == 0


def test_an_unfinished_run_is_drawn_without_the_reference(
    make_run: MakeRun, drawn: list[Figure], tmp_path: Path
) -> None:
    run = make_run(2)
    del run.content["reference_validation"]
    plot(run, tmp_path / "figure.png")
    assert "chance" not in {str(line.get_label()) for line in panels(drawn[0])[0].lines}


# ------------------------------------------------------------------------------------ beside


def give_sensitivities(run: Run, **changes: Any) -> Sensitivity:
    """A table in the run's folder whose values rise with the group and fall with the bits."""
    numbers = {name: float(number + 1) for number, name in enumerate(run.space.options)}
    pairs = {
        (name, fmt.name): numbers[name] * 4.0**-fmt.bits
        for name, formats in run.space.options.items()
        for fmt in formats
    }
    of_groups: dict[str, Any] = dict.fromkeys(OF_GROUPS, numbers)
    of_pairs: dict[str, Any] = dict.fromkeys(OF_PAIRS, pairs)
    table = Sensitivity(**{**of_pairs, **of_groups, "provenance": {}, **changes})
    table.save(run.folder / "sensitivity.json")
    return table


@pytest.mark.parametrize("measure", MEASURES)
def test_any_measure_stands_below_the_bits_group_by_group(
    measure: str, make_run: MakeRun, drawn: list[Figure], tmp_path: Path
) -> None:
    run = make_run(6)
    table = give_sensitivities(run)
    plot(run, tmp_path / "figure.png", measure)
    _, bits, beside, bar = drawn[0].axes
    values = beside.images[0].get_array()
    kinds = [text.get_text().replace("\n", "") for text in beside.get_yticklabels()]
    assert kinds == [text.get_text().replace("\n", "") for text in bits.get_yticklabels()]
    for group in run.space.groups:
        expected = table.of_groups(measure)[group.name]
        assert values[kinds.index(group.kind), group.depth] == expected
    assert MEASURES[measure] in beside.get_title()
    assert ("int4-g64" in beside.get_title()) == (measure in OF_PAIRS)
    assert bits.get_xlim() == beside.get_xlim()
    shade = beside.images[0].cmap(beside.images[0].norm(values)).mean(-1)
    assert shade.max() == shade[0, 0]  # the first group, least of all, is the lightest
    assert bar.get_ylim()[1] == pytest.approx(max(table.of_groups(measure).values()))


def test_without_a_measure_there_are_two_panels(
    make_run: MakeRun, drawn: list[Figure], tmp_path: Path
) -> None:
    plot(make_run(3), tmp_path / "figure.png")
    assert len(drawn[0].axes) == 2


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0])
def test_equal_values_are_drawn(value: float, make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(3)
    give_sensitivities(run, drift=dict.fromkeys(run.space.options, value))
    assert plot(run, tmp_path / "figure.svg", "drift").stat().st_size > 8000


def test_a_measure_of_no_block_leaves_the_panel_empty(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(groups=[{"layers": [["projection", 64, 64]], "options": FORMATS}])
    give_sensitivities(run)
    assert plot(run, tmp_path / "figure.png", "fisher_nats").stat().st_size > 8000


def test_a_run_without_the_measure_names_what_it_holds(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(3)
    give_sensitivities(run, output_error={}, perturb_nats={}, drift={})
    with pytest.raises(RunError, match="no output_error, but fisher_nats, weight_error, outlier"):
        plot(run, tmp_path / "figure.png", "output_error")
    with pytest.raises(RunError, match=r"no perturb_nats.* --quantizer rounding --check -o FILE"):
        plot(run, tmp_path / "figure.png", "perturb_nats")
    with pytest.raises(UsageError, match="no measure 'outputerror'; did you mean 'output_error'"):
        plot(run, tmp_path / "figure.png", "outputerror")
    (run.folder / "sensitivity.json").unlink()
    with pytest.raises(RunError, match=r"json' cannot be used: No such file.*--resume"):
        plot(run, tmp_path / "figure.png", "fisher_nats")
    assert not (tmp_path / "figure.png").exists()


def test_a_measure_may_come_from_a_file_of_the_same_model(
    make_run: MakeRun, drawn: list[Figure], tmp_path: Path
) -> None:
    run, file = make_run(3), tmp_path / "file.json"
    numbers = {name: 7.0 + number for number, name in enumerate(run.space.options)}
    whole = give_sensitivities(run, drift=numbers, provenance={"fingerprint": "made up"})
    whole.save(file)
    give_sensitivities(run, drift={})
    with pytest.raises(RunError) as caught:
        plot(run, tmp_path / "figure.png", "drift")
    command = "mpsearch sensitivity 'made-up [model]' --quantizer rounding -o FILE.json"
    assert f"measure it with '{command}', then plot with --sensitivity" in str(caught.value)
    plot(run, tmp_path / "figure.png", "drift", file)
    assert drawn[0].axes[2].images[0].get_array().min() == 7.0
    replace(whole, provenance={"fingerprint": "other"}).save(file)
    with pytest.raises(RunError, match=r"file\.json' is of another model"):
        plot(run, tmp_path / "figure.png", "drift", file)
    with pytest.raises(RunError, match=r"none\.json' cannot be used: No such.*measure it with"):
        plot(run, tmp_path / "figure.png", "drift", tmp_path / "none.json")


def test_of_a_model_that_awq_prepared_no_way_is_named_that_does_not_work(
    make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run(3)
    run.content["question"]["awq"] = True
    give_sensitivities(run, drift={})
    with pytest.raises(RunError, match=r"no drift, but .*; it is measured of models without --awq"):
        plot(run, tmp_path / "figure.png", "drift")
