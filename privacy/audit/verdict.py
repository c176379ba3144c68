"""Verdict on a claim by the evidence: consistent, violated, or too weak to tell.

Consistent means that this evidence does not refute the claim, never that the claim is true.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

import numpy as np

from ...base.refusal import Refusal
from ..accounting.gaussian import gaussian_mu, last_true
from .normality import accuracy_p, right_of_median, separation, separation_refutes
from .one_run import SHARES, Guesses, Scores, check_coins, gdp_refutes, guesses_at, steinke_refutes
from .rates import ErrorRates, Hits, rates_refute, rates_refute_gdp, worst_rates

# Called with epsilon and alpha: whether that epsilon is refuted at that level. A larger one is never refuted more easily.
Refutes = Callable[[float, float], bool]


class Verdict(StrEnum):
    """Verdict on the claim."""

    CONSISTENT = "consistent"
    VIOLATED = "violated"
    TOO_WEAK = "too weak to tell"


@dataclass(frozen=True)
class Method:
    """Test of a claim.

    Attributes:
      name: name of the method, with its authors.
      refutes: the test on the scores, which gives the bound.
      perfect: the same test on the best scores that as many canaries could have, which gives the ceiling.
    """

    name: str
    refutes: Refutes
    perfect: Refutes


@dataclass(frozen=True)
class Finding:
    """Result of one method.

    Attributes:
      method: name of the method.
      lower: lower bound on epsilon.
      ceiling: the largest lower bound that the method could have shown.
      p_value: smallest level at which the claim is refuted.
    """

    method: str
    lower: float
    ceiling: float
    p_value: float


@dataclass(frozen=True)
class Judgement:
    """Verdict by the first of `findings`; the others are for information."""

    verdict: Verdict
    findings: tuple[Finding, ...]


def judge(methods: Sequence[Method], epsilon: float, alpha: float, masked: float = math.inf) -> Judgement:
    """Judge a claim by the first method, and include the findings of the others.

    Args:
      methods: at least one.
      epsilon: epsilon of the claim, in nats.
      alpha: level of the test.
      masked: ceiling in epsilon that the released sums impose; the number of canaries imposes another.
    """
    findings = tuple(_finding(method, epsilon, alpha, masked) for method in methods)
    if methods[0].refutes(epsilon, alpha):
        return Judgement(Verdict.VIOLATED, findings)
    return Judgement(Verdict.TOO_WEAK if findings[0].ceiling <= epsilon else Verdict.CONSISTENT, findings)


def _finding(method: Method, epsilon: float, alpha: float, masked: float) -> Finding:
    """Return the finding of a method. Arguments as of `judge`."""
    lower = last_true(lambda size: method.refutes(size, alpha))
    ceiling = last_true(lambda size: method.perfect(size, alpha))
    p_value = math.exp(-last_true(lambda minus_log: method.refutes(epsilon, math.exp(-minus_log))))
    return Finding(method.name, lower, max(lower, min(ceiling, masked)), p_value)


def by_guesses(guesses: Guesses, delta: float, gaussian: bool = False) -> list[Method]:
    """Return the methods for the guesses of one run.

    Args:
      guesses: about the coins.
      delta: delta of the claim, in [0, 1).
      gaussian: whether the Gaussian curve decides, instead of the bound for any mechanism (Steinke et al.).
    """
    return _one_run([guesses], delta, gaussian)


def by_one_run(members: Scores, others: Scores, delta: float, gaussian: bool = False) -> list[Method]:
    """Return the methods for one run with a score for each canary and a fair coin each.

    Args:
      members: scores of canaries that were in.
      others: scores of canaries that were out.
      delta: delta of the claim, in [0, 1).
      gaussian: whether the two Gaussian tests decide.
    """
    check_coins(len(members), len(others))
    guesses = [guesses_at(members, others, share) for share in SHARES]
    by_count = {each.count: each for each in guesses}  # small shares of few canaries are equally many
    bounds = _one_run(list(by_count.values()), delta, gaussian)
    return [_gaussian(members, others, delta), *bounds] if gaussian else bounds


def by_many_runs(members: Scores, others: Scores, delta: float, gaussian: bool = False) -> list[Method]:
    """Return the methods for many independent runs, one score each, by exact limits of the error rates.

    Every second score chooses the threshold; the others, on which it does not depend, are counted.

    Args:
      members: scores of runs with the target, at least 4.
      others: scores of runs without the target, at least 4.
      delta: delta of the claim, in [0, 1).
      gaussian: whether the Gaussian curve decides.
    """
    if min(len(members), len(others)) < 4:
        raise Refusal("scores", min(len(members), len(others)), "give at least 4 runs with and 4 without")
    threshold = _best_threshold(members[::2], others[::2])
    rest_in, rest_out = members[1::2], others[1::2]
    false = Hits(int((rest_out > threshold).sum()), len(rest_out))
    missed = Hits(int((rest_in <= threshold).sum()), len(rest_in))

    def method(name: str, refute: Callable[[ErrorRates, float, float], bool]) -> Method:
        """Return a method whose `refute` takes upper limits of the error rates, delta and epsilon."""

        def refutes(false: Hits, missed: Hits, epsilon: float, alpha: float) -> bool:
            return refute(worst_rates(false, missed, alpha), delta, epsilon)

        perfect = partial(refutes, false._replace(hits=0), missed._replace(hits=0))
        return Method(name, partial(refutes, false, missed), perfect)

    of_gaussian = [method("Clopper-Pearson, Gaussian", rates_refute_gdp)] if gaussian else []
    return [*of_gaussian, method("Clopper-Pearson", rates_refute)]


def _one_run(counts: Sequence[Guesses], delta: float, gaussian: bool) -> list[Method]:
    """Return the methods on several sets of guesses, with Bonferroni over the sets. Other arguments as of `by_guesses`."""

    def method(name: str, refutes: Callable[[Guesses, float, float, float], bool]) -> Method:
        """Return a method whose `refutes` takes guesses, delta, epsilon and alpha."""

        def any_refutes(guesses: Sequence[Guesses], epsilon: float, alpha: float) -> bool:
            return any(refutes(each, delta, epsilon, alpha / len(guesses)) for each in guesses)

        perfect = [Guesses(each.canaries, each.count, each.count) for each in counts]
        return Method(name, partial(any_refutes, counts), partial(any_refutes, perfect))

    of_gaussian = [method("Mahloujifar et al., Gaussian", gdp_refutes)] if gaussian else []
    return [*of_gaussian, method("Steinke et al.", steinke_refutes)]


def _gaussian(members: Scores, others: Scores, delta: float) -> Method:
    """Return the method that refutes if both the t test and the accuracy test do. Arguments as of `by_one_run`."""
    apart, total = separation(members, others), len(members) + len(others)
    right = right_of_median(members, others)

    def accurate(right: int, epsilon: float, alpha: float) -> bool:
        return accuracy_p(right, total, gaussian_mu(epsilon, delta)) < alpha

    def refutes(epsilon: float, alpha: float) -> bool:
        return accurate(right, epsilon, alpha) and separation_refutes(apart, delta, epsilon, alpha)

    return Method("t test and accuracy, Gaussian", refutes, partial(accurate, total))


def _best_threshold(members: Scores, others: Scores) -> float:
    """Return the threshold with the best accuracy if members and others are equally frequent."""
    values = np.unique(np.concatenate([members, others]))
    below = np.searchsorted(np.sort(others), values, side="right") / len(others)
    missed = np.searchsorted(np.sort(members), values, side="right") / len(members)
    return float(values[np.argmax(below - missed)])
