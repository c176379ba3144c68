"""Bound of an encrypted sum: true sums never exceed it, sums with random words do, and noise unseen is allowed for."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from fedveil.privacy.mechanisms.discrete_gaussian import sample
from fedveil.privacy.mechanisms.distributed import add_grid_noise, decode_sum, encode_share
from fedveil.privacy.mechanisms.randomness import Randomness
from fedveil.privacy.mechanisms.sizing import Attendance, ShareSpec, size_shares
from fedveil.privacy.mechanisms.sum_bound import (
    FALSE_ALARM,
    SummedNoise,
    is_mean_too_long,
    is_too_noisy,
    longest_sum,
    norm_of,
)
from fedveil.privacy.mechanisms.sum_spec import WEIGHT, Segment, SumSpec
from fedveil.privacy.secagg.roster import Roster
from fedveil.server.masking import Masking

SEED, DRAWS = bytes(32), 2000
CLIENTS = SumSpec(2.0)
RECORDS = SumSpec(2.0, unit_norm=0.5)


def spec_of(
    summed: SumSpec, size: int, clients: int, noise: float, bits: int = 16, layered: bool = True
) -> ShareSpec:
    return size_shares(summed, size, Attendance(clients, max(clients // 2, 2)), noise, bits, layered)


def at_full_norm(spec: ShareSpec, clients: int) -> list[np.ndarray]:
    """Return vectors of clients that all pull in one direction with all that the norm allows."""
    update = np.random.default_rng(1).normal(size=spec.coordinates)
    update *= 2 * spec.sum.update_norm / np.linalg.norm(update)
    streams = [Randomness(7).stream("share", client) for client in range(clients)]
    secrets = [
        [bytes([client, layer] * 16) for layer, _ in enumerate(spec.layers)] for client in range(clients)
    ]
    return [
        encode_share({"w": update}, {}, spec, stream, SEED, layers)[0]
        for stream, layers in zip(streams, secrets, strict=True)
    ]


def total(vectors: list[np.ndarray]) -> np.ndarray:
    return np.sum(vectors, axis=0, dtype=vectors[0].dtype)


@given(
    summed=st.sampled_from([CLIENTS, RECORDS]),
    size=st.integers(1, 200),
    clients=st.integers(2, 30),
    noise=st.floats(0.3, 5.0),
    key=st.integers(0, 2**32),
)
@settings(max_examples=12)
def test_vectors_at_full_norm_and_exact_noise_stay_within_the_bound(
    summed: SumSpec, size: int, clients: int, noise: float, key: int
) -> None:
    """The sharpest form of it: without what owners may add unseen, in `DRAWS` rounds at once."""
    spec = spec_of(summed, size, clients, noise, 32, layered=False)
    stream = Randomness(key).stream("noise")
    signal = np.random.default_rng(key).normal(size=size)
    signal *= clients * math.sqrt(spec.limit) / np.linalg.norm(signal)
    sums = np.tile(np.trunc(signal), (DRAWS, 1))
    for _ in range(clients):
        sums += sample(spec.sigma, DRAWS * size, stream).reshape(DRAWS, size)
    assert np.linalg.norm(sums, axis=1).max() <= longest_sum(spec, SummedNoise(clients))


@given(
    summed=st.sampled_from([CLIENTS, RECORDS]),
    clients=st.integers(2, 12),
    noise=st.sampled_from([0.0, 0.5, 3.0]),
    bits=st.sampled_from([16, 32]),
    key=st.integers(0, 2**32),
)
@settings(max_examples=25)
def test_real_vectors_stay_within_and_random_words_never_do(
    summed: SumSpec, clients: int, noise: float, bits: int, key: int
) -> None:
    spec = spec_of(summed, 300, clients, noise, bits)
    vectors = at_full_norm(spec, clients)
    most = longest_sum(spec, SummedNoise(clients, clients))
    assert norm_of(total(vectors), spec) <= most
    vectors[0] = np.random.default_rng(key).integers(0, 2**bits, spec.size, dtype=spec.dtype)
    assert norm_of(total(vectors), spec) > most


@pytest.mark.parametrize("size", [10, 1000, 100_000])
def test_the_noise_alone_is_bounded_a_little_above_its_quantile(size: int) -> None:
    """Of a Gaussian the exact quantile is a chi's; the bound is to be above it, and not by much."""
    spec = spec_of(CLIENTS, size, 2, 50.0, 32)
    deviation = math.sqrt(2 * spec.variance(2))
    exact = deviation * math.sqrt(chi2.isf(FALSE_ALARM, size))
    signal = 2 * math.sqrt(spec.limit)
    noise = math.sqrt(longest_sum(spec, SummedNoise(2)) ** 2 - signal**2)
    assert exact <= noise <= 1.25 * exact


