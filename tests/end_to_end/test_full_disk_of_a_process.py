"""Disks that are full under the processes of a federation: `fedveil server`, and `fedveil client start`, on a tmpfs each.

Figures for docs/evidence/reliability.md. Linux, as root. `end_to_end/test_full_disk.py` fails single writes within one process.
"""

import json
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from dp_accounting import GaussianDpEvent

from fedveil.__main__ import run
from fedveil.base.refusal import Refusal, disk_failed
from fedveil.privacy.budget import Budget, Release
from fedveil.privacy.ledger.ledger import Ledger
from fedveil.server.checkpoint import read

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm")

FAULTS = Path(__file__).parents[1] / "faults"
SERVED = runpy.run_path(str(FAULTS / "served.py"))
DEVICES = runpy.run_path(str(FAULTS / "devices.py"))
RULES = runpy.run_path(str(FAULTS / "federation_rules.py"))
PAGE, DISK_MEBIBYTES, DISK_NAMES = 4096, 16, 4096
# errno and calls of sick_disk.c: syncs fail, everything fails, and mounted anew by the kernel after an error.
CALLS = {"syncs": "5 S", "gone": "5 OWSR", "read-only": "30 OWR"}
HOW = ("names", "read-only")
REMEDY = {"names": "make room on its disk", "read-only": "mount its disk for writing"}
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

    def fill_names(self) -> None:
        """Take all inodes; there is room for bytes."""
        names = self.folder / "names"
        names.mkdir()
        with suppress(OSError):
            for number in count():
                (names / str(number)).touch()

    def clear_names(self) -> None:
        shutil.rmtree(self.folder / "names")

    def remount(self, access: str) -> None:
        """Mount it read-only, `ro`, or for writing, `rw`; no process has a file of it open for writing."""
        subprocess.run(["mount", "-o", f"remount,{access}", self.folder], check=True)

    def fail(self, how: str) -> None:
        """Let it fail, `names` or `read-only`."""
        self.fill_names() if how == "names" else self.remount("ro")

    def mend(self, how: str) -> None:
        self.clear_names() if how == "names" else self.remount("rw")


@contextmanager
def disks() -> Iterator[Callable[[Path], Disk]]:
    """Give a function that puts a new disk under a folder; whatever uses one has ended at the end of the block."""
    if sys.platform != "linux" or os.geteuid():
        pytest.skip("mounts a tmpfs, as root on Linux")
    mounted: list[Path] = []

    def mount(folder: Path) -> Disk:
        options = f"size={DISK_MEBIBYTES}m,nr_inodes={DISK_NAMES},mode=700"
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

    @contextmanager
    def faulty(self, how: str, folder: Path, process: Any) -> Iterator[None]:
        """Let a process meet a fault in the block: no open file is left, or its disk fails with an errno at such calls."""
        if how == "files":
            limits = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
            opened = len(os.listdir(f"/proc/{process.pid}/fd"))
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (opened, limits[1]))
            yield
            with suppress(ProcessLookupError):  # it has ended
                resource.prlimit(process.pid, resource.RLIMIT_NOFILE, limits)
            return
        fault = folder.with_name(f"{folder.name}.fault")
        fault.write_text(CALLS[how])
        yield
        fault.unlink()

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


@pytest.mark.parametrize("how", HOW)
def test_a_ledger_on_a_disk_that_takes_no_file_is_not_called_damaged(tmp_path: Path, how: str) -> None:
    def entries(path: Path) -> int:
        with Ledger.open(path, Budget("record", 1.0, 1e-6), owner="clinic", simulated=False) as ledger:
            release = Release(
                "record", "run", ledger.head.seq, "mean", {"model": GaussianDpEvent(50.0)}, "system"
            )
            return ledger.reserve_new(release).seq

    with disks() as mount:
        disk = mount(tmp_path)
        before = entries(tmp_path / "ledger")
        disk.fail(how)
        for name in ("ledger", "new"):
            with pytest.raises(Refusal, match=REMEDY[how]) as raised:
                entries(tmp_path / name)
            assert disk_failed(raised.value)
            assert not {"restore", "damaged", "permissions"} & set(str(raised.value).split())
        disk.mend(how)
        assert entries(tmp_path / "ledger") > before and entries(tmp_path / "new")


