"""A client's share and the sum of shares: exact laws, hard bounds, and what comes out at the server."""

import math
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedveil.privacy.mechanisms import distributed
from fedveil.privacy.mechanisms.discrete_gaussian import largest, sample
from fedveil.privacy.mechanisms.distributed import decode_sum, encode_share, openings, take_back
from fedveil.privacy.mechanisms.private_sum import UNCLIPPED
from fedveil.privacy.mechanisms.randomness import Randomness, Stream, keyed_stream
from fedveil.privacy.mechanisms.rounding import BLOCK
from fedveil.privacy.mechanisms.sizing import Attendance, Layer, ShareSpec, size_shares
from fedveil.privacy.mechanisms.sum_spec import WEIGHT, Segment, SumSpec

SEED = bytes(range(32))
LOSS, BIT = Segment("loss", 5.0), Segment(UNCLIPPED, 1.0, 0.02)
COUNT = Segment(WEIGHT, 100.0)
SUM = SumSpec(2.0, (LOSS, COUNT, BIT), 0.05)


def shares(updates: np.ndarray, spec: ShareSpec, key: int, loss: float = 1.0) -> list[np.ndarray]:
    streams = [Randomness(key).stream("share", client) for client in range(len(updates))]
    scalars = {"loss": loss, WEIGHT: 10.0}
    return [
        encode_share({"w": row}, scalars, spec, stream, SEED)[0]
        for row, stream in zip(updates, streams, strict=True)
    ]


def total(words: list[np.ndarray]) -> np.ndarray:
    return np.sum(words, axis=0, dtype=words[0].dtype)


def centred(words: np.ndarray) -> np.ndarray:
    return words.view(np.int16 if words.dtype == np.uint16 else np.int32).astype(np.int64)


def encoded(arrays: dict[str, np.ndarray]) -> np.ndarray:
    size = sum(array.size for array in arrays.values())
    spec = size_shares(SumSpec(1.0), size, Attendance(10, 2), 0.0)
    assert not spec.rotated
    return encode_share(arrays, {}, spec, Randomness(3).stream("share"), SEED)[0]


def test_division_of_an_update_into_arrays_does_not_matter() -> None:
    """Blocks are filled with small arrays, and large ones are cut."""
    sizes = [3, BLOCK + 5, 7, BLOCK - 2, 40, BLOCK, 2 * BLOCK - 1, 1]
    update = np.random.default_rng(1).normal(0, 1e-4, sum(sizes)).astype(np.float32)
    parts = np.split(update, np.cumsum(sizes)[:-1])
    one = encoded({"all": update})
    np.testing.assert_array_equal(encoded({str(n): part for n, part in enumerate(parts)}), one)
    with pytest.raises(ValueError, match="coordinates"):
        spec = size_shares(SumSpec(1.0), update.size, Attendance(10, 2), 0.0)
        encode_share({"all": update[:-1]}, {}, spec, Randomness(3).stream("share"), SEED)


def test_an_update_is_encoded_without_a_second_vector() -> None:
    """The words are 4 bytes a coordinate; what is scaled and rounded is never in memory as a whole."""
    update = {"w": np.full(1 << 20, 1e-4, np.float32)}
    tracemalloc.start()
    try:
        encoded(update)
        assert tracemalloc.get_traced_memory()[1] < 6 * update["w"].size
    finally:
        tracemalloc.stop()


# --- the noise


def against_the_law(drawn: np.ndarray, variance: float) -> float:
    """Chi-square p value against the discrete Gaussian of this variance."""
    reach = int(9 * math.sqrt(variance))
    weights = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * variance))
    expected = weights / weights.sum() * drawn.size
    observed = np.bincount(np.clip(drawn + reach, 0, 2 * reach), minlength=2 * reach + 1)
    edges = np.flatnonzero(np.diff(np.floor(np.cumsum(expected) / 50), prepend=-1))
    return stats.chisquare(np.add.reduceat(observed, edges), np.add.reduceat(expected, edges)).pvalue