@pytest.mark.parametrize(("clients", "bits"), [(5, 16), (5, 32), (20, 16)])
def test_owners_without_a_minimum_raise_no_alarm(clients: int, bits: int) -> None:
    noise = 1.0
    spec = spec_of(CLIENTS, 400, clients, noise, bits)
    further = max(spec.missing_sigma(others, noise) for others in range(clients))
    assert further > 0
    vectors = at_full_norm(spec, clients)
    told = [further if client % 3 == 0 else 0 for client in range(clients)]
    for client, vector in enumerate(vectors):
        if told[client]:
            add_grid_noise(vector, told[client], [Randomness(9).stream("further", client)])
    found = norm_of(total(vectors), spec)
    assert found <= longest_sum(spec, SummedNoise(clients, clients, tuple(told), noise))
    assert not is_too_noisy(spec, SummedNoise(clients, clients, tuple(told), noise))


def test_unsaid_attendance_has_no_allowance_and_a_lie_counts_once() -> None:
    spec, noise = spec_of(CLIENTS, 400, 20, 1.0), 1.0
    most = max(spec.missing_sigma(others, noise) for others in range(20))
    without, one, lie, all_ = (
        longest_sum(spec, SummedNoise(20, 0, told, noise)) for told in ((), (most,), (2**63, 0), (most,) * 20)
    )
    assert without < one == lie < all_
    assert without < all_ / 2


@pytest.mark.parametrize(
    ("size", "further", "norms"), [(650, 0, 1.5), (650, 1, 2.1), (100_000, 0, 4.7), (100_000, 1, 16)]
)
def test_member_without_noise_moves_the_mean_by_a_bound(size: int, further: int, norms: float) -> None:
    """The numbers of the threat model, with the shipped dropout and collusion."""
    attendance = Masking(Roster(1, ()), dropout=0.4, collusion=0.1).attendance(20)
    spec = size_shares(SumSpec(1.0), size, attendance, 1.0, None, layered=True)
    most = longest_sum(spec, SummedNoise(20, 0, (further << 60,), 1.0))
    room = math.sqrt(most**2 - 19 * float(spec.variance(20)) * size) / spec.sum.cells
    assert room / 20 == pytest.approx(norms, rel=0.03)


def test_sum_lost_in_declared_noise_is_recognised() -> None:
    spec, noise = spec_of(CLIENTS, 100_000, 100, 1.0, 16), 1.0
    most = max(spec.missing_sigma(others, noise) for others in range(100))
    assert most > 0
    assert not is_too_noisy(spec, SummedNoise(100, 100, (), noise))
    assert not is_too_noisy(spec, SummedNoise(100, 100, (most,), noise))
    assert is_too_noisy(spec, SummedNoise(100, 100, (most,) * 100, noise))


def test_layers_in_the_sum_count_as_noise() -> None:
    spec = spec_of(CLIENTS, 400, 20, 2.0)
    assert spec.layers
    bounds = [longest_sum(spec, SummedNoise(20, unopened)) for unopened in (20, 5, 0)]
    assert bounds[0] > bounds[1] > bounds[2]


def weighed(counts: list[float], words: np.ndarray | None = None, bits: int = 32) -> bool:
    """Return whether the mean by these examples is found too long, with the first vector replaced where one is given."""
    summed = SumSpec(2.0, (Segment(WEIGHT, 100.0),), 0.02)
    spec = size_shares(summed, 30, Attendance(len(counts), 2), 0.0, bits)
    spec = ShareSpec(spec.sum, 30, spec.attendance, 0, spec.bits, spec.rotated, weighted=True)
    update = np.full(30, 1.0)
    vectors = [
        encode_share({"w": update}, {WEIGHT: count}, spec, Randomness(3).stream("s", i), SEED)[0]
        for i, count in enumerate(counts)
    ]
    if words is not None:
        vectors[0] = words.astype(spec.dtype)
    opened = total(vectors)
    assert norm_of(opened, spec) <= longest_sum(spec, SummedNoise(len(counts)))
    mean, scalars = decode_sum(opened, {"w": (30,)}, spec, len(counts), 1.0, SEED)
    return is_mean_too_long(mean, scalars, spec, len(counts))


@given(st.lists(st.floats(0, 150), min_size=2, max_size=10), st.sampled_from([16, 32]))
@settings(max_examples=60)
def test_a_true_mean_by_examples_is_never_too_long(counts: list[float], bits: int) -> None:
    assert not weighed(counts, bits=bits)


def test_false_count_with_a_long_mean_is_detected() -> None:
    words = np.zeros(31, np.int64)
    words[-1] = -(2**29)
    assert weighed([50.0] * 6, words)
