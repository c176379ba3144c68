"""Whole runs over the link, with clients in processes of their own: the same model, bit for bit, as on the engine."""

import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from shared.runs import json_lines

from fedveil.benchmarks.link_clients import write_endpoints
from fedveil.configs.settings import settings_from_overrides
from fedveil.links.grpc.grid import LinkGrid, open_link
from fedveil.run.build import build
from fedveil.run.client_instructions import client_settings
from fedveil.simulations.simulate import simulate

ENDS = Path(__file__).parents[1] / "faults" / "link_ends.py"
Federation = runpy.run_path(str(ENDS))["Federation"]
CLIENTS = 6
COMMON = (
    "task=digits",
    f"task.num_clients={CLIENTS}",
    "cohort=all",
    "num_rounds=2",
    "local_epochs=1",
    "seed=3",
    "faults.corrupt=1e-9",  # so that the engine trains client by client: all at once is equal to tolerance only
)
CENTRAL = (*COMMON, "privacy=client_central", "privacy.allow_large_delta=true")
MASKED = (*COMMON, "privacy=client_distributed", "privacy.allow_large_delta=true")


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LinkGrid]:
    """A link with two processes, each of which is half of the clients."""
    folder = tmp_path_factory.mktemp("link")
    federation = Federation(folder, tuple(range(2, 2 + CLIENTS)))
    told = [
        client_settings(build(settings_from_overrides(each)), folder).to_json() for each in (CENTRAL, MASKED)
    ]
    with open_link(federation.door()) as opened, ExitStack() as stack:
        for number in range(2):
            process_folder = federation.write(folder / f"app {number}", opened.port, settings=told)
            ends = [federation.endpoint(node, opened.port) for node in federation.nodes[number::2]]
            write_endpoints(process_folder / "ends.json", ends)
            command = [sys.executable, str(ENDS), "app", str(process_folder)]
            process = subprocess.Popen(command, env={**os.environ, "GRPC_VERBOSITY": "NONE"})
            stack.callback(process.wait)
            stack.callback(process.kill)
        yield opened


@pytest.mark.parametrize(
    "overrides",
    [CENTRAL, MASKED, (*CENTRAL, "compress=project", "compress.cells=256"), (*MASKED, "compress=mask")],
    ids=["private sum", "secure aggregation", "projected", "masked and compressed"],
)
def test_a_run_over_the_link_trains_the_model_of_the_engine(
    grid: LinkGrid, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    settings = settings_from_overrides(overrides)
    simulate(settings, tmp_path / "engine", quiet=True)
    outcome = simulate(settings, tmp_path / "link", quiet=True, grid=grid)
    assert outcome.result["status"] == "completed" and not outcome.result["dropped"]
    assert set(grid.connected) == set(grid.get_node_ids())
    operator = tmp_path / "link" / "operator.jsonl"  # of a trusted server
    told = operator if operator.exists() else tmp_path / "link" / "metrics.jsonl"
    rows = json_lines(told)
    assert [row["replies"] for row in rows if "replies" in row] == [CLIENTS, CLIENTS]
    models = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("engine", "link")]
    assert models[0] == models[1]