def silent(coordinates: int, bits: int = 16, most: int = 60, sigma: int = 16) -> ShareSpec:
    return ShareSpec(SumSpec(1.0, cells=400), coordinates, Attendance(most, 2), sigma, bits, bits == 16)


@pytest.mark.parametrize("bits", [16, 32])
def test_the_share_of_a_silent_client_is_a_discrete_gaussian(bits: int) -> None:
    (share,) = shares(np.zeros((1, 300_000)), silent(300_000, bits), 1)
    assert against_the_law(centred(share), 16**2) > 1e-4


def test_the_sum_of_shares_is_a_discrete_gaussian_of_their_variance() -> None:
    words = shares(np.zeros((7, 200_000)), silent(200_000), 2)
    assert against_the_law(centred(total(words)), 7 * 16**2) > 1e-4
    assert against_the_law(centred(total(words[:6])), 7 * 16**2) < 1e-4  # a share less shows


def variance_ratio(drawn: np.ndarray, variance: float) -> float:
    """Deviation of the variance in its own standard deviations."""
    return (drawn.astype(float).var() / variance - 1) / math.sqrt(2 / drawn.size)


@given(st.sets(st.integers(0, 11), max_size=10))
@settings(max_examples=12)
def test_noise_of_the_sum_is_that_of_the_survivors(dropped: set[int]) -> None:
    words = [
        w
        for client, w in enumerate(shares(np.zeros((12, 20_000)), silent(20_000), 3))
        if client not in dropped
    ]
    assert abs(variance_ratio(centred(total(words)), len(words) * 16**2)) < 5
    assert variance_ratio(centred(total(words)), (len(words) + 1) * 16**2) < -3


def test_two_clients_and_two_attempts_never_share_noise() -> None:
    one = {"w": np.zeros(1000)}
    spec = silent(1000)
    words = [encode_share(one, {}, spec, Randomness().stream("share", 1), SEED)[0] for _ in range(2)]
    assert (words[0] != words[1]).mean() > 0.9


# --- layers that survivors open

LAYERED = replace(silent(20_000, most=12), layers=(Layer(12, 24), Layer(8, 40)))


def layered_total(spec: ShareSpec, survivors: int, opening: int, key: int = 9) -> tuple[np.ndarray, int]:
    """The sum of so many silent clients of whom so many open what they should, and how many had theirs taken out."""
    streams = [Randomness(key).stream("layered", client) for client in range(survivors)]
    seeds = [[stream.bytes(32) for _ in spec.layers] for stream in streams]
    update = {"w": np.zeros(spec.coordinates)}
    words = total(
        [
            encode_share(update, {}, spec, stream, SEED, own)[0]
            for stream, own in zip(streams, seeds, strict=True)
        ]
    )
    opened = [[seed for least, seed in openings(spec, own) if survivors >= least] for own in seeds]
    return words, take_back(words, survivors, spec, opened[:opening])


@pytest.mark.parametrize(
    ("survivors", "opening", "variance"),
    [
        (12, 12, 12 * 16**2),
        (11, 11, 11 * (16**2 + 24**2)),
        (8, 8, 8 * (16**2 + 24**2)),
        (7, 7, 7 * (16**2 + 24**2 + 40**2)),
        (12, 9, 12 * 16**2 + 3 * (24**2 + 40**2)),  # three vanish before they open: their noise stays
        (8, 0, 8 * (16**2 + 24**2 + 40**2)),
    ],
)
def test_opened_sum_is_a_discrete_gaussian_of_the_closed_layers(
    survivors: int, opening: int, variance: int
) -> None:
    words, taken = layered_total(LAYERED, survivors, opening)
    assert taken == (opening if survivors >= 8 else survivors)
    assert against_the_law(centred(words), variance) > 1e-4
    assert abs(variance_ratio(centred(words), variance)) < 5
    assert LAYERED.variance(survivors) * survivors <= variance


