"""`fedveil provision` as the operator runs it: what it makes, what both ends read of it, and how it changes later."""

import fcntl
import os
import shutil
import ssl
import stat
import subprocess
import sys
import zipfile
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID

from fedveil.base.durable_files import replace_file
from fedveil.base.refusal import Refusal
from fedveil.cli.provision import _lines
from fedveil.configs.passphrase import is_scrypt
from fedveil.deployment import provision as provisioning
from fedveil.deployment.authority import Authority
from fedveil.deployment.device.client_bundle import Eligibility, TaskChoice, read_client_bundle, renew_roster
from fedveil.deployment.device.enrolment import Keys, _request
from fedveil.deployment.provision import provision, revoke, rotate
from fedveil.deployment.register import read_register
from fedveil.links.server_bundle import OwnersBudget, read_admitted, read_server_bundle
from fedveil.privacy.secagg.suite import public_of

FEDERATION = """\
federation: hearts
server: {address: "fl.example.org:8443", listen: "127.0.0.1:8443", also: [localhost, 127.0.0.1, "::1"]}
certificate_days: 90
task: {name: heart}
eligibility: {hours: 22-06, max_temperature_celsius: 75}
policy: {target_epsilon: 8.0, target_delta: 1e-5}
clients:
  - name: cleveland
  - name: hungary
    policy: {target_epsilon: 2, until: 2031-12-31, runs: [spring]}
    task: {target: "my_task:Hospital", allow_modules: [my_task], options: {rows: 10}}
    eligibility: {on_mains_power: true}
  - name: switzerland
    request: device/request.toml
"""
SECRETS = {"identity.key", "tls.key", "supernode.key"}
SHARED = {
    "client.toml",
    "policy.toml",
    "ca.pem",
    "tls.pem",
    "roster.bin",
    "fedveil-client.service",
}


