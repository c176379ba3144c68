"""Reference of the configuration: the text of --help."""

import pytest

from fedveil.configs.compose import compose_overrides
from fedveil.configs.reference import help_text
from fedveil.configs.schema import SimulationSettings


@pytest.mark.parametrize("overrides", [[], ["privacy=record_and_client", "task=shakespeare", "audit=full"]])
def test_help_fits_a_terminal_and_names_every_key(overrides: list[str]) -> None:
    text = help_text(compose_overrides(overrides).config, SimulationSettings)
    assert max(map(len, text.splitlines())) <= 80
    for key in ("num_rounds=100", "learning_rate=${task.", "secagg.bits=null", "cohort.rate=0.25"):
        assert f"\n  {key}" in text
    assert "Above 0 and at most 1." in " ".join(text.split()) and "name=" not in text
