"""The linear model in NumPy: as torch trains it, from a file that is read strictly, and without torch in the process."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from flwr.app import Message, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.base.refusal import Refusal
from fedveil.client.training import sgd as training
from fedveil.deployment.device import linear
from fedveil.messages.client_settings import ClientSettings
from fedveil.messages.flower_adapter import claim_identity
from fedveil.messages.local_training import LocalTraining
from fedveil.messages.wire import instruct, memory_arrays
from fedveil.privacy.mechanisms.sum_spec import SumSpec
from fedveil.tasks.arrays import load_arrays
from fedveil.tasks.classification import softmax_regression
from fedveil.tasks.data import Examples


class Softmax:
    def loss(self, outputs, targets):
        return torch.nn.functional.cross_entropy(outputs, targets)


@settings(max_examples=40)
@given(
    st.integers(1, 60),
    st.integers(1, 70),
    st.integers(1, 3),
    st.sampled_from([0.0, 0.3]),
    st.integers(0, 9),
    st.integers(0, 2**32),
)
def test_it_trains_as_torch_does(records, batch, epochs, pull, client, key):
    draw = np.random.default_rng(records)
    inputs = draw.normal(size=(records, 7)).astype(np.float32)
    targets = draw.integers(0, 4, records)
    model = softmax_regression(7, 4)
    start = {n: draw.normal(size=p.shape).astype(np.float32) for n, p in model.state_dict().items()}
    load_arrays(model, start)
    sgd = LocalTraining(0.05, epochs, batch, pull)
    examples = Examples(torch.from_numpy(inputs), torch.from_numpy(targets))
    theirs = training.train(model, Softmax(), examples, sgd, client, key)
    weight, bias = start["weight"].copy(), start["bias"].copy()
    ours = linear.train(weight, bias, linear.Table(inputs, targets), sgd, client, key)
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    found = {name: value.numpy() for name, value in model.state_dict().items()}
    np.testing.assert_allclose(weight, found["weight"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(bias, found["bias"], rtol=1e-4, atol=1e-5)
    assert weight.dtype == bias.dtype == np.float32


def asked(**arrays) -> Message:
    claim_identity(1)
    content = RecordDict({"arrays": memory_arrays(arrays)})
    return Message(instruct(content, SumSpec(1.0), "run", 1), 2, "train")


TABLE = linear.Table(np.ones((4, 3), np.float32), np.array([0, 1, 1, 1]))
SETTINGS = ClientSettings("linear", LocalTraining(0.1, 1, 2))


@pytest.mark.parametrize(
    "arrays",
    [
        {"weight": np.zeros((2, 4), np.float32), "bias": np.zeros(2, np.float32)},
        {"weight": np.zeros((2, 3), np.float32), "bias": np.zeros(3, np.float32)},
        {"weight": np.zeros((1, 3), np.float32), "bias": np.zeros(1, np.float32)},  # too few classes
        {"weight": np.zeros((2, 3), np.float32), "bias": np.zeros(2, np.float32), "more": np.zeros(1)},
    ],
)
def test_a_model_that_does_not_fit_is_not_trained(arrays):
    with pytest.raises(ValueError):
        linear.train_round(asked(**arrays), 0, TABLE, SETTINGS)


def test_the_model_that_was_received_is_left_alone():
    arrays = {"weight": np.zeros((2, 3), np.float32), "bias": np.zeros(2, np.float32)}
    reply = linear.train_round(asked(**arrays), 0, TABLE, SETTINGS)
    assert not arrays["weight"].any() and reply.content["arrays"]["weight"].numpy().any()


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"inputs": np.zeros((2, 3), np.float32)},
        {"inputs": np.zeros((2, 3)), "targets": np.zeros(2, int)},
        {"inputs": np.zeros((2, 3), np.float32), "targets": np.zeros(3, int)},
        {"inputs": np.zeros((0, 3), np.float32), "targets": np.zeros(0, int)},
        {"inputs": np.zeros((2, 3), np.float32), "targets": np.array([0, -1])},
        {"inputs": np.zeros((2, 3), np.float32), "targets": np.zeros(2)},
        {"inputs": np.full((2, 3), np.nan, np.float32), "targets": np.zeros(2, int)},
        {"inputs": np.array([{}], object), "targets": np.zeros(1, int)},
    ],
)
def test_a_table_that_cannot_be_trained_on_is_refused(tmp_path, arrays):
    np.savez(tmp_path / "device.npz", **arrays)
    with pytest.raises(Refusal):
        linear.read_table(tmp_path / "device.npz")


def test_a_file_that_is_no_table_is_refused(tmp_path):
    (tmp_path / "device.npz").write_bytes(b"PK\x03\x04 not a zip")
    for name in ("device.npz", "missing.npz"):
        with pytest.raises(Refusal):
            linear.read_table(tmp_path / name)


LIGHT = """
import sys
import fedveil.deployment.device.agent, fedveil.deployment.device.commands, fedveil.deployment.device.device, fedveil.deployment.device.linear
import fedveil.deployment.device.device_ledger, fedveil.client.secure_update
heavy = ("torch", "opacus", "scipy", "dp_accounting", "ray", "hydra", "matplotlib", "pandas", "sklearn")
print([name for name in heavy if name in sys.modules])
"""


def test_a_device_loads_nothing_that_a_linear_model_does_without():
    command = [sys.executable, "-c", LIGHT]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"
