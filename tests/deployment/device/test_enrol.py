"""A device whose bundle is replaced: by its owner's leave alone, and as a whole or not at all."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedveil.__main__ import run
from fedveil.base.refusal import Refusal
from fedveil.deployment.device import enrol as enrolment
from fedveil.deployment.device.client_bundle import (
    REPLACING,
    finish_replacement,
    read_client_bundle,
    take_shipped,
)
from fedveil.deployment.device.enrol import MAKING, enrol
from fedveil.deployment.device.enrolment import PRIVATE
from fedveil.deployment.device.roster_changes import pending
from fedveil.deployment.enrolment import approve, issue_tokens
from fedveil.links.enrolment.messages import Ask
from fedveil.links.enrolment.server_end import EnrolmentPort
from fedveil.links.enrolment.token import Token
from fedveil.links.server_bundle import read_server_bundle

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm")

FEDERATION = """\
federation: sensors
server: {{address: "localhost:{link}", listen: "127.0.0.1:{link}", enrolment: "localhost:{port}"}}
task: {{name: digits, options: {{num_clients: 5}}}}
policy: {{target_epsilon: 8.0, target_delta: 1e-4, minimum_cohort: 3}}
clients: [{{name: sensor-*}}]
"""


@pytest.fixture
def desk(provisioned: Callable[[str], Path]) -> Path:
    return provisioned(FEDERATION)


@pytest.fixture
def carried(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], EnrolmentPort]:
    """Return a function that lets devices ask a desk's port without a network between."""

    def to(desk: Path) -> EnrolmentPort:
        port = EnrolmentPort(read_server_bundle(desk / "server"))
        told = port.answer(Ask("", b"", b"", b""))
        monkeypatch.setattr(enrolment, "authority_of", lambda token: (told.ca, told.authority))
        monkeypatch.setattr(
            enrolment,
            "ask",
            lambda token, ca, request, seal: port.answer(Ask(token.name, token.port_key, request, seal)),
        )
        return port

    return to


Carried = Callable[[Path], EnrolmentPort]


def asked(token: Token, folder: Path) -> bool:
    return enrol(token, folder, wait=0, notify=lambda _: None)


def enrolled(desk: Path, folder: Path, *others: str) -> Token:
    """Enrol sensor-1 in `folder`, at the same time as others; return its token, with which it has asked once."""
    token, *rest = issue_tokens(desk, ["sensor-1", *others])
    for each in rest:
        asked(each, folder.parent / each.name)
    assert not asked(token, folder)
    assert set(approve(desk).admitted) == {"sensor-1", *others}
    return token


