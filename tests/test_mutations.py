"""Faults of `tests/mutations/` put into a copy of the package: the suite must go red for every one of them."""

import ast
import compileall
import json
import os
import re
import runpy
import shutil
import sys
from collections import Counter
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = (
    "base",
    "privacy",
    "messages",
    "configs",
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
    "personal",
    "tables",
    "populations",
    "run",
    "audit",
    "evidence",
    "simulations",
    "deployment",
    "cli",
)


EVIDENCE = (ROOT / "docs" / "evidence" / "audits.md").read_text()
OPERATORS = runpy.run_path(str(ROOT / "tests" / "mutations" / "operators.py"))
Mutation: Any = OPERATORS["Mutation"]
MUTATIONS: dict[str, Any] = OPERATORS["read_mutations"](ROOT / "tests" / "mutations")
# The suite runs the first of each folder; the campaign runs all, in about five minutes.
IN_THE_SUITE = {str(Path(each.file).parent): name for name, each in reversed(MUTATIONS.items())}.values()


@dataclass(frozen=True)
class Tried:
    """A copy of the package, and the process whose forks run its tests."""

    copy: Path
    forks: Popen[str]

    def run(self, files: Iterable[str], select: str) -> tuple[int, str]:
        """Return pytest's exit code and what it printed."""
        output = self.copy.parent / "output"
        # A traceback would be made of the sources, which takes as long as many of the tests.
        arguments = ["-q", "-x", "-p", "no:cacheprovider", "--assert=plain", "--tb=line", "-k", select]
        asked = [str(self.copy), str(output), [*arguments, *(f"tests/{file}" for file in files)]]
        assert self.forks.stdin is not None and self.forks.stdout is not None
        print(json.dumps(asked), file=self.forks.stdin, flush=True)
        return int(self.forks.stdout.readline()), output.read_text()


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> Generator[Tried]:
    """A copy of the package that shadows the installed one."""
    copy = tmp_path_factory.mktemp("mutations") / "fedveil"
    for room in (*ROOMS, "benchmarks", "tests"):
        shutil.copytree(ROOT / room, copy / room)
    for path in (*ROOT.glob("*.py"), ROOT / "pyproject.toml", ROOT / "py.typed"):
        shutil.copy2(path, copy / path.name)
    # Once, and not in every fork; a kept bundle lists all of its files.
    compileall.compile_dir(copy / "tests", quiet=1, rx=re.compile("fixtures"))
    # Other people's plug-ins would be rewritten in every fork, which takes longer than most of the tests.
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-B", ROOT / "tests" / "faults" / "pytest_forks.py"]
    with Popen(command, stdin=PIPE, stdout=PIPE, env=environment, text=True) as forks:
        yield Tried(copy, forks)


def test_an_audit_sees_each_or_the_evidence_says_why_not() -> None:
    tried = runpy.run_path(str(ROOT / "tests" / "oracles" / "audit_mutations.py"))
    assert sorted([*tried["RUNS"], *tried["BEYOND"]]) == sorted(MUTATIONS)
    assert all(len(why.split()) > 3 for why in tried["BEYOND"].values())
    for name in tried["RUNS"]:
        (row,) = re.findall(rf"^\| {re.escape(name)} \| (.+) \|$", EVIDENCE, re.MULTILINE)
        why = tried["UNSEEN"].get(name)
        assert why in row if why else re.fullmatch(r"5 \| .*red .*", row), name


def test_the_evidence_counts_no_more_than_there_are() -> None:
    rooms = Counter(Path(each.file).parts[0] for each in MUTATIONS.values()) | {"all": len(MUTATIONS)}
    counted = {
        room: int(least) for room, least in re.findall(r"^\| (\w+) \| (\d+) \|$", EVIDENCE, re.MULTILINE)
    }
    del counted["others"]
    assert len(counted) > 5
    assert {room: least for room, least in counted.items() if least > rooms[room]} == {}


