"""Shares of a partitioner of flwr-datasets; runs with them are in test_arguments.py."""

import numpy as np
import pytest

from fedveil.tasks.flwr_partition import flwr_shares


@pytest.mark.filterwarnings("ignore")
def test_partitioner_sees_labels_and_seed_and_deals_each_example_once() -> None:
    pytest.importorskip("flwr_datasets")
    target = "flwr_datasets.partitioner.DirichletPartitioner"
    keys = {"target": target, "args": {"alpha": 0.1}, "num_clients": 4}
    labels = np.arange(400) % 4
    shares, same_seed = (flwr_shares({**keys, "seed": 3}, labels) for _ in range(2))
    other_seed = flwr_shares({**keys, "seed": 4}, labels)
    assert np.array_equal(np.sort(np.concatenate(shares)), np.arange(400))
    assert all(np.array_equal(*pair) for pair in zip(shares, same_seed, strict=True))
    assert [len(each) for each in shares] != [len(each) for each in other_seed]
    assert max(np.bincount(labels[shares[0]], minlength=4)) > len(shares[0]) / 2  # alpha 0.1 is skewed
