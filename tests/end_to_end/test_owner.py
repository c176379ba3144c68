"""What whoever owns the data holds in hand: caps, exports, and a ledger that cannot be shed."""

import csv
import hashlib
import io
import json
import runpy
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from shared.runs import run_quietly

from fedveil.base.refusal import Refusal
from fedveil.configs.settings import settings_from_overrides
from fedveil.privacy.budget import Budget, Unit
from fedveil.privacy.ledger import data_sets
from fedveil.privacy.ledger.caps import ALL, Cap, set_cap
from fedveil.privacy.ledger.client_sums import lost_by_records
from fedveil.privacy.ledger.data_sets import PendingCharges, client_ledgers
from fedveil.privacy.ledger.ledger import Ledger, read_entries, verify
from fedveil.privacy.ledger.ledger_state import read_ledger
from fedveil.privacy.ledger.store import FILE, ledgers_in
from fedveil.run.run import RunResult
from fedveil.server.checkpoint import read
from fedveil.simulations.simulate import simulate
from fedveil.tasks.fingerprint import fingerprint

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm")

CLINICS = '''
import torch
from torch import nn

from fedveil.tasks.data import Examples

class Clinics:
    """Six clinics of which the first two have the same patients."""

    num_clients = 6

    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        self.inputs = torch.randn(6, 12, 3, generator=generator)
        self.inputs[1] = self.inputs[0]
        self.targets = (self.inputs.sum(-1) > 0).long()

    def model(self):
        return nn.Linear(3, 2)

    def loss(self, outputs, targets):
        return nn.functional.cross_entropy(outputs, targets)

    def metrics(self, outputs, targets):
        return {"accuracy": (outputs.argmax(-1) == targets).float().mean().item()}

    def client_data(self, client):
        return Examples(self.inputs[client], self.targets[client])

    def held_out(self):
        return Examples(self.inputs.flatten(0, 1), self.targets.flatten())

class Real(Clinics):
    simulated, data_id = False, "clinics"

class Simulated(Clinics):
    simulated = True
'''
RECORD = ("privacy=record", "privacy.noise_multiplier=2", "privacy.target_epsilon=50", "cohort=all")
CLIENT = (
    "accept_vacuous=true",
    "privacy=client_central",
    "privacy.target_epsilon=8",
    "privacy.target_delta=1e-3",
    "cohort=all",
)


@pytest.fixture
def clinics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    (tmp_path / "clinics.py").write_text(CLINICS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "clinics", raising=False)
    ledgers = f"ledger.dir={tmp_path / 'ledgers'}"
    return ["task=custom", "allow_modules=[clinics]", ledgers, "batch_size=4", "num_rounds=2"]


def run(folder: Path, overrides: list[str], kind: str, *more: str) -> RunResult:
    own = settings_from_overrides([*overrides, f"task.target=clinics:{kind}", *more])
    return simulate(own, folder, quiet=True)


def client_ledger(folder: Path, client: int, kind: str = "Simulated") -> Path:
    import clinics

    task = clinics.Clinics()
    names = [fingerprint(task.client_data(each)) for each in range(task.num_clients)]
    if kind == "Real":
        names = client_ledgers("clinics", names)
    return folder / f"{names[client][:32]}.ledger"


# --- at the record level ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Simulated", "Real"])
def test_two_clients_with_the_same_records_are_both_charged(
    tmp_path: Path, clinics: list[str], kind: str
) -> None:
    result = run(tmp_path / "run", clinics, kind, *RECORD, "num_rounds=1").result
    folder = Path(result["ledger"])
    assert result["dropped"] == {}
    assert len(ledgers_in(folder)) == 5
    keys = [json.loads(e.key) for e in read_entries(client_ledger(folder, 0, kind)) if e.kind == "reserve"]
    assert [mechanism for _, _, mechanism in keys] == ["dp_sgd 0", "dp_sgd 1"]
    lost = result["records"]["epsilon"]
    assert lost[0] == lost[1] > 1.2 * lost[2] > 0
    assert lost[2:] == [lost[2]] * 4


def test_the_result_has_every_client_and_the_maximum(tmp_path: Path, clinics: list[str]) -> None:
    result = run(tmp_path / "run", clinics, "Simulated", *RECORD).result
    records = result["records"]
    assert len(records["epsilon"]) == 6 and records["exhausted"] == 0
    assert max(records["epsilon"]) == max(row["epsilon"] for row in result["privacy"])
    assert "two clients" in records["outside"]
    assert run(tmp_path / "2", clinics, "Simulated", *CLIENT).result["records"] is None


