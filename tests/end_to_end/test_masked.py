"""Encrypted sums in whole runs: `fedveil simulate` with clients that vanish, in workers, killed, and with other units."""

import json
import os
import runpy
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from shared.runs import json_lines, run_quietly

import fedveil.run.run  # noqa: F401 (before any fork, so that children need not import it)
from fedveil.base.refusal import Refusal
from fedveil.configs.settings import settings_from_overrides
from fedveil.evidence.binding.bound_folder import Knowledge
from fedveil.evidence.binding.verify import verify_folder
from fedveil.messages.wire import Exchange
from fedveil.privacy.ledger.ledger import read_entries
from fedveil.privacy.secagg.client import Participant
from fedveil.privacy.secagg.refusal import Fault
from fedveil.privacy.secagg.server import ServerAttempt
from fedveil.server.secure_sum import Attempt
from fedveil.simulations.simulate import simulate
from fedveil.strategies.identity import FIRST_NODE, Identity

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm")

CHEATING = runpy.run_path(str(Path(__file__).parents[1] / "faults" / "cheating_device.py"))["cheating"]
ROUNDS = 3
COMMON = ("task=digits", "task.num_clients=12", "cohort=all", f"num_rounds={ROUNDS}", "local_epochs=1")
MASKED = (*COMMON, "privacy=client_distributed", "privacy.allow_large_delta=true")


