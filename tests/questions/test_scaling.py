"""`task.scaling=asked`: a run asks its clients mean and deviation of their numbers, once, on its ledger, and scales by them."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from dp_accounting.dp_event import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.privacy_accountant import NeighboringRelation
from shared.runs import reservations, resume, run_quietly

from fedveil.__main__ import run
from fedveil.base.refusal import Refusal
from fedveil.configs.settings import settings_from_overrides
from fedveil.deployment.device.device_ledger import questions_of
from fedveil.deployment.provision import provision
from fedveil.deployment.serve import serve
from fedveil.evidence.binding.bound_folder import Knowledge
from fedveil.evidence.binding.verify import verify_folder
from fedveil.evidence.content import report_of
from fedveil.privacy.accounting.events import event_from_json, event_to_json
from fedveil.privacy.ledger.ledger import read_entries, verify
from fedveil.privacy.ledger.store import ledgers_in
from fedveil.run.build import build
from fedveil.run.run_files import read_run
from fedveil.run.unit_plan import unit_plans
from fedveil.simulations.simulate import simulate
from fedveil.tasks.table_schema import read_schema

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm", "fast_runs")

FAULTS = Path(__file__).parents[1] / "faults"
SERVED = runpy.run_path(str(FAULTS / "served.py"))
failing = runpy.run_path(str(FAULTS / "failing_files.py"))["failing"]
SELDOM = Path(__file__).parents[1] / "faults" / "seldom_alarms.py"
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


def table(number: int, rows: int = ROWS) -> str:
    generator = np.random.default_rng(number)
    lines = ["age,pain,pressure,ill"]
    for age, pressure in generator.normal(MEAN, DEVIATION, (rows, 2)):
        lines.append(f"{age:.2f},weak,{pressure:.2f},{'yes' if age > 50 else 'no'}")
    return "\n".join([*lines, ""])


# Ray leaves processes behind, of which Python warns.
ON_RAY = (pytest.mark.campaign, pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"))


@pytest.fixture(scope="module")
def wards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("wards")
    (home / "tables").mkdir()
    for number in range(CLIENTS):
        (home / "tables" / f"{number:02}.csv").write_text(table(number))
    (home / "schema.yaml").write_text(SCHEMA)
    return home


def settings_of(wards: Path, *overrides: str) -> list[str]:
    task = [f"task.folder={wards / 'tables'}", f"task.schema={wards / 'schema.yaml'}", "task.simulated=true"]
    common = ["task=csv", *task, "task.scaling=asked", "cohort=all", "num_rounds=2", *DELTA]
    return [*common, *overrides]


def settings(wards: Path, *overrides: str) -> Any:
    return settings_from_overrides(settings_of(wards, *overrides))


def ran(wards: Path, folder: Path, *overrides: str) -> dict[str, Any]:
    return simulate(settings(wards, *overrides), folder, quiet=True).result


def questions(ledger: Path) -> list[dict[str, Any]]:
    found = reservations(ledger)
    return [each for each in found if each.get("kind") == "question"]


def scaled(folder: Path) -> dict[str, tuple[float, float] | None]:
    return {each.name: each.standard for each in read_schema(folder / "schema.yaml").columns}


@pytest.mark.parametrize(
    "mode",
    [
        RECORDS,
        *(
            pytest.param([*each, *HIDDEN], marks=pytest.mark.campaign)
            for each in (
                ["privacy=client_central"],
                ["privacy=client_central", "engine.workers=2", "cohort=poisson", "cohort.rate=0.5"],
                ["privacy=client_distributed", "secagg=masked"],
            )
        ),
        pytest.param(["privacy=client_central", "engine=ray", *HIDDEN], marks=ON_RAY),
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
    assert all(each.ok is not False for each in verify_folder(tmp_path / "run", Knowledge()))


def test_question_is_in_the_runs_epsilon_as_dp_accounting_composes_it(wards: Path, tmp_path: Path) -> None:
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
    result = resume(folder).result
    assert result["status"] == "completed" and scaled(folder) == before == scaled(tmp_path / "whole")
    assert len(questions(Path(result["ledger"]))) == 1
    assert result["metrics"] == whole["metrics"]


def test_uncertain_number_stays_scaled_by_its_bounds(tmp_path: Path) -> None:
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
        (
            ["privacy=record", "task.scaling_epsilon=0.2"],
            "too few records to determine the scaling.*task.scaling_epsilon=[0-9.]+ suffices",
        ),
        (["privacy=record", "task.scaling_epsilon=3"], "questions alone bring 0 to 3"),
        (["privacy=record", "secagg=masked"], "summed in the clear"),
        (["privacy=record", "task.person=age", "privacy.per_person=1"], "a person may have several"),
        (
            ["privacy=client_central", "task.scaling_epsilon=0.5"],
            "too few clients to determine the scaling.*task.scaling_epsilon=[0-9.]+ suffices",
        ),
        ([*RECORDS, "task.scaling_epsilon=0.001"], "too few records to determine|leaves only noise"),
        ([*RECORDS, "task.scaling_epsilon=3"], "questions alone bring 0 to 3"),
        ([*RECORDS, "partition=iid"], "deals rows anew"),
        ([*RECORDS, "task.model=gam"], "a gam uses their bins"),
    ],
)
def test_too_coarse_scaling_is_refused_before_anything_is_written(
    wards: Path, tmp_path: Path, overrides: list[str], said: str
) -> None:
    with pytest.raises(Refusal, match=said):
        ran(wards, tmp_path / "run", *overrides)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        (None, "needs the bounds of a declared schema"),
        (SCHEMA.replace("low: 0, high: 100", "high: 100"), "low is missing; give low and high"),
        (SCHEMA.replace("age", "weight"), "no column 'weight'|weight.*missing|has no column"),
        (SCHEMA.replace("high: 100", "high: 100, required: true"), "row 2"),
    ],
)
def test_column_without_bounds_or_values_is_refused_before_a_charge(
    few: Path, tmp_path: Path, schema: str | None, said: str
) -> None:
    tables = tmp_path / "tables"
    shutil.copytree(few / "tables", tables)
    (tables / "0.csv").write_text(re.sub(r"\n[^,]*,", "\n,", (tables / "0.csv").read_text(), count=1))
    told = ["task.schema=null", "task.label=ill"]
    if schema is not None:
        (tmp_path / "schema.yaml").write_text(schema)
        told = [f"task.schema={tmp_path / 'schema.yaml'}"]
    with pytest.raises(Refusal, match=said):
        ran(few, tmp_path / "run", f"task.folder={tables}", *told)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("mode", ["none", "record_and_client"])
def test_mode_hiding_nobody_or_two_units_sends_no_question(wards: Path, tmp_path: Path, mode: str) -> None:
    asked = [each for each in settings_of(wards, f"privacy={mode}") if not each.startswith("privacy.")]
    with pytest.raises(Refusal, match=f"with privacy={mode} no single private sum can answer"):
        run_quietly(asked, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- each client its own ---------------------------------------------------------------------------------------


SIZES = (300, 250, 280, 320)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("few")
    (home / "tables").mkdir()
    for number, rows in enumerate(SIZES):
        (home / "tables" / f"{number}.csv").write_text(table(number, rows))
    (home / "public.csv").write_text(table(99))
    (home / "schema.yaml").write_text(SCHEMA)
    return home


def own_ledgers(folder: Path) -> list[Path]:
    found = ledgers_in(folder)
    assert len(found) == len(SIZES)
    return found


def composed(ledger: Path, question: float, rounds: int, noise: float) -> float:
    """Return dp_accounting's epsilon of one question and so many rounds of this noise, whose batches a ledger tells."""
    entries = reservations(ledger)
    told = [each["events"]["model"] for each in entries if each.get("kind") != "question"]
    assert len(told) == rounds
    found = [event_from_json(each) for each in told]
    (steps, rate, own), *others = {
        (each.count, each.event.sampling_probability, each.event.event.noise_multiplier) for each in found
    }
    assert not others and own >= noise * 0.999
    accountant = PLDAccountant(NeighboringRelation.REPLACE_SPECIAL, 1e-4)
    accountant.compose(GaussianDpEvent(question))
    accountant.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(own)), steps * rounds)
    return float(accountant.get_epsilon(1e-5))


