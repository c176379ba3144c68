"""Operator's file federation.yaml, which describes a federation: read strictly, and refused with any mistake."""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..base.refusal import Refusal
from ..configs.bundle_files import (
    ADDRESS,
    ADDRESS_FORM,
    HOST,
    LINKS,
    NAME,
    NAME_FORM,
    SCHEMA,
    filled,
    read_section,
)
from ..configs.strict import Section
from ..configs.yaml_guard import check_file, yaml_sentence
from ..links.server_bundle import SERVER
from ..tasks.group_weights import weighted_schema
from ..tasks.scaling import standardised
from ..tasks.table_schema import read_schema
from .authority import KeyCare
from .device import owner_policy
from .device.client_bundle import TABLES, TASK_DEFAULTS, Eligibility, read_eligibility, read_task
from .device.owner_policy import read_policy
from .token_keys import TokenChoice

DAYS = 365
MOST_DAYS = 397  # TLS libraries accept at most 398 days of validity, and one goes to late clocks
POLICY_DEFAULTS = {
    **owner_policy.POLICY_DEFAULTS,
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
# What provisioning itself puts into each policy.
PROVISIONED = {"authority": "0" * 64, "minimum_roster_version": 1}
GROUPS: Mapping[str, Mapping[str, Any]] = {
    "task": {**TASK_DEFAULTS, "client": None},
    "eligibility": asdict(Eligibility()),
    "policy": POLICY_DEFAULTS,
}
HASHED, UNVERIFIED = REQUIREMENTS = ("hashed", "unverified_code")
CHOICES = ("name", "target", "kind")
OF_SCHEMA = ("label", "group_weights", "scaling")  # options of tables that stand in the schema of a bundle
DEFAULTS = {
    "link": "grpc",
    "certificate_days": DAYS,
    "post_quantum": False,
    "requirements": "hashed",
    "server": {"listen": None, "also": [], "enrolment": None},
    "authority": {"passphrase": False, "pkcs11": None, "token": None},
    "task": {},
    "eligibility": {},
    "policy": {},
}

PATTERN = re.compile("[a-z0-9*?][a-z0-9_*?-]{0,47}")
PATTERN_FORM = f"{NAME_FORM}; * and ? stand for any of them in a name of many"

Values = Mapping[str, Any]


@dataclass(frozen=True)
class ClientEntry:
    """Operator's description of one client.

    Attributes:
      name: unique, and never "server"; with * or ? in it, of all clients that enrol under such a name.
      request: the file by which the device asks for admission; None has its keys made here.
      task, eligibility, policy: what the files of its bundle hold; None stands for what they leave out.
    """

    name: str
    request: Path | None
    task: Values
    eligibility: Values
    policy: Values


class EnrolmentAddress(NamedTuple):
    """Where the server listens for devices that enrol, and what they dial, each host:port."""

    listen: str
    address: str


@dataclass(frozen=True)
class FederationFile:
    """The operator's description of a federation.

    Attributes:
      name: of the federation.
      address: what the clients dial, host:port.
      listen: where the server listens, host:port.
      hosts: DNS names and IP addresses in the server's certificate; the first is the host of `address`.
      link: `grpc` or `flower`.
      certificate_days: how long a certificate is valid.
      requirements: `hashed`, or `unverified_code`: devices then run what a package index serves under a name.
      care: how the authority's keys are kept.
      post_quantum: whether authority and members sign with ML-DSA-65 beside Ed25519.
      clients: in the order of the file.
      many: entries whose names are patterns, in the order of the file; the first that fits counts.
      enrolment: None has no such port.
      schema: of the tables of all clients that have the task csv, as text; None where no client has.
      source: the bytes of the file, all of which was read.
    """

    name: str
    address: str
    listen: str
    hosts: tuple[str, ...]
    link: str
    certificate_days: int
    requirements: str
    care: KeyCare
    post_quantum: bool
    enrolment: EnrolmentAddress | None
    clients: tuple[ClientEntry, ...] = ()
    many: tuple[ClientEntry, ...] = ()
    schema: str | None = None
    source: bytes = field(default=b"", repr=False)

    def entry(self, name: str) -> ClientEntry | None:
        """Return the description of the client of this name; None if the file has none."""
        for each in self.clients:
            if each.name == name:
                return each
        found = next((each for each in self.many if fnmatch.fnmatchcase(name, each.name)), None)
        return None if found is None else replace(found, name=name)


def read_federation(path: Path) -> FederationFile:
    """Return the description in the file.

    Raises:
      Refusal: it cannot be read, or a part of it holds mistakes; all mistakes of the first such part are told.
    """
    check_file(path)
    source = path.read_bytes()
    values = filled(DEFAULTS, _load(path, source))
    made = read_section(values, _top, "")
    shared = {group: filled(defaults, values[group]) for group, defaults in GROUPS.items()}
    for group in ("eligibility", "policy", *(["task"] if values["task"] else [])):
        own = _of_each(values["clients"]) if group == "task" else {}
        _check(group, {**shared[group], **own}, group)
    entries = [
        _client(entry, shared, f"clients[{place}]", path.parent)
        for place, entry in enumerate(values["clients"])
    ]
    for name, times in Counter(entry.name for entry in entries).items():
        if name == SERVER or times > 1:
            raise Refusal("name", name, "belongs to the server" if name == SERVER else "names two clients")
    many = tuple(entry for entry in entries if is_pattern(entry.name))
    clients = tuple(entry for entry in entries if entry not in many)
    schema = _schema(entries, path.parent)
    return replace(made, clients=clients, many=many, schema=schema, source=source)


def is_pattern(name: str) -> bool:
    """Whether it is a pattern for several names."""
    return "*" in name or "?" in name


def _of_each(clients: Sequence[Values]) -> Values:
    """Return one client's data if each client names its own instead of the federation."""
    own = [task.get("data") for each in clients if isinstance(task := each.get("task"), dict)]
    return {"data": own[0]} if len(own) == len(clients) and all(own) else {}


def _schema(entries: Sequence[ClientEntry], folder: Path) -> str | None:
    """Return the common schema of all tables; the desk has a copy next to its copy of the file."""
    asked = {
        tuple(entry.task["options"].get(key) for key in ("schema", *OF_SCHEMA))
        for entry in entries
        if entry.task["name"] == TABLES
    }
    if len(asked) > 1:
        shown = ", ".join(sorted(str(name or SCHEMA) for name, *_ in asked))
        remedy = "must be the same, with the same label, for all clients; so must group_weights and scaling"
        raise Refusal("task.options.schema", shown, remedy)
    for name, label, *files in asked:
        found = folder / str(name or SCHEMA)
        if not found.is_file():  # the desk's copy has what these files say already
            return read_schema(folder / SCHEMA, label).text()
        weights, scaling = (None if each is None else str(folder / str(each)) for each in files)
        return weighted_schema(standardised(read_schema(found, label), scaling), weights).text()
    return None


def _top(section: Section) -> FederationFile:
    """Return the file's description of the federation, without its clients."""
    for group in GROUPS:
        section.section(group)
    section.groups("clients")
    server = section.section("server")
    address, also = server.matching("address", ADDRESS, ADDRESS_FORM), server.texts("also")
    host, _, port = address.rpartition(":")
    if not all(map(_is_host, also)):
        server.refuse("also", "must be a list of DNS names and IP addresses")
    if address and not _is_host(host.strip("[]")):
        server.refuse("address", f"must be {ADDRESS_FORM}")
    care, post_quantum = _care(section.section("authority")), section.flag("post_quantum")
    if care.token is not None and post_quantum:
        section.refuse(
            "post_quantum",
            "needs an authority whose keys are in files: no token that is known here has ML-DSA",
        )
    listen = f"0.0.0.0:{port}"
    if server.given("listen"):
        listen = server.matching("listen", ADDRESS, ADDRESS_FORM)
    hosts = (host.strip("[]"), *also)
    enrolment = _enrolment(server, listen, hosts) if server.given("enrolment") else None
    server.done()
    return FederationFile(
        section.matching("federation", NAME, NAME_FORM),
        address,
        listen,
        hosts,
        section.word("link", LINKS),
        section.whole("certificate_days", at_least=1, at_most=MOST_DAYS),
        section.word("requirements", REQUIREMENTS),
        care,
        post_quantum,
        enrolment,
    )


def _care(section: Section) -> KeyCare:
    passphrase = section.flag("passphrase")
    module, label = section.optional_text("pkcs11"), section.optional_text("token")
    if (module is None) != (label is None):
        section.refuse("token", "goes with pkcs11: the token's label, and the path of its PKCS#11 library")
    if module is not None and passphrase:
        section.refuse("passphrase", "is of keys in files; a token has a PIN")
    section.done()
    return KeyCare(passphrase, TokenChoice(module, label) if module and label else None)


def _enrolment(server: Section, listen: str, hosts: Sequence[str]) -> EnrolmentAddress:
    address = server.matching("enrolment", ADDRESS, ADDRESS_FORM)
    host, _, port = address.rpartition(":")
    if address and host.strip("[]") not in hosts:
        server.refuse(
            "enrolment", "must have a host of the server's certificate: that of address, or one of also"
        )
    if address and port == listen.rpartition(":")[2]:
        server.refuse("enrolment", "must be another port than the link's, which admits only who is enrolled")
    return EnrolmentAddress(f"{listen.rpartition(':')[0]}:{port}", address)


def _is_host(text: str) -> bool:
    """Whether it is a DNS name or an IP address."""
    if ":" not in text:
        return HOST.fullmatch(text) is not None
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def _client(found: Values, shared: Mapping[str, Values], path: str, folder: Path) -> ClientEntry:
    values = filled({"request": None, "task": {}, "eligibility": {}, "policy": {}}, found)
    name, request = read_section(values, _entry, path)
    task = shared["task"]
    if any(choice in values["task"] for choice in CHOICES):
        task = {**task, **dict.fromkeys((*CHOICES, "data")), "args": {}}
    wanted = {
        group: filled(values_of, values[group]) for group, values_of in {**shared, "task": task}.items()
    }
    for group, part in wanted.items():
        _check(group, part, f"{path}.{group}")
    return ClientEntry(name, folder / request if request else None, **wanted)


def _entry(section: Section) -> tuple[str, str | None]:
    for group in GROUPS:
        section.section(group)
    name, request = section.matching("name", PATTERN, PATTERN_FORM), section.optional_text("request")
    if request and is_pattern(name):
        section.refuse("request", "is of one device; give it a name without * and ?")
    return name, request


def _check(group: str, values: Values, path: str) -> None:
    """Refuse values that the client's own reader would refuse."""
    match group:
        case "task":
            client = 0 if values["client"] is None else values["client"]
            read_section({**values, "client": client}, read_task, path)
        case "eligibility":
            read_section(values, read_eligibility, path)
        case _:
            remedy = "is written by provisioning; leave it out"
            for key in PROVISIONED:
                if key in values:
                    raise Refusal(f"{path}.{key}", values[key], remedy)
            read_section({**values, **PROVISIONED}, read_policy, path)


def _load(path: Path, source: bytes) -> dict[str, Any]:
    try:
        found = yaml.load(source.decode("utf-8-sig"), Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        raise Refusal("file", str(path), yaml_sentence(error)) from None
    except Exception as error:  # noqa: BLE001 (PyYAML's constructors document no closed set)
        said = str(error) or type(error).__name__
        raise Refusal("file", str(path), f"cannot be read as YAML ({said})") from None
    if not isinstance(found, dict):
        raise Refusal("file", str(path), "must be a mapping that begins with federation: NAME")
    return found


class _Loader(yaml.SafeLoader):
    """YAML loader for plain values with text keys; 1e-5 is a number as in YAML 1.2."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        made = super().construct_mapping(node, deep)
        for key in made:
            if not isinstance(key, str):
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key!r} is not text; put it in quotes", problem_mark=node.start_mark
                )
        return made

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        found = super().construct_scalar(node)
        if any("\ud800" <= each <= "\udfff" for each in found):
            raise yaml.MarkedYAMLError(problem="half of a character is no text", problem_mark=node.start_mark)
        return found


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
