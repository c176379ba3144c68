"""Arms of a run: a public partition of its clients, by a keyed hash of their names; each arm tries one value.

A client is in one arm of a deal, so only the releases of its own arm cost it privacy. All arms together cost the
maximum over the arms (parallel composition; McSherry 2009, doi:10.1145/1559845.1559850, theorem 4). This requires that
the deal does not depend on data, and that a name keeps its arm for the whole run.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..base.refusal import Refusal

KEY = re.compile("[0-9a-f]{32}")
MAX_ARMS = 32  # each has that share of the clients


@dataclass(frozen=True)
class ArmDeal:
    """Partition of names into arms, the same on every machine; later members do not change the arm of others.

    Attributes:
      key: 32 hexadecimal digits, public, new in every run.
      arms: how many there are, from 2 to `MAX_ARMS`.

    Raises:
      Refusal: a value is out of range.
    """

    key: str
    arms: int

    def __post_init__(self) -> None:
        if not KEY.fullmatch(str(self.key)):
            raise Refusal("deal", self.key, "give 32 hexadecimal digits")
        if type(self.arms) is not int or not 2 <= self.arms <= MAX_ARMS:
            raise Refusal("arms", self.arms, f"give a whole number from 2 to {MAX_ARMS}")

    def arm_of(self, name: str) -> int:
        """Return the arm of a client by its name, from 1 to `arms`."""
        hashed = hmac.digest(bytes.fromhex(self.key), name.encode(), hashlib.sha256)
        return int.from_bytes(hashed[:16], "big") % self.arms + 1  # its bias is below 2^-123

    def arm(self, number: int) -> Arm:
        """Return one of the arms."""
        return Arm(self, number)


@dataclass(frozen=True)
class Arm:
    """Arm of a deal.

    Attributes:
      deal: deal of which the arm is a part.
      number: number of the arm, from 1 to the deal's arms.

    Raises:
      Refusal: there is no such arm.
    """

    deal: ArmDeal
    number: int

    def __post_init__(self) -> None:
        if type(self.number) is not int or not 1 <= self.number <= self.deal.arms:
            raise Refusal("arm", self.number, f"give a whole number from 1 to {self.deal.arms}")

    def holds(self, name: str) -> bool:
        """Return whether a client of this name is in the arm."""
        return self.deal.arm_of(name) == self.number

    def to_json(self) -> dict[str, Any]:
        """Return the arm as plain data."""
        return {"deal": self.deal.key, "arms": self.deal.arms, "arm": self.number}

    @classmethod
    def from_json(cls, plain: object) -> Arm:
        """Return the arm that `to_json` wrote.

        Raises:
          Refusal: it is not an arm.
        """
        if not isinstance(plain, Mapping) or set(plain) != {"deal", "arms", "arm"}:
            raise Refusal("arm", str(plain)[:40], "has exactly the keys arm, arms, deal")
        return cls(ArmDeal(plain["deal"], plain["arms"]), plain["arm"])


def charged(releases: Iterable[tuple[str, Arm | None]]) -> Counter[str]:
    """Return how often each event is charged: for the arms of a deal, the maximum over the arms.

    This equals the loss of the worst client if the arms released the same events; otherwise it is an upper bound.

    Args:
      releases: event of each release, as canonical JSON, and its arm; None if all clients took part.
    """
    counts, by_arm = Counter[str](), defaultdict[tuple[str, str], Counter[int]](Counter)
    for event, arm in releases:
        if arm is None:
            counts[event] += 1
        else:
            by_arm[arm.deal.key, event][arm.number] += 1
    for (_, event), arm_counts in by_arm.items():
        counts[event] += max(arm_counts.values())
    return counts
