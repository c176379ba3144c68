"""Enrolment by a one-time token: keys made on the device, a server that carries and cannot forge, an authority that signs."""

import base64
import io
import json
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import tomli_w
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedveil.base.refusal import Refusal
from fedveil.cli.client import enrol as enrol_device
from fedveil.cli.provision import tokens
from fedveil.deployment.device.admission import write_admission
from fedveil.deployment.device.client_bundle import read_client_bundle
from fedveil.deployment.device.enrol import ask, authority_of, enrol
from fedveil.deployment.device.enrolment import _CONTEXT, _body, _request, make_keys, write_request
from fedveil.deployment.enrolment import approve, issue_tokens
from fedveil.deployment.provision import provision, renew, revoke, rotate
from fedveil.links.enrolment.messages import Ask, Reply
from fedveil.links.enrolment.server_end import EnrolmentPort, open_tokens, queue_stem
from fedveil.links.enrolment.token import Token, lock_of, read_token, seal_of
from fedveil.links.server_bundle import ServerBundle, read_server_bundle
from fedveil.privacy.secagg.double_signature import AUTHORITY_BYTES, BOTH_BYTES, ML_DSA_KEY_BYTES
from fedveil.privacy.secagg.suite import SIGNATURE_BYTES, sign

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm")

FEDERATION = """\
federation: sensors
server: {{address: "localhost:{link}", listen: "127.0.0.1:{link}", enrolment: "localhost:{port}"}}
task: {{name: digits, options: {{num_clients: 5}}}}
policy: {{target_epsilon: 8.0, target_delta: 1e-4, minimum_cohort: 3}}
clients:
  - name: hub
  - name: sensor-*
    policy: {{target_epsilon: 2.0}}
"""


@pytest.fixture
def desk(provisioned: Callable[[str], Path]) -> Path:
    return provisioned(FEDERATION)


Opens = Callable[[Path], AbstractContextManager[ServerBundle]]


@pytest.fixture
def served(desk: Path, enrolling: Opens) -> Iterator[ServerBundle]:
    """The port of the desk's server, as long as a token is open."""
    issue_tokens(desk, ["sensor-9"])  # opens it
    with enrolling(desk) as bundle:
        yield bundle


def asked(token: Token, folder: Path) -> bool:
    """Ask once, and not again."""
    return enrol(token, folder, wait=0, notify=lambda _: None)


def question(token: Token, folder: Path, name: str | None = None, seal: bytes | None = None) -> Ask:
    """What a device would ask, or one that lies."""
    request = write_request(folder, name or token.name).read_bytes()
    return Ask(token.name, token.port_key, request, seal or seal_of(token.seal_key, request))


def test_a_token_is_a_line_that_says_where_and_who() -> None:
    token = Token("[::1]:8444", "sensor-1", 1_900_000_000, b"\x01" * 32, b"\xff" * 32)
    assert read_token(f"{token.text()}\n") == token
    assert token.text().startswith("fedveil:[::1]:8444/sensor-1/1900000000/") and len(token.text()) < 160
    assert "\\xff" not in repr(token)
    for wrong in (
        "",
        "fedveil:",
        token.text()[:-1],
        token.text() + "A",
        token.text().replace("sensor", "../x"),
    ):
        with pytest.raises(Refusal, match="must be fedveil:HOST:PORT/NAME"):
            read_token(wrong)


def test_the_keys_that_seal_are_encrypted_at_the_desk(
    desk: Path, served: ServerBundle, tmp_path: Path
) -> None:
    del served
    file = desk / "authority" / "tokens.json"
    (token,) = issue_tokens(desk, ["sensor-1"])
    assert token.seal_key.hex() not in file.read_text()
    # An earlier release wrote them as they are: they are read, and encrypted at the next use.
    kept = json.loads(file.read_text())
    kept["sensor-1"]["seal"] = token.seal_key.hex()
    file.write_text(json.dumps(kept))
    assert not asked(token, tmp_path / "device")
    assert approve(desk).admitted == ("sensor-1",)
    assert token.seal_key.hex() not in file.read_text()
    # Under another token's lock a key opens nothing.
    kept = json.loads(file.read_text())
    kept["sensor-1"]["seal"] = kept["sensor-9"]["seal"]
    file.write_text(json.dumps(kept))
    with pytest.raises(Refusal, match="create the open tokens anew"):
        approve(desk)


