"""A survival study of real processes: from three tables to predictions with intervals and a signed report."""

from __future__ import annotations

import csv
import json
import runpy
from pathlib import Path

import numpy as np
import pytest

from fedveil.__main__ import run as fedveil
from fedveil.deployment.provision import provision

SERVED = runpy.run_path(str(Path(__file__).parents[1] / "faults" / "served.py"))
FEDERATION = """\
federation: study
server: {{address: "localhost:{port}", listen: "127.0.0.1:{port}"}}
task: {{name: csv, data: table.csv, options: {{schema: schema.yaml}}}}
policy: {{target_epsilon: 50.0, target_delta: 1e-4, minimum_cohort: 3}}
clients: [{{name: north}}, {{name: south}}, {{name: west}}]
"""
SCHEMA = """\
label: {kind: survival, time: weeks, event: relapse, bins: 3}
columns:
  age: {low: 0, high: 1}
  weeks: {low: 0, high: 30}
  relapse: {categories: ["0", "1"]}
"""
OPTIONS = ("task=csv", "num_rounds=10", "run=spring", "secagg=masked", "privacy=record_distributed")
PLAN = ("privacy.sample_rate=0.5", "privacy.records=600", "privacy.most_records=200", "link.wait=120")


def write_table(path: Path, seed: int) -> None:
    draw = np.random.default_rng(seed)
    ages, stops = draw.uniform(0, 1, 200), draw.uniform(5, 40, 200)
    times = draw.exponential(25 * np.exp(2 - 4 * ages))
    cells = zip(ages, np.minimum(times, stops), times <= stops, strict=True)
    rows = [f"{age:.3f},{weeks:.2f},{int(relapse)}" for age, weeks, relapse in cells]
    path.write_text("\n".join(["age,weeks,relapse", *rows, ""]))


def test_a_study_gets_from_tables_to_a_signed_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDVEIL_PASSPHRASE", "a sentence that nobody guesses")
    (tmp_path / "federation.yaml").write_text(FEDERATION.format(port=SERVED["free_port"]()))
    (tmp_path / "schema.yaml").write_text(SCHEMA)
    provision(tmp_path / "federation.yaml", tmp_path / "study", None)
    write_table(tmp_path / "public.csv", 9)
    world = SERVED["Served"](tmp_path / "study", SERVED["starter_in"]({}))
    folder = tmp_path / "study" / "server" / "runs" / "spring"
    with SERVED["living"](world):
        for seed, name in enumerate(("north", "south", "west")):
            write_table(tmp_path / "study" / "clients" / name / "table.csv", seed)
            world.client(name)
        public = f"task.held_out_file={tmp_path / 'public.csv'}"
        server = world.start("server", world.hearts / "server", *OPTIONS, *PLAN, public)
        assert server.wait() == 0, server.said
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "completed" and result["metrics"]["concordance"] > 0.65
    (tmp_path / "new.csv").write_text("age\n0.1\n0.9\n")
    for model in (folder, tmp_path / "study" / "clients" / "west"):
        capsys.readouterr()
        assert fedveil(["predict", str(model), str(tmp_path / "new.csv")]) == 0
        young, old = csv.DictReader(capsys.readouterr().out.splitlines())
        assert float(young["survival_at_20"]) > float(old["survival_at_20"]) + 0.2
    assert fedveil(["predict", str(folder), str(tmp_path / "new.csv"), "--interval", "0.95"]) == 0
    rows = [*csv.DictReader(capsys.readouterr().out.splitlines())]
    assert float(rows[0]["survival_at_20_low"]) > float(rows[1]["survival_at_20_high"])
    key, bundle = tmp_path / "officer.key", folder / "bundle"
    for words in (
        ("report", folder),
        ("report", "key", key),
        ("report", "bundle", folder, "--key", key),
        ("report", "sign", bundle, "--role", "data protection officer", "--key", key),
        ("verify", bundle, "--key", f"{key}.pub"),
    ):
        assert fedveil([*map(str, words)]) == 0
    page = (folder / "report.html").read_text()
    assert 'id="survival-0-title"' in page and "intervals of the dashed curve" in page
