"""Secure aggregation beside Flower's SecAgg+ and beside a sum in the clear, on the same vectors, in CPU time."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cache
from typing import cast
from unittest.mock import patch

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ..privacy.mechanisms.distributed import decode_sum, encode_share, openings, take_back
from ..privacy.mechanisms.randomness import Randomness
from ..privacy.mechanisms.sizing import Attendance, ShareSpec, size_shares
from ..privacy.mechanisms.sum_spec import SumSpec
from ..privacy.secagg import masks
from ..privacy.secagg.attempt import Openings, Work
from ..privacy.secagg.client import Participant
from ..privacy.secagg.encrypted_shares import cut
from ..privacy.secagg.masks import Vector, add_masks, compiled
from ..privacy.secagg.policy import Policy
from ..privacy.secagg.roster import Member, Roster
from ..privacy.secagg.server import OpenedSum, Outgoing, ServerAttempt
from ..privacy.secagg.suite import KEY_BYTES, SUITES, public_of, verify
from ..privacy.secagg.transcript import PROTOCOL_VERSION, AttemptTerms, Profile
from ..server.masking import Masking
from ..tasks.memory import keep_memory
from .engines import Options
from .secagg_case import Case, Clock, Costs
from .secagg_made import STAGES, server_memory, server_times
from .stopwatch import cpu_milliseconds
from .tables import Row, conditions, median, ratio, result_of

CASES = (
    Case(10, 9, 6, 10**6, 0.1),
    Case(20, 19, 12, 10**6, 0.1),
    Case(50, 49, 28, 10**6, 0.1),
    Case(100, 20, 12, 10**6, 0.05),
    Case(100, 20, 12, 10**6, 0.05, bits=16),
    Case(100, 48, 26, 10**6, 0.3, flower=False),
    Case(100, 99, 56, 10**6, 0.05),
    Case(100, 99, 56, 10**6, 0.3),
    Case(20, 19, 12, 10**7, 0.1),
    Case(1000, 96, 67, 10**5, 0.05, flower=False),
)
MADE = (Case(1000, 102, 72, 10**4, 0.05), Case(10_000, 128, 90, 10**4, 0.05))
HELD = (Case(20, 19, 12, 10**6, 0.1), Case(100, 99, 56, 10**6, 0.0))
MASKS = (10**6, 10**7)  # coordinates
MEASURED = 8  # clients whose time is taken; a signature that others checked before is then checked again
_MODEL, _ROTATION, _LATER = bytes(32), bytes(32), 1 << 40
_REPEATS = 7
_COLD = 1 << 24  # coordinates that no processor's cache holds
_MASKS = 20
_WIDEST = 10  # noise multipliers that no coordinate's noise reaches


def run_secagg(options: Options) -> Row:
    """Measure whole rounds, a mask alone, and the server's memory."""
    del options
    before = conditions()
    keep_memory()
    rounds, compiled_rounds = list[Row](), list[Row]()
    for case in CASES:
        with _by_cryptography():
            rounds.append(_compared(case))
        if compiled():
            compiled_rounds.append(_compared(case))
    masks_alone = [_mask_and_add(size) for size in MASKS]
    made = [_made(case) for case in MADE]
    notes = [
        "CPU ms: of a client, the median of those measured, all stages with clipping and rounding; of the server, a round",
        "ours: malicious profile, no noise; Flower's: no signatures, weights in clear, 8 bytes a coordinate",
        "upload: bytes beside the vector, for each neighbour",
    ]
    tables = {
        "Rounds, milliseconds of CPU": rounds,
        **({"Rounds with compiled masks, milliseconds of CPU": compiled_rounds} if compiled_rounds else {}),
        "The server alone, its clients made, milliseconds of CPU": made,
        "One mask and its addition, milliseconds": masks_alone,
        "The most that the server holds at once": [_memory(case) for case in HELD],
    }
    return result_of("secagg", before, tables, notes)