def fedveil(*arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the command as a user whose umask hides nothing."""
    command = [sys.executable, "-m", "fedveil", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, umask=0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federation of three as the command made it; tests that change it take a copy."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "federation.yaml").write_text(FEDERATION)
    asked = fedveil("client", "request", "device", "--name", "switzerland", folder=folder)
    assert asked.returncode == 0, asked.stderr
    done = fedveil("provision", "federation.yaml", folder=folder)
    assert done.returncode == 0, done.stderr
    assert "hearts: 3 clients, roster version 1" in done.stdout
    return folder


@pytest.fixture
def desk(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "desk"))


def complete(desk: Path, name: str = "switzerland") -> Path:
    """What a device does with its bundle: the files beside its keys."""
    device = desk / "device"
    for file in (desk / "hearts" / "clients" / name).iterdir():
        shutil.copy(file, device)
    return device


# --- what is made -----------------------------------------------------------------------------------------------


def test_bundles_hold_their_files_and_hide_their_secrets(made: Path) -> None:
    folder = made / "hearts"
    names = {path.name for path in (folder / "clients" / "cleveland").iterdir()}
    assert names == SHARED | SECRETS
    assert {path.name for path in (folder / "clients" / "switzerland").iterdir()} == SHARED
    for path in [folder, *folder.rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        secret = path.suffix == ".key" or path.parent.name == "authority"
        assert mode == (0o700 if path.is_dir() else 0o600 if secret else 0o644), path
    assert not list(folder.rglob(".*"))  # nothing half written stays


def test_both_ends_read_their_bundles(desk: Path) -> None:
    server = read_server_bundle(desk / "hearts" / "server")
    client = read_client_bundle(desk / "hearts" / "clients" / "hungary")
    assert (server.federation, server.listen, server.link) == ("hearts", "127.0.0.1:8443", "grpc")
    assert [(m.node, m.name) for m in server.roster.members] == [
        (2, "cleveland"),
        (3, "hungary"),
        (4, "switzerland"),
    ]
    assert sorted(read_admitted(server.admitted).values()) == [2, 3, 4]
    assert sorted(read_admitted(server.folder / "supernodes.json").values()) == [2, 3, 4]
    assert (client.settings.node, client.settings.server) == (3, "fl.example.org:8443")
    assert client.settings.task == TaskChoice(
        target="my_task:Hospital", client=1, allow_modules=("my_task",), options={"rows": 10}
    )
    assert client.settings.eligibility == Eligibility(True, 75, 0, False, "22-06")
    assert client.identity.roster == server.roster
    assert client.identity.policy.authority == server.authority
    assert (client.policy.cap.target_epsilon, client.policy.cap.until) == (2, date(2031, 12, 31))
    assert client.policy.runs == ("spring",)
    assert client.state == desk / "hearts" / "clients" / "hungary" / "state"


def test_server_has_the_allowance_of_every_policy(desk: Path) -> None:
    provision(desk / "federation.yaml", desk / "hearts", None)
    allowed = read_server_bundle(desk / "hearts" / "server").allowed
    assert allowed == OwnersBudget(2.0, 1e-5)  # the least, which is Hungary's


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        (
            "task: {name: heart}",
            "task: {name: hart}",
            "task.name='hart': of cleveland is not a shipped task; did",
        ),
        ("2031-12-31", "2021-12-31", "policy.until='2021-12-31': of hungary is over"),
    ],
)
def test_a_new_client_that_could_serve_no_run_is_refused(
    tmp_path: Path, before: str, after: str, sentence: str
) -> None:
    text = FEDERATION.replace("  - name: switzerland\n    request: device/request.toml\n", "")
    (tmp_path / "federation.yaml").write_text(text.replace(before, after))
    with pytest.raises(Refusal) as refused:
        provision(tmp_path / "federation.yaml", tmp_path / "hearts", None)
    assert str(refused.value).startswith(sentence) and not (tmp_path / "hearts").exists()
    (tmp_path / "federation.yaml").write_text(text)
    desk = provision(tmp_path / "federation.yaml", tmp_path / "hearts", None)
    assert "  minimum_cohort: 3 is above the 2 members; no encrypted sum will be opened" in [*_lines(desk)]
    (tmp_path / "federation.yaml").write_text(text.replace(before, after))
    provision(
        tmp_path / "federation.yaml", tmp_path / "hearts", None
    )  # a member whose policy has ended stays


def test_a_device_keeps_the_node_key_that_it_makes_itself(desk: Path) -> None:
    folder = desk / "hearts" / "clients" / "cleveland"
    first, again = read_client_bundle(folder), read_client_bundle(folder)
    assert len(first.identity.node_key) == 32 and first.identity.node_key == again.identity.node_key
    assert stat.S_IMODE((folder / "state" / "node.key").stat().st_mode) == 0o600


def test_keys_generated_on_the_device_never_leave_it(desk: Path) -> None:
    device = complete(desk)
    bundle = read_client_bundle(device)
    assert bundle.settings.node == 4
    secrets = [path.read_bytes() for path in device.glob("*.key")]
    assert len(secrets) == 3
    for path in (desk / "hearts").rglob("*"):
        assert path.is_dir() or not any(secret in path.read_bytes() for secret in secrets)


def test_no_two_keys_are_the_same(made: Path) -> None:
    keys = [path.read_bytes() for path in made.rglob("*.key")]
    assert len(set(keys)) == len(keys) == 2 + 1 + 3 * 3


def test_certificates_satisfy_tls_libraries(made: Path) -> None:
    ca = x509.load_pem_x509_certificate((made / "hearts" / "authority" / "ca.pem").read_bytes())
    assert ca.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length == 0
    for path, usage in (
        (made / "hearts/server/tls.pem", ExtendedKeyUsageOID.SERVER_AUTH),
        (made / "hearts/clients/cleveland/tls.pem", ExtendedKeyUsageOID.CLIENT_AUTH),
    ):
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        certificate.verify_directly_issued_by(ca)
        life = certificate.not_valid_after_utc - certificate.not_valid_before_utc
        assert life == timedelta(days=91)
        assert certificate.not_valid_before_utc < datetime.now(UTC) - timedelta(hours=23)
        assert list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [usage]
        assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    server = x509.load_pem_x509_certificate((made / "hearts/server/tls.pem").read_bytes())
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fl.example.org", "localhost"]
    assert [str(each) for each in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1", "::1"]


def handshake(client: ssl.SSLContext, server: ssl.SSLContext, host: str) -> None:
    """A TLS handshake in memory; SSLError when one end does not accept the other."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    dialling = client.wrap_bio(to_client, to_server, server_hostname=host)
    answering = server.wrap_bio(to_server, to_client, server_side=True)
    waiting = [dialling, answering]
    for _ in range(10):
        for end in list(waiting):
            try:
                end.do_handshake()
                waiting.remove(end)
            except ssl.SSLWantReadError:
                pass
    assert not waiting
    answering.write(b"x")
    assert dialling.read(1) == b"x"


def context(purpose: ssl.Purpose, trusted: Path, own: Path) -> ssl.SSLContext:
    made = ssl.create_default_context(purpose, cafile=str(trusted / "ca.pem"))
    made.verify_mode = ssl.CERT_REQUIRED
    made.verify_flags |= ssl.VERIFY_X509_STRICT
    made.load_cert_chain(own / "tls.pem", own / "tls.key")
    return made


def test_the_two_ends_shake_hands_and_a_client_is_no_server(made: Path) -> None:
    server, client = made / "hearts" / "server", made / "hearts" / "clients" / "cleveland"
    listening = context(ssl.Purpose.CLIENT_AUTH, server, server)
    for host in ("fl.example.org", "localhost", "127.0.0.1"):
        handshake(context(ssl.Purpose.SERVER_AUTH, client, client), listening, host)
    with pytest.raises(ssl.SSLError):
        handshake(context(ssl.Purpose.SERVER_AUTH, client, client), listening, "other.example.org")
    posing = context(ssl.Purpose.CLIENT_AUTH, client, client)
    with pytest.raises(ssl.SSLError):
        handshake(context(ssl.Purpose.SERVER_AUTH, client, client), posing, "cleveland")


def test_flower_takes_the_supernode_keys(made: Path) -> None:
    from flwr.cli.supernode.register import try_load_public_key

    from fedveil.links.server_bundle import read_admitted

    server, admitted = (
        made / "hearts" / "server",
        read_admitted(made / "hearts" / "server" / "supernodes.json"),
    )
    key = load_ssh_private_key((made / "hearts/clients/cleveland/supernode.key").read_bytes(), None)
    assert isinstance(key.curve, SECP384R1)  # type: ignore[union-attr]
    sent = try_load_public_key(server / "supernodes" / "cleveland.pub")
    assert sent == key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    import hashlib

    assert admitted[hashlib.sha256(sent).hexdigest()] == 2


# --- what changes later -----------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_provisioning_again_changes_nothing(desk: Path) -> None:
    before = contents(desk)
    again = provision(desk / "federation.yaml", desk / "hearts", None)
    assert contents(desk) == before
    assert again.register.version == 1


def test_additional_client_leaves_other_keys_and_makes_a_newer_roster(desk: Path) -> None:
    before = contents(desk)
    (desk / "federation.yaml").write_text(FEDERATION + "  - name: long-beach\n")
    done = fedveil("provision", "federation.yaml", folder=desk)
    assert done.returncode == 0, done.stderr
    assert "node 5  long-beach   admitted" in done.stdout and "unchanged: 3" in done.stdout
    after = contents(desk)
    changed = {Path(name).name for name in before if after[name] != before[name]}
    assert changed == {
        "roster.bin",
        "policy.toml",
        "admitted.json",
        "supernodes.json",
        "certificates.json",
        "register.json",
        "federation.yaml",
    }
    server = read_server_bundle(desk / "hearts" / "server")
    assert server.roster.version == 2 and sorted(read_admitted(server.admitted).values()) == [2, 3, 4, 5]
    newest = read_client_bundle(desk / "hearts" / "clients" / "long-beach")
    assert newest.policy.minimum_roster_version == 2 and newest.settings.task.client == 3


def test_device_takes_a_newer_roster_over_the_link_and_never_an_older(desk: Path) -> None:
    folder = desk / "hearts" / "clients" / "cleveland"
    old = read_client_bundle(folder)
    kept = shutil.copytree(folder, desk / "at-the-hospital")
    (desk / "federation.yaml").write_text(FEDERATION + "  - name: long-beach\n")
    provision(desk / "federation.yaml", desk / "hearts", None)
    newer = read_server_bundle(desk / "hearts" / "server").signed_roster
    bundle = renew_roster(read_client_bundle(kept), newer)
    assert bundle.identity.roster.version == 2 == read_client_bundle(kept).identity.roster.version
    older = (folder.parents[2] / "at-the-hospital" / "roster.bin").read_bytes()
    assert renew_roster(bundle, older) is bundle
    with pytest.raises(Refusal, match="not signed by the authority"):
        renew_roster(old, newer[:-1] + bytes([newer[-1] ^ 1]))


def test_rotation_replaces_keys_and_bars_the_old_ones(desk: Path) -> None:
    server, folder = desk / "hearts" / "server", desk / "hearts" / "clients" / "cleveland"
    old, before = read_register(desk / "hearts/authority/register.json").find("cleveland"), contents(desk)
    assert old is not None
    done = fedveil("provision", "rotate", "hearts", "cleveland", folder=desk)
    assert done.returncode == 0 and "node 2  cleveland    rotated" in done.stdout, done.stderr
    admitted = read_admitted(server / "admitted.json")
    assert old.fingerprint not in admitted and sorted(admitted.values()) == [2, 3, 4]
    assert old.supernode_fingerprint not in read_admitted(server / "supernodes.json")
    bundle = read_client_bundle(folder)
    assert public_of(bundle.identity.key).hex() != old.identity and bundle.identity.roster.version == 2
    after = contents(desk)
    assert all(
        before[f"hearts/clients/cleveland/{name}"] != after[f"hearts/clients/cleveland/{name}"]
        for name in SECRETS
    )
    assert all(
        before[f"hearts/clients/hungary/{name}"] == after[f"hearts/clients/hungary/{name}"]
        for name in SECRETS
    )


def test_old_bundle_of_a_rotated_client_is_refused_by_the_roster(desk: Path) -> None:
    kept = Path(shutil.copytree(desk / "hearts" / "clients" / "cleveland", desk / "stolen"))
    rotate(desk / "hearts", ["cleveland"], None)
    newer = read_server_bundle(desk / "hearts" / "server").signed_roster
    with pytest.raises(Refusal, match="it was revoked or has new keys"):
        renew_roster(read_client_bundle(kept), newer)


def test_keys_on_a_device_are_rotated_by_another_request(desk: Path) -> None:
    done = fedveil("provision", "rotate", "hearts", "switzerland", folder=desk)
    assert done.returncode == 2 and "has its keys on the device" in done.stderr
    again = fedveil(
        "provision", "rotate", "hearts", "switzerland", "--request", "device/request.toml", folder=desk
    )
    assert (
        again.returncode == 2
        and "holds the keys that are to be replaced; make new keys on the device" in again.stderr
    )
    assert fedveil("client", "request", "new", "--name", "switzerland", folder=desk).returncode == 0
    moved = fedveil(
        "provision", "rotate", "hearts", "switzerland", "--request", "new/request.toml", folder=desk
    )
    assert moved.returncode == 0, moved.stderr
    for file in (desk / "hearts" / "clients" / "switzerland").iterdir():
        shutil.copy(file, desk / "new")
    assert read_client_bundle(desk / "new").settings.node == 4
    with pytest.raises(Refusal, match="is not the key of the certificate"):
        read_client_bundle(complete(desk))


def test_a_device_may_take_over_its_keys(desk: Path) -> None:
    assert fedveil("client", "request", "new", "--name", "cleveland", folder=desk).returncode == 0
    rotate(desk / "hearts", ["cleveland"], desk / "new" / "request.toml")
    assert {path.name for path in (desk / "hearts" / "clients" / "cleveland").iterdir()} == SHARED


def test_the_servers_keys_rotate_alone(desk: Path) -> None:
    before = contents(desk)
    rotate(desk / "hearts", ["server"], None)
    after = contents(desk)
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"hearts/server/tls.key", "hearts/server/tls.pem", "hearts/authority/register.json"}
    assert read_server_bundle(desk / "hearts" / "server").roster.version == 1


