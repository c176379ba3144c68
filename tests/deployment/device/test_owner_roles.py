"""Roles at a device: their passphrases, as keys that scrypt derives."""

import json
from pathlib import Path

import pytest

from fedveil.base.refusal import Refusal
from fedveil.deployment.device.owner_roles import FILE, read_roles, set_passphrase

OWNERS, OFFICERS = "correct horse battery", "staple of the officer"


def test_passphrase_opens_its_own_role_alone(tmp_path: Path) -> None:
    assert not read_roles(tmp_path).opens("owner", "")
    set_passphrase(tmp_path, "owner", OWNERS)
    set_passphrase(tmp_path, "officer", OFFICERS)
    roles = read_roles(tmp_path)
    assert roles.opens("owner", OWNERS) and roles.opens("officer", OFFICERS)
    for role, passphrase in (
        ("owner", OFFICERS),
        ("officer", OWNERS),
        ("nobody", OWNERS),
        ("owner", OWNERS[:-1]),
    ):
        assert not roles.opens(role, passphrase)


def test_new_passphrase_replaces_the_old_one_under_a_new_salt(tmp_path: Path) -> None:
    set_passphrase(tmp_path, "owner", OWNERS)
    first = json.loads((tmp_path / FILE).read_text())["keys"]["owner"]
    set_passphrase(tmp_path, "owner", OWNERS)
    second = json.loads((tmp_path / FILE).read_text())["keys"]["owner"]
    assert first["salt"] != second["salt"] and first["key"] != second["key"]
    set_passphrase(tmp_path, "owner", OFFICERS)
    assert not read_roles(tmp_path).opens("owner", OWNERS)


@pytest.mark.parametrize(
    ("role", "passphrase"), [("admin", OWNERS), ("owner", "short"), ("owner", "line\nbreak in it")]
)
def test_other_roles_and_short_passphrases_are_refused(tmp_path: Path, role: str, passphrase: str) -> None:
    with pytest.raises(Refusal) as refusal:
        set_passphrase(tmp_path, role, passphrase)
    assert passphrase not in str(refusal.value) and not (tmp_path / FILE).exists()


@pytest.mark.parametrize("damage", [b"", b"[]", b'{"keys": {"owner": {"salt": "x", "key": "y"}}}'])
def test_roles_that_cannot_be_read_are_refused(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / FILE).write_bytes(damage)
    with pytest.raises(Refusal, match="nobody may decide"):
        read_roles(tmp_path)
