"""The package's modules: no two import each other, and no public class has the name of another."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import fedveil

ROOT = Path(fedveil.__file__).parent
SHIPPED = (
    "cli",
    "deployment",
    "simulations",
    "server",
    "client",
    "links",
    "tasks",
    "strategies",
    "configs",
    "privacy",
)
# Imports in functions that close a circle, which are to go.
KNOWN_CIRCLES = {
    ("configs.settings", "configs.compose"),
}
KNOWN_TWICE = {"Range"}


def modules() -> dict[str, Path]:
    """Return the shipped modules by their names below `fedveil`."""
    paths = [
        path for room in SHIPPED for path in (ROOT / room).rglob("*.py") if "templates" not in path.parts
    ]
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in paths
    }


def imported(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Yield the modules that this one imports, in functions and for types, too."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) + 1 - node.level], *([node.module] if node.module else [])]
            for alias in node.names:
                yield from (each for each in (".".join([*base, alias.name]), ".".join(base)) if each in known)


def test_no_module_imports_one_that_imports_it() -> None:
    known = modules()
    graph = {name: set(imported(name, path, known)) - {name} for name, path in known.items()}
    for name, other in KNOWN_CIRCLES:
        graph[name].discard(other)
    packages = {name for name, path in known.items() if path.name == "__init__.py"}
    for name in packages:  # what a package re-exports, its modules may use
        graph[name] = set()
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as circle:
        raise AssertionError(f"modules import each other: {' <- '.join(circle.args[1])}") from None


def test_no_two_public_classes_have_one_name() -> None:
    found: dict[str, list[str]] = defaultdict(list)
    for name, path in modules().items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found[node.name].append(name)
    assert not {name: homes for name, homes in found.items() if len(homes) > 1 and name not in KNOWN_TWICE}
