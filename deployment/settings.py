"""Settings of ``fedveil server``: the group link, and the rules that real clients need."""

from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar, Literal

from omegaconf import DictConfig
from pydantic import Field

from ..base.refusal import Refusal
from ..configs.compose import compose_jobs, is_sweep, parse_arguments, read_job
from ..configs.group import Group, remedy
from ..configs.privacy_settings import Record, RecordAndClient, RecordDistributed, SecaggSettings, sum_level
from ..configs.schema import FaultSettings, FederationSettings, InProcess, SimulationSettings
from ..configs.settings import validated
from ..configs.strict import Mistakes
from ..configs.task_settings import FolderTask, PartitionSettings
from ..configs.values import By, Positive, Probability, Rounds

DEFAULT_QUORUM = 0.5
SERVER = "server"  # name of the primary configuration of `fedveil server`
# Beginnings of overrides that only simulations have.
SIMULATED = ("engine=", "engine.", "faults.", "speed.", "partition=", "partition.", "seed=", "resume=")


class LinkSettings(Group):
    """Transport to real clients, and the timing of rounds."""

    name: Literal["grpc", "flower"]
    deadline: Positive = 300.0
    """Seconds that an exchange waits for replies."""
    quorum: Probability | None = None
    """Share of the planned cohort that must reply, or the round is abandoned; null: a half, or none with a secret draw, which a
    quorum would reveal; encrypted sums have secagg.dropout."""
    enough: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the planned cohort whose replies end an exchange; null: all invited clients."""
    clients: Probability = 0.5
    """Share of the federation that must be connected before a round starts."""
    wait: Positive = 3600.0
    """Seconds to wait for these clients."""
    patience: Annotated[int, Field(ge=1, le=100_000)] = 5
    """Consecutive abandoned rounds after which the run fails."""


class ServerSettings(FederationSettings):
    """Settings of ``fedveil server``."""

    simulates_clients: ClassVar[bool] = False
    run: Annotated[
        str,
        remedy(
            "must be a name of letters, digits, '-', '_' and '.', at most 64 of them",
            pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$",
        ),
    ] = "run-1"
    """Name of the run: the folder of its results, and the name that owners' policies may allow."""
    num_rounds: Rounds = 20
    link: LinkSettings
    metrics_port: Annotated[int, Field(ge=1024, le=65535)] | None = None
    """Port of Prometheus metrics; null: none."""
    metrics_address: Annotated[
        str,
        remedy(
            "must be an IPv4 address of this machine, or 0.0.0.0 for all", pattern=r"^(\d{1,3}\.){3}\d{1,3}$"
        ),
    ] = "127.0.0.1"
    """Address that serves them. At another than 127.0.0.1 whoever reaches it may read them."""
    partition: Annotated[PartitionSettings, By]
    """Real clients have their own data: natural only."""
    resume: Annotated[str | None, Field(exclude=True)] = None
    """Set by the server itself if a run of this name exists."""

    @property
    def federation(self) -> SimulationSettings:
        """Settings of the rounds, without those of simulations alone."""
        common = {name: getattr(self, name) for name in FederationSettings.model_fields}
        if self.secagg is not None:
            common["secagg_group"] = self.secagg.model_copy(update={"name": "masked"})
        return SimulationSettings.model_construct(
            **common, partition=self.partition, engine=InProcess(), faults=FaultSettings(), resume=self.resume
        )

    @property
    def secagg(self) -> SecaggSettings | None:
        """Settings of masks, which record-level noise shared by real clients requires."""
        group = self.secagg_group
        sums_records = isinstance(self.privacy, RecordDistributed)
        return group if sums_records and isinstance(group, SecaggSettings) else super().secagg

    def rules(self) -> Iterator[tuple[str, str]]:
        """Yield settings that real clients cannot follow or account for."""
        yield from super().rules()
        if self.resume is not None:
            yield "resume", "the same command continues a run; leave it out"
        if self.partition.name != "natural":
            yield "partition", "real clients have their own data; leave it out"
        if isinstance(self.task, FolderTask) and self.task.folder is not None:
            yield "task.folder", "the files stay at the clients; leave it out"
        for key in ("group_weights", "scaling"):
            if getattr(self.task, key, None) not in (None, "asked"):
                remedy = "devices have it in their schema: give it in the options of federation.yaml, and provision"
                yield f"task.{key}", remedy
        yield from self._rules_of_privacy()
        if self.link.quorum is not None and self.secagg is not None:
            yield "link.quorum", "secagg.dropout says how many an encrypted sum takes; leave it null"

    def _rules_of_privacy(self) -> Iterator[tuple[str, str]]:
        """Yield missing public numbers, and noise that a client's own ledger cannot account for in advance."""
        privacy = self.privacy
        if isinstance(privacy, RecordDistributed):
            if privacy.records is None:
                yield "privacy.records", "give the approximate number of records of all clients"
            if privacy.most_records is None:
                yield "privacy.most_records", "give an upper bound on the records of one client"
        if isinstance(privacy, RecordAndClient):
            record, record_path, client_path = privacy.record, "privacy.record", "privacy.client"
        else:
            record, record_path, client_path = privacy, "privacy", "privacy"
        if isinstance(record, Record) and record.clients_per_person is not None:
            text = "each client charges its own ledger, and nobody can add up the ledgers of one person's clients; leave it "
            text += "null, or use privacy=record_distributed"
            yield f"{record_path}.clients_per_person", text
        if isinstance(record, Record) and record.noise_multiplier is not None:
            text = "each client plans its own noise from target_epsilon; leave it null"
            yield f"{record_path}.noise_multiplier", text
        client = sum_level(privacy)
        if client and client.noise_schedule == "adaptive":
            text = "a client's own ledger accounts only for noise that is fixed in advance; use fixed"
            yield f"{client_path}.noise_schedule", text
        if client and client.noise == "correlated":
            text = "a client's own ledger accounts only for independent noise in each round; use independent"
            yield f"{client_path}.noise", text


def server_from_config(cfg: DictConfig) -> ServerSettings:
    """Return the settings of a server, with a quorum where `link.quorum` is null. Errors as of `validated`."""
    settings = validated(ServerSettings, cfg)
    if settings.link.quorum is not None:
        return settings
    level = sum_level(settings.privacy)
    # Whoever saw that a quorum was met would learn about a draw that the accounting takes as secret; an encrypted sum has
    # secagg.dropout.
    must_not_show = settings.secagg is not None or (level is not None and settings.cohort.secret)
    link = settings.link.model_copy(update={"quorum": 0.0 if must_not_show else DEFAULT_QUORUM})
    return settings.model_copy(update={"link": link})


def server_settings(argv: Sequence[str]) -> ServerSettings:
    """Return the settings of ``fedveil server FOLDER`` followed by these flags and overrides.

    Raises:
        Refusal: one sentence for each mistake.
    """
    mistakes = [
        Refusal(each.partition("=")[0], each.partition("=")[2], "is a simulation's; real clients have link=")
        for each in argv
        if each.startswith(SIMULATED)
    ]
    if not any(each.startswith(("task=", "--config")) for each in argv):
        mistakes.append(Refusal("task", None, "say what is to be learned, for instance task=heart"))
    if mistakes:
        raise Mistakes(mistakes)
    args = parse_arguments(["--config-name", SERVER, *argv])
    if is_sweep(args):
        raise Refusal("-m", " ".join(argv), "a server serves one run at a time; leave it out")
    (job,) = compose_jobs(args, server_from_config)
    return read_job(job, server_from_config)
