"""Segments: one vector of named parts, each with a clip of its own; sums of updates stay, bit for bit, what they were."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.privacy.budget import Budget, Release
from fedveil.privacy.ledger.ledger import Ledger
from fedveil.privacy.mechanisms.distributed import decode_counts_of, encode_share
from fedveil.privacy.mechanisms.private_sum import (
    UNCLIPPED,
    CohortSum,
    add,
    add_update,
    decode_counts,
    encode,
    encode_rows,
)
from fedveil.privacy.mechanisms.randomness import Randomness
from fedveil.privacy.mechanisms.sizing import Attendance, size_shares
from fedveil.privacy.mechanisms.sum_spec import Segment, SumSpec

LAYOUT = {"w": (40, 3), "b": (3,)}
METRICS = (Segment("loss", 5.0), Segment("num-examples", 100.0), Segment(UNCLIPPED, 1.0, 0.03))
TRAINED = SumSpec(1.5, METRICS, 0.05, 1 << 18)
# SHA-256, first 16 digits, of sums that fedveil made before its vectors were lists of segments.
BEFORE = {"open": "01786dbe2db5accf", "rows": "edb84315a3263c4d"}
BEFORE_SHARES = {16: "aa1df92357c280d8", 32: "d9bdd7eccebd3df6"}
SEED = b"7" * 32
ASKED = SumSpec(1.0, (Segment("ages", 3.0, 0.7, (4, 2), "statistics"), Segment("bit", 1.0, 0.3)))


def client(number: int) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    draws = np.random.default_rng([7, number])
    update = {
        name: draws.normal(0, 0.02 * (number + 1), shape).astype(np.float32) for name, shape in LAYOUT.items()
    }
    return update, {"loss": 0.3 * number, "num-examples": 10.0 * number}


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def flat(number: int) -> np.ndarray:
    return np.concatenate([value.ravel() for value in client(number)[0].values()])


def test_open_sums_of_updates_are_unchanged() -> None:
    one, two = CohortSum(np.zeros(126)), CohortSum(np.zeros(126))
    for number in range(1, 6):
        update, values = client(number)
        add(one, encode(update, values, TRAINED)[0], TRAINED)
        add_update(two, flat(number), values, TRAINED)
    assert digest(one.total) == digest(two.total) == BEFORE["open"]
    columns = {name: np.array([client(n)[1][name] for n in range(1, 6)]) for name in ("loss", "num-examples")}
    rows = encode_rows(np.stack([flat(number) for number in range(1, 6)]), columns, TRAINED)
    assert digest(rows) == BEFORE["rows"]


@pytest.mark.parametrize("bits", [16, 32])
def test_shares_of_updates_are_unchanged(bits: int) -> None:
    spec = size_shares(TRAINED, 123, Attendance(5, 4, 0), 1.1, bits, layered=True)
    total = np.zeros(spec.size, spec.dtype)
    for number in range(1, 6):
        stream = Randomness(3).stream("share", 1, 0, number)
        layers = [stream.bytes(32) for _ in spec.layers]
        total += encode_share(*client(number), spec, stream, SEED, layers)[0]
    assert digest(total) == BEFORE_SHARES[bits]


def test_clips_add_up_in_squares_to_the_norm() -> None:
    spec = SumSpec(1.5, (*METRICS, Segment("cells", 4.0, 0.2, (5,))), 0.05)
    clips = [spec.update_norm, *(spec.clip(each) for each in spec.segments)]
    assert math.fsum(clip**2 for clip in clips) == pytest.approx(1.5**2, rel=1e-12)
    assert ASKED.update_norm == 0


@settings(max_examples=60)
@given(st.lists(st.floats(-1e6, 1e6), min_size=8, max_size=8), st.floats(0, 1))
def test_any_vector_keeps_the_norm_and_each_segment_its_clip(cells: list[float], bit: float) -> None:
    vector, _ = encode({}, {"ages": np.reshape(cells, (4, 2)), "bit": bit}, ASKED)
    assert np.dot(vector.astype(float), vector) <= ASKED.cells**2
    assert np.linalg.norm(vector[:8]) <= ASKED.clip(ASKED.segments[0]) / ASKED.step + math.sqrt(8)


def test_counts_come_back_as_their_sum_and_a_long_part_is_shortened() -> None:
    short, long = np.full((4, 2), 0.5), np.full((4, 2), 50.0)
    total = np.zeros(9)
    for cells in (short, long):
        total += encode({}, {"ages": cells, "bit": 1.0}, ASKED)[0]
    found = decode_counts(total, 0, ASKED)["ages"]
    shortened = long * 3.0 / np.linalg.norm(long)
    np.testing.assert_allclose(found, short + shortened, atol=1e-4)


def test_missing_part_is_zero_and_a_wrong_one_is_refused() -> None:
    assert not encode({}, {"bit": 0.5}, ASKED)[0].any()
    for wrong in (np.zeros(8), np.full((4, 2), math.nan)):
        with pytest.raises(ValueError, match="segment ages"):
            encode({}, {"ages": wrong, "bit": 1.0}, ASKED)


def test_a_question_sums_in_shares_without_an_update() -> None:
    spec = size_shares(ASKED, 0, Attendance(4, 3, 0), 0.01)
    total = np.zeros(spec.size, spec.dtype)
    for number in range(4):
        stream = Randomness(3).stream("share", 1, 0, number)
        cells = np.eye(4)[:, :2] * 1.5
        total += encode_share({}, {"ages": cells, "bit": 1.0}, spec, stream, SEED)[0]
    np.testing.assert_allclose(decode_counts_of(total, spec, SEED)["ages"], np.eye(4)[:, :2] * 6, atol=0.5)


def test_ledger_entry_lists_the_segments_with_their_purposes(tmp_path: Path) -> None:
    from dp_accounting.dp_event import GaussianDpEvent

    segments = {"ages": "statistics", "bit": "statistics"}
    with Ledger.open(
        tmp_path / "l", Budget("client", 1.0, 1e-5), owner="o", simulated=True, durable=False
    ) as ledger:
        events = {"model": GaussianDpEvent(30.0)}
        release = Release("client", "q", 1, "m", events, "seeded", segments=segments, kind="question")
        entry = ledger.reserve(release)
    assert '"kind":"question"' in entry.payload
    assert '"segments":{"ages":"statistics","bit":"statistics"}' in entry.payload


def test_segments_beyond_the_norm_or_unbounded_are_refused() -> None:
    with pytest.raises(ValueError, match="share"):
        SumSpec(1.0, (Segment("a", 1.0, 0.6), Segment("b", 1.0, 0.6)))
    with pytest.raises(ValueError, match="bound"):
        Segment("a", 0.0)
    with pytest.raises(ValueError, match="shape"):
        SumSpec(None, (Segment("a", 1.0, 0.1, (3,)),))