def test_a_server_that_moves_keeps_its_key(desk: Path) -> None:
    before = (desk / "hearts/server/tls.key").read_bytes()
    (desk / "federation.yaml").write_text(FEDERATION.replace("fl.example.org", "fl2.example.org"))
    provision(desk / "federation.yaml", desk / "hearts", None)
    assert (desk / "hearts/server/tls.key").read_bytes() == before
    server = read_server_bundle(desk / "hearts" / "server")
    certificate = x509.load_pem_x509_certificate(server.credentials.certificate)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName)[0] == "fl2.example.org"
    assert read_client_bundle(desk / "hearts/clients/cleveland").settings.server == "fl2.example.org:8443"


def test_revocation_is_for_ever(desk: Path) -> None:
    done = fedveil("provision", "revoke", "hearts", "hungary", folder=desk)
    assert done.returncode == 0 and "hearts: 2 clients, roster version 2" in done.stdout, done.stderr
    server = read_server_bundle(desk / "hearts" / "server")
    assert [member.node for member in server.roster.members] == [2, 4]
    assert sorted(read_admitted(server.admitted).values()) == [2, 4]
    assert {path.stem for path in (desk / "hearts/server/supernodes").iterdir()} == {
        "cleveland",
        "switzerland",
    }
    assert read_client_bundle(desk / "hearts/clients/cleveland").policy.minimum_roster_version == 2
    for verb in ("revoke", "rotate"):
        again = fedveil("provision", verb, "hearts", "hungary", folder=desk)
        assert again.returncode == 2 and "admit the device under another name" in again.stderr
    provision(desk / "federation.yaml", desk / "hearts", None)  # the file still names it
    assert read_server_bundle(desk / "hearts" / "server").roster.version == 2
    (desk / "federation.yaml").write_text(FEDERATION.replace("hungary", "budapest"))
    provision(desk / "federation.yaml", desk / "hearts", None)
    assert [m.node for m in read_server_bundle(desk / "hearts" / "server").roster.members] == [2, 4, 5]


