"""A bundle that was tampered with, mixed up or left open is refused by its reader, in one sentence."""

import json
import os
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.base.refusal import Refusal
from fedveil.deployment import authority
from fedveil.deployment.device.client_bundle import TaskChoice, read_client_bundle
from fedveil.deployment.device.commands import state_of
from fedveil.deployment.device.enrolment import read_request, write_request
from fedveil.deployment.provision import provision
from fedveil.links.server_bundle import read_server_bundle
from fedveil.privacy.secagg.roster import Member, Roster, write_roster

FEDERATION = """\
federation: {name}
server: {{address: "localhost:8443"}}
task: {{name: heart}}
policy: {{target_epsilon: 8.0, target_delta: 1e-5}}
clients: [{{name: cleveland}}, {{name: hungary}}]
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two federations with clients of the same names."""
    folder = tmp_path_factory.mktemp("desks")
    for name in ("hearts", "lungs"):
        (folder / f"{name}.yaml").write_text(FEDERATION.format(name=name))
        provision(folder / f"{name}.yaml", folder / name, None)
    return folder


@pytest.fixture
def desk(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "desk"))


def swap(one: str, other: str) -> Callable[[Path], object]:
    """The file of this name comes from elsewhere among the two federations."""
    return lambda desk: shutil.copy(desk / other, desk / "hearts/clients/cleveland" / one)


def edit(name: str, old: str, new: str) -> Callable[[Path], object]:
    def change(desk: Path) -> None:
        path = desk / "hearts/clients/cleveland" / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return change


def flip(name: str) -> Callable[[Path], object]:
    def change(desk: Path) -> None:
        path = desk / "hearts/clients/cleveland" / name
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    return change


def without(name: str) -> Callable[[Path], object]:
    return lambda desk: (desk / "hearts/clients/cleveland" / name).unlink()


def opened(name: str, mode: int) -> Callable[[Path], object]:
    return lambda desk: (desk / "hearts/clients/cleveland" / name).chmod(mode)


def replaced_by_fifo(desk: Path) -> None:
    path = desk / "hearts/clients/cleveland/tls.key"
    path.unlink()
    os.mkfifo(path, 0o600)


def forged_roster(desk: Path) -> None:
    """Whoever is not the authority admits himself."""
    key = Ed25519PrivateKey.generate()
    members = (Member(2, "cleveland", key.public_key().public_bytes_raw(), 2**40),)
    (desk / "hearts/clients/cleveland/roster.bin").write_bytes(write_roster(Roster(9, members), key))


def older_roster(desk: Path) -> None:
    edit("policy.toml", "minimum_roster_version = 1", "minimum_roster_version = 2")(desk)


TAMPERED = [
    (swap("roster.bin", "lungs/clients/cleveland/roster.bin"), "was not signed by the authority"),
    (flip("roster.bin"), "was not signed by the authority"),
    (forged_roster, "was not signed by the authority"),
    (older_roster, "has version 1; the policy requires 2"),
    (
        swap("identity.key", "hearts/clients/hungary/identity.key"),
        "with this key: it was revoked or has new keys",
    ),
    (swap("identity.key", "hearts/clients/hungary/tls.key"), "is not an Ed25519 key"),
    (swap("tls.key", "hearts/clients/hungary/tls.key"), "is not the key of the certificate"),
    (swap("tls.pem", "hearts/clients/hungary/tls.pem"), "is not the key of the certificate"),
    (swap("tls.pem", "lungs/clients/cleveland/tls.pem"), "was not signed by the authority in ca.pem"),
    (swap("ca.pem", "lungs/clients/cleveland/ca.pem"), "was not signed by the authority in ca.pem"),
    (swap("ca.pem", "hearts/clients/cleveland/tls.pem"), "was not signed by the authority in ca.pem"),
    (flip("tls.pem"), "tls.pem"),
    (edit("client.toml", '"hearts"', '"lungs"'), "was not made for 'cleveland' of the federation 'lungs'"),
    (edit("client.toml", '"cleveland"', '"hungary"'), "hungary"),
    (edit("client.toml", "node = 2", "node = 3"), "it was revoked or has new keys"),
    (edit("client.toml", "node = 2", "node = 1"), "client.toml.node=1: must be from 2"),
    (edit("client.toml", "node", "nodde"), "did you mean 'node'?"),
    (edit("client.toml", "unmetered", "unmeterd"), "did you mean 'unmetered'?"),
    (edit("client.toml", "[task]", "[task"), "is not TOML"),
    (edit("policy.toml", "target_epsilon = 8.0", 'target_epsilon = "8.0"'), "must be a number, not text"),
    (
        edit("policy.toml", "minimum_cohort = 3\n", ""),
        "policy.toml.minimum_cohort=None: is missing; must be a whole number",
    ),
    (edit("policy.toml", 'authority = "', 'authority = "00'), "32 or 64 bytes in hexadecimal"),
    (without("policy.toml"), "cannot be read (No such file"),
    (without("tls.key"), "cannot be read (No such file"),
    (opened("identity.key", 0o640), "may be read by others; run: chmod 600"),
    (opened("tls.key", 0o604), "may be read by others; run: chmod 600"),
    (replaced_by_fifo, "is not a regular file"),
]


