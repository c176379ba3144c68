"""Own models of a device: made once for each final model, made again after a kill, and seen by the owner alone."""

from __future__ import annotations

import json
import runpy
import threading
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from flwr.app import Message
from safetensors.numpy import load_file

from fedveil.__main__ import run
from fedveil.deployment.device import commands
from fedveil.deployment.device.agent import Agent
from fedveil.deployment.device.client_bundle import TaskChoice, read_client_bundle
from fedveil.deployment.device.device import Device, read_device
from fedveil.deployment.device.own_models import OwnModels, making_own_models
from fedveil.deployment.device.personal_choice import PersonalChoice
from fedveil.deployment.device.run_end import OWN_MODEL, record_end, sha256_of_final
from fedveil.deployment.device.run_rows import TrainedRows, note_rows
from fedveil.messages.flower_adapter import claim_identity
from fedveil.messages.notices import RunOver, message_to
from fedveil.personal.choice import SHARED
from fedveil.personal.state import FILE, read_own
from fedveil.tasks.arrays import read_arrays

MADE = runpy.run_path(str(Path(__file__).parents[2] / "faults" / "devices.py"))
CLASSES, FEATURES = MADE["CLASSES"], MADE["FEATURES"]
AFTER = PersonalChoice(name="after", steps=40, learning_rate=0.5)
HEART = TaskChoice(name="heart", client=2)
BASE = {"weight": np.zeros((CLASSES, FEATURES), np.float32), "bias": np.zeros(CLASSES, np.float32)}


def device_of(bundle: Path, personal: PersonalChoice = AFTER, task: TaskChoice | None = None) -> Device:
    claim_identity(1)
    read = read_client_bundle(bundle)
    settings = replace(read.settings, personal=personal, task=task or read.settings.task)
    return read_device(replace(read, settings=settings))


def separable(bundle: Path, rows: int = 200) -> None:
    """Give the device rows that a linear model can learn."""
    draw = np.random.default_rng(3)
    inputs = draw.normal(size=(rows, FEATURES)).astype(np.float32)
    np.savez(bundle / "device.npz", inputs=inputs, targets=inputs[:, :CLASSES].argmax(1))


@pytest.fixture
def bundle(made: Path) -> Path:
    folder = made / "clients" / "c0"
    separable(folder)
    (folder / "state").mkdir(exist_ok=True)
    return folder


def ended(device: Device, name: str = "spring", model: dict[str, Any] | None = None) -> None:
    record_end(device.bundle.state, RunOver(name, "completed", 3, BASE if model is None else model))


def test_the_file_has_the_name_that_the_room_gives_it() -> None:
    assert OWN_MODEL == FILE


