import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedveil.privacy.mechanisms import private_sum
from fedveil.privacy.mechanisms.private_sum import (
    CohortSum,
    add,
    add_noise,
    add_update,
    decode,
    encode,
    encode_rows,
)
from fedveil.privacy.mechanisms.randomness import Randomness
from fedveil.privacy.mechanisms.sum_spec import MIN_CELLS, MIN_NORM, SMOOTHING, Segment, SumSpec, cells_for

LOSS = Segment("loss", 5.0)
COUNT = Segment("num-examples", 100.0)
SPEC = SumSpec(2.0, (LOSS, COUNT), 0.02)
LAYOUT = {"w": (2, 3), "b": ()}

values = st.floats(-1e6, 1e6, allow_nan=False, width=32)


def update_of(numbers: list[float]) -> dict[str, np.ndarray]:
    return {"w": np.array(numbers[:6], np.float32).reshape(2, 3), "b": np.array(numbers[6], np.float32)}


@given(st.lists(values, min_size=7, max_size=7), st.floats(-10, 1e9), st.floats(0, 1e4))
@settings(max_examples=200)
def test_a_contribution_never_exceeds_the_norm(numbers: list[float], loss: float, count: float) -> None:
    vector, _ = encode(update_of(numbers), {"loss": loss, "num-examples": count}, SPEC)
    assert (vector == np.rint(vector)).all()
    whole = [int(v) for v in vector]
    assert sum(v * v for v in whole) <= SPEC.cells**2


@given(st.lists(values, min_size=7, max_size=7))
@settings(max_examples=100)
def test_zeroing_a_client_changes_the_sum_by_at_most_the_norm(numbers: list[float]) -> None:
    vector, _ = encode(update_of(numbers), {"loss": 1.0, "num-examples": 10}, SPEC)
    with_client, without = CohortSum(np.zeros(9)), CohortSum(np.zeros(9))
    add(with_client, vector, SPEC)
    assert np.linalg.norm((with_client.total - without.total) * SPEC.step) <= 2.0 * (1 + 1e-12)


def test_short_update_survives_and_a_long_one_keeps_its_direction() -> None:
    short = update_of([0.1, -0.2, 0.3, 0, 0.5, -0.1, 0.2])
    vector, clipped = encode(short, {}, SumSpec(2.0))
    assert not clipped
    arrays, _ = decode(vector, LAYOUT, SumSpec(2.0), 1.0)
    assert np.abs(arrays["w"] - short["w"]).max() <= SumSpec(2.0).step
    long = {name: 100 * value for name, value in short.items()}
    vector, clipped = encode(long, {}, SumSpec(2.0))
    assert clipped
    arrays, _ = decode(vector, LAYOUT, SumSpec(2.0), 1.0)
    flat = np.concatenate([arrays["w"].ravel(), arrays["b"].ravel()])
    assert math.isclose(np.linalg.norm(flat), 2.0, rel_tol=1e-3)


@pytest.mark.parametrize("norm", [1.0, MIN_NORM])
def test_zero_update_is_zero(norm: float) -> None:
    vector, clipped = encode(update_of([0.0] * 7), {}, SumSpec(norm))
    assert not clipped
    assert not vector.any()


@pytest.mark.parametrize("norm", [0.0, 1e-318, np.nan])
def test_norm_without_a_possible_grid_is_refused(norm: float) -> None:
    """Zero over a step that rounds to zero is no number: a client without a change would show, whatever the noise."""
    with pytest.raises(ValueError, match="clipping_norm"):
        SumSpec(norm)


