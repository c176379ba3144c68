"""An authority whose keys are replaced: devices follow as their owners allow, and a thief of a key leads nobody on."""

import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Message

from fedveil.__main__ import run
from fedveil.base.refusal import Refusal
from fedveil.configs.bundle_files import issued_by
from fedveil.deployment import rollover as rollover_module
from fedveil.deployment.authority import Authority, KeyCare, make_keys, open_authority
from fedveil.deployment.certificate_delivery import CertificateDelivery
from fedveil.deployment.device import authority as device_authority
from fedveil.deployment.device.agent import Agent, newest_credentials
from fedveil.deployment.device.authority import adopt_rollovers, new_fingerprint, pending_rollovers
from fedveil.deployment.device.client_bundle import (
    ClientBundle,
    read_client_bundle,
    renew_roster,
    take_shipped,
)
from fedveil.deployment.device.enrol import _check_authority
from fedveil.deployment.enrolment import issue_tokens
from fedveil.deployment.provision import provision, renew, revoke
from fedveil.deployment.rollover import roll_over
from fedveil.deployment.serve import deployed_in, settings_for
from fedveil.deployment.status import authority_lines
from fedveil.links.enrolment.token import fingerprint_of
from fedveil.links.roster_watch import followed_credentials, followed_rollovers, followed_roster
from fedveil.links.server_bundle import read_server_bundle
from fedveil.links.tree_head import check_head, sign_head
from fedveil.messages.flower_adapter import claim_identity, name_sender
from fedveil.messages.notices import DeviceFacts, facts_reply, read_facts, renewal_to, rollovers_in
from fedveil.privacy.secagg.refusal import Refused
from fedveil.privacy.secagg.rollover import (
    DAY_SECONDS,
    MAX_DAYS,
    Rollover,
    read_chain,
    sign_rollover,
    write_chain,
)
from fedveil.privacy.secagg.roster import Roster, read_roster, write_roster

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm")

FEDERATION = """\
federation: hearts
server: {address: "localhost:8443", listen: "127.0.0.1:8443", enrolment: "localhost:8444"}
task: {name: digits}
policy: {target_epsilon: 8.0, target_delta: 1e-5, require_log: false}
clients: [{name: a}, {name: b}, {name: c}]
"""
DAYS = 10.0
DOUBLY = "post_quantum: true\n"


@pytest.fixture(scope="module", params=["", DOUBLY], ids=["ed25519", "both"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("desk")
    (folder / "f.yaml").write_text(FEDERATION + request.param)
    return provision(folder / "f.yaml", folder / "hearts").folder


@pytest.fixture(autouse=True)
def identity() -> None:
    claim_identity(1)


@pytest.fixture
def desk(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "hearts"))


@pytest.fixture
def device(desk: Path, tmp_path: Path) -> Path:
    """A device of before the rollover, which has run."""
    folder = Path(shutil.copytree(desk / "clients" / "a", tmp_path / "device"))
    take_shipped(read_client_bundle(folder))
    return folder


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], None]]:
    """Return a function that moves the clock to so many days from now."""
    real = time.time

    def move(days: float) -> None:
        monkeypatch.setattr(time, "time", lambda: real() + days * DAY_SECONDS)

    yield move


Clock = Callable[[float], None]


def keys_of(desk: Path) -> Authority:
    return open_authority(desk / "authority", "hearts", KeyCare())


def doubly(desk: Path) -> bool:
    return "post_quantum" in (desk / "authority" / "federation.yaml").read_text()


def chain_of(desk: Path) -> bytes:
    return (desk / "server" / "rollovers.json").read_bytes()


def follow(folder: Path, text: bytes | str, approved: str = "") -> bool:
    bundle = read_client_bundle(folder)
    return adopt_rollovers(bundle.state, bundle.policy, text, "hearts", approved)


def refuses(folder: Path, text: bytes | str, match: str, approved: str = "") -> None:
    """Require that a device refuses rollovers, and stays as it is."""
    before = read_client_bundle(folder).authority
    with pytest.raises(Refusal, match=match):
        follow(folder, text, approved)
    assert read_client_bundle(folder).authority == before