@pytest.mark.parametrize(
    "more",
    [
        [],
        pytest.param(["engine.workers=2", "privacy.adjacency=replace-one"], marks=pytest.mark.campaign),
        pytest.param(["engine=ray"], marks=ON_RAY),
    ],
)
def test_clients_ledger_has_one_question_within_its_target(
    few: Path, tmp_path: Path, more: list[str]
) -> None:
    told = tmp_path / "run"
    command = ["simulate", "task=csv", f"task.folder={few / 'tables'}", f"task.schema={few / 'schema.yaml'}"]
    asked = ["task.simulated=true", "task.scaling=asked", "num_rounds=2", "audit=off", *more]
    assert run([*command, *asked, f"hydra.run.dir={told}"]) == 0
    for name, mean, deviation in zip(("age", "pressure"), MEAN, DEVIATION, strict=True):
        assert scaled(told)[name] == pytest.approx((mean, deviation), rel=0.25)
    record, result = (json.loads((told / name).read_text()) for name in ("scaling.json", "result.json"))
    noise = record["noise_multiplier"] * (2 if "privacy.adjacency=replace-one" in more else 1)
    lost = []
    for ledger in own_ledgers(told / "client_ledgers"):
        (entry,) = questions(ledger)
        assert set(entry["segments"].values()) == {"scaling"} and entry["purpose"].startswith("Mean and")
        assert entry["events"]["model"] == event_to_json(GaussianDpEvent(noise)) and verify(ledger).ok
        lost.append(verify(ledger).epsilon)
        if "privacy.adjacency=replace-one" not in more:
            assert lost[-1] == pytest.approx(composed(ledger, noise, 2, 0.5), rel=2e-3)
    assert 2.9 < min(lost) <= max(lost) <= 3
    assert [row["epsilon"] for row in result["privacy"]] == [pytest.approx(max(lost), rel=1e-6)] * 3
    assert sorted(result["records"]["epsilon"]) == pytest.approx(sorted(lost), abs=0.01)
    assert all(each.ok is not False for each in verify_folder(told, Knowledge()))


