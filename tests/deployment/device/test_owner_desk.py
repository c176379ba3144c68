"""Desk of an owner on the command line: what waits, in 80 columns, and decisions that reach the device."""

import json
import runpy
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from fedveil.base.refusal import Refusal
from fedveil.configs.bundle_files import read_toml_text
from fedveil.deployment.device.owner_decisions import OwnerVerdict
from fedveil.deployment.device.owner_desk import decide, read_desk
from fedveil.deployment.device.owner_policy import OwnerPolicy

APPROVALS = runpy.run_path(str(Path(__file__).parent / "test_approvals.py"))
folder, only_waiting, question = (APPROVALS[name] for name in ("folder", "only_waiting", "question"))
code_of, device_of, in_the_clear = (APPROVALS[name] for name in ("code_of", "device_of", "in_the_clear"))
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def test_pending_shows_the_terms_in_80_columns(folder: Path, commands: Any) -> None:
    device = device_of(folder)
    code_of(
        device,
        question(why="How many patients of each class does every clinic have, for the plan of the trial?"),
    )
    code, command = commands.run("client", "pending", str(folder))
    lines = command.out.splitlines()
    assert code == 0 and max(map(len, lines)) <= 80
    text = " ".join(command.out.split())
    assert (
        "question labels" in text and "for the plan of the trial?" in text and "purposes statistics" in text
    )
    assert "cost of one answer at most epsilon" in text and "counts as refused from" in text
    code, command = commands.run("client", "pending", str(folder), "--json")
    (request,) = json.loads(command.out)["requests"]
    assert request["standing"] == "waiting" and request["kind"] == "question"


def test_decisions_on_the_command_line_reach_the_device(folder: Path, commands: Any) -> None:
    device = device_of(folder)
    code_of(device, in_the_clear())
    request = only_waiting(folder)
    assert commands.run("client", "approve", str(folder), request)[0] == 2  # no reason
    code, command = commands.run("client", "approve", str(folder), "0" * 12, "--reason", "vote 17")
    assert code == 2 and "is no request of this device" in command.err
    code, command = commands.run("client", "approve", str(folder), request, "--reason", "vote 17")
    assert code == 0 and "run spring approved by" in command.out and "on the ledger" in command.out
    assert code_of(device, in_the_clear()) == 0
    for words in (("pause",), ("resume",), ("stop", "spring")):
        name, *subject = words
        assert commands.run("client", name, str(folder), *subject, "--reason", "audit")[0] == 0
    code, command = commands.run("ledger", "show", str(device.ledger.path))
    said = " ".join(command.out.split())
    assert "run spring stopped: audit" in said and "run spring approved: vote 17" in said


def test_policy_names_a_time_of_minutes_hours_or_days() -> None:
    assert OwnerPolicy.__dataclass_fields__["approve_within"].default == "24h"
    for text in ("0h", "24", "1w", "-1h", ""):
        with pytest.raises(Refusal, match="approve_within"):
            replace_time(text)
    assert replace_time("90m").patience == timedelta(minutes=90)
    assert replace_time("7d").patience == timedelta(days=7)


def replace_time(text: str) -> OwnerPolicy:
    required = {
        "target_epsilon": 8.0,
        "target_delta": 1e-5,
        "runs": [],
        "trust_server": "false",
        "minimum_cohort": 3,
        "collusion": 0.1,
        "dropout": 0.4,
        "maximum_clipping_norm": 2.0,
        "minimum_noise_multiplier": 1.0,
        "profile": '"malicious"',
        "maximum_local_epochs": 10,
        "authority": f'"{"ab" * 32}"',
        "minimum_roster_version": 1,
        "approve_within": f'"{text}"',
    }
    lines = "\n".join(f"{key} = {value}" for key, value in required.items())
    return read_toml_text(OwnerPolicy, lines.encode(), "policy.toml")


def test_reason_is_one_line_of_text(folder: Path) -> None:
    for reason in ("", "a\nb", "x" * 501):
        with pytest.raises(Refusal, match="reason"):
            decide(folder, OwnerVerdict.PAUSED, "", reason)
    assert not read_desk(folder).decisions
