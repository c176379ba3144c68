"""Client bundle: the folder that `fedveil provision` makes for one client, with identity, task and owner's policy."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, NamedTuple, cast

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ...base.durable_files import replace_file, sync_folder
from ...base.extensions import extension, names
from ...base.refusal import Form, OneOf, Range, Refusal, refusing
from ...configs.bundle_files import (
    ROLLOVERS,
    ROSTER,
    Address,
    Credentials,
    Link,
    Name,
    read_credentials,
    read_file,
    read_private_key,
    read_secret,
    read_signed_roster,
    read_toml,
    refuse_writable,
)
from ...configs.strict import TARGET
from ...privacy.secagg.refusal import Refused
from ...privacy.secagg.roster import Roster, read_roster
from ...privacy.secagg.roster_change import change_between
from ...privacy.secagg.suite import KEY_BYTES, public_of
from ...strategies.identity import FIRST_NODE, Identity
from .authority import TrustedAuthority, adopt_rollovers, current_authority
from .enrolment import REQUEST
from .owner_policy import OwnerPolicy
from .personal_choice import NO_OWN_MODEL, PersonalChoice
from .roster_changes import adopt, check_change

logger = logging.getLogger("fedveil.client")

DEVICE_FILE, POLICY = OWNERS = ("client.toml", "policy.toml")  # which a new enrolment keeps
CA = "ca.pem"
REPLACING = "replacing"  # folder of a new bundle, complete, by which every reader replaces the old one
KINDS = ("linear",)
TABLES = "csv"
OWN_DATA = "device data"  # extension point of tasks on the device's own file or folder
OWN_FILES = names(OWN_DATA)
HOUR = "([01][0-9]|2[0-3])"
HOURS = Form(f"{HOUR}-{HOUR}", "must be two hours of the day, for instance 22-06")
_IDENTIFIER = r"[^\W\d]\w*"
MODULE = Form(rf"{_IDENTIFIER}(\.{_IDENTIFIER})*", "must be a list of module names, for instance [my_task]")
OWN_ROWS = ("data", "query", "database", "folder")  # of tables: they say where the rows are
LAST_NODE = 2**31 - 1
MAX_MEBIBYTES = 2**20


@dataclass(frozen=True)
class Argument:
    """Check of a constructor's argument in a file: a finite number, a text, true or false.

    Attributes:
      remedy: sentence of its refusal.
      listed: whether a list of them is allowed too.
      grouped: whether a group of keys is allowed too, each with one of them or a list.
    """

    remedy: str
    listed: bool = False
    grouped: bool = False

    def check(self, kind: type, field: str, value: object) -> Any:
        """Return the argument; Refusal if it is none."""
        if self.grouped and isinstance(value, Mapping):
            for each in cast(Mapping[str, object], value).values():
                replace(self, grouped=False).check(kind, field, each)
            return value
        values = cast(list[object], value) if self.listed and isinstance(value, list) else [value]
        for each in values:
            if not isinstance(each, str | int | float) or (isinstance(each, float) and not isfinite(each)):
                raise Refusal(field, value, self.remedy)
        return value


OPTION = Argument("must be a finite number, a word, true, false, a list or a group of them", True, True)
ARGUMENT = Argument("must be a finite number, a word, true, false or a list of them", listed=True)


@dataclass(frozen=True, kw_only=True)
class TaskChoice:
    """Choice of the task that runs on the device: one of `name`, `target` and `kind` is set.

    Attributes:
      name: a shipped task.
      target: the owner's own task as "module:Class"; its module is among `allow_modules`.
      kind: "linear" trains a linear model with NumPy on the file `data`.
      data: relative to the bundle: an .npz file for a kind; a table, or a folder of tables, for the task csv; a file or a
        folder of texts for the task text.
      query: one SELECT whose result is the table of the task csv, in place of `data`.
      database: of the query: a URL, or a file relative to the bundle.
      client: number of this device among the task's clients, from 0.
      allow_modules: modules that may be imported for the task.
      options: arguments of a shipped task.
      args: keyword arguments of `target`.
    """

    name: str | None = None
    target: Annotated[str, Form(TARGET.pattern, "must name a class as 'module:Class'")] | None = None
    kind: Annotated[str, OneOf(KINDS)] | None = None
    data: str | None = None
    query: str | None = None
    database: str | None = None
    client: Annotated[int, Range(ge=0, le=LAST_NODE)]
    allow_modules: tuple[Annotated[str, MODULE], ...] = ()
    options: Mapping[str, Annotated[Any, OPTION]] = field(default_factory=dict[str, Any])
    args: Mapping[str, Annotated[Any, ARGUMENT]] = field(default_factory=dict[str, Any])

    def shared(self, folder: Path) -> dict[str, str]:
        """Return the path in a bundle of what all devices' tasks share, by its key; nothing of a task without own data."""
        if self.name not in OWN_FILES:
            return {}
        key, default = extension(OWN_DATA, str(self.name), "task.name", self.name)
        return {key: str(folder / str(self.options.get(key, default)))}

    def rows(self, folder: Path) -> dict[str, str]:
        """Return the options that say where the device's own rows are; paths are relative to the bundle in `folder`."""
        if self.query is None:
            return {"data": str(folder / str(self.data))}
        database = str(self.database)
        return {
            "query": self.query,
            "database": database if "://" in database else str(folder / database),
        }

    def rules(self) -> Iterator[tuple[str, str]]:
        """Yield a key and a remedy for each rule between keys that is broken."""
        if [self.name, self.target, self.kind].count(None) != 2:
            yield "name", "give one of name, target and kind"
        if (self.query is None) != (self.database is None):
            yield "query", "is executed on a database; give both query and database"
        if self.query is not None and (self.name != TABLES or self.data is not None):
            yield "query", f"gives the rows of name: {TABLES}, in place of data"
        misplaced = [key for key in OWN_ROWS if self.name == TABLES and key in self.options]
        if misplaced:
            yield "options", f"must not say where the rows are; give {misplaced[0]} beside options"
        if (self.kind is not None or self.name in OWN_FILES) != (
            self.data is not None or self.query is not None
        ):
            yield (
                "data",
                f"is required by a kind and by name: {' or '.join(OWN_FILES)}, and not allowed otherwise",
            )
        if self.args and self.target is None:
            yield "args", "belong to a target; a shipped task has options"
        module = (self.target or "").partition(":")[0]
        if module and module not in self.allow_modules:
            yield "target", f"'{module}' is not among the modules you allow; add allow_modules=[{module}]"


