"""What fits into a masked sum and what its noise is worth, against published numbers and formulas of others."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
from dp_accounting.dp_event import PoissonSampledDpEvent, SelfComposedDpEvent
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from fedveil.base.refusal import Refusal
from fedveil.configs.settings import settings_from_overrides
from fedveil.privacy.accounting.epsilon import epsilon, grouped
from fedveil.privacy.accounting.renyi import by_renyi, from_renyi, orders
from fedveil.privacy.budget import Adjacency
from fedveil.privacy.mechanisms.distributed import sum_event
from fedveil.privacy.mechanisms.rotation import block_of
from fedveil.privacy.mechanisms.rounding import limit_for
from fedveil.privacy.mechanisms.sizing import MAX_EXCESS, Attendance, Layer, ShareSpec, size_shares
from fedveil.privacy.mechanisms.sum_spec import WEIGHT, Segment, SumSpec
from fedveil.privacy.secagg.graph import colluders
from fedveil.run.build import build
from fedveil.run.unit_plan import unit_plans

PLAIN = SumSpec(1.0)
MILLION = 2**20
PAPER_TAILS = 4  # standard deviations that the papers leave room for; ours leave what is proved


def paper_cells(bits: int, noise: float, clients: int, coordinates: int) -> int:
    """Grid units per norm by the bit formula of Kairouz et al. 2021, section 6."""
    room = (2**bits / (2 * PAPER_TAILS)) ** 2 - clients / 4
    return round(math.sqrt(room / (clients**2 / coordinates + noise**2)))


def inflation(cells: int, coordinates: int) -> float:
    return math.sqrt(limit_for(cells, coordinates)) / cells


@pytest.mark.parametrize(
    ("bits", "published", "printed"),
    [(6, 22, 1), (8, 4.5, 0.05), (10, 1.47, 0.005), (12, 1.04, 0.005), (14, 1.003, 0.0005)],
)
def test_sensitivity_after_rounding_is_as_published(bits: int, published: float, printed: float) -> None:
    assert inflation(paper_cells(bits, 1.0, 100, 2**16), 2**16) == pytest.approx(published, abs=printed)


@pytest.mark.parametrize(
    ("bits", "published", "needed"),
    [
        *((14, 2.083, 1.846), (16, 1.859, 1.846), (18, 1.847, 1.846)),
        *((14, 1.170, 1.122), (16, 1.125, 1.122), (18, 1.122, 1.122)),
        *((12, 2.003, 0.893), (14, 0.916, 0.893), (16, 0.894, 0.893), (18, 0.893, 0.893)),
    ],
)
def test_noise_over_the_clip_is_as_published(bits: int, published: float, needed: float) -> None:
    """EMNIST-like, 100 clients, 2^20 coordinates: noise at these bits, and what the accountant needs of it."""
    cells = paper_cells(bits, published, 100, MILLION)
    assert published / inflation(cells, MILLION) == pytest.approx(needed, rel=1.5e-3)


def test_twelve_bits_hold_no_such_noise() -> None:
    room = 2**12 / (2 * PAPER_TAILS)  # all of it noise
    assert all(room / math.sqrt(limit_for(cells, MILLION)) < 1.122 for cells in (1, 10, 100, 1000))


ORACLE = ShareSpec(replace(PLAIN, cells=300), MILLION, Attendance(100, 100), 100, 16, True)
DELTA = 1 / 3400


def test_one_round_costs_like_both_published_mechanisms() -> None:
    event = sum_event(ORACLE, 100)
    ours = by_renyi(grouped([event]), DELTA, Adjacency.ZERO_OUT)
    assert ours == pytest.approx(2.112, abs=2e-3)
    assert from_renyi(discrete_gaussian_renyi(ORACLE), DELTA) == pytest.approx(ours, rel=1e-4)
    assert from_renyi(skellam_renyi(ORACLE), DELTA) == pytest.approx(ours, rel=1e-3)
    assert epsilon([event], DELTA) <= ours


def discrete_gaussian_renyi(spec: ShareSpec) -> np.ndarray:
    """Kairouz et al. 2021, for the shares of all clients."""
    n, variance = spec.attendance.most, spec.sigma**2
    tau = 10 * sum(math.exp(-2 * math.pi**2 * variance * j / (j + 1)) for j in range(1, n))
    l2 = math.sqrt(spec.limit / n / variance)
    l1 = l2 * min(math.sqrt(spec.size), math.sqrt(spec.limit))
    d = spec.size
    terms = [
        l2**2 + 2 * tau * d / orders(),
        l2**2 + 2 * l1 * tau + tau**2 * d,
        (l2 + math.sqrt(d) * tau) ** 2,
    ]
    return orders() / 2 * np.minimum.reduce([np.broadcast_to(term, orders().shape) for term in terms])


def skellam_renyi(spec: ShareSpec) -> np.ndarray:
    """Agarwal et al. 2021, for Skellam shares of the same variance, in grid units."""
    mu, squared = spec.attendance.most * spec.sigma**2, spec.limit
    l1 = math.sqrt(squared) * min(math.sqrt(spec.size), math.sqrt(squared))
    first = ((2 * orders() - 1) * squared + 6 * l1) / (4 * mu**2)
    return orders() * squared / (2 * mu) + np.minimum(first, 3 * l1 / (2 * mu))


def test_sum_of_all_its_shares_costs_like_a_central_one() -> None:
    """The published 1.859 at 16 bits pays for the generic bound of sampled RDP; the theorem in `sizing` does not."""
    spec = size_shares(PLAIN, MILLION, Attendance(172, 172), 1.492)
    assert spec.bits == 16
    sampled = PoissonSampledDpEvent(100 / 3400, sum_event(spec, spec.attendance.most))
    assert epsilon([SelfComposedDpEvent(sampled, 1500)], DELTA, interval=1e-3) == pytest.approx(3.0, abs=0.02)
    assert 1.492 * spec.inflation < 1.859


# --- overflow


def test_the_largest_cohort_is_refused_one_client_more() -> None:
    spec = ShareSpec(replace(PLAIN, cells=100), 4, Attendance(100, 100), 16, 16, False)
    assert 100 * (100 + 225) <= 2**15 - 1 < 101 * (100 + 225)  # 225: the most that a share of sigma 16 can be
    with pytest.raises(Refusal, match="overflow"):
        replace(spec, attendance=Attendance(101, 100))


@pytest.mark.parametrize("noise", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("most", [10, 100, 1000])
def test_rotated_sum_overflows_less_often_than_promised(most: int, noise: float) -> None:
    spec = size_shares(PLAIN, 100_000, Attendance(most, most), noise, bits=16)

    def chance(spec: ShareSpec) -> float:
        n, block = spec.attendance.most, block_of(spec.size)
        proxy = n**2 * spec.limit / block + n * spec.sigma**2
        return math.log2(2 * spec.size) - (2**15 - 1 - n) ** 2 / (2 * proxy) / math.log(2)

    assert -42 < chance(spec) <= -40
    with pytest.raises(Refusal, match="overflow"):
        finer = replace(spec.sum, cells=math.ceil(1.03 * spec.sum.cells))
        replace(spec, sum=finer, sigma=math.ceil(1.03 * spec.sigma))


def test_sixteen_bits_are_used_where_cheap_and_refused_without_room() -> None:
    assert size_shares(PLAIN, MILLION, Attendance(100, 70), 1.0).bits == 16
    assert size_shares(PLAIN, MILLION, Attendance(1000, 700), 1.0).bits == 16
    assert size_shares(PLAIN, 2**24, Attendance(100, 70), 1.0).bits == 32
    assert size_shares(PLAIN, 100, Attendance(100, 70), 0.0).bits == 32
    with pytest.raises(Refusal, match="no grid"):
        size_shares(PLAIN, MILLION, Attendance(10_000, 7000), 1.0, bits=16)


# --- what the noise is worth


def test_least_honest_survivors_carry_the_planned_noise() -> None:
    spec = size_shares(PLAIN, 10_000, Attendance(100, 70, 10), 1.0)
    costs = [sum_event(spec, survivors).noise_multiplier for survivors in range(70, 101)]
    assert 1.0 <= costs[0] < 1.01
    assert costs == sorted(costs)
    assert costs[-1] == pytest.approx(costs[0] * math.sqrt(90 / 60), rel=1e-3)


@pytest.mark.parametrize("shift", [5, 16, 40])
@pytest.mark.parametrize("shares", [1, 2, 7])
def test_exact_loss_of_summed_shares_is_within_the_gaussian_event(shares: int, shift: int) -> None:
    spec = ShareSpec(replace(PLAIN, cells=shift), 1, Attendance(7, 1), 16, 32, False)
    assert math.isqrt(spec.limit) == shift
    one = np.exp(-(np.arange(-224, 225) ** 2) / (2 * spec.sigma**2))
    law = np.ones(1)
    for _ in range(shares):
        law = np.convolve(law, one / one.sum())
    with_unit, without = np.pad(law, (shift, 0)), np.pad(law, (0, shift))
    mu = 1 / spec.noise_multiplier(shares, shares)
    for budget in (0.1, 0.5, 1.0, 3.0):
        exact = np.maximum(with_unit - math.exp(budget) * without, 0).sum()
        high, low = norm.cdf([mu / 2 - budget / mu, -mu / 2 - budget / mu])
        assert exact <= high - math.exp(budget) * low + 1e-13


@given(st.integers(2, 300), st.integers(0, 100), st.integers(0, 100), st.floats(0.3, 20))
@settings(max_examples=60)
def test_layers_leave_every_attendance_the_planned_noise(
    most: int, dropped: int, bad: int, noise: float
) -> None:
    least = max(most - dropped, 1)
    attendance = Attendance(most, least, min(bad, least - 1))
    spec = size_shares(PLAIN, 1000, attendance, noise, 32, layered=True)
    costs = [sum_event(spec, survivors).noise_multiplier for survivors in range(least, most + 1)]
    assert min(costs) == spec.min_noise(attendance.colluders) >= noise * (1 - 1e-9)
    assert costs[-1] <= 1.01 * noise
    honest = least - attendance.colluders
    assert max(costs) <= 1.01 * noise * math.sqrt(MAX_EXCESS * (1 + 1 / honest) ** 2)
    levels = [layer.survivors for layer in spec.layers]
    assert levels == sorted(set(levels), reverse=True) and all(least < level <= most for level in levels)


@pytest.mark.parametrize("layers", [((70, 20),), ((101, 20),), ((80, 20), (90, 20)), ((90, 15),)])
def test_layers_that_are_not_proved_are_refused(layers: tuple[tuple[int, int], ...]) -> None:
    spec = size_shares(PLAIN, 1000, Attendance(100, 70, 10), 1.0, 32)
    with pytest.raises(Refusal, match="layers"):
        replace(spec, layers=tuple(Layer(*layer) for layer in layers))


def test_layers_count_in_the_size() -> None:
    spec = ShareSpec(replace(PLAIN, cells=100), 4, Attendance(100, 90), 16, 16, False)
    with pytest.raises(Refusal, match="overflow"):
        replace(spec, layers=(Layer(100, 16),))
    rotated = size_shares(PLAIN, 100_000, Attendance(100, 70), 1.0, bits=16)
    with pytest.raises(Refusal, match="overflow"):
        replace(rotated, layers=(Layer(100, 2 * rotated.sigma),))


@pytest.mark.parametrize("survivors", [0, 69, 101])
def test_too_few_or_too_many_survivors_release_nothing(survivors: int) -> None:
    spec = size_shares(PLAIN, 10_000, Attendance(100, 70, 10), 1.0)
    with pytest.raises(Refusal, match="release nothing"):
        sum_event(spec, survivors)


def test_without_noise_nothing_is_promised() -> None:
    spec = size_shares(PLAIN, 100, Attendance(10, 5), 0.0)
    assert epsilon([sum_event(spec, 10)], 1e-5) == math.inf


COUNTED = SumSpec(1.0, (Segment(WEIGHT, 100.0, share=0.01),))


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("bits", {"bits": 24}),
        ("sum", {"sum": SumSpec(None)}),
        ("sum", {"sum": SumSpec(1.0, cells=2**30 + 1)}),
        ("sigma", {"sigma": 15}),
        ("sigma", {"sigma": -20}),
        ("weighted", {"weighted": True}),
        ("weighted", {"weighted": True, "sigma": 0}),
        ("weighted", {"weighted": True, "sum": replace(COUNTED, cells=300)}),
    ],
)
def test_unproved_size_is_refused(field: str, changes: dict[str, object]) -> None:
    with pytest.raises(Refusal, match=field):
        replace(ORACLE, **changes)


@pytest.mark.parametrize("counts", [(10, 11, 0), (10, 5, 5), (10, 5, -1), (10, 0, 0)])
def test_an_attendance_that_cannot_be_is_refused(counts: tuple[int, int, int]) -> None:
    with pytest.raises(Refusal):
        Attendance(*counts)


@pytest.mark.parametrize(("mode", "clients"), [("record_distributed", 6), ("client_distributed", 30)])
def test_plan_states_the_noise_of_a_sum_above_that_of_epsilon(mode: str, clients: int) -> None:
    asked = ["task=digits", f"task.num_clients={clients}", f"privacy={mode}", "secagg=masked", "num_rounds=3"]
    (plan,) = unit_plans(build(settings_from_overrides(asked)))
    told = next(
        float(found[1]) / 100
        for each in plan.warnings
        if (found := re.search(r"has (\d+)% more noise", each))
    )
    bad = colluders(clients, 0.1)  # whose shares the adversary knows; rounding adds at most 5 %
    least = math.sqrt(clients / (clients - bad)) - 1
    assert least - 0.005 <= told <= least + 0.055
