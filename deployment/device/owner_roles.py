"""Roles at a device whose machine has several users: its owner and an officer, each with a passphrase of their own.

The loopback address is open to all users of a machine, and so is a page on it. With roles the page shows nothing before a
passphrase, and a decision states the role that gave it. What the officer refused, the officer alone takes back.
"""

from __future__ import annotations

import hmac
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from ...base.bounded_decoding import build, plain_of, read_json
from ...base.durable_files import replace_file
from ...base.refusal import Form, OneOf, Refusal, refusing, unreadable
from ...configs.bundle_files import hexadecimal
from ...configs.passphrase import BLOCK_SIZE, COST, KEY_BYTES, PARALLELISM, SALT_BYTES
from .owner_decisions import ROLES

FILE = "roles.json"  # in the state folder, for the device's user alone
PASSPHRASE = Form(".{12,200}", "give a passphrase of 12 to 200 characters")


@dataclass(frozen=True)
class RoleKey:
    """Key that scrypt derives from a role's passphrase, and its salt, in hexadecimal."""

    salt: Annotated[str, hexadecimal(SALT_BYTES)]
    key: Annotated[str, hexadecimal(KEY_BYTES)]

    def opens(self, passphrase: str) -> bool:
        """Return whether this is the role's passphrase."""
        derived = _derived(bytes.fromhex(self.salt), passphrase)
        return hmac.compare_digest(derived, bytes.fromhex(self.key))


@dataclass(frozen=True)
class RoleKeys:
    """Content of the file `FILE`: the keys of roles by name."""

    keys: Mapping[str, RoleKey] = field(default_factory=dict[str, RoleKey])

    def opens(self, role: str, passphrase: str) -> bool:
        """Return whether a role exists and has this passphrase; it takes as long for one that does not exist."""
        nobody = RoleKey("00" * SALT_BYTES, "00" * KEY_BYTES)
        return self.keys.get(role, nobody).opens(passphrase) and role in self.keys


def read_roles(state: Path) -> RoleKeys:
    """Return the roles of a device; none without a file.

    Raises:
      Refusal: the file cannot be read, so that nobody may decide.
    """
    path = state / FILE
    try:
        return build(RoleKeys, read_json(path.read_bytes()))
    except FileNotFoundError:
        return RoleKeys()
    except (OSError, ValueError, Refusal) as error:
        remedy = unreadable(error, "nobody may decide; restore it, or remove it and set the passphrases anew")
        raise Refusal("roles", str(path), remedy) from error


def set_passphrase(state: Path, role: str, passphrase: str) -> None:
    """Set the passphrase of a role, which exists from then on; it is stored as a key that scrypt derives.

    Args:
      state: the device's state folder.
      role: `owner` or `officer`.
      passphrase: of the role.

    Raises:
      Refusal: there is no such role, the passphrase is too short, or the file cannot be written.
    """
    OneOf(ROLES).check(str, "role", role)
    try:
        PASSPHRASE.check(str, "passphrase", passphrase)
    except Refusal:
        raise Refusal("passphrase", f"{len(passphrase)} characters", PASSPHRASE.remedy) from None
    salt = os.urandom(SALT_BYTES)
    keys = {**read_roles(state).keys, role: RoleKey(salt.hex(), _derived(salt, passphrase).hex())}
    with refusing("roles", state / FILE, "cannot be written"):
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace_file(state / FILE, (json.dumps(plain_of(RoleKeys(keys))) + "\n").encode())


def _derived(salt: bytes, passphrase: str) -> bytes:
    return Scrypt(salt, KEY_BYTES, n=COST, r=BLOCK_SIZE, p=PARALLELISM).derive(passphrase.encode())
