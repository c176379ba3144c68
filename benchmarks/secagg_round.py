"""Round of secure aggregation by whichever fedveil is on the path: ``python secagg_round.py real|made CLIENTS NEIGHBOURS THRESHOLD COORDINATES DROPOUT``.

It stands outside the package, as `secagg_checks` starts it for an earlier fedveil too. It prints, as one line of JSON, the
least CPU milliseconds of a client and of the server in a few rounds, and a client's bytes beside its vector.
"""
# pyright: reportPrivateUsage=false

from __future__ import annotations

import json
import statistics
import sys

from fedveil.benchmarks.secagg import _cohort, run_ours
from fedveil.benchmarks.secagg_case import Case
from fedveil.benchmarks.secagg_made import server_times
from fedveil.privacy.secagg.server import ServerAttempt

ROUNDS = 4


def real(case: Case) -> dict[str, float]:
    """Return what a round takes of real clients and of the server."""
    update = case.update()
    done = [run_ours(case, update) for _ in range(ROUNDS)]
    return {
        "client": min(statistics.median(each.clients) for each in done),
        "server": min(each.server for each in done),
        "upload": done[0].upload - case.bits // 8 * case.coordinates,
    }


def made(case: Case) -> dict[str, float]:
    """Return what a round takes of the server, whose clients are made."""
    taken: list[float] = []
    for _ in range(ROUNDS):
        terms, roster, nodes = _cohort(case)
        attempt = ServerAttempt(terms, roster, range(case.clients), case.coordinates, 0)
        taken.append(float(server_times(case, attempt, nodes)["all"]))
    return {"server": min(taken)}


def main(arguments: list[str]) -> None:
    """Print what the round takes that the arguments name."""
    kind, *sizes, dropout = arguments
    clients, neighbours, threshold, coordinates = map(int, sizes)
    case = Case(clients, neighbours, threshold, coordinates, float(dropout))
    print("\n" + json.dumps((real if kind == "real" else made)(case)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
