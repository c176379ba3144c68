"""The graph of masks: its shape, who decides it, and the chances that its parameters stand for."""

import math
from dataclasses import replace

import networkx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedveil.base.refusal import Refusal
from fedveil.privacy.secagg.graph import (
    COMPLETE_UP_TO,
    Shape,
    colluders,
    opens_nothing,
    ring,
    smallest_shape,
    tail,
)
from fedveil.privacy.secagg.transcript import Profile

SEMI_HONEST, MALICIOUS = Profile.SEMI_HONEST, Profile.MALICIOUS
SEED = bytes(32)


@given(
    nodes=st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=60, unique=True),
    wanted=st.integers(2, 60),
    seed=st.binary(min_size=32, max_size=32),
)
@settings(max_examples=80)
def test_the_graph_is_regular_symmetric_and_connected(nodes: list[int], wanted: int, seed: bytes) -> None:
    neighbours = min(wanted - wanted % 2, len(nodes) - 1)
    if neighbours % 2 and neighbours != len(nodes) - 1:
        neighbours -= 1
    drawn = ring(nodes, neighbours, seed)
    assert drawn == ring(sorted(nodes), neighbours, seed)
    graph = {node: drawn.around(node) for node in nodes}
    for node, peers in graph.items():
        assert len(set(peers)) == neighbours and node not in peers and peers == sorted(peers)
        assert all(node in graph[peer] for peer in peers)
    joined = networkx.Graph([(node, peer) for node, peers in graph.items() for peer in peers])
    # Not merely connected: it takes k removed nodes to part it.
    assert networkx.node_connectivity(joined) == neighbours


def test_every_seed_draws_another_order() -> None:
    graphs = {tuple(ring(range(40), 4, bytes([seed]) * 32).around(0)) for seed in range(30)}
    assert len(graphs) == 30


def test_no_pair_is_likelier_than_another() -> None:
    met = [0] * 20
    for seed in range(600):
        for peer in ring(range(20), 4, seed.to_bytes(32, "big")).around(0):
            met[peer] += 1
    assert met[0] == 0
    assert stats.chisquare(met[1:]).pvalue > 1e-6


@pytest.mark.parametrize(("nodes", "neighbours"), [(10, 3), (10, 10), (9, 9), (10, -2)])
def test_invalid_graph_is_an_error(nodes: int, neighbours: int) -> None:
    with pytest.raises(ValueError, match="neighbours each"):
        ring(range(nodes), neighbours, SEED)


@given(
    population=st.integers(1, 400),
    marked=st.integers(0, 400),
    drawn=st.integers(0, 400),
    least=st.integers(-3, 50),
)
@settings(max_examples=200)
def test_the_tail_is_the_hypergeometric_one(population: int, marked: int, drawn: int, least: int) -> None:
    marked, drawn = min(marked, population), min(drawn, population)
    expected = float(stats.hypergeom.sf(least - 1, population, marked, drawn))
    assert tail(population, marked, drawn, least) == pytest.approx(expected, rel=1e-6, abs=1e-300)