def _compared(case: Case) -> Row:
    update = case.update()
    ours, plain = run_ours(case, update), _plain(case, update)
    row: Row = {
        "n": case.clients,
        "k": case.neighbours,
        "t": case.threshold,
        "d": case.coordinates,
        "bits": case.bits,
        "drop": case.dropout,
        "client": median(ours.clients),
        "server": round(ours.server, 1),
        "/ plain sum": ratio(ours.server, plain),
        "upload": round((ours.upload - case.bits // 8 * case.coordinates) / case.neighbours),
    }
    flower = _flower(replace(case, bits=32)) if case.flower else None
    client = median(flower.clients) if flower else None
    return row | {
        "Flower client": client,
        "Flower server": round(flower.server, 1) if flower else None,
        "client x": ratio(client, row["client"]),
        "server x": ratio(flower.server, ours.server) if flower else None,
        "upload x": ratio(flower.upload, ours.upload) if flower else None,
    }


@cache
def _flower(case: Case) -> Costs:
    from .flower_secagg import run_flower

    return run_flower(case, case.update())


def _made(case: Case) -> Row:
    """Return the server's times, and then its memory: to trace that takes time."""
    row: Row = {"n": case.clients, "k": case.neighbours, "t": case.threshold, "d": case.coordinates}
    terms, roster, nodes = _cohort(case)
    candidates = range(case.clients)
    row |= server_times(case, ServerAttempt(terms, roster, candidates, case.coordinates, 0), nodes)
    terms, roster, nodes = _cohort(case)
    attempt = ServerAttempt(terms, roster, candidates, case.coordinates, 0)
    return row | {"MiB": server_memory(case, attempt, nodes)}


def run_ours(case: Case, update: np.ndarray) -> Costs:
    """Return what one round takes of a client and of the server; the sum is compared with the plain one.

    Args:
      case: the clients, and who vanishes.
      update: one client's vector, float.
    """
    terms, roster, nodes = _cohort(case)
    # With noise as `privacy=client_distributed` has it, for 0.4 of the cohort to drop out and 0.1 of it to collude.
    n = case.clients
    attendance = Masking(roster, 0.4, 0.1).attendance(n) if case.noise else Attendance(n, 2)
    spec = size_shares(SumSpec(1.0), case.coordinates, attendance, case.noise, case.bits, layered=True)

    def vector(agreed: AttemptTerms) -> tuple[Vector, Openings]:
        assert agreed.bits == spec.bits
        stream = Randomness().stream("share")
        layers = [stream.bytes(KEY_BYTES) for _ in spec.layers]
        words, _ = encode_share({"w": update}, {}, spec, stream, _ROTATION, layers)
        return cast(Vector, words), openings(spec, layers)

    measured = dict.fromkeys(case.survivors()[:MEASURED])
    clocks = {place: Clock() for place in measured}
    server, uploads = Clock(), dict.fromkeys(measured, 0)
    with server:
        attempt = ServerAttempt(terms, roster, list(range(case.clients)), case.coordinates, 0)
    result: Outgoing | OpenedSum | object = attempt.proposal()
    alive, exchange = set(case.survivors()), 0
    while isinstance(result, dict):
        for place, message in result.items():
            if exchange >= STAGES.index("vectors") and place not in alive:
                continue
            if place in measured:
                verify.cache_clear()
            with clocks.get(place, Clock()):
                reply = nodes[place].handle(message, 0, Work(_MODEL, vector))
            if place in measured:
                uploads[place] += len(reply)
            with server:
                attempt.take(place, reply)
        with server:
            result = attempt.advance(_MODEL)
        exchange += 1
    assert isinstance(result, OpenedSum), result
    with server:
        take_back(
            result.total, len(result.survivors), spec, [cut(s, KEY_BYTES) for s in result.seeds.values()]
        )
    _check(result, update, spec, case.noise)
    upload = max(uploads.values())
    times = [clock.milliseconds for clock in clocks.values()]
    return Costs(times, server.milliseconds, upload, len(result.survivors))


def _check(outcome: OpenedSum, update: np.ndarray, spec: ShareSpec, noise: float) -> None:
    survivors = len(outcome.survivors)
    mean, _ = decode_sum(outcome.total, {"w": update.shape}, spec, survivors, survivors, _ROTATION)
    if np.abs(mean["w"] - update).max() > 2 * spec.sum.step + _WIDEST * noise / survivors:
        raise AssertionError("the sum is not the survivors'")


def _cohort(case: Case) -> tuple[AttemptTerms, Roster, list[Participant]]:
    keys = [Ed25519PrivateKey.generate() for _ in range(case.clients)]
    members = [Member(place, f"client {place}", public_of(key), _LATER) for place, key in enumerate(keys)]
    roster = Roster(1, tuple(members))
    policy = Policy(public_of(Ed25519PrivateKey.generate()), 1, 2, 0.0, 0.0, 1.0, 0.0)
    terms = AttemptTerms(
        PROTOCOL_VERSION,
        1,
        run=1,
        round=1,
        attempt=0,
        roster_version=1,
        roster_hash=roster.hash,
        cohort_size=case.clients,
        threshold=case.threshold,
        neighbours=case.neighbours,
        bits=case.bits,
        step=1.0,
        clipping_norm=1.0,
        noise_multiplier=0.0,
        minimum_survivors=2,
        profile=Profile.MALICIOUS,
        task_hash=bytes(32),
    )
    return terms, roster, [Participant(place, key, policy, roster) for place, key in enumerate(keys)]


def _plain(case: Case, update: np.ndarray) -> float:
    """Return the CPU milliseconds of adding the survivors' vectors in the clear."""
    sources = [update.copy() for _ in range(max(2, _COLD // update.size))]  # as they come: in nobody's cache
    total, clock = np.zeros_like(update), Clock()
    for place in range(len(case.survivors())):
        with clock:
            np.add(total, sources[place % len(sources)], out=total)
    return clock.milliseconds


def _mask_and_add(size: int) -> Row:
    vector, other = np.zeros(size, np.uint32), np.ones(size, np.uint32)
    row: Row = {"d": size, "np.add": _best(lambda: np.add(vector, other, out=vector))}
    pairs = [(bytes([place]) * 32, 1) for place in range(_MASKS)]
    for number, suite in SUITES.items():
        with _by_cryptography():
            taken = _best(lambda s=suite: add_masks(vector, pairs, s)) / _MASKS
        row |= {f"suite {number}": taken, f"suite {number} / np.add": ratio(taken, row["np.add"])}
    if compiled():
        taken = _best(lambda: add_masks(vector, pairs, SUITES[1])) / _MASKS
        row |= {"compiled": taken, "compiled / np.add": ratio(taken, row["np.add"])}
    return row


def _by_cryptography() -> AbstractContextManager[object]:
    """Return what keeps masks from the compiled addition."""
    return patch.object(masks, "compiled", lambda: None)


def _best(work: Callable[[], object]) -> float:
    return float(f"{min(cpu_milliseconds({'': work}, _REPEATS)['']):.3g}")


def _memory(case: Case) -> Row:
    """Return the most that the server holds at once, a reply that has come included, in vectors."""
    terms, roster, nodes = _cohort(case)
    gc.collect()
    tracemalloc.start()
    empty = tracemalloc.get_traced_memory()[0]
    attempt = ServerAttempt(terms, roster, list(range(case.clients)), case.coordinates, 0)
    clients, peak, result = 0, 0, attempt.proposal()
    work = Work(_MODEL, lambda _: (np.zeros(case.coordinates, np.uint32), ()))
    while isinstance(result, dict):
        for place, message in result.items():
            before = tracemalloc.get_traced_memory()[0]
            reply = nodes[place].handle(message, 0, work)
            clients += tracemalloc.get_traced_memory()[0] - before - len(reply)
            tracemalloc.reset_peak()
            attempt.take(place, reply)
            peak = max(peak, tracemalloc.get_traced_memory()[1] - empty - clients)
            del reply
        tracemalloc.reset_peak()
        result = attempt.advance(_MODEL)
        peak = max(peak, tracemalloc.get_traced_memory()[1] - empty - clients)
    tracemalloc.stop()
    return {"n": case.clients, "d": case.coordinates, "vectors": round(peak / (4 * case.coordinates), 2)}
