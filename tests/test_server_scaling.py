"""`task.scaling=asked`: a run asks its clients mean and deviation of their numbers, once, on its ledger, and scales by them."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from dp_accounting.dp_event import GaussianDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.privacy_accountant import NeighboringRelation

from fedveil.client.device.own_ledger import questions_of
from fedveil.configs.settings import settings_from_overrides
from fedveil.deployment.provision import provision
from fedveil.deployment.serve import serve
from fedveil.privacy.ledger.ledger import read_entries, verify
from fedveil.privacy.refusal import Refusal
from fedveil.reports.content import report_of
from fedveil.reports.run_files import read_run
from fedveil.server.binding.verify import Asked, verify_folder
from fedveil.server.run.build import build
from fedveil.server.run.unit_plan import unit_plans
from fedveil.simulations.simulate import simulate
from fedveil.tasks.table_schema import read_schema

SERVED = runpy.run_path(str(Path(__file__).parent / "faults" / "served.py"))
CLIENTS, ROWS = 60, 20
MEAN, DEVIATION = (50.0, 120.0), (20.0, 60.0)
SCHEMA = """\
label: ill
columns:
  age: {low: 0, high: 100}
  pain: {categories: [weak, strong]}
  pressure: {low: 0, high: 240}
  ill: {categories: ["no", "yes"]}
