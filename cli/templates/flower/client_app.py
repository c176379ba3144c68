"""Client half of a Flower app: trains on one shop's customers. The mod clips the update; nothing else leaves."""

import torch
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from fedveil.client.private_update import private_update

FEATURES, CLASSES, CUSTOMERS = 8, 2, 50
app = ClientApp()


@app.train(mods=[private_update])
def train(message: Message, context: Context) -> Message:
    """Return the model after some steps of gradient descent on this client's examples."""
    net = model()
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    inputs, targets = customers(int(context.node_config["partition-id"]), CUSTOMERS)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs), targets).backward()
        optimizer.step()
    return Message(RecordDict({"arrays": ArrayRecord(net.state_dict())}), reply_to=message)


def model() -> nn.Module:
    """Return a new model; the same values on every call."""
    net = nn.Linear(FEATURES, CLASSES)
    nn.init.zeros_(net.weight)
    nn.init.zeros_(net.bias)
    return net


def customers(seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Return inputs (count, FEATURES) float32 and targets (count,) int64."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, FEATURES, generator=generator)
    chance = torch.sigmoid(3 * inputs @ torch.linspace(-1, 1, FEATURES))
    return inputs, (torch.rand(count, generator=generator) < chance).long()
