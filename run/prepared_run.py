"""Run of a federation, as it is fixed before its first round, and the part of it that a later process needs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ..messages.training_order import RUN_NAME
from ..server.tuning import NO_TUNING, Tuning
from .record_ledgers import NoClientLedgers, client_ledgers_of

if TYPE_CHECKING:
    from ..messages.client_settings import ClientSettings
    from ..modes.federation import Federation
    from ..privacy.ledger.ledger import Ledger
    from ..server.checkpoint import Checkpoint
    from ..server.round_terms import SumPrivacy


@dataclass(frozen=True)
class Saved:
    """State that a later process of the run needs in addition to its configuration: keys of SAVED.

    Attributes:
      name: the run's name on the ledgers, under the key `run`; empty for a new run.
      noise: noise multiplier of the sums; None without noise on them.
      filter_order: order of the RDP filter in the plan of the sums; None without one.
      turns: the cohort's name, which gives the distance of a client's turns; None without turns.
      deal: key of the clients' arms; None without tuning.
      places: digest, under the key of correlated noise, of the clients' order, which fixes their turns; else None.
    """

    name: Annotated[str, RUN_NAME]
    noise: float | None = None
    filter_order: float | None = None
    turns: str | None = None
    deal: str | None = None
    places: str | None = None


NEW_RUN = Saved("")


@dataclass(frozen=True)
class Run:
    """One run of a federation, fixed before its first round.

    Attributes:
      federation: the federation that runs; where clients are real, with those of the newest roster.
      folder: folder of the run's files.
      name: name of the run on the ledgers; a resumed run on real data may have a new one.
      client: settings of the clients, as `client_settings` returns them.
      saved: state of an earlier process of the run; `NEW_RUN` if there was none.
      checkpoint: round from which to resume; `NO_CHECKPOINT` before the first one.
      privacy: protection of the sums, with the open ledger; None before `opened`, and without noise on them.
      tuning: the clients' arms and the values that they try; `NO_TUNING` without any.
      spent: why a resumed run's remaining rounds cannot be paid; empty where they can.
    """

    federation: Federation
    folder: Path
    name: str
    client: ClientSettings
    saved: Saved
    checkpoint: Checkpoint
    privacy: SumPrivacy | None = None
    tuning: Tuning = NO_TUNING
    spent: str = ""

    @property
    def resumed(self) -> bool:
        """Whether an earlier process began the run."""
        return bool(self.saved.name)

    @property
    def ledger(self) -> Ledger | None:
        """The population's ledger, open for writing; None if the sums have no noise, or the run is not opened."""
        return None if self.privacy is None else self.privacy.ledger

    @cached_property
    def client_ledgers(self) -> NoClientLedgers:
        """The clients' own ledgers on this machine."""
        return client_ledgers_of(self.federation, self.client)
