"""Operator's file federation.yaml, which describes a federation: read strictly, and refused with any mistake."""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import yaml

from ..base.bounded_decoding import defaults_of, plain_of
from ..base.refusal import Form, OneOf, Range, Refusal
from ..configs.bundle_files import ADDRESS_FORM, HOST, NAME_FORM, SCHEMA, Address, Lines, Link, Name
from ..configs.strict import read_group
from ..configs.yaml_guard import check_file, yaml_sentence
from ..links.server_bundle import SERVER
from ..tasks.scaling import standardised
from ..tasks.table_schema import read_schema, weighted_schema
from .authority import KeyCare
from .device.client_bundle import TABLES, Eligibility, TaskChoice
from .device.owner_policy import OwnerPolicy
from .device.personal_choice import PersonalChoice
from .token_keys import TokenChoice

DAYS = 365
MAX_DAYS = 397  # TLS libraries accept at most 398 days of validity, and one goes to late clocks
POLICY_DEFAULTS = {  # values of a policy that the file may leave out: all but its targets
    **plain_of(defaults_of(OwnerPolicy)),
    "runs": [],
    "trust_server": False,
    "minimum_cohort": 3,
    "collusion": 0.1,
    "dropout": 0.4,
    "maximum_clipping_norm": 100.0,
    "minimum_noise_multiplier": 0.0,
    "profile": "malicious",
    "maximum_local_epochs": 10,
}
# Keys of a policy that provisioning writes; with these values in their place the rest of a policy is checked.
PROVISIONED = {"authority": "0" * 64, "minimum_roster_version": 1}
GROUPS: Mapping[str, Mapping[str, Any]] = {
    "task": {**plain_of(defaults_of(TaskChoice)), "client": None},
    "eligibility": plain_of(defaults_of(Eligibility)),
    "personal": plain_of(defaults_of(PersonalChoice)),
    "policy": POLICY_DEFAULTS,
}
HASHED, UNVERIFIED = REQUIREMENTS = ("hashed", "unverified_code")
CHOICES = ("name", "target", "kind")  # of a task, of which one is set
OWN_ROWS = ("data", "query", "database")  # keys of a task that say where a device's rows are
OF_SCHEMA = ("label", "group_weights", "scaling")  # options of tables that stand in the schema of a bundle
PATTERN = Form(
    "[a-z0-9*?][a-z0-9_*?-]{0,47}", f"must be {NAME_FORM}; * and ? stand for any of them in a name of many"
)

Values = Mapping[str, Any]


class EnrolmentAddresses(NamedTuple):
    """Where the server listens for devices that enrol, and what they dial, each host:port."""

    listen: str
    address: str


@dataclass(frozen=True)
class ServerGroup:
    """Group `server` of the file.

    Attributes:
      address: what the clients dial.
      listen: where the server listens; None for the address's port on all interfaces.
      also: further DNS names and IP addresses of the server.
      enrolment: what devices dial to enrol; None for no such port.
    """

    address: Address
    listen: Address | None = None
    also: Lines = ()
    enrolment: Address | None = None

    @property
    def hosts(self) -> tuple[str, ...]:
        """DNS names and IP addresses in the server's certificate; the first is that of `address`."""
        return _host(self.address), *self.also

    @property
    def listen_address(self) -> str:
        """Where the server listens, host:port."""
        return self.listen or f"0.0.0.0:{_port(self.address)}"

    @property
    def enrolment_addresses(self) -> EnrolmentAddresses | None:
        """Addresses of the port for enrolments; None has no such port."""
        if self.enrolment is None:
            return None
        listen = f"{self.listen_address.rpartition(':')[0]}:{_port(self.enrolment)}"
        return EnrolmentAddresses(listen, self.enrolment)

    def rules(self) -> Iterator[tuple[str, str]]:
        if not all(map(_is_host, self.also)):
            yield "also", "must be a list of DNS names and IP addresses"
        if not _is_host(_host(self.address)):
            yield "address", f"must be {ADDRESS_FORM}"
        if self.enrolment and _host(self.enrolment) not in self.hosts:
            yield "enrolment", "must have a host of the server's certificate: that of address, or one of also"
        if self.enrolment and _port(self.enrolment) == _port(self.listen_address):
            yield "enrolment", "must be another port than the link's, which admits only who is enrolled"


@dataclass(frozen=True)
class AuthorityGroup:
    """Group `authority` of the file: a passphrase for key files, or library (`pkcs11`) and label of a token."""

    passphrase: bool = False
    pkcs11: str | None = None
    token: str | None = None

    @property
    def care(self) -> KeyCare:
        """How the authority's keys are kept."""
        token = TokenChoice(self.pkcs11, self.token) if self.pkcs11 and self.token else None
        return KeyCare(self.passphrase, token)

    def rules(self) -> Iterator[tuple[str, str]]:
        if (self.pkcs11 is None) != (self.token is None):
            yield "token", "goes with pkcs11: the token's label, and the path of its PKCS#11 library"
        if self.pkcs11 is not None and self.passphrase:
            yield "passphrase", "is of keys in files; a token has a PIN"


