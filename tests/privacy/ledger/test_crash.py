"""The ledger under what only real processes show: two at once, sudden death, disks that fail."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading

import pytest
from dp_accounting import GaussianDpEvent

from fedveil.base.refusal import Refusal
from fedveil.privacy.accounting.epsilon import epsilon, within
from fedveil.privacy.budget import Adversary, Budget, Release, Unit
from fedveil.privacy.ledger.ledger import BudgetExhausted, Ledger, ReleaseState, read_entries, verify

BUDGET = Budget(Unit.CLIENT, target_epsilon=1.0, target_delta=1e-5)
EVENT = GaussianDpEvent(10.0)
AFFORDABLE = next(n for n in range(1, 100) if not within({EVENT: n + 1}, BUDGET))

PRELUDE = """
import os, random, select, signal, sys, time
from dp_accounting import GaussianDpEvent
from fedveil.privacy.budget import Adversary, Budget, Release, Unit
from fedveil.privacy.ledger.ledger import BudgetExhausted, Ledger, LedgerUnavailable
from fedveil.base.refusal import Refusal

path, name = sys.argv[1:3]
budget = Budget(Unit.CLIENT, target_epsilon=1.0, target_delta=1e-5)

def opened(**more):
    return Ledger.open(path, budget, owner="population", simulated=False, **more)

def release(number, noise=10.0):
    events = {Adversary.MODEL: GaussianDpEvent(noise)}
    return Release(Unit.CLIENT, name, number, "update", events, "system")
"""


def opened(path, **more):
    return Ledger.open(path, BUDGET, owner="population", simulated=False, **more)


def release(number, event=EVENT, run="a"):
    return Release(Unit.CLIENT, run, number, "update", {Adversary.MODEL: event}, "system")


@contextlib.contextmanager
def running(path, script, name="a", before=()):
    command = [*before, sys.executable, "-c", PRELUDE + script, str(path), name]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def run(path, script, name="a", before=(), timeout=600):
    """What the script printed, and its exit status."""
    with running(path, script, name, before) as process:
        output, _ = process.communicate(timeout=timeout)
    return output.split(), process.returncode


SUICIDE = """
ledger = opened()
for number in (1, 2):
    ledger.reserve(release(number))
ledger.commit(release(1).key, durable=False)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_kill_right_after_reserve_leaves_it_spent(tmp_path):
    path = tmp_path / "ledger"
    assert run(path, SUICIDE) == ([], -signal.SIGKILL)
    with opened(path) as ledger:
        assert ledger.state(release(1).key) is ledger.state(release(2).key) is ReleaseState.RESERVED
        assert ledger.epsilon() == epsilon([EVENT, EVENT], BUDGET.target_delta)
        ledger.reserve(release(2))
        assert ledger.epsilon() == epsilon([EVENT, EVENT], BUDGET.target_delta)


def test_a_second_process_is_refused_with_the_pid_of_the_first(tmp_path):
    path = tmp_path / "ledger"
    with running(path, "with opened():\n    print('open', flush=True)\n    input()\n") as process:
        assert process.stdout.readline() == "open\n"
        with pytest.raises(Refusal, match=f"in use by process {process.pid};") as caught:
            opened(path)
        assert caught.value.field == "ledger"
        with pytest.raises(Refusal, match="in use"):
            opened(path, wait=0.1)
        assert verify(path).ok
        later = threading.Timer(0.2, lambda: process.communicate("\n"))
        later.start()
        with opened(path, wait=60.0) as ledger:
            assert ledger.head.seq == 1
            with pytest.raises(Refusal, match=f"in use by process {os.getpid()};"):
                opened(path)
        later.join()


RACE = """
kept = []
for number in range(30):
    try:
        with opened(wait=60.0) as ledger:
            ledger.reserve(release(number))
            kept.append(number)
    except BudgetExhausted:
        pass
print(len(kept))
"""


def test_two_racing_writers_never_exceed_the_budget_together(tmp_path):
    path = tmp_path / "ledger"
    with running(path, RACE, "a") as first, running(path, RACE, "b") as second:
        kept = [int(process.communicate(timeout=600)[0]) for process in (first, second)]
    assert sum(kept) == AFFORDABLE
    assert [entry.kind for entry in read_entries(path)] == ["open"] + ["reserve"] * AFFORDABLE
    found = verify(path)
    assert found.ok and found.epsilon <= BUDGET.target_epsilon


