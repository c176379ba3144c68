"""The chart's contract: its rendered commands, mounts and user ids, as processes, from the Secrets to the end of a masked run."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedveil.deployment.provision import provision

TESTS = Path(__file__).parents[1]
objects = runpy.run_path(str(TESTS / "oracles" / "rendered_chart.py"))["objects"]
free_port = runpy.run_path(str(TESTS / "faults" / "ports.py"))["free_port"]
until = runpy.run_path(str(TESTS / "faults" / "patience.py"))["until"]
NAMES = "abcde"
FEDERATION = """\
federation: five
server: {{address: "localhost:{port}", listen: "0.0.0.0:{port}"}}
task: {{name: digits, options: {{num_clients: 5}}}}
policy: {{target_epsilon: 8.0, target_delta: 1e-4, minimum_cohort: 3}}
clients: [{names}]
"""
MOUNTS = ("/var/lib/fedveil", "/secret", "/policy", "/tmp")
FEDVEIL = "/opt/fedveil/bin/fedveil"


def as_user(user: int, group: int) -> list[str]:
    """What starts a process as the pod's user, without capabilities; nothing where this machine has no user namespaces."""
    words = ["unshare", "--user", f"--map-user={user}", f"--map-group={group}"]
    try:
        return [] if subprocess.run([*words, "true"], capture_output=True, check=False).returncode else words
    except FileNotFoundError:
        return []


@dataclass
class Pod:
    """A pod of the chart: the mounts in a folder of its own, and its processes."""

    role: str
    folder: Path
    port: int
    user: list[str]
    process: subprocess.Popen[str] | None = None

    @property
    def spec(self) -> dict[str, Any]:
        text = (TESTS / "fixtures" / "chart" / f"{self.role}.yaml").read_text()
        manifest: dict[str, Any] = next(each for each in objects(text) if each["kind"] == "StatefulSet")
        return manifest["spec"]["template"]["spec"]

    @property
    def bundle(self) -> Path:
        return self.folder / "var" / "lib" / "fedveil" / "bundle"

    def mount(self, secret: Path) -> None:
        """Lay the volumes out as the kubelet does: a group's folder, and files of a Secret that the group may read."""
        for path in MOUNTS:
            (self.folder / path[1:]).mkdir(parents=True)
        for path in secret.iterdir():
            if path.is_file():
                shutil.copyfile(path, self.folder / "secret" / path.name)
        if self.role == "client":
            shutil.move(self.folder / "secret" / "policy.toml", self.folder / "policy" / "policy.toml")
        for path in (*(self.folder / "secret").iterdir(), *(self.folder / "policy").iterdir()):
            path.chmod(0o440)
        for path in ("/var/lib/fedveil", "/tmp"):
            (self.folder / path[1:]).chmod(0o2775)

    def words(self, words: list[str]) -> list[str]:
        """A command of the container, with its mounts in the folder."""
        if words[0] == FEDVEIL:
            words = [sys.executable, "-m", "fedveil", *words[1:]]
        for path in MOUNTS[:3]:
            words = [each.replace(f"{path}/", f"{self.folder}{path}/") for each in words]
        words = [
            each.replace(":8443", f":{self.port}").replace("=9464", f"={self.port + 1}") for each in words
        ]
        return [*self.user, *words]

    def options(self, container: Mapping[str, Any]) -> dict[str, Any]:
        home = str(self.folder / "tmp")
        names = {each["name"]: each["value"].replace("/tmp", home) for each in container.get("env", ())}
        shown = {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        return {"env": {**shown, **names}, "cwd": home, "text": True}

    def start(self) -> None:
        (first,), (main,) = self.spec["initContainers"], self.spec["containers"]
        words = self.words([*first["command"], *first["args"]])
        done = subprocess.run(words, capture_output=True, check=False, **self.options(first))
        assert done.returncode == 0, done.stderr
        words = self.words([*main["command"], *main.get("args", ())])
        with open(self.folder.with_suffix(".log"), "a") as log:
            self.process = subprocess.Popen(words, stdout=log, stderr=log, **self.options(main))

    def is_well(self) -> bool:
        (main,) = self.spec["containers"]
        words = self.words(main["livenessProbe"]["exec"]["command"])
        return not subprocess.run(words, check=False, **self.options(main)).returncode

    @property
    def said(self) -> str:
        return self.folder.with_suffix(".log").read_text()

    def ends(self, number: int | None = None) -> int:
        """Wait for the end, after a signal or without."""
        process = self.process
        assert process is not None
        if number is not None:
            process.send_signal(number)
        until(lambda: process.poll() is not None, lambda: self.said)
        return process.returncode


@pytest.fixture
def pods(tmp_path: Path) -> Iterator[dict[str, Pod]]:
    port, names = free_port(), ", ".join(f"{{name: {name}}}" for name in NAMES)
    (tmp_path / "five.yaml").write_text(FEDERATION.format(port=port, names=names))
    provision(tmp_path / "five.yaml", tmp_path / "five", None)
    secrets = {"server": tmp_path / "five" / "server"}
    secrets |= {name: tmp_path / "five" / "clients" / name for name in NAMES}
    pods = {
        name: Pod("server" if name == "server" else "client", tmp_path / name, port, as_user(65532, 65532))
        for name in secrets
    }
    try:
        for name, pod in pods.items():
            pod.mount(secrets[name])
        yield pods
    finally:
        for pod in pods.values():
            if pod.process is not None:
                pod.process.kill()
                pod.process.wait()


def test_a_rendered_client_waits_for_its_server(pods: dict[str, Pod]) -> None:
    pod = pods["a"]
    assert not pod.is_well()
    pod.start()
    assert until(pod.is_well, lambda: pod.said)
    # The agent learns of SIGTERM once it follows the server.
    assert until(lambda: "trying again" in pod.said, lambda: pod.said)
    assert pod.ends(signal.SIGTERM) == 0 and not pod.is_well(), pod.said
    policy = (pod.bundle / "policy.toml").read_text()
    assert policy == (pod.folder / "policy" / "policy.toml").read_text()


@pytest.mark.campaign
def test_the_rendered_pods_complete_a_masked_run(pods: dict[str, Pod]) -> None:
    server, *clients = pods.values()
    assert not any(pod.is_well() for pod in pods.values())
    for pod in pods.values():
        pod.start()
    assert all(until(pod.is_well, lambda pod=pod: pod.said) for pod in clients)
    assert server.ends() == 0, server.said
    result = json.loads((server.bundle / "runs" / "run-1" / "result.json").read_text())
    assert result["status"] == "completed" and result["rounds_completed"] == 2
    assert server.is_well()  # its run is over
    server.start()  # as Kubernetes does
    assert server.ends() == 0 and "completed" in server.said
    for pod in clients:
        assert pod.is_well() and pod.ends(signal.SIGTERM) == 0, pod.said
        assert not pod.is_well()
        assert [*(pod.bundle / "state" / "ledgers").glob("*.ledger")], pod.said
        readable = [path for path in pod.bundle.rglob("*.key") if path.stat().st_mode & 0o077]
        assert not readable