def test_a_clients_own_cap_ends_its_part_and_training_goes_on(tmp_path: Path, clinics: list[str]) -> None:
    first = run(tmp_path / "1", clinics, "Real", *RECORD, "num_rounds=1").result
    own = client_ledger(tmp_path / "ledgers", 4, "Real")
    set_cap(tmp_path / "ledgers", Cap(own.stem, first["records"]["epsilon"][4] * 1.01, 1e-5))
    before = own.read_bytes()
    second = run(tmp_path / "2", clinics, "Real", *RECORD, "num_rounds=1")
    assert second.exit_code == 0
    assert second.result["dropped"] == {"budget spent": 1}
    assert second.result["records"]["exhausted"] == 1
    assert second.result["records"]["epsilon"][4] == first["records"]["epsilon"][4]
    assert own.read_bytes() == before


def test_delta_above_one_over_the_records_is_refused_by_default(
    tmp_path: Path, clinics: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    large = "privacy.target_delta=0.1"
    with pytest.raises(Refusal, match="with 12 records"):
        run(tmp_path / "run", clinics, "Real", *RECORD, large)
    assert not (tmp_path / "run").exists()
    asked = run(tmp_path / "run", clinics, "Real", *RECORD, large, "privacy.allow_large_delta=true")
    assert asked.exit_code == 0
    assert "12 records" in capsys.readouterr().err


@pytest.mark.parametrize("harm", ["deleted", "emptied", "rolled back", "one client's deleted"])
def test_a_clients_ledger_that_a_checkpoint_knows_cannot_be_shed(
    tmp_path: Path, clinics: list[str], harm: str
) -> None:
    run(tmp_path / "run", clinics, "Simulated", *RECORD)
    checkpoint = read(tmp_path / "run")
    assert checkpoint is not None and [*checkpoint.client_heads] == [FILE]
    ledger = tmp_path / "run" / "client_ledgers" / FILE
    whole = ledger.read_bytes()
    if harm == "rolled back":
        run(tmp_path / "other", clinics, "Simulated", *RECORD, "num_rounds=1")
        ledger.write_bytes((tmp_path / "other" / "client_ledgers" / FILE).read_bytes())
    elif harm == "emptied":
        ledger.write_bytes(b"")
    elif harm == "one client's deleted":
        one = client_ledger(ledger.parent, 3).stem
        with closing(sqlite3.connect(ledger)) as db, db:
            ((guard,),) = db.execute("SELECT sql FROM sqlite_schema WHERE name = 'no_DELETE'")
            db.execute("DROP TRIGGER no_DELETE")
            db.execute("DELETE FROM entries WHERE ledger = ?", (one,))
            db.execute(guard)
    else:
        ledger.unlink()
    resumed = settings_from_overrides([f"resume={tmp_path / 'run'}"])
    with pytest.raises(Refusal, match="ledger"):
        simulate(resumed, tmp_path / "run", quiet=True)
    ledger.write_bytes(whole)
    assert simulate(resumed, tmp_path / "run", quiet=True).exit_code == 0


# --- caps on a population -----------------------------------------------------------------------------------------


def test_a_run_is_planned_within_the_cap(tmp_path: Path, clinics: list[str]) -> None:
    set_cap(tmp_path / "ledgers", Cap(ALL, 1.5, 1e-4))
    result = run(tmp_path / "run", clinics, "Real", *CLIENT).result
    assert result["status"] == "completed"
    found = verify(result["ledger"])
    assert found.ok and found.delta == 1e-4
    lost = lost_by_records(read_ledger(Path(result["ledger"])), 1e-4)
    assert found.epsilon is not None and lost is not None
    assert found.epsilon < lost and 1.4 < lost <= 1.5  # the cap is a record's too, whom half the noise hides


def test_an_ended_cap_refuses_before_anything_is_written(tmp_path: Path, clinics: list[str]) -> None:
    from datetime import date

    set_cap(tmp_path / "ledgers", Cap(ALL, 1.5, 1e-4, date(2020, 1, 1)))
    with pytest.raises(Refusal, match=r"2020-01-01.*no release after that day"):
        run(tmp_path / "run", clinics, "Real", *CLIENT)
    assert not (tmp_path / "run").exists()


# --- the commands -------------------------------------------------------------------------------------------------


def test_budget_set_and_show(tmp_path: Path, clinics: list[str], commands: Any) -> None:
    run(tmp_path / "run", clinics, "Real", *CLIENT, "num_rounds=1")
    (path,) = (tmp_path / "ledgers").glob("*.ledger")
    data = path.stem.removeprefix("population-")
    folder = f"--ledger-dir={tmp_path / 'ledgers'}"
    sizes = ("--epsilon=2", "--delta=1e-5")
    assert commands.run("budget", "set", folder, *sizes, f"--data={data}", "--until=2999-01-31")[0] == 0
    code, command = commands.run("budget", "show", folder)
    assert code == 0
    decision, title, *rows = command.out.splitlines()
    row, of_records = sorted(rows)
    assert of_records.split()[:2] == [data, "record"]
    assert decision.endswith(f"{data}: epsilon 2 at delta 1e-05 until 2999-01-31")
    assert title.split() == ["data", "unit", "spent", "delta", "cap", "data_id", "as_client"]
    assert row.split()[:2] == [data, "client"]
    assert "epsilon 2 at delta 1e-05 until 2999-01-31" in row


def test_ledgers_of_one_data_set_stand_in_the_order_of_its_clients(tmp_path: Path, commands: Any) -> None:
    prints, budget = tuple(f"{number:064x}" for number in range(12)), Budget(Unit.RECORD, 1.0, 1e-5)
    for data_id in ("wards", "clinics"):
        data_sets.settle(tmp_path, data_id, PendingCharges({}, False, data_sets.DataSet(prints)), budget)
        for name in data_sets.client_ledgers(data_id, prints):
            Ledger.open(tmp_path / f"{name[:32]}.ledger", budget, owner=name, simulated=False).close()
    Ledger.open(tmp_path / f"{'0' * 32}.ledger", budget, owner="0" * 64, simulated=False).close()
    code, command = commands.run("budget", "show", f"--ledger-dir={tmp_path}", "--json")
    named = [row["data_id"] for row in json.loads(command.out)["ledgers"]]
    wanted = [f"{data_id}, client {number}" for data_id in ("clinics", "wards") for number in range(12)]
    assert code == 0 and named == [*wanted, ""]


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (("--epsilon=x", "--delta=1e-5"), "epsilon='x': give a number"),
        (("--epsilon=1", "--delta=2"), "target_delta=2.0: give a probability"),
        (("--epsilon=1", "--delta=1e-5", "--until=soon"), "until='soon': give a day"),
        (("--epsilon=1", "--delta=1e-5", "--data=mine"), "data='mine': give the name of a ledger"),
        (("--epsilon=1", "--delta=1e-5", "--ledger-dir=file/below"), "caps='file/below/caps.json'"),
    ],
)
def test_a_cap_that_makes_no_sense_is_refused_in_one_sentence(
    commands: Any, argv: tuple[str, ...], sentence: str
) -> None:
    (commands.folder / "file").touch()
    code, command = commands.run("budget", "set", "--ledger-dir=here", *argv)
    assert code == 2
    (line,) = command.err.splitlines()
    assert line.startswith(sentence)
    assert not (commands.folder / "here" / "caps.json").exists()


