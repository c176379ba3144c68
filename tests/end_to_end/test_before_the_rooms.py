"""Folders, ledgers and bundles that were made before the rooms moved go on, verify and start after it."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

import fedveil.client.dp_sgd.train
import fedveil.simulations.simulate  # noqa: F401 (before any fork, so that children need not import them)

KEPT = Path(__file__).parents[1] / "fixtures" / "before_the_rooms"
LEDGERS = sorted(path.relative_to(KEPT) for path in KEPT.rglob("*ledger") if path.is_file())


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return Path(shutil.copytree(KEPT, tmp_path / "kept"))


@pytest.mark.parametrize("name", ["run", "run_of_records"])
def test_an_interrupted_run_goes_on(kept: Path, commands: Any, name: str) -> None:
    before = (kept / name / "metrics.jsonl").read_text()
    code, command = commands.run("simulate", f"resume={kept / name}")
    assert code == 0, command.err
    after = (kept / name / "metrics.jsonl").read_text()
    assert after.startswith(before) and len(after.splitlines()) == 4
    assert json.loads((kept / name / "result.json").read_text())["rounds_completed"] == 4
    assert commands.run("audit", str(kept / name))[0] in (0, 4)


@pytest.mark.parametrize("path", LEDGERS, ids=str)
def test_a_ledger_verifies(kept: Path, commands: Any, path: Path) -> None:
    code, command = commands.run("ledger", "verify", str(kept / path))
    assert code == 0, command.err


def test_a_federation_serves_its_next_run(kept: Path, forks: dict[str, str]) -> None:
    hearts, log = kept / "hearts", kept / "clients.log"
    environment = {**os.environ, **forks, "GRPC_VERBOSITY": "NONE"}
    program = str(Path(forks["PATH"].split(os.pathsep)[0]) / "fedveil")
    for path in (hearts / "clients").iterdir():  # keys in a checkout are readable by all
        path.chmod(0o700)
    for path in hearts.rglob("*.key"):
        path.chmod(0o600)
    asked = ("task=digits", "batch_size=40", "cohort=all", "num_rounds=2", "link.clients=1", "link.wait=100")
    promise = (
        "privacy=record_and_client",
        "privacy.client.target_epsilon=9",
        "privacy.record.target_epsilon=19",  # a release that did not mark its sums of records had two of them
        "privacy.client.allow_large_delta=true",
        "accept_vacuous=true",  # two clients
    )
    with open(log, "w") as said:
        clients = [
            subprocess.Popen(
                [program, "client", "start", str(path)], env=environment, stdout=said, stderr=said
            )
            for path in sorted((hearts / "clients").iterdir())
        ]
        command = [program, "server", str(hearts / "server"), *asked, *promise, "run=after"]
        served = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        for client in clients:
            client.send_signal(signal.SIGTERM)
        codes = [client.wait(60) for client in clients]
    assert served.returncode == 0, served.stderr + served.stdout + log.read_text()
    result = json.loads((hearts / "server" / "runs" / "after" / "result.json").read_text())
    assert result["status"] == "completed" and result["rounds_completed"] == 2
    assert all(float(row["epsilon"]) > 5 for row in result["privacy"] if row["unit"] == "client")
    assert codes == [0, 0]