@pytest.mark.parametrize(("tamper", "said"), TAMPERED, ids=range(len(TAMPERED)))
def test_a_client_refuses_a_bundle_that_is_not_whole(
    tamper: Callable[[Path], object], said: str, desk: Path
) -> None:
    folder = desk / "hearts" / "clients" / "cleveland"
    read_client_bundle(folder)
    tamper(desk)
    with pytest.raises(Refusal) as refused:
        read_client_bundle(folder)
    told = str(refused.value).splitlines()
    assert any(said in each for each in told) and len(told) <= 2


def test_client_refuses_the_whole_bundle_of_another(desk: Path) -> None:
    folder, other = desk / "hearts/clients/cleveland", desk / "lungs/clients/cleveland"
    for name in ("client.toml", "policy.toml"):
        shutil.copy(folder / name, other / name)
    with pytest.raises(Refusal, match="of the federation 'hearts'"):
        read_client_bundle(other)


def test_a_node_key_that_was_opened_or_cut_is_refused(desk: Path) -> None:
    folder = desk / "hearts" / "clients" / "cleveland"
    read_client_bundle(folder)
    (folder / "state" / "node.key").write_bytes(bytes(31))
    with pytest.raises(Refusal, match="is not 32 bytes long"):
        read_client_bundle(folder)
    (folder / "state" / "node.key").chmod(0o644)
    with pytest.raises(Refusal, match="may be read by others"):
        read_client_bundle(folder)


@pytest.fixture(scope="module")
def bundle_files(made: Path) -> dict[str, bytes]:
    folder = made / "hearts" / "clients" / "cleveland"
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.filterwarnings(
    "ignore::cryptography.utils.CryptographyDeprecationWarning"
)  # of what was changed
@settings(max_examples=150)
@given(data=st.data())
def test_bundle_with_changed_bytes_is_refused_or_means_the_same(
    data: st.DataObject, bundle_files: dict[str, bytes], tmp_path: Path
) -> None:
    trusted = ("ca.pem", "tls.pem", "tls.key", "identity.key", "roster.bin")
    name = data.draw(st.sampled_from(trusted))
    changed = bytearray(bundle_files[name])
    for place in data.draw(st.lists(st.integers(0, len(changed) - 1), min_size=1, max_size=3)):
        changed[place] = data.draw(st.integers(0, 255))
    for each, content in {**bundle_files, name: bytes(changed)}.items():
        (tmp_path / each).write_bytes(content)
        (tmp_path / each).chmod(0o600)
    try:
        bundle = read_client_bundle(tmp_path)
    except Refusal:
        return
    (tmp_path / name).write_bytes(bundle_files[name])
    kept = read_client_bundle(tmp_path)
    assert bundle.identity.roster == kept.identity.roster
    assert bundle.identity.key.private_bytes_raw() == kept.identity.key.private_bytes_raw()


def test_expired_certificate_is_refused_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(authority, "CLOCK_MARGIN", timedelta(days=3))
    (tmp_path / "f.yaml").write_text(FEDERATION.format(name="hearts") + "certificate_days: 1\n")
    real = authority.datetime

    class Earlier(real):
        @classmethod
        def now(cls, tz=None):  # type: ignore[no-untyped-def]
            return real.now(tz) - timedelta(days=2)

    monkeypatch.setattr(authority, "datetime", Earlier)
    provision(tmp_path / "f.yaml", tmp_path / "hearts", None)
    for read, folder in ((read_client_bundle, "clients/cleveland"), (read_server_bundle, "server")):
        with pytest.raises(Refusal, match=r"ended on \d+-\d+-\d+; ask for new ones"):
            read(tmp_path / "hearts" / folder)


SERVER_TAMPERED = [
    ("admitted.json", b"[]", "must be a mapping"),
    ("admitted.json", b"{", "is not JSON"),
    ("admitted.json", json.dumps({"00" * 32: 1}).encode(), "is not a fingerprint and a node"),
    ("admitted.json", json.dumps({"00" * 32: True}).encode(), "is not a fingerprint and a node"),
    ("admitted.json", json.dumps({"0": 2}).encode(), "is not a fingerprint and a node"),
    ("authority.pub", b"00" * 31, "must hold 32 or 64 bytes in hexadecimal"),
    ("authority.pub", b"00" * 32, "was not signed by the authority"),
    ("server.toml", b'federation = "hearts"\nlisten = "localhost"\n', "must be host:port"),
    ("server.toml", b'federation = "hearts"\nlisten = "a:1"\nlinks = "grpc"\n', "did you mean 'link'?"),
]