@pytest.mark.parametrize("how", HOW)
def test_device_without_room_for_a_file_is_missed_and_comes_back(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    clients = DEVICES["make_federation"](tmp_path) / "clients"
    state = clients / "c0" / "state"
    state.mkdir(mode=0o700)
    grid = DEVICES["Devices"](
        {number + 2: DEVICES["device_of"](clients / f"c{number}") for number in range(5)}
    )
    with disks() as mount:
        disk = mount(state)
        assert DEVICES["masked_sum"](grid, 1).survivors == 5
        disk.fail(how)
        assert DEVICES["masked_sum"](grid, 2).survivors == 4
        said = [each for each in caplog.records if each.name == "fedveil.client"]
        assert any(REMEDY[how] in each.getMessage() for each in said)
        assert not any(each.exc_info or "restore" in each.getMessage() for each in said)
        disk.mend(how)
        assert DEVICES["masked_sum"](grid, 3).survivors == 5


@pytest.mark.parametrize("how", HOW)
def test_command_on_a_disk_without_room_fails_and_not_for_good(
    tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = DEVICES["make_federation"](tmp_path) / "clients" / "c0"
    state = bundle / "state"
    state.mkdir(mode=0o700)
    with disks() as mount:
        disk = mount(state)
        disk.fail(how)
        assert run(["client", "start", str(bundle)]) == FAILED
        said = capsys.readouterr().err
        disk.mend(how)
    assert REMEDY[how] in said and len(said.splitlines()) == 1 and "restore" not in said


def test_a_federation_of_the_campaign_is_provisioned_and_begins(tmp_path: Path) -> None:
    SERVED["begins"](SERVED["make_federation"](tmp_path), [*ARGV, f"num_rounds={ROUNDS}", "run=run"])


@pytest.mark.campaign
@pytest.mark.parametrize("left", [0, 1, 3])
def test_server_on_a_full_disk_says_so_and_starts_once_there_is_room(tmp_path: Path, left: int) -> None:
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
def test_server_with_a_filling_disk_ends_and_goes_on_with_room(
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
def test_device_with_a_filling_disk_is_missed_and_comes_back(tmp_path: Path) -> None:
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


@contextmanager
def world_on_a_sick_disk(folder: Path, sick: str) -> Iterator[World]:
    """Serve a federation of which one folder lies on a disk that can be made to fail."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler on Linux")
    library = folder / "sick_disk.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", library, FAULTS / "sick_disk.c", "-ldl"]
    subprocess.run(command, check=True)
    environment = {"LD_PRELOAD": str(library), "SICK": str(folder / "hearts" / sick)}
    with SERVED["serving"](World, folder, environment=environment) as world:
        yield world


@pytest.mark.campaign
@pytest.mark.parametrize("how", ["files", *CALLS])
def test_device_with_a_gone_disk_is_missed_until_mended(tmp_path: Path, how: str) -> None:
    sick = f"clients/{VICTIM}/state"
    with world_on_a_sick_disk(tmp_path, sick) as world:
        server, victim = world.server("run", MANY), world.clients[VICTIM]

        def comes(replies: int) -> None:
            before = len(world.rows("run"))
            until(
                lambda: replies in [row["replies"] for row in world.rows("run")[before:]] or not server.alive,
                server,
            )
            assert server.alive, server.said

        comes(CLIENTS)
        with world.faulty(how, world.hearts / sick, victim):
            comes(CLIENTS - 1)
            paid = RULES["entries_of"](world.hearts)
            comes(CLIENTS - 1)
        comes(CLIENTS)
        now = RULES["entries_of"](world.hearts)
        assert all(now[path][: len(known)] == known for path, known in paid.items())
        assert victim.alive and server.kill(signal.SIGTERM) == INTERRUPTED
        print(json.dumps([how, victim.said.splitlines()]), flush=True)
        assert "Traceback" not in victim.said and "restore" not in victim.said, victim.said
        assert not wrongs(world, "run", MANY, 0, [], {})


@pytest.mark.campaign
@pytest.mark.parametrize("how", ["files", *CALLS])
def test_server_with_a_gone_disk_ends_and_goes_on_once_mended(tmp_path: Path, how: str) -> None:
    with world_on_a_sick_disk(tmp_path, "server") as world:
        folder = world.hearts / "server"
        server = world.server("run", ROUNDS)
        until(lambda: len(world.rows("run")) >= 2 or not server.alive, server)
        assert server.alive, server.said
        with world.faulty(how, folder, server):
            assert server.wait() == FAILED, server.said
            if how != "files":
                again = world.server("run", ROUNDS)
                assert again.wait() == FAILED, again.said  # a unit tries it again
        print(json.dumps([how, server.said.splitlines()[-1]]), flush=True)
        assert "Traceback" not in server.said and "restore" not in server.said, server.said
        saved, paid = read(folder / "runs" / "run"), RULES["entries_of"](world.hearts)
        before = world.rows("run")[: saved.state.round if saved else 0]
        last = world.server("run", ROUNDS)
        assert last.wait() == 0, last.said
        assert not wrongs(world, "run", ROUNDS, 1, before, paid)
