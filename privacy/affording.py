"""Whether what a ledger holds leaves room for one release more."""

from collections import Counter
from typing import TYPE_CHECKING

from .accounting.epsilon import GATE_INTERVAL, Gate
from .accounting.events import Gaussian, event_from_json, event_to_json
from .accounting.gaussian import exact_epsilon
from .accounting.renyi_filter import admits, counted, filter_order
from .budget import Adversary, Budget, Release
from .ledger.book import Book
from .ledger.hash_chain import canonical
from .refusal import Refusal

if TYPE_CHECKING:
    from dp_accounting import DpEvent

# Relative difference of epsilon by PLD, up to rounding, from the exact one of Gaussians.
ACCOUNTANTS_DIFFER = 1e-6


class BudgetExhausted(Exception):
    """A release that the budget does not afford; nothing was written and nothing was spent."""

    def __init__(self, budget: Budget, adversary: Adversary, would_be: float, why: str | None = None) -> None:
        super().__init__(
            why
            or f"the {budget.unit} budget is spent: against the {adversary} this release would bring epsilon to "
            f"{would_be:.4g} of {budget.target_epsilon:.4g} at delta {budget.target_delta:.3g}"
        )
        self.budget = budget
        self.adversary = adversary
        self.would_be = would_be


def require_affordable(release: Release, budget: Budget, book: Book, gate: Gate) -> None:
    """Raises BudgetExhausted unless `release` fits beside what `book` holds; Refusal for a filter of another order."""
    order = _order_with(release, book)
    for adversary, event in release.events.items():
        exact = _exactly(book, adversary, event, budget) if order is None else None
        if exact is not None and exact <= budget.target_epsilon:
            continue
        if exact is not None and exact > budget.target_epsilon * (1 + ACCOUNTANTS_DIFFER):
            raise BudgetExhausted(budget, adversary, exact)
        seen, event = book.events(adversary), event_from_json(event_to_json(event))
        fits = gate.fits(seen, event, budget) if order is None else admits([*seen, event], budget, order)
        if not fits:
            delta, adjacency = budget.target_delta, budget.adjacency
            would_be = counted([*seen, event], delta, adjacency, order, GATE_INTERVAL)
            raise BudgetExhausted(budget, adversary, would_be)


def _exactly(book: Book, adversary: Adversary, event: "DpEvent | Gaussian", budget: Budget) -> float | None:
    """Epsilon after `event` where all of it is plain Gaussian noise, which takes no accountant; else None."""
    counts = book.spent.get(adversary, Counter[str]()) + Counter([canonical(event_to_json(event))])
    return exact_epsilon(counts, budget.target_delta, budget.adjacency)


def _order_with(release: Release, book: Book) -> float | None:
    """The filter's order once `release` is on the ledger: fixed by the first adaptive release, for good."""
    fixed = book.filter_order
    if release.filter_order is None or fixed is None:
        return fixed if release.filter_order is None else filter_order(release.filter_order)
    if release.filter_order != fixed:
        remedy = f"this ledger's filter is at order {fixed:g} for good; plan with that one"
        raise Refusal("filter_order", release.filter_order, remedy)
    return fixed
