"""Selection of tests by `.ci/run --changed`: whatever changed, the tests of its name and of its importers are run."""

import runpy
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
CHANGED: dict[str, Any] = runpy.run_path(str(ROOT / ".ci" / "changed.py"))
FILES = {
    "server/rounds.py": "",
    "server/terms.py": "",
    "configs/privacy/none.yaml": "",
    "README.md": "",
    "tests/conftest.py": "",
    "tests/faults/disk.c": "",
    "tests/server/test_rounds.py": "from fedveil.server import rounds",
    "tests/server/test_terms.py": "import fedveil.server.terms",
    "tests/run/test_close.py": "from fedveil.server.rounds import close",
    "tests/run/test_points.py": "from shared.tasks import Points",
    "tests/run/test_disk.py": 'DISK = "disk.c"',
    "tests/configs/test_settings.py": "",
    "tests/test_docs.py": "",
    "tests/test_source.py": "",
    "tests/test_wheel.py": "",
    "tests/test_mutations.py": "def test_each_fault():\n    pass\ndef test_red(name):\n    pass",
}
FAULTS = ["tests/test_mutations.py::test_each_fault", "tests/test_source.py"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with a branch `main` that holds these files."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    git(tmp_path, "init", "--quiet", "--initial-branch", "main")
    commit(tmp_path)
    return tmp_path


def git(root: Path, *arguments: str) -> None:
    names = [f"user.{key}=a@example.org" for key in ("name", "email")]
    subprocess.run(["git", "-c", names[0], "-c", names[1], *arguments], cwd=root, check=True)


def commit(root: Path) -> None:
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "Change")


@pytest.mark.parametrize(
    ("changed", "tests"),
    [
        ("server/rounds.py", ["tests/run/test_close.py", "tests/server/test_rounds.py", *FAULTS]),
        ("server/terms.py", ["tests/server/test_terms.py", *FAULTS]),
        ("server/other.py", ["tests/server/test_rounds.py", "tests/server/test_terms.py", *FAULTS]),
        ("configs/privacy/none.yaml", ["tests/configs/test_settings.py"]),
        ("README.md", ["tests/test_docs.py"]),
        ("pyproject.toml", ["tests/test_wheel.py"]),
        ("tests/faults/disk.c", ["tests/run/test_disk.py"]),
        ("tests/shared/tasks.py", ["tests/run/test_points.py"]),
        ("tests/run/test_close.py", ["tests/run/test_close.py"]),
        ("tests/run/test_deleted.py", []),
        ("tests/test_mutations.py", ["tests/test_mutations.py"]),
        ("tests/mutations/server.toml", FAULTS[:1]),
    ],
)
def test_changed_file_selects_its_tests(root: Path, changed: str, tests: list[str]) -> None:
    assert CHANGED["tests_of"](root, {changed}) == tests


def test_commits_edits_and_new_files_count_as_changed(root: Path) -> None:
    git(root, "checkout", "--quiet", "-b", "branch")
    (root / "server" / "terms.py").write_text("a = 1")
    commit(root)
    (root / "server" / "rounds.py").write_text("b = 1")
    (root / "server" / "added.py").write_text("")
    edits = {"server/rounds.py", "server/added.py"}
    assert CHANGED["changed_files"](root, None) == edits | {"server/terms.py"}
    assert CHANGED["changed_files"](root, "HEAD") == edits


def test_unknown_commit_is_refused(root: Path) -> None:
    with pytest.raises(SystemExit, match="name a commit: --changed REF"):
        CHANGED["changed_files"](root, "nowhere")
