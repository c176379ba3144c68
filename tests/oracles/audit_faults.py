"""Faults put into the running round loop one at a time, and what the audit of the default job says of each.

`python tests/oracles/audit_faults.py` runs them all and prints the table of docs/evidence/audits.md; about ten minutes.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from fedveil.client.dp_sgd import train as dp_sgd
from fedveil.client.training import cohort_training
from fedveil.configs.settings import settings_from_overrides
from fedveil.privacy.mechanisms import distributed, private_sum
from fedveil.privacy.mechanisms.randomness import Randomness
from fedveil.simulations.simulate import simulate
from fedveil.strategies.cohorts import Poisson
from fedveil.strategies.record_plan import PoissonBatches

CORRECT = (
    (),
    ("cohort=fixed", "cohort.size=100"),
    ("privacy.target_epsilon=8",),
    ("privacy.adjacency=replace-one",),
)
MASKED = ("task=digits", "cohort=all", "privacy=client_distributed", "privacy.noise_multiplier=2",
          "privacy.target_epsilon=null", "privacy.target_delta=0.005", "num_rounds=8", "task.num_clients=40")  # fmt: skip


RECORDS = ("task=digits", "task.num_clients=20", "privacy=record", "cohort=all", "num_rounds=4", "batch_size=20",
           "audit.looks=2")  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """Change that is made, and the run that it is made in."""

    target: Any
    name: str
    instead: Callable[[Any], Any]
    overrides: tuple[str, ...] = ()


def _noise(times: float) -> Callable[[Any], Any]:
    def instead(sample: Any) -> Any:
        if times == 0:
            return lambda sigma, size, stream: np.zeros(size)
        return lambda sigma, size, stream: sample(round(sigma * times), size, stream)

    return instead


def _on_lattice(times: float) -> Callable[[Any], Any]:
    return lambda add: lambda values, sigma, *rest: add(values, round(sigma * times), *rest)


def _bare(start: int, stop: int | None) -> Callable[[Any], Any]:
    """Leave the update's coordinates from `start` to `stop` without noise; two scalars stand behind the update."""

    def instead(add_noise: Any) -> Any:
        def with_hole(total: Any, *rest: Any) -> Any:
            hole = slice(start, stop if stop is None else len(total) + stop if stop < 0 else stop)
            bare = total[hole].copy()  # noise is added in place
            noised, event = add_noise(total, *rest)
            noised[hole] = bare
            return noised, event

        return with_hole

    return instead


def _by_examples(encode_rows: Any) -> Any:
    def weighted(update: Any, scalars: Any, spec: Any) -> Any:
        rows = encode_rows(update, scalars, spec)
        return rows * (scalars["num-examples"] / 10)[:, None]

    return weighted


def _same_stream(stream: Any) -> Any:
    return lambda self, *purpose: stream(self, *(purpose[:1] if purpose[0] == "noise" else purpose))


def _rate(times: float) -> Callable[[Any], Any]:
    def instead(draw: Any) -> Any:
        def drawn(self: Any, population: Any, stream: Any, earlier: Any = ()) -> Any:
            return draw(Poisson(min(1.0, times * self.rate)), population, stream, earlier)

        return drawn

    return instead


def _fixed(draw: Any) -> Any:
    def drawn(self: Any, population: Any, stream: Any, earlier: Any = ()) -> Any:
        ranks = np.argsort(np.argsort(stream.uint64(len(population))))
        return [population[int(k)] for k in np.flatnonzero(ranks < self.rate * len(population))]

    return drawn


