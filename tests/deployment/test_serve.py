"""A server's run from its command line to its folder, on devices that are called in this process."""

import json
import re
import runpy
import shutil
import signal
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import yaml
from flwr.app import Error, Message
from safetensors.numpy import load_file
from shared.audits import noise_halved
from shared.runs import json_lines

from fedveil.audit.observer import RunAudit
from fedveil.base.refusal import Refusal
from fedveil.configs.privacy_settings import Record, RecordAndClient
from fedveil.deployment import serve as serving
from fedveil.deployment.device.client_bundle import read_client_bundle
from fedveil.deployment.device.device import read_device
from fedveil.deployment.device.device_ledger import epsilon_of, spent_on
from fedveil.deployment.device.log_copy import text_of_head
from fedveil.deployment.open_link import Link, Presence, open_link
from fedveil.deployment.pace import required_clients
from fedveil.deployment.probe import SERVER_LOCK, server_runs
from fedveil.deployment.prometheus import text_of
from fedveil.deployment.provision import provision, revoke
from fedveil.deployment.serve import deployed_in, serve, settings_for
from fedveil.deployment.status import NOT_RUNNING, read_status, show
from fedveil.evidence.content import report_of
from fedveil.evidence.live_page import live_page
from fedveil.evidence.page import page_of
from fedveil.links.server_bundle import OwnersBudget, read_server_bundle
from fedveil.links.server_log import LOG
from fedveil.links.server_log import read_entries as read_log
from fedveil.messages.notices import DeviceFacts, reply_with
from fedveil.messages.training_order import display_name, read_order
from fedveil.messages.wire import FORKED, NOT_ELIGIBLE, read_round
from fedveil.privacy.audit import round_rows
from fedveil.privacy.audit.canary_clients import coins_of, commitment
from fedveil.privacy.budget import OF_RECORDS, Adversary
from fedveil.privacy.ledger.hash_chain import exclusive_lock
from fedveil.privacy.ledger.ledger import read_entries
from fedveil.privacy.ledger.ledger_state import read_events, read_ledger
from fedveil.privacy.ledger.receipt import Receipt
from fedveil.privacy.mechanisms import distributed, private_sum
from fedveil.run import result as results
from fedveil.run.build import build
from fedveil.run.callbacks import Callback, RunEnd
from fedveil.run.files import ROSTERS
from fedveil.run.manifest import read_manifest
from fedveil.run.run_files import read_run

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm")

MADE = runpy.run_path(str(Path(__file__).parents[1] / "faults" / "served.py"))
Devices, make_federation, reaching, free_port, until, SECONDS = (
    MADE[name] for name in ("Devices", "make_federation", "reaching", "free_port", "until", "SECONDS")
)
COMMON = (
    "task=digits",
    "num_rounds=3",
    "batch_size=40",
    "privacy.allow_large_delta=true",
    "link.wait=0.3",
    "accept_vacuous=true",
)
CENTRAL = (*COMMON, "privacy=client_central", "privacy.target_epsilon=8")
MASKED = (*COMMON, "privacy=client_distributed", "privacy.target_epsilon=8")
RECORD = ("task=digits", "num_rounds=3", "batch_size=20", "link.wait=0.3")
TOGETHER = (
    "task=digits",
    "num_rounds=3",
    "link.wait=0.3",
    "privacy=record_distributed",
    "privacy.records=1500",
    "privacy.most_records=600",
)


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_federation(tmp_path_factory.mktemp("desk"))


@pytest.fixture
def hearts(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "hearts"))


@dataclass
class Spring:
    """A finished run, what its devices were sent, and what was to be seen in its third round."""

    hearts: Path
    sent: list[Message] = field(default_factory=list[Message])
    status: dict[str, Any] = field(default_factory=dict[str, Any])
    shown: str = ""
    metrics: str = ""
    page: str = ""


@pytest.fixture(scope="module")
def spring(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Spring:
    hearts = Path(shutil.copytree(made, tmp_path_factory.mktemp("spring") / "hearts"))
    seen, port = Spring(hearts), free_port()

    def looking(message: Message, count: int) -> None:
        seen.sent.append(message)
        if count == 10:
            until(lambda: read_status(hearts / "server")["round"] == 2)
            seen.status = read_status(hearts / "server")
            with redirect_stdout(StringIO()) as out:
                assert show(hearts / "server", as_json=False) == 0
            seen.shown = out.getvalue()
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=SECONDS) as answer:
                seen.metrics = answer.read().decode()
            with pytest.raises(urllib.error.HTTPError) as missing:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=SECONDS)
            missing.value.close()
            with urllib.request.urlopen(page, timeout=SECONDS) as answer:
                seen.page = answer.read().decode()

    with live_page(0) as watching:
        page = f"http://127.0.0.1:{watching[0].listens.getsockname()[1]}/"
        run = ("run=spring", f"metrics_port={port}")
        code, _ = served(hearts, *CENTRAL, *run, fault=looking, here=4, callbacks=watching)
    assert code == 0
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(page, timeout=5)
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5)
    return seen


def served(
    hearts: Path, *argv: str, fault: Any = None, here: int = 5, callbacks: Sequence[Callback] = ()
) -> tuple[int, Any]:
    grid = Devices(hearts / "clients", fault)
    given = [each for each in argv if each not in ("--json", "--despite-alarm")]
    flags = {"as_json": "--json" in argv, "despite_alarm": "--despite-alarm" in argv}
    return serve(hearts / "server", given, **flags, reach=reaching(grid, here), callbacks=callbacks), grid


def result_of(hearts: Path, run: str = "run-1") -> dict[str, Any]:
    return json.loads((hearts / "server" / "runs" / run / "result.json").read_text())


def rows_of(hearts: Path, run: str = "run-1") -> list[dict[str, Any]]:
    """Return the rounds of a run, with what its operator alone reads of them."""
    folder = hearts / "server" / "runs" / run
    rows = json_lines(folder / "metrics.jsonl")
    if not (folder / "operator.jsonl").exists():
        return rows
    told = json_lines(folder / "operator.jsonl")
    return [row | more for row, more in zip(rows, told, strict=False)]


def killing(at: int) -> Any:
    def fault(message: Message, count: int) -> Message | None:
        if count == at:
            raise Killed
        return None

    return fault


def ledger_of(hearts: Path) -> Path:
    (path,) = (hearts / "server" / "ledgers").glob("population-*.ledger")
    return path


