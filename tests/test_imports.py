"""Who may import whom: the list in the design, read from the source of every module."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("sim", "calibrate", "traces", "experiments", "phasewise")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

ORDER = (
    "sim.types", "sim.outside", "sim.cluster", "sim.model", "sim.cost", "sim.policy", "sim.memory", "sim.record",
    "sim.engine", "sim.usage", "sim.metrics", "sim.goodput",
    "sim.batchers", "sim.routers", "sim.transfers", "sim.reschedulers", "sim.predictors",
    "sim.planners", "sim.systems",
)  # fmt: skip
"""Parts of ``sim``; a part imports from those before it and from itself."""
POLICIES = {
    "sim.batchers", "sim.routers", "sim.transfers", "sim.reschedulers", "sim.predictors", "sim.planners", "sim.systems",
}  # fmt: skip
FREE = {"sim.batchers": {"sim.predictors"}}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def imported(path: Path) -> tuple[tuple[str, bool], ...]:
    """(full name of what is imported, whether at import time) for every import, wherever it stands."""
    return tuple(_imports(path, tree_of(path), early=True))


def _imports(path: Path, parent: ast.AST, early: bool) -> Iterator[tuple[str, bool]]:
    for node in ast.iter_child_nodes(parent):
        late = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or _type_checking(node)
        yield from _imports(path, node, early and not late)
        if isinstance(node, ast.Import):
            yield from ((alias.name, early) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name_of(path).split(".")
                package = package if path.name == "__init__.py" else package[:-1]
                base = ".".join(package[: len(package) - node.level + 1] + ([base] if base else []))
            yield base, early
            yield from ((f"{base}.{alias.name}", early) for alias in node.names)


def _type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def inside(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def part(module: str) -> str | None:
    """The part of ``sim`` a module belongs to; None for others, and for ``sim`` itself."""
    return next((name for name in ORDER if inside(module, name)), None)


def importers_of(package: str, *, at_import_time: bool = False) -> set[str]:
    return {
        name_of(path)
        for path in MODULES
        for module, early in imported(path)
        if inside(module, package) and (early or not at_import_time)
    }


def test_every_module_is_looked_at() -> None:
    assert {"sim.engine.run", "sim.systems.schedulers.vllm", "traces.reader", "experiments.cli"} <= {
        name_of(p) for p in MODULES
    }
    assert {str(part(name_of(p))) for p in MODULES if inside(name_of(p), "sim")} == {*ORDER, "None"}


KNOT = frozenset(
    f"sim.engine.{name}" for name in ("change.changes", "change.keeping", "change.loading", "moves", "paths", "run")
)
"""The one circle that is allowed: the engine's parts that hold the whole ``Engine``."""


def uses() -> dict[str, set[str]]:
    """Module -> the modules that it names in an import, type-checking imports included.

    ``from package import module`` names the module; ``from package import word`` names the package.
    """
    names = {name_of(path) for path in MODULES}
    found: dict[str, set[str]] = {}
    for path in MODULES:
        own = name_of(path)
        everything = {module for module, _ in imported(path)}
        packages = {name.rpartition(".")[0] for name in everything & names if name.rpartition(".")[0] in everything}
        words = {name.rpartition(".")[0] for name in everything - names}
        found[own] = ((everything & names) - (packages - words)) - {own}
    return found


def circles(graph: dict[str, set[str]]) -> list[frozenset[str]]:
    """Groups of modules that reach each other."""
    matrix = csr_array([[target in graph[source] for target in graph] for source in graph])
    _, labels = connected_components(matrix, connection="strong")
    groups: dict[int, set[str]] = {}
    for name, label in zip(graph, labels, strict=True):
        groups.setdefault(int(label), set()).add(name)
    return [frozenset(group) for group in groups.values() if len(group) > 1]


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [frozenset("abc")]
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []


def test_no_new_circle_of_modules() -> None:
    assert [sorted(circle) for circle in circles(uses()) if circle != KNOT] == []


EVIDENCE = ("experiments.studies", "experiments.fidelity", "experiments.benchmarks")


@pytest.mark.parametrize("room", EVIDENCE)
def test_nothing_outside_imports_what_is_evidence(room: str) -> None:
    assert {name for name in importers_of(room) if not inside(name, room)} == set()


def test_only_the_clock_imports_simpy() -> None:
    assert importers_of("simpy") == {"sim.engine.clock"}


def test_policies_never_import_the_engine() -> None:
    assert {part(name) for name in importers_of("sim.engine")} & POLICIES == set()


@pytest.mark.parametrize("path", [p for p in MODULES if part(name_of(p))], ids=name_of)
def test_imports_point_upward(path: Path) -> None:
    own = part(name_of(path))
    assert own is not None
    for module, _ in imported(path):
        other = part(module)
        if other is not None and other not in FREE.get(own, ()):
            assert ORDER.index(other) <= ORDER.index(own), f"{name_of(path)} imports {module}"


@pytest.mark.parametrize(
    ("package", "never"),
    [
        ("sim", ("calibrate", "traces", "experiments", "phasewise", "notebooks", "tests")),
        ("calibrate", ("traces", "experiments", "phasewise", "notebooks", "tests")),
        ("traces", ("experiments", "phasewise", "notebooks", "tests")),
        ("experiments", ("phasewise", "notebooks", "tests")),
        ("phasewise", ("notebooks", "tests")),
    ],
)
def test_packages_know_only_those_before_them(package: str, never: tuple[str, ...]) -> None:
    for path in MODULES:
        if inside(name_of(path), package):
            wrong = [module for module, _ in imported(path) if module.split(".")[0] in never]
            assert not wrong, name_of(path)


@pytest.mark.parametrize(("library", "home"), [("torch", {"calibrate"}), ("matplotlib", {"experiments"})])
def test_heavy_libraries_stay_at_home(library: str, home: set[str]) -> None:
    assert {name.split(".")[0] for name in importers_of(library)} <= home


@pytest.mark.parametrize("library", ["pickle", "shelve", "marshal", "dill"])
def test_nothing_unpickles(library: str) -> None:
    assert importers_of(library) == set()


def test_nothing_evaluates_text() -> None:
    for path in MODULES:
        calls = [node.func for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)]
        names = {call.id for call in calls if isinstance(call, ast.Name)}
        assert not names & {"eval", "exec"}, name_of(path)


def test_there_are_no_star_imports() -> None:
    assert [name_of(path) for path in MODULES for module, _ in imported(path) if module.endswith(".*")] == []


@pytest.mark.parametrize("library", ["pandas", "scipy", "pydantic", "pyarrow"])
def test_the_simulator_loads_no_big_library_unasked(library: str) -> None:
    assert {name for name in importers_of(library, at_import_time=True) if inside(name, "sim")} == set()


def test_import_sim_is_light() -> None:
    heavy = ["torch", "matplotlib", "pandas", "scipy", "pydantic", "pyarrow"]
    code = f"import sim, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