def _accounted(**wrong: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Account for batches other than those that are drawn."""

    def instead(event: Any) -> Any:
        def told(self: Any, mechanism: Any) -> Any:
            return event(
                replace(self, **{name: wrong_of(self) for name, wrong_of in wrong.items()}), mechanism
            )

        return told

    return instead


FAULTS: dict[str, tuple[Fault, ...]] = {
    "none": (),
    "noise x0.98": (Fault(private_sum, "sample", _noise(0.98)),),
    "noise x0.8": (Fault(private_sum, "sample", _noise(0.8)),),
    "noise halved": (Fault(private_sum, "sample", _noise(0.5)),),
    "no noise": (Fault(private_sum, "sample", _noise(0)),),
    "clip skipped": (
        Fault(private_sum.SumSpec, "aim", lambda aim: lambda self, coordinates: 1e9),
        Fault(private_sum, "shrink", lambda shrink: lambda vector, spec: None),
    ),
    "weights by example": (Fault(cohort_training, "encode_rows", _by_examples),),
    "biases (10 numbers) without noise": (Fault(private_sum, "add_noise", _bare(-12, -2)),),
    "the same noise in every round": (Fault(Randomness, "stream", _same_stream),),
    "accounted rate half of the real": (Fault(Poisson, "draw", _rate(2)),),
    "accounted rate a quarter of the real": (Fault(Poisson, "draw", _rate(4)),),
    "sampling fixed, accounted as Poisson": (Fault(Poisson, "draw", _fixed),),
    "encrypted sums, none": (Fault(distributed, "add_grid_noise", lambda add: add, MASKED),),
    "encrypted sums that drop the noise": (
        Fault(distributed, "add_grid_noise", lambda add: lambda *rest: None, MASKED),
    ),
    "records, none": (Fault(dp_sgd, "add_on_lattice", _on_lattice(1), RECORDS),),
    "records, one local step accounted of many": (
        Fault(PoissonBatches, "event", _accounted(steps=lambda batches: 1), RECORDS),
    ),
    "records, accounted sample_rate a quarter of the real": (
        Fault(PoissonBatches, "event", _accounted(sample_rate=lambda each: each.sample_rate / 4), RECORDS),
    ),
    "records, noise halved": (Fault(dp_sgd, "add_on_lattice", _on_lattice(0.5), RECORDS),),
    "records, noise x0.8": (Fault(dp_sgd, "add_on_lattice", _on_lattice(0.8), RECORDS),),
}


@contextmanager
def injected(faults: tuple[Fault, ...]) -> Iterator[None]:
    with ExitStack() as stack:
        for each in faults:
            instead = each.instead(getattr(each.target, each.name))
            stack.enter_context(patch.object(each.target, each.name, instead))
        yield


def asked(name: str, *overrides: str) -> list[str]:
    """Return the overrides of the run with this fault."""
    faults = FAULTS[name]
    given = ["audit=full", *(faults[0].overrides if faults else ()), *overrides]
    return given if "audit=off" in given else [*given, "audit.on_alarm=note"]


def audited(name: str, *overrides: str) -> dict[str, Any]:
    """Run the default job with this fault and return what its result says of the audit."""
    faults = FAULTS[name]
    given = asked(name, *overrides)
    with injected(faults), tempfile.TemporaryDirectory() as folder:
        result = simulate(settings_from_overrides(given), Path(folder) / "run", quiet=True).result
    if result["audit"] is None:
        return {"accuracy": result["metrics"]["accuracy"]}
    return {**result["audit"], "accuracy": result["metrics"]["accuracy"]}


def row(name: str, found: dict[str, Any]) -> str:
    first: dict[tuple[str, str], str] = {}
    for alarm in found["alarms"]:
        level, test = alarm["level"], alarm["test"]
        if (test, "red") not in first:
            what = f"{test} {level} in round {alarm['round']} ({alarm['p_value']:.1g})"
            first.setdefault((test, level), what)
    of_whom = found["records"] or found
    measured = of_whom["measured"] and of_whom["measured"]["epsilon"]
    shown = f"{measured:.2f}" if isinstance(measured, float) else str(measured)
    checks = " | ".join(
        "" if found.get(n) is None else f"{found[n]:.1g}" for n in ("norm_p", "reuse_p", "draw_p")
    )
    return f"| {name} | {shown} | {checks} | {', '.join(first.values()) or '-'} | {found['verdict']} |"


def correct() -> None:
    """Run the default job twenty times without a fault; return audits, and accuracies with canaries or not."""
    for seed in range(5):
        for overrides in CORRECT:
            found = audited("none", f"seed={seed}", *overrides)
            print(seed, overrides, found["measured"], found["claimed"], found["alarms"], flush=True)
        with_canaries, plain = (audited("none", f"seed={seed}", each) for each in ("audit=full", "audit=off"))
        print("accuracy", with_canaries["accuracy"], "without canaries", plain["accuracy"], flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["correct"]:
        correct()
        sys.exit()
    print("| fault | measured | p, norm | p, reuse | p, draw | first alarm of each test | verdict |")
    print("|---|---|---|---|---|---|---|")
    for each in sys.argv[1:] or FAULTS:
        print(row(each, audited(each)), flush=True)
