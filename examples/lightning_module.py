"""A LightningModule, as it is, on three clients under record-level privacy."""

import pytorch_lightning as L
import torch
from torch import nn
from torch.utils.data import TensorDataset

import fedveil as fv
from fedveil.tasks.adapters.lightning import LightningTask


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))

    def forward(self, inputs):
        return self.layers(inputs)

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        loss = nn.functional.cross_entropy(self(inputs), targets)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        inputs, targets = batch
        self.log("accuracy", (self(inputs).argmax(1) == targets).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.02)


inputs = torch.randn(4, 300, 8, generator=torch.Generator().manual_seed(0))
data = [TensorDataset(each, (each.sum(1) > 0).long()) for each in inputs]
task = LightningTask(Net, clients=data[:3], held_out=data[3], simulated=True)
run = fv.simulate(task, privacy=fv.Record(target_delta=1e-3), cohort="all", num_rounds=20)
print(run.metrics, run.epsilon)
