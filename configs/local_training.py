"""Local training: the values by which a client trains, in settings, in orders to devices and at the client.

A device loads this file, so it needs the standard library alone; the models of the configuration read the same ranges.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_type_hints

from ..privacy.refusal import Refusal, real


@dataclass(frozen=True)
class Range:
    """Range of a number: above `gt`, at least `ge`, at most `le`, where they are given."""

    gt: float | None = None
    ge: float | None = None
    le: float | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Give pydantic the bounds as its own, so that its errors and its JSON schema tell them."""
        return {**handler(source), **{name: bound for name, bound in vars(self).items() if bound is not None}}

    def check(self, kind: type, field: str, value: object) -> float | int:
        """Return the value as `kind`; Refusal when it has another type or is out of range."""
        if kind is int and type(value) is not int:
            raise Refusal(field, value, "give a whole number")
        number = value if kind is int and isinstance(value, int) else real(field, value)
        if self.gt is not None and not number > self.gt:
            raise Refusal(field, value, f"give a number above {self.gt:g}")
        if self.ge is not None and not number >= self.ge:
            raise Refusal(field, value, f"give at least {self.ge:g}")
        if self.le is not None and not number <= self.le:
            raise Refusal(field, value, f"give at most {self.le:g}")
        return number


@dataclass(frozen=True)
class LocalTraining:
    """How a client trains in one round. Refusal when a value has another type or is out of range.

    A range and what a key means stand here alone: the configuration, its schema and the order to a device read them.
    """

    learning_rate: Annotated[float, Range(gt=0), "Of the client's optimizer."] = 0.1
    local_epochs: Annotated[int, Range(ge=1, le=10_000), "Passes over a client's data in one round."] = 1
    batch_size: Annotated[
        int, Range(ge=1, le=1_000_000), "Examples of a step; the last takes what is left."
    ] = 10
    proximal_mu: Annotated[float, Range(ge=0), "Weight of FedProx's pull (arXiv:1812.06127, eq. 2)."] = 0.0

    def __post_init__(self) -> None:
        for name, (kind, bounds, _) in RULES.items():
            object.__setattr__(self, name, bounds.check(kind, name, getattr(self, name)))


RULES: dict[str, tuple[type, Range, str]] = {
    name: get_args(hint) for name, hint in get_type_hints(LocalTraining, include_extras=True).items()
}
"""Type, range and meaning of each value."""

OF_STRATEGY = ("proximal_mu",)
"""Values that a strategy tells in each round, and neither the configuration nor an order."""

TOLD = tuple(name for name in RULES if name not in OF_STRATEGY)
"""Values that the configuration sets and an order tells."""
