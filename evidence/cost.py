"""Cost of a run: bytes, CPU, energy, carbon and money, each with its source, and public counts.

With a trusted server, seconds and counted bytes of real clients would reveal the cohort's size, so neither is public.
Values that are computed from public numbers are called estimates, and costs without a price are not computed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..run.files import ASSESSMENT, OPERATOR
from ..run.run_files import SIMULATION, RunFiles
from ..run.traffic import figure, sizes, traffic
from .forms import CARBON, GIGABYTE, KWH, NETWORK, PRICES, WATTS

FLOPS = 6  # of a training step, for each parameter and example: 2 forward, 4 backward (Kaplan et al. 2020, section 2.1)
SIX = "estimate: 6 a parameter"
# of a thread of a processor that CodeCarbon 3.3 does not know (core/cpu.py, DEFAULT_POWER_PER_CORE)
USUAL_WATTS = 4.0
USUAL = "4 W, CodeCarbon's value for a thread of an unknown processor"
BY_COUNTERS = "counted by the processors (RAPL), including other processes of the machine"
JOULES, BYTES = 3600, 10**9  # in a watt hour, in a gigabyte
KILO = 1000  # watt hours in a kilowatt hour, by which energy is priced
NOT_YET = "not known before the run has ended"
NOT_PUBLIC = "not public: with a trusted server it would reveal the number of participants; fedveil report --operator tells it"
NO_RECORD = f"not known: the folder has no {OPERATOR}"
CONFIGURATION = "the configuration"


@dataclass(frozen=True)
class Prices:
    """Configured prices and powers, by the key of the group `cost`.

    Attributes:
      values: of those that are set: in the assessment, which may be answered after the run, else in the configuration.
      sources: where each stands.
    """

    values: Mapping[str, float]
    sources: Mapping[str, str]

    def describe(self, name: str) -> str:
        """Return a key in words, with its origin."""
        return f"{name} of {self.sources[name]}" if name in self.sources else f"cost.{name}, which is not set"


def prices_of(run: RunFiles) -> Prices:
    """Return the prices of a run."""
    configured = {name: run.setting("cost", name) for name in PRICES}
    values = {name: float(value) for name, value in configured.items() if value is not None}
    sources = dict.fromkeys(values, CONFIGURATION) | dict.fromkeys(run.assessment.prices, ASSESSMENT)
    return Prices(values | dict(run.assessment.prices), sources)


def cost(run: RunFiles) -> dict[str, Any]:
    """Return a run's cost in bytes and time, each with its source, and its public counts of answers."""
    parameters = sum(math.prod(shape) for shape in run.shapes.values()) or run.saved.get("parameters") or 0
    figures, transfers = sizes(run, parameters), traffic(run)
    transferred = [each["value"] for each in figures[2:4]]  # estimates of all bytes, down and up
    if transfers["purposes"]:
        transferred = [transfers["purposes"][-1][way] for way in ("down", "up")]
    gigabytes = _combined(lambda each: sum(each) / BYTES, *transferred)
    return {
        "parameters": parameters or None,
        "bytes": figures,
        "traffic": transfers,
        "work": _work(run, parameters, gigabytes),
        "rounds": len(run.rounds),
        "answers": _answers(run),
        "drops": _drops(run),
    }


def _work(run: RunFiles, parameters: int, gigabytes: float | None) -> list[dict[str, Any]]:
    """Return time, energy, carbon and money; values without a known price are unknown."""
    prices, public = prices_of(run), run.result.get("seconds") is not None
    cpu = run.result.get("cpu_seconds")
    owner = "the server" if run.deployed else "the server and all simulated clients"
    unknown = NO_RECORD if run.result.get("data") == SIMULATION else NOT_PUBLIC
    if not run.result:
        unknown = NOT_YET
    cpu_source = "not recorded by this release" if public else unknown
    if cpu is not None:
        cpu_source = "counted by the system"
    return [
        figure("clock", run.result.get("seconds"), "clock of the process" if public else unknown, "s"),
        figure(f"CPU of {owner}", cpu, cpu_source, "s"),
        *_of_a_client(run, parameters),
        *_energies(run, prices, gigabytes),
    ]


