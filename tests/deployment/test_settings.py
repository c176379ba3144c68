"""The configuration of a server: the groups of a simulation, a link, and nothing that is simulated."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

import fedveil.configs
from fedveil.audit.settings import LightAudit
from fedveil.base.refusal import Refusal
from fedveil.configs.privacy_settings import ClientCentral, Record
from fedveil.configs.settings import differing
from fedveil.deployment.settings import LinkSettings, server_settings

FOLDER = Path(fedveil.configs.__file__).parent


def test_the_defaults_are_a_few_hospitals_under_record_level_privacy() -> None:
    settings = server_settings(["task=heart"])
    assert (settings.run, settings.metrics_port) == ("run-1", None)
    assert isinstance(settings.federation.privacy, Record)
    assert settings.federation.cohort.name == "all"
    assert (settings.federation.seed, settings.federation.resume) == (None, None)
    assert settings.federation.audit_group == LightAudit()
    assert settings.link == LinkSettings(name="grpc", quorum=0.5)


@pytest.mark.parametrize("file", [*FOLDER.glob("link/*.yaml"), FOLDER / "server.yaml"], ids=lambda f: f.name)
def test_every_file_opens_with_a_command_that_it_reads(file: Path) -> None:
    command = shlex.split(file.read_text().splitlines()[0].removeprefix("# "))
    assert command[:3] == ["fedveil", "server", "FOLDER"]
    rest = [*command[3:], *([] if "task=heart" in command else ["task=heart"])]
    link = server_settings(rest).link.name
    assert file.stem == "server" or link == file.stem


@pytest.mark.parametrize(
    ("given", "quorum"),
    [
        (["privacy=record", "cohort=poisson"], 0.5),
        (["privacy=client_central"], 0.5),
        (["privacy=client_central", "cohort=poisson"], 0.0),
        (["privacy=record_and_client", "cohort=poisson"], 0.0),
        (["privacy=client_central", "cohort=poisson", "link.quorum=0.3"], 0.3),
        (["privacy=client_distributed"], 0.0),
    ],
)
def test_a_quorum_is_the_default_where_it_gives_no_claim_away(given: list[str], quorum: float) -> None:
    assert server_settings(["task=digits", *given]).link.quorum == quorum


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ([], "task=None: say what is to be learned"),
        (["task=heart", "privacy=record_distributed"], "privacy.records=None: give the approximate number"),
        (["task=heart", "privacy=record_distributed"], "privacy.most_records=None: give an upper bound"),
        (["task=heart", "engine=ray"], "engine='ray': is a simulation's"),
        (["task=heart", "seed=1"], "seed='1': is a simulation's"),
        (["task=heart", "resume=runs/x"], "resume='runs/x': is a simulation's"),
        (["-m", "task=heart", "num_rounds=1,2"], "serves one run at a time"),
        (
            ["task=heart", "privacy=client_distributed", "audit=full"],
            "audit.name='full': a canary client needs keys in the roster",
        ),
        (
            ["task=heart", "privacy=record_distributed", "audit=full"],
            "audit.name='full': the server opens the sum in which canary records are scored",
        ),
        (["task=heart", "audit=full"], "audit.name='full': its canary clients test a client-level claim"),
        (["task=heart", "link=carrier"], "link='carrier': there is no such option"),
        (["task=heart", "link.deadlin=1"], "did you mean 'link.deadline'"),
        (["task=heart", "link.deadline=0"], "link.deadline=0: must be above 0"),
        (["task=heart", "link.enough=1.5"], "link.enough=1.5: must be above 0 and at most 1"),
        (
            ["task=heart", "cohort=poisson", "cohort.over_selection=0.5"],
            "cohort.over_selection=0.5: must be at least 1",
        ),
        (["task=heart", "link.patience=0"], "link.patience=0"),
        (["task=heart", "link.clients=3"], "link.clients=3: must be at least 0 and at most 1"),
        (["task=heart", "run=../../etc"], "run='../../etc': must be a name"),
        (["task=heart", "run=null"], "run=None: must be a name"),
        (["task=heart", "metrics_port=80"], "metrics_port=80"),
        (["task=heart", "metrics_address=here"], "metrics_address='here'"),
        (["task=heart", "privacy=client_distributed", "link.quorum=0.5"], "secagg.dropout says how many"),
        (
            ["task=heart", "privacy=client_central", "privacy.noise_schedule=adaptive"],
            "privacy.noise_schedule='adaptive': a client's own ledger",
        ),
        (
            ["task=heart", "privacy.noise_multiplier=1"],
            "privacy.noise_multiplier=1: each client plans its own",
        ),
        (
            ["task=heart", "privacy=record_and_client", "privacy.client.noise=correlated"],
            "privacy.client.noise='correlated': a client's own ledger",
        ),
    ],
)
def test_mistakes_are_refused_in_a_sentence(given: list[str], sentence: str) -> None:
    with pytest.raises(Refusal) as refused:
        server_settings(given)
    assert sentence in str(refused.value)


def test_a_number_stays_a_number() -> None:
    with pytest.raises(Refusal, match=r"link\.deadline='9'"):
        server_settings(["task=heart", "link.deadline='9'"])
    assert isinstance(
        server_settings(["task=heart", "privacy=client_central"]).federation.privacy, ClientCentral
    )


@pytest.mark.parametrize(
    ("now", "key"), [("a: 1", None), ("a: 2", "a"), ("b: {c: 1}", "a"), ("a: 1\nb: {c: 3}", "b")]
)
def test_differing_configurations_are_named(now: str, key: str | None) -> None:
    found: dict[str, Any] = yaml.safe_load(now)
    assert differing({"a": 1}, found) == key
    assert differing({"x": {"y": {"z": 1}}}, {"x": {"y": {"z": 2}}}) == "x.y.z"