def test_server_stopped_while_it_waits_keeps_its_receipts(
    spring: Spring, monkeypatch: pytest.MonkeyPatch
) -> None:
    stops, kept = list[int](), list[int]()

    def replies(messages: Sequence[Message], timeout: float) -> Iterator[Message]:
        assert timeout > 1
        for number, message in enumerate(messages):
            if number == 2:
                signal.raise_signal(signal.SIGTERM)
            yield reply_with(Receipt(message.metadata.dst_node_id, b"c" * 32, b"s" * 64), message)

    def keep(_: Any, folder: Path, description: Any, given: dict[int, Receipt]) -> None:
        kept.extend(given)

    bundle, folder = (
        read_server_bundle(spring.hearts / "server"),
        spring.hearts / "server" / "runs" / "spring",
    )
    federation = build(
        settings_for(bundle, CENTRAL).federation, deployed_in(bundle, settings_for(bundle, CENTRAL))
    )
    presence = Presence(dict.fromkeys((2, 3, 4), 0.0))
    link = Link(SimpleNamespace(send_and_receive=replies), lambda: presence)
    monkeypatch.setattr(serving.Farewell, "_write_receipts", keep)
    farewell = serving.Farewell(link, federation, bundle, None, "spring")
    before = signal.signal(signal.SIGTERM, lambda number, _: stops.append(number))
    try:
        farewell.end(RunEnd("completed", "", folder, {"rounds_completed": 3, "rounds_abandoned": 0}, {}))
        assert (kept, stops) == ([2, 3], [])
        signal.raise_signal(signal.SIGTERM)
        assert stops == [signal.SIGTERM]  # after it a signal is what it was before
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("mode", [MASKED, RECORD], ids=["masked", "record"])
def test_a_run_trains_on_devices_that_keep_their_own_ledgers(
    mode: tuple[str, ...], hearts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _ = served(hearts, *mode, "--json")
    result = result_of(hearts)
    assert (code, result["status"], result["rounds_completed"]) == (0, "completed", 3)
    assert json.loads(capsys.readouterr().out)["status"] == "completed"
    assert (result["data"], result["rng"], result["seed"]) == ("real", "system", None)
    assert [(row["invited"], row["replies"], row["dropped"]) for row in rows_of(hearts)] == [(5, 5, {})] * 3
    model = load_file(hearts / "server" / "runs" / "run-1" / "model.safetensors")
    assert any(value.any() for value in model.values())
    by_adversary = {row["adversary"]: row["epsilon"] for row in result["privacy"]}
    for client in (hearts / "clients").iterdir():
        (ledger,) = (client / "state" / "ledgers").glob("*.ledger")
        spent = epsilon_of(ledger)
        assert spent is not None and 0 < spent[0] <= 80
        if mode is RECORD:  # the server states a bound, and the device knows
            assert spent[0] <= by_adversary["server"] == 80.0  # what owners allow
    if mode is not RECORD:
        assert by_adversary["model"] == pytest.approx(rows_of(hearts)[-1]["epsilon_client"], rel=0.02)
        assert by_adversary["server"] == by_adversary["model"]
        assert result["secagg"]["identities"] == "of the roster that the authority signed, version 1"


def test_order_has_the_claims_of_the_run_by_their_usual_names(spring: Spring) -> None:
    orders = [read_order(message.content) for message in spring.sent]
    assert len(orders) == 15 and len({order.to_json() for order in orders if order}) == 1
    order = orders[0]
    assert order is not None and order.run == read_round(spring.sent[0].content)[0]
    assert display_name(order.run) == "spring" and order.run != "spring"
    assert order.client is not None
    assert order.client.noise_multiplier == result_of(spring.hearts, "spring")["noise_multiplier"]


def test_an_owner_allows_runs_by_the_names_that_people_give_them(hearts: Path) -> None:
    for policy in (hearts / "clients").glob("*/policy.toml"):
        policy.write_text(policy.read_text().replace("runs = []", 'runs = ["spring"]'))
    for run, replies, budget in (("spring", 5, 8), ("spring-2", 0, 9)):
        more = (f"run={run}", f"privacy.target_epsilon={budget}", "num_rounds=1", "link.quorum=0")
        served(hearts, *CENTRAL, *more)
        assert [row["replies"] for row in rows_of(hearts, run)] == [replies]
    assert rows_of(hearts, "spring-2")[0]["dropped"] == {"owner's policy": 5}


def test_the_ledger_is_named_after_the_federation(spring: Spring) -> None:
    path = ledger_of(spring.hearts)
    opened = next(e for e in read_entries(path) if e.kind == "open")
    owner = json.loads(opened.payload)["owner"]
    assert path.name == f"population-{owner[:32]}.ledger" and len(owner) == 64
    assert len([e for e in read_entries(path) if e.kind == "reserve"]) == 3


def test_same_command_goes_on_after_a_kill_and_spares_a_finished_run(
    hearts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Killed):
        served(hearts, *CENTRAL, fault=killing(7))  # in the second of three rounds, of five clients
    assert [row["round"] for row in rows_of(hearts)] == [1]
    assert served(hearts, *CENTRAL)[0] == 0
    assert [row["round"] for row in rows_of(hearts)] == [1, 2, 3]
    # The lost round was reserved, and stays spent; it was drawn and paid anew under another name.
    entries = [json.loads(e.key)[:2] for e in read_entries(ledger_of(hearts)) if e.kind == "reserve"]
    assert [number for _, number in entries] == [1, 2, 2, 3]
    assert len({name for name, _ in entries}) == 2 and {display_name(name) for name, _ in entries} == {
        "run-1"
    }
    assert result_of(hearts)["privacy"][-1]["epsilon"] <= 8
    before = {path: path.stat().st_mtime_ns for path in (hearts / "server" / "runs").rglob("*")}
    capsys.readouterr()
    assert served(hearts, *CENTRAL)[0] == 0
    assert "run run-1 is finished (completed: 3 rounds)" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (hearts / "server" / "runs").rglob("*")}
    assert len(read_events(ledger_of(hearts), Adversary.MODEL)) > 0


def test_folder_alone_goes_on_with_the_rest(hearts: Path) -> None:
    with pytest.raises(Refusal, match="say what is to be learned"):
        served(hearts)
    with pytest.raises(Killed):
        served(hearts, *MASKED, fault=killing(1))  # before the first round is over
    assert served(hearts)[0] == 0
    assert [row["round"] for row in rows_of(hearts)] == [1, 2, 3]
    with pytest.raises(Refusal, match="say what is to be learned"):
        served(hearts)


def test_a_run_that_began_otherwise_is_not_gone_on_with(hearts: Path) -> None:
    with pytest.raises(Killed):
        served(hearts, *CENTRAL, fault=killing(7))
    with pytest.raises(Refusal, match=r"run='run-1': was started with another privacy\.target_epsilon"):
        served(hearts, *CENTRAL, "privacy.target_epsilon=9")
    with pytest.raises(Refusal, match=r"run='run-1': was started with another link\.enough"):
        served(hearts, *CENTRAL, "link.enough=0.6")  # who sees the model sees how a round ends
    with pytest.raises(Killed):
        served(hearts, *CENTRAL, "privacy.target_epsilon=9", "run=second", fault=killing(0))
    assert sorted(each.name for each in (hearts / "server" / "runs").iterdir()) == ["run-1", "second"]


