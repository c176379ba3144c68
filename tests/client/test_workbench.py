"""Workbench of a process's clients: where the ledgers of their records are, and for how long they are open."""

import os
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedveil.client import workbench
from fedveil.client.workbench import Workbench
from fedveil.messages.client_settings import ClientSettings
from fedveil.privacy.budget import Release
from fedveil.privacy.ledger.ledger import Ledger
from fedveil.privacy.ledger.ledger_state import state_at
from fedveil.privacy.ledger.store import FILE, ledgers_in
from fedveil.strategies.record_plan import record_plan

COHORT = runpy.run_path(str(Path(__file__).parent / "training" / "test_cohort_training.py"))
Made, private_settings, bench_of = (COHORT[name] for name in ("Made", "private_settings", "bench_of"))
EVENT: Any = runpy.run_path(str(Path(__file__).parents[1] / "shared" / "ledgers.py"))["EVENT"]


def settings_in(folder: Path) -> ClientSettings:
    return private_settings(folder, seed=3)


def charge(bench: Workbench, client: int, number: int = 1) -> Path:
    """Charge a client's ledger, and return its path."""
    record = bench.settings.record
    assert record is not None
    name = bench.ledger_name(client, bench.settings, record)
    with bench.open_ledger(name, bench.settings, record) as ledger:
        ledger.reserve(Release("record", "run", number, f"dp_sgd {client}", {"model": EVENT}, "seeded"))
        return ledger.path


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_simulated_ledgers_are_in_one_file(tmp_path: Path) -> None:
    bench = bench_of(Made(), settings_in(tmp_path))
    paths = [charge(bench, client) for client in range(3)]
    bench.close()
    assert files(tmp_path) == [FILE] and ledgers_in(tmp_path) == sorted(paths)
    charge(bench, 0, 2)  # opens it again
    bench.close()
    assert len(state_at(paths[0]).releases) == 2


def test_ledgers_of_many_machines_and_real_data_are_files(tmp_path: Path) -> None:
    for name, task in (("machines", Made()), ("real", Made(simulated=False))):
        settings = settings_in(tmp_path / name)
        assert settings.record is not None
        record = replace(settings.record, own_files=name == "machines")
        if name == "real":
            record, settings = settings.record, replace(settings, seed=None)
        bench = bench_of(task, replace(settings, record=record))
        own = bench.open_ledger(bench.ledger_name(0, bench.settings, record), bench.settings, record)
        own.close()
        assert files(tmp_path / name) == [own.path.name]


def test_ledger_of_an_earlier_release_goes_on_in_its_file(tmp_path: Path) -> None:
    bench = bench_of(Made(), settings_in(tmp_path))
    record = bench.settings.record
    assert record is not None
    name = bench.ledger_name(0, bench.settings, record)
    path = record.ledger_path(name)
    Ledger.open(path, record.terms.budget, owner=name, simulated=True).close()
    assert charge(bench, 0) == path and charge(bench, 1) != path
    bench.close()
    assert files(tmp_path) == sorted([path.name, FILE]) and len(state_at(path).releases) == 1


def test_ledgers_beyond_those_in_memory_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workbench, "MAX_LEDGERS", 2)
    bench = bench_of(Made(), settings_in(tmp_path))
    for number in (1, 2):
        paths = [charge(bench, client, number) for client in range(4)]
    assert len(bench._ledgers) == 2
    assert [len(state_at(path).releases) for path in paths] == [2] * 4


def test_ledgers_of_many_releases_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workbench, "MAX_RELEASES", 6)
    bench = bench_of(Made(), settings_in(tmp_path))
    for number in range(1, 6):
        paths = [charge(bench, client, number) for client in range(4)]
        assert sum(len(each.book.releases) for each in bench._ledgers.values()) <= 6 + number
    assert [len(state_at(path).releases) for path in paths] == [5] * 4


def test_only_equal_rounds_share_a_plan(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    assert settings.record is not None
    record = replace(settings.record, noise_by_ledger=(("own", 9.0),))
    settings = replace(settings, record=record)
    bench = bench_of(Made(), settings)
    pairs = [bench.plan_of(*each, settings, record) for each in (("a", 7), ("b", 7), ("own", 7), ("a", 20))]
    assert pairs[0] is pairs[1] and len({plan.event() for plan, _ in pairs}) == 3
    for (ledger, records), (plan, event) in zip((("b", 7), ("own", 7), ("a", 20)), pairs[1:], strict=True):
        assert (plan, event) == (
            (alone := record_plan(record.of_ledger(ledger), records, settings)),
            alone.event(),
        )


@pytest.mark.parametrize("simulated", [True, False])
def test_real_data_that_change_are_another_ledgers(simulated: bool, tmp_path: Path) -> None:
    settings = replace(settings_in(tmp_path), seed=3 if simulated else None)
    assert settings.record is not None
    task = Made(simulated=simulated)
    bench = bench_of(task, settings)
    first = bench.ledger_name(0, settings, settings.record)
    task._data[0] = task.client_data(1)
    assert (bench.ledger_name(0, settings, settings.record) == first) is simulated


def test_forked_worker_charges_through_a_store_of_its_own(tmp_path: Path) -> None:
    bench = bench_of(Made(), settings_in(tmp_path))
    charge(bench, 0)
    process = os.fork()
    if process == 0:
        try:
            charge(bench, 0, 2)
            charge(bench, 1)
        finally:
            os._exit(len(bench._stores) != 2)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    paths = {charge(bench, 0, 3), charge(bench, 1, 2)}
    bench.close()
    assert sorted(len(state_at(path).releases) for path in paths) == [2, 3] and files(tmp_path) == [FILE]


def test_run_on_a_cluster_keeps_a_file_for_each_ledger() -> None:
    from fedveil.configs.settings import settings_from_overrides
    from fedveil.run.build import build

    asked = ["task=digits", "privacy=record", "num_rounds=1", "task.num_clients=3"]
    for more, own_files in (([], False), (["engine=ray", "engine.address=auto"], True)):
        federation = build(settings_from_overrides([*asked, *more]))
        assert federation.mode._unplanned(Path()).own_files is own_files
