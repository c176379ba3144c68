"""Memorisation of records, as ``fedveil audit RUN --records`` shows it to a client's owner: a score of each record.

For simulations with ``audit.loss_traces=true``, where one person plays all owners; on real data it is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..base.refusal import Refusal
from ..configs.settings import settings_from_overrides
from ..privacy.audit.client_rows import LOSSES, trace
from ..privacy.audit.membership import auc, late_fall
from ..privacy.audit.one_run import Scores
from ..run.build import build
from ..run.client_instructions import TRACES
from ..tasks.mislabelled import Mislabelled

FEWEST = 3  # rounds that a trace needs for a score
NUM_LISTED = 5  # most exposed records that are listed of a client


@dataclass(frozen=True)
class ClientRecords:
    """One client's records: the score of each, and whether it was planted with a random label, shape (records,) both."""

    client: int
    scores: Scores
    planted: NDArray[np.bool_]

    @property
    def top(self) -> list[int]:
        """Numbers of the records with the highest scores, the highest first."""
        return np.argsort(-self.scores, kind="stable")[:NUM_LISTED].tolist()


def show_records(folder: Path, *, as_json: bool = False) -> int:
    """Print the scores of each client's records; return the exit code 0, whatever a run has memorised.

    Raises:
      Refusal: the folder has no traces.
    """
    clients = client_records_in(folder)
    print(json.dumps(plain(clients)) if as_json else "\n".join(_format_records(clients)))
    return 0


def client_records_in(folder: Path) -> list[ClientRecords]:
    """Return the scores of the clients that took part in at least `FEWEST` rounds."""
    paths = sorted((folder / TRACES).glob(f"*{LOSSES}"), key=lambda path: int(path.stem))
    if not paths:
        remedy = "holds no traces of losses; give the folder of a simulation with audit=full audit.loss_traces=true"
        raise Refusal("audit", str(folder), remedy)
    task = build(settings_from_overrides([f"resume='{folder}'"])).task
    clients: list[ClientRecords] = []
    for path in paths:
        client, losses = int(path.stem), trace(path)
        if len(losses) < FEWEST:
            continue
        num_planted = task.planted_at(client) if isinstance(task, Mislabelled) else 0  # the last records
        planted = np.arange(losses.shape[1]) >= losses.shape[1] - num_planted
        clients.append(ClientRecords(client, late_fall(losses), planted))
    if not clients:
        raise Refusal("audit", str(folder), f"no client took part in {FEWEST} rounds; run more rounds")
    return clients


def planted_auc(clients: Sequence[ClientRecords]) -> Mapping[str, float] | None:
    """Return the AUC of planted against other records by their scores, with its interval; None without two records of each."""
    scores = np.concatenate([each.scores for each in clients])
    planted = np.concatenate([each.planted for each in clients])
    if min(planted.sum(), (~planted).sum()) < 2:
        return None
    area = auc(scores[planted], scores[~planted])
    return {"value": area.value, "low": area.low, "high": area.high}


def plain(clients: Sequence[ClientRecords]) -> Mapping[str, object]:
    """Return all scores, by client and record, as plain data."""
    fields = [{"client": each.client, "scores": each.scores.tolist(), "most": each.top} for each in clients]
    return {"planted_auc": planted_auc(clients), "clients": fields}


def _format_records(clients: Sequence[ClientRecords]) -> list[str]:
    """Return a table with a line for each client, and its legend."""
    lines = [f"{'client':>6}  {'records':>7}  {'median':>10}  {'q 0.95':>9}  most exposed (record: score)"]
    for client in clients:
        median, high = np.quantile(client.scores, (0.5, 0.95))
        exposed = ", ".join(
            f"{row}{'*' if client.planted[row] else ''}: {client.scores[row]:.2f}" for row in client.top
        )
        lines.append(f"{client.client:>6}  {len(client.scores):>7}  {median:>10.2f}  {high:>9.2f}  {exposed}")
    if area := planted_auc(clients):
        span = f"({area['low']:.3f} to {area['high']:.3f})"
        lines.append(
            f"* planted with a random label; AUC against the other records {area['value']:.3f} {span}"
        )
    lines.append(
        "a score is a record's mean loss over the rounds minus its last loss; 0 or less: not memorised"
    )
    return lines
