"""A federation as its people run it: provisioned, a server and five clients as processes, TLS, kills and restarts."""

import json
import os
import re
import runpy
import signal
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load, load_file
from shared.runs import json_lines

from fedveil.deployment.device.device_ledger import epsilon_of
from fedveil.deployment.provision import provision, revoke, rotate
from fedveil.links.server_bundle import read_server_bundle
from fedveil.privacy.arms import ArmDeal
from fedveil.privacy.audit import round_rows
from fedveil.privacy.audit.canary_clients import coins_of, commitment
from fedveil.privacy.ledger.ledger import read_entries, verify

FAULTS = Path(__file__).parents[1] / "faults"
SERVED = runpy.run_path(str(FAULTS / "served.py"))
until = SERVED["until"]
ROUNDS = 16
COMMON = (
    "task=digits",
    "batch_size=40",
    "accept_vacuous=true",
    "link.clients=0.8",
    "link.wait=60",
    "link.deadline=20",
)
LOOSE = "privacy.allow_large_delta=true"  # for five clients
# The runs of a federation share one budget: each asks for more than the runs before it have spent.
MASKED, CENTRAL, AUDITED, CAPPED = (
    (LOOSE, f"privacy.target_epsilon={epsilon}") for epsilon in (5, 8, 10, 12)
)


