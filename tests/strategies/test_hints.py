"""Tests of ``hints``."""

from fedveil.configs.settings import settings_from_overrides
from fedveil.strategies.hints import HINTS


def test_the_keys_that_hints_name_exist() -> None:
    known = (
        settings_from_overrides([]).source
        + settings_from_overrides(["partition=dirichlet", "strategy=fedprox"]).source
        + settings_from_overrides(["task=csv", "task.folder=tables"]).source
    )
    for meant in HINTS.values():
        for key in meant.split(" ")[:1] if "=" not in meant else ():
            word = key.rpartition(".")[2]
            assert f"{word}:" in known or word in ("dir", "run"), meant