def test_intervals_follow_from_the_noises_of_all_clients(few: Path, tmp_path: Path) -> None:
    ran(few, tmp_path / "run", "privacy=record", "privacy.target_epsilon=3")
    record = json.loads((tmp_path / "run" / "scaling.json").read_text())
    for answer in record["answers"]:
        rows = next(each for each in answer["figures"] if each["name"] == "rows")
        # Of a question in two, a row's part is the root of 0.98 / 2 over its norm of 1.5; four noises add in squares.
        sigma = record["noise_multiplier"] * 2 * 1.5 / np.sqrt(0.98 / 2)
        assert rows["high"] - rows["low"] == pytest.approx(2 * 1.96 * sigma, rel=1e-3)
        assert rows["low"] - 2 * sigma < sum(SIZES) < rows["high"] + 2 * sigma


def test_a_plan_counts_the_question_in_each_clients_epsilon(few: Path) -> None:
    asked, plain = (
        unit_plans(build(settings(few, "privacy=record", f"task.scaling={word}")))
        for word in ("asked", "null")
    )
    assert asked[0].scaling is not None and asked[0].scaling.epsilon == pytest.approx(0.75, rel=1e-3)
    assert asked[0].noise_multiplier > plain[0].noise_multiplier
    assert asked[0].epsilon[-1][1] < plain[0].epsilon[-1][1] == pytest.approx(3, abs=0.01)
    assert asked[0].runs_epsilon == pytest.approx(3, abs=0.01) and asked[0].affordable_rounds == 2