@dataclass(frozen=True)
class Eligibility:
    """Conditions under which the device may train; the defaults set none.

    Attributes:
      on_mains_power: do not train on battery power.
      max_temperature_celsius: limit for its hottest thermal zone; None sets none.
      min_free_mebibytes: least free memory.
      unmetered: train only over a network that is not billed by volume.
      hours: from the first to the second hour, such as 22-06, local time; across midnight if the second is smaller.
    """

    on_mains_power: bool = False
    max_temperature_celsius: Annotated[float, Range(gt=0)] | None = None
    min_free_mebibytes: Annotated[int, Range(ge=0, le=MAX_MEBIBYTES)] = 0
    unmetered: bool = False
    hours: Annotated[str, HOURS] | None = None


@dataclass(frozen=True, kw_only=True)
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
      personal: how it makes a model of its own.
    """

    federation: Name
    name: Name
    node: Annotated[int, Range(ge=FIRST_NODE, le=LAST_NODE)]
    server: Address
    link: Link = "grpc"
    state: str = "state"
    task: TaskChoice
    eligibility: Eligibility = Eligibility()
    personal: PersonalChoice = NO_OWN_MODEL


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
    def authority(self) -> TrustedAuthority:
        """The authority in force, read anew: rollovers and their approval need no restart."""
        settings = self.settings
        return current_authority(self.state, self.policy, read_file(self.folder / CA), settings.federation)

    @property
    def roots(self) -> bytes:
        """Certificates of the authority, in PEM, one of which must have signed the server's now."""
        return self.authority.roots(time.time())

    @property
    def supernode_key(self) -> Path:
        """Path of the key that identifies this device as a SuperNode of Flower (OpenSSH, P-384)."""
        return self.folder / "supernode.key"


