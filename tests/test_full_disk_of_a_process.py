"""Disks that are full under the processes of a federation: `fedveil server`, and `fedveil client start`, on a tmpfs each.

Figures for docs/evidence/reliability.md. Linux, as root. `test_full_disk.py` fails single writes within one process.
"""

import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedveil.server.checkpoint import read

FAULTS = Path(__file__).parent / "faults"
SERVED = runpy.run_path(str(FAULTS / "served.py"))
RULES = runpy.run_path(str(FAULTS / "federation_rules.py"))
PAGE, DISK_MEBIBYTES = 4096, 16
LEFT = (0, 1, 2, 3, 5, 8, 13, 21)  # pages: another write of a round is the first without room
ROUNDS, MANY, CLIENTS, VICTIM = 8, 400, 5, "boston"
FAILED, INTERRUPTED = 1, 130  # exit codes
EPSILON, OWNERS_EPSILON = 18.0, 20.0
ARGV = (
    *("task=digits", "batch_size=40", "accept_vacuous=true", "privacy=client_distributed"),
    *("privacy.allow_large_delta=true", "privacy.noise_multiplier=40", f"privacy.target_epsilon={EPSILON}"),
    *("link.clients=1", "link.wait=60", "link.deadline=20"),
)


@dataclass
class Disk:
    """A disk on which a folder lies."""

    folder: Path

    @property
    def ballast(self) -> Path:
        return self.folder / "ballast"

    def fill(self, left: int) -> None:
        """Take all room but for so many pages."""
        with self.ballast.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(PAGE))
        os.truncate(self.ballast, max(0, self.ballast.stat().st_size - left * PAGE))

    def clear(self) -> None:
        self.ballast.unlink()


@contextmanager
def disks() -> Iterator[Callable[[Path], Disk]]:
    """Give a function that puts a new disk under a folder; whatever uses one has ended at the end of the block."""
    if sys.platform != "linux" or os.geteuid():
        pytest.skip("mounts a tmpfs, as root on Linux")
    mounted: list[Path] = []

    def mount(folder: Path) -> Disk:
        options = f"size={DISK_MEBIBYTES}m,mode=700"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
        done = subprocess.run(command, capture_output=True, check=False)
        if done.returncode:
            pytest.skip("cannot mount a tmpfs")
        mounted.append(folder)
        return Disk(folder)

    try:
        yield mount
    finally:
        for folder in mounted:
            subprocess.run(["umount", "-l", folder], check=True)


@dataclass
class World(SERVED["Served"]):
    """A federation, whose victim keeps its state on a disk of its own where one is given."""

    mount: Callable[[Path], Disk] | None = None
    disk: Disk | None = None

    def client(self, name: str, death: Any = ()) -> None:
        if name == VICTIM and self.mount is not None and self.disk is None:
            state = self.hearts / "clients" / name / "state"
            state.mkdir(mode=0o700)
            self.disk = self.mount(state)
        super().client(name, death)

    def server(self, run: str, rounds: int) -> Any:
        return self.start("server", self.hearts / "server", *ARGV, f"num_rounds={rounds}", f"run={run}")

    def rows(self, run: str) -> list[dict[str, Any]]:
        return RULES["rows_of"](self.hearts / "server" / "runs" / run)


def until(true: Callable[[], object], server: Any) -> None:
    SERVED["until"](true, lambda: server.said)


def wrongs(world: World, run: str, rounds: int, kills: int, before: list[Any], paid: Any) -> list[str]:
    found = RULES["Lived"](world.hearts, run, rounds, kills, before, paid)
    result = json.loads((found.folder / "result.json").read_text())
    return [*RULES["wrongs"](found, EPSILON, OWNERS_EPSILON), *map(str, result["audit"]["alarms"])]


def server_disk(world: World, mount: Callable[[Path], Disk]) -> Disk:
    """Put a disk under the server's bundle."""
    folder = world.hearts / "server"
    kept = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    disk = mount(folder)
    for name, data in kept.items():
        (folder / name).write_bytes(data)
        (folder / name).chmod(0o600)
    return disk


