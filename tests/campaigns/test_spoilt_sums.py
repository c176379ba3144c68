"""A federation of processes one of whose devices spoils every encrypted sum: it is found, and the others go on."""

import json
import runpy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from shared.runs import json_lines

from fedveil.privacy.ledger.ledger import read_entries

FAULTS = Path(__file__).parents[1] / "faults"
SERVED = runpy.run_path(str(FAULTS / "served.py"))
make_federation, free_port = SERVED["make_federation"], SERVED["free_port"]
NAMES = [f"h{number}" for number in range(8)]
CULPRIT, ROUNDS, SECONDS = "h5", 7, 400
ASKED = (
    "task=digits",
    "batch_size=40",
    "accept_vacuous=true",
    "privacy=client_distributed",
    "privacy.allow_large_delta=true",
    "privacy.target_epsilon=10",
    f"num_rounds={ROUNDS}",
    "link.wait=100",
    "link.deadline=60",
    "run=spoilt",
)


@contextmanager
def devices(made: Path) -> Iterator[None]:
    started = []
    for name in NAMES:
        bundle = str(made / "clients" / name)
        script = ["-m", "fedveil", "client", "start", bundle]
        if name == CULPRIT:
            script = [str(FAULTS / "cheating_device.py"), bundle, "random words"]
        started.append(
            subprocess.Popen([sys.executable, *script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        )
    try:
        yield
    finally:
        for each in started:
            each.kill()
            each.wait()


def test_a_federation_of_the_campaign_is_provisioned_and_begins(tmp_path: Path) -> None:
    SERVED["begins"](make_federation(tmp_path, names=NAMES), ASKED)


@pytest.mark.campaign
def test_spoiling_device_is_suspected_and_the_run_goes_on(tmp_path: Path) -> None:
    made = make_federation(tmp_path, free_port(), names=NAMES)
    with devices(made):
        command = [sys.executable, "-m", "fedveil", "server", str(made / "server"), *ASKED]
        said = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        assert said.returncode == 0, said.stdout + said.stderr
    folder = made / "server" / "runs" / "spoilt"
    rows = json_lines(folder / "metrics.jsonl")
    result = json.loads((folder / "result.json").read_text())
    assert [row["untrue"] for row in rows] == [True] * ROUNDS
    assert [row["abandoned"] for row in rows] == [True, True] + [False] * (ROUNDS - 2)
    assert list(result["suspected"]) == [CULPRIT] and not result["blamed"]
    found = next(row["round"] for row in rows if "suspected" in row)
    assert found <= 2 + 3  # the binary logarithm of 8
    for row in rows[found:]:
        assert [len(each["members"]) for each in row["weighed"]] == [3, 5]  # suspects with few others

    status = subprocess.run(
        [sys.executable, "-m", "fedveil", "server", "status", str(made / "server")],
        capture_output=True,
        check=False,
        text=True,
    ).stdout
    assert f"{ROUNDS} with a sum that cannot be true" in status and f"{CULPRIT} is suspected" in status
    log = (made / "server" / "server.log").read_text()
    assert f"{CULPRIT} is suspected" in log

    # Every device was charged for each round once, whichever part it was in.
    for name in NAMES:
        (own,) = (made / "clients" / name / "state" / "ledgers").glob("client*.ledger")
        reserved = [entry for entry in read_entries(own) if entry.kind == "reserve"]
        assert len(reserved) == ROUNDS
