"""Each benchmark runs at toy size and writes what it promises; how long things take is no test's business."""

import itertools
import json
import os
import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedveil.benchmarks import commands, contenders, engines, gpu, long_runs, memory, modes
from fedveil.benchmarks.__main__ import main
from fedveil.benchmarks.contenders import Missing, measure
from fedveil.benchmarks.engines import LEAN, OURS, Options, run_engines
from fedveil.benchmarks.lean import run_lean
from fedveil.benchmarks.made_task import Made
from fedveil.benchmarks.ours import run_ours
from fedveil.benchmarks.stopwatch import Process, Stopwatch, cpu_seconds, run_process
from fedveil.benchmarks.stopwatch import memory as memory_of
from fedveil.benchmarks.tables import as_table, ratio, spelled, spread
from fedveil.benchmarks.workload import (
    EXAMPLES,
    FEWEST,
    MODELS,
    MOST,
    POWER_FEWEST,
    POWER_MOST,
    TRAINED,
    WORKLOADS,
    Size,
    build,
    examples_of,
)
from fedveil.client.training.batches import shuffled_batches
from fedveil.client.training.sgd import layout_of, train, with_fast_kernels
from fedveil.messages.local_training import LocalTraining
from fedveil.tasks.arrays import read_arrays

OTHER_SIZES = [("resnet-18", 11_171_018), ("resnet-272k", 272e3), ("lstm-82k", 82e3)]
EVIDENCE = Path(__file__).parents[2] / "docs" / "evidence"
TOY = ["--clients", "6", "--cohort", "3", "--rounds", "1", "--repeats", "1"]


OTHER = runpy.run_path(str(Path(__file__).parents[1] / "faults" / "other_device.py"))