SMALL = """\
federation: hearts
server: {address: "localhost:8443"}
task: {name: heart}
policy: {target_epsilon: 8.0, target_delta: 1e-5}
clients: [{name: cleveland}, {name: hungary}]
"""


class PowerCut(BaseException):
    """Nothing after it happens."""


def cut_at(step: int, patched: pytest.MonkeyPatch) -> list[str]:
    """The step-th file from now on is not put in its place; returns the names of those that were."""
    put: list[str] = []
    replace = os.replace

    def counted(fresh: Path, path: Path) -> None:
        if len(put) == step:
            raise PowerCut
        replace(fresh, path)
        put.append(path.name)

    patched.setattr(os, "replace", counted)
    return put


def test_repeating_completes_a_command_cut_short_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "f.yaml").write_text(SMALL)
    # What costs time and changes nothing here.
    monkeypatch.setattr(os, "fsync", lambda _: None)
    completed = False
    for step in range(100):
        out = tmp_path / str(step)
        with monkeypatch.context() as patched:
            cut_at(step, patched)
            try:
                provision(tmp_path / "f.yaml", out, None)
                completed = True
            except PowerCut:
                pass
        desk = provision(tmp_path / "f.yaml", out, None)
        assert desk.register.version == 1 == read_server_bundle(out / "server").roster.version
        for name in ("cleveland", "hungary"):
            read_client_bundle(out / "clients" / name)
        if completed:
            break
    assert completed and step > 20


