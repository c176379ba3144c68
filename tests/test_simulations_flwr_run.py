"""``flwr run simulations/quickstart``: the main job through Flower's command, SuperLink and simulation runtime."""

import json
import os
import signal
import socket
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

from fedveil.configs.settings import settings_from_overrides
from fedveil.privacy.refusal import Refusal
from fedveil.simulations.flower_grid import FlowerGrid
from fedveil.simulations.simulate import simulate

QUICKSTART = Path(__file__).parents[1] / "simulations" / "quickstart"
FLWR = Path(sys.executable).with_name("flwr")
COMMON = "task=digits task.num_clients=10 num_rounds=2 faults.corrupt=0.01"
SECONDS = 240


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A home of its own and a free port; the SuperLink that `flwr run` leaves behind is ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
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


@pytest.mark.skipif(find_spec("ray") is None or not FLWR.exists(), reason="pip install 'fedveil[ray]'")
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds the SuperLink to end by /proc")
def test_flwr_run_trains_the_model_that_fedveil_simulate_trains(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    out = tmp_path / "out"
    command = [str(FLWR), "run", str(QUICKSTART), "local", "--stream"]
    command += ["--federation-config", "num-supernodes=10 client-resources-num-cpus=1"]
    command += ["-c", f"overrides='{COMMON}' folder='{out}'"]
    ended = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert f"results: {out}" in ended.stdout, ended.stdout + ended.stderr
    assert json.loads((out / "result.json").read_text())["status"] == "completed"
    simulate(settings_from_overrides(COMMON.split()), tmp_path / "here", quiet=True)
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "here" / "model.safetensors").read_bytes()


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


def test_another_number_of_supernodes_than_clients_is_refused_with_the_flag() -> None:
    grid: Any = SimpleNamespace(state=Registered(77, 5, 900))
    with pytest.raises(Refusal, match="num-supernodes=10"):
        FlowerGrid(grid, 10).get_node_ids()
    assert list(FlowerGrid(grid, 3).get_node_ids()) == [2, 3, 4]


def test_a_grid_that_is_no_simulation_is_refused() -> None:
    grid: Any = SimpleNamespace()
    with pytest.raises(TypeError, match="simulation runtime"):
        FlowerGrid(grid, 3).get_node_ids()
