"""Three hospitals that differ, as real processes: each ends with its own model, over a kill, and predicts with it."""

from __future__ import annotations

import json
import runpy
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
policy: {{target_epsilon: 1000.0, target_delta: 1e-4, purposes: [evaluation]}}
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
    *("privacy.target_epsilon=60", "privacy.target_delta=1e-4", "privacy.allow_large_delta=true"),
    *("link.clients=1", "link.wait=120", "link.deadline=60"),
)
LONG = 1_000_000  # steps: minutes of own training


def rows_of(name: str, rows: int, seed: int) -> tuple[str, list[str]]:
    """Return a table of a hospital without its label, and the labels."""
    inputs = np.random.default_rng(seed).normal(size=(rows, 2)).round(2)
    labels = ["yes" if each else "no" for each in inputs @ np.array(RULES[name]) > 0]
    return "x,z\n" + "".join(f"{x},{z}\n" for x, z in inputs), labels


@contextmanager
def hospitals(folder: Path, link: str) -> Iterator[object]:
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


@pytest.mark.parametrize("privacy", ["client_distributed"])
@pytest.mark.parametrize("link", ["grpc"])
def test_three_hospitals_predict_each_with_its_own_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], link: str, privacy: str
) -> None:
    with hospitals(tmp_path, link) as world:
        clients = {name: world.hearts / "clients" / name for name in RULES}
        set_steps(clients["west"], LONG)
        for name in ("south", "west"):
            world.client(name)
        once = world.start("client", "start", clients["north"], "--once")
        asked = (f"privacy={privacy}", f"task.held_out_file={tmp_path / 'public.csv'}")
        server = world.start("server", world.hearts / "server", *COMMON, *asked)
        assert server.wait() == 0, server.said
        own = {name: folder / "state" / "personal.safetensors" for name, folder in clients.items()}
        final = own["west"].with_name("model.safetensors")
        assert once.wait() == 0 and own["north"].exists(), once.said  # it ends with its own model
        until(lambda: final.exists() and own["south"].exists())
        world.clients["west"].kill()  # in the midst of its training
        assert not own["west"].exists() and not list(own["west"].parent.glob("*.new"))
        set_steps(clients["west"], 100)
        world.client("west")
        until(lambda: all(path.exists() for path in own.values()), lambda: world.clients["west"].said)
        result = json.loads((world.hearts / "server" / "runs" / "spring" / "result.json").read_text())
        assert result["status"] == "completed"
        for name, folder in clients.items():
            mine, note = accuracy(folder, name, capsys)
            assert mine > 0.9 and "its own model, from that of run spring" in note, (name, mine)
            stored = read_own(own[name])
            assert stored is not None and stored.choice.rows > 20
        shared = [accuracy(folder, name, capsys, "--shared")[0] for name, folder in clients.items()]
        assert min(shared) < 0.7
        # Nothing of an own model is where the server could see it.
        of_server = [each for each in (world.hearts / "server").rglob("*personal*")]
        assert not of_server
