"""Rows of a device on which a run trained, and how: in a file, since the own model trains on the same after a restart."""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

from ...base.bounded_decoding import plain_of, read_json_file
from ...base.durable_files import replace_file
from ...messages.client_settings import ClientSettings
from ...messages.local_training import LocalTraining

logger = logging.getLogger("fedveil.client")

FILE = "rows.json"


@dataclass(frozen=True)
class TrainedRows:
    """Split of a device's rows in a run, as its orders and its owner set it, and the training of the rounds.

    Attributes:
      share: of the rows that are held out of training, in (0, 1).
      alone: whether each row is selected by itself, as the record level requires.
      group_equal_rows: whether equal rows are held out together, as by the rule of earlier releases.
      training: of the last round.
    """

    share: float
    alone: bool = False
    group_equal_rows: bool = False
    training: LocalTraining = field(default_factory=LocalTraining)


def rows_of(settings: ClientSettings) -> TrainedRows | None:
    """Return the split of a training with these settings; None if it holds no row out."""
    if settings.held_out is None:
        return None
    return TrainedRows(
        settings.held_out, settings.hides_records, settings.group_equal_rows, settings.training
    )


def note_rows(state: Path, rows: TrainedRows) -> None:
    """Store a run's split in the state folder, unless it is there already; a failure is logged, and the run goes on."""
    if read_rows(state) == rows:
        return
    try:
        replace_file(state / FILE, (json.dumps(plain_of(rows)) + "\n").encode())
    except OSError as error:
        logger.warning("the split of the rows is not stored in %s (%s)", state, error.strerror)


def read_rows(state: Path) -> TrainedRows | None:
    """Return the split of the last run that trained here; None if none is stored."""
    return read_json_file(TrainedRows, state / FILE)


def scaling_of(moments: object) -> str:
    """Return a run's moments, which scale inputs, as JSON that can be a key; empty where there are none."""
    return json.dumps(moments, sort_keys=True) if moments else ""
