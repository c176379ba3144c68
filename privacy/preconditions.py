"""Preconditions of a guarantee: checks shared by the command line, the Python face and `protect`."""

from .budget import Adjacency
from .plan import Plan
from .refusal import Refusal

VACUOUS_CLIENTS = 30  # below, hiding one client leaves little of what a mean can say
VACUOUS_NOISE = 0.5  # noise on the mean, in clipping norms, beyond which an update drowns
MOST_EMPTY = 0.5  # share of empty cohorts, above which most of a run's charges buy nothing


def check_cohort_size(size: int | None, clients: int) -> None:
    """Refuse a cohort of more clients than there are.

    Args:
      size: of the cohort; None if it is not fixed.
      clients: number of clients.

    Raises:
      Refusal: naming the size.
    """
    if size is not None and size > clients:
        raise Refusal("cohort.size", size, f"there are {clients} clients; take at most that many")


def check_adjacency(field: str, adjacency: Adjacency, revealing: str | None) -> None:
    """Refuse add-or-remove-one if a public value reveals the number of units, which it must hide.

    Args:
      field: for a refusal.
      adjacency: of the guarantee.
      revealing: the revealing value and the remedy, a clause; None if there is none.

    Raises:
      Refusal: naming the field.
    """
    if adjacency is Adjacency.ADD_OR_REMOVE_ONE and revealing is not None:
        raise Refusal(field, str(adjacency), revealing)


def drowning_noise(plan: Plan, expected: float, clients: int) -> float | None:
    """Return the noise on the mean, in clipping norms, if it drowns the signal; else None.

    Args:
      plan: calibrated, of the clients.
      expected: clients of a round, the divisor of the sum.
      clients: number of all clients.
    """
    noise = plan.noise_std / plan.clipping_norm / expected
    return noise if clients < VACUOUS_CLIENTS or noise > VACUOUS_NOISE else None


def vacuity(plan: Plan, expected: float, clients: int) -> str | None:
    """Return a clause that says why a client-level guarantee is vacuous, or None; see `drowning_noise`."""
    noise = drowning_noise(plan, expected, clients)
    if noise is None:
        return None
    return f"is vacuous with {clients} clients: the noise on the mean is {noise:.2g} clipping norms"


def emptiness(coin: float | None, clients: int) -> str | None:
    """Return a clause that says why most rounds of a run would have an empty cohort, or None.

    Args:
      coin: probability with which each client takes part; None without Poisson sampling.
      clients: number of all clients.
    """
    empty = 0.0 if coin is None else (1 - float(coin)) ** clients
    if empty <= MOST_EMPTY:
        return None
    return f"leaves {empty:.0%} of the rounds without any of the {clients} clients"
