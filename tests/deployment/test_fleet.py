"""A fleet from its first token to its last certificate, without a copied file: enrolled, renewed over its streams, revoked."""

import json
import runpy
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedveil.base.refusal import Refusal
from fedveil.deployment.certificate_delivery import CertificateDelivery
from fedveil.deployment.device import agent as agents
from fedveil.deployment.device.agent import newest_credentials, renew_certificate
from fedveil.deployment.device.client_bundle import ClientBundle, read_client_bundle
from fedveil.deployment.device.enrol import enrol
from fedveil.deployment.enrolment import approve, issue_tokens
from fedveil.deployment.open_link import Link, open_link
from fedveil.deployment.provision import provision, renew, revoke
from fedveil.deployment.settings import LinkSettings
from fedveil.links import device_answers
from fedveil.links.enrolment.server_end import EnrolmentPort
from fedveil.links.grpc import device_end
from fedveil.links.grpc.device_end import Endpoint, follow
from fedveil.links.roster_watch import followed_roster, nodes_of
from fedveil.links.server_bundle import read_server_bundle
from fedveil.messages.flower_adapter import claim_identity, name_sender
from fedveil.messages.notices import DeviceFacts, facts_reply, read_facts, read_renewal, renewal_to

claim_identity(1)
until = runpy.run_path(str(Path(__file__).parents[1] / "faults" / "patience.py"))["until"]
FEDERATION = """\
federation: fleet
server: {{address: "localhost:{link}", listen: "127.0.0.1:{link}", enrolment: "localhost:{port}"}}
certificate_days: 30
task: {{name: digits, options: {{num_clients: 5}}}}
policy: {{target_epsilon: 8.0, target_delta: 1e-4, minimum_cohort: 3}}
clients: [{{name: sensor-*}}]
"""


@pytest.fixture
def desk(provisioned: Callable[[str], Path]) -> Path:
    return provisioned(FEDERATION)


def enrolled(desk: Path, folder: Path, number: int) -> list[ClientBundle]:
    """So many devices, each by its own token."""
    names = [f"sensor-{each:03}" for each in range(1, number + 1)]
    tokens = issue_tokens(desk, names)
    port, stop, told = EnrolmentPort(read_server_bundle(desk / "server")), threading.Event(), list[str]()
    serving = threading.Thread(target=port.serve, args=(stop, told.append))
    serving.start()
    until(lambda: bool(told))
    for token in tokens:
        assert not enrol(token, folder / token.name, wait=0, notify=lambda _: None)
    assert approve(desk).admitted == tuple(names)
    for token in tokens:
        assert enrol(token, folder / token.name, wait=0)
    stop.set()
    serving.join()
    return [read_client_bundle(folder / name) for name in names]


class Fleet:
    """Devices that follow their server, each in a thread, as the agent of each would."""

    def __init__(self, bundles: list[ClientBundle]) -> None:
        self.stop = threading.Event()
        self.threads = [threading.Thread(target=self._follow, args=(each,)) for each in bundles]
        for each in self.threads:
            each.start()

    def _follow(self, bundle: ClientBundle) -> None:
        own, agent = bundle.settings, agents.Agent(bundle)
        endpoint = Endpoint(own.server, own.node, partial(newest_credentials, bundle))
        follow(endpoint, agent.handle, bundle.state / "journal", self.stop, agent.say)

    def end(self) -> None:
        self.stop.set()
        for each in self.threads:
            each.join()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[ExitStack]:
    monkeypatch.setattr(device_answers, "FIRST_WAIT_SECONDS", 0.05)
    monkeypatch.setattr(device_answers, "LONGEST_WAIT_SECONDS", 0.5)
    monkeypatch.setattr(device_end, "LINGER_SECONDS", 0.5)
    with ExitStack() as stack:
        yield stack


def served(desk: Path, stack: ExitStack) -> Link:
    bundle = read_server_bundle(desk / "server")
    return stack.enter_context(
        open_link(LinkSettings(name="grpc"), bundle, nodes_of(followed_roster(bundle)))
    )


