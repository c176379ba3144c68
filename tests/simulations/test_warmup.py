"""A simulation takes more processes once its first second of training has shown that they pay."""

import os
import threading
import time
from pathlib import Path

import pytest
import torch
from shared.runs import run_quietly

from fedveil.simulations import warmup
from fedveil.simulations.in_process import InProcessGrid
from fedveil.simulations.warmup import WARMUP_SECONDS, Warmup, can_fork, idle_seconds
from fedveil.tasks import hardware
from fedveil.tasks.hardware import cores

MADE = (
    "task=custom",
    "task.target=fedveil.benchmarks.made_task:Made",
    "allow_modules=[fedveil.benchmarks.made_task]",
)
LONG = 2 * WARMUP_SECONDS


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count no thread that an earlier test of this process left."""
    earlier, count = threading.active_count() - 1, threading.active_count
    monkeypatch.setattr(threading, "active_count", lambda: count() - earlier)


@pytest.mark.parametrize(
    ("seconds", "idle", "workers"),
    [
        (0.9 * WARMUP_SECONDS, 100.0, 1),  # not over
        (LONG, 0.0, 1),
        (LONG, 0.7 * LONG, 1),
        (LONG, 0.8 * LONG, 2),
        (LONG, 2.9 * LONG, 4),
        (LONG, 60 * LONG, 6),
    ],
)
def test_each_core_that_was_idle_gets_a_worker(seconds: float, idle: float, workers: int) -> None:
    assert Warmup(6, seconds, idle).workers == workers


def test_process_with_another_thread_keeps_one_worker() -> None:
    over = Warmup(6, LONG, 3 * LONG)
    end = threading.Event()
    other = threading.Thread(target=end.wait)
    other.start()
    try:
        assert over.workers == 1
    finally:
        end.set()
        other.join()
    assert over.workers == 4


def test_time_is_added_over_the_rounds() -> None:
    new, start = Warmup(2), time.perf_counter()
    for _ in range(2):
        with new.timed():
            time.sleep(0.05)
    assert 0.1 <= new.seconds <= time.perf_counter() - start
    assert 0 <= new.idle <= (new.seconds + 0.1) * cores()


def test_only_the_usable_cores_idle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # The lines of proc(5): user, nice, system, idle, iowait, irq, softirq, steal, guest, guest_nice.
    stat = tmp_path / "stat"
    stat.write_text(
        "cpu  9 9 9 4000 40 0 0 0 0 0\n"
        "cpu0 1 2 3 1000 10 7 7 7 7 7\n"
        "cpu1 1 2 3 2000 20 7 7 7 7 7\n"
        "cpu10 1 2 3 1000 10 7 7 7 7 7\nintr 5\n"
    )
    monkeypatch.setattr(warmup, "_STAT", stat)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    monkeypatch.setattr(os, "sysconf", lambda name: 100)
    assert idle_seconds() == pytest.approx(30.3)


@pytest.mark.parametrize(
    ("quota", "count"),
    [("max 100000\n", 4), ("250000 100000\n", 2), ("50000 100000\n", 1), ("900000 100000", 4), (None, 4)],
)
def test_cores_of_a_container_are_those_of_its_quota(
    quota: str | None, count: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(hardware, "CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(4)))
    assert cores() == count


@pytest.mark.parametrize(
    ("platform", "gpus", "forks"), [("linux", 0, True), ("linux", 1, False), ("darwin", 0, False)]
)
def test_a_process_that_trained_is_forked_on_linux_without_gpus(
    platform: str, gpus: int, forks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.platform", platform)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert can_fork() is forks
    monkeypatch.setattr(warmup, "_STAT", Path("/nowhere/stat"))
    assert not can_fork()


@pytest.mark.parametrize(
    "job",
    [
        ("task=digits", "task.num_clients=140", "cohort.rate=0.96"),
        (
            "task=digits",
            "task.num_clients=140",
            "cohort.rate=0.96",
            "audit=full",
            "audit.canaries=20",
            "audit.looks=1",
        ),
        ("task=digits", "task.num_clients=12", "cohort=all", "privacy=record", "faults.corrupt=0.2"),
        (*MADE, "task.args.workload=cnn-1m", "task.args.num_clients=4", "cohort=all"),
    ],
    ids=["stacked", "audited", "records", "one by one"],
)
def test_workers_from_the_second_round_on_leave_the_same_bits(
    job: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, forked = [], []
    start = InProcessGrid._start
    monkeypatch.setattr(InProcessGrid, "_start", lambda *args: forked.append(args) or start(*args))
    monkeypatch.setattr("fedveil.simulations.clients.cores", lambda: 3)
    monkeypatch.setattr(warmup, "WARMUP_SECONDS", 0.0)
    for idle in (0.0, 1e9):
        monkeypatch.setattr(warmup, "idle_seconds", lambda jump=idle: jump * time.perf_counter())
        run_quietly([*job, "num_rounds=3", "seed=1"], tmp_path / f"{idle}")
        models.append((tmp_path / f"{idle}" / "model.safetensors").read_bytes())
        assert bool(forked) == bool(idle)
    assert models[0] == models[1]