def test_a_run_of_records_that_goes_on_asks_no_second_time(few: Path, tmp_path: Path) -> None:
    mode, folder = ["privacy=record", "seed=5"], tmp_path / "parts"
    whole = ran(few, tmp_path / "whole", *mode)
    with pytest.raises(KeyboardInterrupt):
        simulate(settings(few, *mode), folder, quiet=True, callbacks=[Stop()])
    result = resume(folder).result
    assert result["status"] == "completed" and scaled(folder) == scaled(tmp_path / "whole")
    for ledger, other in zip(
        own_ledgers(folder / "client_ledgers"),
        own_ledgers(tmp_path / "whole" / "client_ledgers"),
        strict=True,
    ):
        assert len(questions(ledger)) == 1 and verify(ledger).epsilon == verify(other).epsilon
    assert result["metrics"] == whole["metrics"] and result["privacy"] == whole["privacy"]


def test_real_records_are_charged_on_the_ledgers_that_they_had(few: Path, tmp_path: Path) -> None:
    """A run scales its own copy of the rows: whose they are, and what they have lost, goes by what lies on the disk."""
    real = ["privacy=record", "task.simulated=false", "task.data_id=few", f"ledger.dir={tmp_path / 'own'}"]
    public = [f"task.held_out_file={few / 'public.csv'}", "budget.runs=2"]
    for number in (1, 2):
        result = ran(few, tmp_path / f"run{number}", *real, *public)
        assert result["status"] == "completed" and scaled(tmp_path / f"run{number}")["age"] is not None
        for ledger in own_ledgers(tmp_path / "own"):
            assert len(questions(ledger)) == number
            reserved = [each for each in read_entries(ledger) if each.kind == "reserve"]
            assert len(reserved) == 3 * number
    found = [verify(ledger) for ledger in own_ledgers(tmp_path / "own")]
    assert all(each.ok for each in found) and max(each.epsilon or 9 for each in found) <= 3