def test_an_export_can_be_checked_without_this_package(
    tmp_path: Path, clinics: list[str], commands: Any
) -> None:
    ledger = run(tmp_path / "run", clinics, "Simulated", *CLIENT, "privacy.noise_multiplier=2").result[
        "ledger"
    ]
    code, command = commands.run("ledger", "export", ledger)
    whole = json.loads(command.out)
    assert code == 0 and commands.run("ledger", "export", ledger, "--json")[1].out == command.out
    before = "0" * 64
    for entry in whole["entries"]:
        assert entry["prev_hash"] == before
        fields = [entry[name] for name in ("seq", "kind", "key", "payload", "prev_hash")]
        before = hashlib.sha256(json.dumps(fields, separators=(",", ":")).encode()).hexdigest()
        assert entry["hash"] == before
    assert whole["head"] == {"seq": len(whole["entries"]), "hash": before}
    found = verify(ledger)
    assert {row["adversary"]: row["epsilon"] for row in whole["spent"]} == dict.fromkeys(
        ("clients", "model"), found.epsilon
    )
    assert whole["problem"] is None and whole["format"] == "fedveil ledger export 1"
    rows = list(csv.DictReader(io.StringIO(commands.run("ledger", "export", ledger, "--csv")[1].out)))
    entries = [row for row in rows if row["kind"] != "epsilon"]
    assert [{**row, "seq": int(row["seq"])} for row in entries] == whole["entries"]
    assert [json.loads(row["payload"]) for row in rows if row["kind"] == "epsilon"] == whole["spent"]


