"""Layers that stay on devices: in no message and no file of the server, for each run, past kills, as far as owners allow."""

import json
import os
import runpy
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from fedveil.base.refusal import Refusal
from fedveil.deployment.serve import serve
from fedveil.personal import own_layers

FAULTS = Path(__file__).parents[1] / "faults"
SERVED = runpy.run_path(str(FAULTS / "served.py"))
until = SERVED["until"]
LAYERS = ("personal=layers", "personal.layers=[*bias]")
COMMON = ("task=digits", "batch_size=40", "accept_vacuous=true", "privacy.allow_large_delta=true", *LAYERS)
CENTRAL = (*COMMON, "privacy=client_central", "privacy.target_epsilon=5")

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm")


def layers_of(hearts: Path, name: str) -> list[Path]:
    return sorted((hearts / "clients" / name / "state" / "personal" / "layers").rglob("0*.safetensors"))


def served(hearts: Path, *keys: str, run: str = "one") -> dict[str, Any]:
    """Run on devices that are called in turn, and return the result."""
    grid = SERVED["Devices"](hearts / "clients")
    serve(hearts / "server", [*keys, f"run={run}"], reach=SERVED["reaching"](grid))
    return json.loads((hearts / "server" / "runs" / run / "result.json").read_text())


@pytest.mark.parametrize("mode", ["client_central", "client_distributed"])
def test_devices_store_layers_that_no_server_has(mode: str, tmp_path: Path) -> None:
    hearts = SERVED["make_federation"](tmp_path)
    result = served(hearts, *COMMON, f"privacy={mode}", "privacy.target_epsilon=5", "num_rounds=3")
    assert (result["status"], result["rounds_completed"]) == ("completed", 3)
    run = hearts / "server" / "runs" / "one"
    (weight,) = load_file(run / "model.safetensors").values()
    assert weight.shape == (10, 64)
    for name in SERVED["NAMES"]:
        before, last = layers_of(hearts, name)
        assert [each.name for each in (before, last)] == ["000002.safetensors", "000003.safetensors"]
        (bias,) = load_file(last).values()
        assert bias.shape == (10,) and bias.any()
        assert last.stat().st_mode & 0o077 == 0
    values = {layers_of(hearts, name)[-1].read_bytes() for name in SERVED["NAMES"]}
    assert len(values) == 5


def test_devices_evaluate_their_whole_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hearts, true, loaded = SERVED["make_federation"](tmp_path), own_layers._newest, list[Path | None]()

    def newest(folder: Path, last: float = float("inf")) -> Path | None:
        loaded.append(true(folder, last))
        return loaded[-1]

    monkeypatch.setattr(own_layers, "_newest", newest)
    result = served(hearts, *CENTRAL, "num_rounds=2", "evaluate.clients=final", "evaluate.figures=[metric]")
    (evaluation,) = result["evaluations"]
    assert evaluation["answers"], evaluation
    assert {each and each.name for each in loaded[-5:]} == {"000002.safetensors"}


def test_layers_of_a_second_run_are_its_own(tmp_path: Path) -> None:
    hearts = SERVED["make_federation"](tmp_path)
    served(hearts, *CENTRAL, "num_rounds=1")
    first = {path: path.read_bytes() for path in layers_of(hearts, "boston")}
    served(hearts, *CENTRAL, "num_rounds=1", "privacy.target_epsilon=8", run="two")
    assert first == {path: path.read_bytes() for path in first}
    assert len(layers_of(hearts, "boston")) == 2


def test_an_owner_may_refuse_to_store_layers(tmp_path: Path) -> None:
    hearts = SERVED["make_federation"](tmp_path)
    for name in SERVED["NAMES"]:
        policy = hearts / "clients" / name / "policy.toml"
        policy.write_text(policy.read_text().replace("own_layers = true", "own_layers = false"))
    result = served(hearts, *CENTRAL, "num_rounds=1")
    assert result["rounds_abandoned"] == 1
    assert not layers_of(hearts, "boston")
    all_travel = (key for key in (*CENTRAL, "num_rounds=1", "privacy.target_epsilon=8") if key not in LAYERS)
    result = served(hearts, *all_travel, run="two")
    assert result["rounds_abandoned"] == 0


def test_a_server_refuses_layers_where_records_are_protected(tmp_path: Path) -> None:
    hearts = SERVED["make_federation"](tmp_path)
    with pytest.raises(Refusal, match="seen a record before its noise"):
        served(hearts, *COMMON, "privacy=record", "privacy.target_epsilon=8")
    assert not (hearts / "server" / "runs").exists()


def test_layers_of_a_killed_device_are_those_that_it_stored(tmp_path: Path) -> None:
    asked = (
        *CENTRAL,
        "num_rounds=6",
        "learning_rate=0.1",
        "link.clients=1",
        "link.wait=60",
        "link.deadline=20",
        "run=one",
    )
    with SERVED["serving"](SERVED["Served"], tmp_path) as world:
        hearts = world.hearts
        server = world.start("server", hearts / "server", *asked)
        until(lambda: len(layers_of(hearts, "boston")) == 2 or not server.alive, lambda: server.said)
        os.kill(server.pid, signal.SIGSTOP)
        world.clients["boston"].kill()
        files = layers_of(hearts, "boston")
        number = int(files[-1].stem)
        assert number < 5
        for each in files:
            arrays = {name: value.copy() for name, value in load_file(each).items()}
            for value in arrays.values():
                value[3] = 50.0  # no training reaches it
            save_file(arrays, each)
        world.client("boston")
        os.kill(server.pid, signal.SIGCONT)
        assert server.wait() == 0, server.said
        newest = layers_of(hearts, "boston")[-1]
        assert int(newest.stem) > number
        (bias,) = load_file(newest).values()
        assert bias[3] > 25
        assert all(abs(load_file(layers_of(hearts, "hungary")[-1])[name][3]) < 25 for name in arrays)
