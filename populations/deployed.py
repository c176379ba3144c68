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
from ..privacy.ledger.caps import NAME_LENGTH, POPULATION, Cap, capped, caps_on
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
HEADS = "ledger.heads"  # beside answers: what the last question left on each ledger of a server


@dataclass(frozen=True)
class Deployed(Population):
    """Clients of a roster, and the rules of the link.

    Attributes:
      run: display name of the run; owners may allow it by this name.
      identity: names the federation on its ledger, in hexadecimal.
      roster, signed_roster: of the clients, read and as the authority signed it.
      ledgers: folder of the population's ledger.
      ledger_dir: the setting that names it; None for the bundle's own.
      quorum: share of the planned cohort that must answer; 0: none.
      enough: share of the planned cohort whose answers end an exchange; None: all that are invited.
      heads: that the server's earlier runs and questions left on its ledgers, by their names.
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
        return Words(REAL, "real data", COUNTED, "run", "ledger.dir", signer, again)

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
        """Return what resumes the run."""
        return "the same command"

    def sign(self, identities: str, nodes: int, doubly: bool) -> tuple[Roster, bytes]:
        """Return the roster of encrypted sums, and as the authority signed it. Arguments as of `Population`."""
        lacking = [member.name for member in self.roster.members if not member.post_quantum]
        if doubly and lacking:
            remedy = f"{lacking[0]} has no ML-DSA key in the roster; provision with post_quantum: true"
            raise Refusal("secagg.suite", 3, remedy)
        return self.roster, self.signed_roster

    def max_examples(self, bound: int, count: Callable[[], int]) -> float:
        """Return the bound on the examples of one client, who alone knows them."""
        return float(bound)

    def answers(self, invited: float) -> Answers:
        """Return the answers that a round needs: a share of the planned clients."""
        enough = None if self.enough is None else max(1, math.ceil(self.enough * invited))
        return Answers(math.ceil(self.quorum * invited), enough)

    def visible(self, cohort: Cohort) -> Cohort:
        """Return the cohort with a public draw if the number of answers ends a round."""
        return with_label(cohort, PUBLIC_ANSWERS) if self.quorum or self.enough is not None else cohort

    def ledger_path(self, prefix: str, folder: Path) -> Path:
        """Return the population's ledger; the prefix says what it is of."""
        return self.ledgers / f"{prefix}{self.owner[:NAME_LENGTH]}.ledger"

    def client_ledger_home(self, folder: Path) -> Path:
        """Return a folder that holds none of the clients' own ledgers, which lie with them."""
        return folder

    def within_caps(self, path: Path, budget: Budget) -> Budget:
        """Return a ledger's budget within its owner's caps."""
        return capped(path, budget)

    def caps(self, path: Path) -> Sequence[Cap]:
        """Return the owner's caps on a ledger."""
        return caps_on(path)

    def check_identity(self, data_id: str | None, spends: bool) -> None:
        """Refuse a data set's name: the federation's names its ledger."""
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
                    "restore its newest copy (docs/deploy.md, Backups and restores)"
                )
                raise Refusal("ledger.dir", str(path.parent), remedy)

    def keep_answer(self, folder: Path, name: str, head: Head) -> None:
        """Store the head that a question, answered or not, left on the ledger."""
        heads = {**last_questions(folder), self.ledger_dir or "": (name, head)}
        with suppress(OSError):  # a later run has a head of its own
            replace_file(folder / HEADS, (json.dumps(heads) + "\n").encode())

    def sums_of_clients(self, adjacency: Adjacency) -> Sequence[DpEvent]:
        """Return a record's events by the server's earlier sums of clients, which devices charge to their records."""
        return sums_of_records(self.ledger_path(POPULATION, Path()), adjacency)

    def clients_to_check(self, task: Task, all_clients: bool) -> range:
        """Return none: clients keep their data."""
        return range(0)

    def sample_examples(self, task: Task) -> Data:
        """Return public examples, since clients keep theirs."""
        return held_out_of(task)


def last_questions(folder: Path) -> dict[str, tuple[str, Head]]:
    """Return the name of the last question, and the head that it left, by the setting `ledger.dir` of a server's ledgers.

    Args:
      folder: of the questions' records.

    Raises:
      Refusal: the file of heads cannot be read.
    """
    path = folder / HEADS
    try:
        entries = read_json(path.read_bytes()).items()
        return {str(key): (str(name), Head(int(seq), str(digest))) for key, (name, (seq, digest)) in entries}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise Refusal("file", str(path), unreadable(error, "restore it")) from error
