"""Checks of what changed since a commit: style, types and floors of the changed files, and the tests of them.

`bash .ci/run --changed [REF]` runs it. REF is the commit to compare with, the merge base with main if left out; what is
not committed counts too. `--list` shows the tests and runs nothing.

A test file is run for a changed file if it has its name (`tests/server/test_rounds.py` for `server/rounds.py`), imports
it, quotes its name, or is itself changed. Where there is none, the test files of its folder are run.
"""

import argparse
import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[1]
SOURCE = ("tests/test_source.py", "tests/test_house.py", "tests/test_exported_members.py")
PACKAGING = ("tests/test_release.py", "tests/test_wheel.py", "tests/test_extensions.py")
DOCUMENTS = ("tests/test_docs.py",)
MUTATIONS = "tests/test_mutations.py"


def changed_files(root: Path, ref: str | None) -> set[str]:
    """Return the paths that differ from `ref`, also those that are not committed, not tracked or deleted.

    Raises:
        SystemExit: If there is no such commit.
    """
    base = (
        _git(root, "rev-parse", "--verify", f"{ref}^{{commit}}")
        if ref
        else _git(root, "merge-base", "main", "HEAD")
    )
    differing = _git(root, "diff", "--name-only", "--no-renames", base.strip())
    return {*differing.splitlines(), *_git(root, "ls-files", "--others", "--exclude-standard").splitlines()}


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(
            f"error: git {' '.join(arguments)}: {done.stderr.strip()}; name a commit: --changed REF"
        )
    return done.stdout


def tests_of(root: Path, changed: set[str]) -> list[str]:
    """Return pytest's arguments for the tests of changed files: test files, and single tests of the mutations."""
    texts = {path.relative_to(root).as_posix(): path.read_text() for path in root.glob("tests/**/test_*.py")}
    imports = {name: set(_imported(text)) for name, text in texts.items()}
    selected = changed & texts.keys()
    for name in changed - texts.keys():
        selected.update(_tests_of_file(PurePosixPath(name), texts, imports))
    package = any(name.endswith(".py") and not name.startswith((".", "tests/", "docs/")) for name in changed)
    if package:
        selected.update(SOURCE)
    if package or any(name.startswith("tests/mutations/") for name in changed):
        selected.update(_plain_mutation_tests(texts.get(MUTATIONS, "")))
    files = {name for name in selected if name in texts}
    return sorted(files | {name for name in selected if "::" in name and MUTATIONS not in files})


def _tests_of_file(file: PurePosixPath, texts: dict[str, str], imports: dict[str, set[str]]) -> Iterator[str]:
    """Yield the test files of one changed file that is no test."""
    room = file.parts[0]
    named = f"tests/{file.with_name(f'test_{file.stem}.py')}"
    module = ".".join(file.with_suffix("").parts).removesuffix(".__init__")
    found = {name for name in texts if name == named or (file.suffix == ".py" and module in imports[name])}
    if file.suffix and (file.suffix != ".py" or room in ("tests", "examples", ".ci")):
        found |= {name for name, text in texts.items() if f'"{file.name}"' in text}
    for start in (*(f"tests/{folder}/test_" for folder in file.parents), f"tests/test_{room}"):
        found = found or {name for name in texts if name.startswith(start)}
    found |= {name for name, text in texts.items() if f'"{file}"' in text}
    if file.suffix == ".md":
        found.update(DOCUMENTS)
    elif len(file.parts) == 1 or room in (".ci", "containers"):
        found.update(PACKAGING)
    yield from found


def _imported(text: str) -> Iterator[str]:
    """Yield the modules that a test imports, by their paths with dots; also where a name may be a module."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{each.name}" for each in node.names)]
        else:
            continue
        yield from (name.removeprefix("fedveil.") for name in names if name.startswith("fedveil."))
        yield from (f"tests.{name}" for name in names if name.startswith("shared."))


def _plain_mutation_tests(text: str) -> Iterator[str]:
    """Yield the tests of the mutations that break nothing: they hold the faults against the source."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and not node.args.args:
            yield f"{MUTATIONS}::{node.name}"


def main() -> int:
    """Print the tests of what changed, run the checks, and return 1 if one fails."""
    parser = argparse.ArgumentParser(prog=".ci/run --changed", description="Run the checks of what changed.")
    parser.add_argument("ref", nargs="?", help="commit to compare with; the merge base with main if left out")
    parser.add_argument("--list", action="store_true", help="show the tests and run nothing")
    options = parser.parse_args()
    changed = changed_files(ROOT, options.ref)
    tests = tests_of(ROOT, changed)
    print(
        f"{len(changed)} changed files, {len(tests)} tests or files of tests:", *tests, sep="\n  ", flush=True
    )
    if options.list:
        return 0
    python = sorted(name for name in changed if name.endswith(".py") and (ROOT / name).is_file())
    typed = [name for name in python if not name.startswith((".", "tests/", "docs/", "examples/"))]
    commands = [
        *(
            [
                ["ruff", "check", "--force-exclude", *python],
                ["ruff", "format", "--check", "--force-exclude", *python],
            ]
            * bool(python)
        ),
        *([["lint-imports"], ["pyright", *typed]] * bool(typed)),
        *([[sys.executable, "-m", "pytest", *_processes(), *tests]] * bool(tests)),
    ]
    codes = [subprocess.run(command, cwd=ROOT, check=False).returncode for command in commands]
    return int(any(codes))


def _processes() -> list[str]:
    """Return the arguments of `.ci/run` for as many processes as it starts."""
    return ["--numprocesses", os.environ.get("FEDVEIL_TEST_PROCESSES", "3"), "--dist", "loadfile"]


if __name__ == "__main__":
    raise SystemExit(main())