@dataclass(frozen=True, kw_only=True)
class _Groups:
    """Groups that the file has for all clients, and again for each."""

    task: Values = field(default_factory=dict[str, Any])
    eligibility: Values = field(default_factory=dict[str, Any])
    personal: Values = field(default_factory=dict[str, Any])
    policy: Values = field(default_factory=dict[str, Any])


@dataclass(frozen=True, kw_only=True)
class _Client(_Groups):
    """Item of the list `clients`."""

    name: Annotated[str, PATTERN]
    request: str | None = None

    def rules(self) -> Iterator[tuple[str, str]]:
        if self.request and is_pattern(self.name):
            yield "request", "is of one device; give it a name without * and ?"


@dataclass(frozen=True, kw_only=True)
class FileContent(_Groups):
    """Content of the file.

    Attributes:
      link: `grpc` or `flower`.
      certificate_days: how long a certificate is valid.
      requirements: `hashed`, or `unverified_code`: devices then run what a package index serves under a name.
      post_quantum: whether authority and members sign with ML-DSA-65 beside Ed25519.
    """

    federation: Name
    server: ServerGroup
    authority: AuthorityGroup = AuthorityGroup()
    link: Link = "grpc"
    certificate_days: Annotated[int, Range(ge=1, le=MAX_DAYS)] = DAYS
    requirements: Annotated[str, OneOf(REQUIREMENTS)] = HASHED
    post_quantum: bool = False
    clients: tuple[_Client, ...]

    def rules(self) -> Iterator[tuple[str, str]]:
        if self.authority.token is not None and self.post_quantum:
            remedy = "needs an authority whose keys are in files: no token that is known here has ML-DSA"
            yield "post_quantum", remedy
        if not self.clients:
            yield "clients", "must be a list of groups of keys"


@dataclass(frozen=True)
class ClientEntry:
    """Operator's description of one client.

    Attributes:
      name: unique, and never "server"; with * or ? a pattern, for all clients that enrol under a name that fits.
      request: the file by which the device asks for admission; None has its keys made here.
      task, eligibility, personal, policy: values for the files of its bundle; those that are None stand in no file.
    """

    name: str
    request: Path | None
    task: Values
    eligibility: Values
    personal: Values
    policy: Values


@dataclass(frozen=True)
class FederationFile:
    """The operator's description of a federation.

    Attributes:
      content: values of the file, without those of clients.
      clients: in the order of the file.
      patterns: entries whose names are patterns, in the order of the file; the first that fits counts.
      schema: of the tables of all clients that have the task csv, as text; None where no client has.
      source: the bytes of the file.
    """

    content: FileContent
    clients: tuple[ClientEntry, ...]
    patterns: tuple[ClientEntry, ...]
    schema: str | None
    source: bytes = field(repr=False)

    @property
    def name(self) -> str:
        """Name of the federation."""
        return self.content.federation

    def entry(self, name: str) -> ClientEntry | None:
        """Return the description of the client of this name; None if the file has none."""
        for each in self.clients:
            if each.name == name:
                return each
        match = next((each for each in self.patterns if fnmatch.fnmatchcase(name, each.name)), None)
        return None if match is None else replace(match, name=name)


def read_federation(path: Path) -> FederationFile:
    """Return the description in the file.

    Raises:
      Refusal: it cannot be read, or a part of it holds mistakes; it names all mistakes of the first such part.
    """
    check_file(path)
    source = path.read_bytes()
    file = read_group(FileContent, _load(path, source), "")
    shared = {group: fill(defaults, getattr(file, group)) for group, defaults in GROUPS.items()}
    for group in ("eligibility", "personal", "policy", *(["task"] if file.task else [])):
        task_data = _common_data(file.clients) if group == "task" else {}
        _check(group, {**shared[group], **task_data}, group)
    entries = [
        _entry(client, shared, f"clients[{index}]", path.parent) for index, client in enumerate(file.clients)
    ]
    for name, times in Counter(entry.name for entry in entries).items():
        if name == SERVER or times > 1:
            raise Refusal("name", name, "belongs to the server" if name == SERVER else "names two clients")
    patterns = tuple(entry for entry in entries if is_pattern(entry.name))
    clients = tuple(entry for entry in entries if entry not in patterns)
    return FederationFile(file, clients, patterns, _schema(entries, path.parent), source)