def read_client_bundle(folder: Path, installed: Path | None = None) -> ClientBundle:
    """Return the bundle in `folder`, after completing an interrupted replacement and following a rollover in it.

    Args:
      folder: of its files.
      installed: folder of the bundle that it shall replace, with the device's state; None if it is in its place.

    Raises:
      Refusal: a file is missing, invalid or inconsistent with the others, other users may read a secret, or its roster
        changes the device's in a way that the owner does not allow.
    """
    installed = installed or folder
    settings, policy = read_device_file(folder), read_toml(OwnerPolicy, folder / POLICY)
    authority = _authority_in_force(folder, installed, settings, policy)
    credentials = read_credentials(folder, settings.federation, settings.name, authority.earlier_ca)
    key = read_private_key(folder / "identity.key")
    if not isinstance(key, Ed25519PrivateKey):
        raise Refusal("file", str(folder / "identity.key"), "is not an Ed25519 key")
    roster = _roster_in_force(folder, installed, settings, policy, key, authority)
    _check_membership(settings, key, roster)
    node_key = _node_key(installed / settings.state / "node.key")
    identity = Identity(settings.node, key, node_key, policy.floors, roster)
    return ClientBundle(folder, settings, policy, identity, credentials)


def take_shipped(bundle: ClientBundle) -> None:
    """Store a roster that the owner has put into the bundle as the device's, and record its changes.

    Raises:
      OSError: the state folder cannot be written.
    """
    path, current, authority = bundle.state / ROSTER, bundle.identity.roster, bundle.authority
    keys = authority.key, *authority.earlier
    shipped, signed = read_signed_roster(bundle.folder / ROSTER, *keys)
    if shipped.hash != current.hash:  # the device has a newer one, or its owner does not allow this one yet
        return
    if not path.exists():
        replace_file(path, signed)
        return
    stored, _ = read_signed_roster(path, *keys)
    if stored.version < current.version:
        adopt(bundle.state, change_between(stored, current), signed)


def read_device_file(folder: Path) -> DeviceFile:
    """Return the file client.toml of the bundle in `folder`.

    Raises:
      Refusal: it is missing or invalid, or other users may change it, the policy or the folder.
    """
    refuse_writable(folder, DEVICE_FILE, POLICY)
    finish_replacement(folder)
    return read_toml(DeviceFile, folder / DEVICE_FILE)


class Pinned(NamedTuple):
    """Settings and policy of a bundle, and the authority in force there."""

    device: DeviceFile
    policy: OwnerPolicy
    authority: TrustedAuthority


def read_pinned(folder: Path) -> Pinned:
    """Return the settings, the policy and the authority in force of a bundle, whose keys may be of no use any more.

    Raises:
      Refusal: a file is missing or invalid.
    """
    device, policy = read_device_file(folder), read_toml(OwnerPolicy, folder / POLICY)
    ca = read_file(folder / CA)
    return Pinned(device, policy, current_authority(folder / device.state, policy, ca, device.federation))


def replace_bundle(folder: Path, whole: Path) -> None:
    """Replace the bundle in `folder`, except its owner's files, by one that was read whole.

    One rename decides: before it the old bundle is in force, and after it every reader completes the new one.

    Args:
      folder: of the bundle.
      whole: a folder in it with the new files.

    Raises:
      Refusal: the folder cannot be written.
    """
    with refusing("folder", folder, "cannot be written"):
        sync_folder(whole)
        whole.rename(folder / REPLACING)
        sync_folder(folder)
    finish_replacement(folder)


