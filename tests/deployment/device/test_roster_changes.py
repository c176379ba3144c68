"""With whom a device is summed: its owner sees each change, may pin peers, and is never charged for less than it loses."""

import json
import logging
import math
import runpy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedveil.__main__ import run
from fedveil.base.refusal import Refusal
from fedveil.client import secure_update
from fedveil.configs.bundle_files import read_toml
from fedveil.deployment.device import roster_changes
from fedveil.deployment.device.client_bundle import read_client_bundle, renew_roster, take_shipped
from fedveil.deployment.device.owner_policy import OwnerPolicy
from fedveil.deployment.provision import cosign as cosign_at_desk
from fedveil.deployment.provision import provision, revoke
from fedveil.deployment.register import read_register
from fedveil.links.roster_watch import followed_roster
from fedveil.links.server_bundle import read_server_bundle
from fedveil.privacy.ledger.acts import acting_user
from fedveil.privacy.ledger.ledger import read_entries, verify
from fedveil.privacy.ledger.ledger_state import RESERVE
from fedveil.privacy.mechanisms.sizing import ShareSpec, size_shares
from fedveil.privacy.mechanisms.sum_spec import SumSpec
from fedveil.privacy.secagg.refusal import Refused
from fedveil.privacy.secagg.roster import (
    UNKNOWN,
    Member,
    Roster,
    cosignatures_in,
    cosigned_by,
    read_roster,
    write_roster,
)
from fedveil.privacy.secagg.suite import public_of, sign
from fedveil.privacy.secagg.transcript import Profile, Purpose, digest
from fedveil.server.masking import Masking

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm")

MADE = runpy.run_path(str(Path(__file__).parents[2] / "faults" / "devices.py"))
Devices, device_of, make_federation, masked_sum = (
    MADE[name] for name in ("Devices", "device_of", "make_federation", "masked_sum")
)
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PEOPLE = tuple(Member(2 + place, f"m{place}", bytes([place]) * 32, 2_000_000_000) for place in range(4))


# --- the chain -----------------------------------------------------------------------------------------------------


def grown(old: Roster, *members: Member) -> Roster:
    return Roster(old.version + 1, members, (*old.earlier, old.hash))


def test_roster_follows_from_every_version_of_its_chain_alone() -> None:
    first = Roster(1, PEOPLE[:2])
    second = grown(first, *PEOPLE[:3])
    third, fork = grown(second, *PEOPLE), grown(first, *PEOPLE[1:])
    signed = write_roster(third, KEY)
    assert (
        read_roster(signed, public_of(KEY)) == third
        and read_roster(signed, public_of(KEY)).hash == third.hash
    )
    assert third.follows(second) and third.follows(first) and second.follows(first)
    assert not third.follows(fork) and not fork.follows(second) and not first.follows(first)
    assert not grown(fork, *PEOPLE).follows(second)
    assert replace(third, earlier=(second.hash, first.hash)).hash != third.hash
    for wrong in ((first.hash,), (first.hash, second.hash[:-1]), (*third.earlier, first.hash)):
        with pytest.raises(Refused, match="chain"):
            replace(third, earlier=wrong)


def test_roster_of_before_chains_is_followed_by_the_next_version(tmp_path: Path) -> None:
    """The register of version 3 did not know the rosters before, and neither did its roster."""
    body = msgpack.packb((1, 3, [(m.node, m.name, m.public, m.not_after) for m in PEOPLE]))
    old = read_roster(msgpack.packb((body, sign(KEY, digest(Purpose.ROSTER), body))), public_of(KEY))
    assert (old.version, old.members, old.earlier) == (3, PEOPLE, ())
    kept = {"format": 1, "version": 3, "clients": [], "server": "", "hosts": []}
    (tmp_path / "register.json").write_text(json.dumps(kept))
    register = read_register(tmp_path / "register.json")
    assert register.chain == (UNKNOWN.hex(), UNKNOWN.hex(), Roster(3, ()).hash.hex())
    following = Roster(4, PEOPLE[:2], (UNKNOWN, UNKNOWN, old.hash))
    assert following.follows(old) and not following.follows(Roster(2, PEOPLE))


# --- a device ------------------------------------------------------------------------------------------------------


def file_of(*names: str) -> str:
    return MADE["FEDERATION"].format(names=", ".join(f"{{name: {name}}}" for name in names), port=1)


