"""Canaries of an audit: how many there are, and how many there may be."""

from pathlib import Path

import pytest
from shared.runs import run_quietly

from fedveil.base.refusal import Refusal


def test_more_canaries_than_may_collude_are_refused(tmp_path: Path) -> None:
    masked = [
        "task=digits",
        "task.num_clients=20",
        "privacy=client_distributed",
        "cohort=all",
        "secagg.collusion=0.3",
    ]
    noise = ["privacy.noise_multiplier=1", "privacy.target_epsilon=null", "privacy.target_delta=0.01"]
    with pytest.raises(Refusal, match=r"count as colluding: use at most 6 with 20"):
        run_quietly([*masked, *noise, "audit=full", "audit.canaries=7"], tmp_path / "run")