@pytest.mark.parametrize("number", [5, pytest.param(300, marks=pytest.mark.campaign)])
def test_fleet_is_enrolled_renewed_and_revoked_without_copied_files(
    number: int, desk: Path, tmp_path: Path, opened: ExitStack
) -> None:
    bundles = enrolled(desk, tmp_path, number)
    nodes = {each.settings.node: each for each in bundles}
    assert len(nodes) == number
    link = served(desk, opened)
    fleet = Fleet(bundles)
    opened.callback(fleet.end)
    until(lambda: set(link.presence().devices) == set(nodes))
    first = {node: facts.certificate_ends for node, facts in link.presence().devices.items()}
    (desk / "authority" / "federation.yaml").write_text(
        (desk / "authority" / "federation.yaml").read_text().replace("days: 30", "days: 60")
    )
    assert renew(desk, ["sensor-*"], within=45).register.version == 2
    until(lambda: all(f.certificate_ends > first[n] for n, f in link.presence().devices.items()))
    for bundle in bundles:
        pem = (bundle.folder / "tls.pem").read_bytes()
        assert pem != bundle.credentials.certificate and newest_credentials(bundle).certificate == pem
    leaving = [each.settings.name for each in bundles[::10]]  # a tenth
    assert revoke(desk, leaving).register.version == 3
    left = {node for node, each in nodes.items() if each.settings.name not in leaving}
    until(lambda: set(link.presence().connected_since) == left)
    assert link.presence().disconnected_at.keys() >= set(nodes) - left


def test_a_device_takes_a_later_certificate_of_its_own_alone(desk: Path, tmp_path: Path) -> None:
    one, other = enrolled(desk, tmp_path, 2)
    own, foreign = one.credentials.certificate, other.credentials.certificate
    assert renew_certificate(one, own) is one
    with pytest.raises(Refusal, match="is not the key of the certificate"):
        renew_certificate(one, foreign)
    shutil.copy(tmp_path / "f.yaml", tmp_path / "g.yaml")
    provision(tmp_path / "g.yaml", tmp_path / "another")
    with pytest.raises(Refusal, match="was not signed by the authority"):
        renew_certificate(one, (tmp_path / "another" / "server" / "tls.pem").read_bytes())
    with pytest.raises(Refusal, match="is not a certificate"):
        renew_certificate(one, b"junk")
    assert (one.folder / "tls.pem").read_bytes() == own
    file = desk / "authority" / "federation.yaml"
    file.write_text(file.read_text().replace("days: 30", "days: 60"))
    renew(desk, [one.settings.name], within=400)
    issued = json.loads((desk / "server" / "certificates.json").read_text())
    later = issued[str(one.settings.node)].encode()
    renewed = renew_certificate(
        one, later + b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    )
    assert renewed.credentials.certificate == later  # and nothing of what the server put behind it
    assert newest_credentials(one) == renewed.credentials != one.credentials
    # The earlier one does not come back.
    assert renew_certificate(renewed, own) is renewed


@pytest.mark.parametrize(
    "told",
    [
        {"version": "0.1\n", "certificate_ends": 1, "roster": 1, "suites": [1]},
        {"version": "x" * 33, "certificate_ends": 1, "roster": 1, "suites": [1]},
        {"version": "0.1", "certificate_ends": 2**62, "roster": 1, "suites": [1]},
        {"version": "0.1", "certificate_ends": -1, "roster": 1, "suites": [1]},
        {"version": "0.1", "certificate_ends": 1, "roster": 1.0, "suites": [1]},
        {"version": "0.1", "certificate_ends": 1, "roster": 1, "suites": [1] * 65},
        {"version": "0.1", "certificate_ends": 1, "roster": 1},
    ],
)
def test_self_description_of_a_device_is_read_strictly(told: dict[str, object]) -> None:
    question = renewal_to(2, "")
    facts = DeviceFacts("0.1.0", 1_900_000_000, 3, (1, 2))
    assert read_renewal(question) == "" and read_facts(facts_reply(question, facts)) == facts
    reply = Message(RecordDict({"device": ConfigRecord(told)}), reply_to=question)  # pyright: ignore
    assert read_facts(reply) is None


def test_courier_asks_each_stream_once_per_certificate() -> None:
    asked: list[tuple[int, str]] = []
    since, certificates = {2: 1.0, 3: 1.0}, {"2": "first"}

    class Grid:
        def send_and_receive(self, messages: list[Message], *, timeout: float) -> Iterator[Message]:
            for each in messages:
                node = each.metadata.dst_node_id
                asked.append((node, read_renewal(each) or ""))
                if node == 2:  # the other one trains
                    yield name_sender(facts_reply(each, DeviceFacts("1", 1, 1, ())), node)

    delivery = CertificateDelivery(Grid(), lambda: since, lambda: certificates)  # pyright: ignore
    assert delivery.deliver() == 1 and set(delivery.facts) == {2}
    assert delivery.deliver() == 0
    assert asked == [(2, "first"), (3, ""), (3, "")]
    certificates["2"] = "second"
    delivery.deliver()
    since[2] = 2.0  # it came again
    delivery.deliver()
    assert [each for each in asked if each[0] == 2] == [(2, "first"), (2, "second"), (2, "second")]
