"""Population of a run: its clients, their ledgers, and what of them this machine knows, reads and shows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..base.extensions import extension
from ..configs.schema import SimulationSettings
from ..privacy.ledger.caps import lowered

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

    from ..messages.record_settings import RecordPrivacy
    from ..privacy.budget import Adjacency, Budget
    from ..privacy.ledger.caps import Cap
    from ..privacy.ledger.data_sets import PendingCharges
    from ..privacy.ledger.ledger import Head, Ledger
    from ..privacy.secagg.roster import Roster
    from ..server.round_terms import Answers
    from ..strategies.cohorts import Cohort
    from ..tasks.data import Data
    from ..tasks.protocol import Task

SIMULATION, REAL = "simulation", "real"  # what results say of a run's data
COUNTED = "counted by the link"
ESTIMATED = "estimated: simulated, by the sizes that the encoders of link=grpc give"
ONE_MACHINE = "simulated: this machine holds every key"


@dataclass(frozen=True)
class Words:
    """Words that describe a run of a population in results, titles and refusals.

    Attributes:
      data: SIMULATION or REAL, in results.
      title: the same in the title of a run.
      ledgers: the setting that names the folder of the ledgers.
      folder: the setting that names the run's folder; a server's lies in its bundle and has the run's name.
      traffic: source of the numbers of bytes, COUNTED or ESTIMATED.
      identities: who holds the keys of encrypted sums.
      unpaused: what continues a run that an alarm has paused.
    """

    data: str
    title: str
    ledgers: str
    folder: str = "hydra.run.dir"
    traffic: str = ESTIMATED
    identities: str = ONE_MACHINE
    unpaused: str = "resume=RUN"


class Population:
    """The clients of a run. The methods with a body here suit clients who keep their data and their ledgers.

    Attributes:
      simulated: whether the data are public or synthetic.
      reads_data: whether this machine reads the clients' data; other clients keep theirs, and plan with them.
      needs_held_out: whether a run is refused if its task holds no examples out.
      count_disclosure: clause on the public value that reveals the number of clients, with the remedy; empty without one.
    """

    simulated = False
    reads_data = False
    needs_held_out = False
    count_disclosure = ""

    @property
    def words(self) -> Words:
        """The words that describe a run of these clients."""
        raise NotImplementedError

    @property
    def num_clients(self) -> int:
        """Number of clients."""
        raise NotImplementedError

    @property
    def owner(self) -> str:
        """Identity of the clients on the population's ledger."""
        raise NotImplementedError

    @property
    def names(self) -> Mapping[int, str] | None:
        """The clients' names by node, of a roster; None where they are named by their numbers."""
        return None

    @property
    def rosters(self) -> Sequence[Roster]:
        """Rosters that an authority signed, at most one."""
        return ()

    @property
    def client_ledger_names(self) -> Sequence[str]:
        """Name of the ledger of each client's records, in the clients' order."""
        return ()

    @property
    def ledger_names(self) -> tuple[str, ...]:
        """`client_ledger_names` for the clients' settings; empty if each client derives its ledger's name from its data."""
        return ()

    def run_name(self, folder: Path) -> str:
        """Return the display name of the run in a folder."""
        raise NotImplementedError

    def new_name(self) -> str:
        """Return a name of a run that is new to every ledger."""
        raise NotImplementedError

    def check_run(self, name: str, folder: Path) -> None:
        """Check that a checkpoint is of this population's run; here every one is.

        Args:
          name: name of the run on the ledgers, by its checkpoint.
          folder: folder of the run.
        """

    def resumption(self, folder: Path) -> str:
        """Return the argument or the sentence that tells how to resume the run in a folder."""
        raise NotImplementedError

    def answers(self, invited: float) -> Answers:
        """Return how many answers a round needs; `invited` is the planned size of the cohort."""
        raise NotImplementedError

    def visible(self, cohort: Cohort) -> Cohort:
        """Return the cohort with a public draw if the way that a round ends shows how many answered.

        A secret draw amplifies because an absent client cannot be told from one that sent nothing. A round that is
        abandoned below a quorum, or ends once enough have answered, shows the difference.
        """
        return cohort

    def ledger_path(self, prefix: str, folder: Path) -> Path:
        """Return the path of the population's ledger.

        Args:
          prefix: prefix of the file's name: `POPULATION`, or with `RECORDS` for the ledger of all records.
          folder: folder of the run.
        """
        raise NotImplementedError

    def client_ledger_home(self, folder: Path) -> Path:
        """Return the folder of the clients' own ledgers that are on this machine, of a run in a folder."""
        raise NotImplementedError

    def sign(self, identities: str, nodes: int, doubly: bool) -> tuple[Roster, bytes]:
        """Return the roster of encrypted sums, and its signed bytes; empty if no authority signed it.

        Args:
          identities: seed of simulated identities, 32 bytes in hexadecimal.
          nodes: number of simulated identities.
          doubly: whether all members sign with ML-DSA as well as with Ed25519.

        Raises:
          Refusal: a member has no ML-DSA key, and needs one.
        """
        raise NotImplementedError

    def max_examples(self, bound: int, count: Callable[[], int]) -> float:
        """Return the most examples of one client: the `bound`, or by `count` on a machine that reads the data."""
        raise NotImplementedError

    def max_clients(self, requested: int | None) -> int | None:
        """Return the largest number of clients that train on one person: the requested one, or that of all clients."""
        return requested

    def caps(self, path: Path) -> Sequence[Cap]:
        """Return the caps of the data's owner on a ledger."""
        return ()

    def within_caps(self, path: Path, budget: Budget) -> Budget:
        """Return a ledger's budget within the caps of the data's owner."""
        return lowered(budget, self.caps(path))

    def check_identity(self, data_id: str | None, spends: bool) -> None:
        """Check that the declared name of the data is one that this population can use, and not missing if it needs one.

        Args:
          data_id: the setting `task.data_id`.
          spends: whether the run charges anybody.
        """

    def exclusive_lock(self) -> AbstractContextManager[None]:
        """Prevent other runs and questions from charging the ledgers of these data meanwhile.

        Of two with different clients' data, neither would carry over the other's pending charges; nor would a run that hides
        whole clients count what another one takes from its records.

        Raises:
          Refusal: another one is in progress, or a ledger is older than the last one left it.
        """
        return nullcontext()

    def check_mode(self, mode: str) -> None:
        """Refuse records that the other record-level mode charges, on ledgers that this mode does not use."""

    def claim_mode(self, mode: str) -> None:
        """Record which mode charges the records on this machine; of two that begin at the same time one is refused."""

    def scaled(self, settings: SimulationSettings, task: Task, keep_names: bool) -> Population:
        """Return the population with scaled inputs.

        Args:
          settings: without the request for scaling.
          task: with scaled inputs.
          keep_names: whether each client has a ledger, which keeps the name that its data had before the scaling.
        """
        return self

    def pending_charges(self) -> PendingCharges:
        """Return earlier losses of people with real data on this machine that the clients' ledgers lack; `settle` charges them."""
        raise NotImplementedError

    def settle(self, record: RecordPrivacy) -> str:
        """Charge the clients' ledgers with earlier losses of their people, and return a warning; it may be empty."""
        return ""

    def settle_sums(self, path: Path, budget: Budget) -> None:
        """Charge the population's ledger, before it is opened, with earlier losses of its people.

        Raises:
          Refusal: it is older than what its clients' earlier runs know.
        """

    def share(self, ledger: Ledger, budget: Budget) -> None:
        """Connect an open ledger of the population with the other ledgers of the same people."""

    def keep_head(self, ledger: Ledger) -> None:
        """Store the head of a closed ledger; a later run refuses a ledger without it."""

    def keep_answer(self, folder: Path, name: str, head: Head) -> None:
        """Store the ledger's head after the question of this name, answered or not, in the folder of questions' records."""

    def sums_of_clients(self, adjacency: Adjacency) -> Sequence[DpEvent]:
        """Return what earlier sums of whole clients cost a record, if its client charges them to its own ledger."""
        return ()

    def client_ledger_files(self, folder: Path) -> list[Path]:
        """Return the clients' own ledgers in a folder of this machine."""
        return []

    def opened_ledgers(
        self, record: RecordPrivacy, took_part: Collection[int], paths: Collection[Path]
    ) -> Iterable[tuple[int, str]]:
        """Return numbers and ledgers' names of the clients on this machine that may have entries, in the clients' order.

        Args:
          record: settings of the clients.
          took_part: numbers of the drawn clients.
          paths: all ledgers of clients.
        """
        return ()

    def charged(self, record: RecordPrivacy, run: str, number: int, clients: Sequence[int]) -> list[int]:
        """Return those of the clients whose ledgers hold a round of a run; all, if this machine cannot read their ledgers.

        Args:
          record: settings of the clients.
          run: name of the run on the ledgers.
          number: number of the round.
          clients: numbers of the clients that were drawn, and did not answer.
        """
        return list(clients)

    def clients_to_check(self, task: Task, all_clients: bool) -> range:
        """Return the clients whose data are checked before anything is spent.

        Args:
          task: task of the run.
          all_clients: whether all are checked; of many simulated ones a few are enough, since a client with refused data
            drops out of its round.
        """
        raise NotImplementedError

    def local_clients(self, task: Task) -> range:
        """Return the clients whose real data this machine has."""
        return range(0)

    def to_measure(self, task: Task) -> Iterable[Data]:
        """Return sets of examples on which a run tests that no record's gradient depends on another record."""
        return [self.sample_examples(task)]

    def sample_examples(self, task: Task) -> Data:
        """Return examples of the same shapes as the clients' examples, for checks of the model before the run."""
        raise NotImplementedError

    def position_digest(self, key: bytes | None) -> str | None:
        """Return a keyed digest of the clients' data in their order, for a resumed run to compare; None without a key."""
        return None


class ExtraParticipants(Protocol):
    """Part of an observer that adds canaries to a run: extra clients, records of a client, planted examples, kept losses."""

    # Numbers of canary clients, and of canary records of each client, of which the smallest one has `fewest()` of its own.
    def extra_clients(self, settings: SimulationSettings, task: Task, /) -> int: ...
    def extra_records(
        self, settings: SimulationSettings, clients: int, fewest: Callable[[], int], /
    ) -> int: ...
    def plants_examples(self, settings: SimulationSettings, /) -> bool: ...
    def keeps_losses(self, settings: SimulationSettings, /) -> bool: ...


class Nobody:
    """`ExtraParticipants` of a run without an observer."""

    def extra_clients(self, *_: object) -> int:
        """Return 0."""
        return 0

    extra_records = extra_clients

    def plants_examples(self, *_: object) -> bool:
        """Return False."""
        return False

    keeps_losses = plants_examples


def extra_of(settings: SimulationSettings) -> ExtraParticipants:
    """Return the extra participants that the observer of these settings adds.

    Raises:
      Refusal: the observer is not installed.
    """
    name = settings.observer
    return extension("audit", "ExtraParticipants", "audit", name) if name else Nobody()
