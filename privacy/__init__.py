"""Privacy: what a run may reveal, what it has revealed, and the mechanisms that keep the one above the other."""

from .accounting.epsilon import epsilon
from .budget import Adjacency, Adversary, Budget, Release, Unit
from .ledger.ledger import BudgetExhausted, Ledger
from .plan import Plan
from .refusal import Refusal

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
