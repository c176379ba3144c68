"""Client bundle: the folder that `fedveil provision` makes for one client, with identity, task and owner's policy."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ...configs.bundle_files import (
    ADDRESS,
    ADDRESS_FORM,
    LINKS,
    NAME,
    NAME_FORM,
    ROSTER,
    Credentials,
    read_credentials,
    read_file,
    read_private_key,
    read_secret,
    read_signed_roster,
    read_toml,
    refuse_writable,
)
from ...configs.strict import Section
from ...privacy.ledger.durable_files import replace_file
from ...privacy.refusal import Refusal, refusing
from ...privacy.secagg.refusal import Refused
from ...privacy.secagg.roster import Roster, read_roster
from ...privacy.secagg.roster_change import change_between
from ...privacy.secagg.suite import KEY_BYTES, public_of
from ...strategies.identity import FIRST_NODE, Identity
from .owner_policy import POLICY_DEFAULTS, OwnerPolicy, read_policy
from .roster_changes import Demands, check_change, note

logger = logging.getLogger("fedveil.client")

DEVICE_FILE, POLICY = "client.toml", "policy.toml"
KINDS = ("linear",)
TABLES = "csv"  # the shipped task on the device's own tables
HOURS = re.compile("([01][0-9]|2[0-3])-([01][0-9]|2[0-3])")
LAST_NODE = 2**31 - 1
MOST_MEBIBYTES = 2**20
TASK_DEFAULTS = {
    "name": None,
    "target": None,
    "kind": None,
    "data": None,
    "allow_modules": [],
    "options": {},
    "args": {},
}

Read = TypeVar("Read")


@dataclass(frozen=True)
class TaskChoice:
    """Choice of the task that runs on the device: one of `name`, `target` and `kind` is set.

    Attributes:
      name: a shipped task.
      target: the owner's own task as "module:Class"; its module is among `allow_modules`.
      kind: "linear" trains a linear model with NumPy on the file `data`.
      data: relative to the bundle: an .npz file for a kind, a table or a folder of tables for the task csv.
      client: number of this device among the task's clients, from 0.
      allow_modules: modules that may be imported for the task.
      options: arguments of a shipped task.
      args: keyword arguments of `target`.
    """

    name: str | None
    target: str | None
    kind: str | None
    data: str | None
    client: int
    allow_modules: tuple[str, ...]
    options: Mapping[str, float | int | str | bool]
    args: Mapping[str, Any]


@dataclass(frozen=True)
class Eligibility:
    """Conditions under which the device may train; the defaults set none.

    Attributes:
      on_mains_power: do not train on battery power.
      max_temperature_celsius: limit for its hottest thermal zone; None sets none.
      min_free_mebibytes: least free memory.
      unmetered: train only over a network that is not billed by volume.
      hours: from the first to the second hour, local time; across midnight if the second is smaller.
    """

    on_mains_power: bool = False
    max_temperature_celsius: float | None = None
    min_free_mebibytes: int = 0
    unmetered: bool = False
    hours: tuple[int, int] | None = None


DEFAULTS = {"link": "grpc", "state": "state", "task": TASK_DEFAULTS, "eligibility": asdict(Eligibility())}


@dataclass(frozen=True)
class DeviceFile:
    """Content of the file client.toml.

    Attributes:
      federation: its name.
      name: of this client.
      node: its number, at least `FIRST_NODE`.
      server: host and port.
      link: one of `LINKS`.
      state: folder of the device's state, relative to the bundle.
      task: of the device.
      eligibility: when it may train.
    """

    federation: str
    name: str
    node: int
    server: str
    link: str
    state: str
    task: TaskChoice
    eligibility: Eligibility


@dataclass(frozen=True)
class ClientBundle:
    """Client bundle, read and checked.

    Attributes:
      folder: of its files.
      settings: the file client.toml.
      policy: the file policy.toml; `policy.cap` caps the device's ledgers.
      identity: for secure aggregation, with `policy.floors` and the device's newest roster.
      credentials: of the client's end of mutual TLS.
    """

    folder: Path
    settings: DeviceFile
    policy: OwnerPolicy
    identity: Identity
    credentials: Credentials

    @property
    def state(self) -> Path:
        """State folder of the device; it may not exist yet."""
        return self.folder / self.settings.state

    @property
    def supernode_key(self) -> Path:
        """Path of the key that identifies this device as a SuperNode of Flower (OpenSSH, P-384)."""
        return self.folder / "supernode.key"


def read_client_bundle(folder: Path) -> ClientBundle:
    """Return the bundle in `folder`.

    Raises:
      Refusal: a file is missing, invalid or inconsistent with the others, or other users may read a secret.
    """
    settings = read_device_file(folder)
    policy = read_toml(folder / POLICY, read_policy, POLICY_DEFAULTS)
    credentials = read_credentials(folder, settings.federation, settings.name)
    key, state = read_private_key(folder / "identity.key"), folder / settings.state
    if not isinstance(key, Ed25519PrivateKey):
        raise Refusal("file", str(folder / "identity.key"), "is not an Ed25519 key")
    roster = _newest_roster(folder / ROSTER, state / ROSTER, policy)
    _check_membership(settings.node, settings.name, key, roster)
    identity = Identity(settings.node, key, _node_key(state / "node.key"), policy.floors, roster)
    return ClientBundle(folder, settings, policy, identity, credentials)


def take_shipped(bundle: ClientBundle) -> None:
    """Record the changes of a roster that the owner has put into the bundle, and store it as the newest.

    Raises:
      OSError: the state folder cannot be written.
    """
    kept, newest = bundle.state / ROSTER, bundle.identity.roster
    if kept.exists():
        held, _ = read_signed_roster(kept, bundle.identity.policy.authority)
        if held.version >= newest.version:
            return
        if not newest.follows(held):
            logger.error("roster version %s does not follow from version %s", newest.version, held.version)
        note(bundle.state, change_between(held, newest))
    replace_file(kept, read_file(bundle.folder / ROSTER))


def read_device_file(folder: Path) -> DeviceFile:
    """Return the file client.toml of the bundle in `folder`.

    Raises:
      Refusal: it is missing or invalid, or other users may change it, the policy or the folder.
    """
    refuse_writable(folder, DEVICE_FILE, POLICY)
    return read_toml(folder / DEVICE_FILE, read_settings, DEFAULTS)


def renew_roster(bundle: ClientBundle, signed: bytes) -> ClientBundle:
    """Return the bundle with a newer roster, which is stored in its state folder.

    Args:
      bundle: returned unchanged if its roster is no older.
      signed: from the server; it needs the authority's signature and a higher version.

    Raises:
      Refusal: the authority did not sign it, it does not follow from the device's roster, it no longer lists this
        client, or it lacks signatures or an approval that the owner requires.
    """
    try:
        roster = read_roster(signed, bundle.identity.policy.authority)
    except Refused as refused:
        remedy = f"is not signed by the authority ({refused})"
        raise Refusal("roster", bundle.settings.federation, remedy) from None
    if roster.version <= bundle.identity.roster.version:
        return bundle
    _check_membership(bundle.settings.node, bundle.settings.name, bundle.identity.key, roster)
    bundle.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    own, policy = bundle.identity, bundle.policy
    demands = Demands(policy.approve_rosters, policy.cosigned_by_at_least, own.policy.peers)
    check_change(bundle.state, own.roster, roster, signed, public_of(own.key), demands)
    replace_file(bundle.state / ROSTER, signed)
    return replace(bundle, identity=replace(bundle.identity, roster=roster))


def read_settings(section: Section) -> DeviceFile:
    """Return client.toml, which has every key; after a mistake, noted in the section, some values are placeholders."""
    return DeviceFile(
        federation=section.matching("federation", NAME, NAME_FORM),
        name=section.matching("name", NAME, NAME_FORM),
        node=section.whole("node", at_least=FIRST_NODE, at_most=LAST_NODE),
        server=section.matching("server", ADDRESS, ADDRESS_FORM),
        link=section.word("link", LINKS),
        state=section.text("state"),
        task=_nested(section, "task", read_task),
        eligibility=_nested(section, "eligibility", read_eligibility),
    )


def read_task(section: Section) -> TaskChoice:
    """Return the section [task], which has every key."""
    allowed = section.names("allow_modules")
    if sum(section.given(key) for key in ("name", "target", "kind")) != 1:
        section.refuse("name", "give one of name, target and kind")
    name = section.optional_text("name")
    if (section.given("kind") or name == TABLES) != section.given("data"):
        section.refuse("data", f"is required by a kind and by name: {TABLES}, and not allowed otherwise")
    arguments = section.arguments("args")
    if arguments and not section.given("target"):
        section.refuse("args", "belong to a target; a shipped task has options")
    return TaskChoice(
        name=name,
        target=section.target("target", allowed) if section.given("target") else None,
        kind=section.word("kind", KINDS) if section.given("kind") else None,
        data=section.optional_text("data"),
        client=section.whole("client", at_least=0, at_most=LAST_NODE),
        allow_modules=allowed,
        options=section.parameters("options"),
        args=arguments,
    )


def read_eligibility(section: Section) -> Eligibility:
    """Return the section [eligibility], which has every key."""
    hours = None
    if section.given("hours"):
        window = section.matching("hours", HOURS, "two hours of the day, for instance 22-06")
        hours = (int(window[:2]), int(window[3:])) if window else None
    return Eligibility(
        on_mains_power=section.flag("on_mains_power"),
        max_temperature_celsius=section.optional_real("max_temperature_celsius", above=0),
        min_free_mebibytes=section.whole("min_free_mebibytes", at_least=0, at_most=MOST_MEBIBYTES),
        unmetered=section.flag("unmetered"),
        hours=hours,
    )


def _nested(section: Section, key: str, read: Callable[[Section], Read]) -> Read:
    inner = section.section(key)
    made = read(inner)
    inner.done()
    return made


def _newest_roster(shipped: Path, received: Path, policy: OwnerPolicy) -> Roster:
    authority = bytes.fromhex(policy.authority)
    rosters = [
        read_signed_roster(path, authority)[0]
        for path in (shipped, received)
        if path == shipped or path.exists()
    ]
    newest = max(rosters, key=lambda roster: roster.version)
    if newest.version < policy.minimum_roster_version:
        least = policy.minimum_roster_version
        remedy = f"has version {newest.version}; the policy requires {least} or newer"
        raise Refusal("file", str(shipped), remedy)
    return newest


def _check_membership(node: int, name: str, key: Ed25519PrivateKey, roster: Roster) -> None:
    if [(m.name, m.public) for m in roster.members if m.node == node] != [(name, public_of(key))]:
        remedy = f"is not in roster version {roster.version} with this key: it was revoked or has new keys"
        raise Refusal("name", name, remedy)


def _node_key(path: Path) -> bytes:
    """Return the key that seals the node's memory; it is generated on the device at its first use."""
    if not path.exists():
        with refusing("state", path.parent, "cannot be written"):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            replace_file(path, os.urandom(KEY_BYTES))
    key = read_secret(path)
    if len(key) != KEY_BYTES:
        raise Refusal("file", str(path), f"is not {KEY_BYTES} bytes long")
    return key
