"""`fedveil.privacy` as a distribution of its own: built from the tree, installed and tested without the rest of fedveil."""

import ast
import importlib.util
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from shared.absent import ABSENT

ROOT = Path(__file__).parents[1]
ROOMS = ("base", "privacy")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ALONE = tomllib.loads((ROOT / "privacy" / "pyproject.toml").read_text())
# What a user of the ledger need not install.
OTHERS = [
    "torch",
    "flwr",
    "opacus",
    "hydra",
    "omegaconf",
    "pydantic",
    "ray",
    "matplotlib",
    "sklearn",
    "grpc",
    "typer",
    "rich",
    "yaml",
    "jinja2",
    "h11",
]
PLUGINS = ("-p", "no:cacheprovider", "-p", "_hypothesis_pytestplugin")
# A plugin of pytest: none of these packages can be imported, and no editable installation gives the other rooms.
PLUGIN = (
    f"blocked = {OTHERS}\n{ABSENT}"
    + """
import os
sys.meta_path[:] = [each for each in sys.meta_path if "editable" not in repr(each).lower()]
def pytest_sessionfinish():
    import fedveil.privacy
    site = os.path.dirname(__file__) + "/site/fedveil"
    assert fedveil.privacy.__file__.startswith(site), fedveil.privacy.__file__
    assert set(fedveil.__path__) == {site}, fedveil.__path__
"""
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    built = subprocess.run([*command, str(ROOT / "privacy")], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    return next(folder.glob("fedveil_privacy-*.whl"))


def test_the_two_projects_agree() -> None:
    whole, alone = PROJECT["project"], ALONE["project"]
    assert alone["version"] == whole["version"] and alone["requires-python"] == whole["requires-python"]
    assert set(alone["dependencies"]) < set(whole["dependencies"])
    assert alone["optional-dependencies"]["opacus"] == whole["optional-dependencies"]["opacus"]
    shipped = PROJECT["tool"]["setuptools"]["packages"]
    assert ALONE["tool"]["setuptools"]["packages"] == [
        each for each in shipped if each.split(".")[1:2] in (["base"], ["privacy"])
    ]


def test_the_wheel_of_privacy_is_two_rooms_of_the_tree(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    tree = {
        path
        for room in ROOMS
        for path in (ROOT / room).rglob("*")
        if path.suffix in (".py", ".typed", ".json")
    }
    assert packed == {f"fedveil/{path.relative_to(ROOT).as_posix()}" for path in tree}


def needs_these_rooms_alone(path: Path) -> bool:
    """Whether a file of tests imports no room of fedveil but the two, and no helper but that of ledgers."""
    imported = {
        name
        for node in ast.walk(ast.parse(path.read_text()))
        for name in (
            [each.name for each in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    own = {name for name in imported if name.split(".")[0] in ("fedveil", "shared", *OTHERS)}
    return all(name.startswith(("fedveil.base", "fedveil.privacy", "shared.ledgers")) for name in own)


def run_alone(wheel: Path, folder: Path, files: list[Path]) -> subprocess.CompletedProcess[str]:
    """Run files of tests with the wheel's content in the place of fedveil, and without other packages."""
    site = folder / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (folder / "absent.py").write_text(PLUGIN)
    paths = [str(folder), str(site), str(ROOT / "tests")]
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "absent", *PLUGINS, *map(str, files)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_ledger_and_accounting_pass_their_tests_alone(wheel: Path, tmp_path: Path) -> None:
    names = ("ledger/test_hash_chain", "ledger/test_ledger_state", "accounting/test_events", "test_budget")
    done = run_alone(wheel, tmp_path, [ROOT / "tests" / "privacy" / f"{name}.py" for name in names])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


@pytest.mark.campaign
def test_all_tests_of_privacy_pass_alone(wheel: Path, tmp_path: Path) -> None:
    files = sorted(path for room in ROOMS for path in (ROOT / "tests" / room).rglob("test_*.py"))
    alone = [path for path in files if needs_these_rooms_alone(path)]
    assert len(alone) > len(files) / 2
    done = run_alone(wheel, tmp_path, alone)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_the_released_wheel_requires_privacy_and_has_the_other_rooms(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("release", ROOT / ".ci" / "release.py")
    assert spec is not None and spec.loader is not None
    release = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(release)
    (tmp_path / "privacy").mkdir()
    for name in ("pyproject.toml", "privacy/pyproject.toml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    release.require_privacy(tmp_path / "pyproject.toml")
    released = tomllib.loads((tmp_path / "pyproject.toml").read_text())
    own = f"fedveil-privacy=={PROJECT['project']['version']}"
    assert released["project"]["dependencies"] == [own, *PROJECT["project"]["dependencies"]]
    both = [*released["tool"]["setuptools"]["packages"], *ALONE["tool"]["setuptools"]["packages"]]
    assert sorted(both) == PROJECT["tool"]["setuptools"]["packages"]
    data = released["tool"]["setuptools"]["package-data"] | ALONE["tool"]["setuptools"]["package-data"]
    assert data == PROJECT["tool"]["setuptools"]["package-data"]