@dataclass
class World(SERVED["Served"]):
    """What is asked of this federation, and what it has left in its files."""

    @property
    def folder(self) -> Path:
        return self.hearts / "server"

    def server(self, *argv: str) -> Any:
        return self.start("server", self.folder, *COMMON, *argv)

    def rows(self, run: str) -> list[dict[str, Any]]:
        """Return the rounds as the operator of the server reads them."""
        files = [self.folder / "runs" / run / name for name in ("metrics.jsonl", "operator.jsonl")]
        told, counted = (json_lines(path) if path.exists() else [] for path in files)
        counts = {row["round"]: row for row in counted if "round" in row}
        return [row | counts.get(row["round"], {}) for row in told]

    def reached(self, run: str, number: int, server: Any) -> None:
        until(lambda: len(self.rows(run)) >= number or not server.alive, lambda: server.said)
        assert len(self.rows(run)) >= number, server.said

    def result(self, run: str) -> dict[str, Any]:
        return json.loads((self.folder / "runs" / run / "result.json").read_text())

    def health(self, name: str) -> str:
        return json.loads((self.hearts / "clients" / name / "state" / "health.json").read_text())["state"]

    def cap(self, name: str, epsilon: float) -> None:
        policy = self.hearts / "clients" / name / "policy.toml"
        policy.write_text(re.sub(r"target_epsilon = .*", f"target_epsilon = {epsilon}", policy.read_text()))
        self.clients[name].kill(signal.SIGTERM)
        self.client(name)

    def population(self) -> Path:
        (path,) = (self.folder / "ledgers").glob("*.ledger")
        return path

    def own_ledgers(self, kind: str) -> list[Path]:
        return sorted((self.hearts / "clients").glob(f"*/state/ledgers/{kind}*.ledger"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with SERVED["serving"](World, tmp_path_factory.mktemp("world")) as made:
        yield made


def reservations(path: Path, run: str) -> list[tuple[str, int]]:
    keys = [json.loads(entry.key) for entry in read_entries(path) if entry.kind == "reserve"]
    return [(name, number) for name, number, _ in keys if name.startswith(f"{run}@")]


def test_encrypted_sums_survive_the_server_and_a_client_being_killed(world: World) -> None:
    asked = ("privacy=client_distributed", *MASKED, f"num_rounds={ROUNDS}", "link.enough=0.8", "run=masked")
    server = world.server(*asked)
    world.reached("masked", 2, server)
    os.kill(server.pid, signal.SIGSTOP)  # so that there is time to look at it, however fast rounds are
    assert world.start("server", "status", world.folder).wait() == 0
    second = world.server(*asked)
    assert second.wait() == 2 and "in use by process" in second.said
    server.kill()
    assert world.start("server", "status", world.folder).wait() == 1
    before = len(world.rows("masked"))

    server = world.server(*asked)
    world.reached("masked", before + 2, server)
    world.clients["boston"].kill()
    assert server.wait() == 0, server.said
    world.client("boston")
    rows, result = world.rows("masked"), world.result("masked")
    assert [row["round"] for row in rows] == list(range(1, ROUNDS + 1)) and result["status"] == "completed"
    assert not any(row["abandoned"] for row in rows) and all(row["replies"] >= 4 for row in rows)
    by_adversary = {row["adversary"]: row["epsilon"] for row in result["privacy"]}
    assert 0 < by_adversary["server"] == by_adversary["model"] <= 5
    # Every round that anybody saw was reserved before, also the one that the kill lost.
    paid = reservations(world.population(), "masked")
    assert {number for _, number in paid} == set(range(1, ROUNDS + 1)) and len(
        {name for name, _ in paid}
    ) == 2
    for ledger in world.own_ledgers("client-"):
        spent = epsilon_of(ledger)
        assert verify(ledger).ok and spent is not None and 0 < spent[0] <= 80
        assert {number for _, number in reservations(ledger, "masked")} <= set(range(1, ROUNDS + 1))


def test_sigterm_ends_a_run_in_order_and_the_folder_continues_it(world: World) -> None:
    server = world.server("privacy=client_central", *CENTRAL, f"num_rounds={ROUNDS}", "run=central")
    world.reached("central", 1, server)
    assert server.kill(signal.SIGTERM) == 130
    assert "the same command goes on from here" in server.said
    done = world.result("central")["rounds_completed"]
    assert 1 <= done < ROUNDS
    paid = reservations(world.population(), "central")
    assert len(paid) == done  # nothing was lost
    again = world.start("server", world.folder)
    assert again.wait() == 0, again.said
    assert [row["round"] for row in world.rows("central")] == list(range(1, ROUNDS + 1))
    third = world.start("server", world.folder, *COMMON, "privacy=client_central", *CENTRAL, "run=central")
    assert third.wait() == 2 and "was started with another num_rounds" in third.said


def test_coins_of_canary_clients_outlive_the_server(world: World) -> None:
    folder, asked = world.folder / "runs" / "audited", ("privacy=client_central", *AUDITED, "run=audited")
    asked = (*asked, f"num_rounds={ROUNDS}", "audit=full", "audit.canaries=100", "audit.looks=1")
    server = world.server(*asked)
    world.reached("audited", 2, server)
    server.kill()
    assert "opened" not in json.loads((folder / "audit.json").read_text())
    server = world.server(*asked)
    assert server.wait() == 0, server.said
    assert "5 clients and 100 canaries" in server.said

    fields = json.loads((folder / "audit.json").read_text())
    seed = bytes.fromhex(fields["opened"]["seed"])
    coins = coins_of(seed, 100)
    assert fields["commitment"] == commitment(seed, coins) and not (folder / "audit.key").exists()
    told = [
        (entry.kind, json.loads(entry.payload).get("commitment"))
        for entry in read_entries(world.population())
        if entry.kind in ("note", "reserve") and json.loads(entry.key)[0].startswith("audited@")
    ]
    assert [kind for kind, _ in told[:2]] == ["note", "reserve"]
    assert [said for _, said in told if said] == [fields["commitment"]] * 2  # each process says it anew

    rows = world.rows("audited")
    assert [(row["round"], row["invited"], row["replies"]) for row in rows] == [
        (number, 5, 5) for number in range(1, ROUNDS + 1)
    ]
    kept = round_rows.read(folder / "audit.npy", 100)[:ROUNDS]
    assert kept["taken"].all() and kept["clients"].tolist() == [5] * ROUNDS
    audit = world.result("audited")["audit"]
    assert (audit["canaries"], audit["alarms"]) == (100, []) and audit["measured"] is not None
    assert 0 < audit["claimed"] <= 10 and audit["final_model"] is None  # canaries move no model
    weighed = world.start("audit", folder)
    assert weighed.wait() in (0, 4) and "100 canary clients" in weighed.said


def test_client_with_a_spent_cap_says_so_and_the_others_go_on(world: World) -> None:
    world.cap("boston", 0.5)
    asked = ("privacy=client_central", *CAPPED, "num_rounds=2", "run=capped", "link.clients=1")
    server = world.server(*asked)
    assert server.wait() == 0, server.said
    assert [(row["replies"], row["dropped"]) for row in world.rows("capped")] == [
        (4, {"budget spent": 1})
    ] * 2
    (path,) = (world.hearts / "clients" / "boston" / "state" / "ledgers").glob("client-*.ledger")
    assert not reservations(path, "capped")


def test_records_are_protected_by_noise_that_each_client_plans(world: World) -> None:
    world.cap("boston", 30)  # its records have spent more than 0.5 by sums of whole clients
    server = world.server(
        "privacy.target_epsilon=40", "num_rounds=2", "run=records", "link.clients=1", "link.deadline=60"
    )
    assert server.wait() == 0, server.said
    rows = world.rows("records")
    assert [row["replies"] for row in rows] == [5, 5]
    assert {row["epsilon_record"] for row in rows} == {None}
    assert {row["epsilon"] for row in world.result("records")["privacy"]} == {40.0}
    ledgers = [path for path in world.own_ledgers("") if not path.name.startswith("client-")]
    spent = [epsilon_of(path) for path in ledgers]
    assert len(spent) == 5 and all(each is not None and 0 < each[0] <= 40 for each in spent)
    boston = epsilon_of(next(path for path in ledgers if "boston" in str(path)))
    assert boston is not None and boston[0] <= 30  # its owner's cap


def test_records_of_all_clients_are_hidden_in_one_masked_sum(world: World) -> None:
    asked = (
        "privacy=record_distributed",
        "privacy.records=1437",
        "privacy.most_records=4000",
        "run=together",
    )
    asked = (
        *asked,
        "privacy.noise_multiplier=2",
        "privacy.target_epsilon=60",
        "num_rounds=3",
        "batch_size=10",
    )
    before = {path: epsilon_of(path) for path in world.own_ledgers("") if "client-" not in path.name}
    server = world.server(*asked, "link.clients=1", "link.deadline=60")
    assert server.wait() == 0, server.said
    rows = world.rows("together")
    assert [(row["replies"], row["dropped"]) for row in rows] == [
        (4, {"budget spent": 1})
    ] * 3  # boston's cap
    for row in world.result("together")["privacy"]:
        assert row["unit"] == "record" and row["epsilon"] == pytest.approx(
            rows[-1]["epsilon_record"], rel=1e-3
        )
    charged = [path for path in before if reservations(path, "together")]
    assert len(charged) == 4 and not any("boston" in str(path) for path in charged)
    for path in charged:
        now, then = epsilon_of(path), before[path]
        assert now is not None and then is not None and then[0] < now[0] <= 60
        events = [json.loads(each.payload)["events"] for each in read_entries(path) if each.kind == "reserve"]
        assert events[-1]["server"]["kind"] == "PoissonSampled"
        assert events[-1]["server"]["sampling_probability"] == 0.1


def test_each_client_has_its_model_after_a_run(world: World) -> None:
    world.clients["longbeach"].kill(signal.SIGTERM)
    world.clients["longbeach"] = world.start(
        "client", "start", "--once", world.hearts / "clients" / "longbeach"
    )
    server = world.server("privacy.target_epsilon=45", "num_rounds=2", "run=over", "link.clients=1")
    assert server.wait() == 0, server.said
    model = (world.folder / "runs" / "over" / "model.safetensors").read_bytes()
    for name in world.clients:
        state = world.hearts / "clients" / name / "state"
        assert load(model).keys() == load_file(state / "model.safetensors").keys()
        assert all((load_file(state / "model.safetensors")[k] == v).all() for k, v in load(model).items())
    assert world.clients["longbeach"].wait() == 0
    status = world.start("client", "status", world.hearts / "clients" / "cleveland")
    assert status.wait() == 0
    path = world.hearts / "clients" / "cleveland" / "state" / "model.safetensors"
    assert f"run over is over (completed after 2 rounds); its model: {path}" in status.said.splitlines()
    world.clients["cleveland"].kill(signal.SIGKILL)
    told = world.start("client", "status", world.hearts / "clients" / "cleveland", "--json")
    assert told.wait() == 1 and json.loads(told.said)["ended"]["run"] == "over"
    for name in ("cleveland", "longbeach"):
        world.client(name)


def test_running_server_takes_revocations_newcomers_and_certificates(world: World) -> None:
    asked = ("privacy=client_central", LOOSE, "privacy.target_epsilon=14", "num_rounds=2000", "run=changing")
    server = world.server(*asked)
    world.reached("changing", 1, server)
    revoke(world.hearts, ["hungary"])
    rotate(world.hearts, ["server"], None)
    until(lambda: world.rows("changing")[-1]["invited"] == 4, lambda: server.said)
    until(lambda: "turns this device away" in world.health("hungary"), lambda: world.health("hungary"))
    world.clients["cleveland"].kill(signal.SIGTERM)
    world.client("cleveland")
    listed = (world.hearts / "authority" / "federation.yaml").read_text()
    (world.hearts / "next.yaml").write_text(listed.replace("hungary", "basel"))
    provision(world.hearts / "next.yaml", world.hearts, None)
    world.client("basel")

    def whole() -> bool:
        last = world.rows("changing")[-1]  # boston's cap may be spent by now
        return last["invited"] == 5 == last["replies"] + last["dropped"].get("budget spent", 0)

    until(whole, lambda: str(world.rows("changing")[-1]))
    assert "connected" in world.health("basel")
    port = int(read_server_bundle(world.folder).listen.rpartition(":")[2])
    shown = ssl.get_server_certificate(("127.0.0.1", port))
    assert shown == (world.folder / "tls.pem").read_text()
    assert server.kill(signal.SIGTERM) == 130, server.said
    assert not any(row["abandoned"] for row in world.rows("changing"))


@pytest.mark.campaign
def test_client_on_flowers_link_gets_the_end_as_well(tmp_path: Path) -> None:
    with SERVED["serving"](World, tmp_path, "flower") as world:
        asked = ("privacy.target_epsilon=3", "num_rounds=1", "run=flower", "link.clients=1")
        server = world.server(*asked, "link.deadline=60")
        assert server.wait() == 0, server.said
        told = [
            json.loads((world.hearts / "clients" / name / "state" / "ended.json").read_text())
            for name in world.clients
        ]
        assert {(each["run"], each["status"], each["model"]) for each in told} == {
            ("flower", "completed", "model.safetensors")
        }


@pytest.mark.campaign
@pytest.mark.parametrize("link", ["grpc", "flower"])
def test_device_trains_in_one_arm_also_after_a_kill_of_the_server(tmp_path: Path, link: str) -> None:
    with SERVED["serving"](World, tmp_path, link) as world:
        tune = ("tune=learning_rate", "tune.values=[0.1,1]", "tune.rounds=3", "num_rounds=5", "run=arms")
        asked = ("privacy=client_central", LOOSE, "privacy.target_epsilon=8", "link.clients=1", *tune)
        server = world.server(*asked, "link.deadline=60")
        until(lambda: world.rows("arms") or not server.alive)
        while not server.alive and "has 0 clients" in server.said:  # of five clients, one deal in sixteen
            server = world.server(*asked, "link.deadline=60")
            until(lambda server=server: world.rows("arms") or not server.alive)
        world.reached("arms", 2, server)
        server.kill()
        server = world.server(*asked, "link.deadline=60")
        assert server.wait() == 0, server.said
        result, rows = world.result("arms"), world.rows("arms")
        assert [row.get("arm") for row in rows] == [1, 2, 1, 2, 1, 2, None, None]
        assert sum(row["invited"] for row in rows[:2]) == 5 == rows[7]["invited"]
        assert all(row["replies"] == row["invited"] and not row["abandoned"] for row in rows)
        told = [json.loads(e.payload) for e in read_entries(world.population()) if e.kind == "reserve"]
        deals = {each["arm"]["deal"] for each in told if "arm" in each}
        assert deals == {result["tuning"]["deal"]} and verify(world.population()).ok
        assert result["privacy"][2]["epsilon"] <= 8
        deal = ArmDeal(deals.pop(), 2)
        for name in world.clients:
            state = world.hearts / "clients" / name / "state"
            assert json.loads((state / "deals.json").read_text()) == {
                "arms": [deal.key, 2, deal.arm_of(name)]
            }
            (own,) = (state / "ledgers").glob("client-*.ledger")
            taken = {number for _, number in reservations(own, "arms")}
            of_arm = {number for number in range(1, 7) if (number - 1) % 2 + 1 == deal.arm_of(name)}
            assert taken == of_arm | {7, 8}