def fill(defaults: Values, values: Values) -> dict[str, Any]:
    """Return values with the defaults of missing keys, also in groups within groups."""
    whole = {**defaults, **values}
    for key, default in defaults.items():
        if isinstance(default, Mapping) and isinstance(whole[key], Mapping):
            whole[key] = fill(default, whole[key])
    return whole


def is_pattern(name: str) -> bool:
    """Whether it is a pattern for several names."""
    return "*" in name or "?" in name


def _common_data(clients: Sequence[_Client]) -> Values:
    """Return the first client's data if each client has its own, so that the federation's task can be checked; else nothing."""
    own = [{key: each.task[key] for key in OWN_ROWS if each.task.get(key)} for each in clients]
    return own[0] if all(own) else {}


def _schema(entries: Sequence[ClientEntry], folder: Path) -> str | None:
    """Return the schema of all tables as text, from the file's folder; None without tables. Refuse different ones."""
    choices = {
        tuple(entry.task["options"].get(key) for key in ("schema", *OF_SCHEMA))
        for entry in entries
        if entry.task["name"] == TABLES
    }
    if len(choices) > 1:
        names = ", ".join(sorted(str(name or SCHEMA) for name, *_ in choices))
        remedy = "must be the same, with the same label, for all clients; so must group_weights and scaling"
        raise Refusal("task.options.schema", names, remedy)
    for name, label, *files in choices:  # one, or none
        path = folder / str(name or SCHEMA)
        if not path.is_file():  # the desk's copy has what these files say already
            return read_schema(folder / SCHEMA, label).text()
        weights, scaling = (None if each is None else str(folder / str(each)) for each in files)
        return weighted_schema(standardised(read_schema(path, label), scaling), weights).text()
    return None


def _host(address: str) -> str:
    return address.rpartition(":")[0].strip("[]")


def _port(address: str) -> str:
    return address.rpartition(":")[2]


def _is_host(text: str) -> bool:
    """Whether it is a DNS name or an IP address."""
    if ":" not in text:
        return HOST.fullmatch(text) is not None
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def _entry(client: _Client, shared: Mapping[str, Values], path: str, folder: Path) -> ClientEntry:
    """Return a client's description, in which its own values replace the federation's."""
    task = shared["task"]
    # A task of its own takes nothing of the federation's that would select another.
    if any(choice in client.task for choice in CHOICES):
        task = {**task, **dict.fromkeys((*CHOICES, *OWN_ROWS)), "args": {}}
    defaults = {**shared, "task": task}
    parts = {group: fill(values, getattr(client, group)) for group, values in defaults.items()}
    for group, part in parts.items():
        _check(group, part, f"{path}.{group}")
    return ClientEntry(client.name, folder / client.request if client.request else None, **parts)


def _check(group: str, values: Values, path: str) -> None:
    """Read a group's values as the device will, so that a bundle which it would refuse is refused here."""
    match group:
        case "task":
            client = 0 if values["client"] is None else values["client"]
            read_group(TaskChoice, {**values, "client": client}, path)
        case "eligibility":
            read_group(Eligibility, values, path)
        case "personal":
            read_group(PersonalChoice, values, path)
        case _:
            remedy = "is written by provisioning; leave it out"
            for key in PROVISIONED:
                if key in values:
                    raise Refusal(f"{path}.{key}", values[key], remedy)
            if values["queries"]:
                remedy = "are listed by the owner of each device, who reads the query first; leave them out"
                raise Refusal(f"{path}.queries", values["queries"], remedy)
            read_group(OwnerPolicy, {**values, **PROVISIONED}, path)


def _load(path: Path, source: bytes) -> dict[str, Any]:
    """Return the mapping in the YAML `source` of the file at `path`."""
    try:
        content = yaml.load(source.decode("utf-8-sig"), Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        raise Refusal("file", str(path), yaml_sentence(error)) from None
    except Exception as error:  # noqa: BLE001 (PyYAML's constructors document no closed set)
        reason = str(error) or type(error).__name__
        raise Refusal("file", str(path), f"cannot be read as YAML ({reason})") from None
    if not isinstance(content, dict):
        raise Refusal("file", str(path), "must be a mapping that begins with federation: NAME")
    return content


class _Loader(yaml.SafeLoader):
    """YAML loader for plain values with text keys; 1e-5 is a number as in YAML 1.2."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        for key in mapping:
            if not isinstance(key, str):
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key!r} is not text; put it in quotes", problem_mark=node.start_mark
                )
        return mapping

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        text = super().construct_scalar(node)
        if any("\ud800" <= each <= "\udfff" for each in text):
            raise yaml.MarkedYAMLError(problem="half of a character is no text", problem_mark=node.start_mark)
        return text


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
