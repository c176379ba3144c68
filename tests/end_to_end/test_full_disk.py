"""A disk that is full at any write of a run, a server or a device: nothing is lost, one sentence says so, and it goes on."""

import errno
import json
import logging
import os
import resource
import runpy
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from shared.runs import run_quietly

from fedveil.__main__ import FAILED, run
from fedveil.base.durable_files import append_line, replace_file
from fedveil.base.refusal import Refusal, disk_failed
from fedveil.configs.bundle_files import read_file
from fedveil.deployment.device.ledger_heads import LedgerHeads, store_heads
from fedveil.links.grpc.grid import read_acknowledged
from fedveil.privacy.budget import Budget
from fedveil.privacy.ledger.caps import read_caps
from fedveil.privacy.ledger.data_sets import read_data_sets
from fedveil.privacy.ledger.hash_chain import refusing_ledger
from fedveil.privacy.ledger.ledger import Ledger, read_entries, verify
from fedveil.run.log_file import LogFile
from fedveil.run.manifest import read_manifest
from fedveil.run.run_files import read_object

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm")

FAULTS = Path(__file__).parents[1] / "faults"
failing = runpy.run_path(str(FAULTS / "failing_files.py"))["failing"]
MADE = runpy.run_path(str(FAULTS / "devices.py"))
Devices, device_of, masked_sum = MADE["Devices"], MADE["device_of"], MADE["masked_sum"]
ROUNDS = 3
ASKED = (
    "task=digits",
    "task.num_clients=20",
    f"num_rounds={ROUNDS}",
    "batch_size=40",
    "cohort.rate=0.4",
    "privacy.noise_multiplier=1",
    "privacy.target_epsilon=null",
    "privacy.allow_large_delta=true",
    "audit.on_alarm=stop",
)


def open_record_ledger(path: Path) -> Ledger:
    return Ledger.open(path, Budget("record", 1.0, 1e-6), owner="clinic", simulated=False)


def begin(folder: Path) -> int:
    return run_quietly(ASKED, folder).exit_code


def resume(folder: Path) -> int:
    return run_quietly([f"resume={folder}"], folder).exit_code


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[str]]]:
    """Return the folder of a run that nothing happens to, and the names of the files that it wrote, in their order."""
    folder = tmp_path_factory.mktemp("calm") / "run"
    folder.mkdir()
    with failing(folder) as disk:
        assert begin(folder) == 0
    yield folder, disk.names


def goes_on(folder: Path, full: range, calm: Path) -> None:
    """Let the disk be full for these writes, make room, and go on; the run is to be the same as without."""
    folder.mkdir()
    with failing(folder, full):
        try:
            code = begin(folder)
        except Refusal:  # before the first round
            code = None
    ledger = folder / "ledger"
    before = [entry.key for entry in read_entries(ledger)] if ledger.exists() else []
    if code is None:
        assert not before or not (folder / "checkpoint.safetensors").exists()
        return
    assert code == 0 or resume(folder) == 0
    assert (folder / "model.safetensors").read_bytes() == (calm / "model.safetensors").read_bytes()
    assert (folder / "metrics.jsonl").read_text() == (calm / "metrics.jsonl").read_text()
    assert not json.loads((folder / "result.json").read_text())["audit"]["alarms"]
    assert verify(ledger).ok and [entry.key for entry in read_entries(ledger)][: len(before)] == before


# Of a file's writes, those before the first round, and the first of round 2.
BEFORE, SECOND = (
    {"clients.log": 1, ".metrics.jsonl.new": 1},
    {"metrics.jsonl": 2, ".checkpoint.safetensors.new": 4},
)


@pytest.mark.parametrize(
    ("name", "count", "lasts"),
    [*((*each, 1) for each in (BEFORE | SECOND).items()), *((*each, 1000) for each in SECOND.items())],
)
def test_run_on_a_full_disk_goes_on_as_before(
    tmp_path: Path, calm: tuple[Path, list[str]], name: str, count: int, lasts: int
) -> None:
    """What an audit remembers of a round that is not kept is not kept either: else it would see the round twice."""
    folder, names = calm
    first = [number for number, each in enumerate(names, 1) if each == name][count - 1]
    goes_on(tmp_path / "run", range(first, first + lasts), folder)