def test_writers_that_the_lock_does_not_part_still_share_one_budget(tmp_path, monkeypatch):
    """As on a file system where flock is a promise that nobody keeps."""
    monkeypatch.setattr("fcntl.flock", lambda *_: None)
    path = tmp_path / "ledger"
    first, second = opened(path, durable=False), opened(path, durable=False)
    kept = 0
    for number in range(AFFORDABLE):
        for ledger, run in ((first, "a"), (second, "b")):
            try:
                ledger.reserve(release(number, run=run))
                ledger.commit(release(number, run=run).key, durable=False)
                kept += 1
            except BudgetExhausted:
                pass
    assert kept == AFFORDABLE
    assert second.state(release(0, run="a").key) is not None
    first.commit(release(1, run="a").key)
    with pytest.raises(Refusal, match="was committed"):
        second.void(release(1, run="a").key, "as far as this process knows")
    first.close()
    second.close()
    assert verify(path).ok
    with opened(path) as ledger:
        assert ledger.epsilon() == epsilon({EVENT: AFFORDABLE}, BUDGET.target_delta)


def test_threads_share_one_budget(tmp_path):
    kept = []

    def spend(run):
        for number in range(AFFORDABLE):
            try:
                ledger.reserve(release(number, run=run))
                kept.append(number)
            except BudgetExhausted:
                pass

    with opened(tmp_path / "ledger", durable=False) as ledger:
        threads = [threading.Thread(target=spend, args=(run,)) for run in "abc"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(kept) == AFFORDABLE
    assert verify(tmp_path / "ledger").ok


FORKED = """
ledger = opened()
ledger.reserve(release(1))
child = os.fork()
if child:
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGKILL)
try:
    ledger.reserve(release(2))
    print("written", os.getpid(), flush=True)
except Refusal:
    ledger.close()
    print("refused", os.getpid(), flush=True)
time.sleep(60)
"""


def test_a_forked_worker_neither_writes_nor_keeps_the_lock(tmp_path):
    path = tmp_path / "ledger"
    with running(path, FORKED) as process:
        answer, worker = process.stdout.readline().split()
        try:
            assert answer == "refused"
            with pytest.raises(Refusal, match=f"in use by process {process.pid};"):
                opened(path)
            process.stdin.close()
            process.wait(timeout=600)
            with opened(path) as ledger:
                assert ledger.epsilon() == epsilon([EVENT], BUDGET.target_delta)
        finally:
            os.kill(int(worker), signal.SIGKILL)


# A writer that releases down a pipe what it has reserved is killed at a random moment, from the creation of its
# ledger on. What left must be there, epsilon must be at least the exact one of what left, and within the budget,
# which later cycles on a ledger mostly find spent.
MASSACRE = """
from dp_accounting import get_epsilon_gaussian
from fedveil.privacy.accounting.epsilon import within

first, last = map(int, name.split("-"))
lost = under = over = whole = full = acknowledged = 0
for cycle in range(60 * first, 60 * last):
    random.seed(cycle)
    if cycle % 6 == 0:
        path = f"{sys.argv[1]}{cycle}"
        known = set()
    ends = os.pipe()
    child = os.fork()
    if not child:
        ledger = opened()
        try:
            for number in range(cycle * 1000, cycle * 1000 + 1000):
                ledger.reserve(release(number))
                os.write(ends[1], f"{number} ".encode())
                ledger.commit(release(number).key, durable=number % 2 == 0)
        except BudgetExhausted:
            time.sleep(60)
    os.close(ends[1])
    if cycle % 2:
        select.select([ends[0]], [], [], 0.2)
    time.sleep(random.uniform(0.0, 0.02) * (1 + cycle % 6))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(ends[0]) as pipe:
        fresh = [int(number) for number in pipe.read().split()]
    known.update(fresh)
    acknowledged += len(fresh)
    with opened() as ledger:
        lost += sum(ledger.state(release(number).key) is None for number in known)
        under += bool(known) and ledger.epsilon() < get_epsilon_gaussian(10.0 / len(known) ** 0.5, 1e-5)
        over += ledger.epsilon() > budget.target_epsilon
        full += not within([*ledger.events(Adversary.MODEL), GaussianDpEvent(10.0)], budget)
        whole += 1
print(lost, under, over, whole, full, acknowledged)
"""


def test_random_kills_lose_no_acknowledged_reservation(tmp_path):
    *wrong, whole, _, acknowledged = map(int, run(tmp_path / "ledger", MASSACRE, "0-1")[0])
    assert (wrong, whole) == ([0, 0, 0], 60)
    assert acknowledged >= 10


def strace(path, injection):
    """The prefix that injects a fault into what touches the ledger's journal; skips where tracing is not possible."""
    program = shutil.which("strace")
    if program is None or subprocess.run([program, "-o", os.devnull, "true"], check=False).returncode:
        pytest.skip("strace is missing or not allowed to trace")
    call = injection.partition(":")[0]
    journal = ["-P", f"{path}-wal", "-e", f"trace={call}", "-e", f"inject={injection}"]
    return [program, "-f", "-qq", "-o", os.devnull, *journal]


UNSYNCED = """
ledger = opened()
try:
    ledger.reserve(release(2))
    print("released")
except LedgerUnavailable as refusal:
    print("unavailable" if refusal.field == "ledger" else refusal)
"""


@pytest.mark.parametrize("failure", ["fdatasync:error=EIO", "pwrite64:error=ENOSPC", "pwrite64:error=EIO"])
def test_a_failing_disk_releases_nothing(tmp_path, failure):
    """Also the proof that reserve waits for the disk: without the sync there would be nothing to fail."""
    path = tmp_path / "ledger"
    with opened(path) as ledger:
        ledger.reserve(release(1))
    assert run(path, UNSYNCED, before=strace(path, failure)) == (["unavailable"], 0)
    with opened(path) as ledger:
        assert ledger.epsilon() >= epsilon([EVENT], BUDGET.target_delta)
        ledger.reserve(release(2))
        assert ledger.epsilon() == epsilon([EVENT, EVENT], BUDGET.target_delta)


@pytest.mark.parametrize("nth", [1, 2])
def test_death_at_a_sync_is_survived(tmp_path, nth):
    path = tmp_path / "ledger"
    with opened(path) as ledger:
        ledger.reserve(release(1))
    fatal = strace(path, f"fdatasync:signal=KILL:when={nth}")
    assert run(path, UNSYNCED, before=fatal) == ([], -signal.SIGKILL)
    with opened(path) as ledger:
        assert ledger.state(release(1).key) is ReleaseState.RESERVED
        assert ledger.epsilon() >= epsilon([EVENT], BUDGET.target_delta)


@pytest.mark.parametrize("nth", [1, 2], ids=["before its commit", "before its reservation"])
def test_a_reservation_that_is_interrupted_is_whole_or_absent(tmp_path, monkeypatch, nth):
    """Ctrl-C between the disk and the memory: the next reservation reads what is really there."""
    path = tmp_path / "ledger"
    with opened(path, durable=False) as ledger:
        ledger.commit(release_reserved(ledger, 1), durable=False)
        real, calls = ledger._book.take, []

        def interrupted(entry, source):
            calls.append(entry.kind)
            if len(calls) == nth:
                raise KeyboardInterrupt
            real(entry, source)

        monkeypatch.setattr(ledger._book, "take", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ledger.reserve(release(2))
        monkeypatch.undo()
        assert calls == ["commit", "reserve"][:nth]
        ledger.reserve(release(3))
        assert ledger.epsilon() == epsilon({EVENT: 3}, BUDGET.target_delta)
    kinds = [entry.kind for entry in read_entries(path)]
    assert kinds == ["open", "reserve", "commit", "reserve", "reserve"]


def release_reserved(ledger, number):
    ledger.reserve(release(number))
    return release(number).key


@pytest.mark.campaign
def test_many_random_kills_lose_nothing(tmp_path):
    output, _ = run(tmp_path / "ledger", MASSACRE, "1-85", timeout=3600)
    *wrong, kills, full, left = map(int, output)
    found = {"kills": kills, "on a spent budget": full, "releases before them": left}
    print(json.dumps({**found, "lost, under, over": wrong}))
    assert (wrong, kills) == ([0, 0, 0], 5040)
