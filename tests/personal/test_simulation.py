"""Personal models of a simulation: where they meet modes, engines and resumption, and that sums stay as they are."""

import dataclasses
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedveil as fv
from fedveil.base.refusal import Refusal
from fedveil.personal import simulation
from fedveil.personal.state import read_own
from fedveil.run.queries import Query
from fedveil.tasks import load_task
from fedveil.tasks.held_back import held_back, held_back_of

CLIENTS = 5
SMALL = {"num_rounds": 2, "seed": 3, "quiet": True, "audit": "off", "learning_rate": 1.0}
HIDDEN = {"target_epsilon": 20.0, "allow_large_delta": True}
MODES: dict[str, dict[str, Any]] = {
    "none": {"privacy": "none"},
    "record": {"privacy": {"name": "record", "target_epsilon": 8.0}},
    "client_central": {"privacy": {"name": "client_central", **HIDDEN}},
    "client_distributed": {"privacy": {"name": "client_distributed", **HIDDEN}},
    "record_distributed": {"privacy": {"name": "record_distributed", "target_epsilon": 8.0}},
    "record_and_client": {"privacy": {"name": "record_and_client", "client": HIDDEN}},
    "masked": {"privacy": "none", "cohort": "all", "secagg": "masked"},
    "average": {"privacy": "none", "model": "average"},
    "arms": {
        "privacy": "none",
        "cohort": "all",
        "tune": {"name": "learning_rate", "values": [0.5, 1.0], "rounds": 1},
    },
    "workers": {"privacy": "none", "engine": {"name": "inprocess", "workers": 2}},
}


def task_of(clients: int = CLIENTS) -> Any:
    return load_task("digits", {"num_clients": clients, "partition": "shards"})


def run_of(folder: Path, examples: Any = None, **keys: Any) -> fv.FinishedRun:
    return fv.simulate(examples or task_of(), folder=folder, **SMALL | {"privacy": "none"} | keys)