def test_repeating_completes_a_rotation_cut_short_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "f.yaml").write_text(SMALL)
    provision(tmp_path / "f.yaml", tmp_path / "made", None)
    old = (tmp_path / "made/clients/cleveland/identity.key").read_bytes()
    for step in range(0, 12, 2):
        out = Path(shutil.copytree(tmp_path / "made", tmp_path / str(step)))
        with monkeypatch.context() as patched, pytest.raises(PowerCut):
            cut_at(step, patched)
            rotate(out, ["cleveland"], None)
        rotate(out, ["cleveland"], None)
        assert read_client_bundle(out / "clients/cleveland").identity.roster.version in (2, 3)
        assert (out / "clients/cleveland/identity.key").read_bytes() != old
        assert sorted(read_admitted(out / "server/admitted.json").values()) == [2, 3]


def test_an_authority_under_a_passphrase_opens_with_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "federation.yaml"
    file.write_text(FEDERATION.replace("    request: device/request.toml\n", ""))
    monkeypatch.setenv("FEDVEIL_PASSPHRASE", "too short")
    with pytest.raises(Refusal, match="at least 16"):
        provision(file, tmp_path / "hearts", None)
    monkeypatch.setenv("FEDVEIL_PASSPHRASE", "correct horse battery staple")
    provision(file, tmp_path / "hearts", None)
    for name in ("signer.key", "ca.key"):
        assert b"BEGIN ENCRYPTED PRIVATE KEY" in (tmp_path / "hearts" / "authority" / name).read_bytes()
        assert is_scrypt((tmp_path / "hearts" / "authority" / name).read_bytes())
    for name in ("server/tls.key", "clients/cleveland/identity.key"):
        assert b"ENCRYPTED" not in (tmp_path / "hearts" / name).read_bytes()  # machines start by themselves
    assert revoke(tmp_path / "hearts", ["cleveland"]).register.version == 2
    monkeypatch.setenv("FEDVEIL_PASSPHRASE", "correct horse battery stable")
    with pytest.raises(Refusal, match="does not match this passphrase"):
        revoke(tmp_path / "hearts", ["hungary"])
    monkeypatch.delenv("FEDVEIL_PASSPHRASE")
    with pytest.raises(Refusal, match="set FEDVEIL_PASSPHRASE"):
        revoke(tmp_path / "hearts", ["hungary"])
    assert read_register(tmp_path / "hearts" / "authority" / "register.json").version == 2
    (tmp_path / "secret").write_text("correct horse battery staple\n")
    monkeypatch.setenv("FEDVEIL_PASSPHRASE_FILE", str(tmp_path / "secret"))
    with pytest.raises(Refusal, match="chmod 600"):
        revoke(tmp_path / "hearts", ["hungary"])
    (tmp_path / "secret").chmod(0o600)
    assert revoke(tmp_path / "hearts", ["hungary"]).register.version == 3