def stated(
    before: Authority, after: Authority, both: bool = False, number: int = 1, **changed: Any
) -> Rollover:
    """Return a rollover that nobody has signed."""
    now = int(time.time())
    values: dict[str, Any] = {
        "federation": "hearts",
        "number": number,
        "old": before.public(both).hex(),
        "new": after.public(both).hex(),
        "old_ca": before.ca_pem.decode(),
        "new_ca": after.ca_pem.decode(),
        "at": now,
        "until": now + DAY_SECONDS,
    }
    return Rollover(**{**values, **changed})


def stranger(folder: Path, federation: str = "hearts") -> Authority:
    (folder / "stranger").mkdir(exist_ok=True)
    return make_keys(folder / "stranger", federation, KeyCare(), 1)


def newer_roster(bundle: ClientBundle, desk: Path, by: Ed25519PrivateKey) -> bytes:
    """Return the next version of a device's roster, signed by one key alone."""
    old = bundle.identity.roster
    following = Roster(old.version + 1, old.members, (*old.earlier, old.hash))
    return write_roster(following, by, doubly=doubly(desk))


def demand(folder: Path, line: str) -> None:
    path = folder / "policy.toml"
    path.write_text(f"{line}\n{path.read_text()}")


# --- what holds ----------------------------------------------------------------------------------------------------


def test_a_device_follows_and_takes_both_keys_until_the_overlap_ends(
    desk: Path, device: Path, clock: Clock
) -> None:
    old, before = keys_of(desk), read_client_bundle(device).authority.key
    done = roll_over(desk, DAYS)
    new, both = done.authority, doubly(desk)
    assert follow(device, chain_of(desk)) and not follow(device, chain_of(desk))
    bundle = read_client_bundle(device)
    assert before == old.public(both) and bundle.authority.key == new.public(both)
    for by in (old.signer, new.signer):
        assert renew_roster(bundle, newer_roster(bundle, desk, by)).identity.roster.version == 2
        shutil.rmtree(device / "state" / "ledgers", ignore_errors=True)
        (device / "state" / "roster.bin").write_bytes((device / "roster.bin").read_bytes())
        bundle = read_client_bundle(device)
    clock(DAYS + 1)
    with pytest.raises(Refusal, match="is not signed by the authority"):
        renew_roster(bundle, newer_roster(bundle, desk, old.signer))
    assert read_client_bundle(device).identity.roster.version == 1  # the device's own, under the old key
    assert renew_roster(bundle, newer_roster(bundle, desk, new.signer)).identity.roster.version == 2


def test_roster_under_the_old_key_alone_ends_with_the_overlap(desk: Path, device: Path, clock: Clock) -> None:
    old = keys_of(desk)
    roll_over(desk, DAYS)
    follow(device, chain_of(desk))
    (device / "roster.bin").write_bytes(newer_roster(read_client_bundle(device), desk, old.signer))
    assert read_client_bundle(device).identity.roster.version == 2
    clock(DAYS + 1)
    assert read_client_bundle(device).identity.roster.version == 1


def test_desk_signs_with_both_keys_until_the_overlap_ends(desk: Path, clock: Clock) -> None:
    old, both = keys_of(desk), doubly(desk)
    new = roll_over(desk, DAYS).authority
    signed = (desk / "server" / "roster.bin").read_bytes()
    rosters = [read_roster(signed, each.public(both)) for each in (old, new)]
    assert rosters[0] == rosters[1] and rosters[0].version == 2
    for name in ("signer.key", "ca.key"):
        assert (desk / "authority" / name).exists() and (desk / "authority" / "keys-2" / name).exists()
    clock(DAYS + 1)
    revoke(desk, ["c"])
    signed = (desk / "server" / "roster.bin").read_bytes()
    assert read_roster(signed, new.public(both)).version == 3
    with pytest.raises(Refused):
        read_roster(signed, old.public(both))
    for name in ("signer.key", "ca.key"):
        assert not (desk / "authority" / name).exists() and (desk / "authority" / "keys-2" / name).exists()
    assert not (desk / "server" / "tls.former.pem").exists()
    assert not (desk / "clients" / "b" / "rollovers.json").exists()


