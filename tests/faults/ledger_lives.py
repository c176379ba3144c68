"""Ledgers that live on a disk which fails, loses power, or is shared: run with disk.c preloaded, prints JSON.

usage: python ledger_lives.py points FOLDER SEEDS STRIDE | cuts FOLDER LIVES CUTS | writers FOLDER EACH LOCKED

In every life a thing leaves by being written to a pipe, after `reserve` has returned. What is checked is the same
each time: whatever left is on the ledger, recomputed epsilon is at least that of what left, and never is it above
the budget, even after whoever comes next has spent what seems to be left.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import random
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

from dp_accounting import GaussianDpEvent, get_epsilon_gaussian

from fedveil.base.refusal import Refusal
from fedveil.privacy.accounting.epsilon import within
from fedveil.privacy.budget import Adversary, Budget, Release, Unit
from fedveil.privacy.ledger.ledger import BudgetExhausted, Ledger, ReleaseState, read_entries, verify

BUDGET = Budget(Unit.CLIENT, target_epsilon=1.5, target_delta=1e-5)
EVENT = GaussianDpEvent(10.0)
AFFORDABLE = next(n for n in range(1, 100) if not within({EVENT: n + 1}, BUDGET))
KINDS = {"SIGKILL": "K", "EIO": "E", "ENOSPC": "N", "short write": "S", "fsync error": "F"}
SECTOR = 512
DISK = ctypes.CDLL(None)


def truly(count):
    """The exact epsilon of this many releases: together they are one Gaussian (Balle and Wang 2018, theorem 8)."""
    return get_epsilon_gaussian(EVENT.noise_multiplier / count**0.5, BUDGET.target_delta) if count else 0.0


def opened(path, **more):
    return Ledger.open(path, BUDGET, owner="population", simulated=False, **more)


def release(number, event=EVENT, run="run", mechanism="update"):
    return Release(Unit.CLIENT, run, number, mechanism, {Adversary.MODEL: event}, "system")


# --- one life -----------------------------------------------------------------------------------------------------


def steps(rng):
    """(phase, what is done to the ledger) in the order of one life; the seed varies sizes, waits and the middle."""
    numbers = iter(range(1, 100))

    def reserve(ledger, leave):
        number = next(numbers)
        wanted = release(number, mechanism="update" + "x" * rng.choice((0, 0, 5000)))
        ledger.reserve(wanted)
        leave(number, wanted.key)
        return wanted.key

    def commit(ledger, leave, durable):
        ledger.commit(reserve(ledger, leave), durable=durable)

    def void(ledger, leave):
        ledger.void(reserve(ledger, lambda *_: None), "nothing left")

    def again(ledger, leave):
        ledger.close()

    yield "first reservation", reserve
    yield "commit", lambda ledger, leave: commit(ledger, leave, True)
    yield "held-back commit", lambda ledger, leave: commit(ledger, leave, False)
    for _ in range(rng.randrange(3)):
        yield "reservation", reserve
    yield "void", void
    yield "close", again
    yield "reopened", reserve
    yield "commit when closing", lambda ledger, leave: (commit(ledger, leave, False), ledger.close())
    yield "last", reserve


def live(path, seed, leave):
    """Lives one life; what a failing disk refuses is given up, and the ledger is opened again for the next step."""
    ledger = None
    for phase, step in steps(random.Random(seed)):
        DISK.disk_note(f"phase:{phase.replace(' ', '_')}".encode())
        try:
            if ledger is None or not ledger._lock.is_held:
                ledger = opened(path)
            step(ledger, leave)
        except Refusal:
            with contextlib.suppress(Refusal):
                if ledger is not None:
                    ledger.close()
            ledger = None
    if ledger is not None:
        ledger.close()


def in_child(folder, log, arm, seed):
    """Lives a life in a child; returns what left, and how the child ended."""
    ends = os.pipe()
    child = os.fork()
    if not child:
        code = 70
        try:
            DISK.disk_watch(str(folder).encode(), log)
            DISK.disk_arm(arm[0], ord(arm[1]))

            def leave(number, key):
                DISK.disk_note(f"left:{number}".encode())
                os.write(ends[1], (json.dumps(key) + "\n").encode())

            live(folder / "ledger", seed, leave)
            code = 0
        except BaseException:  # noqa: BLE001 (the parent counts it)
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(ends[1])
    with os.fdopen(ends[0]) as pipe:
        left = [tuple(json.loads(line)) for line in pipe]
    return left, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def judge(path, left):
    """The sentence that says what is wrong with a ledger after these releases have left, or None."""
    try:
        ledger = opened(path, durable=False)
    except Refusal as refusal:
        return f"cannot be opened: {refusal}"
    with ledger:
        for key in left:
            if ledger.state(key) in (None, ReleaseState.VOID):
                return f"{key} left and is not on the ledger"
        if ledger.epsilon() < truly(len(left)):
            return f"epsilon {ledger.epsilon()} after {len(left)} releases"
        with contextlib.suppress(BudgetExhausted):
            for number in range(AFFORDABLE + 1):
                ledger.reserve(release(number, run="next"))
    kinds = Counter(entry.kind for entry in read_entries(path))  # every hash is checked
    if truly(kinds["reserve"] - kinds["void"]) > BUDGET.target_epsilon:
        return f"{kinds} is more than the budget"
    return None


# --- named crash points -------------------------------------------------------------------------------------------


def logged(file):
    """The calls and notes of a life: (op, name, offset, data)."""
    file.seek(0)
    found = []
    while line := file.readline():
        op, name, offset, size = line.decode().split()
        found.append((op, name, int(offset), file.read(int(size))))
    return found


def scratch(folder, name):
    made = folder / name
    made.mkdir()
    return made


def recorded(folder, name, seed):
    """The log of an undisturbed life."""
    with open(folder / f"{name}.log", "w+b") as file:
        left, code = in_child(scratch(folder, name), file.fileno(), (0, "K"), seed)
        assert code == 0 and left
        return logged(file)


def names_of(calls):
    """A name for every call: phase, what it does, to which file, and the how manieth of its kind."""
    phase, seen, names = "", Counter(), []
    words = {"O": "create", "W": "write", "T": "truncate", "S": "sync", "U": "remove"}
    for op, name, _, _ in calls:
        if op == "N":
            phase = name.removeprefix("phase:") if name.startswith("phase:") else phase
            continue
        point = f"{phase}: {words[op]} {'folder' if name == '.' else name}"
        seen[point] += 1
        names.append(f"{point} {seen[point]}")
    return names


def points(folder, seeds, stride):
    """Every call of a life, in each of these seeds' lives, with every kind of failure."""
    trials, struck, wrong, named = Counter(), Counter(), [], set()
    for seed in range(seeds):
        names = names_of(recorded(folder, f"calm{seed}", seed))
        for at in range(1 + seed % stride, len(names) + 1, stride):
            for kind, letter in KINDS.items():
                where = scratch(folder, f"{seed}-{at}-{letter}")
                left, code = in_child(where, -1, (at, letter), seed)
                problem = judge(where / "ledger", left)
                if code not in (0, -9):
                    problem = f"ended with {code}"
                named.add(names[at - 1])
                trials[kind] += 1
                struck[kind] += code == -9
                if problem:
                    wrong.append(f"{kind} at {names[at - 1]} of life {seed}: {problem}")
    return {"named points": len(named), "trials": dict(trials), "killed": struck["SIGKILL"], "wrong": wrong}


