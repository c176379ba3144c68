"""Privacy: budgets, accounting, the ledger of releases, and the mechanisms that add noise.

Names are imported when they are first used: importing `Refusal` loads no numerics.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..base.refusal import Refusal
    from .accounting.epsilon import epsilon
    from .budget import Adjacency, Adversary, Budget, Release, Unit
    from .ledger.ledger import BudgetExhausted, Ledger
    from .plan import Plan

__all__ = [
    "Adjacency",
    "Adversary",
    "Budget",
    "BudgetExhausted",
    "Ledger",
    "Plan",
    "Refusal",
    "Release",
    "Unit",
    "epsilon",
]
_HOMES = {
    ".accounting.epsilon": ("epsilon",),
    ".budget": ("Adjacency", "Adversary", "Budget", "Release", "Unit"),
    ".ledger.ledger": ("BudgetExhausted", "Ledger"),
    ".plan": ("Plan",),
    "..base.refusal": ("Refusal",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home, __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
