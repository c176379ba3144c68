"""Provisioned devices that train linear models, answered to without a network, and one that is killed on purpose.

As a script, `devices.py BUNDLE MESSAGE REPLY POINT` lives one life of a device: it answers the message in a file as its
agent would, and dies by SIGKILL at the named point. `devices.py BUNDLE FOLDER FIRST rounds` answers round after round
from the first on, each reply in a file of its own, until somebody kills it.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict

from fedveil.deployment.device import device as device_module
from fedveil.deployment.device import linear
from fedveil.deployment.device.client_bundle import read_client_bundle
from fedveil.deployment.device.device import Device, read_device
from fedveil.deployment.provision import provision
from fedveil.messages.flower_adapter import claim_identity, name_message, name_sender
from fedveil.messages.grids import AskingGrid
from fedveil.messages.local_training import LocalTraining
from fedveil.messages.message_codec import pack, unpack
from fedveil.messages.training_order import ORDER_KEY, ClientClaim, ModeName, TrainingOrder
from fedveil.messages.wire import WEIGHT, instruct, memory_arrays
from fedveil.privacy.budget import Adjacency
from fedveil.privacy.mechanisms.sum_spec import Segment, SumSpec
from fedveil.server.masking import Masking
from fedveil.server.round_terms import Sum
from fedveil.server.secure_sum import SecureSums

CLIENTS, FEATURES, CLASSES, RECORDS = 5, 6, 3, 40
FEDERATION = """\
federation: made
server: {{address: "localhost:{port}", listen: "127.0.0.1:{port}", also: [localhost, 127.0.0.1]}}
task: {{kind: linear, data: device.npz}}
policy: {{target_epsilon: 8.0, target_delta: 1e-5, trust_server: true, maximum_clipping_norm: 2.0, minimum_noise_multiplier: 1.0, require_log: false}}
clients: [{names}]
"""
CLAIM = ClientClaim(3.0, Adjacency.ZERO_OUT)
ORDER = TrainingOrder("spring", ModeName.CLIENT_DISTRIBUTED, LocalTraining(0.1, 1, 10), client=CLAIM)
CENTRAL = replace(ORDER, privacy=ModeName.CLIENT_CENTRAL)
SCALARS = (Segment("train_loss", 5.0), Segment(WEIGHT, 100.0))
SPEC = SumSpec(1.0, SCALARS, 0.05)


def make_federation(folder: Path, port: int = 1) -> Path:
    """Provision five devices with data of their own; return the folder."""
    names = ", ".join(f"{{name: c{number}}}" for number in range(CLIENTS))
    (folder / "federation.yaml").write_text(FEDERATION.format(names=names, port=port))
    provision(folder / "federation.yaml", folder / "made", None)
    for number in range(CLIENTS):
        draw = np.random.default_rng(number)
        inputs = draw.normal(size=(RECORDS, FEATURES)).astype(np.float32)
        targets = draw.integers(0, CLASSES, RECORDS)
        np.savez(folder / "made" / "clients" / f"c{number}" / "device.npz", inputs=inputs, targets=targets)
    return folder / "made"


def device_of(bundle: Path, **policy: object) -> Device:
    """Return a device as its agent would make it, with parts of its owner's policy changed."""
    claim_identity(1)
    read = read_client_bundle(bundle)
    changed = replace(read.policy, **policy)
    return read_device(replace(read, policy=changed, identity=replace(read.identity, policy=changed.floors)))


def content(order: TrainingOrder | None = ORDER, **more: object) -> RecordDict:
    """Return what a strategy sends: a model, and beside it the order."""
    arrays = {"weight": np.zeros((CLASSES, FEATURES), np.float32), "bias": np.zeros(CLASSES, np.float32)}
    record = ConfigRecord({} if order is None else {ORDER_KEY: order.to_json()})
    return RecordDict({"arrays": memory_arrays(arrays), "config": ConfigRecord({**record, **more})})


def in_the_clear(order: TrainingOrder | None = CENTRAL, number: int = 1, spec: SumSpec = SPEC) -> Message:
    """Return an instruction of a sum whose noise the server adds."""
    message = Message(instruct(content(order), spec, "spring", number), 2, "train")
    name_message(message, f"m{number}")
    return message


def code_of(device: Device, message: Message) -> int:
    """Return the code of the error that a device answers with; 0 without one."""
    reply = device.answer(message)
    return reply.error.code if reply.has_error() else 0


class Devices(AskingGrid):
    """Reaches devices by calling them; `fault` may answer in a device's place."""

    def __init__(
        self, devices: dict[int, Device], fault: Callable[[Message], Message | None] | None = None
    ) -> None:
        self.devices, self.fault = devices, fault
        self.seen: list[tuple[Message, Message]] = []
        self._run = claim_identity(1)

    @property
    def run(self):
        return self._run

    def set_run(self, run) -> None:
        self._run = run

    def get_node_ids(self) -> list[int]:
        return sorted(self.devices)

    def get_nodes(self):
        raise NotImplementedError

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        for number, message in enumerate(messages):
            name_message(message, f"{len(self.seen)} {number}")
            node = message.metadata.dst_node_id
            reply = (self.fault(message) if self.fault else None) or self.devices[node].answer(message)
            self.seen.append((message, reply))
            yield name_sender(reply, node)


def masked_sum(grid: Devices, number: int = 1, order: TrainingOrder = ORDER, noise: float = 3.0):
    """Let the devices sum in masks, as a server does; return how that ended."""
    roster = next(iter(grid.devices.values())).bundle.identity.roster
    masking = Masking(roster, dropout=0.4, collusion=0.1)
    wanted = Sum("spring", number, content(order), "train", SPEC, {"w": (CLASSES, FEATURES + 1)}, noise)
    return SecureSums(grid, masking).sum(grid.get_node_ids(), wanted, None)


def _die(*arguments: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _live(bundle: Path, message: Path, reply: Path, point: str) -> None:
    device = device_of(bundle)
    match point:
        case "after the reservation":
            device.task.train = _die
        case "while training":
            linear.train = _die
        case "before the memory is kept":
            device_module.replace_file = _die
        case "before the reply leaves":
            answer = device.answer
            device.answer = lambda asked: _die(answer(asked))
    reply.write_bytes(pack(device.answer(unpack(bytearray(message.read_bytes())))))


def _live_on(bundle: Path, folder: Path, number: int) -> None:
    device = device_of(bundle, target_epsilon=1e5)
    print("ready", flush=True)
    while True:
        (folder / f"{number}").write_bytes(pack(device.answer(in_the_clear(number=number))))
        number += 1


if __name__ == "__main__":
    if sys.argv[4] == "rounds":
        _live_on(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
    else:
        _live(*(Path(each) for each in sys.argv[1:4]), sys.argv[4])