# --- power cuts ---------------------------------------------------------------------------------------------------


def after_power_cut(calls, rng):
    """Which files a power cut after these calls leaves: what was synced, and any part of what was not."""
    durable, pending = {}, {}  # by inode
    names, durable_names, moved = {}, {}, []
    for op, name, offset, data in calls:
        if op == "O":
            inode = len(durable)
            durable[inode], pending[inode], names[name] = bytearray(), [], inode
            moved.append((name, inode))
        elif op == "U":
            names.pop(name)
            moved.append((name, None))
        elif op == "S" and name == ".":
            durable_names, moved = dict(names), []
        elif op in "WTS" and name in names:
            inode = names[name]
            pending[inode].append((op, offset, data))
            if op == "S":
                _apply(durable[inode], pending[inode])
                pending[inode] = []
    for name, inode in moved:
        if rng.random() < 0.5:
            durable_names.pop(name, None) if inode is None else durable_names.update({name: inode})
    for inode, waiting in pending.items():
        torn = [(op, at, _torn(data, rng)) for op, at, data in waiting if rng.random() < 0.5]
        _apply(durable[inode], torn)
    return {n: bytes(durable[i]) for n, i in durable_names.items() if not n.endswith("-shm")}


def _torn(data, rng):
    return data[: rng.randrange(0, len(data) + 1, SECTOR)] if rng.random() < 0.3 else data


def _apply(content, calls):
    for op, offset, data in calls:
        if op == "T":
            del content[offset:]
            content.extend(bytes(offset - len(content)))
        elif op == "W":
            content.extend(bytes(max(0, offset - len(content))))
            content[offset : offset + len(data)] = data


