"""Source of the package: one name for one class, no circle of imports, docstrings and titles of tests that are plain."""

import ast
import re
from collections import Counter
from collections.abc import Iterable
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHIPPED = (
    "base",
    "privacy",
    "messages",
    "configs",
    "tables",
    "tasks",
    "text",
    "strategies",
    "links",
    "client",
    "server",
    "modes",
    "questions",
    "adapters",
    "engines",
    "export",
    "populations",
    "run",
    "audit",
    "evidence",
    "simulations",
    "deployment",
    "cli",
)
TREES = {
    path.relative_to(ROOT).with_suffix("").parts: ast.parse(path.read_text())
    for path in [
        *(ROOT / name for name in ("__init__.py", "face.py")),
        *(
            file
            for room in SHIPPED
            for file in ROOT.joinpath(room).rglob("*.py")
            if "templates" not in file.parts
        ),
    ]
}
# A module's first line names a thing: it asks no question and has no article.
RIDDLE = re.compile(r"(What|How|Who|Whom|Whose|Whether|Which|Why|Where|When|The|An?)\b")
TOLD = re.compile(r"^Args:$|[Aa]rguments as of `", re.MULTILINE)
DOCUMENTED = (
    0.7  # share of public functions of three or more parameters with a list of them; a sentence names two
)
MOST_LINES, MOST_PARAMETERS = 60, 7  # of a function, without its docstring
# What users call by keyword: the Python face, and the keys of a task. The options of a verb are its parameters.
BY_KEYWORD = {
    ("face", "simulate"),
    ("face", "ask"),
    ("adapters/protect", "protect"),
    ("adapters/nvflare/protect_recipe", "protect_recipe"),
    ("tasks/shipped/census", "load"),
}
TYPES = {
    (("configs", f"{each}_settings"), ("configs", "schema")) for each in ("privacy", "training", "tuning")
}
# Ceilings, which fall.
LONGEST_TITLE = 60
# Participles and questions that say less than a noun would; held_out and held_back are words of the field.
NO_TITLE = re.compile(
    r"(^|_)(told|asked|found|given|said|beside|known|held(?!_out|_back)|kept|made|shown|seen|taken|wanted|begun)(_|$)"
    r"|^(what|who|whom|whose|whatever|whoever|where|how|why|when|which)_"
)
TWICE = 3  # runs of RUN lines of code that stand in two places to the letter
RUN = 6


def test_no_public_class_name_stands_twice() -> None:
    names = Counter(
        node.name
        for tree in TREES.values()
        for node in tree.body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, times in names.items() if times > 1] == []


def test_no_module_imports_one_that_imports_it() -> None:
    """But a group of the configuration may name the type of the whole, which its rules are about."""
    modules = {parts[:-1] if parts[-1] == "__init__" else parts for parts in TREES}
    graph = {
        parts: {
            found
            for found in _imported(parts, tree, modules)
            if found != parts and (parts, found) not in TYPES
        }
        for parts, tree in TREES.items()
    }
    TopologicalSorter(graph).prepare()  # raises CycleError, with the circle


def test_modules_import_each_other_relatively() -> None:
    """A rule of ruff's would do, but for a checkout that is called fedveil, where it takes relative imports for it."""
    absolute = {
        "/".join(parts)
        for parts, tree in TREES.items()
        for node in ast.walk(tree)
        for name in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom) and not node.level
            else [each.name for each in node.names]
            if isinstance(node, ast.Import)
            else []
        )
        if name.split(".")[0] == "fedveil"
    }
    assert absolute == set()


def _imported(
    parts: tuple[str, ...], tree: ast.Module, modules: set[tuple[str, ...]]
) -> Iterable[tuple[str, ...]]:
    """Yield the modules that one imports, wherever in it the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (*parts[: len(parts) - node.level], *(node.module.split(".") if node.module else ()))
            for alias in node.names:
                yield (*base, alias.name) if (*base, alias.name) in modules else base


def test_modules_begin_with_a_noun() -> None:
    first = {"/".join(parts): (ast.get_docstring(tree) or "").split("\n")[0] for parts, tree in TREES.items()}
    assert {name: line for name, line in first.items() if RIDDLE.match(line)} == {}


def test_functions_have_few_parameters_and_lines() -> None:
    many, long = set[tuple[str, str]](), set[tuple[str, str]]()
    for parts, tree in TREES.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            name = "/".join(parts), node.name
            taken = {each.arg for each in ast.walk(node.args) if isinstance(each, ast.arg)} - {"self", "cls"}
            if len(taken) > MOST_PARAMETERS and not _is_verb(node):
                many.add(name)
            first = node.body[1 if ast.get_docstring(node) is not None and len(node.body) > 1 else 0]
            if (node.end_lineno or 0) - first.lineno >= MOST_LINES:
                long.add(name)
    assert many == BY_KEYWORD
    assert long == set()


def _is_verb(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Return whether a function is a verb, whose parameters are options, each with its help."""
    return any(ast.unparse(each).startswith("verb(") for each in node.decorator_list)


def test_few_runs_of_lines_stand_twice() -> None:
    lines = {parts: ROOT.joinpath(*parts).with_suffix(".py").read_text().splitlines() for parts in TREES}
    places = Counter(run for each in lines.values() for run in _runs(each))
    twice = [run[0] for run, times in places.items() if times > 1]
    assert len(twice) <= TWICE, twice


def _runs(lines: list[str]) -> set[tuple[str, ...]]:
    """Return the runs of RUN lines of code: without imports, comments, and lines that only close something."""
    told, importing = list[str](), False
    for line in map(str.strip, lines):
        if importing or line.startswith(("import ", "from ")):
            importing = line.endswith("(") or (importing and not line.startswith(")"))
        elif len(line) > 2 and not line.startswith("#"):
            told.append(line)
    return {tuple(told[place : place + RUN]) for place in range(len(told) - RUN + 1)}


def test_functions_document_their_arguments() -> None:
    wanted = [
        function
        for tree in TREES.values()
        for body in [tree.body, *(node.body for node in tree.body if isinstance(node, ast.ClassDef))]
        for function in body
        if isinstance(function, ast.FunctionDef)
        and not function.name.startswith("_")
        and not _is_verb(function)
        if len({each.arg for each in ast.walk(function.args) if isinstance(each, ast.arg)} - {"self", "cls"})
        > 2
    ]
    told = [function for function in wanted if TOLD.search(ast.get_docstring(function) or "")]
    assert len(told) >= DOCUMENTED * len(wanted), f"{len(told)} of {len(wanted)}"


def test_titles_of_tests_are_short_plain_statements() -> None:
    titles = [
        (path.relative_to(ROOT).as_posix(), node.name.removeprefix("test_"))
        for path in ROOT.glob("tests/**/test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    assert [each for each in titles if len(each[1]) > LONGEST_TITLE or NO_TITLE.search(each[1])] == []
