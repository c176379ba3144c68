"""Preconditions of a guarantee: checks shared by the command line, the Python face and `protect`."""

import math

from ..base.refusal import Refusal
from .budget import Adjacency
from .plan import Plan

VACUOUS_CLIENTS = 30  # with fewer, hiding one client leaves little of what a mean can say
# With fewer clients, a model still learns if the noise of the run is at most this share of the longest path of its updates:
# linear models of 42 and 62 parameters then reached 86 to 100 % with 5 to 30 clients, and 86 to 95 % without noise
# (docs/budgets.md).
FEW_NOISE = 0.25
VACUOUS_NOISE = 0.5  # noise on the mean, in clipping norms, beyond which an update drowns
MAX_EMPTY_SHARE = 0.5  # share of empty cohorts, above which most of a run's charges buy nothing


def check_cohort_size(size: int | None, clients: int) -> None:
    """Refuse a cohort of more clients than there are.

    Args:
      size: number of clients in a cohort; None if it is not fixed.
      clients: number of clients.
    """
    if size is not None and size > clients:
        raise Refusal("cohort.size", size, f"there are {clients} clients; take at most that many")


def check_adjacency(field: str, adjacency: Adjacency, revealing: str | None) -> None:
    """Refuse add-or-remove-one if a public value reveals the number of units, which it must hide.

    Args:
      field: setting that a refusal names.
      adjacency: adjacency of the guarantee.
      revealing: a clause that names the revealing value and the remedy; None if no value reveals the number.
    """
    if adjacency is Adjacency.ADD_OR_REMOVE_ONE and revealing is not None:
        raise Refusal(field, str(adjacency), revealing)


def vacuity(plan: Plan, expected: float, clients: int, parameters: int | None = None) -> str | None:
    """Return a clause that says why a client-level guarantee leaves a model nothing to learn; None if it does not.

    Args:
      plan: calibrated plan with the clients as units.
      expected: expected number of clients in a round, by which the sum is divided.
      clients: number of all clients.
      parameters: number of parameters of the model; None if it is not known.
    """
    noise = plan.noise_std / plan.clipping_norm / expected
    mean = f"the noise on the mean is {noise:.2g} clipping norms"
    if noise > VACUOUS_NOISE:
        return f"is vacuous with {clients} clients: {mean}"
    if clients >= VACUOUS_CLIENTS:
        return None
    few = f"is vacuous with {clients} clients, fewer than {VACUOUS_CLIENTS}: {mean}"
    if parameters is None:
        return few
    # L2 norm of the noise of all rounds together, over that of updates of the clipping norm in one direction.
    noise_share = noise * math.sqrt(parameters / plan.num_rounds)
    if noise_share <= FEW_NOISE:
        return None
    return f"{few}, and over all rounds {noise_share:.2g} times as long as their updates together can be"


def emptiness(coin: float | None, clients: int) -> str | None:
    """Return a clause that says how many rounds would have an empty cohort; None if at most `MAX_EMPTY_SHARE` would.

    Args:
      coin: probability with which each client takes part; None without Poisson sampling.
      clients: number of all clients.
    """
    empty = 0.0 if coin is None else (1 - float(coin)) ** clients
    if empty <= MAX_EMPTY_SHARE:
        return None
    return f"leaves {empty:.0%} of the rounds without any of the {clients} clients"