def cuts(folder, lives, each):
    """Power cuts at random moments of recorded lives."""
    wrong, lost, unsynced = [], 0, 0
    for life in range(lives):
        calls = recorded(folder, f"life{life}", life)
        rng = random.Random(life)
        keys = {}
        for cut in range(each):
            moment = rng.randrange(1, len(calls) + 1)
            before = calls[:moment]
            where = scratch(folder, f"{life}-{cut}")
            for name, content in after_power_cut(before, rng).items():
                (where / name).write_bytes(content)
            left = [name.removeprefix("left:") for op, name, _, _ in before if op == "N" and "left" in name]
            keys = keys or keys_of(folder / f"life{life}" / "ledger")
            problem = judge(where / "ledger", [keys[number] for number in left])
            if problem:
                wrong.append(f"cut {cut} of life {life} after call {moment}: {problem}")
            without = [call for call in before if call[0] != "S" or call[1] == "."]
            unsynced += _loses(without, [keys[n] for n in left], scratch(folder, f"{life}-{cut}-no"), rng)
            lost += len(left)
    return {"cuts": lives * each, "releases before them": lost, "wrong": wrong, "lost without sync": unsynced}


def keys_of(path):
    found = [tuple(json.loads(entry.key)) for entry in read_entries(path) if entry.kind == "reserve"]
    return {str(key[1]): key for key in found}


def _loses(calls, left, where, rng):
    """Whether the same cut would lose a release if files were never synced: the harness must be able to see it."""
    for name, content in after_power_cut(calls, rng).items():
        (where / name).write_bytes(content)
    return judge(where / "ledger", left) is not None


# --- writers ------------------------------------------------------------------------------------------------------


def writer(path, name, each, budget_event, locked):
    """Reserves `each` times; returns (start, end, key, sequence number or None) of each attempt."""
    budget, event = budget_event
    history, number = [], 0
    while number < each:
        with Ledger.open(path, budget, owner="population", simulated=False, wait=600.0) as ledger:
            for _ in range(50 if locked else each):
                wanted, start = release(number, event, run=name), time.monotonic_ns()
                try:
                    seq = ledger.reserve(wanted).seq
                except BudgetExhausted:
                    seq = None
                history.append((start, time.monotonic_ns(), wanted.key, seq))
                number += 1
                if number == each:
                    break
        time.sleep(0.05)  # longer than who waits for the lock sleeps: the lock knows no queue
    return history


def writers(folder, each, locked, count=4):
    """Racing writers, and a checker of their history: as if one at a time had come, to a budget that is not theirs."""
    event, share = GaussianDpEvent(30.0 * each**0.5), int(count * each * 0.8)
    low, high = 0.01, 100.0
    for _ in range(30):
        middle = (low + high) / 2
        fits = within({event: share}, Budget(Unit.CLIENT, middle, 1e-5))
        low, high = (low, middle) if fits else (middle, high)
    budget = Budget(Unit.CLIENT, high, 1e-5)
    path, children = folder / "shared", []
    if not locked:
        Ledger.open(path, budget, owner="population", simulated=False).close()
    for number in range(count):
        child = os.fork()
        if not child:
            code = 70
            try:
                if not locked:
                    fcntl.flock = lambda *_: None
                found = writer(path, f"w{number}", each, (budget, event), locked)
                (folder / f"{number}.json").write_text(json.dumps(found))
                code = 0
            except BaseException:  # noqa: BLE001 (the parent counts it)
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    codes = [os.waitpid(child, 0)[1] for child in children]
    if any(codes):
        return {"wrong": [f"writers ended with {codes}"]}
    history = [tuple(each) for n in range(count) for each in json.loads((folder / f"{n}.json").read_text())]
    kept = [attempt for attempt in history if attempt[3] is not None]
    return {"attempts": len(history), "reserved": len(kept), "wrong": _checked(path, history, share)}


def _checked(path, history, share):
    wrong = []
    kept = sorted((a for a in history if a[3] is not None), key=lambda a: a[3])
    on_ledger = {entry.seq: json.loads(entry.key) for entry in read_entries(path) if entry.kind == "reserve"}
    if {a[3]: list(a[2]) for a in kept} != on_ledger or len(kept) != len(on_ledger):
        wrong.append("what writers were told is not what the ledger says")
    if len(kept) < share:
        wrong.append(f"{len(kept)} of {share} affordable reservations were let through")
    latest = 0
    for start, end, key, _ in kept:
        if end < latest:
            wrong.append(f"{key} ended before one that comes earlier on the ledger began")
        latest = max(latest, start)
    for start, end, key, seq in history:
        if seq is None and sum(a[0] <= end for a in kept) < len(kept):
            wrong.append(f"{key} was refused while there was room, {start}")
    found = verify(path)
    return wrong if found.ok else [*wrong, str(found.problem)]


def main():
    kind, folder, *numbers = sys.argv[1:]
    run = {"points": points, "cuts": cuts, "writers": writers}[kind]
    begin = os.times()
    found = run(scratch(Path(folder), kind), *map(int, numbers))
    spent = os.times()
    cpu = sum(spent[:4]) - sum(begin[:4])
    print(json.dumps({**found, "wrong": found["wrong"][:20], "cpu seconds": round(cpu, 1)}, indent=1))


if __name__ == "__main__":
    main()