def test_token_is_read_from_its_file_and_in_no_process_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    token = Token("localhost:1", "sensor-1", 1_900_000_000, bytes(32), bytes(32))
    seen: list[Token] = []
    monkeypatch.setattr(
        "fedveil.deployment.device.enrol.enrol", lambda token, *_, **__: seen.append(token) or True
    )
    file = tmp_path / "sensor-1.token"
    file.write_text(f"{token.text()}\n")
    with pytest.raises(Refusal, match="may be read by others"):
        enrol_device(str(file), tmp_path, None)
    file.chmod(0o600)
    assert enrol_device(str(file), tmp_path, None) == 0
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{token.text()}\n"))
    assert enrol_device("-", tmp_path, None) == 0
    assert "process list" not in capsys.readouterr().err
    assert enrol_device(token.text(), tmp_path, None) == 0
    assert "process list shows the token" in capsys.readouterr().err
    for mistyped in (token.text().removeprefix("fedveil:"), str(tmp_path / "sensor-2.token")):
        with pytest.raises(Refusal, match="is no file, and no token") as refused:
            enrol_device(mistyped, tmp_path, None)
        assert mistyped not in str(refused.value)
    assert seen == [token] * 3


def test_a_device_enrols_and_its_keys_never_leave_it(
    desk: Path, served: ServerBundle, tmp_path: Path
) -> None:
    (token,) = issue_tokens(desk, ["sensor-1"])
    device = tmp_path / "device"
    assert not asked(token, device)
    done = approve(desk)
    assert (done.admitted, done.refused, done.silent) == (("sensor-1",), {}, ("sensor-9",))
    assert asked(token, device)
    bundle = read_client_bundle(device)
    assert (bundle.settings.name, bundle.settings.node) == ("sensor-1", 3)
    assert bundle.policy.target_epsilon == 2.0 and bundle.identity.roster.version == 2
    assert {path.name for path in device.iterdir()} >= {"tls.key", "identity.key", "policy.toml", "tls.pem"}
    assert not (device / "enrolling").exists() and not (desk / "clients" / "sensor-1").exists()
    assert device.stat().st_mode & 0o777 == 0o700
    secret = (device / "tls.key").read_bytes().splitlines()[1]
    everything = b"".join(path.read_bytes() for path in desk.rglob("*") if path.is_file())
    assert secret not in everything and token.secret not in everything and token.port_key not in everything
    # A second provisioning finds it in its place, and a second answer is the same.
    assert provision(tmp_path / "f.yaml", desk).register.find("sensor-1") is not None
    assert asked(token, device)  # the same command again


def test_a_token_opens_once(desk: Path, served: ServerBundle, tmp_path: Path) -> None:
    (token,) = issue_tokens(desk, ["sensor-1"])
    assert not asked(token, tmp_path / "one")
    with pytest.raises(Refusal, match="was used by another device"):
        asked(token, tmp_path / "two")
    approve(desk)
    assert asked(token, tmp_path / "one")
    with pytest.raises(Refusal, match="was used by another device"):
        asked(token, tmp_path / "two")
    # The desk keeps to it though a server forgets, or works for the second.
    place = queue_stem(served.folder, "sensor-1", lock_of(token.port_key))
    place.with_name(f"{place.name}.request").unlink()
    with pytest.raises(Refusal, match="is not signed by the authority for these keys"):
        asked(token, tmp_path / "two")
    before = (served.folder / "roster.bin").read_bytes()
    assert approve(desk).admitted == ()
    assert (served.folder / "roster.bin").read_bytes() == before


