"""The ledger on disks that fail at every call, after power cuts, and shared: a little of each, campaigns for the rest.

`faults/ledger_lives.py` does the work, with `faults/disk.c` between the ledger and its disk; see there.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent

from fedveil.privacy.budget import Adversary, Budget, Release, Unit
from fedveil.privacy.ledger.ledger import Ledger, verify

FAULTS = Path(__file__).parents[1] / "faults"
KINDS = {"SIGKILL", "EIO", "ENOSPC", "short write", "fsync error"}


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """The failing disk, compiled; skips where there is no C compiler or no way to load it."""
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler on Linux")
    library = tmp_path_factory.mktemp("disk") / "disk.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-o", library, FAULTS / "disk.c", "-ldl"], check=True
    )
    return library


def lives(folder, disk, kind, *numbers):
    """What the script reports of lives on this disk; nothing may be wrong."""
    command = [sys.executable, FAULTS / "ledger_lives.py", kind, folder, *map(str, numbers)]
    done = subprocess.run(
        command, env={**os.environ, "LD_PRELOAD": str(disk)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(done.stdout)
    assert found["wrong"] == []
    return found


@pytest.mark.parametrize(
    ("seeds", "stride", "least"), [(1, 12, 10), pytest.param(5, 2, 40, marks=pytest.mark.campaign)]
)
def test_named_crash_points(tmp_path, disk, seeds, stride, least):
    """Every `stride`th call of each life, with every kind of failure."""
    found = lives(tmp_path, disk, "points", seeds, stride)
    assert found["named points"] >= least
    assert set(found["trials"]) == KINDS
    assert found["killed"] == found["trials"]["SIGKILL"] >= least * seeds


@pytest.mark.parametrize(
    ("count", "each"), [(2, 8), pytest.param(10, 20, marks=pytest.mark.campaign, id="campaign")]
)
def test_power_cuts(tmp_path, disk, count, each):
    """Whatever was not synced may be lost. Without syncs releases would be, or the cuts would prove nothing."""
    found = lives(tmp_path, disk, "cuts", count, each)
    assert found["cuts"] == count * each
    assert found["lost without sync"] > found["cuts"] // 4


@pytest.mark.parametrize("locked", [True, False], ids=["locked", "on a file system without locks"])
@pytest.mark.parametrize("each", [40, pytest.param(2000, marks=pytest.mark.campaign)])
def test_four_writers_share_one_budget(tmp_path, disk, each, locked):
    """As if one at a time had come, and none was refused while there was room."""
    found = lives(tmp_path, disk, "writers", each, int(locked))
    assert found["attempts"] == 4 * each
    assert found["reserved"] == int(0.8 * 4 * each)


@pytest.mark.campaign
def test_a_hundred_thousand_entries(tmp_path):
    """Figures, not a verdict: how long it takes to open such a ledger, and to reserve on it."""
    budget, path = Budget(Unit.CLIENT, 1e6, 1e-5), tmp_path / "ledger"
    event = PoissonSampledDpEvent(0.1, GaussianDpEvent(3.0))
    seen_by = dict.fromkeys((Adversary.CLIENTS, Adversary.MODEL), event)

    def release(number):
        return Release(Unit.CLIENT, "0123456789abcdef" * 2, number, "private_sum", seen_by, "system")

    def opened(**more):
        return Ledger.open(path, budget, owner="population", simulated=False, **more)

    with opened(durable=False) as ledger:
        for number in range(50_000):
            ledger.reserve(release(number))
            ledger.commit(release(number).key, durable=False)
        head = ledger.head
    begin = time.process_time()
    ledger = opened(expect=head)
    figures = {"entries": ledger.head.seq, "open, CPU seconds": time.process_time() - begin}
    taken = []
    for number in range(50_000, 51_000):
        begin = time.perf_counter()
        ledger.reserve(release(number))
        taken.append(1e3 * (time.perf_counter() - begin))
        ledger.commit(release(number).key, durable=False)
    ledger.close()
    p50, p99 = (sorted(taken)[n] for n in (500, 990))
    print(json.dumps({**figures, "reserve, ms, p50": p50, "reserve, ms, p99": p99}, indent=1))
    assert figures["entries"] == 100_001 and verify(path).ok
