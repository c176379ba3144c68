"""One budget of the records of real data on this machine, whatever the mode that trains on them."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from shared.tasks import RealPoints
from torch import nn

import fedveil as fv
from fedveil.base.refusal import Refusal
from fedveil.cli.budget import show
from fedveil.cli.report import report
from fedveil.evidence.binding.bound_folder import Knowledge
from fedveil.evidence.binding.verify import verify_folder
from fedveil.privacy.accounting.epsilon import epsilon
from fedveil.privacy.accounting.events import event_from_json, event_to_json
from fedveil.privacy.accounting.record_events import record_event
from fedveil.privacy.budget import Adjacency, Adversary
from fedveil.privacy.ledger import data_sets
from fedveil.privacy.ledger.caps import Cap, set_cap
from fedveil.privacy.ledger.ledger import verify
from fedveil.privacy.ledger.ledger_state import read_events, read_ledger

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm", "fast_runs")

DELTA = 1e-3
DISTRIBUTED = fv.RecordDistributed(
    target_epsilon=6.0, target_delta=DELTA, sample_rate=0.5, records=24, most_records=8
)
LEVELS: dict[str, Any] = {
    "record": fv.Record(target_epsilon=6.0, target_delta=DELTA, allow_large_delta=True),
    "record_distributed": DISTRIBUTED,
}


class Wards(RealPoints):
    """Three clients of real data with eight records each."""

    data_id, rows, width = "wards", 8, 3

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Linear(3, 2)


def whole(target: float | None = 1.0, noise: float | None = None) -> fv.ClientCentral:
    return fv.ClientCentral(
        target_epsilon=target, target_delta=DELTA, noise_multiplier=noise, allow_large_delta=True
    )


@pytest.fixture
def ran(tmp_path: Path) -> Any:
    """Runs on one data set, whose ledgers lie in one folder."""

    def run(privacy: Any, name: str, **more: Any) -> Any:
        keys = {"cohort": fv.All(), "num_rounds": 2, "accept_vacuous": True} | more
        keys |= {"batch_size": 4} if isinstance(privacy, fv.Record | fv.RecordAndClient) else {}
        return fv.simulate(
            Wards(),
            privacy=privacy,
            folder=tmp_path / name,
            ledger={"dir": str(tmp_path / "ledgers")},
            quiet=True,
            **keys,
        )

    return run


def ledgers(folder: Path) -> list[Path]:
    return data_sets.record_paths(folder / "ledgers", "wards")


def of_clients(folder: Path) -> list[Any]:
    """Return the events of the sums of whole clients, as a record pays for them."""
    events = read_events(data_sets.population_path(folder / "ledgers", "wards"), Adversary.MODEL)
    return [event_from_json(record_event(event_to_json(each), Adjacency.ZERO_OUT)) for each in events]


@pytest.mark.parametrize("level", LEVELS)
def test_plan_for_records_begins_from_the_spending_of_client_sums(
    ran: Any, tmp_path: Path, level: str
) -> None:
    ran(whole(), "whole")
    before = epsilon(of_clients(tmp_path), DELTA)
    assert 1.0 < before < 6.0
    result = ran(LEVELS[level], "records").result
    assert result["status"] == "completed"
    for path in ledgers(tmp_path):
        assert verify(path).ok and 5.5 < (verify(path).epsilon or 0) <= 6.0
        mine = [each for each in read_ledger(path).releases.values() if each.source == "client"]
        assert len(mine) == 2
    with pytest.raises(Refusal, match="target_epsilon"):
        ran(LEVELS[level], "again")


@pytest.mark.parametrize("level", LEVELS)
def test_sums_of_clients_stay_within_the_rest_of_their_records(ran: Any, tmp_path: Path, level: str) -> None:
    noise = {"target_epsilon": 6.0, "noise_multiplier": 8.0}
    ran(LEVELS[level].model_copy(update=noise), "records", num_rounds=1)
    paths = ledgers(tmp_path)
    assert len(paths) == (3 if level == "record" else 1)
    with pytest.raises(Refusal, match=r"pay for a sum of whole clients.*give at most") as refused:
        ran(whole(6.0), "dear")
    assert not (tmp_path / "dear").exists()
    fitting = float(str(refused.value).rpartition(" ")[2])
    assert ran(whole(fitting / 2), "whole").result["status"] == "completed"
    ended = ran(whole(20.0, 12.0), "ended", num_rounds=400).result
    assert ended["status"] == "exhausted"
    with pytest.raises(Refusal, match="of whole clients"):
        ran(whole(50.0, 4.0), "over")
    for path in paths:
        assert verify(path).ok and 5 < (verify(path).epsilon or 0) <= 6.0


def test_result_page_and_card_state_the_cost_of_client_sums(ran: Any, tmp_path: Path) -> None:
    ran(whole(), "first")
    result = ran(whole(2.0), "second").result
    lost = result["record_by_sums"]
    assert (lost["unit"], lost["sampling"]) == ("record", "by sums of whole clients")
    assert lost["epsilon"] == pytest.approx(epsilon(of_clients(tmp_path), DELTA), rel=1e-6)
    assert lost["epsilon"] > 4.0
    assert report(tmp_path / "second", tmp_path / "page") == 0
    made = json.loads((tmp_path / "page" / "report.json").read_text())
    assert made["record_by_sums"]["epsilon"] == lost["epsilon"]
    for name in ("report.html", "CARD.md"):
        assert "one example of one client, by sums of whole clients" in (tmp_path / "page" / name).read_text()
    both = ran(fv.RecordAndClient(record=LEVELS["record"], client=whole(9.0)), "both").result
    assert both["record_by_sums"] is None


def test_verify_recomputes_the_cost_of_client_sums_to_a_record(ran: Any, tmp_path: Path) -> None:
    ran(whole(), "run")
    lines = {each.name: each for each in verify_folder(tmp_path / "run", Knowledge())}
    assert lines["epsilon"].ok
    stated = json.loads((tmp_path / "run" / "result.json").read_text())
    stated["record_by_sums"]["epsilon"] /= 2
    (tmp_path / "run" / "result.json").write_text(json.dumps(stated))
    lines = {each.name: each for each in verify_folder(tmp_path / "run", Knowledge())}
    assert not lines["epsilon"].ok and "a record has lost" in lines["epsilon"].finding


def test_cap_holds_for_records_before_they_have_a_ledger(ran: Any, tmp_path: Path) -> None:
    set_cap(tmp_path / "ledgers", Cap("all", 2.0, DELTA))
    planned = ran(whole(2.0), "planned", num_rounds=1).result
    assert planned["status"] == "completed" and planned["privacy"][1]["epsilon"] < 1.0
    assert 1.8 < epsilon(of_clients(tmp_path), DELTA) <= 2.0
    with pytest.raises(Refusal, match="of whole clients"):
        ran(whole(2.0, 12.0), "over")
    assert not ledgers(tmp_path)


def test_a_run_that_hides_both_units_is_charged_to_its_records_once(ran: Any, tmp_path: Path) -> None:
    both = fv.RecordAndClient(record=LEVELS["record"], client=whole(3.0))
    assert ran(both, "both").result["status"] == "completed"
    population = read_ledger(data_sets.population_path(tmp_path / "ledgers", "wards"))
    assert {each.source for each in population.releases.values()} == {"records"}
    before = [len(read_ledger(path).releases) for path in ledgers(tmp_path)]
    with pytest.raises(Refusal, match="target_epsilon"):
        ran(LEVELS["record"], "again")
    for path in ledgers(tmp_path):
        data_sets.charge_client_sums(
            path, path.stem, data_sets.population_path(tmp_path / "ledgers", "wards"), LEVELS_BUDGET
        )
    assert [len(read_ledger(path).releases) for path in ledgers(tmp_path)] == before == [2, 2, 2]


LEVELS_BUDGET = fv.Budget("record", 6.0, DELTA)


def test_a_question_to_whole_clients_is_charged_to_their_records(ran: Any, tmp_path: Path) -> None:
    noise = {"target_epsilon": 6.0, "noise_multiplier": 8.0}
    ran(LEVELS["record_distributed"].model_copy(update=noise), "records", num_rounds=1)
    (path,) = ledgers(tmp_path)
    before = verify(path).epsilon or 0.0
    ran(whole(2.0), "whole", num_rounds=1, evaluate={"clients": "final", "noise_multiplier": 8.0})
    with pytest.raises(Refusal, match="of whole clients"):
        ran(whole(50.0), "over")
    kinds = [json.loads(each.entry.payload).get("kind") for each in read_ledger(path).releases.values()]
    assert kinds.count("question") == 1 and (verify(path).epsilon or 0) > before


def test_owner_reads_the_cost_of_client_sums_to_records(
    ran: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran(whole(), "whole")
    alone = epsilon(of_clients(tmp_path), DELTA)
    assert show(tmp_path / "ledgers", as_json=True) == 0
    rows = {row["unit"]: row for row in json.loads(capsys.readouterr().out)["ledgers"]}
    assert rows.keys() == {"client", "record"}
    assert (
        float(rows["record"]["spent"]) == float(rows["record"]["as_client"]) == pytest.approx(alone, rel=1e-3)
    )
    ran(LEVELS["record"], "records")
    assert show(tmp_path / "ledgers", as_json=True) == 0
    rows = json.loads(capsys.readouterr().out)["ledgers"]
    records = [row for row in rows if row["unit"] == "record"]
    assert len(rows) == 4 and len(records) == 3
    for row in records:
        assert float(row["as_client"]) == pytest.approx(alone, rel=1e-3) and 5 < float(row["spent"]) <= 6


@pytest.mark.parametrize("harm", ["deleted", "rolled back"])
@pytest.mark.parametrize("level", [*LEVELS, "client_central"])
def test_real_ledger_older_than_the_last_run_is_refused(
    ran: Any, tmp_path: Path, level: str, harm: str
) -> None:
    privacy = LEVELS.get(level, whole(2.0))
    ran(privacy, "first", num_rounds=1)
    path = (
        ledgers(tmp_path)[0] if level in LEVELS else data_sets.population_path(tmp_path / "ledgers", "wards")
    )
    earlier = path.read_bytes()
    more = privacy.model_copy(update={"target_epsilon": 9.0})
    ran(more, "second", num_rounds=1)
    newest = path.read_bytes()
    path.unlink() if harm == "deleted" else path.write_bytes(earlier)
    before = sorted(tmp_path.rglob("*.ledger"))
    with pytest.raises(Refusal, match=r"is known; restore it|rolled back.*restore a true copy"):
        ran(more, "third", num_rounds=1)
    assert sorted(tmp_path.rglob("*.ledger")) == before and not (tmp_path / "third").exists()
    path.write_bytes(newest)
    ran(more.model_copy(update={"target_epsilon": 14.0}), "third", num_rounds=1)


@pytest.mark.parametrize("level", ["record_distributed", "client_central"])
def test_ledger_replaced_by_an_older_copy_is_refused(ran: Any, tmp_path: Path, level: str) -> None:
    privacy = LEVELS.get(level, whole(2.0))
    ran(privacy, "first", num_rounds=1)
    (path,) = (tmp_path / "ledgers").glob("*.ledger")
    older = tmp_path / "older"
    shutil.copy(path, older)

    class Replacing:
        def start(self, run: object) -> None:
            """Wait."""

        def round(self, done: object) -> None:
            """Wait."""

        def end(self, ending: object) -> None:
            os.replace(older, path)
            path.with_name(f"{path.name}-wal").unlink()

    more = privacy.model_copy(update={"target_epsilon": 9.0})
    ran(more, "second", num_rounds=1, callbacks=[Replacing()])
    with pytest.raises(Refusal, match="rolled back"):
        ran(more.model_copy(update={"target_epsilon": 14.0}), "third", num_rounds=1)


def test_data_sets_of_an_earlier_release_go_on_and_keep_heads(ran: Any, tmp_path: Path) -> None:
    ran(whole(2.0), "first", num_rounds=1)
    file = tmp_path / "ledgers" / "data_sets.json"
    told = json.loads(file.read_text())
    assert len(told["wards"].pop("heads")) == 1
    file.write_text(json.dumps(told))
    ran(whole(4.0), "second", num_rounds=1)
    assert len(json.loads(file.read_text())["wards"]["heads"]) == 1
