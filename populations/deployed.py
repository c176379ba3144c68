"""Deployed population: clients of a roster, who keep their data and the ledgers of their records."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..base.bounded_decoding import read_json
from ..base.durable_files import replace_file
from ..base.refusal import Refusal, unreadable
from ..messages.training_order import NEW, display_name
from ..privacy.budget import Adjacency, Budget
from ..privacy.ledger.caps import POPULATION, Cap, caps_on, ledger_file
from ..privacy.ledger.client_sums import sums_of_records
from ..privacy.ledger.hash_chain import holds_head
from ..privacy.ledger.ledger import Head
from ..server.round_terms import Answers
from ..strategies.cohorts import Cohort, with_label
from ..tasks.data import Data, held_out_of
from ..tasks.protocol import Task
from .population import COUNTED, REAL, Population, Words

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

    from ..privacy.secagg.roster import Roster

PUBLIC_ANSWERS = "none: how a round ends tells how many took part"
HEADS = "ledger.heads"  # file in the folder of answers: the heads that the last questions left on a server's ledgers


@dataclass(frozen=True)
class Deployed(Population):
    """Clients of a roster, and the rules of the link.

    Attributes:
      run: display name of the run; owners may allow it by this name.
      identity: name of the federation on its ledger, in hexadecimal.
      roster: roster of the clients.
      signed_roster: the roster's bytes as the authority signed them.
      ledgers: folder of the population's ledger.
      quorum: share of the planned cohort that must answer; 0 for none.
      enough: share of the planned cohort whose answers end an exchange early; None waits for all that are invited.
      heads: heads of the server's ledgers after earlier runs and questions, by the name of the run or question.
      ledger_dir: the setting `ledger.dir`; None for the bundle's own folder.
    """

    run: str
    identity: str
    roster: Roster
    signed_roster: bytes
    ledgers: Path
    quorum: float = 0.0
    enough: float | None = None
    heads: Mapping[str, Head] = field(default_factory=dict[str, Head])
    ledger_dir: str | None = None

    needs_held_out = True
    count_disclosure = "the roster reveals the number of clients; use zero-out"

    @property
    def words(self) -> Words:
        """The words that describe a run of these clients."""
        signer = f"of the roster that the authority signed, version {self.roster.version}"
        again = "the same command with --despite-alarm"
        return Words(REAL, "real data", "ledger.dir", "run", COUNTED, identities=signer, unpaused=again)

    @property
    def num_clients(self) -> int:
        """Number of clients."""
        return len(self.roster.members)

    @property
    def owner(self) -> str:
        """Identity of the clients on the population's ledger."""
        return self.identity

    @property
    def names(self) -> Mapping[int, str]:
        """The clients' names by node."""
        return {member.node: member.name for member in self.roster.members}

    @property
    def rosters(self) -> Sequence[Roster]:
        """The roster that the authority signed."""
        return (self.roster,)

    def run_name(self, folder: Path) -> str:
        """Return the display name of the run."""
        return self.run

    def new_name(self) -> str:
        """Return a name that is new to every ledger and begins with the run's."""
        return f"{self.run}{NEW}{uuid.uuid4().hex}"

    def check_run(self, name: str, folder: Path) -> None:
        """Refuse a checkpoint of another run, which may be on the same ledger."""
        if (other := display_name(name)) != self.run:
            remedy = f"holds a checkpoint of run {other!r}; restore its own from a backup"
            raise Refusal("resume", str(folder), remedy)

    def resumption(self, folder: Path) -> str:
        """Return how to resume the run."""
        return "the same command"

    def sign(self, identities: str, nodes: int, doubly: bool) -> tuple[Roster, bytes]:
        """Return the roster of encrypted sums, and its signed bytes. Arguments as of `Population`."""
        lacking = [member.name for member in self.roster.members if not member.post_quantum]
        if doubly and lacking:
            remedy = f"{lacking[0]} has no ML-DSA key in the roster; provision with post_quantum: true"
            raise Refusal("secagg.suite", 3, remedy)
        return self.roster, self.signed_roster

    def max_examples(self, bound: int, count: Callable[[], int]) -> float:
        """Return the bound on the examples of one client, who alone knows their number."""
        return float(bound)

    def answers(self, invited: float) -> Answers:
        """Return how many answers a round needs, and how many end it: shares of `invited`, the planned cohort."""
        enough = None if self.enough is None else max(1, math.ceil(self.enough * invited))
        return Answers(math.ceil(self.quorum * invited), enough)

    def visible(self, cohort: Cohort) -> Cohort:
        """Return the cohort with a public draw if a round ends by the number of its answers."""
        return with_label(cohort, PUBLIC_ANSWERS) if self.quorum or self.enough is not None else cohort

    def ledger_path(self, prefix: str, folder: Path) -> Path:
        """Return the path of the population's ledger. Arguments as of `Population`."""
        return ledger_file(self.ledgers, self.owner, prefix)

    def client_ledger_home(self, folder: Path) -> Path:
        """Return the run's folder, in which there are none: the clients keep their own ledgers."""
        return folder

    def caps(self, path: Path) -> Sequence[Cap]:
        """Return the owner's caps on a ledger."""
        return caps_on(path)

    def check_identity(self, data_id: str | None, spends: bool) -> None:
        """Refuse a data set's name: a server's ledger has the federation's."""
        if data_id is not None:
            remedy = "the federation's name names a server's ledger; leave it out"
            raise Refusal("task.data_id", data_id, remedy)

    def settle_sums(self, path: Path, budget: Budget) -> None:
        """Refuse ledgers that are older than the server's runs: one of them holds the newest head that each run left."""
        ledgers = sorted(path.parent.glob("*.ledger"))
        for run, head in sorted(self.heads.items(), key=lambda each: each[1], reverse=True):
            if not any(holds_head(each, head) for each in ledgers):
                remedy = (
                    f"no ledger there holds entry {head.seq}, which {run} left: it was deleted, or restored from an older copy; "
                    "restore its newest copy (docs/backups.md)"
                )
                raise Refusal("ledger.dir", str(path.parent), remedy)

    def keep_answer(self, folder: Path, name: str, head: Head) -> None:
        """Store the ledger's head after a question. Arguments as of `Population`."""
        heads = {**last_questions(folder), self.ledger_dir or "": (name, head)}
        with suppress(OSError):  # the answer stands without it, and a later run stores a head of its own
            replace_file(folder / HEADS, (json.dumps(heads) + "\n").encode())

    def sums_of_clients(self, adjacency: Adjacency) -> Sequence[DpEvent]:
        """Return what the server's earlier sums of clients cost a record: devices charge it to their records."""
        return sums_of_records(self.ledger_path(POPULATION, Path()), adjacency)

    def clients_to_check(self, task: Task, all_clients: bool) -> range:
        """Return none: clients keep their data."""
        return range(0)

    def sample_examples(self, task: Task) -> Data:
        """Return public examples, since clients keep theirs."""
        return held_out_of(task)


def last_questions(folder: Path) -> dict[str, tuple[str, Head]]:
    """Return the last question on each of a server's ledgers: its name and its head, by the setting `ledger.dir`.

    Args:
      folder: folder of the questions' records.
    """
    path = folder / HEADS
    try:
        entries = read_json(path.read_bytes()).items()
        return {str(key): (str(name), Head(int(seq), str(digest))) for key, (name, (seq, digest)) in entries}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise Refusal("file", str(path), unreadable(error, "restore it")) from error