@pytest.mark.campaign
@pytest.mark.parametrize("lasts", [1, 1000])
def test_run_with_a_disk_full_at_any_write_goes_on(
    tmp_path: Path, calm: tuple[Path, list[str]], lasts: int
) -> None:
    folder, names = calm
    for first in range(1, len(names) + 1):
        goes_on(tmp_path / str(first), range(first, first + lasts), folder)


def test_a_file_that_did_not_fit_takes_no_room(tmp_path: Path) -> None:
    """What was written of it would leave no room for a ledger's next line, which is all that a device needs."""

    def parts() -> Iterator[bytes]:
        yield bytes(1 << 20)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "held").write_bytes(b"before")
    with pytest.raises(OSError, match="No space"):
        replace_file(tmp_path / "held", parts(), flush=False)
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [("held", b"before")]


def test_a_line_that_was_cut_short_takes_no_other_with_it(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    for number in range(2):
        append_line(path, {"number": number})
    path.write_bytes(path.read_bytes()[:-5])
    for number in range(2, 4):
        append_line(path, {"number": number})
    whole = [line for line in path.read_text().splitlines() if line.endswith("}")]
    assert [json.loads(line)["number"] for line in whole] == [0, 2, 3]


# --- a device in an encrypted sum


@pytest.fixture(scope="module")
def provisioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MADE["make_federation"](tmp_path_factory.mktemp("devices")) / "clients"


def spent_on(bundle: Path) -> list[str]:
    """Return the rounds that stand on a device's own ledger, which is to be whole."""
    found: list[str] = []
    for ledger in (bundle / "state" / "ledgers").glob("*.ledger"):
        assert verify(ledger).ok
        found += [entry.key for entry in read_entries(ledger) if entry.kind == "reserve"]
    return found


def devices_in(clients: Path) -> Any:
    return Devices({number + 2: device_of(clients / f"c{number}") for number in range(5)})


def writes_of_a_round(clients: Path, bundle: Path, full: range = range(0)) -> tuple[int, int]:
    """Let five devices sum one round while the disk of one is full at these writes; return survivors, and its writes."""
    grid = devices_in(clients)
    with failing(bundle, full) as disk:
        opened = masked_sum(grid)
    return opened.survivors, disk.writes


def a_device_goes_on(clients: Path, folder: Path, full: range) -> None:
    made = Path(shutil.copytree(clients, folder))
    bundle = made / "c0"
    survivors, _ = writes_of_a_round(made, bundle, full)
    paid = spent_on(bundle)
    assert survivors >= 4 and len(paid) <= 1
    assert survivors == 4 or len(paid) == 1  # nothing is added that was not paid for
    assert masked_sum(devices_in(made), 2).survivors == 5
    assert len(spent_on(bundle)) == len(paid) + 1


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_device_with_a_full_disk_loses_a_round_at_most_and_says_so(
    tmp_path: Path, provisioned: Path, share: float, caplog: pytest.LogCaptureFixture
) -> None:
    made = Path(shutil.copytree(provisioned, tmp_path / "counted"))
    survivors, writes = writes_of_a_round(made, made / "c0")
    assert survivors == 5
    first = 1 + int(share * writes)
    a_device_goes_on(provisioned, tmp_path / "full", range(first, first + 1))
    said = [each for each in caplog.records if each.name == "fedveil.client"]
    assert said and not any(each.exc_info for each in said)


def test_command_on_a_full_disk_fails_in_a_sentence_and_not_for_good(
    tmp_path: Path, provisioned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A unit starts what has failed again, and leaves alone what was refused."""
    bundle = Path(shutil.copytree(provisioned / "c0", tmp_path / "device"))
    with failing(bundle, range(1, 1000)):
        assert run(["client", "start", str(bundle)]) == FAILED
    said = capsys.readouterr().err
    assert "No space left on device" in said and len(said.splitlines()) == 1


def test_a_ledger_on_a_full_disk_is_not_called_damaged(tmp_path: Path) -> None:
    full = sqlite3.OperationalError("database or disk is full")
    full.sqlite_errorcode = sqlite3.SQLITE_FULL
    with (
        pytest.raises(Refusal, match="make room on its disk") as raised,
        refusing_ledger(tmp_path, "is damaged"),
    ):
        raise full
    assert "damaged" not in str(raised.value) and disk_failed(raised.value)
    with pytest.raises(Refusal, match="is damaged") as raised, refusing_ledger(tmp_path, "is damaged"):
        raise sqlite3.DatabaseError("file is not a database")
    assert not disk_failed(raised.value)


@contextmanager
def files_left(count: int) -> Iterator[None]:
    """Leave this process so many files that it may still open."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    taken: list[int] = []
    try:
        with suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(count):
            os.close(taken.pop())
        yield
    finally:
        for each in taken:
            os.close(each)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def told_of(reader: Callable[[Path], object], path: Path) -> str:
    """Return the sentence of a refusal that a unit tries again, and that takes no file for damaged."""
    with pytest.raises(Refusal) as raised:
        reader(path)
    assert disk_failed(raised.value), raised.value
    assert not {"restore", "damaged", "permissions", "forget"} & set(str(raised.value).split()), raised.value
    return str(raised.value)


@pytest.mark.parametrize("left", range(5))
def test_a_process_without_open_files_takes_no_ledger_for_damaged(tmp_path: Path, left: int) -> None:
    path = tmp_path / "ledger"
    open_record_ledger(path).close()
    with files_left(left):
        assert "raise the limit of open files" in told_of(open_record_ledger, path)
    open_record_ledger(path).close()


READERS: list[tuple[str, Callable[[Path], object]]] = [
    ("caps.json", lambda path: read_caps(path.parent)),
    ("data_sets.json", lambda path: read_data_sets(path.parent)),
    ("manifest.json", lambda path: read_manifest(path.parent)),
    ("result.json", read_object),
    ("heads.json", lambda path: LedgerHeads(path.parent)),
    ("receipts/run.json", lambda path: LedgerHeads(path.parent.parent)),
    ("acknowledged.json", read_acknowledged),
    ("policy.toml", read_file),
]


@pytest.mark.parametrize(("name", "reader"), READERS, ids=[name for name, _ in READERS])
def test_a_process_without_open_files_takes_no_file_for_damaged(
    tmp_path: Path, name: str, reader: Callable[[Path], object]
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("{}")
    path.chmod(0o600)
    with files_left(0):
        assert "raise the limit of open files" in told_of(reader, path)


@pytest.mark.parametrize("code", [errno.EMFILE, errno.EIO])
def test_unreadable_receipt_is_no_receipt_without_knowledge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fail(path: Path) -> bytes:
        raise OSError(code, os.strerror(code), str(path))

    (tmp_path / "receipts").mkdir()
    (tmp_path / "receipts" / "run.json").write_text("{}")
    LedgerHeads(tmp_path)
    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(Refusal) as raised:
        LedgerHeads(tmp_path)
    assert disk_failed(raised.value)


@pytest.mark.parametrize("code", [errno.EMFILE, errno.EIO])
def test_a_ledger_that_cannot_be_reached_now_costs_its_owner_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    (tmp_path / "ledgers").mkdir()
    path = tmp_path / "ledgers" / "x.ledger"
    open_record_ledger(path).close()
    store_heads(tmp_path)
    monkeypatch.setattr("fedveil.privacy.ledger.hash_chain.os.lstat", fail)
    told_of(lambda folder: LedgerHeads(folder).require(), tmp_path)


def test_a_ledger_that_another_program_holds_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedveil.privacy.ledger.hash_chain.BUSY_SECONDS", 0.01)
    path = tmp_path / "ledger"
    open_record_ledger(path).close()
    with closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert "wait for the program" in told_of(open_record_ledger, path)


def test_log_on_a_full_disk_loses_its_lines_silently(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = LogFile(tmp_path / "log")
    assert handler.stream is not None
    handler.stream.close()
    handler.stream = os.fdopen(os.open("/dev/full", os.O_WRONLY), "w")
    handler.emit(logging.LogRecord("x", logging.INFO, "", 0, "lost", None, None))
    handler.close()
    assert capsys.readouterr().err == ""


@pytest.mark.campaign
@pytest.mark.parametrize("lasts", [1, 1000])
def test_device_with_a_disk_full_at_any_write_loses_a_round_at_most(
    tmp_path: Path, provisioned: Path, lasts: int
) -> None:
    made = Path(shutil.copytree(provisioned, tmp_path / "counted"))
    _, writes = writes_of_a_round(made, made / "c0")
    for first in range(1, writes + 1):
        a_device_goes_on(provisioned, tmp_path / str(first), range(first, first + lasts))