def test_keys_of_an_earlier_release_move_to_scrypt_at_their_next_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = b"correct horse battery staple"
    monkeypatch.setenv("FEDVEIL_PASSPHRASE", secret.decode())
    file = tmp_path / "federation.yaml"
    file.write_text(FEDERATION.replace("    request: device/request.toml\n", ""))
    provision(file, tmp_path / "hearts", None)
    path, public = tmp_path / "hearts" / "authority" / "signer.key", Path("server/authority.pub")
    key, before = load_pem_private_key(path.read_bytes(), secret), (tmp_path / "hearts" / public).read_bytes()
    old = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(secret))
    path.write_bytes(old)
    assert not is_scrypt(old)
    assert revoke(tmp_path / "hearts", ["cleveland"]).register.version == 2
    assert is_scrypt(path.read_bytes()) and path.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "hearts" / public).read_bytes() == before
    monkeypatch.setenv("FEDVEIL_PASSPHRASE", "correct horse battery stable")
    with pytest.raises(Refusal, match="does not match this passphrase"):
        revoke(tmp_path / "hearts", ["hungary"])


def test_an_authority_that_must_have_a_passphrase_asks_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, typed = tmp_path / "federation.yaml", iter(("correct horse battery", "correct horse batteri"))
    text = FEDERATION.replace("    request: device/request.toml\n", "")
    file.write_text(text)
    provision(file, tmp_path / "plain", None)
    file.write_text(f"{text}authority: {{passphrase: true}}\n")
    with pytest.raises(Refusal, match=r"is not encrypted, and federation\.yaml requires a passphrase"):
        provision(file, tmp_path / "plain", None)
    with pytest.raises(Refusal, match="set FEDVEIL_PASSPHRASE or FEDVEIL_PASSPHRASE_FILE"):
        provision(file, tmp_path / "hearts", None)
    assert not (tmp_path / "hearts").exists()
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("fedveil.deployment.authority.getpass", lambda _: next(typed))
    with pytest.raises(Refusal, match="the two passphrases differ"):
        provision(file, tmp_path / "hearts", None)
    monkeypatch.setattr("fedveil.deployment.authority.getpass", lambda _: "correct horse battery")
    assert provision(file, tmp_path / "hearts", None).register.version == 1
    assert b"ENCRYPTED" in (tmp_path / "hearts" / "authority" / "signer.key").read_bytes()


