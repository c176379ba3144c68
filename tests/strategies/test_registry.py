"""Tests of ``registry``."""

import inspect
import re

import flwr.serverapp.strategy as flower
import pytest

from fedveil.base.refusal import Refusal
from fedveil.configs.settings import settings_from_overrides
from fedveil.configs.training_settings import STRATEGIES
from fedveil.strategies.registry import (
    NEEDS_SINGLE_CLIENTS,
    check_averages,
    make_strategy,
)


@pytest.mark.parametrize("kind", NEEDS_SINGLE_CLIENTS)
def test_strategies_of_single_clients_are_refused_with_the_reason(
    kind: type[flower.Strategy],
) -> None:
    strategy = kind.__new__(kind)
    with pytest.raises(Refusal, match="must see single clients"):
        check_averages(strategy)


@pytest.mark.parametrize("name", sorted(STRATEGIES.keys() - {"auto", "custom"}))
def test_a_strategy_has_the_keys_of_flowers_constructor(name: str) -> None:
    strategy = settings_from_overrides([f"strategy={name}"]).strategy
    made = make_strategy(name, strategy.parameters)
    theirs = (
        inspect.signature(type(made)).parameters.keys() - inspect.signature(flower.FedAvg).parameters.keys()
    )
    assert type(made).__name__.lower() == name and strategy.parameters.keys() == theirs
    assert {key: getattr(made, key) for key in theirs} == strategy.parameters


def test_flower_checks_no_value_of_a_strategy_so_that_the_models_do() -> None:
    """When Flower's constructors refuse values themselves, the ranges of the models may go."""
    assert [
        make_strategy("fedadam", {"eta": -1.0, "tau": 0.0}),
        make_strategy("fedavgm", {"server_momentum": 2.0}),
    ]
    for keys in (["strategy=fedadam", "strategy.tau=0"], ["strategy=fedavgm", "strategy.server_momentum=2"]):
        with pytest.raises(Refusal, match="must be"):
            settings_from_overrides(keys)


class Slower(flower.FedAvg):
    """Strategy of a user's own, whose constructor has an argument without a default and checks it."""

    def __init__(self, pace: float) -> None:
        if pace <= 0:
            raise ValueError("the pace is above 0")
        super().__init__()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pace": 1.0, "pase": 1.0}, "got an unexpected keyword argument 'pase': Slower takes pace"),
        ({}, "missing a required argument: 'pace': Slower takes pace"),
    ],
)
def test_an_argument_that_a_strategy_of_ones_own_lacks_is_refused(
    options: dict[str, float], said: str
) -> None:
    with pytest.raises(Refusal, match=re.escape(said)):
        make_strategy(f"{__name__}:Slower", options, (__name__,))


def test_a_strategy_of_ones_own_keeps_its_error() -> None:
    assert isinstance(make_strategy(f"{__name__}:Slower", {"pace": 1.0}, (__name__,)), Slower)
    with pytest.raises(ValueError, match="the pace is above 0"):
        make_strategy(f"{__name__}:Slower", {"pace": 0.0}, (__name__,))
