"""The configuration of ``fedveil server``: a simulation's, without what is simulated, and the link to real clients."""

import re
from collections.abc import Mapping, Sequence

from omegaconf import DictConfig

from ..privacy.budget import Adjacency
from ..privacy.refusal import Refusal
from .schema import (
    ClientCentral,
    ClientDistributed,
    LinkSettings,
    PrivacySettings,
    Record,
    RecordAndClient,
    ServerSettings,
    SimulationSettings,
    client_level,
)
from .settings import finish, read_federation, read_root
from .strict import Mistakes, Section

PRIMARY = "server"
LINKS = ("grpc", "flower")
SIMULATED = ("engine=", "engine.", "faults.", "partition=", "partition.", "seed=", "resume=")
RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
MOST_PATIENCE = 100_000
DEFAULT_QUORUM = 0.5
FIRST_FREE_PORT = 1024


def server_from_config(cfg: DictConfig) -> ServerSettings:
    """Read a composed server configuration by type, unit and range.

    Raises:
        Mistakes: a Refusal that holds one sentence for each mistake.
    """
    root, source = read_root(cfg)
    _no_partition(root)
    federation = read_federation(root, source)
    _check_privacy(root, federation.privacy)
    _check_audit(root.section("audit"), federation)
    settings = ServerSettings(
        run=_run(root),
        federation=federation,
        link=_link(root.section("link"), federation),
        metrics_port=root.optional_whole("metrics_port", at_least=FIRST_FREE_PORT, at_most=65535),
    )
    finish(root)
    return settings


def server_settings(argv: Sequence[str]) -> ServerSettings:
    """The settings of ``fedveil server FOLDER`` followed by these flags and overrides.

    Raises:
        Refusal: one sentence for each mistake.
    """
    from .compose import arguments, compose_jobs, is_sweep, read_job

    mistakes = [
        Refusal(each.partition("=")[0], each.partition("=")[2], "is a simulation's; real clients have link=")
        for each in argv
        if each.startswith(SIMULATED)
    ]
    if not any(each.startswith(("task=", "--config")) for each in argv):
        mistakes.append(Refusal("task", None, "say what is to be learned, for instance task=heart"))
    if mistakes:
        raise Mistakes(mistakes)
    args = arguments(["--config-name", PRIMARY, *argv])
    if is_sweep(args):
        raise Refusal("-m", " ".join(argv), "a server serves one run at a time; leave it out")
    (job,) = compose_jobs(args, server_from_config)
    return read_job(job, server_from_config)


def _no_partition(root: Section) -> None:
    """Tasks of the shipped groups name a partition; real clients hold what they hold."""
    if root.section("partition").word("name", ("natural", "iid", "dirichlet", "shards")) != "natural":
        root.refuse("partition", "real clients hold what they hold; leave it out")


def _run(root: Section) -> str:
    name = root.optional_text("run")
    if name is None or not RUN.fullmatch(name):
        root.refuse("run", "must be a name of letters, digits, '-', '_' and '.', at most 64 of them")
    return name or ""


def _check_privacy(root: Section, privacy: PrivacySettings) -> None:
    """Refuse noise that a client's own ledger cannot count before it answers."""
    section = root.section("privacy")
    both = isinstance(privacy, RecordAndClient)
    record, of_record = (privacy.record, section.section("record")) if both else (privacy, section)
    if isinstance(record, Record) and record.noise_multiplier is not None:
        of_record.refuse("noise_multiplier", "each client plans its own, from target_epsilon; leave it null")
    client, at = (privacy.client, section.section("client")) if both else (privacy, section)
    if not isinstance(client, ClientCentral):
        return
    if client.noise_schedule == "adaptive":
        at.refuse("noise_schedule", "a client's own ledger counts noise that is fixed in advance; use fixed")
    if client.noise == "correlated":
        at.refuse("noise", "a client's own ledger counts noise that is fresh in each round; use independent")


def _check_audit(section: Section, federation: SimulationSettings) -> None:
    """Refuse canary clients that no server can run by itself."""
    audit, client = federation.audit, client_level(federation.privacy)
    if audit is None or not audit.full:
        return
    if client is None:
        remedy = "its canary clients test what is claimed of whole clients, and nothing is; use light"
        section.refuse("name", remedy)
    elif isinstance(client, ClientDistributed):
        remedy = "a canary client needs keys in the roster, and whoever runs it knows its share of the noise; use light"
        section.refuse("name", remedy)


def _link(section: Section, federation: SimulationSettings) -> LinkSettings:
    name = section.option(LINKS)
    enough = section.optional_real("enough", above=0)
    if enough is not None and enough > 1:
        section.refuse("enough", "is a share of the planned cohort, at most 1")
    settings = LinkSettings(
        name=name,
        deadline=section.real("deadline", above=0),
        quorum=_quorum(section, federation),
        enough=enough,
        clients=section.real("clients", at_least=0, at_most=1),
        wait=section.real("wait", above=0),
        patience=section.whole("patience", at_least=1, at_most=MOST_PATIENCE),
    )
    section.done()
    return settings


def _quorum(section: Section, federation: SimulationSettings) -> float:
    if section.given("quorum"):
        if federation.secagg is not None:
            section.refuse("quorum", "secagg.dropout says how many an encrypted sum takes; leave it null")
        return section.real("quorum", at_least=0, at_most=1)
    return 0.0 if federation.secagg is not None or _claims_a_draw(federation) else DEFAULT_QUORUM


def _claims_a_draw(federation: SimulationSettings) -> bool:
    """Whether the accounting rests on nobody seeing how many took part."""
    client = client_level(federation.privacy)
    if client is None:
        return False
    return federation.cohort.secret or client.adjacency is Adjacency.ADD_OR_REMOVE_ONE


def differing(before: Mapping[str, object], now: Mapping[str, object], path: str = "") -> str | None:
    """The first key at which two configurations differ, or None."""
    for key in sorted({*before, *now}):
        old, new, here = before.get(key), now.get(key), f"{path}.{key}" if path else key
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            if (found := differing(old, new, here)) is not None:
                return found
        elif old != new:
            return here
    return None
