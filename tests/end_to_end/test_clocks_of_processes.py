"""Clocks that jump under the processes of a federation, by a day or past the end of certificates; `faults/clock.c` moves them.

Streams are open and rounds go on all the while. Figures for docs/evidence/reliability.md.
"""

import json
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from fedveil.deployment.device.agent import read_health
from fedveil.deployment.provision import renew, rotate

FAULTS = Path(__file__).parents[1] / "faults"
SERVED = runpy.run_path(str(FAULTS / "served.py"))
RULES = runpy.run_path(str(FAULTS / "federation_rules.py"))
DAY, CERTIFICATE_DAYS = 86_400, 3
MORE = f"certificate_days: {CERTIFICATE_DAYS}\n"  # of the federation's file
MANY, CLIENTS, VICTIM = 400, 5, "boston"
AWAY = (VICTIM, "cleveland")  # of four that a round waits for
INTERRUPTED, REFUSED = 130, 2  # exit codes
SECONDS_OF_ROUNDS = 3.0  # in which several pass
EPSILON, OWNERS_EPSILON = 18.0, 20.0
ARGV = (
    *("task=digits", "batch_size=40", "accept_vacuous=true", "privacy=client_distributed"),
    *("privacy.allow_large_delta=true", "privacy.noise_multiplier=40", f"privacy.target_epsilon={EPSILON}"),
    *("link.clients=0.8", "link.wait=200", "link.deadline=20", "run=jumps", f"num_rounds={MANY}"),
)


@dataclass
class World(SERVED["Served"]):
    """A federation whose processes have a clock of their own each."""

    clocks: Path = Path()

    def server(self) -> Any:
        return self.start("server", self.hearts / "server", *ARGV)

    def rows(self) -> list[dict[str, Any]]:
        return RULES["rows_of"](self.hearts / "server" / "runs" / "jumps")

    def jump(self, seconds: int, *processes: Any) -> None:
        """Let the clocks of these processes in turn, or those of all that begin later, be off by so many seconds."""
        for name in [str(each.pid) for each in processes] or ["start"]:
            with (self.clocks / name).open("r+b") as file:
                file.write(seconds.to_bytes(8, sys.byteorder, signed=True))


def compiled(folder: Path) -> Path:
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler on Linux")
    library = folder / "clock.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-o", library, FAULTS / "clock.c", "-ldl"], check=True
    )
    return library


@contextmanager
def world_in(folder: Path) -> Iterator[World]:
    library, clocks = compiled(folder), folder / "clocks"
    clocks.mkdir()
    (clocks / "start").write_bytes(bytes(8))

    def kind(*given: Any) -> World:
        return World(*given, clocks=clocks)

    environment = {"LD_PRELOAD": str(library), "CLOCKS": str(clocks)}
    with SERVED["serving"](kind, folder, more=MORE, environment=environment) as made:
        yield made


def rounds_on(world: World, server: Any, count: int = 2) -> list[int]:
    """Wait for so many more rounds, and return how many replied in each."""
    before = len(world.rows())
    SERVED["until"](lambda: len(world.rows()) >= before + count or not server.alive, lambda: server.said)
    assert server.alive, server.said
    return [row["replies"] for row in world.rows()[before:]]


def ended(world: World, server: Any) -> None:
    """End the run, and hold all that it left against what must not be."""
    assert server.kill(signal.SIGTERM) == INTERRUPTED, server.said
    found = RULES["Lived"](world.hearts, "jumps", MANY)
    assert not list(RULES["wrongs"](found, EPSILON, OWNERS_EPSILON))
    assert not json.loads((found.folder / "result.json").read_text())["audit"]["alarms"]
    said = [server.said, *(each.said for each in world.clients.values())]
    assert "Traceback" not in "".join(said), said


def test_a_federation_of_the_campaign_is_provisioned_and_begins(tmp_path: Path) -> None:
    SERVED["begins"](SERVED["make_federation"](tmp_path, more=MORE), ARGV)


def test_process_under_the_campaigns_clock_is_off_as_its_file_says(tmp_path: Path) -> None:
    (tmp_path / "start").write_bytes(DAY.to_bytes(8, sys.byteorder))
    environment = {"LD_PRELOAD": str(compiled(tmp_path)), "CLOCKS": str(tmp_path)}
    asked = [sys.executable, "-c", "import time; print(time.time())"]
    said = subprocess.run(asked, env=environment, capture_output=True, text=True, check=True)
    assert float(said.stdout) > time.time() + DAY / 2