@pytest.mark.parametrize(("name", "data", "said"), SERVER_TAMPERED)
def test_a_server_refuses_a_bundle_that_is_not_whole(name: str, data: bytes, said: str, desk: Path) -> None:
    (desk / "hearts" / "server" / name).write_bytes(data)
    with pytest.raises(Refusal) as refused:
        read_server_bundle(desk / "hearts" / "server")
    told = str(refused.value).splitlines()
    assert any(said in each for each in told) and len(told) <= 2


def test_a_clients_folder_is_no_servers(desk: Path) -> None:
    shutil.copy(desk / "hearts/clients/cleveland/tls.pem", desk / "hearts/server/tls.pem")
    shutil.copy(desk / "hearts/clients/cleveland/tls.key", desk / "hearts/server/tls.key")
    with pytest.raises(Refusal, match="was not made for 'server'"):
        read_server_bundle(desk / "hearts" / "server")


WRITABLE = [
    *((read_client_bundle, f"clients/cleveland/{name}") for name in ("policy.toml", "client.toml", "")),
    *(
        (read_server_bundle, f"server/{name}")
        for name in ("admitted.json", "authority.pub", "server.toml", "")
    ),
    (state_of, "clients/cleveland/policy.toml"),
]


@pytest.mark.parametrize("mode", [0o020, 0o002])
@pytest.mark.parametrize(("read", "name"), WRITABLE)
def test_a_file_that_others_may_change_is_nobodys_word(
    read: Callable[[Path], object], name: str, mode: int, desk: Path
) -> None:
    path = desk / "hearts" / name
    folder = path if path.is_dir() else path.parent
    read(folder)
    path.chmod(path.stat().st_mode | mode)
    with pytest.raises(Refusal, match="may be written by others; run: chmod go-w"):
        read(folder)


# --- requests ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def request_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_request(tmp_path_factory.mktemp("device"), "hungary")


def test_request_names_the_keys_in_its_folder(request_file: Path) -> None:
    assert read_request(request_file).name == "hungary"
    with pytest.raises(Refusal, match="already holds keys"):
        write_request(request_file.parent, "hungary")
    with pytest.raises(Refusal, match="must be at most 48 of a-z"):
        write_request(request_file.parent / "new", "../hungary")
    assert not (request_file.parent / "new").exists()


@settings(max_examples=60)
@given(place=st.integers(0, 2000), bit=st.integers(0, 7))
def test_a_request_with_one_bit_changed_asks_for_nothing_else(
    place: int, bit: int, request_file: Path, tmp_path: Path
) -> None:
    data = bytearray(request_file.read_bytes())
    data[place % len(data)] ^= 1 << bit
    (tmp_path / "request.toml").write_bytes(data)
    try:
        found = read_request(tmp_path / "request.toml")
    except Refusal:
        return
    kept = read_request(request_file)
    assert (found.name, found.identity, found.fingerprint) == (kept.name, kept.identity, kept.fingerprint)


def test_a_request_cannot_take_anothers_keys_or_name(desk: Path) -> None:
    write_request(desk / "device", "ohio")
    text = FEDERATION.format(name="hearts")
    more = text.replace("{name: hungary}", "{name: hungary}, {name: ohio, request: device/request.toml}")
    (desk / "hearts.yaml").write_text(more.replace("ohio", "iowa"))
    with pytest.raises(Refusal, match="'ohio': was made for a client other than iowa"):
        provision(desk / "hearts.yaml", desk / "hearts", None)
    (desk / "hearts.yaml").write_text(more)
    assert [
        each.name for each in provision(desk / "hearts.yaml", desk / "hearts", None).register.admitted
    ] == [
        "cleveland",
        "hungary",
        "ohio",
    ]


def test_one_key_is_one_clients_for_ever(desk: Path) -> None:
    from fedveil.deployment.device.enrolment import Enrolment
    from fedveil.deployment.register import read_register

    register = read_register(desk / "hearts/authority/register.json")
    own = read_request(write_request(desk / "device", "ohio"))
    taken = register.clients[0]
    register.refuse_shared([own])
    for shared in (
        Enrolment("ohio", bytes.fromhex(taken.identity), own.tls, own.supernode),
        Enrolment("ohio", own.identity, own.tls, taken.supernode),
    ):
        with pytest.raises(Refusal, match="holds a key of cleveland"):
            register.refuse_shared([shared])
    with pytest.raises(Refusal, match="holds a key of ohio"):
        register.refuse_shared(
            [
                own,
                Enrolment(
                    "iowa",
                    Ed25519PrivateKey.generate().public_key().public_bytes_raw(),
                    own.tls,
                    own.supernode,
                ),
            ]
        )


def test_a_bundle_has_the_schema_or_the_language_model(tmp_path: Path) -> None:
    choices = (
        TaskChoice(name="csv", data="rows.csv", client=0),
        TaskChoice(name="text", data="letters", client=0, options={"base": "model.gguf", "tokens": 9}),
        TaskChoice(name="digits", client=0),
    )
    shared = [each.shared(tmp_path) for each in choices]
    assert shared == [
        {"schema": str(tmp_path / "schema.yaml")},
        {"base": str(tmp_path / "model.gguf")},
        {},
    ]
