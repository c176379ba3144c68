"""Arrays of a model's size that a real client and its server hold at once, counted by tracemalloc: NumPy's, not torch's."""

import runpy
import tracemalloc
from collections.abc import Generator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from torch import Tensor, nn

from fedveil.base.refusal import Refusal
from fedveil.client.workbench import Workbench
from fedveil.deployment.device.client_bundle import read_client_bundle
from fedveil.deployment.device.device import Device, read_device
from fedveil.deployment.provision import provision
from fedveil.links.device_answers import Journal
from fedveil.links.grpc.device_end import answer_instruction
from fedveil.messages.client_settings import ClientSettings
from fedveil.messages.flower_adapter import claim_identity, name_message
from fedveil.messages.local_training import LocalTraining
from fedveil.messages.message_codec import pack, unpack
from fedveil.messages.training_order import ORDER_KEY
from fedveil.messages.wire import instruct, memory_arrays, sum_of, view
from fedveil.tasks.data import Examples

FAULTS = Path(__file__).parents[2] / "faults"
Wide = runpy.run_path(str(FAULTS / "wide_task.py"))["Wide"]
MADE = runpy.run_path(str(FAULTS / "devices.py"))
CENTRAL, SPEC = MADE["CENTRAL"], MADE["SPEC"]
WIDTH = 1500  # a model of 2.25 million parameters, beside which other objects are small
MODEL_BYTES = 4 * WIDTH**2
claim_identity(1)

# What came, the vector on its grid, and its packed bytes; beside them torch holds the model, whose place the update takes.
DEVICE = 2.7
# The sum in float64, and a reply.
SERVER = 2.7
FEDERATION = """\
federation: made
server: {address: "localhost:1", listen: "127.0.0.1:1"}
task: {target: "wide_task:Wide", allow_modules: [wide_task], args: {width: %d}}
policy: {target_epsilon: 8.0, target_delta: 1e-5, trust_server: true, require_log: false}
clients: [{name: c0}]
"""


def instruction(number: int) -> bytes:
    """Return an instruction as it comes."""
    records: dict[str, Any] = {
        "arrays": memory_arrays({"weight": np.ones((WIDTH, WIDTH), np.float32)}),
        "config": ConfigRecord({ORDER_KEY: CENTRAL.to_json()}),
    }
    message = Message(instruct(RecordDict(records), SPEC, "spring", number), 2, "train")
    name_message(message, f"m{number}")
    return pack(message)


@contextmanager
def models_held(most: float) -> Generator[None]:
    tracemalloc.start(1)
    try:
        before = tracemalloc.get_traced_memory()[0]
        yield
        held = (tracemalloc.get_traced_memory()[1] - before) / MODEL_BYTES
    finally:
        tracemalloc.stop()
    assert held <= most, held


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Device:
    """A device that has answered once: what is imported on the way counts for nothing."""
    folder = tmp_path_factory.mktemp("wide")
    (folder / "federation.yaml").write_text(FEDERATION % WIDTH)
    provision(folder / "federation.yaml", folder / "made", None)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FAULTS)
        made = read_device(read_client_bundle(folder / "made" / "clients" / "c0"))
    assert reply_to(made, instruction(1), folder)
    return made


def reply_to(device: Device, told: bytes, folder: Path) -> bytes:
    """Return what a device's end of the link sends upon an instruction that came."""
    with closing(Journal(folder / "journal")) as begun:
        return b"".join(answer_instruction("m", bytearray(told), device.answer, begun))


def test_a_device_holds_few_copies_of_its_model(device: Device, tmp_path: Path) -> None:
    told = instruction(2)
    with closing(Journal(tmp_path / "journal")) as begun, models_held(DEVICE):
        parts = answer_instruction("m", bytearray(told), device.answer, begun)
    assert not unpack(b"".join(parts)).has_error()


def test_a_server_takes_a_reply_without_a_copy_of_it(device: Device, tmp_path: Path) -> None:
    came = reply_to(device, instruction(3), tmp_path)
    with models_held(SERVER):
        total = sum_of((unpack(bytearray(each)) for each in [came]), SPEC, WIDTH**2 + SPEC.segment_size, 1)
    assert total.replies == 1 and np.any(total.total)


class Mixing(Wide):
    """Its model adds to each example what the others are, times its weights."""

    def model(self) -> nn.Module:
        class Model(nn.Module):
            def __init__(self, inner: nn.Module) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, inputs: Tensor) -> Tensor:
                return self.inner(inputs + inputs.mean(0))

        return Model(super().model())

    def client_data(self, client: int) -> Examples:
        return Examples(torch.arange(8.0 * self.width).reshape(8, -1), torch.arange(8) % 2)


def test_independence_is_measured_on_a_model_as_the_task_makes_it() -> None:
    """Beside values that are no numbers, sent by a server or left by an update, every example seems to stand alone."""
    task = Mixing(4)
    bench = Workbench(ClientSettings("mixing", LocalTraining()), task)
    for array in bench.lend().values():
        view(array)[:] = float("nan")
    with pytest.raises(Refusal):
        bench.private_model(task.client_data(0))