def test_a_federation_of_the_campaign_is_provisioned_and_begins(tmp_path: Path) -> None:
    SERVED["begins"](SERVED["make_federation"](tmp_path), [*ARGV, f"num_rounds={ROUNDS}", "run=run"])


@pytest.mark.campaign
@pytest.mark.parametrize("left", [0, 1, 3])
def test_a_server_that_starts_on_a_full_disk_says_so_and_starts_once_there_is_room(
    tmp_path: Path, left: int
) -> None:
    with disks() as mount, SERVED["serving"](World, tmp_path) as world:
        disk = server_disk(world, mount)
        disk.fill(left)
        server = world.server("run", 2)
        assert server.wait() == FAILED, server.said  # a unit tries it again
        assert "Traceback" not in server.said and "make room" in server.said, server.said
        assert not RULES["entries_of"](world.hearts)
        disk.clear()
        assert world.server("run", 2).wait() == 0
        assert not wrongs(world, "run", 2, 0, [], {})


@pytest.mark.campaign
def test_a_server_whose_disk_fills_up_ends_in_a_sentence_and_goes_on_once_there_is_room(
    tmp_path: Path,
) -> None:
    told: list[tuple[int, int, str]] = []
    with disks() as mount, SERVED["serving"](World, tmp_path) as world:
        folder, disk = world.hearts / "server", server_disk(world, mount)
        for left in LEFT:
            run = f"left-{left}"
            server = world.server(run, ROUNDS)
            until(lambda run=run, server=server: len(world.rows(run)) >= 2 or not server.alive, server)
            assert server.alive, server.said
            disk.fill(left)
            code = server.wait()
            told.append((left, code, server.said.strip().splitlines()[-1]))
            print(json.dumps(told[-1]), flush=True)
            assert "Traceback" not in server.said, server.said
            saved = read(folder / "runs" / run)  # a round is done once it is in the checkpoint
            before = world.rows(run)[: saved.state.round if saved else 0]
            paid = RULES["entries_of"](world.hearts)
            disk.clear()
            again = world.server(run, ROUNDS)
            assert again.wait() == 0, again.said
            assert not wrongs(world, run, ROUNDS, 1, before, paid)
    assert all(code == FAILED and "make room" in said for _, code, said in told)


@pytest.mark.campaign
def test_a_device_whose_disk_fills_up_is_missed_and_comes_back_once_there_is_room(tmp_path: Path) -> None:
    with disks() as mount:

        def kind(*given: Any) -> World:
            return World(*given, mount=mount)

        with SERVED["serving"](kind, tmp_path) as world:
            server = world.server("run", MANY)

            def comes(replies: int) -> int:
                """Wait for a round with so many replies after those that there are, and return how many it took."""
                before = len(world.rows("run"))

                def new() -> list[int]:
                    return [row["replies"] for row in world.rows("run")[before:]]

                until(lambda: replies in new() or not server.alive, server)
                assert server.alive, server.said
                return len(new())

            comes(CLIENTS)
            for left in LEFT:
                paid = RULES["entries_of"](world.hearts)
                world.disk.fill(left)
                rounds = comes(CLIENTS - 1)
                world.disk.clear()
                print(
                    json.dumps({"left": left, "rounds": rounds, "rounds after": comes(CLIENTS)}), flush=True
                )
                now = RULES["entries_of"](world.hearts)
                assert all(now[path][: len(known)] == known for path, known in paid.items())
            assert world.clients[VICTIM].alive
            assert server.kill(signal.SIGTERM) == INTERRUPTED
            said = world.clients[VICTIM].said
            assert "Traceback" not in said, said
            assert {row["replies"] for row in world.rows("run")} == {CLIENTS, CLIENTS - 1}
            assert not wrongs(world, "run", MANY, 0, [], {})