class Counted:
    """What the benchmark of a GPU calls of `torch.cuda`, for the tests' second device."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def call(device: torch.device) -> Any:
            self.calls.append(name)
            return (
                f"a {device}" if name == "get_device_name" else (3 << 20) * (name == "max_memory_allocated")
            )

        return call


def in_this_process(name: str, workload: str, size: Size, pfl_python: str | None = None) -> Stopwatch:
    """A contender without a process of its own, which costs seconds of imports."""
    if name not in (OURS, LEAN):
        raise Missing("not at toy size")
    watch = Stopwatch()
    if name == OURS:
        run_ours(workload, size, watch, workers=1)
    else:
        run_lean(workload, size, watch, channels_last=True)
    return watch


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedveil.benchmarks import (
        accuracies,
        dp_sgd,
        link,
        precision,
        privacy_share,
        secagg,
        secagg_checks,
        secagg_length,
        secagg_round,
    )
    from fedveil.benchmarks.secagg_case import Case

    for module in (engines, memory, privacy_share):
        monkeypatch.setattr(module, "measure", in_this_process)
    monkeypatch.setattr(precision, "SEEDS", (0,))
    load, rate, _ = accuracies.TASKS["shakespeare-lstm"]
    monkeypatch.setitem(accuracies.TASKS, "shakespeare-lstm", (load, rate, 1))
    monkeypatch.setattr(memory, "COHORTS", (1, 3))
    monkeypatch.setattr(link, "SIZES", (100,))
    for module in (dp_sgd, gpu):
        monkeypatch.setattr(module, "BATCHES", {2: 2})
    monkeypatch.setattr(memory, "POPULATIONS", (3, 6))
    monkeypatch.setattr(memory, "WIDE", ("tiny",))
    monkeypatch.setattr(memory, "_run", lambda *asked: Process(2.0 + asked[2], 1.0 + asked[2], 300.0))
    numbers = itertools.count(1)
    for module in (commands, long_runs, modes):
        monkeypatch.setattr(module, "run_fedveil", lambda *said: Process(1.0, float(next(numbers)), 99.0))
    monkeypatch.setattr(commands, "run_process", lambda *command: Process(1.0, 1.0, 99.0))
    monkeypatch.setattr(secagg, "CASES", (Case(6, 5, 4, 2000, 0.2), Case(6, 5, 4, 2000, 0.2, bits=16)))
    monkeypatch.setattr(secagg, "MADE", (Case(12, 6, 4, 2000, 0.2),))
    monkeypatch.setattr(secagg, "HELD", (Case(6, 5, 4, 2000, 0.2),))
    monkeypatch.setattr(secagg, "MASKS", (1000,))
    monkeypatch.setattr(secagg_checks, "REAL", (Case(6, 5, 4, 2000, 0.2),))
    monkeypatch.setattr(secagg_checks, "MADE", (Case(12, 6, 4, 2000, 0.2),))
    monkeypatch.setattr(secagg_length, "CASES", (Case(6, 5, 4, 2000, 0.2, noise=1.0),))
    rounds = {"real": secagg_round.real, "made": secagg_round.made}
    monkeypatch.setattr(secagg_checks, "_round", lambda _, kind, case: rounds[kind](case))


def written(arguments: list[str], path: Path) -> dict[str, Any]:
    assert main([*arguments, "--json", str(path)]) == 0
    return json.loads(path.read_text())


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("benchmark", "arguments", "rows"),
    [
        ("engines", ["--workloads", "tiny", "cnn-100k"], [2, 2, 2, 2, 2, 8, 8]),
        ("engines", ["--workloads", "resnet-272k", "lstm-82k", "adapters-700k"], [2, 2, 2, 2, 2, 8, 8]),
        ("overhead", [], [1, 0]),
        ("privacy", ["--workloads", "tiny"], [1, 1, 1]),
        ("memory", ["--workloads", "tiny"], [1, 2, 2]),
        ("dp_sgd", ["--workloads", "cnn"], [1, 1, 1]),
        ("gpu", ["--workloads", "adapters", "--device", "cpu"], [1, 1, 2]),
        ("loading", ["--workloads", "tiny"], [1]),
        ("stacks", [], [3]),
        ("modes", [], [8]),
        ("commands", [], [7]),
        ("long_runs", ["--rounds", "100"], [3]),
        ("precision", ["--workloads", "tiny"], [1]),
        ("precision", ["--workloads", "tiny", "shakespeare-lstm"], [1, 1]),
        ("secagg", [], [2, 1, 1, 1]),
        ("secagg_checks", ["--before", "earlier"], [1, 1]),
        ("secagg_length", [], [1, 1, 1]),
        pytest.param("link", [], [2, 1, 2], marks=pytest.mark.campaign),
    ],
)
def test_a_benchmark_writes_its_tables(
    benchmark: str, arguments: list[str], rows: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = written([benchmark, *TOY, *arguments], tmp_path / "result.json")
    assert result["benchmark"] == benchmark
    assert [len(table) for table in result["tables"].values()] == rows
    assert result["conditions"]["cores"] > 0
    shown = capsys.readouterr().out
    for title in result["tables"]:
        assert title in shown


@pytest.mark.usefixtures("quick")
def test_benchmark_of_a_gpu_runs_on_a_second_device(monkeypatch: pytest.MonkeyPatch) -> None:
    unit = Counted()
    monkeypatch.setitem(gpu.UNITS, "meta", unit)
    monkeypatch.setattr(gpu, "check_device", lambda *asked: None)
    with OTHER["other_device"]() as copies:
        result = gpu.run_gpu(Options(Size(6, 3, 1), 1, None, ("adapters",), device="meta"))
    (times,), _, rounds, (peaks,) = result["tables"].values()
    ways = (gpu.TORCH, *gpu.OURS, *gpu.OPACUS)
    assert all(times[way] > 0 and peaks[way] == 3.0 for way in ways)
    assert [row["workload"] for row in rounds] == ["tiny", "cnn-1m"]
    assert result["conditions"]["device"] == "a meta" and copies.there and copies.back
    a_turn = [
        "memory_allocated",
        "reset_peak_memory_stats",
        "synchronize",
        "synchronize",
        "max_memory_allocated",
    ]
    assert unit.calls == ["get_device_name", *(2 * len(ways) * a_turn)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu_its_benchmark_ends_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["gpu", "--json", str(tmp_path / "gpu.json")]) == 2
    out, error = capsys.readouterr()
    assert error == "--device='cuda': of the GPUs that torch can use there is none; use cpu\n"
    assert not out and not list(tmp_path.iterdir())


def test_tables_of_the_page_are_rows_of_its_results() -> None:
    """A table may leave out rows and columns of what was measured, and has nothing else; results without one are in figures."""
    page = (EVIDENCE / "benchmarks.md").read_text()
    results = {path.name: json.loads(path.read_text()) for path in (EVIDENCE / "benchmarks").glob("*.json")}
    seen: set[str] = set()
    for section in re.split("(?m)^##+ ", page):
        names = [name for name in re.findall(r"--json (\S+)", section) if name in results]
        tables = {title: rows for name in names for title, rows in results[name]["tables"].items()}
        titled = re.findall(r"(?m)^\*\*(.+)\*\*\n\n((?:\|.*\n)+)", section)
        for title, table in titled if names else ():
            rows = tables[title]
            columns, _, *lines = [
                tuple(cell.strip() for cell in line.strip("|\n").split("|")) for line in table.splitlines()
            ]
            kept = {tuple(spelled(row.get(column)) for column in columns) for row in rows}
            assert set(columns) <= set(rows[0]) and set(lines) <= kept, title
        shown, figures = {title for title, _ in titled}, set(re.findall(r"\d+\.\d+", section))
        for name in names:
            cells = {spelled(v) for t in results[name]["tables"].values() for row in t for v in row.values()}
            if shown & set(results[name]["tables"]) or len(figures & cells) >= 2:
                seen.add(name)
    assert seen == set(results)


@pytest.mark.usefixtures("quick")
def test_missing_contender_is_named_and_not_compared() -> None:
    result = run_engines(Options(Size(6, 3, 1), 1, None, ("tiny",)))
    assert any(note.startswith("pfl, 1 process: skipped") for note in result["notes"])
    ratios = {(row["this"], row["over"]): row["tiny"] for row in result["tables"]["Ratios of wall time"]}
    assert ratios["pfl, 1 process", OURS] is None
    assert ratios[OURS, LEAN] > 0


def test_a_contender_runs_in_a_process_of_its_own() -> None:
    watch = measure("fedveil, 2 workers", "tiny", Size(6, 3, 1))
    assert len(watch.wall) == len(watch.cpu) == 1
    assert watch.first > watch.wall[0]


def test_a_contender_that_fails_is_no_result() -> None:
    with pytest.raises(RuntimeError, match="KeyError"):
        measure(LEAN, "no such model", Size(6, 3, 1))


def test_nvflare_is_missing_where_some_clients_would_rest() -> None:
    with pytest.raises(Missing, match="give as many --clients as --cohort"):
        measure(contenders.NVFLARE, "tiny", Size(6, 3, 1))


@pytest.mark.campaign
def test_clients_of_nvflare_train() -> None:
    watch = measure(contenders.NVFLARE, "tiny", Size(2, 2, 1))
    assert len(watch.wall) == 1 and watch.wall[0] > 0


def test_pfl_without_a_python_that_has_it_is_missing() -> None:
    with pytest.raises(Missing):
        measure("pfl, 1 process", "tiny", Size(), "/nowhere/python")
    assert contenders._command("pfl, 2 processes", sys.executable)[-1].endswith("pfl_contender.py")


@pytest.mark.parametrize(
    ("name", "wanted"), [("tiny", 2410), ("cnn-100k", 1e5), ("cnn-1m", 1e6), *OTHER_SIZES]
)
def test_the_models_are_as_large_as_they_are_called(name: str, wanted: float) -> None:
    assert sum(p.numel() for p in build(name).parameters()) == pytest.approx(wanted, rel=0.03)


def test_every_client_has_its_window_of_the_synthetic_data() -> None:
    assert set(TRAINED) | set(MODELS) <= set(WORKLOADS)
    inputs, targets = examples_of("tiny-equal", 3)
    assert inputs.shape == (EXAMPLES, 1, 8, 8) and targets.shape == (EXAMPLES,)
    assert not torch.equal(inputs, examples_of("tiny-equal", 4)[0])


def test_clients_have_unequal_numbers_of_examples_by_default() -> None:
    counts = np.array([len(examples_of("tiny", client)[1]) for client in range(1000)])
    assert counts.min() == FEWEST and counts.max() == MOST and len(set(counts.tolist())) == MOST - FEWEST + 1
    counts = np.array([len(examples_of("cnn-1m-power", client)[1]) for client in range(1000)])
    assert counts.min() == POWER_FEWEST and 500 < counts.max() <= POWER_MOST
    assert np.median(counts) < 17 and 25 < counts.mean() < 31


@pytest.mark.parametrize(
    ("workload", "layout", "atol"),
    [
        ("cnn-100k", torch.channels_last, 1e-6),
        ("resnet-272k", torch.contiguous_format, 1e-4),  # many layers amplify rounding
        ("tiny", torch.contiguous_format, 1e-6),
    ],
)
def test_the_fast_layout_changes_nothing_but_rounding(
    workload: str, layout: torch.memory_format, atol: float
) -> None:
    task = Made(workload, 4)
    examples, sgd = task.client_data(1), LocalTraining(0.05, 1, 10)
    trained, plain = with_fast_kernels(task.model()), task.model()
    loss = train(trained, task, examples, sgd, client=1, key=2)
    for rows in shuffled_batches(len(examples), sgd.batch_size, sgd.local_epochs, client=1, key=2):
        batch = torch.from_numpy(rows)
        gradients = torch.autograd.grad(
            task.loss(plain(examples.inputs[batch]), examples.targets[batch]), list(plain.parameters())
        )
        with torch.no_grad():
            for p, g in zip(plain.parameters(), gradients, strict=True):
                p -= sgd.learning_rate * g
    assert layout_of(trained) == layout
    kernels = [p for p in trained.parameters() if p.dim() == 4]
    assert all(kernel.is_contiguous(memory_format=layout) for kernel in kernels)
    assert np.isfinite(loss)
    for name, value in read_arrays(plain).items():
        np.testing.assert_allclose(read_arrays(trained)[name], value, atol=atol)


def test_a_process_is_measured_from_start_to_end() -> None:
    """Its peak is its own, not that of this process, from which it was forked."""
    here = bytearray(os.urandom(1 << 20)) * 300
    process = run_process(sys.executable, "-c", "import time; kept = bytearray(60 << 20); time.sleep(0.2)")
    assert 60 < process.peak < 250 and process.wall > 0.2 and process.cpu > 0 and len(here)
    with pytest.raises(RuntimeError, match=r"failed: .*exit\(3\)"):
        run_process(sys.executable, "-c", "exit(3)")


def test_spread_is_the_distance_of_the_extremes() -> None:
    assert spread([1.0, 1.1, 1.05]) == 9.5


def test_the_stopwatch_counts_this_process() -> None:
    before = cpu_seconds(os.getpid())
    sum(k * k for k in range(2_000_000))
    assert cpu_seconds(os.getpid()) > before
    assert memory_of(os.getpid()) > 1
    watch = replace(Stopwatch())
    watch.lap()
    watch.lap()
    assert set(json.loads(watch.to_json())) == {"first", "wall", "cpu", "memory"}


def test_a_table_keeps_its_columns_and_a_ratio_needs_both() -> None:
    assert as_table([{"a": 1.23456, "b": None}]).splitlines()[-1].split() == ["|", "1.23", "|", "-", "|"]
    assert (ratio(3.0, 2.0), ratio(None, 2.0), ratio(1.0, None)) == (1.5, None, None)
