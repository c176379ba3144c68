"""The federation of compose.yaml: what the specification and the project ask of it, and its board of numbers.

The schema is that of compose-spec/compose-spec, commit 170098ba07d9, Apache-2.0. The campaign starts everything but Grafana
by podman-compose. Images that cannot be fetched are named by PYTHON_IMAGE and PROMETHEUS_IMAGE, what their build needs by
PODMAN_BUILD_ARGS.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from fedveil.deployment.prometheus import text_of
from fedveil.deployment.serve import settings_for
from fedveil.deployment.watch import rounds_of
from fedveil.links.server_bundle import read_server_bundle

ROOT = Path(__file__).parents[2]
CONTAINERS = ROOT / "containers"
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
HOSPITALS = ("cleveland", "hungary", "va-long-beach")
OURS = ("desk", "server", *HOSPITALS)
BOARD = json.loads((CONTAINERS / "grafana" / "federation.json").read_text())
EXPRESSIONS = [each["expr"] for panel in BOARD["panels"] for each in panel["targets"]]
SUMS = {"fedveil_invited_total", "fedveil_replies_total"}  # the board shows those of each round
# Numbers of a run in which nothing fails have no series here.
OF_FAULTS = ("fedveil_dropped_total", "fedveil_audit_alarms_total")
ROW = {
    "round": 1,
    "invited": 3,
    "replies": 2,
    "dropped": {"late": 1},
    "abandoned": False,
    "epsilon_record": 1.0,
}
STATUS = {
    **rounds_of([ROW]),
    "state": "training",
    "num_rounds": 2,
    "figures": {"accuracy": 0.5},
    "round_seconds": 0.5,
    "bytes": {"up": {"training": 9}},
    "turned_away": {"unreadable": 1},
    "clients": [],
    "privacy": [{"unit": "record", "spent": 1.0, "target": 2.0}],
    "audit": {"p_values": {"norm": 1.0}, "alarms": [{"level": "alarm", "test": "norm"}]},
}


# --- the file ---------------------------------------------------------------------------------------------------


def test_compose_follows_the_specification() -> None:
    schema = json.loads((ROOT / "tests" / "fixtures" / "compose-spec.json").read_text())
    specification: Any = jsonschema.Draft7Validator(schema)
    specification.validate(COMPOSE)
    assert not specification.is_valid({"services": {"desk": {**SERVICES["desk"], "read-only": True}}})


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_has_no_rights_and_no_secret(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] and service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert int(service["user"].split(":")[0]) > 0
    assert not [
        key for key in service.get("environment", {}) if re.search("PASSWORD|SECRET_|TOKEN|_KEY", key)
    ]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    assert re.search(r":v?\d+\.\d+\.\d+\}?$", service["image"])
    assert not [each for each in service.get("volumes", ()) if each.startswith(".") and ":ro" not in each]


def test_hospitals_reach_the_server_alone_and_only_their_volume() -> None:
    for name in HOSPITALS:
        assert SERVICES[name]["networks"] == ["federation"] and SERVICES[name]["volumes"] == [
            f"{name}:/bundle"
        ]
    assert COMPOSE["networks"]["federation"] == {"internal": True}
    assert SERVICES["desk"]["network_mode"] == "none" and "networks" not in SERVICES["desk"]
    assert (
        SERVICES["server"]["network_mode"] == "service:prometheus"
    )  # whose numbers are on its loopback address
    assert "--web.listen-address=board:9090" in SERVICES["prometheus"]["command"]


def test_services_restart_and_none_depends_on_the_desk() -> None:
    assert {each["restart"] for each in SERVICES.values()} == {"on-failure"}
    assert not [name for name, each in SERVICES.items() if "desk" in each.get("depends_on", ())]
    for name in ("server", *HOSPITALS):
        role = "server" if name == "server" else "client"
        assert SERVICES[name]["healthcheck"]["test"] == [
            "CMD",
            "fedveil",
            role,
            "status",
            "/bundle",
            "--probe",
        ]


def test_the_desk_gives_bundles_that_the_commands_take(tmp_path: Path) -> None:
    """The desk's script, with folders in place of volumes; the server's command is read, and not begun."""
    (tmp_path / "desk").mkdir()
    for name in OURS[1:]:
        (tmp_path / "bundles" / name).mkdir(parents=True, mode=0o700)
    given = [
        ROOT / "examples" / "hospitals" / "make_hospitals.py",
        ROOT / "examples" / "hospitals" / "schema.yaml",
    ]
    given += [CONTAINERS / "hospitals.yaml"]
    (tmp_path / "hospitals").mkdir()
    for path in given:
        shutil.copy(path, tmp_path / "hospitals")
    script = (CONTAINERS / "desk.sh").read_text()
    script = re.sub(r"(?<=[ \"])/(?=(desk|bundles|hospitals)\b)", f"{tmp_path}/", script)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for shown in ("admitted", "the bundles are in their volumes"):  # a second start does nothing
        done = subprocess.run(
            ["sh", "-c", script], capture_output=True, text=True, env=environment, check=False
        )
        assert done.returncode == 0 and shown in done.stdout, done.stdout + done.stderr
    assert sorted(path.name for path in (tmp_path / "desk" / "hearts").iterdir()) == ["authority"]
    for name in HOSPITALS:
        assert (tmp_path / "bundles" / name / "table.csv").stat().st_mode & 0o777 == 0o600
    server = tmp_path / "bundles" / "server"
    verb, _, *overrides = SERVICES["server"]["command"]
    overrides = [each.replace("/bundle/", f"{server}/") for each in overrides]
    settings = settings_for(read_server_bundle(server), overrides)
    assert verb == "server" and settings.secagg is not None and settings.metrics_port == 9464
    rows = [
        len((tmp_path / "bundles" / name / "table.csv").read_text().splitlines()) - 1 for name in HOSPITALS
    ]
    privacy: Any = settings.privacy
    assert max(rows) <= privacy.most_records and abs(sum(rows) - privacy.records) < 50


# --- the board --------------------------------------------------------------------------------------------------


def test_the_board_shows_the_numbers_of_a_server_and_no_other() -> None:
    exported = set(re.findall(r"^(fedveil_\w+?)(?:_created)?[ {]", text_of(STATUS), re.MULTILINE))
    assert exported - SUMS == {name for each in EXPRESSIONS for name in re.findall(r"fedveil_\w+", each)}


def test_labels_of_the_board_are_those_of_the_numbers() -> None:
    text = text_of(STATUS)
    for panel in BOARD["panels"]:
        for each in panel["targets"]:
            (name, *_) = re.findall(r"fedveil_\w+", each["expr"])
            (labels,) = re.findall(rf"^{name}(?:{{(.*)}})? [\d.]+$", text, re.MULTILINE)
            assert set(re.findall(r"{{(\w+)}}", each["legendFormat"])) == set(re.findall(r'(\w+)="', labels))
            assert '{instance="$instance"}' in each["expr"]


# --- started ----------------------------------------------------------------------------------------------------


def podman(*command: str, check: bool = True) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def started() -> Iterator[None]:
    if shutil.which("podman-compose") is None:
        pytest.skip("podman-compose is not installed")
    podman("podman-compose", "down", "-v", check=False)
    needs = os.environ.get("PODMAN_BUILD_ARGS", "")
    podman("podman-compose", f"--podman-build-args={needs}", "up", "-d", "--build", *OURS, "prometheus")
    yield
    podman("podman-compose", "down", "-v", check=False)


def until(what: Any, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.5)


def rounds() -> int:
    lines = podman(
        "podman", "exec", "hearts_server_1", "cat", "/bundle/runs/run-1/metrics.jsonl", check=False
    )
    return lines.count("\n")


@pytest.mark.campaign
@pytest.mark.usefixtures("started")
def test_a_killed_server_of_compose_ends_its_masked_run(tmp_path: Path) -> None:
    until(lambda: rounds() >= 5)
    assert podman("podman", "healthcheck", "run", "hearts_server_1") == ""
    os.kill(int(podman("podman", "inspect", "-f", "{{.State.Pid}}", "hearts_server_1")), 9)
    until(lambda: rounds() >= 15)
    assert podman("podman", "wait", "hearts_server_1").split() == ["0"]
    podman("podman", "cp", "hearts_server_1:/bundle/runs/run-1", str(tmp_path / "run-1"))
    result = json.loads((tmp_path / "run-1" / "result.json").read_text())
    assert result["status"] == "completed" and result["rounds_completed"] == 40
    for expression in EXPRESSIONS:
        names = re.findall(r"fedveil_\w+", expression)
        query = expression.replace("$instance", "127.0.0.1:9464").replace("$__range", "15m")
        if "last_over_time" not in query:
            query = f"last_over_time({query}[15m])"
        shown = podman(
            "podman",
            "exec",
            "hearts_prometheus_1",
            "promtool",
            "query",
            "instant",
            "http://board:9090",
            query,
        )
        assert shown.strip() or names[0] in OF_FAULTS, query