def test_keys_of_another_authority_are_not_used(tmp_path: Path) -> None:
    file = tmp_path / "federation.yaml"
    file.write_text(FEDERATION.replace("    request: device/request.toml\n", ""))
    for name in ("one", "other"):
        provision(file, tmp_path / name, None)
    shutil.copy(tmp_path / "other" / "authority" / "ca.key", tmp_path / "one" / "authority" / "ca.key")
    with pytest.raises(Refusal, match="holds no keys of an authority"):
        revoke(tmp_path / "one", ["hungary"])


@pytest.mark.parametrize(
    ("options", "line", "said"),
    [
        ("{rows: 10}", "authority: {token: hearts}", "goes with pkcs11"),
        ("{rows: 10}", "authority: {pkcs11: /usr/lib/a.so}", "goes with pkcs11"),
        ("{rows: 10}", "authority: {pkcs11: /a.so, token: hearts, passphrase: true}", "a token has a PIN"),
        ("{rows: 10}", "authority: {password: abc}", "authority"),
        ("{1: 2}", "", "the key 1 is not text; put it in quotes"),
        ("{yes: 2}", "", "the key True is not text; put it in quotes"),
        ('{x: "\\ud800"}', "", "half of a character is no text"),
    ],
)
def test_contradictions_are_refused_before_there_is_a_bundle(
    tmp_path: Path, options: str, line: str, said: str
) -> None:
    file = tmp_path / "federation.yaml"
    file.write_text(FEDERATION.replace("{rows: 10}", options) + line + "\n")
    with pytest.raises(Refusal, match=said):
        provision(file, tmp_path / "hearts", None)
    assert not (tmp_path / "hearts").exists()


# --- what devices install ---------------------------------------------------------------------------------------


def requirements(out: Path) -> str | None:
    path = out / "clients" / "cleveland" / "requirements.txt"
    return path.read_text() if path.exists() else None


def test_no_bundle_names_a_package_that_is_bound_to_no_bytes(tmp_path: Path) -> None:
    file, out, wheels = tmp_path / "f.yaml", tmp_path / "desk", tmp_path / "wheels"
    file.write_text(SMALL)
    provision(file, out)
    assert requirements(out) is None
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "fedveil-0.1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("fedveil-0.1.0.dist-info/METADATA", "Name: fedveil\nVersion: 0.1.0\n")
    provision(file, out, wheels)
    named = requirements(out)
    assert named is not None and named.startswith("./wheels/fedveil-0.1.0-py3-none-any.whl --hash=sha256:")
    provision(file, out)
    assert requirements(out) == named  # a desk keeps what it has
    with pytest.raises(Refusal, match="needs --wheels"):
        provision(file, out, None, tmp_path / "any.lock")


