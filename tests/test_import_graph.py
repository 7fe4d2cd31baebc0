"""No module imports itself by a detour, by imports of any kind; and no folder is too full to survey."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from paths import ROOT

PACKAGE = ROOT / "llm_trainer"
MOST_FILES = 15


def modules(package: Path) -> dict[str, Path]:
    """Dotted name → file of every module of a package."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(package: Path) -> dict[str, set[str]]:
    """Module → the modules of the package that it imports, in functions and under TYPE_CHECKING too."""
    known = modules(package)
    graph: dict[str, set[str]] = {}
    for name, path in known.items():
        targets: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                assert node.level == 0, f"{name} has a relative import"
                members = {f"{node.module}.{alias.name}" for alias in node.names}
                targets |= {member if member in known else node.module for member in members}
        graph[name] = {target for target in targets if target in known and target != name}
    return graph


def cycle_in(graph: Mapping[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        cycle: list[str] = error.args[1]
        return cycle
    return []


def test_no_module_is_in_an_import_cycle() -> None:
    assert cycle_in(imports(PACKAGE)) == []


@pytest.mark.parametrize(
    "hidden",
    [
        "def f():\n    import package.a\n",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from package import a\n",
    ],
)
def test_a_cycle_is_found_though_an_import_is_hidden(tmp_path: Path, hidden: str) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("", encoding="utf-8")
    (package / "a.py").write_text("from package import b\n", encoding="utf-8")
    (package / "b.py").write_text(hidden, encoding="utf-8")
    assert set(cycle_in(imports(package))) == {"package.a", "package.b"}


def test_no_folder_holds_too_many_files() -> None:
    folders = {path.parent for path in modules(PACKAGE).values()}
    full = {
        str(folder): count for folder in folders if (count := len(list(folder.glob("*.py")))) > MOST_FILES
    }
    assert full == {}
