"""CPU time of a simulated client's round in each mode, by whole runs from the command line."""

from __future__ import annotations

import math
import tempfile
import time
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from .engines import Options
from .stopwatch import run_fedveil
from .tables import Row, conditions, median, result_of, spread

FEW = 3  # rounds of the shorter of two runs, whose difference is rounds alone
FASTER = 10  # rounds of sums in the open for one that is encrypted
CLIENTS = 100  # all of them in each round; the model of digits has 650 parameters
FLOOR = "encrypted, primitives alone"
# What a client of an encrypted round calls, if a pair's key is computed by one of the two: with each of its peers half an
# agreement for shares and half of one for masks, a sealed share and an opened one, and a mask, with one of its own.
PEERS, SIGNATURES = CLIENTS - 1, 4
VECTOR_BYTES, SHARES_BYTES, TAG_BYTES, NONCE = 2 * 650, 64, 16, bytes(12)
CALLS = f"{PEERS} keys agreed on, {SIGNATURES} signatures, {PEERS} pairs of shares sealed and opened, {CLIENTS} masks"
JOBS = {
    "none": ("privacy=none",),
    "client_central": ("privacy=client_central",),
    "client_distributed, encrypted": ("privacy=client_distributed", "secagg=masked"),
    "record": ("privacy=record",),
    "record_and_client": ("privacy=record_and_client",),
    "record_distributed": ("privacy=record_distributed",),
    "record_distributed, encrypted": ("privacy=record_distributed", "secagg=masked"),
}


def run_modes(options: Options) -> Row:
    """Measure the modes in turns, each repeat with two processes of its own."""
    before, taken = conditions(), {name: list[float]() for name in (*JOBS, FLOOR)}
    for _ in range(options.repeats):
        for name, job in JOBS.items():
            more = options.size.rounds
            if "secagg=masked" in job:
                more = math.ceil(more / FASTER)
            few, many = (_cpu_seconds(job, rounds) for rounds in (FEW, FEW + more))
            taken[name].append(1000 * (many - few) / more / CLIENTS)
        taken[FLOOR].append(1000 * _primitives())
    rows = [
        {"mode": name, "cpu ms": median(values), "spread %": spread(values)} for name, values in taken.items()
    ]
    rounds = f"{FEW} and {FEW + options.size.rounds} rounds, of encrypted sums a {FASTER}th as many more"
    notes = [
        f"task=digits, {CLIENTS} clients of 14 or 15 examples, all in each round; one worker",
        f"differences of runs of {rounds}; medians of {options.repeats}",
        f"{FLOOR}: {CALLS}",
    ]
    return result_of("modes", before, {"Milliseconds of CPU: a client's round": rows}, notes)


def _primitives() -> float:
    """Return the CPU seconds that the cryptography of a client's encrypted round takes without a protocol."""
    key, peer = X25519PrivateKey.generate(), X25519PrivateKey.generate().public_key()
    own, room = Ed25519PrivateKey.generate(), bytearray(VECTOR_BYTES + TAG_BYTES)
    began = time.process_time()
    for _ in range(CLIENTS):  # each a client
        keys = [HKDF(SHA256(), 32, None, NONCE).derive(key.exchange(peer)) for _ in range(PEERS)]
        for _ in range(SIGNATURES):
            own.sign(NONCE)
        for each in keys:
            AESGCM(each).decrypt(NONCE, AESGCM(each).encrypt(NONCE, bytes(SHARES_BYTES), NONCE), NONCE)
        for each in (*keys, keys[0]):
            AESGCM(each).encrypt_into(NONCE, bytes(VECTOR_BYTES), None, room)
    return (time.process_time() - began) / CLIENTS


def _cpu_seconds(job: tuple[str, ...], rounds: int) -> float:
    said = ["task=digits", f"task.num_clients={CLIENTS}", "cohort=all", "engine.workers=1", "seed=1"]
    with tempfile.TemporaryDirectory() as folder:
        run = f"hydra.run.dir={Path(folder) / 'run'}"
        return run_fedveil("simulate", *said, *job, f"num_rounds={rounds}", run).cpu
