"""Registry of Flower's strategies that run on a private sum, by name, and of those that cannot."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import flwr.serverapp.strategy as flower
import numpy as np
from flwr.app import Message
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from ..base.refusal import Refusal
from ..messages.wire import WEIGHT, only_arrays, views

# On one reply these run without an error and become the mean, so they are refused by name.
NEEDS_SINGLE_CLIENTS = dict.fromkeys(
    (
        flower.FedMedian,
        flower.FedTrimmedAvg,
        flower.Krum,
        flower.MultiKrum,
        flower.Bulyan,
        flower.QFedAvg,
        flower.FedXgbBagging,
        flower.FedXgbCyclic,
    ),
    "it must see single clients' updates, which a private sum hides; use one that averages",
)
# These add noise or clip by themselves, outside the ledger.
PRIVATE_STRATEGIES = dict.fromkeys(
    (
        flower.DifferentialPrivacyClientSideAdaptiveClipping,
        flower.DifferentialPrivacyClientSideFixedClipping,
        flower.DifferentialPrivacyServerSideAdaptiveClipping,
        flower.DifferentialPrivacyServerSideFixedClipping,
    ),
    "its noise is on no ledger; use the strategy inside it, whose sum gets noise anyway",
)
REFUSED = {**NEEDS_SINGLE_CLIENTS, **PRIVATE_STRATEGIES}

# The sum answers as one client, so that one message is enough: the cohort decides who gets it. Clients do not evaluate.
ONE_REPLY: dict[str, Any] = {
    "fraction_train": 1e-9,
    "fraction_evaluate": 0.0,
    "min_train_nodes": 1,
    "min_evaluate_nodes": 0,
    "min_available_nodes": 1,
}


def make_strategy(name: str, options: Mapping[str, Any], allow_modules: tuple[str, ...] = ()) -> Strategy:
    """Return the strategy of that name; one of Flower's is its unchanged code, set to expect the sum as the only reply.

    Args:
      name: of Flower's class in small letters, or "module:Class" for the user's own.
      options: arguments of the strategy's constructor.
      allow_modules: modules that may be imported for it.

    Raises:
      Refusal: the name is unknown, its module is not allowed or cannot be imported, the constructor has no such argument,
        or `check_averages` refuses it.
    """
    shipped = {key.lower(): each for key, each in vars(flower).items() if isinstance(each, type)}
    kind = shipped.get(name) or _load(name, allow_modules)
    try:
        inspect.signature(kind).bind(**options)
    except TypeError as error:
        remedy = f"{error}: {kind.__name__} takes {', '.join(inspect.signature(kind).parameters)}"
        raise Refusal("strategy.parameters", dict(options), remedy) from error
    strategy = kind(**(ONE_REPLY if name in shipped else {}), **options)
    check_averages(strategy)
    return strategy


def check_averages(strategy: Strategy) -> None:
    """Refuse a strategy that must see single clients, or that adds noise of its own.

    Raises:
      Refusal: names the class and the reason.
    """
    for refused, reason in REFUSED.items():
        if isinstance(strategy, refused):
            raise Refusal("strategy", type(strategy).__name__, reason)
    if (key := getattr(strategy, "weighted_by_key", WEIGHT)) != WEIGHT:
        text = f"a sum is one reply, weighted by {WEIGHT}; leave it out"
        raise Refusal("strategy.weighted_by_key", key, text)


def aggregated(
    strategy: Strategy, number: int, replies: Sequence[Message]
) -> dict[str, NDArray[np.generic]] | None:
    """Return the model that a strategy makes of a round's one reply, as read-only arrays by name; None without a reply.

    FedAvg's mean of one reply is that reply, whose arrays it would copy four times, so they are taken directly.

    Args:
      strategy: strategy of the run.
      number: number of the round.
      replies: the one of the private sum; empty if the round released nothing.
    """
    if len(replies) == 1 and type(strategy).aggregate_train is flower.FedAvg.aggregate_train:
        return views(only_arrays(replies[0].content))
    arrays, _ = strategy.aggregate_train(number, replies)
    return None if arrays is None else {name: np.asarray(array.numpy()) for name, array in arrays.items()}


def reason_against(name: str) -> str | None:
    """Return why Flower's strategy of this name cannot stand behind a private sum; None if no reason is known.

    Args:
      name: of a class, in any case, with or without Fed in front: ``krum``, ``FedMedian``, ``median``.
    """
    for refused, reason in REFUSED.items():
        class_name = refused.__name__.lower()
        if name.lower().replace("_", "") in (class_name, class_name.removeprefix("fed")):
            return reason
    return None


def _load(target: str, allow_modules: tuple[str, ...]) -> type[Strategy]:
    """Return the user's class "module:Class", from a module that is allowed."""
    module, _, attribute = target.partition(":")
    if not attribute:
        remedy = "use the name of a strategy of Flower's that averages, or module:Class with the module in allow_modules"
        raise Refusal("strategy", target, remedy)
    if module not in allow_modules:
        raise Refusal("strategy", target, f"add allow_modules=[{module}] if you trust that module")
    try:
        strategy_type = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as problem:
        raise Refusal("strategy", target, f"it cannot be imported ({problem})") from problem
    if not (isinstance(strategy_type, type) and issubclass(strategy_type, Strategy)):
        raise Refusal("strategy", target, "it is no subclass of flwr.serverapp.strategy.Strategy")
    return strategy_type