def files_of(folder: Path) -> dict[str, bytes]:
    """Return what a device runs on: all files of its bundle, without what waits beside them."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def demand(folder: Path, line: str) -> None:
    key = line.partition(" =")[0]
    policy = folder / "policy.toml"
    given = (f"{key} =", f"[{key}]")
    kept = [each for each in policy.read_text().splitlines() if not each.startswith(given)]
    policy.write_text("\n".join([line, *kept]) + "\n")


def fingerprint(folder: Path, name: str) -> str:
    members = read_client_bundle(folder).identity.roster.members
    return next(member.fingerprint for member in members if member.name == name)


@pytest.fixture
def device(desk: Path, carried: Carried, tmp_path: Path) -> Path:
    """A device that was enrolled with sensor-2, and has run."""
    carried(desk)
    folder = tmp_path / "device"
    assert asked(enrolled(desk, folder, "sensor-2"), folder)
    take_shipped(read_client_bundle(folder))
    return folder


@pytest.mark.parametrize("has_run", [True, False])
@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["approve_rosters = true"], "waits for its owner: fedveil client roster FOLDER --approve 2"),
        (["cosigned_by_at_least = 1"], "is signed by nobody of the members of version 1"),
        (["peers_at_least = 2", 'peers = {{a = "{peer}", b = "{nobody}"}}'], "has 1 of the owner's peers"),
    ],
)
def test_an_enrolment_brings_no_members_that_the_owner_does_not_allow(
    desk: Path, device: Path, lines: list[str], said: str, has_run: bool
) -> None:
    """Its own new keys need no leave; Sybils that came with them do."""
    peer = fingerprint(device, "sensor-2")
    for line in lines:
        demand(device, line.format(peer=peer, nobody="0" * 64))
    if not has_run:
        (device / "state" / "roster.bin").unlink()
    before = files_of(device)
    token = enrolled(desk, device, "sensor-8", "sensor-9")
    for _ in range(2):
        with pytest.raises(Refusal, match=said):
            asked(token, device)
        assert files_of(device) == before
        assert read_client_bundle(device).identity.roster.version == 1
    waiting = pending(device / "state")
    assert waiting is not None and {each.split()[0] for each in waiting.added} > {"sensor-8", "sensor-9"}


def test_device_enrols_again_with_its_new_keys_alone(desk: Path, device: Path) -> None:
    peer = fingerprint(device, "sensor-2")
    for line in (
        "approve_rosters = true",
        "cosigned_by_at_least = 1",
        "peers_at_least = 1",
        f'peers = {{a = "{peer}"}}',
    ):
        demand(device, line)
    before = files_of(device)
    assert asked(enrolled(desk, device), device)
    after = read_client_bundle(device)
    assert after.identity.roster.version == 2 and after.policy.approve_rosters
    changed = {name for name, data in files_of(device).items() if before.get(name) != data}
    assert changed == {*PRIVATE, "tls.pem", "roster.bin", "enrolled"}


def test_an_owner_approves_before_the_device_has_its_new_keys(desk: Path, device: Path) -> None:
    demand(device, "approve_rosters = true")
    token = enrolled(desk, device, "sensor-3")
    with pytest.raises(Refusal, match="--approve 2"):
        asked(token, device)
    (device / "tls.pem").write_text("a certificate that has ended")  # why a device enrols again
    assert run(["client", "roster", "--approve", "2", str(device)]) == 0
    assert asked(token, device)
    renewed = read_client_bundle(device)
    assert renewed.identity.roster.version == 2
    take_shipped(renewed)
    take_shipped(read_client_bundle(device))
    assert pending(device / "state") is None


@pytest.mark.parametrize("federation", ["sensors", "others"])
def test_a_token_of_another_authority_costs_a_device_nothing(
    desk: Path, device: Path, carried: Carried, tmp_path: Path, federation: str
) -> None:
    from fedveil.deployment.provision import provision

    (tmp_path / "g.yaml").write_text(
        (tmp_path / "f.yaml").read_text().replace("federation: sensors", f"federation: {federation}")
    )
    other = provision(tmp_path / "g.yaml", tmp_path / "other").folder
    (token,) = issue_tokens(other, ["sensor-1"])
    before = files_of(device)
    carried(other)
    with pytest.raises(Refusal, match=r"is of another authority than .*policy\.toml names"):
        asked(token, device)
    assert files_of(device) == before and read_client_bundle(device).identity.roster.version == 1
    assert approve(other).silent == ("sensor-1",)  # nothing was asked there: the token is good elsewhere


def test_a_server_that_spoils_the_new_bundle_costs_a_device_nothing(desk: Path, device: Path) -> None:
    """It delivers the roster: an older one, or none."""
    token, roster = enrolled(desk, device), desk / "server" / "roster.bin"
    sound, before = roster.read_bytes(), files_of(device)
    for wrong, said in (
        ((device / "roster.bin").read_bytes(), "is not in roster version 1 with this key"),
        (b"", "was not signed by the authority"),
    ):
        roster.write_bytes(wrong)
        with pytest.raises(Refusal, match=said):
            asked(token, device)
        assert files_of(device) == before and read_client_bundle(device)
    roster.write_bytes(sound)
    assert asked(token, device)


class Killed(BaseException):
    """The end of a process."""


def test_a_kill_leaves_the_old_bundle_or_the_new_one(
    desk: Path, device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token, old, points = enrolled(desk, device), read_client_bundle(device).identity.roster.version, 0
    found = set[int]()
    while True:
        copy = Path(shutil.copytree(device, tmp_path / f"killed at {points}"))
        left = [points]

        def step(real: Callable[..., None], left: list[int] = left) -> Callable[..., None]:
            def counted(*given: object, **named: object) -> None:
                if not left[0]:
                    raise Killed
                left[0] -= 1
                real(*given, **named)

            return counted

        with monkeypatch.context() as patched:
            for name in ("replace", "rename", "unlink", "rmdir"):
                patched.setattr(os, name, step(getattr(os, name)))
            try:
                done = asked(token, copy)
            except Killed:
                done = False
        found.add(read_client_bundle(copy).identity.roster.version)
        assert not (copy / REPLACING).exists()
        assert asked(token, copy) and not (copy / MAKING).exists()
        assert read_client_bundle(copy).identity.roster.version == old + 1
        if done:
            break
        points += 1
    assert found == {old, old + 1} and points > 20


def test_bundle_copied_by_hand_must_meet_the_same_demands(desk: Path, device: Path, tmp_path: Path) -> None:
    """With other keys it cannot be used before its owner's leave; without, the device goes on with what it has."""
    demand(device, "approve_rosters = true")
    token = enrolled(desk, device, "sensor-3")
    new = Path(shutil.copytree(device, tmp_path / "new"))
    demand(new, "approve_rosters = false")
    assert asked(token, new)
    shutil.copy(new / "roster.bin", device)
    shutil.rmtree(device / MAKING)
    assert read_client_bundle(device).identity.roster.version == 1
    for name in (*PRIVATE, "tls.pem"):
        shutil.copy(new / name, device)
    with pytest.raises(Refusal, match="--approve 2"):
        read_client_bundle(device)
    assert run(["client", "roster", "--approve", "2", str(device)]) == 0
    assert read_client_bundle(device).identity.roster.version == 2


def test_replacement_completed_by_another_reader_is_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = tmp_path / REPLACING
    fresh.mkdir()
    (fresh / "tls.pem").write_text("new")
    listed = Path.iterdir

    def overtaken(self: Path) -> Iterator[Path]:
        monkeypatch.undo()
        finish_replacement(tmp_path)
        return listed(self)

    monkeypatch.setattr(Path, "iterdir", overtaken)
    finish_replacement(tmp_path)
    assert (tmp_path / "tls.pem").read_text() == "new" and not fresh.exists()