def surrounded(desk: Path) -> bytes:
    """Do what an operator who holds the authority does: replace all peers of c0; return the roster."""
    for number in range(1, 5):
        revoke(desk / "made", [f"c{number}"])
    (desk / "federation.yaml").write_text(file_of("c0", "eve1", "eve2", "eve3", "eve4"))
    provision(desk / "federation.yaml", desk / "made", None)
    return (desk / "made" / "server" / "roster.bin").read_bytes()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("desk")
    make_federation(folder)
    return folder


@pytest.fixture
def desk(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "desk"))


def test_peers_of_a_device_are_in_its_log_status_and_file(
    desk: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = desk / "made" / "clients" / "c0"
    kept = Path(shutil.copytree(bundle, desk / "victim"))
    signed = surrounded(desk)
    with caplog.at_level(logging.WARNING, "fedveil.client"):
        renewed = renew_roster(read_client_bundle(kept), signed)
    assert renewed.identity.roster.version == 6 and "roster version 6 of 5 members" in caplog.text
    for name in ("added eve1 (", "eve4 (", "removed c1 (", "c4 ("):
        assert name in caplog.text
    assert run(["client", "status", str(kept)]) == 1
    assert "last change" in (said := capsys.readouterr().out) and "eve3" in said and "removed c1" in said
    assert "owner's budget: epsilon " in said
    assert run(["client", "roster", "--json", str(kept)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in told["members"]] == ["c0", "eve1", "eve2", "eve3", "eve4"]
    assert told["version"] == 6 and len(told["changes"]) == 1 and told["pending"] is None
    assert {line.split()[0] for line in told["changes"][0]["removed"]} == {"c1", "c2", "c3", "c4"}
    (kept / "state" / "receipts").mkdir()
    (kept / "state" / "deals.json").write_text("{}")
    assert run(["client", "forget", str(kept)]) == 0
    assert {"receipts", "deals.json"} <= {path.name for path in (kept / "state").iterdir()}
    assert run(["client", "forget", str(kept), "--ledgers"]) == 0
    assert not {"receipts", "deals.json"} & {path.name for path in (kept / "state").iterdir()}
    assert len(roster_changes.changes(kept / "state")) == 1


def test_a_roster_that_the_owner_copies_is_noted_as_well(desk: Path) -> None:
    kept = Path(shutil.copytree(desk / "made" / "clients" / "c0", desk / "victim"))
    take_shipped(read_client_bundle(kept))
    assert not roster_changes.changes(kept / "state")
    (kept / "roster.bin").write_bytes(surrounded(desk))
    for _ in range(2):
        take_shipped(read_client_bundle(kept))
        assert [each.version for each in roster_changes.changes(kept / "state")] == [6]


def test_two_rosters_of_one_version_are_detected(desk: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(desk, tmp_path / "other"))
    victim = Path(shutil.copytree(desk / "made" / "clients" / "c0", desk / "victim"))
    server = read_server_bundle(desk / "made" / "server")
    revoke(desk / "made", ["c1"])
    mine = renew_roster(read_client_bundle(victim), (desk / "made" / "server" / "roster.bin").read_bytes())
    rosters = followed_roster(server)
    assert rosters()[0].version == 2
    revoke(other / "made", ["c2"])
    revoke(other / "made", ["c3"])
    forked = (other / "made" / "server" / "roster.bin").read_bytes()
    with pytest.raises(Refusal, match="does not follow from version 2"):
        renew_roster(mine, forked)
    (desk / "made" / "server" / "roster.bin").write_bytes(forked)
    assert rosters()[0].version == 2
    revoke(desk / "made", ["c4"])
    sound = (desk / "made" / "server" / "roster.bin").read_bytes()
    assert renew_roster(mine, sound).identity.roster.version == 3


def test_changed_members_wait_for_a_demanding_owner(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(desk / "made" / "clients" / "c0", desk / "victim"))
    bundle = read_client_bundle(folder)
    bundle = replace(bundle, policy=replace(bundle.policy, approve_rosters=True))
    revoke(desk / "made", ["c1"])
    first = (desk / "made" / "server" / "roster.bin").read_bytes()
    for _ in range(2):
        with pytest.raises(Refusal, match="waits for its owner: fedveil client roster FOLDER --approve 2"):
            renew_roster(bundle, first)
    waiting = roster_changes.pending(bundle.state)
    assert waiting is not None and waiting.version == 2 and not roster_changes.changes(bundle.state)
    with pytest.raises(Refusal, match="version 2 waits"):
        roster_changes.waiting_for(bundle.state, 3)
    why = ("--reason", "c1 has left the ward")
    assert run(["client", "roster", "--approve", "2", *why, str(folder)]) == 0
    (path,) = (bundle.state / "ledgers").glob("client-*.ledger")
    (act,) = (each for each in read_entries(path) if each.kind == "roster approved")
    told = json.loads(act.payload)
    assert (told["version"], told["hash"], told["who"]) == (2, waiting.hash, acting_user())
    assert told["reason"] == "c1 has left the ward" and verify(path).ok
    assert run(["ledger", "show", str(path)]) == 0
    assert f"Roster approved by {acting_user()}, version 2: c1 has left the ward." in capsys.readouterr().out
    second = surrounded_by_one(desk)
    with pytest.raises(Refusal, match="--approve 3"):  # what was approved of is version 2 alone
        renew_roster(bundle, second)
    assert renew_roster(bundle, first).identity.roster.version == 2
    assert [each.version for each in roster_changes.changes(bundle.state)] == [2]


def test_pending_roster_is_not_exchanged_before_approval(
    desk: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = Path(shutil.copytree(desk, tmp_path / "other"))
    bundle = read_client_bundle(Path(shutil.copytree(desk / "made" / "clients" / "c0", desk / "victim")))
    bundle = replace(bundle, policy=replace(bundle.policy, approve_rosters=True))
    revoke(desk / "made", ["c1"])
    shown = (desk / "made" / "server" / "roster.bin").read_bytes()
    revoke(other / "made", ["c2"])
    exchanged = (other / "made" / "server" / "roster.bin").read_bytes()
    for signed in (shown, exchanged):
        with pytest.raises(Refusal, match="waits"):
            renew_roster(bundle, signed)
    assert "another roster of version 2 or earlier" in caplog.text
    waiting = roster_changes.waiting_for(bundle.state, 2)
    assert [each.split()[0] for each in waiting.removed] == ["c1"]
    roster_changes.approve(bundle.state, waiting.hash)
    with pytest.raises(Refusal, match="waits"):
        renew_roster(bundle, exchanged)
    assert renew_roster(bundle, shown).identity.roster.version == 2


def cosigned(desk: Path, *names: str) -> bytes:
    """Let members sign the newest roster, and the desk collect their signatures; return the roster."""
    server = desk / "made" / "server" / "roster.bin"
    asked = Path(shutil.copy(server, desk / "asked.bin"))
    files: list[str] = []
    for name in names:
        folder = desk / "devices" / name
        assert run(["client", "roster", "--sign", str(asked), str(folder)]) == 0
        files += map(str, folder.glob("cosignature-*.toml"))
    assert run(["provision", "cosign", str(desk / "made"), *files]) == 0
    return server.read_bytes()


def test_a_roster_that_too_few_members_signed_is_refused_by_name(
    desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(desk / "made" / "clients", desk / "devices")  # as they were before the change
    folder = desk / "devices" / "c0"
    policy = folder / "policy.toml"
    policy.write_text(policy.read_text().replace("cosigned_by_at_least = 0", "cosigned_by_at_least = 2"))
    bundle, server = read_client_bundle(folder), read_server_bundle(desk / "made" / "server")
    rosters = followed_roster(server)
    revoke(desk / "made", ["c4"])
    bare = (desk / "made" / "server" / "roster.bin").read_bytes()
    with pytest.raises(
        Refusal, match="is signed by nobody of the members of version 1, and cosigned_by_at_least=2"
    ):
        renew_roster(bundle, bare)
    assert (bundle.state / roster_changes.PENDING_ROSTER).read_bytes() == bare
    assert (
        run(["client", "status", str(folder)]) == 1 and "waits: roster version 2" in capsys.readouterr().out
    )
    assert rosters()[1] == bare
    with pytest.raises(Refusal, match="is signed by c1 of the members"):
        renew_roster(bundle, cosigned(desk, "c0", "c1"))  # its own signature is not asked for
    enough = cosigned(desk, "c2")
    assert "signed by c0, c1, c2" in capsys.readouterr().out
    assert rosters()[1] == enough and rosters()[0].version == 2  # a running server sends it on
    pinned_to = replace(bundle, policy=replace(bundle.policy, peers={"nobody": "0" * 64}))
    with pytest.raises(Refusal, match="is signed by nobody of the owner's peers"):
        renew_roster(pinned_to, enough)
    renewed = renew_roster(bundle, enough)
    assert renewed.identity.roster.version == 2 and renew_roster(renewed, bare) is renewed
    assert roster_changes.pending(bundle.state) is None
    assert not (bundle.state / roster_changes.PENDING_ROSTER).exists()


def test_signatures_of_newcomers_or_other_rosters_do_not_count(desk: Path) -> None:
    shutil.copytree(desk / "made" / "clients", desk / "devices")
    victim = read_client_bundle(desk / "devices" / "c0")
    victim = replace(victim, policy=replace(victim.policy, cosigned_by_at_least=1))
    surrounded(desk)
    for name in ("eve1", "eve2", "eve3", "eve4"):
        shutil.copytree(desk / "made" / "clients" / name, desk / "devices" / name)
    signed = cosigned(desk, "eve1", "eve2", "eve3", "eve4")
    with pytest.raises(Refusal, match="is signed by nobody"):
        renew_roster(victim, signed)
    roster = read_roster(signed, victim.identity.policy.authority)
    assert len(cosigned_by(roster, cosignatures_in(signed))) == 4
    assert not cosigned_by(
        replace(roster, version=7, earlier=(*roster.earlier, roster.hash)), cosignatures_in(signed)
    )


def test_desk_takes_no_strange_signature_of_a_roster(desk: Path) -> None:
    shutil.copytree(desk / "made" / "clients", desk / "devices")
    first = Path(shutil.copy(desk / "made" / "server" / "roster.bin", desk / "first.bin"))
    assert run(["client", "roster", "--sign", str(first), str(desk / "devices" / "c1")]) == 0
    file = desk / "devices" / "c1" / "cosignature-1.toml"
    text = file.read_text()
    for wrong, said in (
        (text.replace('name = "c1"', 'name = "c2"'), "was not signed with the key admitted as c2"),
        (
            text.replace('signature = "', 'signature = "00')[:-4] + '"\n',
            "was not made by the key that it names",
        ),
    ):
        file.write_text(wrong)
        with pytest.raises(Refusal, match=said):
            cosign_at_desk(desk / "made", [file])
    file.write_text(text)
    revoke(desk / "made", ["c4"])
    with pytest.raises(Refusal, match="is for a roster other than"):
        cosign_at_desk(desk / "made", [file])
    other = Ed25519PrivateKey.generate()
    with pytest.raises(Refused, match="not made as it should be"):
        cosignatures_in(msgpack.packb((b"", b"", ((public_of(other), 1),))))


def surrounded_by_one(desk: Path) -> bytes:
    (desk / "federation.yaml").write_text(file_of("c0", "c2", "c3", "c4", "eve1"))
    provision(desk / "federation.yaml", desk / "made", None)
    return (desk / "made" / "server" / "roster.bin").read_bytes()


# --- the policy ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("suites = []", "must be a list of some of 1, 2, 3, 4"),
        ("suites = [5]", "must be a list of some of 1, 2, 3, 4"),
        ("suites = [true]", "must be a list of whole numbers"),
        ("peers_at_least = 1", "must be from 0 to 0"),
        ("approve_rosters = 1", "must be true or false"),
        ("cosigned_by_at_least = -1", "must be from 0 to"),
        ('[peers]\nnorth = "ab"', "must be 32 bytes in hexadecimal"),
        ("[peers]\nnorth = 3", "must be 32 bytes in hexadecimal"),
    ],
)
def test_a_policy_that_pins_badly_is_refused(desk: Path, line: str, said: str) -> None:
    path = desk / "made" / "clients" / "c0" / "policy.toml"
    words = ("suites", "peers", "approve_rosters", "cosigned_by_at_least", "[peers]")
    kept = [
        each
        for each in path.read_text().splitlines()
        if not each.startswith(words) and each.strip(" ],0123456789")
    ]
    path.write_text("\n".join([*kept, line]))
    with pytest.raises(Refusal, match=said):
        read_toml(OwnerPolicy, path)


def pinned(device: Any, *numbers: int) -> dict[str, str]:
    members = {member.name: member.fingerprint for member in device.bundle.identity.roster.members}
    return {f"c{number}": members[f"c{number}"] for number in numbers} or {"nobody": "0" * 64}


def federation(desk: Path, **policy: Any) -> Any:
    clients = desk / "made" / "clients"
    return Devices(
        {
            2 + number: device_of(clients / f"c{number}", **(policy if number == 0 else {}))
            for number in range(5)
        }
    )


def charged(device: Any) -> float:
    """Return the noise of the one vector on a device's own ledger."""
    [entry] = [each for each in read_entries(device.ledger.path) if each.kind == RESERVE]
    event = json.loads(entry.payload)["events"]["server"]
    return float(event["noise_multiplier"])


@pytest.mark.parametrize(("peers", "counted"), [((), 4), ((1,), 4), ((1, 2), 2), ((1, 2, 3), 1)])
def test_members_that_nobody_vouches_for_know_their_noise(
    desk: Path, peers: tuple[int, ...], counted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of five, one may collude in any case; three open a vector alone, and see it without the noise of its peers."""
    added: list[int] = []
    real = secure_update.add_grid_noise
    monkeypatch.setattr(
        secure_update, "add_grid_noise", lambda *given: added.append(given[1]) or real(*given)
    )
    grid = federation(desk)
    grid = federation(desk, peers=pinned(grid.devices[2], *peers))
    opened = masked_sum(grid, noise=3.0)
    assert opened.survivors == 5 and opened.dropped == {}
    missing = opened.spec.missing_sigma(counted, 3.0)
    assert added == [missing] * (missing > 0) and (missing > 0) == (counted > 1)
    assert charged(grid.devices[2]) == 3.0
    assert opened.further == (dict.fromkeys([2], missing) if missing else {})  # the server is told how much


def test_device_is_charged_for_the_noise_within_the_grids_room(
    desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ShareSpec, "missing_sigma", lambda *_: -1)
    grid = federation(desk)
    grid = federation(desk, peers=pinned(grid.devices[2]))
    opened = masked_sum(grid, noise=3.0)
    assert opened.survivors == 5
    assert charged(grid.devices[2]) == pytest.approx(1.5, rel=0.01) and charged(grid.devices[3]) == 3.0


def test_a_floor_of_noise_that_outsiders_leave_unmet_is_refused(
    desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ShareSpec, "missing_sigma", lambda *_: -1)
    grid = federation(desk)
    grid = federation(desk, peers=pinned(grid.devices[2]), minimum_noise_multiplier=2.0)
    assert masked_sum(grid, noise=3.0).dropped == {"declined: policy": 1}
    assert not grid.devices[2].ledger.path.exists()


@pytest.mark.parametrize(
    ("policy", "refused"),
    [
        ({"peers_at_least": 2}, False),
        ({"peers_at_least": 3}, True),
        ({"suites": (2,)}, True),
        ({"suites": (1, 2)}, False),
    ],
)
def test_too_few_peers_or_another_suite_are_refused(
    desk: Path, policy: dict[str, Any], refused: bool
) -> None:
    peers = pinned(federation(desk).devices[2], 1, 2)
    if policy.get("peers_at_least") == 3:
        peers |= {"away": "0" * 64}
    grid = federation(desk, peers=peers, **policy)
    opened = masked_sum(grid)
    assert opened.dropped == ({"declined: policy": 1} if refused else {})
    assert grid.devices[2].ledger.path.exists() != refused


# --- the noise, by known answers -----------------------------------------------------------------------------------

# What a device that is surrounded was sure of, of the noise that it was charged for, before it knew its peers.
OWN_SHARE = {3: 0.71, 5: 0.50, 11: 0.33, 20: 0.24, 100: 0.11}


@pytest.mark.parametrize("clients", OWN_SHARE)
@pytest.mark.parametrize("bits", [16, 32])
def test_device_among_strangers_has_all_the_noise_of_its_charge(clients: int, bits: int) -> None:
    masking = Masking(Roster(1, ()), 0.4, 0.1, Profile.MALICIOUS)
    spec = size_shares(SumSpec(1.0), 650, masking.attendance(clients), 1.0, bits, layered=True)
    assert spec.single_noise(clients - 1) == pytest.approx(OWN_SHARE[clients], abs=0.006)
    for outsiders in range(clients):
        sigma = spec.missing_sigma(outsiders, 1.0)
        assert sigma >= 0
        levels = (spec.attendance.least, *(layer.survivors for layer in spec.layers))
        honest = [max(1, level - outsiders) * spec.variance(level) for level in levels]
        sure = math.sqrt((min(honest) + sigma**2 - 8**2) / spec.sensitivity_squared)
        assert sure >= 1.0 and (sigma == 0 or sure < 1.002)
        assert (sigma == 0) == (outsiders <= spec.attendance.colluders)


@pytest.mark.parametrize("allies", [1, 2, 4, 10, 30])
def test_minimum_cohort_is_worth_its_noise_against_allies_of_a_server(allies: int) -> None:
    """The threat model's rule: from cohorts of 10 (B - 1) + 1 on, B allies are no more than are assumed to collude."""
    masking, enough = Masking(Roster(1, ()), 0.4, 0.1, Profile.MALICIOUS), 10 * (allies - 1) + 1
    for clients, worth in ((max(enough, 3), True), (enough - 1, False)):
        if clients > allies + 1:
            spec = size_shares(SumSpec(1.0), 650, masking.attendance(clients), 1.0, 32, layered=True)
            assert (spec.single_noise(allies) >= 1.0 - 1e-9) == worth
