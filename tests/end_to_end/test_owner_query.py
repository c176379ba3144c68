"""Three devices whose rows a query gives, as real processes: none executes it before its owner lists it."""

from __future__ import annotations

import json
import re
import runpy
import sqlite3
from pathlib import Path

import numpy as np

from fedveil.deployment.provision import provision

SERVED = runpy.run_path(str(Path(__file__).parents[1] / "faults" / "served.py"))
FEDERATION = """\
federation: wards
server: {{address: "localhost:{port}", listen: "127.0.0.1:{port}"}}
task: {{name: csv, query: "SELECT x, ill FROM stays WHERE x < 9", database: ward.db, options: {{schema: schema.yaml}}}}
policy: {{target_epsilon: 8.0, target_delta: 1e-4}}
clients: [{{name: north}}, {{name: south}}, {{name: west}}]
"""
SCHEMA = 'label: ill\ncolumns:\n  x: {low: -3, high: 3}\n  ill: {categories: ["no", "yes"]}\n'


def write_ward(path: Path, rows: int, seed: int) -> None:
    numbers = np.random.default_rng(seed).normal(size=rows)
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE stays (name TEXT, x REAL, ill TEXT)")
        people = [("Ann", float(x), "yes" if x > 0 else "no") for x in numbers]
        connection.executemany("INSERT INTO stays VALUES (?, ?, ?)", [*people, ("Bob", 99.0, "no")])
    connection.close()


def test_devices_train_on_a_query_that_their_owners_list(tmp_path: Path) -> None:
    (tmp_path / "federation.yaml").write_text(FEDERATION.format(port=SERVED["free_port"]()))
    (tmp_path / "schema.yaml").write_text(SCHEMA)
    rows = [f"{x / 10},{'yes' if x > 0 else 'no'}" for x in range(-20, 20)]
    (tmp_path / "public.csv").write_text("\n".join(["x,ill", *rows, ""]))
    provision(tmp_path / "federation.yaml", tmp_path / "wards", None)
    world = SERVED["Served"](tmp_path / "wards", SERVED["starter_in"]({}))
    with SERVED["living"](world):
        clients = {path.name: path for path in (world.hearts / "clients").iterdir()}
        for seed, folder in enumerate(clients.values()):
            write_ward(folder / "ward.db", 120, seed)
        before = world.start("client", "start", clients["north"])
        assert before.wait() == 2
        line = re.search(r'queries = \["[0-9a-f]{64}"\]', before.said)
        assert line is not None and "it reads ward.db with this device's rights" in before.said
        told = world.start("client", "status", clients["north"])
        assert told.wait() == 1 and "not listed, and not executed" in told.said and line[0] in told.said
        for name, folder in clients.items():
            policy = folder / "policy.toml"
            policy.write_text(f"{line[0]}\n{policy.read_text()}")
            world.client(name)
        options = ("task=csv", f"task.held_out_file={tmp_path / 'public.csv'}", "num_rounds=2", "run=spring")
        more = ("privacy.target_epsilon=8", "privacy.target_delta=1e-4", "batch_size=40", "cohort=all")
        server = world.start(
            "server", world.hearts / "server", *options, *more, "link.clients=1", "link.wait=120"
        )
        assert server.wait() == 0, server.said
        result = json.loads((world.hearts / "server" / "runs" / "spring" / "result.json").read_text())
        assert result["status"] == "completed", result["reason"]
        assert (
            result["metrics"]["accuracy"] > 0.7
        )  # of one device alone, if the others come late; .5 is chance
        told = world.start("client", "status", clients["north"], "--json")
        assert told.wait() == 0
        query = json.loads(told.said)["query"]
        assert query["listed"] and query["query"].startswith("SELECT x") and query["database"] == "ward.db"