@given(st.integers(0, 40), st.integers(0, 2**32))
@settings(max_examples=15)
def test_any_dropouts_leave_the_sum_its_planned_noise(dropped: int, key: int) -> None:
    """100 clients of whom 40 may drop: the variance over what the plan needs, with 10 colluders not counted."""
    spec = size_shares(replace(SUM, segments=()), 4000, Attendance(100, 60, 10), 1.0, layered=True)
    survivors = 100 - dropped
    words, _ = layered_total(spec, survivors, survivors, key)
    honest = (survivors - 10) / survivors
    planned = 1.0 * spec.limit
    assert variance_ratio(centred(words), planned / honest) > -5
    assert variance_ratio(centred(words), 1.2 * planned / honest) < 3
    if dropped == 0:
        assert abs(variance_ratio(centred(words), 1.01 * planned / honest)) < 5


@pytest.mark.parametrize("seeds", [[], [bytes(32)], [bytes(32)] * 3])
def test_wrong_number_of_seeds_is_skipped(seeds: list[bytes]) -> None:
    words = np.zeros(20_000, np.uint16)
    assert take_back(words, 12, LAYERED, [seeds]) == 0 and not words.any()


def test_a_share_without_its_layers_does_not_leave() -> None:
    with pytest.raises(ValueError, match="0 seeds for 2 layers"):
        encode_share({"w": np.zeros(20_000)}, {}, LAYERED, Randomness().stream("share"), SEED)


# --- the whole way


@given(st.integers(2, 12), st.integers(1, 300), st.integers(0, 2**32), st.sampled_from([16, 32]))
@settings(max_examples=40)
def test_decoded_value_is_the_mean_of_the_clipped_updates(n: int, d: int, key: int, bits: int) -> None:
    spec = size_shares(SUM, d, Attendance(12, 2), 0.5, bits)
    rng = np.random.default_rng(key)
    updates = rng.normal(size=(n, d)) * rng.lognormal(-1, 2, size=(n, 1))
    arrays, scalars = decode_sum(total(shares(updates, spec, key)), {"w": (d,)}, spec, n, n, SEED)
    norms = np.linalg.norm(updates, axis=1, keepdims=True)
    clipped = updates * np.minimum(1, SUM.update_norm / norms)
    noise = math.sqrt(n * (spec.sigma**2 + 1)) * spec.sum.step / n
    error = arrays["w"] - clipped.mean(axis=0)
    assert np.abs(error).max() < 7 * noise
    reach = SUM.clip(LOSS)
    assert abs(scalars["loss"] - 1.0) < 7 * noise / reach * 2.5
    assert abs(scalars[UNCLIPPED] - (norms <= SUM.update_norm).mean()) < 7 * noise / SUM.clip(BIT) / 2


def test_rotated_sum_of_agreeing_clients_does_not_overflow() -> None:
    spec = size_shares(SUM, 30_000, Attendance(40, 40), 0.3, bits=16)
    spike = np.zeros((40, 30_000))
    spike[:, 7] = 1e6
    arrays, _ = decode_sum(total(shares(spike, spec, 6)), {"w": (30_000,)}, spec, 40, 40, SEED)
    noise = math.sqrt(40 * spec.sigma**2) * spec.sum.step / 40
    assert abs(arrays["w"][7] - SUM.update_norm) < 6 * noise
    assert np.abs(arrays["w"][8:]).max() < 7 * noise


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize(("size", "sigma"), [(7, 3), (700, 40), (700, 1 << 23)])
def test_noise_of_many_streams_is_that_of_each(
    bits: int, size: int, sigma: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "_NOISE_BLOCK", 300)
    monkeypatch.setattr(distributed, "_ROWS_AT_ONCE", 1000)
    words, keys = np.zeros(size, f"u{bits // 8}"), [bytes([number] * 32) for number in range(9)]
    for key in keys:
        stream, parts = keyed_stream(key, "test"), range(0, size, 300)
        noise = np.concatenate([sample(sigma, min(300, size - start), stream) for start in parts])
        words += noise.astype(words.dtype)
    assert words.any()
    distributed.add_grid_noise(words, sigma, [keyed_stream(key, "test") for key in keys], np.subtract)
    assert not words.any()


