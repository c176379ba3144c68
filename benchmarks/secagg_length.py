"""Share of an encrypted sum's time that its length does not change: the same sum over all coordinates, a quarter, and few."""

from __future__ import annotations

from dataclasses import replace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ..privacy.mechanisms.compression import Compression, sketch_of
from ..privacy.secagg.suite import agree, new_key, public_of, sign, verify
from ..tasks.memory import keep_memory
from .engines import Options
from .secagg import run_ours
from .secagg_case import Case
from .stopwatch import cpu_milliseconds
from .tables import Row, conditions, median, ratio, result_of

CASES = (
    Case(20, 19, 12, 10**6, 0.1),
    Case(20, 19, 12, 10**6, 0.1, noise=1.0),
    Case(100, 99, 56, 10**6, 0.05),
)
QUARTER, FEW = 4, 1000  # a part of the coordinates that is sent; coordinates that take no time
_REPEATS, _TIMES = 7, 20


def run_length(options: Options) -> Row:
    """Measure sums of three lengths, and the steps that are the same for all of them."""
    before = conditions()
    keep_memory()
    tables = {
        "A quarter of the coordinates": [_row(case, options.repeats) for case in CASES],
        "What does not depend on the length, microseconds": [_steps()],
        "Coordinates of a round, drawn by each client": [_drawn(CASES[0].coordinates)],
    }
    notes = [
        f"CPU ms, the median of {options.repeats} sums; of the server with the layers of noise that it removes",
        "fixed: of 1000 coordinates; x: a quarter over all of them",
    ]
    return result_of("secagg_length", before, tables, notes)


def _row(case: Case, repeats: int) -> Row:
    lengths = {"": case.coordinates, " quarter": case.coordinates // QUARTER, " fixed": FEW}
    row: Row = {"n": case.clients, "k": case.neighbours, "noise": case.noise}
    taken: dict[str, list[float]] = {}
    for _ in range(repeats):
        for name, length in lengths.items():
            sized = replace(case, coordinates=length)
            found = run_ours(sized, sized.update())
            taken.setdefault(f"client{name}", []).append(median(found.clients))
            taken.setdefault(f"server{name}", []).append(found.server)
    least = {name: median(each) for name, each in taken.items()}
    return (
        row | least | {f"{end} x": ratio(least[f"{end} quarter"], least[end]) for end in ("client", "server")}
    )


def _steps() -> Row:
    """Return the microseconds of one of each."""
    identity, key, body = Ed25519PrivateKey.generate(), new_key(), bytes(100)
    signature, peer = sign(identity, bytes(32), body), public_of(new_key())
    public, check = public_of(identity), verify.__wrapped__
    steps = {
        "verify": lambda: check(public, bytes(32), body, signature),
        "agree": lambda: agree(key, peer, b""),
        "sign": lambda: sign(identity, bytes(32), body),
    }
    many = {name: lambda one=one: [one() for _ in range(_TIMES)] for name, one in steps.items()}
    return {
        name: round(1000 * min(each) / _TIMES, 1) for name, each in cpu_milliseconds(many, _REPEATS).items()
    }


def _drawn(coordinates: int) -> Row:
    row: Row = {"d": coordinates}
    vector = CASES[0].update()
    for kind in ("mask", "project"):
        rounds = iter(range(1, 2 * _REPEATS))
        compression = Compression(kind, coordinates, coordinates // QUARTER)
        work = {kind: lambda c=compression, r=rounds: sketch_of(c, next(r)).of(vector)}
        row[f"{kind} ms"] = round(min(cpu_milliseconds(work, _REPEATS)[kind]), 2)
    return row
