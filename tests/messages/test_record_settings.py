"""Settings of DP-SGD at a client: the noise of its records, and that of its ledger."""

from pathlib import Path

import pytest

from fedveil.messages.record_settings import RecordPrivacy
from fedveil.messages.training_order import RecordTerms
from fedveil.privacy.budget import Adjacency


@pytest.mark.parametrize(
    ("records", "noise"), [(40, 3.0), (50, 3.0), (51, 3.0), (199, 2.0), (200, 1.5), (9000, 1.5)]
)
def test_client_takes_the_noise_planned_for_its_records(records: int, noise: float, tmp_path: Path) -> None:
    planned = ((50, 3.0), (100, 2.0), (200, 1.5))
    level = RecordPrivacy(RecordTerms(3.0, 1e-5, 1.0, Adjacency.ZERO_OUT), planned, str(tmp_path))
    assert level.noise_multiplier(records) == noise
    own = RecordPrivacy(
        RecordTerms(3.0, 1e-5, 1.0, Adjacency.ZERO_OUT), planned, str(tmp_path), noise_by_ledger=(("a", 9.0),)
    )
    assert (own.of_ledger("a").noise_multiplier(records), own.of_ledger("b")) == (9.0, own)
