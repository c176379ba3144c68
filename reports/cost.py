"""Cost of a run: bytes, as the shapes of its messages give them, and counts that everybody may know.

With a trusted server, seconds and counted bytes would tell who took part, so that neither is public. What stands here is
computed from public numbers, and is called an estimate.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ..privacy.mechanisms.compression import CompressionPlan
from ..privacy.mechanisms.packing import width_of
from ..privacy.mechanisms.sum_spec import SumSpec, cells_for
from .files import ASSESSMENT
from .forms import CARBON, GIGABYTE, KWH, WATTS
from .run_files import RunFiles

COORDINATE = 4  # bytes of a model's value (float32)
WEIGHED = 64  # bits of a coordinate that is weighed by examples and on no grid (float64)
FLOPS = 6  # of a training step, for each parameter and example: 2 forward, 4 backward (Kaplan et al. 2020, section 2.1)
ESTIMATED = "estimate: values of the model, times planned clients, times rounds"
ONE_FLOAT = "estimate: one float of 4 bytes for each parameter"
SIX = "estimate: 6 a parameter"
DISTRIBUTED = ("client_distributed", "record_distributed")  # modes whose sums are always encrypted
USUAL_WATTS = (
    4.0  # of a thread of a processor that CodeCarbon 3.3 does not know (core/cpu.py, DEFAULT_POWER_PER_CORE)
)
USUAL = "4 W, what CodeCarbon takes for a thread of a processor that it does not know"
COUNTED = "counted by the processors (RAPL), with all else that ran on the machine"
JOULES, BYTES = 3600, 10**9  # in a watt hour, in a gigabyte
MASKED = "not estimated: encrypted sums add keys and shares, which depend on the cohort"
NOT_YET = "not known before the run has ended"
NOT_TOLD = "not public: with a trusted server it would tell how many took part"


def cost(run: RunFiles) -> dict[str, Any]:
    """Return what a run costs in bytes and time, each with its source, and who answered in counts that may be told.

    Args:
      run: its files.
    """
    parameters = sum(math.prod(shape) for shape in run.shapes.values()) or run.saved.get("parameters") or 0
    rounds, invited = len(run.rounds), [row.get("invited") for row in run.rounds]
    planned = sum(each for each in invited if isinstance(each, int | float))
    masked = _masked(run)
    down = COORDINATE * parameters or None
    up, how = (None, MASKED) if masked or not parameters else _update(run, parameters)
    sizes = [
        _figure("model to one client, one round", down, ONE_FLOAT),
        _figure("update from one client, one round", up, how),
        _figure("all models down", down and planned and down * planned, ESTIMATED),
        _figure("all updates up", up and planned and up * planned, MASKED if masked else ESTIMATED),
    ]
    return {
        "parameters": parameters or None,
        "bytes": sizes,
        "work": _work(run, parameters, [each["value"] for each in sizes[2:]]),
        "rounds": rounds,
        "answers": _answers(run),
        "drops": _drops(run),
    }


def _update(run: RunFiles, parameters: int) -> tuple[int, str]:
    """Return the bytes of an update in the clear, as it is compressed and packed, and how they are estimated."""
    kind, ratio, cells = (run.said("compress", key) for key in ("name", "ratio", "cells"))
    sent = parameters
    if kind is not None and kind != "none":
        sent = CompressionPlan(kind, float(ratio)).of(parameters).kept
    hides = run.said("privacy", "name") not in ("none", "record")
    width = width_of(SumSpec(1.0, cells=cells or cells_for(sent))) if hides else WEIGHED
    return -(-sent * (width or 32) // 8), f"estimate: {width or 32} bits for each of {sent} coordinates"


def _masked(run: RunFiles) -> bool:
    """Return whether sums are encrypted: as the result says, or for a run that goes on its configuration."""
    if run.result:
        return run.result.get("secagg") is not None
    return run.said("privacy", "name") in DISTRIBUTED or run.said("secagg", "name") == "masked"


def _work(run: RunFiles, parameters: int, sent: Sequence[float | None]) -> list[dict[str, Any]]:
    """Return time, energy, carbon and money; what no price is known for is not known."""
    prices, public = run.assessment.prices, run.result.get("seconds") is not None
    cpu = run.result.get("cpu_seconds")
    whose = "the server" if run.deployed else "the server and all simulated clients"
    energy, which, how = _energy(run)
    unknown = NOT_TOLD if run.result else NOT_YET
    told = (
        "counted by the system" if cpu is not None else "not recorded by this release" if public else unknown
    )
    gigabytes = None if None in sent else sum(each for each in sent if each is not None) / BYTES
    parts = [_product(energy, prices.get(KWH), 1 / 1000), _product(gigabytes, prices.get(GIGABYTE), 1.0)]
    money = None if None in parts else sum(each for each in parts if each is not None)
    return [
        _figure("clock", run.result.get("seconds"), "clock of the process" if public else unknown, "s"),
        _figure(f"CPU of {whose}", cpu, told, "s"),
        _figure("a client's training, for each example", FLOPS * parameters or None, SIX, "FLOP"),
        _figure(which, energy, how, "Wh"),
        _figure(
            "carbon dioxide of that energy",
            _product(energy, prices.get(CARBON), 1 / 1000),
            f"estimate: energy times {CARBON} of {ASSESSMENT}",
            "g",
        ),
        _figure("money", money, f"estimate: energy times {KWH}, and bytes times {GIGABYTE}, of {ASSESSMENT}"),
    ]


def _energy(run: RunFiles) -> tuple[float | None, str, str]:
    """Return energy in watt hours, whose it is, and its source: the machine's counters, else CPU seconds times watts."""
    joules, watts = run.result.get("joules"), run.assessment.prices.get(WATTS)
    if joules is not None:
        return joules / JOULES, "energy of the machine's processors", COUNTED
    said = f"{WATTS} of {ASSESSMENT}" if watts is not None else USUAL
    estimated = _product(run.result.get("cpu_seconds"), USUAL_WATTS if watts is None else watts, 1 / JOULES)
    return estimated, "energy of that CPU", f"estimate: CPU seconds times {said}"


def _product(*factors: float | None) -> float | None:
    known = [each for each in factors if each is not None]
    return math.prod(known) if len(known) == len(factors) else None


def _figure(what: str, value: float | None, source: str, unit: str = "") -> dict[str, Any]:
    return {"what": what, "value": value, "unit": unit, "source": source}


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