def test_each_has_one_place_in_its_file() -> None:
    for mutation in MUTATIONS.values():
        source = (ROOT / mutation.file).read_text()
        applied = mutation.applied(source)
        assert ast.dump(ast.parse(applied)) != ast.dump(ast.parse(source)), mutation.name
        assert applied.count("\n") == source.count("\n"), mutation.name


def test_each_names_attributes_that_there_are() -> None:
    """With one that is nowhere every test would fail, whatever it tests."""
    words = {
        word
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
        for word in re.findall(r"\w+", path.read_text())
    }
    attributes = {name: set(re.findall(r"\.([a-z_]\w*)", each.fault)) for name, each in MUTATIONS.items()}
    assert {name: unknown for name, used in attributes.items() if (unknown := used - words)} == {}


def test_each_names_tests_that_there_are() -> None:
    files = {each.tests: (ROOT / "tests" / each.tests).read_text() for each in MUTATIONS.values()}
    words = {
        name: set(re.findall(r"\w+", each.select)) - {"and", "or", "not"} for name, each in MUTATIONS.items()
    }
    lost = {
        name: [word for word in words[name] if word not in files[MUTATIONS[name].tests]] for name in MUTATIONS
    }
    assert {name: found for name, found in lost.items() if found} == {}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, id=f"{each.file} {name}", marks=() if name in IN_THE_SUITE else pytest.mark.campaign
        )
        for name, each in MUTATIONS.items()
    ],
)
def test_the_suite_goes_red(name: str, tried: Tried) -> None:
    mutation = MUTATIONS[name]
    file = tried.copy / mutation.file
    file.write_text(mutation.applied(file.read_text()))
    code, output = tried.run([mutation.tests], mutation.select)
    shutil.copy2(ROOT / mutation.file, file)
    assert code == 1, output[-2000:]
    assert " failed" in output


@pytest.mark.campaign
def test_in_the_copy_without_a_fault_the_same_tests_are_green(tried: Tried) -> None:
    files = sorted({mutation.tests for mutation in MUTATIONS.values()})
    each = sorted({f"({Path(each.tests).name} and ({each.select}))" for each in MUTATIONS.values()})
    code, output = tried.run(files, " or ".join(each))
    assert code == 0, output[-2000:]


def test_in_the_copy_without_a_fault_tests_are_green(tried: Tried) -> None:
    """Those that the campaign above runs are in the suite as they stand; here is shown that the copy is not the fault."""
    code, output = tried.run(["strategies/test_cohorts.py", "server/test_noise_rows.py"], "")
    assert code == 0, output[-2000:]


SOURCE = """
LIMIT, NAMES = 3, ("a", "b")
BOUNDS = {"limit": LIMIT, "most": 9}


class Ledger:
    limit = LIMIT

    def reserve(self, release, cost=0):
        # Größe
        if cost > LIMIT and not release.open:
            raise ValueError(f"{cost} of {LIMIT}")
        elif release.open:
            self.reserve(release, cost - 1)

        def total():
            return max(cost, 0)

        for part in release.parts(1, 2):
            self.book.append(
                part,
                cost=cost,
            )  # kept
        try:
            self.close(1)
        except ValueError:
            self.close(2)
        except OSError:
            self.close(2)
        return {"cost": cost + total() * 2, "parts": [each for each in (1, 2) if each > LIMIT]}
"""


