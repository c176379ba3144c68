"""Extensions of the package: without the files of one, the core runs, and refuses in one sentence what needs them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OUTSIDE = ("benchmarks", "tests", "docs", "examples", "typings", "compiled", "containers", "build")
MODES = ("none", "record", "client_central", "record_distributed")
TRAINED = """
import json, sys
from pathlib import Path
import fedveil as fv

told = {"package": fv.__file__}
for mode in sys.argv[1:]:
    run = fv.simulate("digits", privacy=mode, num_rounds=2, audit="off", folder=Path("runs", mode), quiet=True)
    told[mode] = [run.status, run.result["rounds_completed"], run.result["audit"], fv.load(run.folder).status]
try:
    fv.simulate("digits", num_rounds=2, audit="light", folder=Path("runs", "audited"), quiet=True)
except fv.Refusal as refusal:
    told["refusal"] = str(refusal)
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder that holds the package without the audit."""
    root = tmp_path_factory.mktemp("core")

    def left_out(folder: str, names: list[str]) -> set[str]:
        top = Path(folder) == ROOT
        return {n for n in names if n == "__pycache__" or (top and (n[0] == "." or n in (*OUTSIDE, "audit")))}

    shutil.copytree(ROOT, root / "fedveil", ignore=left_out)
    return root


def test_without_the_audit_every_mode_trains_and_an_audit_is_refused(core: Path, tmp_path: Path) -> None:
    surroundings = {**os.environ, "PYTHONPATH": str(core), "HOME": str(tmp_path)}
    command = [sys.executable, "-c", TRAINED, *MODES]
    done = subprocess.run(
        command, cwd=tmp_path, env=surroundings, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert Path(told.pop("package")).parent == core / "fedveil"
    assert told.pop("refusal") == (
        "audit='light': fedveil.audit, which does it, is missing here; install all of fedveil, or say audit=off"
    )
    assert told == {mode: ["completed", 2, None, "completed"] for mode in MODES}
    assert not (tmp_path / "runs" / "audited").exists()


def test_every_module_of_the_table_of_extensions_has_the_functions_of_its_protocol() -> None:
    from importlib import import_module

    from fedveil.base.extras import EXTENSIONS
    from fedveil.client import extra as client
    from fedveil.populations import population as populations
    from fedveil.run import observer

    for extension, modules in EXTENSIONS.items():
        for protocol, module in modules.items():
            homes = [getattr(home, protocol, None) for home in (client, populations, observer)]
            (wanted,) = filter(None, homes)
            made = import_module(f"fedveil.{extension}.{module}")
            functions = {name for name in {*vars(wanted), *wanted.__annotations__} if name[0] != "_"}
            assert functions and functions <= {*vars(made)}, protocol
