"""Other libraries' models in federations of real processes: a server, and three clients that each start by a command."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

SHOPS = Path(__file__).parents[1] / "fixtures" / "shops.py"
RECORD = ["privacy=record", "secagg=masked"]
CLIENT = ["privacy=client_distributed", "cohort=all", "--accept-vacuous"]


@pytest.mark.campaign
@pytest.mark.parametrize(
    ("kind", "package", "how"),
    [
        ("lightning", "pytorch_lightning", RECORD),
        ("lora", "peft", RECORD),
        ("sklearn", "sklearn", CLIENT),
    ],
)
def test_three_real_clients_train_an_adapters_task_and_keep_its_model(
    tmp_path: Path, processes: Any, kind: str, package: str, how: list[str]
) -> None:
    pytest.importorskip(package)
    shutil.copy(SHOPS, tmp_path)
    federation = {
        "federation": kind,
        "server": {"address": f"localhost:{processes.port}", "listen": f"127.0.0.1:{processes.port}"},
        "task": {"target": f"shops:{kind}", "allow_modules": ["shops"]},
        "policy": {"target_epsilon": 40.0, "target_delta": 1e-2, "minimum_cohort": 3},
        "clients": [{"name": "east"}, {"name": "west"}, {"name": "north"}],
    }
    (tmp_path / "f.yaml").write_text(yaml.safe_dump(federation))
    processes.ran("provision", "f.yaml")
    names = ("east", "west", "north")
    clients = [processes.start("client", "start", f"{kind}/clients/{name}", "--once") for name in names]
    own = ["task=custom", f"task.target=shops:{kind}", "allow_modules=[shops]", "num_rounds=2"]
    bounds = ["privacy.target_epsilon=8", "privacy.target_delta=1e-2"]
    said = processes.ran("server", f"{kind}/server", *own, *bounds, *how)
    assert "completed: 2 rounds" in said and "dropped" not in said
    assert [client.wait(timeout=60) for client in clients] == [0, 0, 0]
    assert (tmp_path / kind / "clients" / "west" / "state" / "model.safetensors").exists()
    if kind != "lora":
        np.save(tmp_path / "new.npy", np.ones((2, 4), np.float32))
        said = processes.ran("predict", f"{kind}/clients/east", "new.npy")
        assert said.startswith("class,probability\n1,0.")
