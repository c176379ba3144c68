"""Words of a Hugging Face data set, of different lengths, padded in each batch, on clients under record-level privacy."""

import torch
from datasets import Dataset
from torch import nn
from torch.nn.utils.rnn import pad_sequence

import fedveil as fv


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.letters, self.out = nn.Embedding(27, 8, padding_idx=0), nn.Linear(8, 2)
        for number, parameter in enumerate(self.parameters()):
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(number))

    def forward(self, letters):
        return self.out(self.letters(letters).sum(1) / (letters > 0).sum(1, keepdim=True))


def padded(items):
    words = [torch.tensor([ord(letter) - 96 for letter in item["word"]]) for item in items]
    return {
        "letters": pad_sequence(words, batch_first=True),
        "label": torch.tensor([i["label"] for i in items]),
    }


class Letters:
    simulated, num_clients = True, 3
    model, loss = Bag, staticmethod(nn.functional.cross_entropy)

    def metrics(self, outputs, targets):
        return {"accuracy": (outputs.argmax(1) == targets).float().mean().item()}

    def client_data(self, client):
        words = [chr(97 + (row + client) % 26) * (1 + row % 5) for row in range(60)]
        data = Dataset.from_dict({"word": words, "label": [int(word < "n") for word in words]})
        return fv.LazyExamples(data, collate=padded)

    def held_out(self):
        return self.client_data(5)


if __name__ == "__main__":
    run = fv.simulate(Letters(), privacy=fv.Record(target_delta=1e-2), cohort="all", num_rounds=3)
    print(run.metrics)