def test_server_shows_the_key_of_every_device_and_changes_by_itself(
    desk: Path, device: Path, clock: Clock
) -> None:
    old_ca = read_client_bundle(device).roots
    running = followed_credentials(read_server_bundle(desk / "server"))
    roster = followed_roster(read_server_bundle(desk / "server"))
    assert running().earlier == b"" and roster()[0].version == 1
    new = roll_over(desk, DAYS).authority
    assert roster()[0].version == 2
    late = read_client_bundle(device)
    follow(device, chain_of(desk))
    bundle = read_client_bundle(device)

    def trusts(roots: bytes) -> bool:
        return issued_by(x509.load_pem_x509_certificate(running().certificate), roots)

    head = sign_head("hearts", 0, bytes(32), running())
    assert trusts(old_ca) and trusts(bundle.roots) and not trusts(new.ca_pem)
    check_head(head, late.roots, "hearts")
    check_head(head, bundle.roots, "hearts")
    assert issued_by(x509.load_pem_x509_certificate(late.credentials.certificate), running().earlier)
    clock(DAYS + 1)
    assert not trusts(old_ca) and trusts(bundle.roots) and bundle.roots == new.ca_pem
    with pytest.raises(Refusal, match="was not signed by the server"):
        check_head(head, newest_credentials(bundle).ca, "hearts")
    with pytest.raises(Refusal, match="was not signed by the server"):
        check_head(sign_head("hearts", 0, bytes(32), running()), old_ca, "hearts")


def test_device_admitted_during_the_overlap_trusts_the_server(desk: Path, clock: Clock) -> None:
    roll_over(desk, DAYS)
    shown = followed_credentials(read_server_bundle(desk / "server"))
    fresh = read_client_bundle(desk / "clients" / "b")
    assert fresh.policy.authority == keys_of(desk).public(doubly(desk)).hex()
    assert issued_by(x509.load_pem_x509_certificate(shown().certificate), fresh.roots)
    clock(DAYS + 1)
    assert issued_by(x509.load_pem_x509_certificate(shown().certificate), fresh.roots)
    assert len(fresh.authority.keys(time.time())) == 1


@pytest.mark.parametrize("shorter", ["", "certificate_days: 5\n"], ids=["as long", "shorter"])
def test_running_agent_gets_notice_and_its_certificate(desk: Path, device: Path, shorter: str) -> None:
    """Also one that ends before its old one, which the old authority signed."""
    file, agent = desk / "authority" / "federation.yaml", Agent(read_client_bundle(device))
    file.write_text(file.read_text() + shorter)
    old = (device / "tls.pem").read_bytes()
    roll_over(desk, DAYS)
    pem = json.loads((desk / "server" / "certificates.json").read_text())["2"]
    facts = read_facts(agent.handle(renewal_to(2, pem, chain_of(desk).decode())))
    assert facts is not None and facts.authority == read_client_bundle(device).authority.fingerprint
    assert newest_credentials(read_client_bundle(device)).certificate == pem.encode()
    new = keys_of(desk)
    assert issued_by(x509.load_pem_x509_certificate(pem.encode()), new.ca_pem)
    assert facts.authority == fingerprint_of(new.ca_pem, new.public(doubly(desk))).hex()
    agent.handle(renewal_to(2, old.decode(), ""))  # from a server that wants the old one back
    assert newest_credentials(read_client_bundle(device)).certificate == pem.encode()


def test_a_courier_carries_the_rollovers_to_each_device_once(desk: Path) -> None:
    sent: list[str] = []

    class Grid:
        def send_and_receive(self, messages: Iterable[Message], *, timeout: float) -> Iterator[Message]:
            for each in messages:
                sent.append(rollovers_in(each))
                yield name_sender(facts_reply(each, DeviceFacts("1", 1, 1, ())), 2)

    rollovers = followed_rollovers(read_server_bundle(desk / "server"))
    delivery = CertificateDelivery(Grid(), lambda: {2: 1.0}, dict, rollovers)  # type: ignore[arg-type]
    assert [delivery.deliver() for _ in range(2)] == [1, 0]
    roll_over(desk, DAYS)
    assert [delivery.deliver() for _ in range(2)] == [1, 0]
    assert sent == ["", chain_of(desk).decode()]


def test_a_status_names_the_devices_that_do_not_follow_yet() -> None:
    told = [("a", "11" * 32), ("b", "22" * 32), ("c", "11" * 32), ("d", ""), ("e", None)]
    clients = [{"name": name, "authority": held} for name, held in told]
    assert authority_lines(clients) == [f"authority {'1' * 16}: 2, a, c", f"authority {'2' * 16}: 1, b"]
    assert authority_lines(clients[::2]) == []