def run(folder: Path, *overrides: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    outcome = run_quietly(overrides, folder)
    rows = json_lines(folder / "metrics.jsonl")
    return outcome.result, rows


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happens to."""
    folder = tmp_path_factory.mktemp("calm") / "run"
    run(folder, *MASKED)
    return folder


def model(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_server_has_the_promise_of_everybody(calm: Path) -> None:
    result = json.loads((calm / "result.json").read_text())
    assert result["status"] == "completed" and result["dropped"] == {}
    rows = {row["adversary"]: row for row in result["privacy"]}
    assert set(rows) == {"server", "clients", "model"}
    assert {row["epsilon"] for row in rows.values()} == {rows["server"]["epsilon"]}
    assert 2.9 < rows["server"]["epsilon"] <= 3
    assert result["secagg"]["minimum_survivors"] == 8 and result["secagg"]["profile"] == "malicious"


def test_a_draw_that_the_server_sees_amplifies_nothing(tmp_path: Path) -> None:
    result, _ = run(tmp_path, *MASKED, "cohort=poisson", "cohort.rate=0.8", "num_rounds=2")
    assert {row["sampling"] for row in result["privacy"]} == {"none: the server sees who takes part"}
    assert result["noise_multiplier"] > 1.5  # what two releases of the Gaussian mechanism need


def test_clients_that_vanish_at_any_stage_cost_a_place_and_no_promise(tmp_path: Path) -> None:
    result, rows = run(tmp_path, *MASKED, "faults.dropout=0.2", "seed=1")
    assert result["status"] == "completed" and sum(result["dropped"].values()) > 0
    assert all(row["replies"] in (0, *range(8, 13)) for row in rows)
    assert {row["adversary"] for row in result["privacy"] if row["epsilon"] <= 3} == {
        "server",
        "clients",
        "model",
    }


def test_a_round_with_too_few_releases_nothing_and_stays_charged(tmp_path: Path) -> None:
    result, rows = run(tmp_path, *MASKED, "faults.dropout=0.9")
    assert result["status"] == "failed" and all(row["replies"] == 0 for row in rows)
    assert sum(entry.kind == "reserve" for entry in read_entries(tmp_path / "ledger")) == ROUNDS
    assert sum(entry.kind == "commit" for entry in read_entries(tmp_path / "ledger")) == 0
    before = load_file(tmp_path / "model.safetensors")
    run(tmp_path / "other", *MASKED, "faults.dropout=0.9", "num_rounds=1")
    after = load_file(tmp_path / "other" / "model.safetensors")
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_cheat_is_named_in_every_report_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: Any
) -> None:
    true = Identity.participant

    def participant(identity: Identity) -> Participant:
        return CHEATING(identity, "garbage seals") if identity.node == FIRST_NODE + 3 else true(identity)

    monkeypatch.setattr(Identity, "participant", participant)
    settings = settings_from_overrides([*MASKED, "num_rounds=2"])
    result = simulate(settings, tmp_path).result
    fault = str(Fault.BAD_DEAL)
    assert result["blamed"] == {"simulated client 3": [fault, fault]}
    rows = json_lines(tmp_path / "metrics.jsonl")
    assert [row["blamed"] for row in rows] == [{"simulated client 3": fault}] * 2
    assert [row["replies"] for row in rows] == [11, 11]
    said = [record.getMessage() for record in caplog.records if record.name == "fedveil.server"]
    assert said == [
        f"simulated client 3 {fault}",
        f"simulated client 3 {fault} (2 rounds): revoke it with fedveil provision revoke simulated client 3",
    ]
    assert f"simulated client 3 {fault}" in capsys.readouterr().out
    assert _blame(tmp_path) == (True, "2 faults are proved by what members signed")
    rows[0]["blamed"], result["blamed"] = {"simulated client 4": fault}, {"simulated client 3": [fault]}
    result["blamed"]["simulated client 4"] = [fault]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "result.json").write_text(json.dumps(result))
    good, why = _blame(tmp_path)
    assert good is False and "says round 1, and nothing in blame.jsonl proves it" in why
    lines = (tmp_path / "blame.jsonl").read_text()
    (tmp_path / "blame.jsonl").write_text(lines.replace('"round": 2', '"round": 1'))
    assert _blame(tmp_path)[0] is False  # evidence of another round
    (tmp_path / "blame.jsonl").unlink()
    assert _blame(tmp_path)[0] is False


def _blame(run: Path) -> tuple[bool | None, str]:
    (line,) = (each for each in verify_folder(run, Knowledge()) if each.name == "blame")
    return line.ok, line.finding


def test_round_abandoned_after_charges_says_whether_it_names_anybody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true, lost = Attempt.hear, range(FIRST_NODE, FIRST_NODE + 6)

    def hear(attempt: Attempt, node: int, reply: bytes, reason: str | None = None) -> None:
        gone = node in lost and attempt.position.exchange is Exchange.CONFIRMED
        true(attempt, node, reply, "no reply" if gone else reason)

    monkeypatch.setattr(Attempt, "hear", hear)
    _, rows = run(tmp_path, *MASKED, "num_rounds=1")
    assert rows[0]["abandoned"] and "no member can be named" in rows[0]["cause"]


@pytest.mark.parametrize("call", [2, 8, 13])
def test_a_run_killed_between_exchanges_goes_on_with_fresh_keys(commands: Any, calm: Path, call: int) -> None:
    def arrange() -> None:
        calls, true = 0, ServerAttempt.advance

        def deadly(attempt: ServerAttempt, *given: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return true(attempt, *given)

        ServerAttempt.advance = deadly  # type: ignore[method-assign]

    folder = commands.folder / "run"
    code, _ = commands.run("simulate", *MASKED, f"hydra.run.dir={folder}", first=arrange)
    assert code == -signal.SIGKILL
    result, rows = run(folder, f"resume={folder}")
    assert result["status"] == "completed" and len(rows) == ROUNDS
    assert model(folder) == model(calm)
    assert sum(entry.kind == "reserve" for entry in read_entries(folder / "ledger")) == ROUNDS


@pytest.mark.parametrize(
    "privacy",
    [("privacy=none",), ("privacy=record", "privacy.noise_multiplier=1", "privacy.target_epsilon=null")],
)
def test_encryption_alone_sums_as_in_the_clear(tmp_path: Path, privacy: tuple[str, ...]) -> None:
    result, _ = run(tmp_path / "masked", *COMMON, *privacy, "secagg=masked")
    run(tmp_path / "clear", *COMMON, *privacy)
    masked, clear = (load_file(tmp_path / name / "model.safetensors") for name in ("masked", "clear"))
    for name, value in clear.items():
        assert masked[name] == pytest.approx(value, abs=1e-3)
    assert "has no epsilon" in result["secagg"]["promise"]


@pytest.mark.parametrize("how", ["secagg.suite=2", "secagg.suite=3", "secagg.suite=4", "engine.workers=2"])
def test_other_suites_and_stateful_workers_give_the_same_model(calm: Path, tmp_path: Path, how: str) -> None:
    run(tmp_path / "run", *MASKED, how)
    assert model(tmp_path / "run") == model(calm)


@pytest.mark.parametrize("strategy", ["fedadam", "fedavgm", "fedyogi"])
def test_every_strategy_that_averages_goes_on_after_an_empty_round(tmp_path: Path, strategy: str) -> None:
    result, rows = run(tmp_path, *MASKED, f"strategy={strategy}", "faults.dropout=0.35", "seed=4")
    assert result["status"] == "completed"
    assert min(row["replies"] for row in rows) == 0 < max(row["replies"] for row in rows)


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (("privacy=client_distributed", "secagg=none"), "secagg.name"),
        (("privacy=client_central", "secagg=masked"), "secagg.name"),
        (("privacy=client_distributed", "privacy.adjacency=add-or-remove-one"), "privacy.adjacency"),
        (("privacy=client_distributed", "cohort=min_separation"), "cohort"),
        (("privacy=client_distributed", "secagg.bits=24"), "secagg.bits"),
        (("privacy=client_distributed", "secagg.profile=naive"), "secagg.profile"),
        (("privacy=client_distributed", "secagg.suite=5"), "secagg.suite"),
        (("privacy=client_distributed", "secagg.collusion=0.99", "task.num_clients=40"), "secagg.collusion"),
        (("privacy=client_distributed", "cohort=fixed", "cohort.size=1"), "secagg.collusion"),
        (
            ("privacy=client_distributed", "cohort=fixed", "cohort.size=1", "cohort.over_selection=1"),
            "cohort",
        ),
    ],
)
def test_impossible_promise_is_refused(tmp_path: Path, overrides: tuple[str, ...], field: str) -> None:
    with pytest.raises(Refusal) as refusal:
        run(tmp_path, *overrides)
    assert refusal.value.field == field


def test_keys_precede_a_reservation_and_vectors_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[tuple[int, Exchange], int] = {}
    true = Attempt.send

    def noted(attempt: Attempt) -> None:
        reserved = sum(entry.kind == "reserve" for entry in read_entries(tmp_path / "ledger"))
        asked[attempt.position.round, attempt.position.exchange] = reserved
        true(attempt)

    monkeypatch.setattr(Attempt, "send", noted)
    _, rows = run(tmp_path, *MASKED)
    assert [row["exchanges"] for row in rows] == [6, 3, 3]
    for number in range(1, ROUNDS + 1):
        assert asked[number, Exchange.INBOX] == number
    assert asked[2, Exchange.PROPOSAL] == asked[2, Exchange.COHORT] == 1