def finish_replacement(folder: Path) -> None:
    """Complete an interrupted replacement of a bundle, if any: its owner's files stay, and the request is dropped."""
    fresh = folder / REPLACING
    # There is none, or another process completes it as well.
    already_done = suppress(FileNotFoundError, NotADirectoryError)
    with refusing("folder", folder, "cannot be written"), already_done:
        for path in fresh.iterdir():
            stays = path.name in OWNERS and (folder / path.name).exists()
            with suppress(FileNotFoundError):  # another process completes it as well
                if stays or path.name == REQUEST:
                    path.unlink()
                else:
                    path.replace(folder / path.name)
        sync_folder(folder)
        shutil.rmtree(fresh, ignore_errors=True)


def renew_roster(bundle: ClientBundle, signed: bytes) -> ClientBundle:
    """Return the bundle with a newer roster, which is stored in its state folder.

    Args:
      bundle: returned unchanged if its roster is no older.
      signed: from the server; it needs the authority's signature and a higher version.

    Raises:
      Refusal: the authority did not sign it, it no longer lists this client, or as of `check_change`.
    """
    identity, settings = bundle.identity, bundle.settings
    try:
        roster = read_roster(signed, *bundle.authority.keys(time.time()))
    except Refused as refused:
        remedy = f"is not signed by the authority ({refused})"
        raise Refusal("roster", settings.federation, remedy) from None
    if roster.version <= identity.roster.version:
        return bundle
    _check_membership(settings, identity.key, roster)
    change = check_change(bundle.state, identity.roster, roster, signed, settings.name, bundle.policy)
    bundle.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    adopt(bundle.state, change, signed)
    return replace(bundle, identity=replace(identity, roster=roster))


def _authority_in_force(
    folder: Path, installed: Path, device: DeviceFile, policy: OwnerPolicy
) -> TrustedAuthority:
    """Return the device's authority, after following a rollover that was put into the bundle if the owner allows it."""
    state = installed / device.state
    if (folder / ROLLOVERS).exists():
        try:
            adopt_rollovers(state, policy, read_file(folder / ROLLOVERS), device.federation)
        except Refusal as refusal:  # the device goes on with what it has
            logger.warning("%s", refusal)
    return current_authority(state, policy, read_file(folder / CA), device.federation)


def _roster_in_force(
    folder: Path,
    installed: Path,
    device: DeviceFile,
    policy: OwnerPolicy,
    key: Ed25519PrivateKey,
    authority: TrustedAuthority,
) -> Roster:
    """Return the bundle's roster or, if the owner does not allow its changes yet, the one that the device has.

    The device's own may stand under a key that was replaced since; a newer one must be signed by a key that counts now.
    Folders as of `read_client_bundle`; the other arguments were read there.
    """
    state, keys = installed / device.state, (authority.key, *authority.earlier)
    roster, signed = read_signed_roster(folder / ROSTER, *keys)
    path = state / ROSTER if (state / ROSTER).exists() else installed / ROSTER
    stored = read_signed_roster(path, *keys)[0] if path.exists() else roster
    if roster.version > stored.version:
        try:
            read_signed_roster(folder / ROSTER, *authority.keys(time.time()))
            check_change(state, stored, roster, signed, device.name, policy)
            stored = roster
        except Refusal:  # the older roster serves as long as it lists this device with this key
            if not _lists(stored, device, key):
                raise
    roster = stored
    if roster.version < policy.minimum_roster_version:
        minimum = policy.minimum_roster_version
        remedy = f"has version {roster.version}; the policy requires {minimum} or newer"
        raise Refusal("file", str(folder / ROSTER), remedy)
    return roster


def _lists(roster: Roster, device: DeviceFile, key: Ed25519PrivateKey) -> bool:
    """Return whether a roster has the device's node, under its name and with this key."""
    members = [(each.name, each.public) for each in roster.members if each.node == device.node]
    return members == [(device.name, public_of(key))]


def _check_membership(device: DeviceFile, key: Ed25519PrivateKey, roster: Roster) -> None:
    """Refuse a roster from which the device was revoked, or that has other keys of it."""
    if not _lists(roster, device, key):
        remedy = f"is not in roster version {roster.version} with this key: it was revoked or has new keys"
        raise Refusal("name", device.name, remedy)


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