def test_the_ledgers_of_a_federation_stay_its_own(desk: Path) -> None:
    def owner() -> str:
        bundle = read_server_bundle(desk / "server")
        return deployed_in(bundle, settings_for(bundle, ["task=digits"])).owner

    before = owner()
    roll_over(desk, DAYS)
    roll_over(desk, DAYS)
    assert owner() == before


def test_approval_of_an_owner_is_waited_for_without_a_restart(
    desk: Path, device: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demand(device, "approve_authority = true")
    running = read_client_bundle(device)
    last = roll_over(desk, DAYS).authority.rollovers[-1]
    for _ in range(2):
        refuses(device, chain_of(desk), "waits for its owner; compare .* --approve FINGERPRINT")
    assert pending_rollovers(device / "state", "hearts")[-1] == last
    capsys.readouterr()
    run(["client", "status", str(device)])
    assert f"rollover 1, new fingerprint {new_fingerprint(last)}" in capsys.readouterr().out
    assert run(["client", "authority", str(device), "--approve", "ab" * 32]) == 2
    assert "--approve names another" in capsys.readouterr().err
    assert len(running.authority.keys(time.time())) == 1
    assert run(["client", "authority", str(device), "--approve", new_fingerprint(last)]) == 0
    assert running.authority.key.hex() == last.new and not pending_rollovers(device / "state", "hearts")
    assert new_fingerprint(last) in capsys.readouterr().out
    assert new_fingerprint(last) in (device / "state" / "authorities.jsonl").read_text()
    assert run(["client", "forget", str(device)]) == 0
    assert read_client_bundle(device).authority.key.hex() == last.new
    assert run(["client", "authority", str(device), "--approve", new_fingerprint(last)]) == 2
    assert "no rollover waits" in capsys.readouterr().err


def test_a_device_that_comes_after_the_overlap_needs_its_owner(
    desk: Path, device: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    last = roll_over(desk, DAYS).authority.rollovers[-1]
    (device / "rollovers.json").write_bytes(chain_of(desk))
    clock(DAYS + 1)
    refuses(
        device, chain_of(desk), "has ended its overlap, so that the old key alone proves nothing; compare"
    )
    argv = ["client", "authority", str(device), "--rollover", str(desk / "server" / "rollovers.json")]
    assert run(argv) == 2 and "compare" in capsys.readouterr().err
    assert run([*argv, "--approve", new_fingerprint(last)]) == 0
    bundle = read_client_bundle(device)
    assert bundle.authority.keys(time.time()) == (bytes.fromhex(last.new),)
    assert renew_roster(bundle, (desk / "server" / "roster.bin").read_bytes()).identity.roster.version == 2


def test_next_command_completes_a_rollover_cut_short(
    desk: Path, device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    first, server = keys_of(desk), read_server_bundle(desk / "server").authority
    for name in ("sign_rollover", "publish"):
        with monkeypatch.context() as patched:
            patched.setattr(rollover_module, name, killed)
            with pytest.raises(KeyboardInterrupt):
                roll_over(desk, DAYS)
        assert read_server_bundle(desk / "server").authority == server
        done = len(keys_of(desk).rollovers)
        assert done == (name == "publish")
        if not done:
            assert renew(desk, [], 0).authority.public(False) == first.public(False)
    done = renew(desk, [], 0)
    assert read_server_bundle(desk / "server").authority == done.authority.public(doubly(desk))
    assert follow(device, chain_of(desk)) and read_client_bundle(desk / "clients" / "b")


def test_a_disk_that_fails_leaves_the_authority_in_force(
    desk: Path, device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roll_over(desk, DAYS)
    before = read_client_bundle(device).authority

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(device_authority, "replace_file", fails)
        with pytest.raises(OSError, match="No space"):
            follow(device, chain_of(desk))
    assert read_client_bundle(device).authority == before
    assert follow(device, chain_of(desk))


def test_new_token_names_the_authority_of_the_device_and_old_ones_end(
    desk: Path, device: Path, clock: Clock
) -> None:
    issue_tokens(desk, ["a"])
    old, both = keys_of(desk), doubly(desk)
    new = roll_over(desk, DAYS).authority
    assert json.loads((desk / "server" / "tokens.json").read_text()) == {}
    (token,) = issue_tokens(desk, ["a"])
    assert token.fingerprint == fingerprint_of(new.ca_pem, new.public(both))
    with pytest.raises(Refusal, match=r"is of another authority than .*--rollover rollovers\.json"):
        _check_authority(token, device, new.public(both))
    follow(device, chain_of(desk))
    for each in (old, new):
        _check_authority(token, device, each.public(both))
    clock(DAYS + 1)
    _check_authority(token, device, new.public(both))
    with pytest.raises(Refusal, match="is of another authority"):
        _check_authority(token, device, old.public(both))


def test_keys_under_a_passphrase_roll_over_under_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDVEIL_PASSPHRASE", "correct horse battery")
    (tmp_path / "f.yaml").write_text(FEDERATION + "authority: {passphrase: true}\n")
    provision(tmp_path / "f.yaml", tmp_path / "hearts")
    roll_over(tmp_path / "hearts", DAYS)
    for name in ("signer.key", "ca.key"):
        assert b"ENCRYPTED" in (tmp_path / "hearts" / "authority" / "keys-2" / name).read_bytes()


def test_policies_are_silent_about_absent_demands(desk: Path) -> None:
    """A device of an earlier release would not know it."""
    assert "approve_authority" not in (desk / "clients" / "a" / "policy.toml").read_text()


# --- attacks -------------------------------------------------------------------------------------------------------


def forged(kind: str, desk: Path, tmp_path: Path) -> tuple[str, str]:
    """Return a chain that must not be followed, and why."""
    own, other, both = keys_of(desk), stranger(tmp_path), doubly(desk)
    plain = stated(own, other, both)
    now = int(time.time())
    signed = sign_rollover(plain, own.signer, other.signer)
    match kind:
        case "a stranger signs for the old key":
            return write_chain(
                [sign_rollover(plain, other.signer, other.signer)]
            ), "is not that of this device"
        case "nobody signs with the new key":
            return write_chain([replace(signed, by_new=signed.by_old)]), "is not that of this device"
        case "nobody signs":
            return write_chain([replace(signed, by_old="", by_new="")]), "is not that of this device"
        case "a later end is written over":
            return write_chain([replace(signed, until=now + 2 * DAY_SECONDS)]), "is not that of this device"
        case "a certificate is written over":
            return write_chain([replace(signed, new_ca=own.ca_pem.decode())]), "is not that of this device"
        case "another federation's":
            far = make_keys(tmp_path / "stranger", "others", KeyCare(), 1)
            named = stated(own, far, both, federation="others")
            return write_chain([sign_rollover(named, own.signer, far.signer)]), "is not that of this device"
        case "the overlap has no end":
            until = now + (MAX_DAYS + 1) * DAY_SECONDS
            endless = sign_rollover(replace(plain, until=until), own.signer, other.signer)
            return write_chain([endless]), f"ends in more than {MAX_DAYS} days"
        case "a statement of the future":
            at = now + 1000 * DAY_SECONDS
            far_off = replace(plain, at=at, until=at + DAY_SECONDS)
            return write_chain([sign_rollover(far_off, own.signer, other.signer)]), "ends in more than"
        case "the overlap is over":
            past = replace(plain, at=now - 2 * DAY_SECONDS, until=now - DAY_SECONDS)
            return write_chain([sign_rollover(past, own.signer, other.signer)]), "has ended its overlap"
        case "the overlap ends before it begins":
            empty = replace(plain, at=now + 60, until=now + 30)
            return write_chain([sign_rollover(empty, own.signer, other.signer)]), "ends before it begins"
        case "a second one behind it":
            again = stated(other, own, both, number=2)
            chain = [signed, sign_rollover(again, other.signer, own.signer)]
            return write_chain(chain), "a key returns"
        case "a chain that begins elsewhere":
            alone = stated(other, stranger(tmp_path / "stranger"), both)
            return write_chain(
                [sign_rollover(alone, other.signer, stranger(tmp_path / "stranger").signer)]
            ), "policy.toml|not that"
        case "ML-DSA is dropped":
            weak = stated(own, other, both, new=other.public(False).hex())
            said = "drops ML-DSA" if both else "--approve|own"
            return write_chain([sign_rollover(weak, own.signer, other.signer)]), said
        case "no chain":
            return "{}", "is not that of this device"
        case _:
            return signed.by_old, "is not that of this device"


KINDS = (
    "a stranger signs for the old key",
    "nobody signs with the new key",
    "nobody signs",
    "a later end is written over",
    "a certificate is written over",
    "another federation's",
    "the overlap has no end",
    "a statement of the future",
    "the overlap is over",
    "the overlap ends before it begins",
    "a second one behind it",
    "a chain that begins elsewhere",
    "ML-DSA is dropped",
    "no chain",
    "no text",
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_false_rollover_leads_no_device_on(kind: str, desk: Path, device: Path, tmp_path: Path) -> None:
    if kind == "ML-DSA is dropped" and not doubly(desk):
        pytest.skip("there is none")
    text, why = forged(kind, desk, tmp_path)
    refuses(device, text, why)
    agent = Agent(read_client_bundle(device))
    facts = read_facts(agent.handle(renewal_to(2, "", text)))
    assert facts is not None and facts.authority == read_client_bundle(device).authority.fingerprint
    (device / "rollovers.json").write_text(text)
    assert read_client_bundle(device).authority.last is None


def test_an_old_rollover_leads_nobody_back(desk: Path, device: Path) -> None:
    both, keys = doubly(desk), [keys_of(desk)]
    texts = list[bytes]()
    for _ in range(2):
        keys.append(roll_over(desk, DAYS).authority)
        texts.append(chain_of(desk))
        assert follow(device, texts[-1])
    assert not follow(device, texts[0])
    bundle = read_client_bundle(device)
    assert bundle.authority.key == keys[2].public(both)
    # The key before the last counts; the one before that does not, whatever its own overlap said.
    assert renew_roster(bundle, newer_roster(bundle, desk, keys[1].signer)).identity.roster.version == 2
    with pytest.raises(Refusal, match="is not signed by the authority"):
        renew_roster(bundle, newer_roster(bundle, desk, keys[0].signer))


@pytest.mark.parametrize("thief", [0, 1])
def test_a_replaced_key_signs_no_other_rollover(desk: Path, device: Path, tmp_path: Path, thief: int) -> None:
    both, keys = doubly(desk), [keys_of(desk)]
    for _ in range(2):
        keys.append(roll_over(desk, DAYS).authority)
        follow(device, chain_of(desk))
    other, known = stranger(tmp_path), read_chain(chain_of(desk))
    own = stated(keys[thief], other, both, number=thief + 1)
    chain = [*known[:thief], sign_rollover(own, keys[thief].signer, other.signer)]
    refuses(device, write_chain(chain), "contradicts the one in force here")
    refuses(device, write_chain(chain), "contradicts", new_fingerprint(chain[-1]))


def test_first_of_two_waiting_rollovers_stays_unless_owners_choose(
    desk: Path, device: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    demand(device, "approve_authority = true")
    own, other, both = keys_of(desk), stranger(tmp_path), doubly(desk)
    false = write_chain([sign_rollover(stated(own, other, both), own.signer, other.signer)])
    true = roll_over(desk, DAYS).authority.rollovers[-1]
    for text in (false, chain_of(desk)):
        refuses(device, text, "waits for its owner")
    assert "the old key has signed two" in caplog.text
    assert pending_rollovers(device / "state", "hearts")[-1].new == other.public(both).hex()
    file = str(desk / "server" / "rollovers.json")
    assert (
        run(["client", "authority", str(device), "--rollover", file, "--approve", new_fingerprint(true)]) == 0
    )
    assert read_client_bundle(device).authority.key.hex() == true.new and not pending_rollovers(
        device / "state", "hearts"
    )


@pytest.mark.parametrize("days", [0, -1.0, MAX_DAYS + 0.5, float("nan")])
def test_the_desk_refuses_an_overlap_that_is_none_or_too_long(desk: Path, days: float) -> None:
    with pytest.raises(Refusal, match="must be above 0 and at most 90"):
        roll_over(desk, days)
    assert keys_of(desk).rollovers == () and not (desk / "authority" / "keys-2").exists()


def test_a_server_refuses_rollovers_that_lead_elsewhere(desk: Path) -> None:
    (old,) = [(desk / "server" / "authority.pub").read_bytes()]
    roll_over(desk, DAYS)
    (desk / "server" / "authority.pub").write_bytes(old)
    with pytest.raises(Refusal, match="leads to another key than authority"):
        read_server_bundle(desk / "server")