def test_a_likely_tail_is_not_lost_below_the_smallest_float() -> None:
    # P[X = 2] is below 1e-400 where 50 000 are expected.
    assert tail(10**6, 10**5, 10**6 // 2, 2) == pytest.approx(1, rel=1e-6)
    assert not opens_nothing(Shape(10**6, 10**6 // 2, 10**6 // 4 + 1), 0.1, 0.1, MALICIOUS)


def test_a_rate_is_rounded_up_and_not_by_its_binary_dust() -> None:
    assert [colluders(n, 0.1) for n in (1, 2, 10, 11, 300)] == [0, 1, 1, 2, 30]
    assert (colluders(100, 0.07), colluders(50, 0.0)) == (7, 0)


# (k, t) for 300, 1 000, 10 000 and 1 000 000 clients.
# The semi-honest rows are those of the design's table; the malicious ones exceed its 66, 46 ... 596, 404 because a
# server that chooses who dropped out may also cut the ring.
TABLE = [
    (0.05, 0.05, SEMI_HONEST, [(22, 13), (30, 17), (34, 20), (38, 22)]),
    (0.1, 0.2, SEMI_HONEST, [(50, 24), (66, 31), (76, 36), (90, 42)]),
    (0.2, 0.3, SEMI_HONEST, [(98, 47), (140, 67), (182, 86), (216, 101)]),
    (0.1, 0.1, MALICIOUS, [(78, 56), (102, 72), (128, 90), (162, 114)]),
    (0.1, 0.2, MALICIOUS, [(138, 91), (216, 140), (292, 188), (370, 238)]),
    (0.2, 0.2, MALICIOUS, [(188, 133), (334, 231), (514, 352), (662, 453)]),
]


@pytest.mark.parametrize(("collusion", "dropout", "profile", "row"), TABLE)
def test_parameters_of_large_cohorts(collusion, dropout, profile, row) -> None:  # type: ignore[no-untyped-def]
    sizes = (300, 1_000, 10_000, 1_000_000)
    shapes = [smallest_shape(n, dropout, collusion, profile) for n in sizes]
    assert [(shape.neighbours, shape.threshold) for shape in shapes] == row


def chance_that_two_secrets_open(n: int, k: int, t: int, bad: int) -> float:
    return n * float(stats.hypergeom.sf(2 * t - k - 1, n - 1, bad, k))


def chance_that_the_ring_parts(n: int, k: int, t: int, bad: int) -> float:
    return math.comb(n, 2) * float(stats.hypergeom.sf(t - k // 2 - 1, n, bad, k // 2)) ** 2


def test_fewer_neighbours_would_let_a_malicious_server_cut_the_ring() -> None:
    # The design's row for 1 000 clients, a tenth of them colluding: 96 neighbours, threshold 67.
    assert (
        chance_that_two_secrets_open(1000, 96, 67, 100)
        < 2**-40
        < chance_that_the_ring_parts(1000, 96, 67, 100)
    )
    assert not opens_nothing(Shape(1000, 96, 67), 0.1, 0.1, MALICIOUS)
    chances = (
        chance(1000, 102, 72, 100) for chance in (chance_that_two_secrets_open, chance_that_the_ring_parts)
    )
    assert sum(chances) < 2**-40
    assert not opens_nothing(Shape(1000, 102, 71), 0.1, 0.1, MALICIOUS)


def test_dropouts_may_part_the_ring_of_a_semi_honest_server() -> None:
    # Twenty neighbours in a row are gone with a chance of 0.3**20, for each of half a million pairs of gaps.
    assert not opens_nothing(Shape(1000, 20, 10), 0.0, 0.3, SEMI_HONEST)
    assert opens_nothing(Shape(1000, 20, 10), 0.0, 0.01, SEMI_HONEST)


@given(
    clients=st.integers(2, COMPLETE_UP_TO),
    collusion=st.floats(0, 0.3) | st.floats(0.9, 1, exclude_max=True),
    dropout=st.floats(0, 0.3) | st.floats(0.9, 1, exclude_max=True),
    profile=st.sampled_from(Profile),
)
@settings(max_examples=100)
def test_a_small_cohort_is_complete_and_exact(clients, collusion, dropout, profile) -> None:  # type: ignore[no-untyped-def]
    bad, gone = colluders(clients, collusion), colluders(clients, dropout)
    others = clients - 1
    lowest = (others + bad) // 2 + 1 if profile is MALICIOUS else bad + 1
    if lowest <= others - gone:
        assert smallest_shape(clients, dropout, collusion, profile) == Shape(clients, others, lowest)
    else:
        with pytest.raises(Refusal, match="ask more clients"):
            smallest_shape(clients, dropout, collusion, profile)


def test_a_third_each_is_too_much_for_a_malicious_server() -> None:
    with pytest.raises(Refusal, match="dropout"):
        smallest_shape(300, 1 / 3, 1 / 3, MALICIOUS)


@given(st.integers(129, 400), st.floats(0.01, 0.2), st.floats(0, 0.2), st.sampled_from(Profile))
@settings(max_examples=20)
def test_more_neighbours_than_needed_are_no_less_safe(clients, collusion, dropout, profile) -> None:  # type: ignore[no-untyped-def]
    shape = smallest_shape(clients, dropout, collusion, profile)
    assert opens_nothing(shape, collusion, dropout, profile)
    assert opens_nothing(replace(shape, threshold=shape.neighbours), collusion, dropout, profile)
    assert not opens_nothing(replace(shape, threshold=shape.threshold - 1), collusion, dropout, profile)