def test_scalar_parameters_are_clipped_with_the_rest() -> None:
    vector, clipped = encode({"b": np.array(1000.0, np.float32)}, {}, SumSpec(1.0))
    assert clipped
    assert abs(vector[0]) <= SumSpec(1.0).cells


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_update_that_is_not_finite_is_no_contribution(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        encode(update_of([0, 0, bad, 0, 0, 0, 0]), {}, SPEC)


def test_scalars_come_back_as_their_mean_and_nan_as_the_middle() -> None:
    total = sum(
        encode(update_of([0.0] * 7), {"loss": v, "num-examples": 10}, SPEC)[0] for v in (1.0, 2.0, 3.0)
    )
    _, scalars = decode(np.asarray(total), LAYOUT, SPEC, 3.0)
    assert math.isclose(scalars["loss"], 2.0, abs_tol=1e-3)
    assert math.isclose(scalars["num-examples"], 10.0, abs_tol=2e-2)
    silent, _ = encode(update_of([0.0] * 7), {"loss": math.nan}, SPEC)
    assert silent[-2:].tolist() == [0.0, 0.0]


def test_rows_equal_single_clients() -> None:
    rng = np.random.default_rng(0)
    update = rng.normal(size=(20, 7)).astype(np.float32) * rng.uniform(0.01, 10, (20, 1)).astype(np.float32)
    update[0] = 0  # must not divide any clipping norm
    losses, counts = rng.uniform(0, 6, 20), rng.integers(1, 200, 20).astype(float)
    for spec in (
        SPEC,
        replace(SPEC, clipping_norm=10.0),
        SumSpec(None, (LOSS, Segment("num-examples", 1e9))),
    ):
        rows = encode_rows(update, {"loss": losses, "num-examples": counts}, spec)
        for k in range(20):
            one, _ = encode(update_of(list(update[k])), {"loss": losses[k], "num-examples": counts[k]}, spec)
            np.testing.assert_allclose(rows[k], one, rtol=1e-12, atol=1)


@given(st.lists(values, min_size=1, max_size=40))
@example([1.0] * 5000)  # rounding carries it over the norm, and what was added is taken back
@settings(max_examples=100)
def test_an_update_added_at_once_is_the_contribution_of_a_client(numbers: list[float]) -> None:
    """Whole, or as the window outside of which it is zero."""
    spec, scalars = SumSpec(1.5, (Segment("loss", 5.0),), 0.1, cells=64), {"loss": 2.0}
    window = np.array(numbers, np.float32)
    for update in (window, np.concatenate([np.zeros(3, np.float32), window, np.zeros(4, np.float32)])):
        start = 0 if update is window else 3
        before = np.arange(update.size + 1, dtype=np.float64)
        expected, at_once = CohortSum(before.copy()), CohortSum(before.copy())
        add(expected, encode({"w": update}, scalars, spec)[0], spec)
        add_update(at_once, window, scalars, spec, start)
        assert np.array_equal(at_once.total, expected.total)
        assert at_once.replies == 1


@pytest.mark.parametrize("kinds", ["f2", "f2 f4", "f4 f8"])
def test_weighed_update_is_the_same_by_message_and_at_once(kinds: str) -> None:
    draw, spec = np.random.default_rng(0), SumSpec(None, (Segment("num-examples", 1e6),))
    update = {kind: draw.normal(size=40).astype(kind) for kind in kinds.split()}
    values, size = {"num-examples": 70_000.0}, 40 * len(update)  # a count that float16 does not hold
    by_message, at_once = CohortSum(np.zeros(size + 1)), CohortSum(np.zeros(size + 1))
    add(by_message, encode(update, values, spec)[0], spec)
    add_update(at_once, list(update.values()), values, spec)
    assert not by_message.dropped and not at_once.dropped
    np.testing.assert_array_equal(by_message.total, at_once.total)
    exact = np.concatenate([value.astype(np.float64) for value in update.values()]) * 70_000
    np.testing.assert_allclose(by_message.total[:-1], exact, rtol=1e-6)


def test_server_clips_unclipped_vectors_again() -> None:
    cohort_sum = CohortSum(np.zeros(3))
    spec = SumSpec(1.0)
    add(cohort_sum, np.array([3.0 * spec.cells, 0, 0]), spec)
    assert cohort_sum.clipped_again == 1
    assert np.linalg.norm(cohort_sum.total) <= spec.cells


def test_unfit_vector_is_dropped_and_counted() -> None:
    cohort_sum = CohortSum(np.zeros(3))
    spec = SumSpec(1.0)
    for vector in (np.zeros(2), np.array([np.nan, 0, 0]), np.array([np.inf, 0, 0])):
        add(cohort_sum, vector, spec)
    assert cohort_sum.dropped == {"shape": 1, "not finite": 2}
    assert not cohort_sum.total.any()


@pytest.mark.parametrize("count", [0.0, -10.0, 1e18])
def test_absurd_counts_are_dropped_where_they_weigh(count: float) -> None:
    spec = SumSpec(None, (Segment("num-examples", 1e9),))
    cohort_sum = CohortSum(np.zeros(2))
    add(cohort_sum, np.array([1.0, count]), spec)
    assert cohort_sum.dropped == {"num-examples": 1}


def test_the_noise_has_the_claimed_scale_and_the_event_says_so() -> None:
    spec = SumSpec(0.5)
    total, event = add_noise(np.zeros(200_000), 1.7, spec, Randomness(1).stream("noise"))
    assert event.noise_multiplier == 1.7
    assert math.isclose(np.std(total) * spec.step, 1.7 * 0.5, rel_tol=0.01)


def test_without_a_clipping_norm_there_is_no_noise_to_claim() -> None:
    with pytest.raises(ValueError, match="clipping norm"):
        add_noise(np.zeros(3), 1.0, SumSpec(None), Randomness(1).stream("noise"))


def test_denominator_is_fixed_under_privacy_and_examples_otherwise() -> None:
    one, _ = encode({"w": np.ones(1)}, {"num-examples": 30}, SumSpec(None, (Segment("num-examples", 1e9),)))
    two, _ = encode({"w": np.zeros(1)}, {"num-examples": 10}, SumSpec(None, (Segment("num-examples", 1e9),)))
    arrays, _ = decode(one + two, {"w": (1,)}, SumSpec(None, (Segment("num-examples", 1e9),)), 7.0)
    assert arrays["w"][0] == 0.75
    private, _ = encode({"w": np.ones(1)}, {}, SumSpec(1.0))
    arrays, _ = decode(private, {"w": (1,)}, SumSpec(1.0), 7.0)
    assert math.isclose(arrays["w"][0], 1 / 7, rel_tol=1e-4)


@pytest.mark.parametrize("coordinates", [1, 10, 10**4, 10**6, 10**9])
def test_the_grid_is_fine_enough(coordinates: int) -> None:
    cells = cells_for(coordinates)
    assert cells & (cells - 1) == 0
    assert coordinates / 12 <= 1e-5 * cells**2  # rounding's share of the squared norm
    assert cells < 2**31 or coordinates > 10**12


@pytest.mark.parametrize("cells", [256, 1 << 12, MIN_CELLS])
@pytest.mark.parametrize("multiplier", [0.02, 1.0, 3.2])
def test_coarse_grid_has_the_variance_of_its_rounding(
    cells: int, multiplier: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a continuous Gaussian rounded to whole numbers, the noise is worth `SMOOTHING` squared less than its variance."""
    drawn: list[int] = []
    monkeypatch.setattr(
        private_sum, "sample", lambda sigma, count, stream: drawn.append(sigma) or np.zeros(count, int)
    )
    _, event = add_noise(np.zeros(9), multiplier, replace(SPEC, cells=cells), Randomness(1).stream("noise"))
    worth = drawn[0] ** 2 - SMOOTHING**2 * (cells < MIN_CELLS)
    assert event.noise_multiplier == multiplier and worth >= (multiplier * cells) ** 2