@pytest.mark.parametrize(
    ("function", "fault", "before", "after"),
    [
        ("Ledger.reserve", "always cost", "cost > LIMIT and", "(True) and"),
        ("Ledger.reserve", "always not", "not release.open", "(True)"),
        ("Ledger.reserve", "never and", "cost > LIMIT and not release.open", "(False)"),
        ("Ledger.reserve", "never each", "if each > LIMIT", "if (False)"),
        ("Ledger.reserve", "skip raise", 'raise ValueError(f"{cost} of {LIMIT}")', "pass"),
        ("Ledger.reserve", "skip reserve()", "self.reserve(release, cost - 1)", "pass"),
        ("Ledger.reserve", "drop 1 inside reserve()", "cost - 1)", "(cost))"),
        ("Ledger.reserve", "drop 1 inside parts", "release.parts(1, 2)", "(release.parts(2))"),
        ("", 'drop "b"', '("a", "b")', "(('a',))"),
        ("", 'drop "limit"', '{"limit": LIMIT, "most": 9}', "({'most': 9})"),
        ("", "change 3 to 4", "LIMIT, NAMES = 3", "LIMIT, NAMES = (4)"),
        ("Ledger", "change limit= to $0 + 1", "limit = LIMIT", "limit = ((LIMIT) + 1)"),
        ("Ledger.reserve.total", "change return to 0", "return max(cost, 0)", "return (0)"),
        ("Ledger.reserve.total", "change max() to min($1, 1)", "max(cost, 0)", "(min((cost), 1))"),
        ("Ledger.reserve", "change part 2 of parts() to 3", "parts(1, 2)", "parts(1, (3))"),
        ("Ledger.reserve", "change for parts to ()", "release.parts(1, 2)", "(())"),
        ("Ledger.reserve", 'change "cost": to $2', "cost + total() * 2", "((total() * 2))"),
        ("Ledger.reserve", "change cost= to 0", "cost=cost,", "cost=(0),"),
        ("Ledger.reserve", "change ValueError inside close() OSError to KeyError", "except ValueError", "except (KeyError)"),
        ("Ledger.reserve", "replace close() 1 by return None", "self.close(1)", "return None"),
    ],
)  # fmt: skip
def test_each_operator_changes_its_place_alone(function: str, fault: str, before: str, after: str) -> None:
    assert SOURCE.count(before) == 1
    applied = Mutation("name", "file.py", function, fault, "", "").applied(SOURCE)
    assert applied == SOURCE.replace(before, after)


def test_lines_after_a_change_keep_their_places() -> None:
    applied = Mutation("name", "file.py", "Ledger.reserve", "skip append()", "", "").applied(SOURCE)
    assert [line for line in applied.splitlines() if "append" in line] == []
    assert applied.splitlines()[25:] == SOURCE.splitlines()[25:]


@pytest.mark.parametrize(
    ("function", "fault", "text"),
    [
        (
            "Ledger.reserve",
            "skip close()",
            "3 places for `skip close()`, line 25, line 27, line 29; give words",
        ),
        ("Ledger.reserve", "never max()", "file.py: Ledger.reserve: 0 places for `never max()`; give words"),
        ("Ledger.total", "never cost", "file.py: Ledger.total: no such function or class"),
        ("Ledger.reserve", "remove cost", "`remove cost` is none of the faults that"),
        ("Ledger.reserve", "change cost", "`change cost` is none of the faults that"),
        ("Ledger.reserve", "change part 3 of parts() to 0", "has fewer parts; correct it"),
        ("Ledger", "change LIMIT to limits", "file.py has no limits any more; correct `limits`"),
    ],
)
def test_a_place_that_is_not_one_is_an_error(function: str, fault: str, text: str) -> None:
    with pytest.raises(LookupError, match=re.escape(text)) as error:
        Mutation("what breaks", "file.py", function, fault, "", "").applied(SOURCE)
    assert "what breaks" in str(error.value)


def test_a_fault_in_the_file_of_another_room_is_an_error(tmp_path: Path) -> None:
    block = (
        '["a fault"]\nin = "server/rounds.py: run"\nfault = "never"\nred = "server/test_rounds.py -k run"\n'
    )
    (tmp_path / "client.toml").write_text(block)
    with pytest.raises(ValueError, match="'a fault' is of another room; move it to server"):
        OPERATORS["read_mutations"](tmp_path)