@pytest.mark.campaign
def test_clocks_that_jump_by_a_day_lose_no_round_and_end_no_wait(tmp_path: Path) -> None:
    with world_in(tmp_path) as world:
        server = world.server()
        devices = list(world.clients.values())
        rounds_on(world, server)
        for jumping in ([server], devices[:1], devices, [server, *devices[:2]], [server, *devices]):
            for seconds in (DAY, 0, -DAY, DAY, 0):
                world.jump(seconds, *jumping)
                assert rounds_on(world, server) == [CLIENTS] * 2, (len(jumping), seconds)
        # While the server waits for a device, which comes back with a clock of its own.
        for seconds in (DAY, -DAY):
            for name in AWAY:
                world.clients[name].kill(signal.SIGTERM)
            SERVED["until"](lambda: state(world) == "waiting", lambda: state(world))
            world.jump(seconds, server)
            world.jump(-seconds)
            for name in AWAY:
                world.client(name)
            SERVED["until"](lambda: CLIENTS in rounds_on(world, server), lambda: server.said)
            world.jump(0, server)
        ended(world, server)


def state(world: World) -> str:
    return json.loads((world.hearts / "server" / "status.json").read_text())["state"]


@pytest.mark.campaign
def test_certificates_expiring_under_streams_cost_nobody_a_charge(tmp_path: Path) -> None:
    """Rounds wait for the server's own to be renewed, and one device's is left out; neither ends a stream."""
    past = (CERTIFICATE_DAYS + 1) * DAY
    with world_in(tmp_path) as world:
        server = world.server()
        devices = list(world.clients.values())
        rounds_on(world, server)
        world.jump(past, server, *devices)
        SERVED["until"](lambda: state(world) == "waiting", lambda: state(world))
        before, paid = len(world.rows()), RULES["entries_of"](world.hearts)
        time.sleep(SECONDS_OF_ROUNDS)
        assert len(world.rows()) == before and RULES["entries_of"](world.hearts) == paid
        assert "the server's own certificate has expired" in (world.hearts / "server/server.log").read_text()
        world.jump(0, *devices, server)
        assert rounds_on(world, server)[-1] == CLIENTS

        # All but one are renewed, the devices' over their streams; then the earlier ones end.
        file = world.hearts / "authority" / "federation.yaml"
        file.write_text(file.read_text().replace(f"days: {CERTIFICATE_DAYS}", "days: 60"))
        renew(world.hearts, [name for name in world.clients if name != VICTIM], within=30)
        rotate(world.hearts, ["server"], None)
        SERVED["until"](lambda: renewed(world) == CLIENTS - 1, lambda: str(renewed(world)))
        world.jump(past, server, *devices)
        rounds_on(world, server, 1)
        assert rounds_on(world, server, 3) == [CLIENTS - 1] * 3
        assert world.rows()[-1]["dropped"] == {"expired": 1}
        assert f"the certificate of {VICTIM} has expired" in (world.hearts / "server/server.log").read_text()

        # Its device does not start by its own clock, and is not let in by the server's.
        world.clients[VICTIM].kill(signal.SIGTERM)
        world.jump(past)
        world.client(VICTIM)
        late = world.clients[VICTIM]
        assert late.wait() == REFUSED and "ended on" in late.said, late.said
        world.jump(0)
        world.client(VICTIM)
        SERVED["until"](lambda: "trying again" in told_by_victim(world), lambda: told_by_victim(world))
        assert rounds_on(world, server) == [CLIENTS - 1] * 2 and world.clients[VICTIM].alive

        world.jump(0, *devices, server)
        SERVED["until"](lambda: CLIENTS in rounds_on(world, server), lambda: told_by_victim(world))
        ended(world, server)


def told_by_victim(world: World) -> str:
    health = read_health(world.hearts / "clients" / VICTIM / "state")
    return "" if health is None else health.state


def renewed(world: World) -> int:
    """Return how many devices say that their certificate ends later than those of the beginning."""
    clients = json.loads((world.hearts / "server" / "status.json").read_text())["clients"]
    latest = datetime.now(UTC) + timedelta(days=CERTIFICATE_DAYS + 1)
    return sum(datetime.fromisoformat(each["certificate_ends"]) > latest for each in clients)
