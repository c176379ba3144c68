"""Secret sharing: a published polynomial, any threshold of shares, and shares that are refused."""

from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedveil.privacy.secagg.refusal import Reason, Refused
from fedveil.privacy.secagg.shamir import PRIME, SECRET_BYTES, combine, new_secret, polynomial, values


def encoded(value: int) -> bytes:
    return value.to_bytes(32, "big")


def split(secret: bytes, threshold: int, points: list[int]) -> list[bytes]:
    """Return a share of the secret for each point."""
    (shares,) = values([polynomial(secret, threshold)], points)
    return [share.to_bytes(SECRET_BYTES, "big") for share in shares]


def test_shares_of_the_published_polynomial(monkeypatch: pytest.MonkeyPatch) -> None:
    coefficients = iter([encoded(7 + 11), encoded(11)])  # 7 x + 11 x^2 is 18 x + 11 x (x - 1)
    monkeypatch.setattr("fedveil.privacy.secagg.shamir.new_secret", lambda: next(coefficients))
    shares = split(encoded(12345), 3, [1, 2, 3])
    assert [int.from_bytes(share, "big") for share in shares] == [12363, 12403, 12465]
    assert combine(dict(zip([1, 2, 3], shares, strict=True)), 3) == encoded(12345)


@given(data=st.data(), secret=st.integers(0, PRIME - 1).map(encoded))
@settings(max_examples=60)
def test_any_threshold_of_shares_gives_the_secret(data: st.DataObject, secret: bytes) -> None:
    points = data.draw(st.lists(st.integers(1, 2**64), min_size=1, max_size=12, unique=True))
    threshold = data.draw(st.integers(1, len(points)))
    shares = dict(zip(points, split(secret, threshold, points), strict=True))
    chosen = data.draw(st.permutations(points))[: data.draw(st.integers(threshold, len(points)))]
    assert combine({point: shares[point] for point in chosen}, threshold) == secret
    with pytest.raises(Refused) as caught:
        combine({point: shares[point] for point in chosen[: threshold - 1]}, threshold)
    assert caught.value.reason is Reason.TOO_FEW


POINTS = st.one_of(
    st.sets(st.integers(1, 20), min_size=10),  # dense
    st.sets(st.integers(1, 2**64), min_size=1, max_size=12),
)


@given(data=st.data(), points=POINTS, length=st.integers(1, 30))
@settings(max_examples=60)
def test_values_are_those_of_the_falling_powers(data: st.DataObject, points: set[int], length: int) -> None:
    edges = st.sampled_from([0, 1, PRIME - 1])
    row = st.lists(edges | st.integers(0, PRIME - 1), min_size=length, max_size=length)
    polynomials = data.draw(st.lists(row, min_size=1, max_size=3))
    ordered = data.draw(st.permutations(sorted(points)))
    expected = [
        [sum(c * prod(range(x - k + 1, x + 1)) for k, c in enumerate(each)) % PRIME for x in ordered]
        for each in polynomials
    ]
    assert values(polynomials, ordered) == expected


def test_values_of_largest_coefficients_do_not_overflow() -> None:
    for points in (range(1, 200), range(1, 2000, 20)):
        largest = [[PRIME - 1] * 120] * 3
        expected = [
            -sum(prod(range(x - k + 1, x + 1)) for k in range(min(x, 119) + 1)) % PRIME for x in points
        ]
        assert values(largest, points) == [expected] * 3


@pytest.mark.parametrize("secret", [encoded(0), encoded(PRIME - 1)])
def test_fewer_shares_say_nothing(secret: bytes) -> None:
    # Two of three needed: together as uniform as noise, whatever the secret.
    drawn = [split(secret, 3, [1, 2, 3])[:2] for _ in range(1600)]
    cells = [
        (4 * int.from_bytes(a, "big") // PRIME) * 4 + 4 * int.from_bytes(b, "big") // PRIME for a, b in drawn
    ]
    assert stats.chisquare(np.bincount(cells, minlength=16)).pvalue > 1e-6
    wrong = {combine(dict(zip([1, 2], pair, strict=True)), 2) for pair in drawn[:50]}
    assert len(wrong) == 50 and secret not in wrong


@pytest.mark.parametrize("share", [encoded(PRIME), b"\xff" * 32, b"", bytes(31), bytes(33)])
def test_invalid_share_is_refused(share: bytes) -> None:
    with pytest.raises(Refused) as caught:
        combine({1: share, 2: encoded(1)}, 2)
    assert caught.value.reason is Reason.BAD_SHARE


@pytest.mark.parametrize(("secret", "threshold"), [(encoded(PRIME), 1), (bytes(31), 1), (encoded(1), 0)])
def test_unshareable_value_is_an_error(secret: bytes, threshold: int) -> None:
    with pytest.raises(ValueError):
        polynomial(secret, threshold)


def test_a_new_secret_is_a_field_element_and_new() -> None:
    drawn = {new_secret() for _ in range(200)}
    assert len(drawn) == 200 and all(int.from_bytes(secret, "big") < PRIME for secret in drawn)
    assert any(secret[0] & 0x40 for secret in drawn)


def test_a_secret_too_large_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = iter([b"\xff" * 32, encoded(8)])
    monkeypatch.setattr("os.urandom", lambda n: next(draws))
    assert new_secret() == encoded(4)
