"""Local training: a client's training parameters, in settings, in orders to devices and at the client."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, get_args, get_type_hints

from ..base.bounded_decoding import check_fields
from ..base.refusal import OneOf, Range, Refusal, real

GRAD_NORM = Range(ge=1e-9, le=1e9)
"""Range of the norm of one example's gradient, in which sums in float32 neither overflow nor underflow."""
OPTIMIZERS: Mapping[str, float | None] = {
    "auto": None,
    "sgd": None,
    "adam": 0.001,
    "adamw": 0.001,
    "dp_adambc": 0.001,
    "adamax": 0.002,
    "nadam": 0.002,
    "radam": 0.001,
    "adadelta": 1.0,
    "adafactor": 0.01,
    "adagrad": 0.01,
    "asgd": 0.01,
    "muon": 0.001,
    "rmsprop": 0.01,
    "rprop": 0.01,
}
"""Names of a client's optimizer, each with torch's default learning rate; None takes the configured rate.

Names are torch's in small letters, apart from `auto` and `dp_adambc`. Left out are LBFGS, which needs a closure, and
SparseAdam, which needs sparse gradients: a client has neither.
"""
OPTION_TYPES = {"ns_steps": int}  # of torch's keyword arguments that are numbers; all others are floats
MAX_ROUNDS = 100_000  # as many as the configuration allows
SCHEDULES = ("constant", "linear", "cosine", "step")
Option = float | int | bool | tuple[float, ...]


@dataclass(frozen=True)
class Optimizer:
    """Optimiser of a client's steps, made anew in every round; a Refusal if its name is unknown, or an option no number.

    Attributes:
      name: of `OPTIMIZERS`; `auto` is what the task's own `optimizer` makes, or plain SGD where it has none.
      options: torch's keyword arguments without the rate; given as a mapping or pairs, stored as pairs sorted by name.
    """

    name: str = "auto"
    options: Annotated[tuple[tuple[str, Option], ...], "checked by its names"] = ()

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            remedy = f"choose one of {', '.join(OPTIMIZERS)}; one that needs a closure cannot be used"
            raise Refusal("optimizer", self.name, remedy)
        options = {str(key): _option(str(key), value) for key, value in dict(self.options).items()}
        if self.name == "auto" and options:
            raise Refusal("optimizer", self.name, f"takes no {', '.join(options)}; name the optimizer")
        object.__setattr__(self, "options", tuple(sorted(options.items())))

    @property
    def plain(self) -> bool:
        """Whether it is SGD without momentum or weight decay, for which every path has code of its own."""
        return self.name in ("auto", "sgd") and not any(value for _, value in self.options)


def _option(key: str, value: object) -> Option:
    """Return the value of torch's keyword as a switch, list or number: 1 and 1.0 become one, and so orders are equal."""
    field = f"optimizer.{key}"
    if isinstance(value, list | tuple):
        return tuple(real(field, each) for each in value)
    if isinstance(value, bool):
        return value
    return Range().check(OPTION_TYPES.get(key, float), field, value)


@dataclass(frozen=True)
class Schedule:
    """Schedule of the learning rate over the rounds of a run; a Refusal if a value is out of range.

    Attributes:
      name: of `SCHEDULES`.
      rounds: number of rounds of the run, at least 1.
      warmup: number of rounds in which the rate rises linearly, at least 0; the next round has the full rate.
      floor: share of the rate that `linear` and `cosine` would reach one round after the last, in [0, 1].
      every: number of rounds after which `step` multiplies the rate by `gamma`, at least 1.
      gamma: factor of `step`, in (0, 1].
    """

    name: Annotated[str, OneOf(SCHEDULES)] = "constant"
    rounds: Annotated[int, Range(ge=1, le=MAX_ROUNDS)] = 1
    warmup: Annotated[int, Range(ge=0, le=MAX_ROUNDS)] = 0
    floor: Annotated[float, Range(ge=0, le=1)] = 0.0
    every: Annotated[int, Range(ge=1, le=MAX_ROUNDS)] = 1
    gamma: Annotated[float, Range(gt=0, le=1)] = 1.0

    def __post_init__(self) -> None:
        check_fields(self, "schedule.")

    @property
    def changes(self) -> bool:
        """Whether any round has another rate than the first full one."""
        return self.name != "constant" or self.warmup > 0

    def factor(self, number: int) -> float:
        """Return the factor of the learning rate in a round, above 0; rounds count from 1."""
        step = min(number, self.rounds) - 1
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        progress = (step - self.warmup) / (self.rounds - self.warmup)  # in [0, 1)
        match self.name:
            case "linear":
                return 1 - (1 - self.floor) * progress
            case "cosine":
                return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * progress)) / 2
            case "step":
                return self.gamma ** ((step - self.warmup) // self.every)
            case _:
                return 1.0


@dataclass(frozen=True)
class LocalTraining:
    """Parameters of a client's training in one round; a Refusal if a value has another type or is out of range.

    Ranges and meanings of the keys are here alone: the configuration, its schema and orders to devices read them.
    """

    learning_rate: Annotated[float, Range(gt=0), "Of the client's optimizer."] = 0.1
    local_epochs: Annotated[int, Range(ge=1, le=10_000), "Passes over a client's data in one round."] = 1
    batch_size: Annotated[
        int, Range(ge=1, le=1_000_000), "Examples of a step; the last takes what is left."
    ] = 10
    proximal_mu: Annotated[float, Range(ge=0), "Weight of FedProx's pull (arXiv:1812.06127, eq. 2)."] = 0.0
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()

    def __post_init__(self) -> None:
        check_fields(self)

    def in_round(self, number: int) -> LocalTraining:
        """Return the parameters of one round, counted from 1, with the schedule's learning rate."""
        factor = self.schedule.factor(number)
        return self if factor == 1 else replace(self, learning_rate=self.learning_rate * factor)


RULES: dict[str, tuple[type, Range, str]] = {
    name: get_args(hint)
    for name, hint in get_type_hints(LocalTraining, include_extras=True).items()
    if get_args(hint)
}
"""Type, range and meaning of each numeric field of `LocalTraining`."""

ORDER_KEYS = tuple(name for name in RULES if name != "proximal_mu")
"""Numeric fields that the configuration sets and an order contains; a strategy sends proximal_mu in each round."""

ORDERED = (*ORDER_KEYS, "optimizer", "schedule")
"""All fields of `LocalTraining` that an order contains."""
