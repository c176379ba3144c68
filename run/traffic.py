"""Bytes of a run: counted by its links if public, otherwise estimated from public settings; by direction and purpose."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..privacy.mechanisms.compression import CompressionPlan
from ..privacy.mechanisms.packing import width_of
from ..privacy.mechanisms.sum_spec import SumSpec, cells_for
from .run_files import Fields, RunFiles

COUNTED = "counted by the link"
SIMULATED = "estimated: simulated, by the sizes that the encoders of link=grpc give"
COORDINATE = 4  # bytes of a model's value (float32)
WEIGHED = 64  # bits of a coordinate that is weighed by examples and on no lattice (float64)
UNPACKED = 32  # bits of a coordinate on a lattice too fine to pack
DISTRIBUTED = ("client_distributed", "record_distributed")  # modes whose sums are always encrypted
ENCODED = "size of the message, as link=grpc encodes it"
AT_MOST = "of the whole model: an upper bound, since a client with an earlier model gets the difference"
PLANNED = "estimate: that of one client, times planned clients, times rounds"
ONE_FLOAT = "estimate: one float of 4 bytes for each parameter"
MASKED = "not estimated: encrypted sums add keys and shares, which depend on the cohort"
ON_AVERAGE = "of clients that were asked, on average"
NOT_PUBLIC = "not public: with a trusted server the bytes of a round would reveal the number of participants"
NOT_COUNTED = "not counted by the release of fedveil that made this run"


def traffic(run: RunFiles) -> dict[str, Any]:
    """Return the bytes of a run by purpose, to and from clients, in all and per round; null where not public."""
    sums = {way: _sum_bytes(run, way) for way in ("down", "up")}
    rounds = len(run.rounds)
    if not rounds or not sums["down"]:
        has_bytes = any("bytes" in row for row in run.rounds)
        return {"source": NOT_PUBLIC if has_bytes else NOT_COUNTED, "purposes": []}
    purposes = list({**sums["down"], **sums["up"]})
    rows = [{"purpose": each, **_both(sums, [each], rounds)} for each in purposes]
    whole = _both(sums, purposes, rounds)
    source = run.result.get("bytes", {}).get("source") or (COUNTED if run.deployed else SIMULATED)
    return {"source": source, "purposes": [*rows, {"purpose": "all", **whole}]}


def _both(sums: Mapping[str, Mapping[str, int]], purposes: Sequence[str], rounds: int) -> dict[str, float]:
    """Return the bytes for these purposes in each direction, in all and per round."""
    down, up = (sum(sums[way].get(each, 0) for each in purposes) for way in ("down", "up"))
    return {"down": down, "up": up, "down_round": down / rounds, "up_round": up / rounds}


def _sum_bytes(run: RunFiles, way: str) -> dict[str, int]:
    """Return all bytes of one direction by purpose: those of the result or, before it, of the rounds, and the farewell's."""
    total: Counter[str] = Counter()
    parts = [row.get("bytes") or {} for row in run.rounds]
    if run.result.get("bytes"):
        parts = [run.result["bytes"]]
    for part in [*parts, run.farewell]:
        total.update(part.get(way, {}))
    return dict(total)


def sizes(run: RunFiles, parameters: int) -> list[dict[str, Any]]:
    """Return what one client is sent and sends in a round, what all are, and an update's size without compression.

    Args:
      run: files of the run.
      parameters: number of the model's parameters; 0 where that is not known.
    """
    totals = traffic(run)
    planned = sum(each for row in run.rounds if isinstance(each := row.get("invited"), int | float))
    down, up = (_per_client(run, parameters, way, planned) for way in ("down", "up"))
    rows = [
        figure("model to one client, one round", *down),
        figure("update from one client, one round", *up),
        figure("all models down", *_in_all(totals, "down", *down, planned)),
        figure("all updates up", *_in_all(totals, "up", *up, planned)),
    ]
    if run.setting("compress", "name") in (None, "none") or not parameters:
        return rows
    whole, note = update_bytes(run, parameters, compressed=False)
    return [*rows, figure("the same update without compression", whole, note)]


def _per_client(run: RunFiles, parameters: int, way: str, planned: float) -> tuple[float | None, str]:
    """Return the bytes to ("down") or from ("up") one client in a round, if they are known, and their source.

    `planned` is the number of clients that were planned for all rounds together.
    """
    messages = [row["message_bytes"] for row in run.rounds if row.get("message_bytes")]
    if messages:
        return messages[-1][way], AT_MOST if _differs(run, way) else ENCODED
    if is_masked(run):
        trained = sum(row["bytes"][way].get("training", 0) for row in run.rounds if row.get("bytes"))
        return (trained / planned, ON_AVERAGE) if trained and planned else (None, MASKED)
    if not parameters:
        return None, NOT_COUNTED
    if way == "up":
        return update_bytes(run, parameters)
    return COORDINATE * parameters, AT_MOST if _differs(run, way) else ONE_FLOAT


def _differs(run: RunFiles, way: str) -> bool:
    """Return whether clients with an earlier model are sent only the difference."""
    return way == "down" and run.setting("compress", "down") is not None


def _in_all(
    totals: Fields, way: str, size: float | None, note: str, planned: float
) -> tuple[float | None, str]:
    """Return the bytes of training to or from all clients in all rounds, if they are known, and their source.

    They are those of `traffic` or, without them, the size for one client, with its note, times the planned clients.
    """
    trained = next((each[way] for each in totals["purposes"] if each["purpose"] == "training"), None)
    if trained is not None:
        return trained, totals["source"]
    if not size:
        return None, MASKED
    return size * planned or None, AT_MOST if note == AT_MOST else PLANNED


def update_bytes(run: RunFiles, parameters: int, compressed: bool = True) -> tuple[int, str]:
    """Return the bytes of an update in the clear after packing, compressed or not, and the method of the estimate."""
    kind, ratio, cells = (run.setting("compress", key) for key in ("name", "ratio", "cells"))
    size = parameters
    if not compressed:
        cells = None
    elif kind is not None and kind != "none":
        size = CompressionPlan(kind, float(ratio)).of(parameters).kept
    bits = WEIGHED
    if run.setting("privacy", "name") not in ("none", "record"):  # coordinates on a lattice
        bits = width_of(SumSpec(1.0, cells=cells or cells_for(size))) or UNPACKED
    return -(-size * bits // 8), f"estimate: {bits} bits for each of {size} coordinates"


def is_masked(run: RunFiles) -> bool:
    """Return whether sums are encrypted, by the result, or by the configuration of an unfinished run."""
    if run.result:
        return run.result.get("secagg") is not None
    return run.setting("privacy", "name") in DISTRIBUTED or run.setting("secagg", "name") == "masked"


def figure(what: str, value: float | None, source: str, unit: str = "") -> dict[str, Any]:
    """Return a figure of what a run costs, as a report tells it.

    Args:
      what: name of the figure.
      value: None where it is not known.
      source: where the value is from, or why there is none.
      unit: empty for bytes.
    """
    return {"what": what, "value": value, "unit": unit, "source": source}
