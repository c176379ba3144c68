"""Flower's own SecAgg+ on the vectors that ours gets: its client's functions, and its server's steps, in one process.

`secaggplus_mod` and `SecAggPlusWorkflow` of flwr 1.42 call these functions between messages; the messages are left out,
which favours Flower. The server's steps are those of its `collect_masked_vectors_stage` and `unmask_stage`.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import logging
from typing import Any, cast

import numpy as np
from flwr.app import ConfigRecord
from flwr.client.mod.secure_aggregation.secaggplus_mod import (
    SecAggPlusState,
    _collect_masked_vectors,
    _setup,
    _share_keys,
    _unmask,
)
from flwr.common import bytes_to_ndarray, ndarrays_to_parameters
from flwr.common.secure_aggregation.crypto.shamir import combine_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    factor_extract,
    get_parameters_shape,
    parameters_addition,
    parameters_mod,
    parameters_subtraction,
)
from flwr.common.secure_aggregation.quantization import dequantize
from flwr.common.secure_aggregation.secaggplus_constants import Key
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from flwr.supercore.primitives.asymmetric import bytes_to_private_key, bytes_to_public_key

from .secagg_case import Case, Clock, Costs

_CLIP, _TARGET, _MODULUS, _WEIGHT = 8.0, 1 << 22, 1 << 32, 1000.0  # the workflow's defaults
_EXAMPLES = 10


def run_flower(case: Case, update: np.ndarray) -> Costs:
    """Return what one round takes of each client, and of the server.

    Args:
      case: the clients, and who vanishes.
      update: one client's vector, float.
    """
    logging.getLogger("flwr").setLevel(logging.WARNING)  # a line for each client and stage otherwise
    cohort = _Cohort(case)
    public = _keys(cohort)
    shares = _shares(cohort, public)
    total, upload = _masked_sum(cohort, shares, update)
    collected = _collected(cohort)
    with cohort.server:
        _unmasked(total, collected, cohort, public)
    times = [cohort.clients[node].milliseconds for node in sorted(cohort.alive)]
    return Costs(times, cohort.server.milliseconds, upload, len(cohort.alive))


class _Cohort:
    """Nodes, their neighbours and themselves on a ring, what each remembers, and the clocks."""

    def __init__(self, case: Case) -> None:
        self.ring = {node: case.ring(node) | {node} for node in range(case.clients)}
        self.states = {node: SecAggPlusState(nid=node) for node in self.ring}
        self.alive = set(case.survivors())
        self.clients, self.server = [Clock() for _ in self.ring], Clock()
        self.settings = ConfigRecord(
            {
                Key.SAMPLE_NUMBER: case.clients,
                Key.SHARE_NUMBER: case.neighbours + 1,
                Key.THRESHOLD: case.threshold,
                Key.CLIPPING_RANGE: _CLIP,
                Key.TARGET_RANGE: _TARGET,
                Key.MOD_RANGE: _MODULUS,
                Key.MAX_WEIGHT: _WEIGHT,
            }
        )


def _keys(cohort: _Cohort) -> dict[int, Any]:
    public: dict[int, Any] = {}
    for node, state in cohort.states.items():
        with cohort.clients[node]:
            keys = _setup(state, cohort.settings)
        public[node] = (keys[Key.PUBLIC_KEY_1], keys[Key.PUBLIC_KEY_2])
    return public


def _shares(cohort: _Cohort, public: dict[int, Any]) -> dict[int, dict[int, bytes]]:
    shares: dict[int, dict[int, bytes]] = {node: {} for node in cohort.ring}
    for node, state in cohort.states.items():
        asked = cast(ConfigRecord, {str(peer): public[peer] for peer in sorted(cohort.ring[node])})
        with cohort.clients[node]:
            said = cast(dict[str, Any], _share_keys(state, asked))
        for to, sealed in zip(said[Key.DESTINATION_LIST], said[Key.CIPHERTEXT_LIST], strict=True):
            shares[to][node] = sealed
    return shares


def _masked_sum(
    cohort: _Cohort, shares: dict[int, dict[int, bytes]], update: np.ndarray
) -> tuple[list[np.ndarray], int]:
    """Return the sum of the masked vectors, and the bytes of one."""
    total, upload = list[np.ndarray](), 0
    for node in sorted(cohort.alive):
        record = cast(
            ConfigRecord,
            {Key.SOURCE_LIST: list(shares[node]), Key.CIPHERTEXT_LIST: list(shares[node].values())},
        )
        parameters = ndarrays_to_parameters([update])
        with cohort.clients[node]:
            said = _collect_masked_vectors(cohort.states[node], record, _EXAMPLES, parameters)
        sent = cast(list[bytes], said[Key.MASKED_PARAMETERS])
        upload = sum(map(len, sent))
        with cohort.server:
            words = [bytes_to_ndarray(each) for each in sent]
            total = parameters_addition(total, words) if total else words
    with cohort.server:
        return parameters_mod(total, _MODULUS), upload


def _collected(cohort: _Cohort) -> dict[int, list[bytes]]:
    """Return by owner the shares that the living hand over."""
    collected: dict[int, list[bytes]] = {node: [] for node in cohort.ring}
    for node in sorted(cohort.alive):
        living, dead = cohort.ring[node] & cohort.alive, cohort.ring[node] - cohort.alive
        record = cast(
            ConfigRecord, {Key.ACTIVE_NODE_ID_LIST: sorted(living), Key.DEAD_NODE_ID_LIST: sorted(dead)}
        )
        with cohort.clients[node]:
            said = cast(dict[str, Any], _unmask(cohort.states[node], record))
        for owner, share in zip(said[Key.NODE_ID_LIST], said[Key.SHARE_LIST], strict=True):
            collected[owner].append(share)
    return collected


def _unmasked(
    total: list[np.ndarray], collected: dict[int, list[bytes]], cohort: _Cohort, public: dict[int, Any]
) -> None:
    for node, found in collected.items():
        secret = combine_shares(found)
        if node in cohort.alive:
            mask = pseudo_rand_gen(secret, _MODULUS, get_parameters_shape(total))
            total = parameters_subtraction(total, mask)
            continue
        for peer in cohort.ring[node] - {node}:
            key = generate_shared_key(bytes_to_private_key(secret), bytes_to_public_key(public[peer][0]))
            mask = pseudo_rand_gen(key, _MODULUS, get_parameters_shape(total))
            total = (parameters_addition if node > peer else parameters_subtraction)(total, mask)
    _, found_total = factor_extract(parameters_mod(total, _MODULUS))
    dequantize(found_total, _CLIP, _TARGET)
