"""A federation changes while its devices are out: newer rosters travel to them, and who was revoked stays out."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedveil.deployment.device.client_bundle import read_client_bundle
from fedveil.deployment.device.commands import forget
from fedveil.deployment.provision import provision, revoke, rotate
from fedveil.links.server_bundle import read_server_bundle
from fedveil.server.masking import Masking
from fedveil.server.round_terms import Sum
from fedveil.server.secure_sum import Opened, SecureSums

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))

from devices import CLASSES, FEATURES, SPEC, Devices, content, device_of, make_federation


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Path]:
    yield make_federation(tmp_path)


def served(made: Path, devices: Devices, number: int = 1) -> Opened:
    """Let the server of the bundle as it is now sum over all devices that the roster lists."""
    server = read_server_bundle(made / "server")
    masking = Masking(server.roster, dropout=0.4, collusion=0.1, signed_roster=server.signed_roster)
    wanted = Sum("spring", number, content(), "train", SPEC, {"w": (CLASSES, FEATURES + 1)}, 3.0)
    nodes = [member.node for member in server.roster.members]
    return SecureSums(devices, masking).sum(nodes, wanted, None)


def out_there(made: Path) -> Devices:
    """The devices as they were when they got their bundles."""
    return Devices({2 + n: device_of(made / "clients" / f"c{n}") for n in range(5)})


def test_devices_take_the_newer_roster_with_the_first_exchange(made: Path) -> None:
    devices = out_there(made)
    rotate(made, ["c4"], None)
    devices.devices[6] = device_of(made / "clients" / "c4")
    opened = served(made, devices)
    assert opened.survivors == 5 and not opened.dropped
    for number, device in enumerate(devices.devices.values()):
        assert device.bundle.identity.roster.version == 2
        assert read_client_bundle(made / "clients" / f"c{number}").identity.roster.version == 2


def test_without_it_they_would_all_refuse(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = out_there(made)
    rotate(made, ["c4"], None)
    monkeypatch.setattr("fedveil.server.secure_sum.with_roster", lambda records, signed: records)
    assert served(made, devices).total is None


def test_device_with_replaced_keys_is_out_and_the_others_go_on(made: Path) -> None:
    devices = out_there(made)
    rotate(made, ["c1"], None)  # the device still has its old keys
    opened = served(made, devices)
    assert sorted(opened.nodes) == [2, 4, 5, 6] and opened.dropped == {"failed": 1}
    assert devices.devices[3].bundle.identity.roster.version == 1


def test_revoked_device_gets_no_order_and_would_not_answer(made: Path) -> None:
    devices = out_there(made)
    revoke(made, ["c0"])
    assert sorted(served(made, devices).nodes) == [3, 4, 5, 6]
    proposal = next(message for message, _ in devices.seen if message.metadata.dst_node_id == 3)
    assert devices.devices[2].answer(proposal).has_error()


@pytest.mark.parametrize("forgotten", [False, True])
def test_older_roster_is_refused_even_by_restarted_devices(
    forgotten: bool, made: Path, tmp_path: Path
) -> None:
    before = tmp_path / "before"
    shutil.copytree(made / "server", before / "server")
    devices = out_there(made)
    revoke(made, ["c0"])
    assert served(made, devices).survivors == 4
    for n in range(5):
        shutil.copy(
            before / "server" / "roster.bin", made / "clients" / f"c{n}"
        )  # the bundle as it was shipped
        policy = made / "clients" / f"c{n}" / "policy.toml"
        policy.write_text(
            policy.read_text().replace("minimum_roster_version = 2", "minimum_roster_version = 1")
        )
        if forgotten:
            forget(made / "clients" / f"c{n}", False)
    opened = served(before, out_there(made), 2)
    assert opened.total is None and opened.survivors == 0
    assert served(made, out_there(made), 3).survivors == 4


def test_roster_of_another_authority_is_refused(made: Path, tmp_path: Path) -> None:
    devices = out_there(made)
    provision(tmp_path / "federation.yaml", tmp_path / "other", None)
    assert served(tmp_path / "other", devices).total is None
    assert all(device.bundle.identity.roster.version == 1 for device in devices.devices.values())
    assert served(made, devices, 2).survivors == 5
