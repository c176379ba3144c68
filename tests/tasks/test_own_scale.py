"""Columns that were scaled by their own mean, deviation or bounds are warned of, and others are not."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from shared.tasks import Classes
from torch import nn

import fedveil as fv
from fedveil.deployment.device.torch_task import check_owners_data
from fedveil.tasks import TASKS, load_task
from fedveil.tasks.data import Examples, data_of_all
from fedveil.tasks.own_scale import BOUNDED, STANDARD, own_scale

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm")

CLIENTS, EACH = 4, 60


def raw(client: int) -> np.ndarray:
    generator = np.random.default_rng(client)
    return np.column_stack(
        [generator.normal(60 + client, 12, EACH), generator.gamma(2, 3, EACH), np.arange(EACH) % 2]
    )


def standardised(x: np.ndarray, by: np.ndarray, ddof: int = 0) -> np.ndarray:
    return (x - by.mean(0)) / by.std(0, ddof=ddof)


def bounded(x: np.ndarray, by: np.ndarray) -> np.ndarray:
    return (x - by.min(0)) / (by.max(0) - by.min(0))


def of_all() -> np.ndarray:
    return np.concatenate([raw(client) for client in range(CLIENTS)])


def read(*tables: np.ndarray) -> Callable[[], list[Examples]]:
    every = [Examples(each.astype(np.float32), np.zeros(len(each), np.int64)) for each in tables]
    return lambda: every


def test_self_scaled_tables_are_detected() -> None:
    for ddof in (0, 1):
        assert own_scale(read(standardised(raw(0), raw(0), ddof))) == STANDARD
    assert own_scale(read(bounded(raw(0), raw(0)))) == BOUNDED
    parts = [raw(client) for client in range(CLIENTS)]
    assert own_scale(read(*(standardised(each, of_all()) for each in parts))) == STANDARD
    assert own_scale(read(*(bounded(each, of_all()) for each in parts))) == BOUNDED
    several = {"numbers": torch.tensor(standardised(raw(0), raw(0))).float(), "words": torch.arange(EACH)}
    assert own_scale(lambda: [Examples(several, torch.zeros(EACH))]) == STANDARD


UNSCALED: dict[str, np.ndarray] = {
    "raw": raw(0),
    "by public numbers": (raw(0) - 60) / 12,
    "by another client": standardised(raw(0), raw(1)),
    "by declared bounds": np.clip((raw(0) - [45, 1, 0]) / [30, 8, 1], 0, 1),
    "words of one place": np.eye(3)[np.arange(EACH) % 3],
    "two codes in balance": np.where(np.arange(EACH) % 2, 1.0, -1.0)[:, None].repeat(2, 1),
    "pixels": np.random.default_rng(0).integers(0, 256, (400, 9)) / 255,
    "images": np.random.default_rng(0).random((EACH, 1, 4, 4)),
    "few": standardised(raw(0)[:5], raw(0)[:5]),
    "none": raw(0)[:0],
}


@pytest.mark.parametrize("name", UNSCALED)
def test_other_data_are_not_warned_of(name: str) -> None:
    assert own_scale(read(UNSCALED[name])) == ""


@pytest.mark.parametrize(
    "name", ["digits", "mnist5k", "heart", "census", "star", "shakespeare", "fashion_mnist"]
)
def test_no_shipped_task_is_warned_of(name: str) -> None:
    assert name in TASKS
    try:
        task = load_task(name)
    except fv.Refusal as refusal:
        pytest.skip(str(refusal))  # its data are not installed
    clients = range(min(task.num_clients, 20))
    for client in clients:
        assert own_scale(lambda client=client: [data_of_all(task, client)]) == ""
    assert own_scale(lambda: (data_of_all(task, client) for client in clients)) == ""


@dataclass
class Wards(Classes):
    """Real data, scaled by what `scale` says."""

    scale: Callable[[int], np.ndarray]
    simulated: bool = False
    num_clients: int = CLIENTS
    data_id: str = "wards"
    held_out_public: bool = True
    held_out_client: int = 0

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Linear(3, 2)

    def client_data(self, client: int) -> Any:
        return self.scale(client).astype(np.float32), np.arange(EACH) % 2


RECORD = fv.Record(target_epsilon=8, target_delta=1e-3)
CENTRAL = fv.ClientCentral(target_epsilon=100, target_delta=1e-2)
BY_CLIENT, BY_ALL = lambda n: standardised(raw(n), raw(n)), lambda n: standardised(raw(n), of_all())


@pytest.mark.parametrize(
    ("scale", "privacy", "said"),
    [
        (BY_CLIENT, RECORD, "columns of client 0, and of 3 others, have mean 0 and deviation 1"),
        (BY_ALL, RECORD, "columns of all clients' data together have mean 0 and deviation 1"),
        (BY_ALL, CENTRAL, "columns of all clients' data together have mean 0 and deviation 1"),
        (BY_CLIENT, CENTRAL, None),
        (BY_CLIENT, fv.NoPrivacy(), None),
        (raw, RECORD, None),
    ],
)
def test_owner_of_the_data_is_warned(
    scale: Any, privacy: Any, said: str | None, tmp_path: Any, capsys: Any
) -> None:
    kept = {"dir": str(tmp_path / "ledgers")}
    keys: dict[str, Any] = {"cohort": "all", "num_rounds": 1, "accept_vacuous": True, "ledger": kept}
    run = fv.simulate(Wards(scale), privacy=privacy, quiet=True, **keys)
    told = capsys.readouterr().err
    assert (said in told) if said else "columns of" not in told
    assert "columns of" not in "".join(path.read_text("utf8", "ignore") for path in run.folder.iterdir())


@pytest.mark.parametrize(("scale", "warns"), [(BY_CLIENT, True), (raw, False)])
def test_a_device_says_so_in_its_own_log(scale: Any, warns: bool, caplog: Any) -> None:
    check_owners_data(Wards(scale), 0)
    assert ("columns of this device's data have mean 0 and deviation 1" in caplog.text) == warns
