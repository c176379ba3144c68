"""An authority whose keys are replaced under twenty devices as processes: some are there, some come late, some too late."""

import json
import runpy
import shutil
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedveil.deployment.device.agent import read_health
from fedveil.deployment.device.authority import new_fingerprint
from fedveil.deployment.device.client_bundle import read_client_bundle
from fedveil.deployment.provision import provision
from fedveil.deployment.rollover import roll_over
from fedveil.links.server_bundle import read_server_bundle
from fedveil.privacy.secagg.rollover import Rollover

FAULTS = Path(__file__).parents[1] / "faults"
SERVED = runpy.run_path(str(FAULTS / "served.py"))
CLOCKS = runpy.run_path(str(Path(__file__).parents[1] / "end_to_end/test_clocks_of_processes.py"))
DAYS, DAY = 30, 86_400
NAMES = tuple(f"c{number:02}" for number in range(20))
ONLINE, DURING, LATE = NAMES[:12], NAMES[12:17], NAMES[17:]
FEDERATION = """\
federation: hearts
server: {{address: "localhost:{port}", listen: "127.0.0.1:{port}"}}
task: {{name: digits, options: {{num_clients: {count}}}}}
policy: {{target_epsilon: 80.0, target_delta: 1e-5}}
clients: [{clients}]
"""
ARGV = (
    *("task=digits", "batch_size=20", "accept_vacuous=true", "privacy=client_distributed", "run=spring"),
    *("privacy.allow_large_delta=true", "privacy.noise_multiplier=40", "privacy.target_epsilon=18"),
    *("num_rounds=1", "link.clients=1", "link.wait=3600", "link.deadline=600"),
)


def make_federation(folder: Path, names: Iterable[str] = NAMES, port: int = 8443) -> Path:
    listed = ", ".join(f"{{name: {name}}}" for name in names)
    text = FEDERATION.format(port=port, clients=listed, count=len(tuple(names)))
    (folder / "federation.yaml").write_text(text)
    return provision(folder / "federation.yaml", folder / "hearts").folder


@dataclass
class World(CLOCKS["World"]):
    """A federation whose devices start one by one, in folders that the desk does not write to."""

    def client(self, name: str, death: Iterable[object] = ()) -> None:
        self.clients[name] = self.start("client", "start", self.device(name), death=death)

    def device(self, name: str) -> Path:
        return self.hearts.parent / "devices" / name

    def come(self, names: Iterable[str]) -> None:
        for name in names:
            self.client(name)

    def state(self, name: str) -> str:
        health = read_health(self.device(name) / "state")
        return "" if health is None else health.state

    def connected(self) -> int:
        path = self.hearts / "server" / "status.json"
        clients = json.loads(path.read_text())["clients"] if path.exists() else []
        return sum(each["since"] is not None for each in clients)

    def following(self, names: Iterable[str], last: Rollover) -> list[str]:
        """Return those of the devices that have replaced their authority."""
        files = {name: self.device(name) / "state" / "rollovers.json" for name in names}
        return [name for name, each in files.items() if each.exists() and last.new in each.read_text()]

    def until(self, what: Any) -> None:
        SERVED["until"](what, lambda: str({name: self.state(name) for name in NAMES}))


@contextmanager
def world_in(folder: Path) -> Generator[World]:
    """Yield a federation without a device that runs; all processes have clocks that jump."""
    library, clocks = CLOCKS["compiled"](folder), folder / "clocks"
    clocks.mkdir()
    (clocks / "start").write_bytes(bytes(8))
    port = SERVED["free_port"]()
    made = make_federation(folder, port=port)
    shutil.copytree(made / "clients", folder / "devices")
    environment = {"LD_PRELOAD": str(library), "CLOCKS": str(clocks)}
    world = World(made, SERVED["starter_in"](environment), clocks=clocks)
    with SERVED["living"](world):
        yield world


def test_campaigns_federation_is_provisioned_rolls_over_and_begins(tmp_path: Path) -> None:
    """Devices of before and of after the rollover are read, and the server prepares its run."""
    names = NAMES[:5]
    hearts = make_federation(tmp_path, names)
    for folder in sorted((hearts / "clients").iterdir())[:2]:
        read_client_bundle(folder)
    last = roll_over(hearts, DAYS).authority.rollovers[-1]
    SERVED["begins"](hearts, ARGV)
    assert read_server_bundle(hearts / "server").rollovers == (last,)


@pytest.mark.campaign
def test_twenty_devices_follow_a_rollover_and_late_ones_wait(tmp_path: Path) -> None:
    with world_in(tmp_path) as world:
        server = world.start("server", world.hearts / "server", *ARGV)
        world.come(ONLINE)
        world.until(lambda: world.connected() == len(ONLINE) or not server.alive)
        assert server.alive, server.said

        # The operator's folder is the server's, so that the running server distributes the rollover at once.
        last = roll_over(world.hearts, DAYS).authority.rollovers[-1]
        world.until(lambda: world.following(ONLINE, last) == list(ONLINE))
        world.come(DURING)
        world.until(lambda: world.following(DURING, last) == list(DURING))
        assert world.following(LATE, last) == []

        # After the overlap the server shows the new certificate alone, to which the last three do not listen.
        past = (DAYS + 1) * DAY
        world.jump(past, server, *world.clients.values())
        world.jump(past)
        world.come(LATE)
        world.until(lambda: all("the authority was replaced" in world.state(name) for name in LATE))
        world.until(lambda: world.connected() == len(ONLINE + DURING) or not server.alive)
        assert server.alive, server.said
        file = world.hearts / "server" / "rollovers.json"
        for name in LATE:
            argv = ("client", "authority", world.device(name), "--rollover", file)
            refused = world.start(*argv)
            assert refused.wait() == 2 and "has ended its overlap" in refused.said, refused.said
            assert name not in world.following(LATE, last)
            approved = world.start(*argv, "--approve", new_fingerprint(last))
            assert approved.wait() == 0, approved.said
        assert server.wait() == 0, server.said

        run = world.hearts / "server" / "runs" / "spring"
        for key in (last.old, last.new, file):
            verified = world.start("verify", run, "--key", key)
            assert verified.wait() == 0, verified.said
            assert "20 of 20 members have signed" in " ".join(verified.said.split())
