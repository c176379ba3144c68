"""Partitions: every example dealt once, by the seed alone, and shaped as their names say."""

import numpy as np
import pytest

from fedveil.base.refusal import Refusal
from fedveil.tasks.partition import PARTITIONS, Partition

LABELS = np.random.default_rng(3).integers(0, 10, 600)
GROUPS = np.arange(600) % 30


@pytest.mark.parametrize("name", PARTITIONS)
def test_every_example_goes_to_exactly_one_client(name: str) -> None:
    shares = Partition(name, 30, 0.3, 5).shares(LABELS, GROUPS)
    assert len(shares) == 30
    assert np.array_equal(np.sort(np.concatenate(shares)), np.arange(600))


@pytest.mark.parametrize("name", ["iid", "dirichlet", "shards"])
def test_the_seed_decides_and_nothing_else(name: str) -> None:
    first = Partition(name, 30, 0.3, 5).shares(LABELS)
    np.random.default_rng().random(10)
    again = Partition(name, 30, 0.3, 5).shares(LABELS)
    other = Partition(name, 30, 0.3, 6).shares(LABELS)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_natural_keeps_owners_together() -> None:
    shares = Partition("natural", 30).shares(LABELS, GROUPS)
    assert all(np.all(GROUPS[share] == owner) for owner, share in enumerate(shares))


@pytest.mark.parametrize("name", ["iid", "dirichlet"])
def test_sizes_differ_by_at_most_one(name: str) -> None:
    sizes = [len(share) for share in Partition(name, 37, 0.1).shares(LABELS)]
    assert max(sizes) - min(sizes) <= 1


def _classes(share: np.ndarray) -> int:
    return len(np.unique(LABELS[share]))


def test_alpha_runs_from_single_classes_to_iid() -> None:
    def mean_classes(alpha: float) -> float:
        shares = Partition("dirichlet", 30, alpha).shares(LABELS)
        return float(np.mean([_classes(share) for share in shares]))

    iid = float(np.mean([_classes(share) for share in Partition("iid", 30).shares(LABELS)]))
    # Clients dealt last take what the others have left, so the mean stays a little above one.
    assert mean_classes(1e-3) < 2 < mean_classes(1.0) < mean_classes(10.0) < mean_classes(1e4)
    assert abs(mean_classes(1e4) - iid) < 0.5


@pytest.mark.parametrize("alpha", [1e-300, 1e-9, 1e9, 1e300])
def test_extreme_alphas_still_deal_everything(alpha: float) -> None:
    shares = Partition("dirichlet", 30, alpha).shares(LABELS)
    assert np.array_equal(np.sort(np.concatenate(shares)), np.arange(600))


def test_a_shard_client_sees_few_classes() -> None:
    # Ten classes make at most nine of the sixty shards straddle two classes.
    classes = [_classes(share) for share in Partition("shards", 30).shares(LABELS)]
    assert sum(count > 2 for count in classes) <= 9
    assert max(classes) <= 4


def test_clients_of_one_example_and_data_of_one_class_are_allowed() -> None:
    assert [len(share) for share in Partition("iid", 600).shares(LABELS)] == [1] * 600
    for name in ("iid", "dirichlet", "shards"):
        assert len(Partition(name, 5).shares(np.zeros(10, np.int64))) == 5


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("partition", {"name": "idd"}),
        ("num_clients", {"num_clients": 0}),
        ("num_clients", {"num_clients": True}),
        ("num_clients", {"num_clients": 2.5}),
        ("alpha", {"alpha": 0.0}),
        ("alpha", {"alpha": float("nan")}),
        ("alpha", {"alpha": float("inf")}),
        ("seed", {"seed": -1}),
        ("seed", {"seed": 2**63}),
    ],
)
def test_values_out_of_range_are_refused(field: str, arguments: dict[str, object]) -> None:
    with pytest.raises(Refusal) as refusal:
        Partition(**{"name": "iid", "num_clients": 4, **arguments})  # type: ignore[arg-type]
    assert refusal.value.field == field


def test_unknown_partition_is_refused_with_the_names() -> None:
    with pytest.raises(Refusal, match="natural, iid, dirichlet, shards"):
        Partition("random", 4)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (Partition("iid", 601), "only 600 examples"),
        (Partition("shards", 301), "2 examples per client"),
        (Partition("natural", 30), "do not name owners"),
    ],
)
def test_data_that_do_not_suffice_are_refused(how: Partition, reason: str) -> None:
    with pytest.raises(Refusal, match=reason):
        how.shares(LABELS)


def test_natural_refuses_another_number_of_clients() -> None:
    with pytest.raises(Refusal, match="has 30 clients"):
        Partition("natural", 4).shares(LABELS, GROUPS)
