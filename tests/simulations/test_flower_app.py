"""``flwr run simulations/quickstart``: the main job through Flower's command, SuperLink and simulation runtime."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.supercore.object_ref import validate
from shared.runs import run_quietly

from fedveil.base.refusal import Refusal
from fedveil.privacy.ledger.ledger import verify
from fedveil.simulations.flower_app import FlowerGrid

free_port = runpy.run_path(str(Path(__file__).parents[1] / "faults" / "ports.py"))["free_port"]
QUICKSTART = Path(__file__).parents[2] / "simulations" / "quickstart"
FLWR = Path(sys.executable).with_name("flwr")
COMMON = "task=digits task.num_clients=10 num_rounds=2 faults.corrupt=0.01"
SECONDS = 240
TEMPLATE = Path(__file__).parents[2] / "cli" / "templates" / "flower"
needs_ray = pytest.mark.skipif(
    find_spec("ray") is None or not FLWR.exists(), reason="pip install 'fedveil[ray]'"
)
finds_superlink = pytest.mark.skipif(
    not Path("/proc/self/cmdline").exists(), reason="finds the SuperLink to end by /proc"
)


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A home of its own and a free port; the SuperLink that `flwr run` leaves behind is ended."""
    port = str(free_port())
    own = {
        "HOME": str(tmp_path / "home"),
        "FLWR_HOME": str(tmp_path / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": port,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }
    (tmp_path / "home").mkdir()
    yield os.environ | own
    end_superlink(tmp_path / "flwr")


def end_superlink(home: Path) -> None:
    """End the SuperLink that logs into this home, which ends its own children, and wait until it is gone."""
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(FileNotFoundError, ProcessLookupError):
            arguments = command.read_bytes()
            if b"flower-superlink" not in arguments or str(home).encode() not in arguments:
                continue
            os.kill(int(command.parent.name), signal.SIGTERM)
            end = time.monotonic() + 10
            while command.read_bytes() and time.monotonic() < end:
                time.sleep(0.05)


def flwr_run(app: Path, clients: int, environment: dict[str, str], folder: Path, config: str = "") -> str:
    """Return what `flwr run` prints in this folder."""
    command = [str(FLWR), "run", str(app), "local", "--stream"]
    command += ["--federation-config", f"num-supernodes={clients} client-resources-num-cpus=1"]
    command += ["-c", config] if config else []
    ended = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    return ended.stdout + ended.stderr


@needs_ray
@finds_superlink
@pytest.mark.campaign
def test_flwr_run_trains_the_model_that_fedveil_simulate_trains(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    out = tmp_path / "out"
    said = flwr_run(QUICKSTART, 10, environment, tmp_path, f"overrides='{COMMON}' folder='{out}'")
    assert f"results: {out}" in said, said
    assert json.loads((out / "result.json").read_text())["status"] == "completed"
    run_quietly(COMMON.split(), tmp_path / "here")
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "here" / "model.safetensors").read_bytes()


@needs_ray
@finds_superlink
@pytest.mark.campaign
def test_an_app_of_ones_own_finds_its_budget_from_any_folder(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    """The second run begins elsewhere, finds the budget spent and says so in a sentence."""
    app, elsewhere = tmp_path / "app", tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(TEMPLATE, app, ignore=shutil.ignore_patterns("__pycache__"))
    server = app / "server_app.py"
    text = server.read_text().replace("CLIENTS, ROUNDS = 200, 10", "CLIENTS, ROUNDS = 40, 2")
    server.write_text(text.replace("target_delta=1e-4", "target_delta=1e-2"))
    first = flwr_run(app, 40, environment, tmp_path)
    assert "round 2: 10 clients planned; epsilon 8 of 8 at delta 0.01" in first, first
    second = flwr_run(app, 40, environment, elsewhere)
    assert "target_epsilon=8.0: already spent (8)" in second, second
    assert "Traceback" not in second and "ROUND 1" not in second
    (ledger,) = tmp_path.rglob("*.ledger")
    assert ledger.is_relative_to(tmp_path / "home") and 7.9 < verify(ledger).epsilon <= 8.0


def test_the_quickstart_is_an_app_that_flower_accepts() -> None:
    config = tomllib.loads((QUICKSTART / "pyproject.toml").read_text())
    components = config["tool"]["flwr"]["app"]["components"]
    for reference in components.values():
        assert validate(reference, project_dir=QUICKSTART) == (True, None)
    assert [path.name for path in QUICKSTART.iterdir()] == ["pyproject.toml"]


class Registered:
    """As much of Flower's link state as tells which nodes there are."""

    def __init__(self, *nodes: int) -> None:
        self.nodes = nodes

    def get_node_info(self) -> list[Any]:
        return [SimpleNamespace(node_id=node) for node in self.nodes]


def test_wrong_number_of_supernodes_is_refused_with_the_flag() -> None:
    grid: Any = SimpleNamespace(state=Registered(77, 5, 900))
    with pytest.raises(Refusal, match="num-supernodes=10"):
        FlowerGrid(grid, 10).get_node_ids()
    assert list(FlowerGrid(grid, 3).get_node_ids()) == [2, 3, 4]


def test_a_grid_that_is_no_simulation_is_refused() -> None:
    grid: Any = SimpleNamespace()
    with pytest.raises(TypeError, match="simulation runtime"):
        FlowerGrid(grid, 3).get_node_ids()
