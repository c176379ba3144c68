"""The seam for probes of memorisation: several tests of one look become one p-value."""

import math

from fedveil.privacy.audit.memorisation import MemorisationResult, pooled_p


def test_the_p_value_of_a_look_is_the_smallest_times_their_number() -> None:
    assert pooled_p([]) == 1.0
    assert pooled_p([MemorisationResult("exposure", 0.01), MemorisationResult("loss", 0.2)]) == 0.02
    assert pooled_p([MemorisationResult("exposure", 0.9), MemorisationResult("loss", 0.8)]) == 1.0


def test_missing_number_is_evidence() -> None:
    assert pooled_p([MemorisationResult("exposure", math.nan), MemorisationResult("loss", 0.2)]) == 0.0