def test_unverified_code_needs_a_word_that_says_so(tmp_path: Path) -> None:
    file, out = tmp_path / "f.yaml", tmp_path / "desk"
    file.write_text("requirements: unverified_code\n" + SMALL)
    provision(file, out)
    named = requirements(out) or ""
    assert "cryptography==" in named and "\nfedveil" not in named
    rotate(out, ["cleveland"], None)
    assert requirements(out) == named
    # The word is taken back: what stands there without hashes is not handed out again.
    file.write_text(SMALL)
    with pytest.raises(
        Refusal, match=r"has no hash, so the owner of that package can run code .* give --wheels"
    ):
        provision(file, out)
    (out / "authority" / "federation.yaml").write_text(SMALL)
    revoke(out, ["hungary"])
    assert requirements(out) is None


def test_two_cannot_provision_one_folder_at_once(desk: Path) -> None:
    descriptor = os.open(desk / "hearts" / "authority", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(Refusal, match="is being provisioned by another process"):
        revoke(desk / "hearts", ["cleveland"])
    os.close(descriptor)
    assert len(revoke(desk / "hearts", ["cleveland"]).register.admitted) == 2


def test_the_desk_keeps_the_file_that_it_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else saves federation.yaml while a command goes on: nothing of that was checked or admitted."""
    file, out = tmp_path / "f.yaml", tmp_path / "out"
    file.write_text(SMALL)
    honest = provisioning.open_authority

    def meanwhile(*arguments: Any) -> Authority:
        file.write_text(SMALL.replace("[{name: cleveland}, {name: hungary}]", "[{name: cleveland}]"))
        return honest(*arguments)

    monkeypatch.setattr(provisioning, "open_authority", meanwhile)
    provision(file, out)
    assert (out / "authority" / "federation.yaml").read_text() == SMALL
    assert len(revoke(out, ["hungary"]).register.admitted) == 1


def test_a_key_that_was_replaced_is_nobodys_again(desk: Path) -> None:
    """Whoever took a device's keys before they were rotated is not let in with them under another name."""
    hearts = desk / "hearts"
    assert fedveil("client", "request", "new", "--name", "switzerland", folder=desk).returncode == 0
    rotate(hearts, ["switzerland"], desk / "new" / "request.toml")
    with pytest.raises(Refusal, match="that was replaced"):
        rotate(hearts, ["switzerland"], desk / "device" / "request.toml")
    stolen = {name: (desk / "device" / name).read_bytes() for name in SECRETS}
    thief = desk / "thief"
    thief.mkdir()
    for name, data in stolen.items():
        replace_file(thief / name, data)
    identity = load_pem_private_key((thief / "identity.key").read_bytes(), None)
    tls = load_pem_private_key((thief / "tls.key").read_bytes(), None)
    node = load_ssh_private_key((thief / "supernode.key").read_bytes(), None)
    asked = tomli_w.dumps(_request(Keys(identity, tls, node), "mallory"))
    (desk / "device" / "request.toml").write_text(asked)
    text = FEDERATION.replace("  - name: switzerland\n", "  - name: switzerland\n  - name: mallory\n")
    (desk / "federation.yaml").write_text(text)
    with pytest.raises(Refusal, match="that was replaced"):
        provision(desk / "federation.yaml", hearts)


def test_leftovers_of_a_power_cut_stop_nothing(desk: Path) -> None:
    left = desk / "hearts" / "server" / "supernodes" / ".cleveland.pub.new"
    left.write_bytes(b"half")
    assert len(revoke(desk / "hearts", ["cleveland"]).register.admitted) == 2
    assert not left.exists() and not (left.parent / "cleveland.pub").exists()


def test_desk_of_a_file_without_a_client_says_so(desk: Path) -> None:
    kept = desk / "hearts" / "authority" / "federation.yaml"
    kept.write_text(kept.read_text().replace("  - name: cleveland\n", ""))
    with pytest.raises(Refusal, match="clients='cleveland': was admitted and is not in the file"):
        rotate(desk / "hearts", ["hungary"], None)
