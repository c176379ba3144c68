"""Benchmarks of compression: bounds on what it costs, the peers' quantisers, and what was tried and not built."""

from typing import Any

import numpy as np
import torch

from fedveil.benchmarks import compressed, low_rank, peer_quantisers, quantisers


def test_losses_of_compression_stay_within_their_bounds() -> None:
    case = compressed.Case("mnist5k", (3.0,), 0.25, 0.3)

    def run(kind: str, ratio: float, seed: int, accuracy: float) -> dict[str, Any]:
        return {
            "kind": kind,
            "ratio": ratio,
            "cells": None,
            "epsilon": 3.0,
            "seed": seed,
            "accuracy": accuracy,
        }

    runs = [run("none", 1.0, seed, 0.97) for seed in range(5)]
    runs += [run("mask", 0.25, seed, 0.968) for seed in range(4)]
    runs += [run("project", 0.25, seed, 0.966) for seed in range(5)]
    runs.append({**run("project", 0.25, 0, 0.5), "cells": 256})
    rows = list(compressed.rows_of("mnist5k", case, runs))
    assert [(row["lost"], row["within"], row["seeds"]) for row in rows] == [(0.2, True, 4), (0.4, False, 5)]


def test_an_update_goes_through_a_peers_quantiser_in_its_layers() -> None:
    update = np.arange(30, dtype=np.float32)
    seen: list[dict[str, tuple[int, ...]]] = []

    def coder(arrays: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], int]:
        seen.append({name: each.shape for name, each in arrays.items()})
        return {name: -each for name, each in arrays.items()}, 7

    back, size = peer_quantisers.coded(coder, update)
    assert np.array_equal(back, -update) and size == 7 and seen == [{"weight": (10, 2), "bias": (10,)}]
    rows = quantisers.rows_of([
        {"way": "NVFLARE:float16", "seed": seed, "bytes": 5140.0, "error": 0.5, "accuracy": 97.0 + seed}
        for seed in (0, 1)
    ])  # fmt: skip
    assert rows[0]["accuracy"] == "97.5" and rows[0]["bytes up"] == 5140


def test_two_sums_of_low_rank_give_back_a_matrix_of_that_rank() -> None:
    drawn = torch.Generator().manual_seed(0)
    matrix = torch.cat([torch.outer(torch.rand(10), torch.rand(256)), torch.rand(10, 1)], 1) / 100
    updates = matrix.flatten().expand(100, -1)
    found = low_rank.low_rank(1, updates, 0.0, drawn)
    torch.testing.assert_close(found, matrix.flatten(), atol=1e-5, rtol=1e-3)