def test_verify_finds_a_cut_by_the_head_in_the_result(
    tmp_path: Path, clinics: list[str], commands: Any
) -> None:
    result = run(tmp_path / "run", clinics, "Simulated", *CLIENT, "privacy.noise_multiplier=2").result
    seq, digest = result["ledger_head"]
    head = ("--head", str(seq), digest)
    assert commands.run("ledger", "verify", result["ledger"], *head)[0] == 0
    with closing(sqlite3.connect(result["ledger"])) as database:
        (guard,) = database.execute("SELECT sql FROM sqlite_schema WHERE name = 'no_DELETE'").fetchone()
        database.executescript(f"DROP TRIGGER no_DELETE; DELETE FROM entries WHERE seq >= {seq}; {guard};")
    assert commands.run("ledger", "verify", result["ledger"])[0] == 0
    code, command = commands.run("ledger", "verify", result["ledger"], *head)
    assert code == 1 and f"does not hold the known entry {seq}" in " ".join(command.out.split())
    assert commands.run("ledger", "verify", result["ledger"], "--head", "x", digest)[0] == 2


def test_an_export_of_a_damaged_ledger_says_so(tmp_path: Path, commands: Any) -> None:
    (tmp_path / "text").write_text("epsilon: 3\n" * 500)
    code, command = commands.run("ledger", "export", str(tmp_path / "text"))
    assert code != 0 and command.out == ""
    code, command = commands.run("ledger", "export", "none")
    assert (code, command.err.count("\n")) == (2, 1)
    assert commands.run("ledger", "export", "none", "--xml")[0] == 2


# --- an independent recomputation ---------------------------------------------------------------------------------

SCRIPT = Path(__file__).parents[2] / "evidence" / "binding" / "recompute_ledger.py"
RECOMPUTE = runpy.run_path(str(SCRIPT))["main"]
SMALL = ["task=digits", "task.num_clients=12", "num_rounds=3", "batch_size=40"]
GIVEN = ("privacy.noise_multiplier=2", "privacy.target_epsilon=null", "privacy.allow_large_delta=true")
LARGE = "privacy.allow_large_delta=true"
MODES = {
    "poisson": (*GIVEN, "cohort.rate=0.3"),
    "fixed": (*GIVEN, "cohort=fixed", "cohort.size=4"),
    "all": (*GIVEN, "cohort=all"),
    "add or remove one": (*GIVEN, "privacy.adjacency=add-or-remove-one", "population=10"),
    "replace one": (*GIVEN, "privacy.adjacency=replace-one", "cohort=all"),
    "adaptive clipping": (*GIVEN, "privacy.clipping=adaptive"),
    "adaptive noise": (LARGE, "privacy.noise_schedule=adaptive"),
    "correlated noise": (LARGE, "cohort=min_separation", "cohort.size=4", "privacy.noise=correlated"),
    "arms": (*GIVEN, "tune=learning_rate", "tune.values=[0.1,1]", "tune.rounds=1"),
    "record": ("privacy=record", *GIVEN),
    "record, everybody": ("privacy=record", *GIVEN, "cohort=all"),
    "record, replace one": ("privacy=record", *GIVEN, "privacy.adjacency=replace-one"),
    "record and client": (
        "privacy=record_and_client",
        *(each.replace("privacy.", f"privacy.{unit}.") for unit in ("record", "client") for each in GIVEN),
    ),
}


QUICK = {"poisson", "replace one", "adaptive noise", "correlated noise", "record and client"}


@pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=[] if mode in QUICK else pytest.mark.campaign) for mode in MODES]
)
def test_verify_agrees_with_an_independent_recomputation(tmp_path: Path, mode: str) -> None:
    assert run_quietly([*SMALL, *MODES[mode]], tmp_path / "run").exit_code == 0
    clients = ledgers_in(tmp_path / "run" / "client_ledgers")
    ledgers = [*clients[:2], *(path for path in [tmp_path / "run" / "ledger"] if path.exists())]
    assert ledgers and bool(clients) == ("record" in mode)
    for ledger in ledgers:
        found = verify(ledger)
        assert found.ok, found.problem
        oracle = RECOMPUTE(str(ledger))
        assert set(oracle) == {str(adversary) for adversary in found.by_adversary}
        for adversary, recomputed in found.by_adversary.items():
            assert oracle[adversary]["delta"] == found.delta
            assert recomputed.reported == pytest.approx(oracle[adversary]["epsilon"], rel=0.02, abs=2e-3)
