"""Evaluations of a served run, with a server and five clients as processes: a client and the server are killed on the way."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from shared.runs import json_lines

from fedveil.deployment.device.device_ledger import questions_of
from fedveil.evidence.binding.bound_folder import Knowledge
from fedveil.evidence.binding.verify import verify_folder
from fedveil.privacy.ledger.ledger import verify

SERVED = runpy.run_path(str(Path(__file__).parents[1] / "faults" / "served.py"))
ROUNDS = 6
COMMON = (
    "task=digits",
    "accept_vacuous=true",
    "privacy.allow_large_delta=true",
    "privacy.target_epsilon=12",
    "evaluate.clients=every:2",
    "link.clients=0.8",
    "link.wait=60",
    "link.deadline=20",
    "link.enough=0.8",
    "run=asked",
)

PRIVACY = ("client_central", "client_distributed")


@pytest.mark.parametrize("privacy", PRIVACY)
def test_a_federation_of_the_campaign_is_provisioned_and_begins(tmp_path: Path, privacy: str) -> None:
    asked = [*COMMON, f"privacy={privacy}", f"num_rounds={ROUNDS}"]
    SERVED["begins"](SERVED["make_federation"](tmp_path, link="flower"), asked)


@pytest.mark.campaign
@pytest.mark.parametrize("privacy", PRIVACY)
@pytest.mark.parametrize("link", ["grpc", "flower"])
def test_a_served_run_is_evaluated_over_kills(tmp_path: Path, link: str, privacy: str) -> None:
    with SERVED["serving"](SERVED["Served"], tmp_path, link) as world:
        folder = world.hearts / "server"
        asked = (*COMMON, f"privacy={privacy}", f"num_rounds={ROUNDS}")
        lines = folder / "runs" / "asked" / "metrics.jsonl"

        def rows() -> list[dict[str, Any]]:
            return json_lines(lines) if lines.exists() else []

        server = world.start("server", folder, *asked)
        SERVED["until"](lambda: len(rows()) >= 2 or not server.alive, lambda: server.said)
        server.kill()
        world.clients["boston"].kill()
        server = world.start("server", folder, *asked)
        assert server.wait() == 0, server.said
        result = json.loads((folder / "runs" / "asked" / "result.json").read_text())
        assert [each["round"] for each in result["evaluations"]] == [2, 4, 6]
        for each in result["evaluations"]:
            assert [part["name"] for part in each["answers"]][:3] == ["accuracy", "loss", "clients"], each
            assert each["clients"] in ((5,) if privacy == "client_central" else (4, 5))
        (ledger,) = (folder / "ledgers").glob("*.ledger")
        assert (
            verify(ledger).ok and 3 <= len(questions_of(ledger)) <= 4
        )  # one more where the kill lost a round
        told = [line for line in verify_folder(folder / "runs" / "asked", Knowledge()) if line.ok is False]
        assert not told
        own = sorted((world.hearts / "clients").glob("*/state/ledgers/client-*.ledger"))
        counts = [len(questions_of(path)) for path in own]
        assert len(own) == 5 and sorted(counts)[2] >= 3, counts  # the last is not always needed