"""
DELTA = ["privacy.target_delta=0.001", "privacy.allow_large_delta=true", "audit=off"]
RECORDS = ["privacy=record_distributed"]
HIDDEN = ["privacy.target_epsilon=40", "task.scaling_epsilon=20"]  # so few clients tell little by less


def table(number: int) -> str:
    generator = np.random.default_rng(number)
    lines = ["age,pain,pressure,ill"]
    for age, pressure in generator.normal(MEAN, DEVIATION, (ROWS, 2)):
        lines.append(f"{age:.2f},weak,{pressure:.2f},{'yes' if age > 50 else 'no'}")
    return "\n".join([*lines, ""])


@pytest.fixture(scope="module")
def wards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("wards")
    (home / "tables").mkdir()
    for number in range(CLIENTS):
        (home / "tables" / f"{number:02}.csv").write_text(table(number))
    (home / "schema.yaml").write_text(SCHEMA)
    return home


def settings(wards: Path, *overrides: str) -> Any:
    task = [f"task.folder={wards / 'tables'}", f"task.schema={wards / 'schema.yaml'}", "task.simulated=true"]
    common = ["task=csv", *task, "task.scaling=asked", "cohort=all", "num_rounds=2", *DELTA]
    return settings_from_overrides([*common, *overrides])


def ran(wards: Path, folder: Path, *overrides: str) -> dict[str, Any]:
    return simulate(settings(wards, *overrides), folder, quiet=True).result


def questions(ledger: Path) -> list[dict[str, Any]]:
    found = [json.loads(each.payload) for each in read_entries(ledger) if each.kind == "reserve"]
    return [each for each in found if each.get("kind") == "question"]


def scaled(folder: Path) -> dict[str, tuple[float, float] | None]:
    return {each.name: each.standard for each in read_schema(folder / "schema.yaml").columns}


@pytest.mark.parametrize(
    "mode",
    [
        RECORDS,
        ["privacy=client_central", *HIDDEN],
        ["privacy=client_central", "engine.workers=2", "cohort=poisson", "cohort.rate=0.5", *HIDDEN],
        ["privacy=client_distributed", "secagg=masked", *HIDDEN],
    ],
)
def test_a_run_asks_once_and_scales_by_the_answer(wards: Path, tmp_path: Path, mode: list[str]) -> None:
    result = ran(wards, tmp_path / "run", *mode)
    told = scaled(tmp_path / "run")
    assert told["pain"] is None and told["ill"] is None
    for name, mean, deviation in zip(("age", "pressure"), MEAN, DEVIATION, strict=True):
        found = told[name]
        assert found is not None
        assert found == pytest.approx((mean, deviation), rel=0.25)
    (entry,) = questions(Path(result["ledger"]))
    assert entry["purpose"].startswith("Mean and deviation")
    assert set(entry["segments"].values()) == {"scaling"} and len(entry["segments"]) == 4
    record = json.loads((tmp_path / "run" / "scaling.json").read_text())
    assert [each["name"] for each in record["answers"]] == ["age", "pressure"]
    told_of = result["scaling"]["columns"]["age"]
    assert (told_of["mean"], told_of["deviation"]) == told["age"]
    (shown,) = report_of(read_run(tmp_path / "run"))["answers"]
    assert shown["purpose"] == "scaling" and shown["on_this_ledger"]
    assert verify(Path(result["ledger"])).ok
    assert all(each.ok is not False for each in verify_folder(tmp_path / "run", Asked()))


def test_the_question_is_in_the_runs_epsilon_as_dp_accounting_composes_it(
    wards: Path, tmp_path: Path
) -> None:
    (planned,) = unit_plans(build(settings(wards, "privacy=client_central", *HIDDEN)))
    assert planned.scaling is not None and planned.scaling.columns == ("age", "pressure")
    assert planned.scaling.epsilon == pytest.approx(20, rel=1e-3)
    result = ran(wards, tmp_path / "run", "privacy=client_central", *HIDDEN)
    record = json.loads((tmp_path / "run" / "scaling.json").read_text())
    assert record["noise_multiplier"] == planned.scaling.noise_multiplier
    accountant = PLDAccountant(NeighboringRelation.REPLACE_SPECIAL, 1e-4)
    accountant.compose(GaussianDpEvent(record["noise_multiplier"]))
    accountant.compose(GaussianDpEvent(result["noise_multiplier"]), 2)
    (spent,) = {row["epsilon"] for row in result["privacy"] if row["adversary"] == "model"}
    assert spent == pytest.approx(accountant.get_epsilon(0.001), rel=1e-3) and spent <= 40


def test_draws_of_the_question_are_not_those_of_the_rounds(wards: Path, tmp_path: Path) -> None:
    asked = ran(wards, tmp_path / "asked", *RECORDS, "seed=3")
    other = ran(wards, tmp_path / "other", *RECORDS, "seed=4")
    assert scaled(tmp_path / "asked") != scaled(tmp_path / "other")
    rows = {json.loads(each.key)[1] for each in read_entries(Path(asked["ledger"])) if each.kind == "reserve"}
    assert rows == {1, 2, 1 << 20} and asked["noise_multiplier"] == other["noise_multiplier"]


class Stop:
    """Callback that kills the run after its first round."""

    def start(self, run: object) -> None: ...

    def round(self, done: Any) -> None:
        raise KeyboardInterrupt

    def end(self, ending: object) -> None: ...


def test_a_run_that_goes_on_asks_no_second_time(wards: Path, tmp_path: Path) -> None:
    whole, folder = ran(wards, tmp_path / "whole", *RECORDS), tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        simulate(settings(wards, *RECORDS), folder, quiet=True, callbacks=[Stop()])
    before = scaled(folder)
    result = simulate(settings_from_overrides([f"resume={folder}"]), folder, quiet=True).result
    assert result["status"] == "completed" and scaled(folder) == before == scaled(tmp_path / "whole")
    assert len(questions(Path(result["ledger"]))) == 1
    assert result["metrics"] == whole["metrics"]


def test_a_number_of_which_too_little_is_told_stays_scaled_by_its_bounds(tmp_path: Path) -> None:
    (tmp_path / "tables").mkdir()
    for number in range(CLIENTS):
        same = re.sub(r"weak,[^,]*", "weak,120", table(number))
        (tmp_path / "tables" / f"{number:02}.csv").write_text(same)
    (tmp_path / "schema.yaml").write_text(SCHEMA)
    ran(tmp_path, tmp_path / "run", *RECORDS)
    told = scaled(tmp_path / "run")
    assert told["age"] is not None and told["pressure"] is None  # it has no deviation


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["privacy=record"], "with privacy=record no sum answers"),
        (
            ["privacy=client_central", "task.scaling_epsilon=0.5"],
            "so few clients could not tell.*task.scaling_epsilon=[0-9.]+ would do",
        ),
        ([*RECORDS, "task.scaling_epsilon=0.001"], "so few records could not tell|leaves no answer"),
        ([*RECORDS, "task.scaling_epsilon=3"], "already spent"),
        ([*RECORDS, "partition=iid"], "deals rows anew"),
        ([*RECORDS, "task.model=gam"], "a gam sees their bins"),
    ],
)
def test_what_cannot_be_told_well_enough_is_refused_before_anything_is_written(
    wards: Path, tmp_path: Path, overrides: list[str], said: str
) -> None:
    with pytest.raises(Refusal, match=said):
        ran(wards, tmp_path / "run", *overrides)
    assert not (tmp_path / "run").exists()


def _forget(descriptor: int) -> None:
    del descriptor


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("os.fsync", _forget)
    (tmp_path / "s.yaml").write_text(SCHEMA)
    plain = {
        "federation": "wards",
        "server": {"address": "localhost:8797", "listen": "127.0.0.1:8797"},
        "task": {"name": "csv", "data": "table.csv", "options": {"schema": "s.yaml"}},
        "policy": {"target_epsilon": 20.0, "target_delta": 1e-3, "purposes": ["scaling"]},
        "clients": [{"name": each} for each in ("a", "b", "c", "d")],
    }
    (tmp_path / "f.yaml").write_text(yaml.safe_dump(plain))
    provision(tmp_path / "f.yaml", tmp_path / "wards", None)
    for number, each in enumerate(("a", "b", "c", "d")):
        lines = [line for part in range(10) for line in table(10 * number + part).splitlines()[1:]]
        text = "\n".join(["age,pain,pressure,ill", *lines, ""])
        (tmp_path / "wards" / "clients" / each / "table.csv").write_text(text)
    (tmp_path / "public.csv").write_text(table(99))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "wards"


SERVE = [
    "run=spring",
    "task=csv",
    "task.held_out_file=public.csv",
    "task.scaling=asked",
    "num_rounds=2",
    "cohort=all",
    "secagg=masked",
    "privacy.records=800",
    "privacy.most_records=200",
    "privacy.target_epsilon=20",
    "link.clients=1",
    *RECORDS,
    *DELTA,
]


def test_real_clients_are_asked_and_scale_by_the_answer(desk: Path) -> None:
    devices = SERVED["Devices"](desk / "clients")
    assert serve(desk / "server", SERVE, reach=SERVED["reaching"](devices)) == 0
    run = desk / "server" / "runs" / "spring"
    told = scaled(run)
    assert told["age"] is not None and told["age"] == pytest.approx((MEAN[0], DEVIATION[0]), rel=0.2)
    (ledger,) = (desk / "server" / "ledgers").glob("*.ledger")
    assert len(questions(ledger)) == 1
    for device in devices.devices.values():
        (own,) = device.ledgers.glob("*.ledger")
        assert len(questions_of(own)) == 1
        kinds = [json.loads(each.payload).get("kind") for each in read_entries(own) if each.kind == "reserve"]
        assert kinds.count("question") == 1 and len(kinds) == 3
    (over,) = {each.moments for each in devices.told}
    assert json.loads(over)["age"] == pytest.approx(told["age"])


def test_owners_who_do_not_allow_it_leave_inputs_scaled_by_their_bounds(desk: Path) -> None:
    for each in ("a", "b", "c", "d"):
        policy = desk / "clients" / each / "policy.toml"
        text, count = re.subn(r"purposes = \[[^]]*\]", "purposes = []", policy.read_text())
        assert count == 1
        policy.write_text(text)
    devices = SERVED["Devices"](desk / "clients")
    assert serve(desk / "server", SERVE, reach=SERVED["reaching"](devices)) == 0
    run = desk / "server" / "runs" / "spring"
    assert all(each is None for each in scaled(run).values())
    record = json.loads((run / "scaling.json").read_text())
    assert not record["released"] and record["reason"]
