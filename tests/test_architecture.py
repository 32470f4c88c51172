"""The imports of the package run one way, as ARCHITECTURE.md says, and only its edges print."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "tp_planner"
MODULES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))

# What each part of the package may import: parts of the package, then other packages.
MAY_IMPORT: dict[str, tuple[set[str], set[str]]] = {
    "ir": ({"ir"}, {"networkx"}),
    "passes": ({"ir", "passes"}, {"networkx"}),
    "report": ({"ir", "passes", "report"}, {"rich"}),
    "frontend": ({"ir", "frontend", "patches"}, {"keras", "torch"}),
    "job": ({"ir", "job"}, {"keras", "numpy", "torch"}),
    "regions": ({"frontend", "ir", "job", "patches", "regions"}, {"keras", "torch"}),
    "storage": ({"frontend", "ir", "job", "patches", "regions", "storage"}, {"keras", "numpy", "torch"}),
    "layers": ({"frontend", "ir", "job", "layers", "regions", "storage"}, {"keras", "numpy", "torch"}),
    "replay": ({"frontend", "ir", "patches", "regions", "replay", "storage"}, {"keras", "numpy", "torch"}),
    "training": (
        {"files", "frontend", "ir", "job", "layers", "patches", "regions", "replay", "storage", "training"},
        {"keras", "torch"},
    ),
    "dryrun": (
        {"frontend", "ir", "dryrun", "job", "layers", "passes", "patches", "regions", "storage", "training"},
        {"keras", "torch"},
    ),
    "checkpoints": (
        {"checkpoints", "files", "frontend", "ir", "job", "layers", "patches", "storage", "training"},
        {"h5py", "keras", "numpy", "torch"},
    ),
    "readable_plan": ({"ir", "report"}, set()),
    "planner": ({"dryrun", "frontend", "ir", "job", "layers", "passes", "progress", "readable_plan"}, {"keras"}),
    "explain": ({"ir", "passes", "frontend", "planner"}, {"keras"}),
    "linter": ({"ir", "passes", "frontend", "planner"}, {"keras"}),
    "sweep": ({"ir", "passes", "frontend", "planner"}, {"keras"}),
    "search": (
        {"dryrun", "frontend", "ir", "job", "passes", "planner", "progress", "readable_plan", "search"},
        {"keras", "networkx", "numpy", "scipy"},
    ),
    "agreement": ({"frontend", "ir", "job", "readable_plan"}, {"keras"}),
    "api": (
        {
            "agreement",
            "checkpoints",
            "frontend",
            "ir",
            "job",
            "layers",
            "planner",
            "readable_plan",
            "search",
            "storage",
            "training",
        },
        {"keras", "torch"},
    ),
    "verification": (
        {"api", "frontend", "ir", "job", "planner", "readable_plan", "report", "storage", "training", "verification"},
        {"keras", "numpy", "torch"},
    ),
    "keras_distribution": (
        {
            "api",
            "checkpoints",
            "frontend",
            "ir",
            "job",
            "keras_distribution",
            "patches",
            "regions",
            "storage",
            "training",
        },
        {"keras", "numpy", "torch"},
    ),
    "files": (set(), set()),
    "patches": (set(), set()),
    "progress": (set(), set()),
    "__init__": (
        {"api", "checkpoints", "ir", "keras_distribution", "linter", "readable_plan", "search", "training"}
        | {"verification"},
        set(),
    ),
    "cli": (
        {
            "__init__",
            "checkpoints",
            "cli",
            "explain",
            "files",
            "frontend",
            "ir",
            "linter",
            "passes",
            "planner",
            "progress",
        }
        | {"readable_plan", "report", "search", "sweep", "verification"},
        {"keras", "rich", "torch", "typer"},
    ),
    "gpt": (set(), {"keras"}),
    "demo": ({"__init__", "gpt"}, {"keras", "numpy", "torch"}),
    "selftest": ({"__init__", "gpt", "job", "keras_distribution", "storage"}, {"keras", "numpy", "torch"}),
}
REFUSED = {"unittest"}  # what is patched is patched by patches.py
PRINTERS = {"cli/answer.py", "cli/app.py", "cli/plan.py", "demo.py", "training/stored.py", "selftest.py"}


def part(module: str) -> str:
    """Return the folder that a file of the package lies in, or the name of a file that lies in none."""
    return module.partition("/")[0].removesuffix(".py")


def tree(module: str) -> ast.Module:
    return ast.parse((ROOT / module).read_text(encoding="utf-8"))


def imports(code: ast.Module) -> Iterator[str]:
    """Yield the dotted name of every import, wherever it stands; a dot for a relative one."""
    for node in ast.walk(code):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def imported_part(name: str) -> str:
    """Return the part of the package that ``tp_planner...`` names."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def refusals(module: str, code: ast.Module) -> list[str]:
    """Return the imports of a module that its part of the package may not have."""
    parts, packages = MAY_IMPORT[part(module)]
    refused = []
    for name in imports(code):
        top = name.partition(".")[0]
        if top == "tp_planner":
            allowed = imported_part(name) in parts
        else:
            allowed = top in packages or (top in sys.stdlib_module_names and top not in REFUSED)
        if not allowed:
            refused.append(name)
    return refused


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module: str) -> None:
    """A module imports what its part of the package may import, and nothing else."""
    assert refusals(module, tree(module)) == []


WRONG = {
    "ir/mesh.py": "import torch.distributed",
    "ir/plan.py": "def f():\n    from tp_planner.report.text import plan_to_text",
    "passes/choose_styles.py": "from tp_planner.layers.apply import apply_layers",
    "report/text.py": "def f():\n    import keras",
    "frontend/trace.py": "from tp_planner import plan",
    "layers/apply.py": "from . import styles",
    "replay/tape.py": "from unittest import mock",
}


@pytest.mark.parametrize(("module", "source"), WRONG.items(), ids=WRONG)
def test_wrong_imports_are_seen(module: str, source: str) -> None:
    """The check itself notices other packages, other parts, imports inside functions, and relative ones."""
    assert len(refusals(module, ast.parse(source))) == 1


def test_parts_are_in_one_order() -> None:
    """The table above has no cycle: every part comes after all it imports in some order."""
    remaining = {name: parts - {name} for name, (parts, _) in MAY_IMPORT.items()}
    while remaining:
        ready = [name for name, parts in remaining.items() if not parts & set(remaining)]
        assert ready, f"these import each other: {sorted(remaining)}"
        for name in ready:
            del remaining[name]


@pytest.mark.parametrize("module", sorted(set(MODULES) - PRINTERS))
def test_only_edges_print(module: str) -> None:
    """Printing is for the command line, the demonstration, the self-test, and the verification that users ask for."""
    nodes = list(ast.walk(tree(module)))
    calls = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    attributes = {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}
    assert "print" not in calls
    assert not attributes & {"sys.stdout", "sys.stderr"}


@pytest.mark.parametrize("module", MODULES)
def test_modules_say_what_they_know(module: str) -> None:
    """Every module that has code begins with a docstring."""
    body = tree(module)
    assert not body.body or ast.get_docstring(body)
