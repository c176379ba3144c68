"""The Helm chart: what its values refuse, what its pods may do, and what their commands and probes are."""

import json
import os
import runpy
import subprocess
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator

from fedveil.__main__ import run

ROOT = Path(__file__).parents[2]
CHART = ROOT / "containers" / "chart"
ORACLE = runpy.run_path(str(ROOT / "tests" / "oracles" / "rendered_chart.py"))
VALUES: dict[str, dict[str, Any]] = ORACLE["VALUES"]
ROLES = pytest.mark.parametrize("role", VALUES)
FEDVEIL = "/opt/fedveil/bin/fedveil"
HELM = pytest.mark.skipif(find_spec("helm_python") is None, reason="helm-python-sdk is not installed")


def objects(role: str) -> dict[str, dict[str, Any]]:
    """The rendered objects of a role, by their kind and, of a second one of the kind, its name."""
    text = (ROOT / "tests" / "fixtures" / "chart" / f"{role}.yaml").read_text()
    shared = f"five-{role}"
    return {
        each["kind"] + each["metadata"]["name"].removeprefix(shared): each for each in ORACLE["objects"](text)
    }


def pod(role: str) -> dict[str, Any]:
    return objects(role)["StatefulSet"]["spec"]["template"]["spec"]


def containers(role: str) -> list[dict[str, Any]]:
    return [*pod(role)["initContainers"], *pod(role)["containers"]]


def faults(values: Mapping[str, Any]) -> list[str]:
    """What the chart's schema refuses, of the defaults with these values over them, as Helm merges them."""

    def merged(below: Any, above: Any) -> Any:
        if not isinstance(below, dict) or not isinstance(above, dict):
            return above
        return {**below, **{key: merged(below.get(key), each) for key, each in above.items()}}

    schema = json.loads((CHART / "values.schema.json").read_text())
    Draft7Validator.check_schema(schema)
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    return [error.json_path for error in Draft7Validator(schema).iter_errors(merged(defaults, values))]


# --- rendering ------------------------------------------------------------------------------------------------------


@ROLES
def test_the_rendered_manifests_are_those_of_the_chart(role: str) -> None:
    text = (ROOT / "tests" / "fixtures" / "chart" / f"{role}.yaml").read_text()
    assert ORACLE["digest"]() in text, "run tests/oracles/rendered_chart.py"


@HELM
@ROLES
def test_helm_renders_them(role: str) -> None:
    text = (ROOT / "tests" / "fixtures" / "chart" / f"{role}.yaml").read_text()
    assert text.endswith(ORACLE["rendered"](role))


@ROLES
def test_the_schema_takes_the_values(role: str) -> None:
    assert not faults(VALUES[role])


@pytest.mark.parametrize(
    ("role", "values", "path"),
    [
        ("server", {"role": "authority"}, "$.role"),
        ("server", {"image": ""}, "$.image"),
        ("server", {"image": "registry.example.org/fedveil-server"}, "$.image"),
        ("server", {"image": "registry.example.org/fedveil-server:latest"}, "$.image"),
        ("server", {"bundle": ""}, "$.bundle"),
        ("server", {"run": []}, "$.run"),
        ("server", {"run": [3]}, "$.run[0]"),
        ("server", {"policy": "target_epsilon = 3"}, "$.policy"),
        ("server", {"port": 443}, "$.port"),
        ("server", {"replicas": 2}, "$"),
        ("server", {"storage": {"accessMode": "ReadWriteMany"}}, "$.storage.accessMode"),
        ("server", {"gracePeriod": {"server": 5}}, "$.gracePeriod.server"),
        ("client", {"run": ["task=digits"]}, "$.run"),
        ("client", {"metrics": {"port": 9464}}, "$.metrics.port"),
        ("client", {"data": {"path": "/var/lib/fedveil/bundle"}}, "$.data.path"),
        ("client", {"data": {"path": "data"}}, "$.data.path"),
        ("client", {"env": {"FEDVEIL_PASSPHRASE": "x"}}, "$.env"),
    ],
    ids=str,
)
def test_the_schema_refuses_wrong_values(role: str, values: Mapping[str, Any], path: str) -> None:
    assert path in faults({**VALUES[role], **values})


# --- pods -----------------------------------------------------------------------------------------------------------


@ROLES
def test_a_pod_may_do_nothing_but_run(role: str) -> None:
    spec = pod(role)
    assert spec["automountServiceAccountToken"] is False and spec["enableServiceLinks"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"} & spec.keys()
    security = spec["securityContext"]
    assert security["runAsNonRoot"] is True and security["runAsUser"] == security["runAsGroup"] == 65532
    # Else Kubernetes would give the group the keys' files at each start, which fedveil refuses.
    assert security["fsGroup"] == 65532 and security["fsGroupChangePolicy"] == "OnRootMismatch"
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert {kind for each in spec["volumes"] for kind in each} <= {
        *("name", "secret", "configMap", "emptyDir", "persistentVolumeClaim")
    }
    for container in containers(role):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        }
        assert container["resources"]["limits"]["memory"] and container["resources"]["requests"]
        assert container["image"] == VALUES[role]["image"]


