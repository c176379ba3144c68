"""Rounds of secure aggregation by the fedveil that is on the path.

usage: python secagg_round.py real|made CLIENTS NEIGHBOURS THRESHOLD COORDINATES DROPOUT

It stands outside the package, as `secagg_checks` starts it for an earlier fedveil too. It prints, as one line of JSON, the
least CPU milliseconds of a client and of the server in a few rounds, and a client's bytes beside its vector. The least is
that of each exchange, and these are added: on a machine under load no round is undisturbed from end to end.
"""
# pyright: reportPrivateUsage=false

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict

import numpy as np

from fedveil.benchmarks.secagg import MEASURED, _cohort
from fedveil.benchmarks.secagg_case import Case, Clock
from fedveil.benchmarks.secagg_made import server_times
from fedveil.privacy.secagg.attempt import Work
from fedveil.privacy.secagg.server import OpenedSum, ServerAttempt
from fedveil.privacy.secagg.suite import verify

ROUNDS, MANY_ROUNDS, FEW_CLIENTS = 4, 16, 20
_MODEL = bytes(32)

Times = dict[int, list[float]]  # by exchange


def real(case: Case) -> dict[str, float]:
    """Return what a round takes of real clients, but for clipping and rounding, and of the server."""
    clients: Times = defaultdict(list)
    server: Times = defaultdict(list)
    upload = 0
    for _ in range(MANY_ROUNDS if case.clients <= FEW_CLIENTS else ROUNDS):
        upload = _play(case, clients, server)
    vector = case.bits // 8 * case.coordinates
    return {"client": _least(clients), "server": _least(server), "upload": upload - vector}


def made(case: Case) -> dict[str, float]:
    """Return what a round takes of the server, whose clients are made."""
    taken: list[float] = []
    for _ in range(ROUNDS):
        terms, roster, nodes = _cohort(case)
        attempt = ServerAttempt(terms, roster, range(case.clients), case.coordinates, 0)
        taken.append(float(server_times(case, attempt, nodes)["all"]))
    return {"server": min(taken)}


def _play(case: Case, clients: Times, server: Times) -> int:
    """Note the times of one round, and return the most that one client sends."""
    terms, roster, nodes = _cohort(case)
    alive = set(case.survivors())
    measured, uploads = case.survivors()[:MEASURED], defaultdict[int, int](int)
    vector = np.arange(case.coordinates, dtype=np.uint32)
    work = Work(_MODEL, lambda _: (vector.copy(), ()))
    attempt = ServerAttempt(terms, roster, list(range(case.clients)), case.coordinates, 0)
    result: object = attempt.proposal()
    exchange, vectors_came = 0, False
    while isinstance(result, dict):
        replies: dict[int, bytes] = {}
        took: list[float] = []
        for place, message in result.items():
            clock = Clock()
            if place in measured:
                verify.cache_clear()
            with clock:
                replies[place] = nodes[place].handle(message, 0, work)
            if place in measured:
                uploads[place] += len(replies[place])
                took.append(clock.milliseconds)
        masked = max(map(len, replies.values())) > vector.nbytes
        vectors_came |= masked
        verify.cache_clear()
        clock = Clock()
        with clock:
            for place, reply in replies.items():
                if place in alive or not vectors_came:
                    attempt.take(place, reply)
            result = attempt.advance(_MODEL)
        clients[exchange].append(statistics.median(took))
        server[exchange].append(clock.milliseconds)
        exchange += 1
    assert isinstance(result, OpenedSum) and len(result.survivors) == len(alive), result
    assert (result.total == vector * np.uint32(len(alive))).all(), "the sum is not the survivors'"
    return max(uploads.values())


def _least(times: Times) -> float:
    return sum(map(min, times.values()))


def main(arguments: list[str]) -> None:
    """Print what the rounds take that the arguments name."""
    kind, *sizes, dropout = arguments
    clients, neighbours, threshold, coordinates = map(int, sizes)
    case = Case(clients, neighbours, threshold, coordinates, float(dropout))
    print("\n" + json.dumps((real if kind == "real" else made)(case)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
