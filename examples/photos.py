"""Images of a torchvision data set, read one by one and augmented, on clients under record-level privacy."""

from torch import nn
from torchvision import transforms as T
from torchvision.datasets import FakeData

import fedveil as fv
from fedveil.tasks.classification import softmax_regression

MIRRORED = (T.RandomHorizontalFlip(), T.RandomCrop(16, padding=2))


class Photos:
    simulated, num_clients = True, 4
    loss = staticmethod(nn.functional.cross_entropy)

    def model(self):
        return nn.Sequential(nn.Flatten(), softmax_regression(3 * 16 * 16, 10))

    def metrics(self, outputs, targets):
        return {"accuracy": (outputs.argmax(1) == targets).float().mean().item()}

    def client_data(self, client, augment=MIRRORED):
        return FakeData(60, (3, 16, 16), 10, T.Compose([*augment, T.ToTensor()]), random_offset=60 * client)

    def held_out(self):
        return self.client_data(99, augment=())


if __name__ == "__main__":
    run = fv.simulate(Photos(), privacy=fv.Record(target_delta=1e-2), cohort="all", num_rounds=3)
    print(run.metrics)