def test_each_final_model_is_trained_on_once(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = device_of(bundle)
    path = device.bundle.state / FILE
    device.own_models.make_missing()
    assert not path.exists()  # before any run
    ended(device)
    device.own_models.make_missing()
    own, first = read_own(path), path.read_bytes()
    assert own is not None and own.run == "spring" and own.shared == sha256_of_final(device.bundle.state)
    columns = own.choice.columns
    assert columns["personal"]["accuracy"] > columns["shared"]["accuracy"] + 0.2
    assert own.arrays["weight"].any() and path.stat().st_mode & 0o777 == 0o600
    monkeypatch.setattr(type(device.task), "own_model", None)
    OwnModels(device.bundle, device.task).make_missing()  # as after a restart
    monkeypatch.undo()
    ended(device, "summer", {**BASE, "bias": np.ones(CLASSES, np.float32)})
    device.own_models.make_missing()
    later = read_own(path)
    assert later is not None and later.run == "summer" and path.read_bytes() != first


def test_a_killed_device_makes_the_same_own_model_again(bundle: Path) -> None:
    device = device_of(bundle)
    ended(device)
    device.own_models.make_missing()
    path = device.bundle.state / FILE
    first = path.read_bytes()
    for damaged in (b"", first[:40], first[:-5]):
        path.write_bytes(damaged)
        device_of(bundle).own_models.make_missing()
        assert path.read_bytes() == first
    device_of(bundle, replace(AFTER, steps=1)).own_models.make_missing()
    assert path.read_bytes() != first  # the owner chose otherwise


def test_own_model_uses_the_rows_and_the_training_of_the_run(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, seen = device_of(bundle), list[TrainedRows]()
    rows = TrainedRows(0.4, training=MADE["ORDER"].training)
    note_rows(device.bundle.state, rows)
    ended(device)
    original = type(device.task).own_model
    monkeypatch.setattr(
        type(device.task),
        "own_model",
        lambda task, shared, rows, *more: seen.append(rows) or original(task, shared, rows, *more),
    )
    device.own_models.make_missing()
    own = read_own(device.bundle.state / FILE)
    assert seen == [rows] and own is not None and 60 <= own.choice.rows <= 100


@pytest.mark.parametrize("name", ["after", "ditto"])
def test_a_device_with_torch_makes_its_own_model(bundle: Path, name: str) -> None:
    device = device_of(bundle, PersonalChoice(name=name, steps=50, learning_rate=0.1), HEART)
    ended(device, model=read_arrays(device.task._own_bench.model))
    device.own_models.make_missing()
    own = read_own(device.bundle.state / FILE)
    assert own is not None and own.choice.rows > 10
    assert {name: value.shape for name, value in own.arrays.items()} == {
        name: value.shape for name, value in load_file(device.bundle.state / "model.safetensors").items()
    }
    assert own.choice.columns["personal"]["accuracy"] >= own.choice.columns["shared"]["accuracy"]


def test_the_server_gets_its_receipt_before_the_own_model(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its training waits here until the reply is there, and --once ends after it."""
    device, replied = device_of(bundle), threading.Event()
    original = OwnModels.make_missing
    monkeypatch.setattr(OwnModels, "make_missing", lambda models: replied.wait(60) and original(models))
    agent = Agent(device.bundle)
    with making_own_models(device.own_models) as agent.wake:
        reply: Message = agent.handle(message_to(2, RunOver("spring", "completed", 3, BASE)))
        assert not reply.has_error() and not (device.bundle.state / FILE).exists()
        replied.set()
    assert read_own(device.bundle.state / FILE) is not None


def test_a_missing_own_model_follows_at_the_next_start(bundle: Path) -> None:
    device = device_of(bundle)
    ended(device)
    with making_own_models(device.own_models):
        pass
    assert read_own(device.bundle.state / FILE) is not None


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("diverged")])
def test_a_failing_own_training_ends_no_device(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    device = device_of(bundle)
    ended(device)

    def fail(*more: object) -> None:
        raise error

    monkeypatch.setattr("fedveil.deployment.device.own_models.write_own", fail)
    with making_own_models(device.own_models) as wake:
        wake()
    assert "own model is not" in caplog.text and not (device.bundle.state / FILE).exists()


def test_status_shows_the_owner_which_own_model_stands(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    device = device_of(bundle)
    ended(device)
    device.own_models.make_missing()
    commands.status(bundle, as_json=False)
    line = next(each for each in capsys.readouterr().out.splitlines() if each.startswith("own model"))
    assert "of run spring" in line and "held-out rows" in line and "local only" in line
    commands.status(bundle, as_json=True)
    plain = json.loads(capsys.readouterr().out)["personal"]
    assert plain["stands"] and plain["name"] != SHARED and plain["rows"] > 20
    ended(device, "summer", {**BASE, "bias": np.ones(CLASSES, np.float32)})
    commands.status(bundle, as_json=False)
    assert "until one of the later final model is made" in capsys.readouterr().out
    commands.forget(bundle, ledgers=False)
    assert not (device.bundle.state / FILE).exists()


def test_prediction_at_a_client_uses_its_own_model(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = bundle / "client.toml"
    choice = {"name": "after", "steps": 60, "learning_rate": 0.5}
    file.write_text(tomli_w.dumps({**tomllib.loads(file.read_text()), "personal": choice}))
    claim_identity(1)
    device = read_device(read_client_bundle(bundle))
    ended(device)
    draw = np.random.default_rng(9)
    rows = draw.normal(size=(200, FEATURES)).astype(np.float32)
    np.save(tmp_path / "new.npy", rows)
    truth = rows[:, :CLASSES].argmax(1)

    def accuracy(*more: str) -> tuple[float, str]:
        assert run(["predict", str(bundle), str(tmp_path / "new.npy"), *more]) == 0
        out, err = capsys.readouterr()
        classes = [int(line.split(",")[0]) for line in out.splitlines()[1:]]
        return float((np.array(classes) == truth).mean()), err

    before, note = accuracy()
    assert before < 0.5 and not note
    device.own_models.make_missing()
    own, note = accuracy()
    assert own > 0.8 and "its own model, from that of run spring; --shared takes" in note
    shared, note = accuracy("--shared")
    assert shared == before and "the model of run spring" in note
    ended(device, "summer", {**BASE, "bias": np.float32([0, 1, 0])})  # whose own model is not made yet
    assert accuracy()[1] == ""