def test_a_token_ends(desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token, early = issue_tokens(desk, ["sensor-1", "sensor-2"], hours=1)
    bundle = read_server_bundle(desk / "server")
    late = time.time() + 3601
    port, later = EnrolmentPort(bundle), EnrolmentPort(bundle, now=lambda: late)
    assert port.answer(question(early, tmp_path / "early")).state == "waits"
    assert later.answer(question(token, tmp_path / "late")).state == "ended"
    assert not (desk / "server" / "enrolment" / f"sensor-1.{lock_of(token.port_key)[:16]}.request").exists()
    assert open_tokens(desk / "server", late) == {}
    monkeypatch.setattr(time, "time", lambda: late)
    done = approve(desk)  # what was asked in time and not answered in time
    assert done.admitted == () and "has expired" in done.refused["sensor-2"]


def test_a_token_is_of_one_name(desk: Path, tmp_path: Path) -> None:
    one, other = issue_tokens(desk, ["sensor-1", "sensor-2"])
    port = EnrolmentPort(read_server_bundle(desk / "server"))
    stolen = Ask("sensor-2", one.port_key, b"request", bytes(32))
    assert port.answer(stolen).state == "unknown"
    assert port.answer(Ask("hub", one.port_key, b"request", bytes(32))).state == "unknown"
    # Asking for another name under the own one is refused at the desk.
    assert port.answer(question(one, tmp_path / "one", name="sensor-2")).state == "waits"
    assert port.answer(question(other, tmp_path / "other", name="hub")).state == "waits"
    done = approve(desk)
    assert done.admitted == () and "was made for a client other than sensor-1" in done.refused["sensor-1"]
    assert "was made for a client other than sensor-2" in done.refused["sensor-2"]


def test_a_server_cannot_put_its_own_keys_in_the_place_of_a_devices(desk: Path, tmp_path: Path) -> None:
    (token,) = issue_tokens(desk, ["sensor-1"])
    port = EnrolmentPort(read_server_bundle(desk / "server"))
    assert (
        port.answer(question(token, tmp_path / "server", seal=bytes(32))).state == "waits"
    )  # it knows the door
    done = approve(desk)
    assert done.admitted == () and "was not sealed with the token" in done.refused["sensor-1"]


def of_own_making(token: Token, folder: Path, **changed: str) -> Ask:
    """What a device asks that signs and seals whatever it likes."""
    keys = make_keys(folder)
    asked = {**_request(keys, token.name), **changed}
    del asked["signature"]
    if not asked["post_quantum"]:
        del asked["post_quantum"]
    signature = sign(keys.identity, _CONTEXT, _body(*asked.values())).hex()
    request = tomli_w.dumps({**asked, "signature": signature}).encode()
    return Ask(token.name, token.port_key, request, seal_of(token.seal_key, request))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("2a8648ce3d030107", "2a8648ce3d030106"),  # a curve that nobody knows
        ("2a8648ce3d0201", "2a8648ce3d0209"),  # a kind of key that nobody knows
        ("03420004", "03420005"),  # a point of no form
        ("020100", "020109"),  # a version that there is not
    ],
)
def test_a_device_that_asks_for_nonsense_keeps_nobody_out(
    before: str, after: str, desk: Path, tmp_path: Path
) -> None:
    one, other = issue_tokens(desk, ["sensor-1", "sensor-2"])
    port = EnrolmentPort(read_server_bundle(desk / "server"))
    pem = _request(make_keys(tmp_path / "keys"), "sensor-1")["tls"].splitlines()
    der = base64.b64decode("".join(pem[1:-1])).replace(bytes.fromhex(before), bytes.fromhex(after))
    odd = "\n".join((pem[0], base64.b64encode(der).decode(), pem[-1]))
    assert port.answer(of_own_making(one, tmp_path / "one", tls=odd)).state == "waits"
    assert port.answer(question(other, tmp_path / "other")).state == "waits"
    done = approve(desk)
    assert done.admitted == ("sensor-2",) and "make another on the device" in done.refused["sensor-1"]


def test_a_device_without_a_second_key_keeps_nobody_out(
    provisioned: Callable[[str], Path], tmp_path: Path
) -> None:
    desk = provisioned(FEDERATION.replace("  - name: hub\n", "") + "post_quantum: true\n")
    one, other = issue_tokens(desk, ["sensor-1", "sensor-2"])
    port = EnrolmentPort(read_server_bundle(desk / "server"))
    assert port.answer(of_own_making(one, tmp_path / "one", post_quantum="")).state == "waits"
    assert port.answer(question(other, tmp_path / "other")).state == "waits"
    done = approve(desk)
    assert done.admitted == ("sensor-2",) and "has no ML-DSA key" in done.refused["sensor-1"]


def test_under_post_quantum_signatures_an_admission_bears_both(
    provisioned: Callable[[str], Path], enrolling: Opens, tmp_path: Path
) -> None:
    desk = provisioned(FEDERATION.replace("  - name: hub\n", "") + "post_quantum: true\n")
    token, later = issue_tokens(desk, ["sensor-1", "sensor-2"])
    with enrolling(desk) as server:
        assert not asked(token, tmp_path / "one") and not asked(later, tmp_path / "two")
        assert approve(desk).admitted == ("sensor-1", "sensor-2")
        assert asked(token, tmp_path / "one")
        bundle = read_client_bundle(tmp_path / "one")
        assert bundle.policy.authority == server.authority.hex() and len(server.authority) == BOTH_BYTES
        assert [len(each.post_quantum) for each in bundle.identity.roster.members] == [ML_DSA_KEY_BYTES] * 2

        # Who has broken Ed25519 alone admits nobody: not with another's second half, not without one.
        place = queue_stem(server.folder, "sensor-2", lock_of(later.port_key))
        answer = place.with_name(f"{place.name}.answer")
        sound = answer.read_bytes()
        first, body = sound[:SIGNATURE_BYTES], sound[AUTHORITY_BYTES:]
        own = write_admission(Ed25519PrivateKey.generate(), "sensor-2", bytes(32), {}, doubly=True)
        flipped = bytearray(sound)
        flipped[SIGNATURE_BYTES] ^= 1
        for wrong in (first + body, first + own[SIGNATURE_BYTES:AUTHORITY_BYTES] + body, bytes(flipped)):
            answer.write_bytes(wrong)
            with pytest.raises(Refusal, match="is not signed by the authority for these keys"):
                asked(later, tmp_path / "two")
        answer.write_bytes(sound)
        assert asked(later, tmp_path / "two")


