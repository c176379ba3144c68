"""The core without its extensions: in a copy from which they are deleted every mode still trains."""

import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from fedveil.base.extensions import TABLE
from fedveil.client import extra
from fedveil.populations import population
from fedveil.run import observer

ROOT = Path(__file__).parents[1]
EXTENSIONS = (
    "adapters",
    "audit",
    "deployment",
    "engines",
    "evidence",
    "export",
    "links",
    "personal",
    "questions",
    "tables",
    "tasks/adapters",
    "tasks/shipped",
    "text",
)
OUTSIDE = ("tests", "docs", "benchmarks", "examples", "compiled", "typings", "build", "containers")
# An editable installation finds a room that a copy lacks where the package was installed from.
ALONE = """
import sys
sys.meta_path = [each for each in sys.meta_path if "Editable" not in getattr(each, "__name__", "")]
"""
FUNCTIONS = {
    "personal": ("with_own_layers", "load_own", "store_own"),
    "task": ["load"],
    "link": ["serve", "follow"],
}  # of a module at a point
OF_TABLES = {
    "constraints": ("constrained", "require_shapes"),
    "group_weights": ("weighted", "with_group_weights"),
    "row_weights": ("with_weight", "with_levels", "weighted", "weights_of"),
}
VERIFY = """
from fedveil.__main__ import run
sys.exit(run(["verify", "none"]))
"""
EVERY_MODE = """
import fedveil as fv
modes = {
    "none": {},
    "record": {"target_epsilon": 8.0},
    "client_central": {"target_epsilon": 20.0, "allow_large_delta": True},
    "client_distributed": {"target_epsilon": 20.0, "allow_large_delta": True},
    "record_distributed": {"target_epsilon": 8.0},
    "record_and_client": {"client": {"target_epsilon": 20.0, "allow_large_delta": True}},
}
for mode, keys in modes.items():
    run = fv.simulate("digits", privacy={"name": mode, **keys}, num_rounds=2, seed=0, quiet=True, audit="off", folder=mode)
    assert run.result["status"] == "completed", (mode, run.result["reason"])
arms = {"name": "learning_rate", "score": "clients"}
for asked in ({"audit": "off", "evaluate": {"clients": "final"}}, {"audit": "off", "tune": arms}, {"audit": "light"}):
    try:
        fv.simulate("digits", privacy="client_central", num_rounds=2, seed=0, quiet=True, folder="refused", **asked)
    except fv.Refusal as refusal:
        print(refusal)
"""


def copied(folder: Path, without: tuple[str, ...]) -> Path:
    """Return the folder in which a copy of the package lies that lacks these rooms."""
    shutil.copytree(
        ROOT,
        folder / "fedveil",
        ignore=shutil.ignore_patterns(*OUTSIDE, ".*", "*.egg-info", "__pycache__"),
    )
    for name in without:
        shutil.rmtree(folder / "fedveil" / name)
    return folder


def called(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run a script on the copy."""
    command = [sys.executable, "-c", ALONE + script]
    env = {"PYTHONPATH": str(folder), "HOME": str(folder), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False
    )


def trained(folder: Path) -> str:
    """Return what the copy prints."""
    done = called(folder, EVERY_MODE)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_mode_trains_without_any_extension(tmp_path: Path) -> None:
    assert trained(copied(tmp_path, EXTENSIONS)).splitlines() == [
        "evaluate.clients='final': must be one of none; needs fedveil.questions, which is missing here: install all of fedveil",
        "tune.score='clients': needs fedveil.questions, which is missing here: install all of fedveil, or change this",
        "audit.name='light': must be one of off; needs fedveil.audit, which is missing here: install all of fedveil",
    ]
    assert not (tmp_path / "refused").exists()
    done = called(tmp_path, VERIFY)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "verify: needs fedveil.evidence, which is missing here: install all of fedveil\n"


@pytest.mark.campaign
@pytest.mark.parametrize("name", EXTENSIONS)
def test_every_mode_trains_without_one_extension(name: str, tmp_path: Path) -> None:
    trained(copied(tmp_path, (name,)))


def test_every_entry_of_the_table_has_the_functions_of_its_protocol() -> None:
    for (point, name), place in TABLE.items():
        module, _, attribute = place.partition(":")
        made = import_module(f"fedveil.{module}")
        if attribute:
            assert hasattr(made, attribute), (point, name)
            continue
        if point == "tables":
            assert all(callable(getattr(made, each)) for each in OF_TABLES[name]), name
            continue
        if point in FUNCTIONS:
            assert all(callable(getattr(made, each)) for each in FUNCTIONS[point]), name
            continue
        (wanted,) = filter(None, (getattr(home, name, None) for home in (extra, population, observer)))
        functions = {each for each in {*vars(wanted), *wanted.__annotations__} if each[0] != "_"}
        assert functions and functions <= {*vars(made)}, name
