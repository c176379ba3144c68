"""Servers, devices and ledgers that are restored from older copies, deleted or copied, as real processes."""

import json
import re
import runpy
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedveil.deployment.device.device_ledger import epsilon_of
from fedveil.privacy.ledger.ledger import read_entries

SERVED = runpy.run_path(str(Path(__file__).parents[1] / "faults" / "served.py"))
until = SERVED["until"]


class World(SERVED["Served"]):
    """A federation whose runs hide clients, one round each."""

    target = 4

    @property
    def folder(self) -> Path:
        return self.hearts / "server"

    def device(self, name: str) -> Path:
        return self.hearts / "clients" / name

    def server(self, run: str, clients: float = 1.0) -> Any:
        self.target += 2
        privacy = (
            "privacy=client_central",
            "privacy.allow_large_delta=true",
            f"privacy.target_epsilon={self.target}",
        )
        link = (f"link.clients={clients}", "link.wait=600", "link.deadline=120", "link.patience=2")
        common = ("task=digits", "batch_size=40", "accept_vacuous=true", "num_rounds=1", f"run={run}")
        return self.start("server", self.folder, *common, *privacy, *link)

    def done(self, run: str, clients: float = 1.0) -> dict[str, Any]:
        server = self.server(run, clients)
        assert server.wait() == 0, server.said
        rows = (self.folder / "runs" / run / "operator.jsonl").read_text().splitlines()
        return next(row for row in map(json.loads, rows) if "round" in row)

    def health(self, name: str) -> str:
        return json.loads((self.device(name) / "state" / "health.json").read_text())["state"]

    def charges(self) -> int:
        (path,) = (self.folder / "ledgers").glob("*.ledger")
        return sum(each.kind == "reserve" for each in read_entries(path))

    def said(self, *argv: object) -> str:
        command = self.start(*argv)
        command.wait()
        return command.said


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Two runs, with copies of a device and of the server between them."""
    with SERVED["serving"](World, tmp_path_factory.mktemp("world")) as made:
        assert made.done("first")["replies"] == 5
        made.clients["boston"].kill(signal.SIGTERM)
        shutil.copytree(made.device("boston"), made.hearts / "kept" / "boston")
        shutil.copytree(made.folder, made.hearts / "kept" / "server", ignore=shutil.ignore_patterns("*.lock"))
        shutil.copytree(made.device("hungary"), made.hearts / "kept" / "hungary")
        made.client("boston")
        assert made.done("second")["replies"] == 5
        yield made


@pytest.mark.parametrize("harm", ["deleted", "rolled back"])
def test_device_with_an_older_ledger_says_so_to_its_owner(world: World, harm: str) -> None:
    hungary = world.device("hungary")
    (ledger,) = (hungary / "state" / "ledgers").glob("client-*.ledger")
    world.clients["hungary"].kill(signal.SIGTERM)
    newest = ledger.read_bytes()
    earlier = (world.hearts / "kept" / ledger.relative_to(world.hearts / "clients")).read_bytes()
    ledger.unlink() if harm == "deleted" else ledger.write_bytes(earlier)
    refused = world.start("client", "start", hungary)
    assert refused.wait() == 2 and "fedveil client forget FOLDER --restored" in refused.said, refused.said
    assert ledger.exists() == (harm != "deleted")
    ledger.write_bytes(newest)
    world.client("hungary")


@pytest.mark.parametrize("harm", ["deleted", "rolled back"])
def test_server_with_a_ledger_older_than_its_runs_is_refused(world: World, harm: str) -> None:
    (ledger,) = (world.folder / "ledgers").glob("*.ledger")
    newest, earlier = (
        ledger.read_bytes(),
        (world.hearts / "kept" / ledger.relative_to(world.hearts)).read_bytes(),
    )
    ledger.unlink() if harm == "deleted" else ledger.write_bytes(earlier)
    refused = world.server("refused")
    assert refused.wait() == 2 and "which run second left" in refused.said, refused.said
    assert ledger.exists() == (harm != "deleted") and not (world.folder / "runs" / "refused").exists()
    ledger.write_bytes(newest)


def test_restored_device_refuses_until_its_owner_pays(world: World) -> None:
    boston = world.device("boston")
    world.clients["boston"].kill(signal.SIGTERM)
    shutil.rmtree(boston)
    shutil.copytree(world.hearts / "kept" / "boston", boston)
    world.client("boston")
    (ledger,) = (boston / "state" / "ledgers").glob("client-*.ledger")
    before = ledger.read_bytes()
    row = world.done("third", clients=0.8)
    assert row["replies"] == 4 and ledger.read_bytes() == before
    assert "restored or copied" in world.said("server", "status", world.folder)
    assert "forget FOLDER --restored" in world.health("boston")
    world.clients["boston"].kill(signal.SIGTERM)

    spent = epsilon_of(ledger)
    said = world.said("client", "forget", boston, "--restored")
    assert "all of its budget, epsilon 80" in said, said
    after = epsilon_of(ledger)
    assert spent is not None and after is not None and spent[0] < 80 < after[0]
    policy = boston / "policy.toml"
    policy.write_text(re.sub(r"target_epsilon = .*", "target_epsilon = 2000.0", policy.read_text()))
    world.client("boston")
    assert world.done("fourth")["replies"] == 5
    assert "restored" not in world.said("server", "status", world.folder)


def test_restored_server_ends_with_the_reason_before_a_second_charge(world: World) -> None:
    newest = world.hearts / "newest"
    shutil.move(world.folder, newest)
    shutil.copytree(world.hearts / "kept" / "server", world.folder)
    before = world.charges()
    server = world.server("again")
    assert server.wait() == 1 and "restored from an older copy" in server.said, server.said
    charged = world.charges()
    assert charged <= before + 1
    world.target -= 2  # the same command
    server = world.server("again")
    assert server.wait() == 2 and "restored from an older copy" in server.said, server.said
    assert world.charges() == charged

    shutil.rmtree(world.folder)
    shutil.move(newest, world.folder)
    assert world.done("found")["replies"] == 5