@ROLES
def test_a_pod_writes_only_its_state_and_a_scratch_folder(role: str) -> None:
    (main,) = pod(role)["containers"]
    writable = {each["mountPath"] for each in main["volumeMounts"] if not each.get("readOnly")}
    assert writable == {"/var/lib/fedveil", "/tmp"}
    assert {"name": "HOME", "value": "/tmp"} in main["env"]
    # The keys are copied by the first container alone.
    assert "/secret" not in {each["mountPath"] for each in main["volumeMounts"]}


@ROLES
def test_a_ledger_has_one_writer_and_outlives_the_release(role: str) -> None:
    spec = objects(role)["StatefulSet"]["spec"]
    assert spec["replicas"] == 1
    assert spec["persistentVolumeClaimRetentionPolicy"] == {"whenDeleted": "Retain", "whenScaled": "Retain"}
    (claim,) = spec["volumeClaimTemplates"]
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]


@ROLES
def test_the_probes_are_commands_that_exist(role: str, tmp_path: Path) -> None:
    (main,) = pod(role)["containers"]
    for name in ("startupProbe", "livenessProbe", "readinessProbe"):
        program, *argv = main[name]["exec"]["command"]
        assert program == FEDVEIL and argv[2] == "/var/lib/fedveil/bundle"
        assert run([*argv[:2], str(tmp_path), *argv[3:]]) == 1  # and not 2, that of a mistake


def test_only_the_ports_of_link_and_numbers_are_open() -> None:
    policy = objects("server")["NetworkPolicy"]["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"] and policy["egress"] == []
    port, peers = {"port": 8443, "protocol": "TCP"}, [{"ipBlock": {"cidr": "203.0.113.0/24"}}]
    numbers = {"ports": [{"port": 9464, "protocol": "TCP"}], "from": VALUES["server"]["metrics"]["from"]}
    assert policy["ingress"] == [{"ports": [port], "from": peers}, numbers]
    services = objects("server")["Service"]["spec"], objects("server")["Service-metrics"]["spec"]
    assert all(each["selector"] == policy["podSelector"]["matchLabels"] for each in services)
    # The Service that a load balancer opens to the world has the link alone.
    assert [[each["name"] for each in service["ports"]] for service in services] == [["link"], ["metrics"]]


def test_a_client_reaches_only_the_server_and_names() -> None:
    policy = objects("client")["NetworkPolicy"]["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"] and policy["ingress"] == []
    ports = [(each["port"], each["protocol"]) for rule in policy["egress"] for each in rule["ports"]]
    assert ports == [(53, "UDP"), (53, "TCP"), (8443, "TCP")]
    assert "Service" not in objects("client")


# --- the first container --------------------------------------------------------------------------------------------


def install(role: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the script of the first container, with its mounts below a folder."""
    container = pod(role)["initContainers"][0]
    words = [*container["command"], *container["args"]]
    for path in ("/var/lib/fedveil", "/secret", "/policy"):
        (folder / path[1:]).mkdir(parents=True, exist_ok=True)
        words = [each.replace(f"{path}/", f"{folder}{path}/") for each in words]
    return subprocess.run(
        words, capture_output=True, text=True, check=False, env={"PATH": os.environ["PATH"]}
    )


def test_only_changed_files_are_installed(tmp_path: Path) -> None:
    secret, bundle = tmp_path / "secret", tmp_path / "var" / "lib" / "fedveil" / "bundle"
    secret.mkdir()
    for name in ("tls.key", "tls.pem", "policy.toml"):
        (secret / name).write_text(f"{name} of the desk")
    assert install("client", tmp_path).stdout.count("installed") == 3
    assert {path.stat().st_mode & 0o777 for path in bundle.iterdir()} == {0o600}
    assert bundle.stat().st_mode & 0o077 == 0
    (bundle / "tls.pem").write_text("renewed over the link")
    assert install("client", tmp_path).stdout == ""
    (secret / "tls.key").write_text("rotated")
    (tmp_path / "policy").mkdir(exist_ok=True)
    (tmp_path / "policy" / "policy.toml").write_text("policy of the owner")
    assert install("client", tmp_path).returncode == 0
    texts = {path.name: path.read_text() for path in bundle.iterdir()}
    assert texts == {
        "tls.key": "rotated",
        "tls.pem": "renewed over the link",
        "policy.toml": "policy of the owner",
    }


@pytest.mark.parametrize(
    ("listen", "code"), [("0.0.0.0:8443", 0), ("127.0.0.1:8443", 2), ("0.0.0.0:8765", 2)]
)
def test_a_server_that_listens_elsewhere_is_refused(listen: str, code: int, tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "server.toml").write_text(f'federation = "five"\nlisten = "{listen}"\n')
    done = install("server", tmp_path)
    assert done.returncode == code and ("set server.listen" in done.stderr) is bool(code)
