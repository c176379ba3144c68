"""Rows that a device leaves out for its own model: in no training of a run, and known after a restart."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedveil.deployment.device import linear
from fedveil.deployment.device.client_bundle import TaskChoice, read_client_bundle
from fedveil.deployment.device.device import Device, read_device
from fedveil.deployment.device.personal_choice import PersonalChoice
from fedveil.deployment.device.run_rows import TrainedRows, note_rows, read_rows
from fedveil.messages.flower_adapter import claim_identity, name_message
from fedveil.messages.local_training import LocalTraining
from fedveil.messages.training_order import ORDER_KEY, ModeName, RecordTerms, TrainingOrder
from fedveil.messages.wire import instruct, memory_arrays
from fedveil.privacy.budget import Adjacency
from fedveil.privacy.mechanisms.sum_spec import SumSpec
from fedveil.strategies.record_plan import calibrated_noise
from fedveil.tasks.arrays import read_arrays

MADE = runpy.run_path(str(Path(__file__).parents[2] / "faults" / "devices.py"))
CENTRAL, code_of, in_the_clear = (MADE[name] for name in ("CENTRAL", "code_of", "in_the_clear"))
RECORD = RecordTerms(4.0, 1e-3, 1.0, Adjacency.ZERO_OUT, participations=3)
AFTER = PersonalChoice(name="after")


def device_of(bundle: Path, personal: PersonalChoice, task: TaskChoice | None = None) -> Device:
    claim_identity(1)
    read = read_client_bundle(bundle)
    settings = replace(read.settings, personal=personal, task=task or read.settings.task)
    return read_device(replace(read, settings=settings))


@pytest.fixture
def bundle(made: Path) -> Path:
    return made / "clients" / "c0"


@pytest.mark.parametrize(("personal", "share"), [(PersonalChoice(), None), (AFTER, 0.2)])
def test_rows_for_an_own_model_train_no_shared_one(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, personal: PersonalChoice, share: float | None
) -> None:
    sizes: list[int] = []
    train = linear.train_round
    monkeypatch.setattr(
        linear,
        "train_round",
        lambda message, client, table, settings: (
            sizes.append(len(table)) or train(message, client, table, settings)
        ),
    )
    device = device_of(bundle, personal)
    assert code_of(device, in_the_clear(CENTRAL)) == 0
    assert code_of(device, in_the_clear(replace(CENTRAL, held_out=0.4), 2)) == 0
    trained, _ = linear.parts_of(linear.read_table(bundle / "device.npz"), share)
    of_order, _ = linear.parts_of(linear.read_table(bundle / "device.npz"), 0.4)
    assert sizes == [len(trained), len(of_order)]
    stored = TrainedRows(0.4, training=CENTRAL.training) if personal.trains else None
    assert read_rows(device.bundle.state) == stored


def test_a_split_is_written_once_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note_rows(tmp_path, TrainedRows(0.2))
    monkeypatch.setattr("fedveil.deployment.device.run_rows.replace_file", None)
    note_rows(tmp_path, TrainedRows(0.2))
    assert read_rows(tmp_path) == TrainedRows(0.2) and read_rows(tmp_path / "none") is None


def test_noise_on_records_is_planned_from_the_rows_that_train(bundle: Path, tmp_path: Path) -> None:
    order = TrainingOrder("spring", ModeName.RECORD, LocalTraining(0.1, 1, 50), record=RECORD)
    heart = TaskChoice(name="heart", client=2)
    device = device_of(bundle, AFTER, heart)
    settings = device.merged(order)
    assert settings.held_out == 0.2 and settings.record is not None
    rows, trained = device.task.count(None), device.task.count(None, 0.2)
    assert 0.6 * rows < trained < 0.95 * rows
    noise = settings.record.noise_multiplier(trained)
    assert noise == calibrated_noise(settings.record, trained, settings, 3)
    arrays = memory_arrays(read_arrays(device.task._own_bench.model))
    content = RecordDict({"arrays": arrays, "config": ConfigRecord({ORDER_KEY: order.to_json()})})
    message = Message(instruct(content, SumSpec(None), order.run, 1), 2, "train")
    name_message(message, "m1")
    assert code_of(device, message) == 0
    assert read_rows(device.bundle.state) == TrainedRows(0.2, alone=True, training=order.training)