def _of_a_client(run: RunFiles, parameters: int) -> list[dict[str, Any]]:
    """Return bounds on a client's work by public numbers; a measured value would depend on its records."""
    flops = FLOPS * parameters or None
    figures = [figure("a client's training, for each example", flops, SIX, "FLOP")]
    examples, speed = run.setting("cost", "examples_of_client"), run.setting("cost", "flops_of_client")
    if examples is None or flops is None:
        return figures
    epochs = run.setting("local_epochs") or 1
    maximum = flops * examples * epochs
    source = f"estimate: times examples_of_client of {CONFIGURATION}, and {epochs} local epochs"
    figures.append(figure("a client's training, one round at most", maximum, source, "FLOP"))
    if speed is not None:
        source = f"estimate: that, over flops_of_client of {CONFIGURATION}"
        figures.append(figure("CPU of a client, one round at most", maximum / speed, source, "s"))
    return figures


def _energies(run: RunFiles, prices: Prices, gigabytes: float | None) -> list[dict[str, Any]]:
    """Return energy in Wh, its carbon dioxide in g, and money; `gigabytes` are those transferred, None if unknown."""
    energy, values = _energy(run, prices), prices.values
    joules_of_gigabyte = values.get(NETWORK)  # one that is not configured is no part of the sum
    network = _combined(math.prod, gigabytes, joules_of_gigabyte, 1 / JOULES)
    watt_hours = _combined(sum, energy["value"], network if NETWORK in values else 0.0)
    figures = [energy]
    if NETWORK in values:
        source = f"estimate: bytes times {prices.describe(NETWORK)}"
        figures.append(figure("energy of the network for these bytes", network, source, "Wh"))
    electricity = _combined(math.prod, watt_hours, values.get(KWH), 1 / KILO)
    money = _combined(sum, electricity, _combined(math.prod, gigabytes, values.get(GIGABYTE)))
    carbon = _combined(math.prod, watt_hours, values.get(CARBON), 1 / KILO)
    of_carbon = f"estimate: energy times {prices.describe(CARBON)}"
    of_money = f"estimate: energy times {prices.describe(KWH)}, and bytes times {prices.describe(GIGABYTE)}"
    return [
        *figures,
        figure("carbon dioxide of that energy", carbon, of_carbon, "g"),
        figure("money", money, of_money, run.setting("cost", "currency") or ""),
    ]


def _energy(run: RunFiles, prices: Prices) -> dict[str, Any]:
    """Return the figure of the energy: by the machine's counters, else by CPU seconds times watts."""
    joules, watts = run.result.get("joules"), prices.values.get(WATTS)
    if joules is not None:
        return figure("energy of the machine's processors", joules / JOULES, BY_COUNTERS, "Wh")
    origin = prices.describe(WATTS)
    if watts is None:
        watts, origin = USUAL_WATTS, USUAL
    estimated = _combined(math.prod, run.result.get("cpu_seconds"), watts, 1 / JOULES)
    return figure("energy of that CPU", estimated, f"estimate: CPU seconds times {origin}", "Wh")


def _combined(combine: Callable[[Sequence[float]], float], *values: float | None) -> float | None:
    """Return the combination of values; None where one of them is not known."""
    numbers = [each for each in values if each is not None]
    return combine(numbers) if len(numbers) == len(values) else None


def _answers(run: RunFiles) -> dict[str, Any]:
    """Return counts summed over the rounds, each None where it is not public, or missing in an older release."""
    sums: dict[str, Any] = {}
    for name in ("invited", "replies", "clipped_again"):
        values = [row.get(name) for row in run.rounds]
        whole = all(isinstance(each, int | float) for each in values)
        sums[name] = round(sum(each for each in values if each is not None)) if values and whole else None
    sums["abandoned"] = sum(bool(row.get("abandoned")) for row in run.rounds)
    sums["public"] = sums["replies"] is not None
    return sums


def _drops(run: RunFiles) -> list[dict[str, Any]] | None:
    """Return how many clients dropped out for each reason, over all rounds; None if that is not public."""
    if any(row.get("dropped") is None for row in run.rounds):
        return None
    total: Counter[str] = Counter()
    for row in run.rounds:
        total.update(row["dropped"])
    return [{"reason": reason, "clients": count} for reason, count in sorted(total.items())]