def test_a_device_takes_nothing_that_its_authority_did_not_sign(
    desk: Path, served: ServerBundle, tmp_path: Path
) -> None:
    (token,) = issue_tokens(desk, ["sensor-1"])
    asked(token, tmp_path / "device")
    approve(desk)
    place = queue_stem(served.folder, "sensor-1", lock_of(token.port_key))
    answer = place.with_name(f"{place.name}.answer")
    sound = answer.read_bytes()
    answer.write_bytes(sound.replace(b"target_epsilon = 2.0", b"target_epsilon = 9.0"))
    with pytest.raises(Refusal, match="is not signed by the authority for these keys"):
        asked(token, tmp_path / "device")
    assert not (tmp_path / "device" / "policy.toml").exists()
    answer.write_bytes(sound)
    assert asked(token, tmp_path / "device")


def test_token_stays_hidden_from_a_man_in_the_middle(
    desk: Path, served: ServerBundle, tmp_path: Path
) -> None:
    (token,) = issue_tokens(desk, ["sensor-1"])
    foreign = Token(token.address, token.name, token.end, bytes(32), token.secret)
    with pytest.raises(Refusal, match="is not of the authority that the token names"):
        asked(foreign, tmp_path / "device")
    # It may repeat the authority's public words, and has no certificate of it.
    (tmp_path / "g.yaml").write_text((tmp_path / "f.yaml").read_text())
    provision(tmp_path / "g.yaml", tmp_path / "posing")
    ca, _ = authority_of(token)
    assert ca == served.credentials.ca
    other = (tmp_path / "posing" / "authority" / "ca.pem").read_bytes()
    with pytest.raises(ssl.SSLCertVerificationError):
        ask(token, other, b"request", bytes(32))


def test_stranger_learns_two_public_keys_and_costs_seconds(
    served: ServerBundle,
) -> None:
    assert served.enrolment is not None
    port = EnrolmentPort(served)
    told = port.answer(Ask("", b"", b"", b""))
    assert told == Reply("authority", ca=served.credentials.ca, authority=served.authority)
    for name in ("hub", "sensor-1", "sensor-9", "../../x", "\x00"):
        assert port.answer(Ask(name, bytes(32), b"request", bytes(32))) == Reply("unknown")
    assert list((served.folder / "enrolment").iterdir()) == []
    # Silent, broken and oversized connections do not keep the next one out.
    host, number = served.enrolment.split(":")
    silent = [socket.create_connection((host, int(number))) for _ in range(8)]
    with socket.create_connection((host, int(number))) as broken:
        broken.sendall(b"GET / HTTP/1.0\r\n\r\n")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    for sent in (b"\xff\xff\xff\xff", b"\x00\x00\x00\x01\xc1", b"\x00\x00\x00\x05" + b"\x91" * 5):
        with socket.create_connection((host, int(number))) as stream, context.wrap_socket(stream) as sealed:
            sealed.sendall(sent)
            assert sealed.recv(1) == b""
    (token,) = issue_tokens(served.folder.parent, ["sensor-9"])
    assert authority_of(token) == (served.credentials.ca, served.authority)
    for each in silent:
        each.close()