def test_a_run_of_an_earlier_release_goes_on_by_the_same_command(hearts: Path) -> None:
    """A key that the release did not know has its default, unless the command now says something else."""
    with pytest.raises(Killed):
        served(hearts, *CENTRAL, fault=killing(7))
    config = hearts / "server" / "runs" / "run-1" / "config.yaml"
    stored = yaml.safe_load(config.read_text())
    for group, key in (("audit", "alpha"), ("compress", "down"), ("privacy", "bands"), ("link", "patience")):
        del stored[group][key]
    for key in ("tune", "metrics_port", "schedule", "budget", "cost", "evaluate"):
        del stored[key]
    config.write_text(yaml.safe_dump(stored))
    with pytest.raises(Refusal, match=r"run='run-1': was started with another audit\.alpha"):
        served(hearts, *CENTRAL, "audit.alpha=0.001")
    with pytest.raises(Refusal, match=r"run='run-1': was started with another learning_rate"):
        served(hearts, *CENTRAL, "learning_rate=0.01")
    assert served(hearts, *CENTRAL)[0] == 0
    assert [row["round"] for row in rows_of(hearts)] == [1, 2, 3]


def test_omitted_target_is_the_allowance_of_the_owners(hearts: Path) -> None:
    bundle = read_server_bundle(hearts / "server")
    assert bundle.allowed == OwnersBudget(80.0, 1e-5)
    privacy = settings_for(bundle, ["task=digits"]).privacy
    assert isinstance(privacy, Record) and (privacy.target_epsilon, privacy.target_delta) == (80.0, 1e-5)
    both = settings_for(
        bundle, ["task=digits", "privacy=record_and_client", "privacy.client.target_epsilon=2"]
    )
    assert isinstance(both.privacy, RecordAndClient)
    assert (both.privacy.record.target_epsilon, both.privacy.client.target_epsilon) == (80.0, 2.0)
    assert settings_for(bundle, ["task=digits", "privacy=none"]).privacy.name == "none"
    (hearts / "server" / "owners.toml").unlink()  # as in a bundle of an earlier release
    privacy = settings_for(read_server_bundle(hearts / "server"), ["task=digits"]).privacy
    assert isinstance(privacy, Record) and privacy.target_epsilon == 3.0


def test_started_run_goes_on_after_its_owners_changed_their_allowance(hearts: Path) -> None:
    left_out = [each for each in CENTRAL if not each.startswith("privacy.target_epsilon")]
    with pytest.raises(Killed):
        served(hearts, *left_out, fault=killing(7))
    owners = hearts / "server" / "owners.toml"
    owners.write_text(owners.read_text().replace("80.0", "5.0"))
    assert served(hearts, *left_out)[0] == 0
    assert {row["target_epsilon"] for row in result_of(hearts)["privacy"]} == {None, 29.2}


