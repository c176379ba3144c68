"""Persons in a federation of real processes: three hospitals' tables in which each patient has several rows."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedveil.privacy.ledger.ledger import read_entries, verify

SCHEMA = "label: ill\ncolumns:\n  age: {low: 0, high: 100}\n  ill: {categories: [no, yes]}\n"
NAMES = ("east", "west", "north")


def write_visits(file: Path, first: int) -> None:
    """Write 30 patients with four visits each, numbered from `first`: some are at two hospitals."""
    rows = [
        f"{20 + number + visit},{'yes' if number > 15 else 'no'},p{first + number}"
        for number in range(30)
        for visit in range(4)
    ]
    file.write_text("\n".join(["age,ill,patient", *rows]) + "\n")


@pytest.mark.campaign
@pytest.mark.parametrize("mode", ["record", "record_distributed"])
def test_three_real_clients_charge_their_ledgers_by_person(mode: str, tmp_path: Path, processes: Any) -> None:
    (tmp_path / "s.yaml").write_text(SCHEMA)
    federation = {
        "federation": "visits",
        "server": {"address": f"localhost:{processes.port}", "listen": f"127.0.0.1:{processes.port}"},
        "task": {"name": "csv", "data": "table.csv", "options": {"schema": "s.yaml", "person": "patient"}},
        "policy": {"target_epsilon": 8.0, "target_delta": 1e-3, "minimum_cohort": 3},
        "clients": [{"name": name} for name in NAMES],
    }
    (tmp_path / "f.yaml").write_text(yaml.safe_dump(federation))
    processes.ran("provision", "f.yaml")
    for number, name in enumerate(NAMES):
        write_visits(tmp_path / "visits" / "clients" / name / "table.csv", 15 * number)
    write_visits(tmp_path / "public.csv", 100)
    own = ["task=csv", "task.held_out_file=public.csv", "num_rounds=2", "secagg=masked", f"privacy={mode}"]
    own += [
        "link.clients=1"
    ]  # a round that began with two of three would be abandoned, and the third has no ledger yet
    own += ["privacy.per_person=2", "privacy.target_epsilon=8", "privacy.target_delta=1e-3"]
    own += (
        ["batch_size=20"]
        if mode == "record"
        else ["privacy.sample_rate=0.3", "privacy.records=360", "privacy.most_records=120"]
    )
    everywhere = "privacy.clients_per_person=2"
    if mode == "record":
        code, said = processes.ended("server", "visits/server", *own, everywhere)
        assert code == 2 and "nobody can add up the ledgers of one person's clients" in said
    else:
        own.append(everywhere)
    unit = "person" if mode == "record" else "person_everywhere"
    clients = [processes.start("client", "start", f"visits/clients/{name}", "--once") for name in NAMES]
    assert "completed: 2 rounds" in processes.ran("server", "visits/server", *own)
    assert [client.wait(timeout=60) for client in clients] == [0, 0, 0]
    (result,) = (tmp_path / "visits" / "server" / "runs").glob("*/result.json")
    assert {row["unit"] for row in json.loads(result.read_text())["privacy"]} == {unit}
    for name in NAMES:
        (ledger,) = (tmp_path / "visits" / "clients" / name).rglob("*.ledger")
        opened, *entries = read_entries(ledger)
        found = verify(ledger)
        assert found.ok and 0.5 < (found.epsilon or 0) <= 8
        assert json.loads(opened.payload)["unit"] == unit
        # Two of a patient's rows, each drawn by its own coin, count together.
        assert any("Mixture" in entry.payload for entry in entries if entry.kind == "reserve")
