"""Three hospitals that differ, as real processes: each ends with its own model, over a kill, and predicts with it."""

from __future__ import annotations

import json
import runpy
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w

from fedveil.__main__ import run
from fedveil.deployment.provision import provision
from fedveil.personal.state import read_own

SERVED = runpy.run_path(str(Path(__file__).parents[1] / "faults" / "served.py"))
until = SERVED["until"]
FEDERATION = """\
federation: hospitals
link: {link}
server: {{address: "localhost:{port}", listen: "127.0.0.1:{port}"}}
task: {{name: csv, data: table.csv, options: {{schema: schema.yaml}}}}
policy: {{target_epsilon: 1000000.0, target_delta: 1e-4, trust_server: true, purposes: [evaluation]}}
personal: {{name: after, steps: 100, learning_rate: 0.5}}
clients: [{{name: north}}, {{name: south}}, {{name: west}}]
"""
SCHEMA = """\
label: ill
columns:
  x: {low: -3, high: 3}
  z: {low: -3, high: 3}
  ill: {categories: ["no", "yes"]}
"""
# What makes a patient ill is the opposite in two of them: no shared model serves both.
RULES = {"north": (1, 0), "south": (-1, 0), "west": (0, 1)}
COMMON = (
    *("task=csv", "num_rounds=2", "cohort=all", "accept_vacuous=true", "run=spring"),
    *("privacy.target_epsilon=100000", "privacy.target_delta=1e-4", "privacy.allow_large_delta=true"),
    *("personal=after", "evaluate.clients=final", "evaluate.noise_multiplier=0.02"),
    *("link.clients=1", "link.wait=120", "link.deadline=60"),
)
LONG = 1_000_000  # steps: minutes of own training


def rows_of(name: str, rows: int, seed: int) -> tuple[str, list[str]]:
    """Return a table of a hospital without its label, and the labels."""
    inputs = np.random.default_rng(seed).normal(size=(rows, 2)).round(2)
    labels = ["yes" if each else "no" for each in inputs @ np.array(RULES[name]) > 0]
    return "x,z\n" + "".join(f"{x},{z}\n" for x, z in inputs), labels


@contextmanager
def hospitals(folder: Path, link: str) -> Iterator[Any]:
    """Provision three hospitals with their tables; their agents start by `client`."""
    text = FEDERATION.format(link=link, port=SERVED["free_port"]())
    (folder / "federation.yaml").write_text(text)
    (folder / "schema.yaml").write_text(SCHEMA)
    provision(folder / "federation.yaml", folder / "hospitals", None)
    for seed, name in enumerate(RULES):
        table, labels = rows_of(name, 240, seed)
        header, *lines = table.splitlines()
        rows = [f"{line},{label}" for line, label in zip(lines, labels, strict=True)]
        path = folder / "hospitals" / "clients" / name / "table.csv"
        path.write_text("\n".join([f"{header},ill", *rows, ""]))
        (folder / "public.csv").write_text("\n".join([f"{header},ill", *rows[:40], ""]))
    made = SERVED["Served"](folder / "hospitals", SERVED["starter_in"]({}))
    with SERVED["living"](made):
        yield made


def set_steps(client: Path, steps: int) -> None:
    file = client / "client.toml"
    values = tomllib.loads(file.read_text())
    file.write_text(tomli_w.dumps({**values, "personal": {**values["personal"], "steps": steps}}))


def accuracy(client: Path, name: str, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[float, str]:
    """Return the accuracy of a client's predictions on rows that nobody has seen, and what is said of the model."""
    table, labels = rows_of(name, 300, 99)
    path = client / "new.csv"
    path.write_text(table)
    assert run(["predict", str(client), str(path), *more]) == 0
    out, err = capsys.readouterr()
    predicted = [line.split(",")[0] for line in out.splitlines()[1:]]
    return float(np.mean([a == b for a, b in zip(predicted, labels, strict=True)])), err


def gains_in(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the answers of the last evaluation by name."""
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "completed", result["reason"]
    (record,) = result["evaluations"]
    return {each["name"]: each["figures"] for each in record["answers"]}


@pytest.mark.parametrize(
    ("link", "privacy"),
    [
        ("grpc", "client_central"),
        pytest.param("grpc", "client_distributed", marks=pytest.mark.campaign),
        pytest.param("flower", "client_distributed", marks=pytest.mark.campaign),
    ],
)
def test_three_hospitals_predict_each_with_its_own_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], link: str, privacy: str
) -> None:
    with hospitals(tmp_path, link) as world:
        clients = {name: world.hearts / "clients" / name for name in RULES}
        for name in ("south", "west"):
            world.client(name)
        once = world.start("client", "start", clients["north"], "--once")
        asked = (f"privacy={privacy}", f"task.held_out_file={tmp_path / 'public.csv'}")
        server = world.start("server", world.hearts / "server", *COMMON, *asked)
        assert server.wait() == 0, server.said
        run_folder = world.hearts / "server" / "runs" / "spring"
        gains = gains_in(run_folder)["personal - shared"]
        if privacy == "client_central":  # three clients cannot be told from the least noise of masks
            assert gains[0]["low"] > 0.1 and gains[1]["value"] > 0.5, gains
        own = {name: folder / "state" / "personal.safetensors" for name, folder in clients.items()}
        assert once.wait() == 0 and own["north"].exists(), once.said  # it ends with its own model
        until(lambda: own["south"].exists() and own["west"].exists())
        for name, folder in clients.items():
            mine, note = accuracy(folder, name, capsys)
            assert mine > 0.9 and "its own model, from that of run spring" in note, (name, mine)
            stored = read_own(own[name])
            assert stored is not None and stored.choice.rows > 20
        shared = [accuracy(folder, name, capsys, "--shared")[0] for name, folder in clients.items()]
        assert min(shared) < 0.7
        # Nothing of an own model is where the server could see it.
        assert not [*(world.hearts / "server").rglob("*personal*")]
        dies_in_its_own_training(world, clients["west"], own["west"])


def dies_in_its_own_training(world: Any, client: Path, own: Path) -> None:
    """Kill an agent in the midst of its own training; the next one trains again from the same final model."""
    world.clients["west"].kill()
    first = own.read_bytes()
    own.unlink()
    set_steps(client, LONG)
    world.client("west")

    def trains() -> bool:
        health = json.loads((client / "state" / "health.json").read_text())
        return health["pid"] == world.clients["west"].pid and health["state"] != "starting"

    until(trains)
    world.clients["west"].kill()
    assert not own.exists()
    set_steps(client, 100)
    world.client("west")
    until(own.exists, lambda: world.clients["west"].said)
    assert own.read_bytes() == first