def test_a_cap_on_purposes_refuses_before_it_is_charged(few: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    cap = ["--epsilon", "3", "--delta", "0.001", "--purposes", "statistics", "--ledger-dir", str(own)]
    assert run(["budget", "set", *cap]) == 0
    real = ["privacy=record", "task.simulated=false", "task.data_id=few", f"ledger.dir={own}"]
    with pytest.raises(Refusal, match="purpose='scaling'"):
        ran(few, tmp_path / "run", *real, f"task.held_out_file={few / 'public.csv'}")
    assert not list(own.glob("*.ledger")) and not (tmp_path / "run").exists()


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


def test_real_clients_scale_by_their_answer(desk: Path) -> None:
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


def test_start_is_charged_only_with_room_for_its_answer(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reach = SERVED["reaching"](SERVED["Devices"](desk / "clients"))
    with failing(desk / "server" / "runs", range(1000)), pytest.raises(Refusal, match="No space left"):
        serve(desk / "server", SERVE, reach=reach)
    (ledger,) = (desk / "server" / "ledgers").glob("*.ledger")
    assert not questions(ledger)
    with monkeypatch.context() as killed, pytest.raises(ZeroDivisionError):
        killed.setattr("fedveil.run.rosters_in_force.note_roster", lambda *_: 1 / 0)
        serve(desk / "server", SERVE, reach=reach)
    assert serve(desk / "server", SERVE, reach=reach) == 0
    assert len(questions(ledger)) == 2


def test_without_the_owners_leave_inputs_stay_scaled_by_their_bounds(desk: Path) -> None:
    for each in ("a", "b", "c", "d"):
        forbid(desk / "clients" / each)
    devices = SERVED["Devices"](desk / "clients")
    assert serve(desk / "server", SERVE, reach=SERVED["reaching"](devices)) == 0
    run = desk / "server" / "runs" / "spring"
    assert all(each is None for each in scaled(run).values())
    record = json.loads((run / "scaling.json").read_text())
    assert not record["released"] and record["reason"]


OWN = [
    *(each for each in SERVE if not each.startswith(("secagg", "privacy.", *RECORDS))),
    "privacy=record",
    *DELTA,
]


def forbid(device: Path) -> None:
    text, count = re.subn(r"purposes = \[[^]]*\]", "purposes = []", (device / "policy.toml").read_text())
    assert count == 1
    (device / "policy.toml").write_text(text)


def test_devices_noise_their_answers_and_plan_their_rounds_with_it(desk: Path) -> None:
    forbid(desk / "clients" / "a")
    devices = SERVED["Devices"](desk / "clients")
    asked = [*OWN, "privacy.target_epsilon=8", "task.scaling_epsilon=4"]
    assert serve(desk / "server", asked, reach=SERVED["reaching"](devices)) == 0
    run_folder = desk / "server" / "runs" / "spring"
    told = scaled(run_folder)
    assert told["age"] == pytest.approx((MEAN[0], DEVIATION[0]), rel=0.2)
    record = json.loads((run_folder / "scaling.json").read_text())
    rows = next(each for each in record["answers"][0]["figures"] if each["name"] == "rows")
    sigma = record["noise_multiplier"] * np.sqrt(3) * 1.5 / np.sqrt(0.98 / 2)  # of the three who answered
    assert rows["high"] - rows["low"] == pytest.approx(2 * 1.96 * sigma, rel=1e-3)
    assert record["epsilon"] == pytest.approx(4, rel=1e-3) and not list((desk / "server").glob("ledgers/*"))
    for device in devices.devices.values():
        own, allows = device.ledger.records, device.bundle.settings.name != "a"
        assert len(questions_of(own)) == allows
        kinds = [json.loads(each.payload).get("kind") for each in read_entries(own) if each.kind == "reserve"]
        assert kinds == ["question"] * allows + [None] * 2 and verify(own).ok
        # All of the target is used, with the question in where there was one.
        assert 7.9 <= (verify(own).epsilon or 0) <= 8


def test_absent_devices_get_no_second_question(desk: Path) -> None:
    devices = SERVED["Devices"](desk / "clients")
    asked = [*OWN, "privacy.target_epsilon=8", "task.scaling_epsilon=4"]
    with pytest.raises(KeyboardInterrupt):
        serve(desk / "server", asked, callbacks=[Stop()], reach=SERVED["reaching"](devices))
    before = scaled(desk / "server" / "runs" / "spring")
    devices = SERVED["Devices"](desk / "clients")
    assert serve(desk / "server", asked, reach=SERVED["reaching"](devices)) == 0
    assert scaled(desk / "server" / "runs" / "spring") == before
    for device in devices.devices.values():
        own = device.ledger.records
        assert len(questions_of(own)) == 1 and 7.9 <= (verify(own).epsilon or 0) <= 8


@pytest.mark.campaign
@pytest.mark.parametrize("link", ["grpc", "flower"])
def test_three_clients_answer_and_train_by_the_commands(desk: Path, link: str) -> None:
    plain, port = yaml.safe_load((desk.parent / "f.yaml").read_text()), SERVED["free_port"]()
    place = {"address": f"localhost:{port}", "listen": f"127.0.0.1:{port}"}
    plain |= {"server": place, "clients": plain["clients"][:3], "link": link}
    (desk.parent / "three.yaml").write_text(yaml.safe_dump(plain))
    three, fedveil = desk.parent / "three", [sys.executable, "-P", str(SELDOM)]
    provision(desk.parent / "three.yaml", three, None)
    for each in "abc":
        shutil.copy(desk / "clients" / each / "table.csv", three / "clients" / each)
    forbid(three / "clients" / "b")
    starts = [[*fedveil, "client", "start", str(three / "clients" / each)] for each in "abc"]
    started = [subprocess.Popen(each) for each in starts]
    try:
        asked = [*OWN, "privacy.target_epsilon=8", "task.scaling_epsilon=4", "link.wait=60"]
        command = [*fedveil, "server", str(three / "server"), *asked]
        assert subprocess.run(command, check=False, timeout=SERVED["SECONDS"]).returncode == 0
    finally:
        for each in started:
            each.kill()
            each.wait()
    told = scaled(three / "server" / "runs" / "spring")
    assert told["age"] == pytest.approx((MEAN[0], DEVIATION[0]), rel=0.2)
    for name, allows in (("a", 1), ("b", 0), ("c", 1)):
        (own,) = (three / "clients" / name).glob("state/ledgers/*.ledger")
        assert len(questions_of(own)) == allows and 7.9 <= (verify(own).epsilon or 0) <= 8
        assert sum(each.kind == "reserve" for each in read_entries(own)) == allows + 2