@pytest.mark.parametrize("mode", MODES)
def test_sums_are_those_without_personal_models(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = MODES[mode] | ({"num_rounds": 1} if mode in ("record", "record_and_client") else {})
    run = run_of(tmp_path / "with", **keys, personal="after")
    if mode == "record_distributed":  # whose public number of records counts those that are held out
        monkeypatch.setattr(simulation, "PERSONAL_MODELS", Query(held_out=lambda settings: 0.2))
        plain = run_of(tmp_path / "without", **keys, personal="after")
    else:
        rest = held_back(task_of(), 0.2, alone=mode.startswith("record"))
        plain = run_of(tmp_path / "without", rest, **keys)
    model, same = ((each.folder / "model.safetensors").read_bytes() for each in (run, plain))
    assert (run.status, model) == ("completed", same)
    assert {name.partition("/")[0] for name in run.metrics if "/" in name} == {
        "shared",
        "personal",
        "local_only",
    }
    assert run.metrics["accuracy"] == plain.metrics["accuracy"]
    assert run.privacy == plain.privacy
    assert len(list((run.folder / "personal").iterdir())) == CLIENTS


def test_a_personal_model_is_of_its_clients_rows(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", personal={"name": "ditto", "pull": 0.5})
    task = held_back(task_of(), 0.2)
    rows, hits = 0, 0
    for client in range(CLIENTS):
        own, held_out = read_own(simulation.own_path(run.folder, client)), held_back_of(task, client)
        assert own is not None and held_out is not None
        assert own.keys["pull"] == 0.5
        answers = held_out.inputs.numpy() @ own.arrays["weight"].T + own.arrays["bias"]
        rows += len(held_out)
        hits += int((answers.argmax(1) == held_out.targets.numpy()).sum())
    assert run.result["personal"]["rows"] == rows
    assert sum(run.result["personal"]["clients"].values()) == CLIENTS
    assert hits / rows >= run.metrics["shared/accuracy"]  # by shards the clients differ much
    assert run.metrics["personal/accuracy"] > run.metrics["shared/accuracy"] + 0.1


def test_the_manifest_binds_no_personal_model(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", personal="after")
    files = json.loads((run.folder / "manifest.json").read_bytes())["files"]
    assert "model.safetensors" in files
    assert not [name for name in files if "client-" in name or "personal" in name]
    assert (run.folder / "personal").stat().st_mode & 0o777 == 0o700


def dying(count: int) -> Callable[[], None]:
    """Return what makes this process kill itself once it has written so many own models."""

    def arrange() -> None:
        calls, true = 0, simulation.write_own

        def deadly(*args: Any) -> None:
            nonlocal calls
            calls += 1
            true(*args)
            if calls == count:
                os.kill(os.getpid(), signal.SIGKILL)

        simulation.write_own = deadly

    return arrange


def test_a_run_killed_among_own_models_goes_on_there(commands: Any) -> None:
    run, calm = commands.folder / "run", commands.folder / "calm"
    keys = ("task=digits", "task.num_clients=6", "personal=after", "num_rounds=2", "privacy=none")
    code, _ = commands.run("simulate", *keys, f"hydra.run.dir={run}", first=dying(4))
    assert code == -signal.SIGKILL
    files = sorted((run / "personal").iterdir())
    written = [(each.name, each.stat().st_mtime_ns) for each in files]
    lines = (run / "metrics.jsonl").read_bytes()
    assert len(written) == 4 and not (run / "result.json").exists()
    code, command = commands.run("simulate", f"resume={run}")
    assert code == 0, command.err
    files = sorted((run / "personal").iterdir())
    assert [(each.name, each.stat().st_mtime_ns) for each in files][:4] == written
    assert (run / "metrics.jsonl").read_bytes() == lines  # no round again
    code, _ = commands.run("simulate", *keys, f"hydra.run.dir={calm}")
    results = [json.loads((each / "result.json").read_bytes()) for each in (run, calm)]
    assert results[0]["personal"] == results[1]["personal"]
    assert len(files) == 6


def test_real_clients_on_this_machine_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(Refusal, match="lie with the clients: deploy them"):
        real = dataclasses.replace(task_of(), simulated=False)
        run_of(tmp_path / "run", real, seed=None, personal="after")
    assert not (tmp_path / "run").exists()


def test_layers_that_match_nothing_are_refused_before_a_run(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"personal.layers=\['head.\*'\]: matches no parameter"):
        run_of(tmp_path / "run", personal={"name": "after", "layers": ["head.*"]})
    assert not (tmp_path / "run").exists()


class Threshold:
    """NumPy task: the mean of a client's targets."""

    simulated, num_clients = True, 4

    def arrays(self) -> dict[str, np.ndarray]:
        return {"mean": np.zeros(1)}

    def fit(self, arrays: Any, inputs: Any, targets: Any, training: Any) -> dict[str, np.ndarray]:
        mean = arrays["mean"]
        for _ in range(training.local_epochs):
            mean = mean + training.learning_rate * (targets.mean(keepdims=True) - mean)
        return {"mean": mean}

    def predict(self, arrays: Any, inputs: Any) -> np.ndarray:
        return np.repeat(arrays["mean"], len(inputs))

    def loss(self, outputs: Any, targets: Any) -> float:
        return float(((outputs - targets) ** 2).mean())

    def metrics(self, outputs: Any, targets: Any) -> dict[str, float]:
        return {"error": float(abs(outputs - targets).mean())}

    def client_data(self, client: int) -> Any:
        draw = np.random.default_rng(client)
        return draw.normal(size=(30, 1)), client + 0.1 * draw.normal(size=30)

    def held_out(self) -> Any:
        return self.client_data(0)


def test_a_numpy_task_trains_by_its_own_fit(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", Threshold(), learning_rate=0.5, personal="after")
    assert run.metrics["personal/error"] < 0.2 < run.metrics["shared/error"]


def test_a_numpy_task_has_no_pull(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="trains by a function of its own"):
        run_of(tmp_path / "run", Threshold(), personal="ditto")
