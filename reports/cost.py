"""Cost of a run: bytes, as the shapes of its messages give them, and counts that everybody may know.

With a trusted server, seconds and counted bytes would tell who took part, so that neither is public. What stands here is
computed from public numbers, and is called an estimate.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from .run_files import RunFiles

COORDINATE = 4  # bytes of a model's value (float32), and of a lattice value (int32) in a sum in the open
FLOPS = 6  # of a training step, for each parameter and example: 2 forward, 4 backward (Kaplan et al. 2020, section 2.1)
ESTIMATED = "estimate: values of the model, times planned clients, times rounds"
OPEN_SUM = "estimate: one lattice value of 4 bytes for each parameter"
MASKED = "not estimated: encrypted sums add keys and shares, which depend on the cohort"
NOT_TOLD = "not public: with a trusted server it would tell how many took part"


def cost(run: RunFiles) -> dict[str, Any]:
    """Return what a run costs in bytes and time, each with its source, and who answered in counts that may be told.

    Args:
      run: its files.
    """
    parameters = sum(math.prod(shape) for shape in run.shapes.values())
    rounds, invited = len(run.rounds), [row.get("invited") for row in run.rounds]
    planned = sum(each for each in invited if isinstance(each, int | float))
    masked = run.result.get("secagg") is not None
    down = COORDINATE * parameters or None
    up = None if masked else down
    seconds = run.result.get("seconds")
    told = seconds is not None
    return {
        "parameters": parameters or None,
        "bytes": [
            _figure("model to one client, one round", down, OPEN_SUM.replace("lattice value", "float")),
            _figure("update from one client, one round", up, MASKED if masked else OPEN_SUM),
            _figure("all models down", down and planned and down * planned, ESTIMATED),
            _figure("all updates up", up and planned and up * planned, MASKED if masked else ESTIMATED),
        ],
        "seconds": _figure("wall clock of the run", seconds, "clock of the process" if told else NOT_TOLD),
        "client_flops": _figure(
            "training, for each example", FLOPS * parameters or None, "estimate: 6 a parameter"
        ),
        "energy": _figure("energy", None, "not measured by this version"),
        "rounds": rounds,
        "answers": _answers(run),
        "drops": _drops(run),
    }


def _figure(what: str, value: float | None, source: str) -> dict[str, Any]:
    return {"what": what, "value": value, "source": source}


def _answers(run: RunFiles) -> dict[str, Any]:
    """Return sums over the rounds; None where they may not be told, or an older release did not write them."""
    found: dict[str, Any] = {}
    for name in ("invited", "replies", "clipped_again"):
        values = [row.get(name) for row in run.rounds]
        whole = all(isinstance(each, int | float) for each in values)
        found[name] = round(sum(each for each in values if each is not None)) if values and whole else None
    found["abandoned"] = sum(bool(row.get("abandoned")) for row in run.rounds)
    found["public"] = found["replies"] is not None
    return found


def _drops(run: RunFiles) -> list[dict[str, Any]] | None:
    if any(row.get("dropped") is None for row in run.rounds):
        return None
    total: Counter[str] = Counter()
    for row in run.rounds:
        total.update(row["dropped"])
    return [{"reason": reason, "clients": count} for reason, count in sorted(total.items())]
