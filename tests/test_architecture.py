"""Architecture: who may import whom, what stays light, and what the package exports."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mpsearch

PACKAGE = Path(mpsearch.__file__).parent
REPOSITORY = Path(__file__).parents[1]
# A module imports only what stands above it; the table of CONTRIBUTING.md says the same.
WITHOUT_TORCH = (
    *("errors", "layers", "formats", "targets", "sizes"),
    *("hub", "config_fields", "family_rules", "family_parts", "families", "architecture"),
    *("devices", "budget", "assignment", "space", "space_json"),
    *("front", "estimates", "bootstrap", "significance", "scores", "allocate", "fit", "files"),
    "this_device",
    "facts",
    *("text", "fluency", "points"),
    *("measures", "predict", "moves", "stages", "compare", "displaced", "depth", "run"),
    *("outcome", "forecast", "promise", "manifest", "verify"),
)
WITH_TORCH = (
    *("device", "builtin", "shards", "model_files", "checkpoint", "places", "blocks", "refusals"),
    *("models", "skeleton"),
    *("flow", "states", "forward", "reuse"),
    *(
        "codecs",
        "walk",
        "runner",
        "backward",
        "contents",
        "footprint",
        "opening",
        "quantizers",
        "wanted",
        "tensor_files",
        "calibration",
        "text_walk",
        "in_order",
        "awq",
        "searched",
        "portions",
        "helpers",
        "bank",
        "divergence",
        "guard",
        "recall",
        "prompts",
        "lens",
        "evaluate",
        "geometry",
        "perturb",
        "sensitivity",
        "slopes",
        "trials",
        "samplers",
    ),
    *(
        "asked",
        "scorer",
        "wish",
        "journal",
        "study",
        "search",
        "refine",
        "plot",
        "export",
        "doctor",
        "console",
        "tables",
    ),
    *("served", "recall_tables", "recall_commands", "fit_tables", "fit_commands"),
    *("refine_commands", "export_commands", "commands", "cli"),
)
ORDER = (*WITHOUT_TORCH, *WITH_TORCH)
LIGHT = (
    *WITHOUT_TORCH,
    *(
        "plot",
        "console",
        "tables",
        "recall_tables",
        "recall_commands",
        "fit_tables",
        "fit_commands",
    ),
    *("refine_commands", "export_commands", "commands", "cli"),
)
HEAVY = {"torch", "transformers", "optuna"}
MOST_LINES = 435

SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def place(path: Path) -> str:
    """The word of ORDER that a file stands under: `quantizers` for `quantizers/gptq.py`."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def label(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def imported(node: ast.AST, path: Path) -> list[str]:
    """Full names of the modules that an import statement names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    assert node.level == 0, f"{label(path)}, line {node.lineno}: relative import"
    module = node.module or ""
    if module == "mpsearch":  # `from mpsearch import space` names a module, too
        return [f"mpsearch.{alias.name}" for alias in node.names if alias.name in ORDER]
    return [module]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and module of every import, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for name in imported(node, path):
            yield node.lineno, name  # type: ignore[attr-defined]


def imports_when_loaded(path: Path) -> set[str]:
    """Modules that loading the file imports: all but those in functions and for type checkers."""
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        found.update(imported(node, path))
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting.extend(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting.extend(ast.iter_child_nodes(node))
    return found


def test_every_module_has_its_place_in_the_order() -> None:
    assert {place(path) for path in SOURCES} == set(ORDER)
    assert len(set(ORDER)) == len(ORDER)


@pytest.mark.parametrize("path", SOURCES, ids=label)
def test_a_module_imports_only_what_stands_above_it(path: Path) -> None:
    assert place(path) in ORDER
    above = ORDER[: ORDER.index(place(path))]
    wrong = [
        f"{label(path)}, line {line}: {name}"
        for line, name in imports(path)
        if name.startswith("mpsearch.") and name.split(".")[1] not in (*above, place(path))
    ]
    assert wrong == []


def test_the_table_of_contributing_gives_the_same_order() -> None:
    rows = re.findall(
        r"^\| (`.+`|--- torch below ---) \|",
        (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    named = [re.findall(r"`(\w+)/?`", row) or [row] for row in rows]
    listed = [name for row in named for name in row]
    line = listed.index("--- torch below ---")
    assert set(listed[:line]) == set(WITHOUT_TORCH)
    assert set(listed[line + 1 :]) == set(WITH_TORCH)
    for path in SOURCES:
        above = {*listed[: listed.index(place(path)) + 1]}
        own = {name.split(".")[1] for _, name in imports(path) if name.startswith("mpsearch.")}
        assert own <= above, label(path)


def source_of(name: str) -> Path:
    path = PACKAGE / f"{name}.py"
    return path if path.exists() else PACKAGE / name / "__init__.py"


@pytest.mark.parametrize("name", LIGHT)
def test_a_light_module_loads_nothing_heavy_and_only_light_modules(name: str) -> None:
    found = imports_when_loaded(source_of(name))
    assert {module.split(".")[0] for module in found} & HEAVY == set()
    own = {module.split(".")[1] for module in found if module.startswith("mpsearch.")}
    assert own <= set(LIGHT)


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_a_module_above_the_line_never_imports_anything_heavy(name: str) -> None:
    heavy = {module for _, module in imports(source_of(name))}
    assert {module.split(".")[0] for module in heavy} & HEAVY == set()


def test_the_package_itself_imports_none_of_its_modules() -> None:
    found = imports_when_loaded(PACKAGE / "__init__.py")
    assert {name for name in found if name.startswith("mpsearch")} == set()


@pytest.mark.parametrize(
    "modules",
    [["mpsearch"], ["mpsearch.cli"], [f"mpsearch.{name}" for name in LIGHT]],
    ids=["mpsearch", "mpsearch.cli", "all light modules"],
)
def test_importing_it_leaves_torch_out(modules: list[str]) -> None:
    code = f"import {', '.join(modules)}, sys; print(*sorted({HEAVY} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
    )
    assert done.stdout.split() == []


@pytest.mark.parametrize("name", mpsearch.__all__)
def test_every_exported_name_resolves(name: str) -> None:
    assert getattr(mpsearch, name) is not None
    assert name in dir(mpsearch)


def test_the_exported_names_are_these() -> None:
    assert sorted(mpsearch.__all__) == [
        *("Assignment", "Bank", "Fact", "FactSet", "Format", "Layer", "LayerGroup"),
        *("LevelSwitchSampler", "Model", "MpsearchError", "ParetoFront", "RecallProxy", "Run"),
        *("SearchSpace", "Sensitivity", "__version__", "export", "load_model"),
        *("measure_sensitivity", "plot", "refine", "search", "verify"),
    ]


def test_type_checkers_are_told_the_same_names() -> None:
    told = {
        alias.name: str(node.module)
        for node in ast.walk(ast.parse((PACKAGE / "__init__.py").read_text()))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name  # an export to them, as PEP 484 has it
    }
    homes = {name: f"mpsearch.{home}" for name, home in mpsearch._HOME.items()}
    assert told == homes
    assert (PACKAGE / "py.typed").exists()


@pytest.mark.parametrize("name", ["search", "export", "plot", "refine", "verify"])
def test_a_function_stays_the_function_when_its_module_is_imported(name: str) -> None:
    module = importlib.import_module(f"mpsearch.{name}")
    assert callable(getattr(mpsearch, name))
    assert getattr(mpsearch, name) is getattr(module, name)
    sys.modules.pop(f"mpsearch.{name}")
    try:  # and when importing it sets it on the package
        importlib.import_module(f"mpsearch.{name}")
        assert callable(getattr(mpsearch, name))
    finally:
        sys.modules[f"mpsearch.{name}"] = module


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'mpsearch' has no attribute 'serach'"):
        mpsearch.serach  # noqa: B018


def repository_files(*suffixes: str) -> list[Path]:
    found: list[Path] = []
    for folder, folders, names in os.walk(REPOSITORY):
        folders[:] = [
            name
            for name in folders
            if name not in {".git", "runs", "exports", "build", "dist", "__pycache__"}
            and not (Path(folder) / name / "pyvenv.cfg").exists()
        ]
        found += [Path(folder) / name for name in names if name.endswith(suffixes)]
    return sorted(found)


def test_no_file_is_longer_than_one_can_keep_in_mind() -> None:
    lengths = {
        str(path.relative_to(REPOSITORY)): len(path.read_text(encoding="utf-8").splitlines())
        for path in repository_files(".py")
    }
    assert lengths
    most = {name: 700 if name.startswith("tests/") else MOST_LINES for name in lengths}
    assert {name: lines for name, lines in lengths.items() if lines > most[name]} == {}


def test_no_text_names_a_folder_of_the_machine_it_was_written_on() -> None:
    private = [f"/{folder}/" for folder in ("work", "root")]
    wrong = [
        f"{path.relative_to(REPOSITORY)}, line {number}"
        for path in repository_files(".py", ".md")
        for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if any(part in text for part in private)
    ]
    assert wrong == []
