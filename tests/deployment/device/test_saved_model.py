"""Exports of a device's models: the shared one by default, its own only on demand and with a card that says so."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import yaml

from fedveil.__main__ import run
from fedveil.deployment.device.client_bundle import read_client_bundle
from fedveil.deployment.device.device import read_device
from fedveil.deployment.device.run_end import record_end
from fedveil.deployment.provision import provision
from fedveil.messages.flower_adapter import claim_identity
from fedveil.messages.notices import RunOver
from fedveil.tasks.arrays import agreement_of
from fedveil.tasks.tables import load

SCHEMA = "label: y\ncolumns:\n  x: {low: 0, high: 4}\n  y: {categories: [no, yes]}\n"
ROWS = "x,y\n" + "".join(f"{row % 5},{'yes' if row % 5 < 2 else 'no'}\n" for row in range(100))
FEDERATION: dict[str, Any] = {
    "federation": "shops",
    "server": {"address": "localhost:8799"},
    "task": {"name": "csv", "data": "table.csv", "options": {"schema": "s.yaml"}},
    "policy": {"target_epsilon": 8.0, "target_delta": 1e-4},
    "personal": {"name": "after", "steps": 100, "learning_rate": 1.0},
    "clients": [{"name": "a"}],
}


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A client at which a run has ended, whose released model is wrong for its rows."""
    monkeypatch.setattr("os.fsync", lambda _: None)
    (tmp_path / "s.yaml").write_text(SCHEMA)
    (tmp_path / "f.yaml").write_text(yaml.safe_dump(FEDERATION))
    provision(tmp_path / "f.yaml", tmp_path / "shops", None)
    folder = tmp_path / "shops" / "clients" / "a"
    (folder / "table.csv").write_text(ROWS)
    (folder / "state").mkdir(exist_ok=True)
    model = {"weight": np.float32([[-4], [4]]), "bias": np.zeros(2, np.float32)}
    agreement = agreement_of(load(schema=str(folder / "schema.yaml"))) or ""
    record_end(folder / "state", RunOver("spring", "completed", 20, model, agreement))
    return folder


def made(client: Path) -> None:
    claim_identity(1)
    read_device(read_client_bundle(client)).own_models.make_missing()


def predicted(folder: Path, rows: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    assert run(["predict", str(folder), str(rows)]) == 0
    return [line.split(",")[0] for line in capsys.readouterr().out.splitlines()[1:]]


@pytest.mark.parametrize("to", ["safetensors", "int8"])
def test_exported_own_model_says_that_its_epsilon_is_infinite(
    client: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str
) -> None:
    made(client)
    rows = tmp_path / "new.csv"
    rows.write_text("x\n0\n1\n3\n4\n")
    assert run(["export", str(client), "--to", to]) == 0
    assert "epsilon is that of the run" in capsys.readouterr().out
    assert run(["export", str(client), "--to", to, "--personal"]) == 0
    assert "epsilon is infinite for this client's data, to whoever gets the model" in capsys.readouterr().out
    shared, own = (client / "export" / name for name in (to, f"personal-{to}"))
    cards = [json.loads((folder / "card.json").read_text()) for folder in (shared, own)]
    assert cards[0]["privacy"] == [] and cards[0]["released_sha256"] != cards[1]["released_sha256"]
    assert [(each["unit"], each["epsilon"]) for each in cards[1]["privacy"]] == [("client", "Infinity")]
    assert predicted(shared, rows, capsys) == ["no", "no", "yes", "yes"]
    assert predicted(own, rows, capsys) == predicted(client, rows, capsys) == ["yes", "yes", "no", "no"]


def test_exports_that_a_device_cannot_make_are_refused(
    client: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(*more: str) -> str:
        assert run(["export", str(client), "--to", "int8", *more]) == 2
        return capsys.readouterr().err

    assert "has no own model of its final model" in refusal("--personal")
    made(client)
    assert "a device has one client" in refusal("--personal", "--client", "0")
    assert "is in the clients' data folder" in refusal("--personal", "--public", str(client / "table.csv"))
    assert "choose one of" in refusal("--to", "peft")
    model = {"weight": np.zeros((2, 1), np.float32), "bias": np.zeros(2, np.float32)}
    record_end(client / "state", RunOver("summer", "completed", 20, model))
    assert "has no own model of its final model" in refusal("--personal")
    file = client / "client.toml"
    choice = {"kind": "linear", "data": "table.npz", "client": 0}
    file.write_text(tomli_w.dumps({**tomllib.loads(file.read_text()), "task": choice}))
    assert "any program reads model.safetensors" in refusal()
    assert not (client / "export").exists()
