"""``fedveil audit RUN --records``: how far each client's records were learnt by heart, and which ones most, in its owner's view.

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

FEWEST = 3  # rounds of which a trace can be scored
NUM_LISTED = 5  # of the most exposed records of a client


@dataclass(frozen=True)
class ClientRecords:
    """One client's records: the score of each, and which were planted with random labels, (records,)."""

    client: int
    scores: Scores
    planted: NDArray[np.bool_]

    @property
    def top(self) -> list[int]:
        """The records that stand out most, by their number, the first one first."""
        return np.argsort(-self.scores, kind="stable")[:NUM_LISTED].tolist()


def records(folder: Path, *, as_json: bool = False) -> int:
    """Print what a run learnt by heart of each owner; return the exit code: 0, whatever is remembered.

    Raises:
      Refusal: a folder without traces.
    """
    owned = client_records_in(folder)
    print(json.dumps(plain(owned)) if as_json else "\n".join(_format_records(owned)))
    return 0


def client_records_in(folder: Path) -> list[ClientRecords]:
    """Every client's scores, of those who took part in enough rounds."""
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
        real = losses.shape[1] - task.planted_at(client) if isinstance(task, Mislabelled) else losses.shape[1]
        clients.append(ClientRecords(client, late_fall(losses), np.arange(losses.shape[1]) >= real))
    if not clients:
        raise Refusal("audit", str(folder), f"no client took part in {FEWEST} rounds; run more rounds")
    return clients


def planted_auc(owned: Sequence[ClientRecords]) -> Mapping[str, float] | None:
    """How often a planted record stands above one of its client's own; None without two of each."""
    scores, planted = (
        np.concatenate([getattr(each, name) for each in owned]) for name in ("scores", "planted")
    )
    if min(planted.sum(), (~planted).sum()) < 2:
        return None
    area = auc(scores[planted], scores[~planted])
    return {"value": area.value, "low": area.low, "high": area.high}


def plain(owned: Sequence[ClientRecords]) -> Mapping[str, object]:
    """Return the same as plain data: every score, by client and record."""
    clients = [{"client": each.client, "scores": each.scores.tolist(), "most": each.top} for each in owned]
    return {"planted_auc": planted_auc(owned), "clients": clients}


def _format_records(owned: Sequence[ClientRecords]) -> list[str]:
    lines = [f"{'client':>6}  {'records':>7}  {'median':>10}  {'q 0.95':>9}  most exposed (record: score)"]
    for client in owned:
        middle, high = np.quantile(client.scores, (0.5, 0.95))
        exposed = ", ".join(
            f"{row}{'*' if client.planted[row] else ''}: {client.scores[row]:.2f}" for row in client.top
        )
        lines.append(f"{client.client:>6}  {len(client.scores):>7}  {middle:>10.2f}  {high:>9.2f}  {exposed}")
    area = planted_auc(owned)
    if area is not None:
        span = f"({area['low']:.3f} to {area['high']:.3f})"
        lines.append(
            f"* planted with a random label; AUC against the other records {area['value']:.3f} {span}"
        )
    return [
        *lines,
        "a score is a record's mean loss over the rounds minus its last loss; 0 or less: not memorised",
    ]
