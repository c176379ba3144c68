"""stock_flower: a model, data and training that know nothing of privacy."""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    """A small multilayer perceptron on 8x8 images."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(64, 32)
        self.fc2 = nn.Linear(32, 10)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))


digits = None  # Cache the dataset


def load_data(partition_id: int, num_partitions: int):
    """Load one partition of the digits: training data and test data."""
    # Only initialize the dataset once
    global digits
    if digits is None:
        digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    mine = order[partition_id::num_partitions]
    x = torch.tensor(digits.data[mine] / 16, dtype=torch.float32)
    y = torch.tensor(digits.target[mine], dtype=torch.int64)
    cut = int(0.8 * len(mine))
    train, test = TensorDataset(x[:cut], y[:cut]), TensorDataset(x[cut:], y[cut:])
    return DataLoader(train, batch_size=16, shuffle=True), DataLoader(test, batch_size=64)


def train(net, trainloader, epochs, lr):
    """Train the model on the training set."""
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    net.train()
    running_loss = 0.0
    for _ in range(epochs):
        for images, labels in trainloader:
            optimizer.zero_grad()
            loss = criterion(net(images), labels)
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
    return running_loss / (epochs * len(trainloader))


def test(net, testloader):
    """Validate the model on the test set."""
    criterion = nn.CrossEntropyLoss(reduction="sum")
    net.eval()
    correct, loss = 0, 0.0
    with torch.no_grad():
        for images, labels in testloader:
            outputs = net(images)
            loss += criterion(outputs, labels).item()
            correct += (outputs.argmax(1) == labels).sum().item()
    return loss / len(testloader.dataset), correct / len(testloader.dataset)