def test_rejected_request_is_reported_to_the_operator(
    desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    (token,) = issue_tokens(desk, ["sensor-1"])
    asked = question(token, tmp_path / "device")
    monkeypatch.setattr("fedveil.links.enrolment.server_end.replace_file", full)
    with pytest.raises(Refusal, match=r"sensor-1.*cannot be written \(No space left on device\)"):
        EnrolmentPort(read_server_bundle(desk / "server")).answer(asked)


def test_admitted_device_gets_new_keys_and_keeps_its_owners_files(
    desk: Path, served: ServerBundle, tmp_path: Path
) -> None:
    device = tmp_path / "device"
    for _ in range(2):
        (token,) = issue_tokens(desk, ["sensor-1"])
        asked(token, device)
        approve(desk)
        before = (device / "tls.key").read_bytes() if (device / "tls.key").exists() else b""
        assert asked(token, device)
        policy = (device / "policy.toml").read_text().replace("target_epsilon = 2.0", "target_epsilon = 1.0")
        (device / "policy.toml").write_text(policy)
    assert (device / "tls.key").read_bytes() != before
    bundle = read_client_bundle(device)
    assert bundle.policy.target_epsilon == 1.0 and bundle.settings.node == 3
    with pytest.raises(Refusal, match="is for another client than"):
        asked(issue_tokens(desk, ["sensor-2"])[0], device)
    revoke(desk, ["sensor-1"])
    with pytest.raises(Refusal, match="was revoked"):
        issue_tokens(desk, ["sensor-1"])


def test_names_and_patterns_are_changed_in_one_roster(
    desk: Path, served: ServerBundle, tmp_path: Path
) -> None:
    names = [f"sensor-{number}" for number in range(1, 6)]
    for token in issue_tokens(desk, names):
        asked(token, tmp_path / token.name)
    assert approve(desk).desk.register.version == 2
    with pytest.raises(Refusal, match=r"has its keys on the device; create a token .* token FOLDER sensor-1"):
        rotate(desk, ["*"], None)
    with pytest.raises(Refusal, match="matches no admitted client"):
        revoke(desk, ["sensor-1", "probe-*"])
    renewed = renew(desk, ["sensor-*"], within=400)
    assert renewed.register.version == 3 and renewed.before.find("hub") == renewed.register.find("hub")
    assert renew(desk, [], within=30).register.version == 3  # none ends so soon
    revoked = revoke(desk, ["sensor-?", "hub"])
    assert revoked.register.version == 4 and revoked.register.admitted == ()


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["probe-1"], "is not in federation.yaml"),
        (["sensor-*"], "must name one client"),
        (["server"], "must name one client"),
    ],
)
def test_a_token_is_for_a_name_that_has_a_place(names: list[str], said: str, desk: Path) -> None:
    with pytest.raises(Refusal, match=said):
        issue_tokens(desk, names)
    assert not (desk / "server" / "tokens.json").exists()


def test_name_used_twice_has_one_token(desk: Path) -> None:
    (desk / "server" / "enrolment" / "of nobody").mkdir(
        parents=True
    )  # whatever a server hands back stops no desk
    assert [token.name for token in issue_tokens(desk, ["sensor-1", "hub", "sensor-1"])] == [
        "sensor-1",
        "hub",
    ]


def test_a_token_is_the_text_of_a_qr_code(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    segno = pytest.importorskip("segno")
    tokens(desk, ["sensor-1"], 1.0, qr=True)
    text, _, picture = capsys.readouterr().out.partition("\n")
    assert read_token(text).name == "sensor-1" and "\u2588" in picture
    assert segno.make(text).version <= 12


def test_a_port_is_closed_where_no_token_is_open(desk: Path) -> None:
    told: list[str] = []
    EnrolmentPort(read_server_bundle(desk / "server")).serve(threading.Event(), told.append)
    assert told == ["no token is open: closed"]
    (desk / "server" / "tokens.json").write_text('{"../x": {"lock": "", "end": 1}}')
    with pytest.raises(Refusal, match="lists no tokens"):
        open_tokens(desk / "server", 0)


def test_the_commands_enrol_a_device(desk: Path, tmp_path: Path) -> None:
    def fedveil(*words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "fedveil", *words]
        return subprocess.Popen(
            command, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    told = fedveil("provision", "token", "desk", "sensor-1", "--hours", "0.1").communicate()[0]
    assert read_token(told).name == "sensor-1"
    begun = [server := fedveil("server", "enrol", "desk/server")]
    try:
        assert server.stdout is not None and "open tokens: 1" in server.stdout.readline()
        begun.append(device := fedveil("client", "enrol", told.strip(), "device"))
        assert device.stdout is not None  # whose first line may be a warning
        assert any("the authority has not answered yet" in line for line in iter(device.stdout.readline, ""))
        assert "sensor-1  admitted by its token" in fedveil("provision", "approve", "desk").communicate()[0]
        assert device.communicate(timeout=60)[0].startswith("enrolled; start it with")
    finally:
        for process in begun:
            process.kill()
            process.communicate()
    assert read_client_bundle(tmp_path / "device").settings.name == "sensor-1"