@pytest.mark.parametrize(("most", "sigma", "cells"), [(32, 0, 1000), (100, 16, 100)])
@pytest.mark.parametrize("sign", [1, -1])
def test_worst_sum_of_the_most_clients_is_decoded_and_one_more_wraps(
    most: int, sigma: int, cells: int, sign: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every client has all of its norm in one coordinate, and the most noise that there is, of the same sign."""

    def rows(scale: int, count: int, streams: list[Stream]) -> np.ndarray:
        return np.full((len(streams), count), sign * largest(scale))

    monkeypatch.setattr(distributed, "sample_rows", rows)
    spec = ShareSpec(SumSpec(1.0, cells=cells), 4, Attendance(most, 2), sigma, 16, False)
    update = np.array([[sign * 9.0, 0, 0, 0]])
    words = shares(np.repeat(update, most + 1, axis=0), spec, 7)
    worst = sign * most * (cells + (largest(sigma) if sigma else 0))
    arrays, _ = decode_sum(total(words[:most]), {"w": (4,)}, spec, most, 1.0, SEED)
    assert arrays["w"][0] == pytest.approx(worst * spec.sum.step)
    arrays, _ = decode_sum(total(words), {"w": (4,)}, spec, most + 1, 1.0, SEED)
    assert arrays["w"][0] * sign < 0


# --- without noise, by examples


def test_encryption_alone_is_federated_averaging() -> None:
    spec = replace(size_shares(SUM, 500, Attendance(20, 2), 0.0), weighted=True)
    rng = np.random.default_rng(8)
    updates, examples, losses = (
        rng.normal(size=(9, 500)) * 0.05,
        rng.integers(1, 100, 9),
        rng.uniform(0, 5, 9),
    )
    words = [
        encode_share({"w": u}, {"loss": loss, WEIGHT: n}, spec, Randomness().stream("share"), SEED)[0]
        for u, loss, n in zip(updates, losses, examples, strict=True)
    ]
    arrays, scalars = decode_sum(total(words), {"w": (500,)}, spec, 9, 9.0, SEED)
    assert np.abs(arrays["w"] - np.average(updates, axis=0, weights=examples)).max() < 1e-6
    assert scalars["loss"] == pytest.approx(np.average(losses, weights=examples), abs=1e-4)
    assert scalars[WEIGHT] == pytest.approx(examples.mean(), abs=1e-4)


def test_clients_without_examples_decode_to_nothing() -> None:
    spec = replace(size_shares(SUM, 5, Attendance(4, 2), 0.0), weighted=True)
    scalars = {"loss": 1.0, WEIGHT: 0.0}
    share, _ = encode_share({"w": np.ones(5)}, scalars, spec, Randomness().stream("share"), SEED)
    arrays, _ = decode_sum(share, {"w": (5,)}, spec, 1, 1.0, SEED)
    assert np.abs(arrays["w"]).max() < 1e-3


@pytest.mark.parametrize("examples", [math.nan, -1.0])
def test_a_weight_that_is_none_does_not_leave(examples: float) -> None:
    spec = replace(size_shares(SUM, 5, Attendance(4, 2), 0.0), weighted=True)
    with pytest.raises(ValueError, match=WEIGHT):
        encode_share({"w": np.ones(5)}, {WEIGHT: examples}, spec, Randomness().stream("share"), SEED)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_update_that_is_not_finite_does_not_leave(value: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        encode_share({"w": np.array([value] * 5)}, {}, silent(5, 32), Randomness().stream("share"), SEED)