def test_second_run_reports_spending_before_any_exchange(
    hearts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two = "privacy.target_epsilon=2"
    assert served(hearts, *TOGETHER, two, "run=first")[0] == 0
    said = r"privacy\.target_epsilon=2\.0: records have spent 2; owners allow 80; give a target above 2"
    ledger = ledger_of(hearts).read_bytes()
    with pytest.raises(Refusal, match=said):
        served(hearts, *TOGETHER, two, "run=second")
    assert ledger_of(hearts).read_bytes() == ledger and not (hearts / "server" / "runs" / "second").exists()
    owners = hearts / "server" / "owners.toml"
    before = owners.read_text()
    owners.write_text(before.replace("80.0", "2.0"))
    with pytest.raises(Refusal, match="owners allow 2; nothing is left unless owners raise target_epsilon"):
        served(hearts, *TOGETHER, "run=second")
    owners.write_text(before)
    capsys.readouterr()
    assert served(hearts, *TOGETHER, "run=second")[0] == 0
    assert "records have spent epsilon 2 before; the target is 80, owners allow 80" in capsys.readouterr().out
    with pytest.raises(Refusal, match="which run second left"):  # an empty folder would start at zero
        served(hearts, *CENTRAL, "run=third", f"ledger.dir={tmp_path}")
    owners.write_text(before.replace("80.0", "2.0"))
    anew = ("run=third", "num_rounds=100", f"ledger.dir={tmp_path}")
    with pytest.raises(Killed), patch.object(serving, "newest_heads", lambda *_: {}):  # an earlier release
        served(hearts, *CENTRAL, *anew, fault=killing(0))
    assert "\nthe target is 8, owners allow 2\n" in capsys.readouterr().out  # clients have spent nothing


def test_run_on_clients_ledgers_reports_the_rest_of_earlier_runs(
    hearts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two = "privacy.target_epsilon=2"
    assert served(hearts, *RECORD, two, "run=first")[0] == 0
    capsys.readouterr()
    code, _ = served(hearts, *RECORD, two, "run=second")
    out = capsys.readouterr().out
    assert (
        "run first let each client spend epsilon 2 on its records before; the target is 2, owners allow 80: "
        "clients that have spent it decline; give a target above 2" in out
    )
    assert code == 3 and "abandoned: nothing was released (budget spent 5)" in out
    assert "this target_epsilon or its owner's budget is spent or over" in out


def test_sums_of_clients_are_refused_or_counted_by_the_allowance(
    hearts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    owners = hearts / "server" / "owners.toml"
    owners.write_text(owners.read_text().replace("80.0", "8.0"))
    half = "a device charges its records for a sum of whole clients as for half its noise: of epsilon 8 "
    with pytest.raises(Refusal, match=f"{half}.*cannot pay for one round; ") as refused:
        served(hearts, *CENTRAL, "run=dear")
    assert not (hearts / "server" / "ledgers").exists()
    fitting = str(refused.value).partition("; ")[2].removesuffix(" pays for all")
    assert fitting.startswith("privacy.target_epsilon=3.")
    assert served(hearts, *CENTRAL, fitting, "run=fits")[0] == 0
    assert half not in capsys.readouterr().out
    for client in (hearts / "clients").iterdir():
        of_records = max(spent[0][0] for spent in spent_on(client / "state" / "ledgers").values() if spent[0])
        assert 7 < of_records <= 8
    with pytest.raises(Refusal, match="cannot pay for one round; nothing is left unless owners raise"):
        served(hearts, *CENTRAL, "run=again")


def test_partly_allowed_sums_of_clients_report_their_rounds(
    hearts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    owners = hearts / "server" / "owners.toml"
    owners.write_text(owners.read_text().replace("80.0", "8.0"))
    long = ("num_rounds=22", "run=long")
    with pytest.raises(Killed):
        served(hearts, *CENTRAL, *long, fault=killing(0))
    assert "records pay for 5 of 22 rounds; privacy.target_epsilon=3." in capsys.readouterr().out
    left_out = [each for each in CENTRAL if not each.startswith("privacy.target_epsilon")]
    with pytest.raises(Killed):
        served(hearts, *left_out, "run=default", f"ledger.dir={hearts / 'anew'}", fault=killing(0))
    assert "half its noise" not in capsys.readouterr().out


def test_sum_of_records_is_planned_with_the_costs_of_client_sums(hearts: Path) -> None:
    assert served(hearts, *CENTRAL, "run=sums")[0] == 0
    with pytest.raises(
        Refusal, match=r"sums of whole clients have cost records 19\.\d+; .*give a target above"
    ):
        served(hearts, *TOGETHER, "privacy.target_epsilon=9", "run=low")
    assert served(hearts, *TOGETHER, "privacy.target_epsilon=25", "run=enough")[0] == 0
    for client in (hearts / "clients").iterdir():
        spent = [spent[0][0] for spent in spent_on(client / "state" / "ledgers").values() if spent[0]]
        assert 23 < max(spent) <= 25


def test_sum_of_paid_releases_costs_records_nothing_more_at_both_ends(
    hearts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    levels = ("record.target_epsilon=4", "client.target_epsilon=20", "client.clipping_norm=1")
    both = [f"privacy.{each}" for each in levels]
    code, _ = served(hearts, *RECORD, "privacy=record_and_client", *both, "accept_vacuous=true", "run=both")
    sums = read_ledger(ledger_of(hearts)).releases.values()
    assert code == 0 and len(sums) == 3 and {each.source for each in sums} == {OF_RECORDS}
    # Were sums at 20 a cost of records, nothing would be left of 9.
    served(hearts, *TOGETHER, "privacy.target_epsilon=9", "run=together")
    assert "run both let each client spend epsilon 4 on its records before; the" in capsys.readouterr().out
    assert rows_of(hearts, "together")[0]["replies"] == 5
    for client in (hearts / "clients").iterdir():
        spent = [each[0][0] for each in spent_on(client / "state" / "ledgers").values() if each[0]]
        assert 4 < min(spent) <= 9


def test_run_of_records_reports_the_cost_of_earlier_client_sums(
    hearts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert served(hearts, *CENTRAL, "run=sums")[0] == 0
    capsys.readouterr()
    code, _ = served(hearts, *RECORD, "privacy.target_epsilon=9", "run=low")
    out = capsys.readouterr().out
    least = re.search(
        r"sums of whole clients have cost records epsilon (\S+) before; the target is 9, owners allow 80: "
        r"clients that have spent it decline; give a target above (\S+)\n",
        out,
    )
    assert code == 3 and "(budget spent 5)" in out
    assert least is not None and least[1] == least[2] and 15 < float(least[1]) < 20
    assert (
        served(hearts, *RECORD, f"privacy.target_epsilon={1.3 * float(least[1]):.3g}", "run=enough")[0] == 0
    )
    assert "give a target above" not in capsys.readouterr().out


def test_checkpoint_of_another_run_on_the_ledger_is_not_used(hearts: Path) -> None:
    runs = hearts / "server" / "runs"
    for name in ("run-1", "run-2"):
        with pytest.raises(Killed):
            served(hearts, *CENTRAL, f"run={name}", fault=killing(7))
    shutil.copy(runs / "run-1" / "checkpoint.safetensors", runs / "run-2")
    before = ledger_of(hearts).read_bytes()
    with pytest.raises(Refusal, match="holds a checkpoint of run 'run-1'"):
        served(hearts, *CENTRAL, "run=run-2")
    assert ledger_of(hearts).read_bytes() == before


@pytest.mark.parametrize("harm", ["deleted", "rolled back"])
@pytest.mark.parametrize("ends", ["finished", "killed"])
def test_a_ledger_of_a_server_that_is_older_than_its_runs_is_refused(
    hearts: Path, harm: str, ends: str
) -> None:
    assert served(hearts, *CENTRAL, "num_rounds=1", "run=one")[0] == 0
    ledger, more = ledger_of(hearts), (*CENTRAL, "privacy.target_epsilon=12", "num_rounds=3")
    earlier = ledger.read_bytes()
    if ends == "killed":
        with pytest.raises(Killed):
            served(hearts, *more, "run=two", fault=killing(7))
    else:
        assert served(hearts, *more, "run=two")[0] == 0
    newest = ledger.read_bytes()
    ledger.unlink() if harm == "deleted" else ledger.write_bytes(earlier)
    with pytest.raises(Refusal, match="which run two left"):
        served(hearts, *more, "privacy.target_epsilon=16", "run=three")
    assert ledger.exists() == (harm != "deleted") and not (hearts / "server" / "runs" / "three").exists()
    ledger.write_bytes(newest)
    assert served(hearts, *more, "privacy.target_epsilon=16", "num_rounds=1", "run=three")[0] == 0


def test_restored_server_ends_after_one_charge_and_then_before_any(
    hearts: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(serving, "HEADS_SECONDS", 0.0)
    assert served(hearts, *CENTRAL, "num_rounds=1", "run=one")[0] == 0
    server = hearts / "server"
    shutil.copytree(server, tmp_path / "kept")
    assert served(hearts, *CENTRAL, "privacy.target_epsilon=10", "num_rounds=1", "run=two")[0] == 0
    shutil.move(server, tmp_path / "newest")
    shutil.copytree(tmp_path / "kept", server)
    before, again = len(read_entries(ledger_of(hearts))), (*CENTRAL, "privacy.target_epsilon=10", "run=again")
    assert served(hearts, *again)[0] == 1
    assert "restored from an older copy" in result_of(hearts, "again")["reason"]
    charges = [each.kind for each in read_entries(ledger_of(hearts))[before:]]
    assert charges.count("reserve") == 1

    def told(settings: Any, bundle: Any, nodes: Any) -> Any:
        state = hearts / "clients" / "boston" / "state"
        facts = {4: DeviceFacts("0.1.0", 0, 1, (1,), text_of_head(state))}

        @contextmanager
        def opened() -> Iterator[Link]:
            with reaching(Devices(hearts / "clients"))(settings, bundle, nodes) as link:
                yield replace(link, presence=lambda: replace(link.presence(), devices=facts))

        return opened()

    paid = len(read_entries(ledger_of(hearts)))
    assert serve(server, list(again), reach=told) == 1
    assert "a device holds a later head" in result_of(hearts, "again")["reason"]
    with pytest.raises(Refusal, match="a device holds a later head"):
        served(hearts, *again)
    assert [e.kind for e in read_entries(ledger_of(hearts))[paid:] if e.kind == "reserve"] == []
    shutil.rmtree(server)
    shutil.move(tmp_path / "newest", server)
    assert served(hearts, *CENTRAL, "privacy.target_epsilon=12", "num_rounds=1", "run=found")[0] == 0


@pytest.mark.parametrize(("count", "code"), [(1, 0), (3, 1)])
def test_few_devices_with_another_log_end_no_run(hearts: Path, count: int, code: int) -> None:
    """Their owners have not yet accepted a lost log, or they lie; the others are away for a round."""

    def fault(message: Message, before: int) -> Message | None:
        said = FORKED if before < count else NOT_ELIGIBLE
        return Message(Error(said, ""), reply_to=message) if before < 5 else None

    asked = (*CENTRAL, "num_rounds=2", "link.patience=3", "run=spring")
    assert served(hearts, *asked, fault=fault)[0] == code
    result = result_of(hearts, "spring")
    assert ("most devices of the round have seen another log" in result["reason"]) == bool(code)
    assert result["rounds_abandoned"] == 1


def test_each_ledger_folder_of_a_server_must_match_its_own_runs(hearts: Path, tmp_path: Path) -> None:
    one, other = (*CENTRAL, "num_rounds=1"), f"ledger.dir={tmp_path / 'other'}"
    assert served(hearts, *one, "run=here")[0] == 0
    with pytest.raises(Refusal, match="which run here left"):  # an empty folder would start at zero
        served(hearts, *one, other, "run=there")
    with patch.object(serving, "newest_heads", lambda *_: {}):  # an earlier release
        assert served(hearts, *one, other, "run=there")[0] == 0
    more = (*one, "privacy.target_epsilon=12")
    assert served(hearts, *more, "run=here-2")[0] == 0
    assert served(hearts, *more, other, "run=there-2")[0] == 0
    (ledger,) = (tmp_path / "other").glob("*.ledger")
    ledger.unlink()
    with pytest.raises(Refusal, match="which run there-2 left"):
        served(hearts, *more, other, "privacy.target_epsilon=16", "run=there-3")


def test_impossible_folder_is_refused_by_the_name_of_its_setting(hearts: Path) -> None:
    (hearts / "server" / "runs").write_text("")
    with pytest.raises(Refusal) as refused:
        served(hearts, *CENTRAL, "run=spring")
    assert refused.value.field == "run" and str(refused.value.value).endswith("server/runs/spring")


def test_a_second_server_is_refused(hearts: Path) -> None:
    with exclusive_lock(hearts / "server" / SERVER_LOCK, "server"):
        assert server_runs(hearts / "server")
        with pytest.raises(Refusal, match=r"server=.*in use by process"):
            served(hearts, *CENTRAL)
    assert not server_runs(hearts / "server")


def test_no_round_is_paid_for_before_enough_clients_are_there(
    hearts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _ = served(hearts, *CENTRAL, here=2)
    assert (code, result_of(hearts)["status"]) == (1, "failed")
    assert result_of(hearts)["reason"] == "2 of 3 clients that a round needs were connected after 0.3 s"
    assert not [e for e in read_entries(ledger_of(hearts)) if e.kind == "reserve"]
    waits = "waiting for 3 of 5 clients (link.clients=0.5), up to 0.3 s (link.wait)"
    assert waits in capsys.readouterr().out
    patient = ("link.deadline=20", "link.clients=0.4", "link.patience=3", "link.wait=5")  # as it may go on
    assert served(hearts, *CENTRAL, *patient, here=3)[0] == 0  # the same command, once they are
    assert capsys.readouterr().out.count("2 of 5 clients are not connected yet") == 1


def test_encrypted_round_is_paid_for_once_all_members_are_there(
    hearts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _ = served(hearts, *MASKED, here=3)
    assert "waiting for 4 of 5 clients (an encrypted sum needs them), up to" in capsys.readouterr().out
    assert (code, result_of(hearts)["status"]) == (1, "failed")
    assert result_of(hearts)["reason"] == "3 of 4 clients that a round needs were connected after 0.3 s"
    assert not [e for e in read_entries(ledger_of(hearts)) if e.kind == "reserve"]


def test_rounds_below_the_quorum_release_nothing_and_end_the_run(hearts: Path) -> None:
    def down(message: Message, count: int) -> Message | None:
        node = message.metadata.dst_node_id
        return Message(Error(1, "down"), reply_to=message) if node > 3 else None

    code, _ = served(hearts, *CENTRAL, "link.patience=2", fault=down)
    assert (code, result_of(hearts)["reason"]) == (1, "2 rounds in a row were abandoned (failed)")
    assert [(row["replies"], row["abandoned"]) for row in rows_of(hearts)] == [(2, True)] * 2
    assert result_of(hearts)["rounds_abandoned"] == 2
    model = load_file(hearts / "server" / "runs" / "run-1" / "model.safetensors")
    assert not any(value.any() for value in model.values())
    assert read_status(hearts / "server")["abandoned"] == 2
    code, grid = served(hearts, *CENTRAL, "num_rounds=1", "run=second", fault=down)
    # Nothing was learned: the model that a device has from another run is the better one.
    assert code == 0 and {(each.run, len(each.model)) for each in grid.told} == {("second", 0)}


def test_link_is_the_one_of_the_bundles(hearts: Path) -> None:
    with pytest.raises(
        Refusal, match="link='flower': the bundles of this federation were made for link=grpc"
    ):
        serve(hearts / "server", [*CENTRAL, "link=flower"], reach=open_link)
    assert not (hearts / "server" / "runs").exists()
    file = hearts / "server" / "server.toml"
    file.write_text(file.read_text().replace('"grpc"', '"flower"'))
    assert settings_for(read_server_bundle(hearts / "server"), CENTRAL).link.name == "flower"


# --- the audit --------------------------------------------------------------------------------------------------


def test_alarm_stops_a_server_for_good_and_is_reported_everywhere(
    hearts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = hearts / "server"
    with noise_halved(since=2):
        assert served(hearts, *CENTRAL)[0] == 5
    assert (result_of(hearts)["status"], result_of(hearts)["rounds_completed"]) == ("alarmed", 2)
    notes = [json.loads(e.payload) for e in read_entries(ledger_of(hearts)) if e.kind == "note"]
    assert notes and all((each["level"], each["action"]) == ("red", "stop") for each in notes)
    status = read_status(folder)
    assert {(each["round"], each["level"]) for each in status["audit"]["alarms"]} == {(2, "red")}
    show(folder, as_json=False)
    assert "audit: RED after round 2: norm, p =" in capsys.readouterr().out
    text = text_of(status)
    assert 'fedveil_audit_alarms_total{level="red",test="norm"} 1' in text
    assert 'fedveil_audit_p_value{test="reuse"}' in text
    lines = json_lines(folder / "server.log")
    assert next(line["round"] for line in lines if line["event"] == "alarm") == 2
    assert served(hearts, *CENTRAL)[0] == 5  # the same command: nothing is trained
    assert "is finished (alarmed: an audit raised an alarm after round 2" in capsys.readouterr().out
    assert len(rows_of(hearts)) == 2


def test_a_paused_server_stays_so_however_often_a_unit_starts_it(hearts: Path) -> None:
    pause = (*CENTRAL, "num_rounds=4", "audit.on_alarm=pause")
    with noise_halved(since=2):
        assert served(hearts, *pause)[0] == 5
    assert [served(hearts, *pause)[0], served(hearts)[0]] == [5, 5]
    assert len(rows_of(hearts)) == 2
    with pytest.raises(Killed):
        served(hearts, *pause, "--despite-alarm", fault=killing(0))
    assert served(hearts)[0] == 0 and result_of(hearts)["rounds_completed"] == 4
    assert {each["round"] for each in result_of(hearts)["audit"]["alarms"]} == {2}


def test_alarm_ends_the_run_of_a_killed_server(hearts: Path) -> None:
    with noise_halved(1), patch.object(RunAudit, "demand", side_effect=Killed), pytest.raises(Killed):
        served(hearts, *CENTRAL, "audit.on_alarm=rollback")
    assert served(hearts)[0] == 5
    assert "the model is that of round 0" in result_of(hearts)["reason"] and len(rows_of(hearts)) == 1


@pytest.mark.parametrize("mode", [CENTRAL, MASKED], ids=["central", "masked"])
def test_devices_take_noise_that_an_alarm_raised(mode: tuple[str, ...], hearts: Path) -> None:
    with (
        noise_halved(since=1)
        if mode is CENTRAL
        else patch.object(distributed, "add_grid_noise", lambda *_: None)
    ):
        assert served(hearts, *mode, "num_rounds=2", "audit.on_alarm=raise_noise")[0] == 0
    assert [row["replies"] for row in rows_of(hearts)] == [5, 5]
    assert result_of(hearts)["audit"]["verdict"] == "violated"
    rows = round_rows.read(hearts / "server" / "runs" / "run-1" / "audit.npy", 0)
    first, second = rows["noise"][rows["round"] > 0]
    assert second / first == pytest.approx(2.0, rel=0.01)


FULL = ("audit=full", "audit.canaries=80", "audit.looks=1", "audit.on_alarm=note")


@contextmanager
def no_noise() -> Iterator[None]:
    with patch.object(private_sum, "sample", lambda sigma, size, stream: np.zeros(size)):
        yield


def canaries_of(hearts: Path) -> tuple[Any, Any]:
    """The rows that the auditor kept, and the coins."""
    folder = hearts / "server" / "runs" / "run-1"
    opened = json.loads((folder / "audit.json").read_text())["opened"]
    rows = round_rows.read(folder / "audit.npy", 80)
    return rows[rows["round"] > 0], coins_of(bytes.fromhex(opened["seed"]), 80)


def commitments(hearts: Path) -> list[str]:
    notes = [json.loads(e.payload) for e in read_entries(ledger_of(hearts)) if e.kind == "note"]
    return [note["commitment"] for note in notes if "commitment" in note]


def test_canaries_of_a_server_answer_and_are_counted_nowhere(hearts: Path) -> None:
    with no_noise():
        code, grid = served(hearts, *CENTRAL, *FULL)
    result = result_of(hearts)
    assert (code, result["audit"]["canaries"], grid.count) == (0, 80, 3 * 5)
    assert [(row["invited"], row["replies"], row["dropped"]) for row in rows_of(hearts)] == [(5, 5, {})] * 3
    rows, coins = canaries_of(hearts)
    assert rows["taken"].all() and rows["clients"].tolist() == [5, 5, 5]
    assert rows["along"][:, coins].mean() == pytest.approx(1.0, abs=0.35)  # a clipping norm each, and not ten
    assert rows["along"][:, ~coins].mean() == pytest.approx(0.0, abs=0.35)


def test_canaries_make_no_quorum(hearts: Path) -> None:
    def down(message: Message, count: int) -> Message | None:
        node = message.metadata.dst_node_id
        return Message(Error(1, "down"), reply_to=message) if node > 3 else None

    code, _ = served(hearts, *CENTRAL, *FULL, "link.patience=1", fault=down)
    assert (code, result_of(hearts)["rounds_abandoned"], rows_of(hearts)[0]["replies"]) == (1, 1, 2)


def test_canaries_are_not_enough(hearts: Path) -> None:
    assert served(hearts, *CENTRAL, *FULL, "link.enough=0.6")[0] == 0
    assert [(row["replies"], row["dropped"]) for row in rows_of(hearts)] == [(3, {"not needed": 2})] * 3


def test_a_server_that_was_killed_goes_on_with_the_same_coins(hearts: Path) -> None:
    with pytest.raises(Killed):
        served(hearts, *CENTRAL, *FULL, fault=killing(7))
    key = hearts / "server" / "runs" / "run-1" / "audit.key"
    seed = key.read_bytes()
    assert key.stat().st_mode & 0o777 == 0o600
    with patch.object(results, "write_results", side_effect=Killed), pytest.raises(Killed):
        served(hearts)
    assert served(hearts)[0] == 0 and not key.exists()
    rows, coins = canaries_of(hearts)
    assert rows["round"].tolist() == [1, 2, 3] and (coins == coins_of(seed, 80)).all()
    assert commitments(hearts) == [commitment(seed, coins)] * 3


def test_killed_servers_run_is_closed_by_the_folder_alone(
    hearts: Path,
) -> None:
    with patch.object(results, "close_run", side_effect=Killed), pytest.raises(Killed):
        served(hearts, *CENTRAL)
    run = hearts / "server" / "runs" / "run-1"
    with pytest.raises(Refusal, match="say what is to be learned"):
        served(hearts)
    assert json.loads(read_entries(ledger_of(hearts))[-1].payload)["manifest"] == read_manifest(run).hash


def test_a_run_that_only_owners_charge_has_its_manifest_after_a_kill(hearts: Path) -> None:
    with patch.object(results, "close_run", side_effect=Killed), pytest.raises(Killed):
        served(hearts, *RECORD)
    with pytest.raises(Refusal, match="say what is to be learned"):
        served(hearts)
    assert read_manifest(hearts / "server" / "runs" / "run-1").status == "completed"


def test_killed_servers_run_is_closed_by_the_same_command(
    hearts: Path,
) -> None:
    with patch.object(results, "close_run", side_effect=Killed), pytest.raises(Killed):
        served(hearts, *CENTRAL, *FULL)
    run = hearts / "server" / "runs" / "run-1"
    ledger = json.loads((run / "result.json").read_text())["ledger"]
    assert (run / "audit.key").exists() and read_entries(ledger)[-1].kind != "close"
    for _ in range(2):
        assert served(hearts, *CENTRAL, *FULL)[0] in (0, 4)
        assert [entry.kind for entry in read_entries(ledger)].count("close") == 1
    assert json.loads(read_entries(ledger)[-1].payload)["manifest"] == read_manifest(run).hash
    assert not (run / "audit.key").exists()


# --- watching ---------------------------------------------------------------------------------------------------


def changing(at: int, change: Callable[[], None]) -> Any:
    def fault(message: Message, count: int) -> Message | None:
        if count == at:
            change()
        return None

    return fault


@pytest.mark.parametrize(
    ("mode", "audit"), [(CENTRAL, FULL), (MASKED, ())], ids=["central, with canaries", "masked"]
)
def test_revocations_and_admissions_count_from_the_next_round(
    mode: tuple[str, ...], audit: tuple[str, ...], hearts: Path, tmp_path: Path
) -> None:
    grid = Devices(hearts / "clients")

    def change() -> None:
        revoke(hearts, ["boston"])
        fresh = (hearts / "authority" / "federation.yaml").read_text().replace("boston", "utrecht")
        (tmp_path / "federation.yaml").write_text(
            fresh.replace("{name: cleveland}", "{name: cleveland}, {name: basel}")
        )
        provision(tmp_path / "federation.yaml", hearts, None)
        for name in ("basel", "utrecht"):
            device = read_device(read_client_bundle(hearts / "clients" / name))
            grid.devices[device.bundle.settings.node] = device

    grid.fault = changing(3, change)
    with no_noise():
        code = serve(hearts / "server", (*mode, *audit), reach=reaching(grid))
    rows = rows_of(hearts)
    assert code == 0 and [(row["invited"], row["replies"], row["dropped"]) for row in rows] == [
        (5, 5, {}),
        (6, 6, {}),
        (6, 6, {}),
    ]
    if audit:  # the canaries are who they were
        kept, coins = canaries_of(hearts)
        assert kept["clients"].tolist() == kept["population"].tolist() == [5, 6, 6]
        assert kept["along"][-1, coins].mean() == pytest.approx(1.0, abs=0.35)
        assert kept["along"][-1, ~coins].mean() == pytest.approx(0.0, abs=0.35)
    assert read_status(hearts / "server")["roster"] == 3
    assert [each["name"] for each in read_status(hearts / "server")["clients"]][-2:] == ["basel", "utrecht"]
    events = json_lines(hearts / "server" / "server.log")
    told = [event for event in events if event["event"] == "roster"]
    assert told and (told[-1]["version"], told[-1]["clients"]) == (3, 6)
    entries = [json.loads(entry) for entry in read_log(hearts / "server" / LOG)]
    assert [each["kind"] for each in entries if each["kind"] != "roster"] == [
        *["model"] * 3,
        "final",
        "manifest",
    ]
    assert [each["version"] for each in entries if each["kind"] == "roster"] == [1, 3]
    private, rosters = mode is CENTRAL, result_of(hearts)["rosters"]
    assert [(each["version"], each["before"], each["round"]) for each in rosters] == [(1, 0, 1), (3, 1, 2)]
    assert rosters[-1]["hash"] == read_server_bundle(hearts / "server").roster.hash.hex()
    names = {
        key: rosters[1][key] and [each.split()[0] for each in rosters[1][key]] for key in ("added", "removed")
    }
    wanted = {"added": ["basel", "utrecht"], "removed": ["boston"]}
    assert names == ({"added": None, "removed": None} if private else wanted)
    assert rosters[0]["members"] == (None if private else 5)
    page = page_of(report_of(read_run(hearts / "server" / "runs" / "run-1")))
    assert ("utrecht (" in page) != private and "boston" not in page.split(">Rosters<")[0]
    assert (hearts / "server" / "runs" / "run-1" / ROSTERS).stat().st_mode & 0o777 == 0o600


def test_too_small_roster_ends_the_run_until_there_are_more(hearts: Path, tmp_path: Path) -> None:
    asked = (*CENTRAL, "cohort=fixed", "cohort.size=5")
    code, _ = served(hearts, *asked, fault=changing(6, lambda: revoke(hearts, ["boston"])))
    result = result_of(hearts)
    assert (code, result["status"], result["rounds_completed"]) == (1, "failed", 2)
    assert "cohort.size" in result["reason"] and "4 clients" in result["reason"]
    (tmp_path / "federation.yaml").write_text(
        (hearts / "authority" / "federation.yaml").read_text().replace("boston", "utrecht")
    )
    provision(tmp_path / "federation.yaml", hearts, None)
    assert served(hearts, *asked)[0] == 0
    assert [row["round"] for row in rows_of(hearts)] == [1, 2, 3]


def test_a_roster_of_nobody_is_refused_at_the_start(hearts: Path) -> None:
    revoke(hearts, ["*"])
    with pytest.raises(Refusal, match="roster='version 2': has no members"):
        served(hearts, *CENTRAL)


def test_an_older_roster_than_was_served_is_refused_at_the_start(hearts: Path, tmp_path: Path) -> None:
    kept = Path(shutil.copytree(hearts / "server", tmp_path / "kept"))
    revoke(hearts, ["boston"])
    assert served(hearts, *CENTRAL)[0] == 0
    for name in ("roster.bin", "admitted.json"):
        shutil.copy(kept / name, hearts / "server")
    with pytest.raises(Refusal, match=r"roster='version 1': this server has served version 2"):
        served(hearts, *CENTRAL, "run=again")


def test_status_names_clients_and_spending_during_and_after_a_run(
    spring: Spring, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, then = spring.hearts / "server", spring.status
    assert (then["state"], then["round"], then["invited"], then["replies"]) == ("training", 2, 10, None)
    assert [each["since"] is not None for each in then["clients"]] == [True] * 4 + [False]
    assert all(each["certificate_ends"] and each["version"] is None for each in then["clients"])
    assert "365 d left" in spring.shown or "364 d left" in spring.shown
    assert "hearts, run spring: training" in spring.shown and "round 2 of 3" in spring.shown
    assert "clients: epsilon" in spring.shown and "of 8 spent" in spring.shown and "cleveland" in spring.shown
    after = read_status(folder)
    assert (after["state"], after["round"], after["reason"]) == ("completed", 3, "3 rounds")
    (budget,) = after["privacy"]
    assert budget["spent"] + budget["left"] == pytest.approx(8)
    spent = {row["adversary"]: row["epsilon"] for row in result_of(spring.hearts, "spring")["privacy"]}
    assert budget["spent"] == pytest.approx(spent["model"], rel=0.02) and spent["server"] == "infinity"
    assert show(folder, as_json=True) == 0  # a run that is over needs no server
    assert json.loads(capsys.readouterr().out)["running"] is False


def test_status_names_unit_and_epsilon_of_records_of_one_sum(
    hearts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    statuses: list[dict[str, Any]] = []

    def looking(message: Message, count: int) -> None:
        if count == 0:
            until((hearts / "server" / "status.json").exists)
            statuses.append(read_status(hearts / "server"))

    assert served(hearts, *TOGETHER, "privacy.target_epsilon=6", fault=looking)[0] == 0
    before, after = statuses[0]["privacy"], read_status(hearts / "server")
    told = {"unit": "record", "target": 6.0, "delta": 1e-5, "own_ledgers": False}
    assert before == [{**told, "spent": None, "left": None}]  # unknown, which is not zero
    (budget,) = after["privacy"]
    assert budget == {**told, "spent": budget["spent"], "left": budget["left"]}
    assert budget["spent"] + budget["left"] == pytest.approx(6)
    assert budget["spent"] == pytest.approx(result_of(hearts)["privacy"][-1]["epsilon"], rel=0.02)
    show(hearts / "server", as_json=False)
    assert f"records: epsilon {budget['spent']:.3f} of 6 spent at delta 1e-05" in capsys.readouterr().out
    assert f'fedveil_epsilon_spent{{unit="record"}} {budget["spent"]}' in text_of(after)
    assert 0 < after["round_seconds"] < 600
    unknown = text_of({**after, "privacy": before})
    assert "fedveil_epsilon_spent{" not in unknown and 'epsilon_target{unit="record"} 6.0' in unknown
    (hearts / "server" / "status.json").write_text(json.dumps({**after, "privacy": before}))
    show(hearts / "server", as_json=False)
    assert "records: no round has ended yet; at most epsilon 6 at delta 1e-05" in capsys.readouterr().out


def test_status_names_a_killed_server(
    spring: Spring, hearts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Refusal, match="no server has run there"):
        show(hearts / "server", as_json=False)
    records = [{"unit": "record", "target": 3.0, "spent": None, "left": None, "delta": 1e-5}]
    left = {**spring.status, "budgets_spent": 2, "privacy": records}
    (hearts / "server" / "status.json").write_text(json.dumps(left))
    assert show(hearts / "server", as_json=False) == NOT_RUNNING
    text = capsys.readouterr().out
    assert "run spring: killed" in text
    assert (
        "each client spends at most epsilon 3 by its own ledger; in the last round 2 reported theirs" in text
    )


def test_status_names_untrue_sums_and_suspects(
    spring: Spring, hearts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = {"untrue": 2, "suspected": {"boston": ["is suspected of spoiling sums: no other member is"]}}
    told["blamed"] = {"basel": ["dealt a share that does not open or does not fit"]}
    (hearts / "server" / "status.json").write_text(json.dumps({**spring.status, **told}))
    show(hearts / "server", as_json=False)
    said = capsys.readouterr().out
    assert "2 with a sum that cannot be true" in said and "boston is suspected of spoiling sums" in said
    assert "basel dealt a share that does not open" in said
    assert "fedveil_rounds_untrue_total 2" in text_of({**spring.status, **told})


def test_log_has_a_json_line_per_event_and_no_value_of_a_client(spring: Spring) -> None:
    text = (spring.hearts / "server" / "server.log").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    events = [line["event"] for line in lines]
    assert events.count("round") == 3 and events.count("connected") == 4
    assert (events[-1], lines[-1]["status"]) == ("ends", "completed")
    rounds = [line for line in lines if line["event"] == "round"]
    told = {"time", "level", "event", "run", "round", "invited", "replies", "dropped", "abandoned"}
    assert {key for line in rounds for key in line} == told | {"epsilon_client", "epsilon_record"}


def test_clients_and_trackers_get_the_end_of_a_run_with_its_model(hearts: Path) -> None:
    code, grid = served(hearts, *CENTRAL, "run=over", "callbacks=[csv]", here=4)
    assert (
        code == 0
        and [(each.run, each.status, each.rounds) for each in grid.told] == [("over", "completed", 3)] * 4
    )
    folder = hearts / "server" / "runs" / "over"
    model = load_file(folder / "model.safetensors")
    assert all((each.model[name] == value).all() for each in grid.told for name, value in model.items())
    assert len((folder / "metrics.csv").read_text().splitlines()) == 4


def test_clients_get_no_end_of_a_run_that_goes_on(hearts: Path) -> None:
    code, grid = served(hearts, *CENTRAL, "link.clients=1", here=4)  # nobody waits for the fifth
    assert code == 1 and not grid.told


def test_the_page_of_a_run_that_goes_on(spring: Spring) -> None:
    assert "A model trained by real clients" in spring.page and "no value is final" in spring.page
    assert "Devices give receipts when the run ends." in spring.page


def test_numbers_for_prometheus(spring: Spring) -> None:
    samples = dict(line.rsplit(" ", 1) for line in spring.metrics.splitlines() if not line.startswith("#"))
    assert samples["fedveil_round"] == "2.0" and samples["fedveil_invited_total"] == "10.0"
    assert samples['fedveil_state{state="training"}'] == "1.0"
    figures = rows_of(spring.hearts, "spring")[1]
    assert float(samples['fedveil_figure{figure="accuracy"}']) == figures["accuracy"]
    assert samples["fedveil_round_invited"] == "5.0"
    secret = {"replies", "dropped", "bytes", "turned_away", "round_seconds", "round_replies"}
    assert not [name for name in samples if name.startswith(tuple(f"fedveil_{each}" for each in secret))]
    assert samples["fedveil_clients_connected"] == "4.0" and samples["fedveil_clients"] == "5.0"
    assert float(samples['fedveil_epsilon_spent{unit="client"}']) > 0


@pytest.mark.parametrize(
    "asked", [("cohort=fixed", "cohort.size=900"), ("strategy=krum",), ("task.data_id=hearts",)]
)
def test_a_refused_run_leaves_no_folder(hearts: Path, asked: tuple[str, ...]) -> None:
    with pytest.raises(Refusal):
        served(hearts, *CENTRAL, *asked, "run=spring")
    assert not (hearts / "server" / "runs").exists()


def test_encrypted_round_waits_for_the_members_of_its_sum_alone(
    hearts: Path,
) -> None:
    """Of five, one may be missing; of four and of three, none. Two hide nobody, and wait until others are renewed."""
    bundle = read_server_bundle(hearts / "server")
    settings = settings_for(bundle, [*MASKED, "secagg.dropout=0.2"])
    federation = build(settings.federation, deployed_in(bundle, settings))
    assert [required_clients(federation, 5, valid) for valid in (5, 4, 3, 2)] == [4, 4, 3, 4]
